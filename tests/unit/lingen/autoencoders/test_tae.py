"""Our own autoencoder: what inflation leaves alone, what time may see, its files, and the losses it is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders import load_autoencoder
from lingen.autoencoders.tae import MEAN, STD, Tae, TaeAutoencoder
from lingen.autoencoders.tae_game import TERMS, TaeGame
from lingen.autoencoders.tae_layers import TimeAttention, TimeConv
from lingen.autoencoders.tae_losses import Perceptual, adaptive_weight, kl, load_perceptual, outlier_penalty
from lingen.compose import validate
from lingen.errors import UserError
from lingen.tae_config import AdversarialConfig, LossesConfig, PerceptualConfig, TaeConfig

SMALL = TaeConfig(width=8, multipliers=(1, 2, 2, 2), blocks=1, channels=4)
PLAYS = LossesConfig(adversarial=AdversarialConfig(from_samples=0, width=8, levels=2))


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> torch.Tensor:
    pixels = torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames))
    return pixels * 2 - 1


def small(config: TaeConfig = SMALL) -> Tae:
    torch.manual_seed(0)
    return Tae(config)


def trained_in_time(model: Tae) -> Tae:
    """All that inflation begins with as nothing becomes something."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, TimeConv):
            nn.init.normal_(layer.weight, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)
        if isinstance(layer, TimeAttention):
            nn.init.normal_(layer.out.weight, std=0.2)
    return model


def frozen(model: Tae) -> TaeAutoencoder:
    channels = model.config.channels
    return TaeAutoencoder(
        model, torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels), "cpu", torch.float32
    )


@pytest.mark.parametrize("time", [1, 2, 8])
def test_shapes_follow_the_ratios(time: int) -> None:
    model = small(SMALL.model_copy(update={"time": time}))
    mean, log_variance = model.encode(clip(17, batch=2))
    assert mean.shape == log_variance.shape == (2, 4, 16 // time + 1, 2, 3)
    assert model.decode(mean).shape == (2, 3, 17, 16, 24)


def test_the_inflated_model_equals_the_image_model_on_images() -> None:
    image, inflated = small(), small()
    for layer in image.modules():
        for name, inner in list(layer.named_children()):
            if isinstance(inner, TimeConv | TimeAttention):
                setattr(layer, name, nn.Identity())
    pixels = clip(1, batch=2)
    (mean, _), (expected, _) = inflated.encode(pixels), image.encode(pixels)
    assert torch.equal(mean, expected) and torch.equal(inflated.decode(mean), image.decode(mean))
    video = clip(17)  # of which it sees each eighth frame, and shows each for eight
    mean, _ = inflated.encode(video)
    for latent in range(3):
        torch.testing.assert_close(mean[:, :, latent], image.encode(video[:, :, [8 * latent]])[0][:, :, 0])
    shown = inflated.decode(mean)
    for frame in range(17):
        torch.testing.assert_close(shown[:, :, frame], image.decode(mean[:, :, [(frame + 7) // 8]])[:, :, 0])


def test_training_on_images_leaves_time_alone() -> None:
    model = small()
    mean, _ = model.encode(clip(1))
    model.decode(mean).square().mean().backward()  # type: ignore[no-untyped-call]
    past, own = [], []
    for layer in model.modules():
        if isinstance(layer, TimeConv):
            assert layer.weight.grad is not None
            past.append(layer.weight.grad[:, :, :-1].abs().max())
            own.append(layer.weight.grad[:, :, -1].abs().max())
        if isinstance(layer, TimeAttention):
            past.extend(p.grad.abs().max() for p in layer.parameters() if p.grad is not None)
    assert max(past) == 0 and min(own) > 0 and len(own) > 10


def test_nothing_looks_ahead() -> None:
    autoencoder = frozen(trained_in_time(small()))
    pixels = clip(17)
    latents = autoencoder.encode(pixels)
    torch.testing.assert_close(autoencoder.encode(pixels[:, :, :1]), latents[:, :, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(autoencoder.encode(pixels[:, :, :9]), latents[:, :, :2], atol=1e-5, rtol=1e-4)
    shown = autoencoder.decode(latents)
    torch.testing.assert_close(autoencoder.decode(latents[:, :, :2]), shown[:, :, :9], atol=1e-5, rtol=1e-4)
    later = pixels.clone()
    later[:, :, 9:] *= -1
    changed = autoencoder.encode(later)
    torch.testing.assert_close(changed[:, :, :2], latents[:, :, :2], atol=1e-5, rtol=1e-4)
    earlier = pixels.clone()
    earlier[:, :, 0] *= -1
    seen = (autoencoder.encode(earlier) - latents).abs().amax((0, 1, 3, 4))
    assert (changed - latents)[:, :, 2].abs().max() > 1e-3 and (seen > 1e-4).all()  # the past is seen


def test_bytes_batches_and_autocast_give_the_same_latents() -> None:
    autoencoder = frozen(trained_in_time(small()))
    pixels = ((clip(9, batch=2) + 1) * 127.5).to(torch.uint8)
    latents = autoencoder.encode(pixels)
    assert torch.equal(latents, autoencoder.encode(pixels.float() / 127.5 - 1)) and latents.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latents, autoencoder.encode(pixels))
    torch.testing.assert_close(autoencoder.encode(pixels[1:]), latents[1:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"10x16x24 is not \(8\*k \+ 1\)"):
        autoencoder.encode(clip(10))


# ------------------------------------------------------------------------------------ files


def saved(folder: Path, **metadata: str) -> Path:
    model = small()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {**weights, MEAN: torch.zeros(4), STD: torch.ones(4)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"kind": "tae", "tae": SMALL.model_dump_json(), **metadata})
    return folder


def config(path: Path, **changes: Any) -> AutoencoderConfig:
    return validate(AutoencoderConfig, {"kind": "tae", "path": str(path), "channels": 4, **changes})


def test_a_file_or_its_folder_is_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "export")
    whole = load_autoencoder(config(folder), "cpu")
    assert whole.fingerprint == load_autoencoder(config(folder / "model.safetensors"), "cpu").fingerprint
    latents = whole.encode(clip(9))
    torch.testing.assert_close(latents, small().encode(clip(9))[0].detach())
    half = load_autoencoder(config(folder, dtype="bf16"), "cpu").encode(clip(9))
    assert half.dtype == torch.float32 and 0 < (half - latents).abs().max() < 0.1
    tiled = load_autoencoder(config(folder, tile={"frames": 9}), "cpu")
    assert tiled.encode(clip(33)).shape == (1, 4, 5, 2, 3)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: folder.rename(folder.with_name("gone")), r"does not exist; name runs/NAME/export/STAGE"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9), "cannot be read as safetensors"),
        (lambda folder: saved(folder, kind="pca"), "does not hold a 'tae' autoencoder"),
        (lambda folder: saved(folder, tae="{}"), "is not a whole autoencoder"),
        (lambda folder: saved(folder, tae=json.dumps({"width": "wide"})), "is not a whole autoencoder"),
    ],
)
def test_what_is_no_autoencoder_is_one_line(tmp_path: Path, harm: Any, says: str) -> None:
    folder = saved(tmp_path / "export")
    harm(folder)
    with pytest.raises(UserError, match=says) as caught:
        load_autoencoder(config(folder), "cpu")
    assert "\n" not in str(caught.value)


def test_other_ratios_than_the_configurations_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "export")
    with pytest.raises(UserError, match=r"autoencoder\.channels=8, but .* has 4"):
        load_autoencoder(config(folder, channels=8), "cpu")
    with pytest.raises(UserError, match="takes no subfolder"):
        config(folder, subfolder="vae")
    with pytest.raises(UserError, match=r"tae\.time=16 must be a power of 2 up to 8"):
        validate(TaeConfig, {"time": 16})


