from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lingen.config import EngineConfig, OptimConfig
from lingen.dist import Dist
from lingen.engine import Engine, decay_groups, make_engine

ONE = Dist(0, 1, 0, torch.device("cpu"))
OPTIM = OptimConfig(weight_decay=0.1, grad_clip=0.3)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modulation_table = nn.Parameter(torch.randn(3, 7))
        self.labels = nn.Embedding(5, 7)
        self.norm = nn.LayerNorm(7)
        self.up = nn.Linear(7, 13)
        self.down = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = x.to(self.up.weight.dtype)  # (B, 7)
        x = self.norm(x + self.labels(label) + self.modulation_table[label % 3])  # (B, 7)
        out: torch.Tensor = self.down(torch.tanh(self.up(x))).float()  # (B, 3)
        return out


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 7, generator=g), torch.randint(0, 5, (8,), generator=g), torch.randn(8, 3, generator=g)


def squares(model: nn.Module, step: int, rows: slice = slice(None)) -> torch.Tensor:
    x, label, y = batch(step)
    loss: torch.Tensor = (model(x[rows], label[rows]) - y[rows]).square().mean(1).sum() / 8
    return loss


def make(dtype: str = "fp32", accumulation: int = 1) -> Engine:
    config = EngineConfig(dtype=dtype, grad_accumulation=accumulation)  # type: ignore[arg-type]
    return make_engine(Tiny(), config, OPTIM, ONE)


def run(engine: Engine, steps: int, parts: int = 1) -> list[tuple[float, float]]:
    out = []
    for step in range(steps):
        total = 0.0
        for part in range(parts):
            loss = squares(engine.model, step, slice(part * 8 // parts, (part + 1) * 8 // parts))
            engine.backward(loss)
            total += loss.item()
        out.append((total, engine.step(1e-2)))
    return out


def test_decay_is_for_matrices_alone() -> None:
    (decays, decayed), (not_, plain) = decay_groups(Tiny())
    assert decays and not not_
    assert decayed == ["up.weight", "down.weight"]
    assert set(plain) == {"modulation_table", "labels.weight", "norm.weight", "norm.bias", "up.bias", "down.bias"}
    model = Tiny()
    model.scale = nn.Parameter(torch.ones(2, 1, 4))  # the gain of a norm over heads
    assert "scale" in dict(decay_groups(model))[False]
    assert decay_groups(nn.LayerNorm(3)) == [(False, ["weight", "bias"])]


def test_it_does_what_a_handwritten_loop_does() -> None:
    model = Tiny()
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[n] for n in names], "weight_decay": OPTIM.weight_decay if decay else 0.0}
        for decay, names in decay_groups(model)
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False)
    wanted = []
    for step in range(10):
        loss = squares(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        adam.step()
        adam.zero_grad()
        wanted.append((loss.item(), norm.item()))
    assert max(norm for _, norm in wanted) > OPTIM.grad_clip  # clipping was part of it
    engine = make()
    torch.testing.assert_close(torch.tensor(run(engine, 10)), torch.tensor(wanted), rtol=1e-6, atol=0)
    for name, p in engine.model.named_parameters():
        torch.testing.assert_close(p, named[name])
    assert engine.steps == 10


def test_micro_batches_add_up_to_their_batch() -> None:
    torch.testing.assert_close(
        torch.tensor(run(make(accumulation=4), 10, parts=4)), torch.tensor(run(make(), 10)), rtol=1e-5, atol=0
    )


def test_bf16_weights_follow_exact_masters() -> None:
    engine = make("bf16")
    exact = dict(Tiny().named_parameters())
    for f in engine.fragments():
        assert torch.equal(f.master, exact[f.name].flatten())
    losses = run(engine, 10)
    masters = {f.name: f.master for f in engine.fragments()}
    for name, p in engine.model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.flatten(), masters[name].bfloat16())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run(make(), 10)), rtol=5e-2, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: str) -> None:
    engine = make(dtype)
    run(engine, 1)
    before = [f.master.clone() for f in engine.fragments()]
    engine.backward(squares(engine.model, 1) * math.nan)
    assert not math.isfinite(engine.step(1e-2))
    assert engine.steps == 1
    assert all(torch.equal(b, f.master) for b, f in zip(before, engine.fragments(), strict=True))
    engine.backward(squares(engine.model, 1))
    assert math.isfinite(engine.step(1e-2)) and engine.steps == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_refused_step_leaves_no_trace(dtype: str) -> None:
    engine, spared = make(dtype, accumulation=2), make(dtype, accumulation=2)
    assert run(engine, 3, parts=2) == run(spared, 3, parts=2)
    asked: list[float] = []
    for _ in range(2):
        engine.backward(1e4 * squares(engine.model, 1))
    norm = engine.step(1e-2, lambda norm: bool(asked.append(norm) or True))
    assert asked == [norm] and norm > 1e2
    assert engine.steps == spared.steps == 3
    for f, other in zip(engine.fragments(), spared.fragments(), strict=True):
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(f, name), getattr(other, name))
    assert run(engine, 3, parts=2) == run(spared, 3, parts=2)  # nor in the gradients


def test_what_is_written_into_fragments_is_trained_on() -> None:
    engine = make("bf16")
    for f in engine.fragments():
        f.master.fill_(0.5)
    engine.refresh()
    assert all(bool((p == 0.5).all()) for p in engine.model.parameters())


def test_a_parameter_without_gradient_is_as_one_with_zeros() -> None:
    class Spare(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, 4)

    engine = make_engine(Spare(), EngineConfig(), OPTIM, ONE)
    before = {f.name: f.master.clone() for f in engine.fragments()}
    engine.backward(squares(engine.model, 0))
    engine.step(1e-2)
    after = {f.name: f.master for f in engine.fragments()}
    # Only decay: the same as DeepSpeed, whose flat gradient has zeros there.
    torch.testing.assert_close(after["spare.weight"], before["spare.weight"] * (1 - 1e-2 * OPTIM.weight_decay))
    assert torch.equal(after["spare.bias"], before["spare.bias"])


def test_what_no_checkpoint_would_hold_is_refused() -> None:
    model = Tiny()
    model.up.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"up\.weight"):
        make_engine(model, EngineConfig(), OPTIM, ONE)
    with pytest.raises(ValueError, match="running_mean"):
        make_engine(nn.BatchNorm1d(3), EngineConfig(), OPTIM, ONE)
