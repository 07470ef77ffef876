"""What the memory of sampling is predicted to be, against what torch's allocator says that it was."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile

from lingen.autoencoder_config import TileConfig
from lingen.autoencoders.pca import PcaAutoencoder
from lingen.autoencoders.tae import Tae, TaeAutoencoder
from lingen.autoencoders.tiles import tiled
from lingen.bench.workload import Subject, bench_config
from lingen.cache_config import FixedConfig
from lingen.config import BucketConfig, SamplerConfig
from lingen.memory import planned_forms
from lingen.sampling.cache import CacheRun
from lingen.sampling.guidance import contexts, forward_of, guided
from lingen.sampling.solver import solve
from lingen.sampling_memory import (
    SamplingMemory,
    forms_here,
    predict_cache,
    predict_decoding,
    predict_denoising,
    predict_weights,
)
from lingen.tae_config import TaeConfig

CPU = torch.device("cpu")
GB = 10**9
HELD = FixedConfig(period=2)


def most(call: Any) -> int:
    """The most bytes that were allocated in ``call`` beyond those before it, from the allocator's own events."""
    gc.collect()
    with profile(profile_memory=True, use_kineto=True) as recorded:
        call()
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("model", "mode"), [("lingen", "batch"), ("dit", "two_passes")])
def test_denoising_takes_what_was_predicted(model: str, mode: Any) -> None:
    config = bench_config(model, "tiny", "size.depth={lingen: 6, dit: 6}", "text.encoders.minilm.length=16")
    shape = BucketConfig(frames=57, height=64, width=128, batch_size=1)  # 8 x 4 x 8 tokens
    sampler = SamplerConfig(guidance=mode, steps=2)
    subject = Subject(config, CPU, train=False)
    forward = forward_of(subject.model)
    width = config.text.encoders["minilm"].dim

    @torch.no_grad()
    def denoise() -> None:
        text = {"minilm": torch.randn(1, 16, width)}, torch.ones(1, 16, dtype=torch.bool)
        velocity = guided(forward, text, text, 5.0, device=CPU, dtype=torch.float32, mode=mode)
        noise = torch.randn(1, 16, 8, 8, 16)
        solve(velocity, noise, torch.tensor([1.0, 0.5, 0.0]), "euler", lambda step, sigma, x: x)

    denoise()  # what is built once: tables of positions and orders
    kernels = forms_here(CPU, torch.float32)
    predicted = predict_denoising(config, shape, sampler, batch=1, dtype=torch.float32, kernels=kernels)
    assert predicted == pytest.approx(most(denoise), rel=0.15)
    assert predict_weights(config, torch.float32) == sum(4 * p.numel() for p in subject.model.parameters())


@pytest.mark.parametrize("tile", [None, TileConfig(frames=33, height=64, width=64)])
def test_decoding_takes_what_was_predicted(tile: TileConfig | None) -> None:
    config = bench_config("dit", "tiny")
    config = config.model_copy(update={"autoencoder": config.autoencoder.model_copy(update={"tile": tile})})
    basis = torch.linalg.qr(torch.randn(3 * 8 * 8 * 8, 16)).Q.T.reshape(16, 3, 8, 8, 8)
    model = tiled(PcaAutoencoder(basis, torch.zeros(3, 8, 8, 8), torch.ones(16), CPU), tile)
    latents = torch.randn(1, 16, 10, 16, 16)
    predicted = predict_decoding(config, model, BucketConfig(frames=73, height=128, width=128, batch_size=1), CPU)
    assert predicted == pytest.approx(most(lambda: model.decode(latents)), rel=0.15)


@pytest.mark.parametrize(
    ("cache", "mode"),
    [
        (HELD, "batch"),
        (FixedConfig(period=2, reuse="taylor", order=2), "two_passes"),
        (FixedConfig(sites={"cross": 2, "mlp": 3}), "two_passes"),
    ],
)
def test_a_cache_stores_what_was_predicted(cache: FixedConfig, mode: Any) -> None:
    config = bench_config("dit", "tiny", "size.depth={lingen: 3, dit: 3}", "text.encoders.minilm.length=16")
    shape, sampler = BucketConfig(frames=17, height=32, width=64, batch_size=1), SamplerConfig(guidance=mode, steps=8)
    model = Subject(config, CPU, train=False).model
    run = CacheRun(cache, model, calls=8, contexts=contexts(5.0, mode))
    text = {"minilm": torch.randn(2, 16, 384)}, torch.ones(2, 16, dtype=torch.bool)
    velocity = guided(run.forward, text, text, 5.0, device=CPU, dtype=torch.float32, mode=mode)
    noise = torch.randn(2, 16, 3, 4, 8)
    solve(torch.no_grad()(velocity), noise, torch.linspace(1, 0, 9), "euler", lambda step, sigma, x: x)
    stored = sum(tensor.nbytes for tensors in run.stored.values() for tensor in tensors)
    assert stored == predict_cache(config, cache, shape, sampler, batch=2, dtype=torch.float32)


def test_a_minute_at_512p_fits_one_gpu_of_80_gb() -> None:
    shape = BucketConfig(frames=1081, height=512, width=896, batch_size=1)
    sampler = SamplerConfig(guidance="two_passes")
    tile = TileConfig(frames=65, height=256, width=256)
    network = Tae(
        TaeConfig(width=128, multipliers=(1, 2, 4, 4), blocks=2, channels=16, time=8)
    )  # as conf/tae/movie_gen
    decoder = tiled(TaeAutoencoder(network, torch.zeros(16), torch.ones(16), CPU, torch.bfloat16), tile)
    for name in ("lingen", "dit"):
        config = bench_config(name, "4b")
        about = config.autoencoder.model_copy(update={"kind": "tae", "dtype": "bf16", "tile": tile})
        config = config.model_copy(update={"autoencoder": about})
        memory = SamplingMemory(
            weights=predict_weights(config, torch.bfloat16),
            text=0,
            denoising=predict_denoising(
                config, shape, sampler, batch=1, dtype=torch.bfloat16, kernels=planned_forms(config, "cuda")
            ),
            cache=predict_cache(config, HELD, shape, sampler, batch=1, dtype=torch.bfloat16),
            decoding=predict_decoding(config, decoder, shape, CPU),
        )
        assert 20 * GB < memory.total < 40 * GB
        assert memory.cache == 2 * 136 * 32 * 56 * 2048 * 2  # one sum a context
        assert f"{memory.total / 1e9:.3g} GB (weights {memory.weights / 1e9:.3g}" in str(memory)