# ------------------------------------------------------------------------------------ losses


def test_the_divergence_is_torchs() -> None:
    mean, log_variance = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3)
    here = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(here, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(kl(mean, log_variance), expected)


def test_the_penalty_sees_outliers_alone() -> None:
    torch.manual_seed(0)
    latents = torch.rand(2, 4, 3, 8, 8)
    assert (outlier_penalty(latents, 3.0) == 0).all()
    latents[1, :, 2, 5, 5] = 20.0
    calm, spiked = outlier_penalty(latents, 3.0)
    x = latents[1, :, 2]
    off = (x - x.mean((1, 2), keepdim=True)).norm(dim=0)
    by_hand = (off - 3 * x.std((1, 2), correction=0).norm()).clamp(min=0).mean() / 3
    torch.testing.assert_close(spiked, by_hand)
    assert calm == 0 < spiked


def vgg(*, lpips: bool = False) -> dict[str, torch.Tensor]:
    """A VGG of three levels, 1 + 2 + 1 convolutions, in torchvision's places."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for place, (into, out) in {0: (3, 4), 3: (4, 6), 5: (6, 6), 8: (6, 8)}.items():
        weights[f"features.{place}.weight"] = torch.randn(out, into, 3, 3, generator=generator) * 0.3
        weights[f"features.{place}.bias"] = torch.randn(out, generator=generator) * 0.1
    for level, width in enumerate((4, 6, 8)) if lpips else ():
        weights[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return weights


@pytest.mark.parametrize("lpips", [False, True])
def test_the_perceptual_loss_is_that_of_a_sequential(lpips: bool) -> None:
    weights = vgg(lpips=lpips)
    layers: list[nn.Module] = []
    for place in (0, 3, 5, 8):
        weight = weights[f"features.{place}.weight"]
        while len(layers) < place:
            layers.append(nn.MaxPool2d(2))
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        conv.load_state_dict({"weight": weight, "bias": weights[f"features.{place}.bias"]})
        layers += [conv, nn.ReLU()]
    a, b = clip(2, batch=2), clip(3, batch=2)[:, :, :2]
    expected = torch.zeros(2)
    for frame in range(2):
        x, y = (
            (p[:, :, frame] - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
            / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
            for p in (a, b)
        )
        for place, layer in enumerate(layers):
            x, y = layer(x), layer(y)
            if place in (1, 6, 9):
                off = (nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)).square()
                lin = weights.get(f"lin{(1, 6, 9).index(place)}.model.1.weight", torch.ones(1))
                expected += (off * lin).sum(1).mean((1, 2)) / 2
    perceptual = Perceptual(weights)
    assert perceptual.is_lpips == lpips
    torch.testing.assert_close(perceptual(a, b), expected)


def test_files_that_are_no_vgg_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    with pytest.raises(UserError, match=r"losses\.perceptual\.path=.* does not exist"):
        load_perceptual(str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_perceptual(str(path))
    weights = vgg()
    harms: list[dict[str, torch.Tensor | None]] = [
        {"features.0.weight": None},
        {"features.3.weight": torch.zeros(6, 5, 3, 3)},
        {"lin0.model.1.weight": torch.zeros(1, 4, 1, 1)},
    ]
    for harm in harms:
        changed = {name: tensor for name, tensor in {**weights, **harm}.items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(UserError, match="holds no VGG that is known here"):
            load_perceptual(str(path))


# ------------------------------------------------------------------------------------ the game


def gradients(losses: LossesConfig, *, plays: bool, batch: int = 2) -> tuple[TaeGame, torch.Tensor]:
    torch.manual_seed(0)
    game = TaeGame(SMALL, losses, None)
    noise = torch.randn(2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(3))
    found = game(clip(9, batch=2)[:batch], noise[:batch], plays=plays)
    found[:, 0].sum().backward()
    return game, found.detach()


def test_playing_changes_gradients_and_not_the_loss() -> None:
    still, before = gradients(PLAYS, plays=False)
    played, found = gradients(PLAYS, plays=True)
    torch.testing.assert_close(found[:, :6], before[:, :6])
    assert (before[:, 6:] == 0).all() and (found[:, 7] > 0).all() and found.shape == (2, 1 + len(TERMS))
    assert played.discriminator is not None and still.discriminator is not None
    assert all(p.grad is None for p in still.discriminator.parameters())
    pairs = zip(still.autoencoder.parameters(), played.autoencoder.parameters(), strict=True)
    assert any(not torch.allclose(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None)


def test_each_player_has_the_gradient_of_its_own_loss() -> None:
    plain = PLAYS.model_copy(
        update={"adversarial": AdversarialConfig(from_samples=0, width=8, levels=2, adaptive=False)}
    )
    game, _ = gradients(plain, plays=True)
    torch.manual_seed(0)
    other = TaeGame(SMALL, plain, None)
    noise = torch.randn(2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(3))
    pixels = clip(9, batch=2)
    mean, log_variance = other.autoencoder.encode(pixels)
    decoded = other.autoencoder.decode(mean + (0.5 * log_variance).exp() * noise)
    discriminator = other.discriminator
    assert discriminator is not None
    own = (decoded - pixels).abs().mean((1, 2, 3, 4)) + plain.kl * kl(mean, log_variance)
    own = own + plain.outlier * outlier_penalty(mean, 3.0) - 0.5 * discriminator(decoded).mean(1)
    expected = torch.autograd.grad(own.sum(), list(other.autoencoder.parameters()), retain_graph=True)
    for (name, p), gradient in zip(game.autoencoder.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, msg=name, atol=1e-5, rtol=1e-3)
    judged = (1 - discriminator(pixels)).relu().mean(1) + (1 + discriminator(decoded.detach())).relu().mean(1)
    expected = torch.autograd.grad(judged.sum(), list(discriminator.parameters()))
    assert game.discriminator is not None
    for (name, p), gradient in zip(game.discriminator.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, msg=name, atol=1e-5, rtol=1e-3)


def test_recomputed_activations_give_the_same_gradients() -> None:
    kept, _ = gradients(PLAYS, plays=True)
    torch.manual_seed(0)
    again = TaeGame(SMALL, PLAYS, None)
    again.autoencoder.recompute(True)
    noise = torch.randn(2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(3))
    again(clip(9, batch=2), noise, plays=True)[:, 0].sum().backward()
    for (name, p), q in zip(again.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_sample_costs_the_same_whoever_is_beside_it() -> None:
    _, both = gradients(PLAYS, plays=True)
    _, alone = gradients(PLAYS, plays=True, batch=1)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    others, adversarial = torch.randn(3, 5), torch.randn(3, 5)
    weight = adaptive_weight(others, adversarial)
    torch.testing.assert_close((weight[:, None] * adversarial).norm(dim=1), others.norm(dim=1))


def test_the_perceptual_loss_counts_with_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    losses = LossesConfig(perceptual=PerceptualConfig(path="vgg", weight=2.0))
    found = TaeGame(SMALL, losses, Perceptual(vgg()))(clip(9), None).detach()
    parts = dict(zip(TERMS, found[0, 1:].tolist(), strict=True))
    expected = parts["l1"] + 2 * parts["perceptual"] + losses.kl * parts["kl"] + losses.outlier * parts["outlier"]
    assert parts["perceptual"] > 0 and found[0, 0].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="nobody to play against"):
        TaeGame(SMALL, losses, None)(clip(9), None, plays=True)
