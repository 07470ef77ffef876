"""How much memory a training step will take on one rank, worked out before anything is allocated.

Weights, gradients and optimizer states follow from the parameter count and how the engines lay them out. Activations
come from running the model itself on the meta device, forward and backward, with every tensor counted from its first
use to its end; kernels that would be launched there are not, and what is allocated around them is. What is beyond torch
is not counted: the device's context, its allocator's gaps, the autoencoder and the text encoder.

Shapes: B samples of a micro-batch, token grid (T, H, W), C latent channels, L text tokens of width S.
"""

from __future__ import annotations

import contextlib
import importlib.util
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lingen.config import Config, EngineConfig
from lingen.engine import DTYPES
from lingen.flow import interpolate, sample_losses
from lingen.kernels import conv, forms, selective_scan_torch, ssd_torch
from lingen.kernels.index import Grid
from lingen.models import Backbone, make_model

PROBED = (2, 4)  # layers of the models that are run on the meta device: each layer adds as much as the one before
BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time, as lingen.engines.zero asks it to
GATHERED = 1_000_000_000  # parameters that ZeRO-3 holds whole at most (its stage3_max_live_parameters)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a training step, by what holds them."""

    weights: int
    gradients: int
    optimizer: int  # fp32 master weights, where the weights are not that, and both moments
    average: int  # of the weights (EMA): this rank's share
    buffers: int  # what DeepSpeed collects gradients in
    activations: int
    building: int  # all that is held at the fullest moment while model and engine are made

    @property
    def step(self) -> int:
        """All that is held in a step."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buffers + self.activations

    @property
    def total(self) -> int:
        """What the device must have."""
        return max(self.step, self.building)

    def as_dict(self) -> dict[str, int]:
        """For JSON, in bytes."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Probe:
    """What a model and a micro-batch come to, before an engine shares them out. Bytes but for the first."""

    parameters: int
    activations: int  # as the backward begins: the most that there are
    remaining: int  # ... in its last layer


def predict(config: Config, grid: Grid, *, batch: int, world: int, kernels: Mapping[str, str]) -> Memory:
    """The memory of one rank of ``world``, on micro-batches of ``batch`` samples of a token grid (T, H, W).

    Args:
        kernels: the form of each kernel, as ``planned_forms`` gives it.
    """
    return lay_out(config.engine, probe(config, grid, batch=batch, kernels=kernels), world)


def model_on_meta(config: Config) -> Backbone:
    """The model of a run, to ask for its shapes; nothing is allocated."""
    with torch.device("meta"):
        return make_model(config)


# ------------------------------------------------------------------------------------ weights, gradients, optimizer


def lay_out(engine: EngineConfig, found: Probe, world: int) -> Memory:
    """As ``lingen.engines`` and DeepSpeed hold things, from what they were seen to allocate.

    Activations go along the backward, while gradients come: whichever moment is the fullest counts. Ranks that share
    their samples (``engine.sequence_parallel``) share the activations evenly.
    """
    parameters, level, low = found.parameters, engine.zero_stage, DTYPES[engine.dtype].itemsize
    share = parameters // world  # of what is spread over the ranks
    masters = 0 if low == 4 and level == 0 else 4
    optimizer = (masters + 8) * (share if level else parameters)
    weights = low * parameters if level < 3 else low * share + (low * min(parameters, GATHERED) if world > 1 else 0)
    most, least = (size // engine.sequence_parallel for size in (found.activations, found.remaining))
    bucket = min(parameters, BUCKET)
    first = bucket / parameters  # of the backward, until a bucket is full
    kept, coming = _gradients(engine, parameters, share)
    kept_buffers, passing_buffers = (size * bucket for size in _buffers(engine, world))
    moments = (
        (most, kept, kept_buffers),
        (most - int((most - least) * first), kept + int(coming * first), kept_buffers + passing_buffers),
        (least, kept + coming, kept_buffers + passing_buffers),
    )
    activations, gradients, buffers = max(moments, key=sum)
    building = _building(engine, parameters, world)
    return Memory(weights, gradients, optimizer, 4 * share, buffers, activations, building)


def _gradients(engine: EngineConfig, parameters: int, share: int) -> tuple[int, int]:
    """Bytes of gradients that always are, and that come along the backward."""
    low = DTYPES[engine.dtype].itemsize
    if engine.kind == "torch":
        return 4 * parameters, (low if low < 4 else 0) * parameters  # bf16 ones, until a micro-batch's are all there
    if engine.zero_stage == 0:
        return 0, (4 if low == 4 else 6) * parameters  # in bf16 a step adds them up in fp32
    if engine.zero_stage == 1:
        return (0, 4 * parameters) if low == 4 else (4 * parameters, low * parameters)
    return (4 * share, 0) if engine.zero_stage == 3 else (0, 4 * share)


def _buffers(engine: EngineConfig, world: int) -> tuple[int, int]:
    """Bytes an element of DeepSpeed's bucket: what stays, and what comes with a full one, flat copies included."""
    if engine.kind == "torch":
        return 0, 0
    if engine.zero_stage == 0:
        return 0, (4 if engine.dtype == "fp32" else 0)
    if engine.zero_stage == 1:
        return (4 if world > 1 else 0), 4
    if engine.zero_stage == 3:
        return 4, 8
    kept = 4 if world > 1 and engine.grad_accumulation > 1 else 0
    return kept, (4 if world == 1 and engine.dtype == "fp32" else 8)


def _building(engine: EngineConfig, parameters: int, world: int) -> int:
    """The model is made whole in fp32; bf16 engines keep that until their masters are exact."""
    share = parameters // world
    if engine.kind == "torch":
        return 20 * parameters
    if engine.dtype == "fp32":
        return 4 * parameters + (8 * parameters if engine.zero_stage == 0 else 12 * share)
    made = {0: 18 * parameters, 1: 6 * parameters, 2: 2 * parameters, 3: 6 * share}[engine.zero_stage]
    flattened = 2 * parameters if world > 1 and engine.zero_stage in (1, 2) else 0
    return 4 * parameters + made + flattened + (0 if engine.zero_stage == 0 else 12 * share)


# ------------------------------------------------------------------------------------ activations


def probe(config: Config, grid: Grid, *, batch: int, kernels: Mapping[str, str]) -> Probe:
    """From two models of few layers: each layer more adds as much as the one before."""
    few, more = PROBED if config.depth > PROBED[1] else (config.depth - 1, config.depth)
    short, long = (_run_on_meta(config, depth, grid, batch, kernels) for depth in (few, more))
    parameters, activations = ((b - a) // (more - few) for a, b in zip(short, long, strict=True))  # of a layer
    rest = config.depth - more
    most = long[1] + rest * activations
    return Probe(long[0] + rest * parameters, most, most - (config.depth - 1) * activations)


def _run_on_meta(config: Config, depth: int, grid: Grid, batch: int, kernels: Mapping[str, str]) -> tuple[int, int]:
    """(parameters, the most bytes of activations at once) of a model of ``depth`` layers in one forward and backward.

    Parameters' gradients are dropped as they come: ``lay_out`` counts them.
    """
    dtype = DTYPES[config.engine.dtype]
    layers = config.size.depth.model_copy(update={config.model.name: depth})
    shallow = config.model_copy(update={"size": config.size.model_copy(update={"depth": layers})})
    model = model_on_meta(shallow).to(dtype)
    most = peak(model, lambda: _step(model, config, grid, batch, dtype), kernels)
    return sum(p.numel() for p in model.parameters()), most


def peak(model: nn.Module, step: Callable[[], None], kernels: Mapping[str, str]) -> int:
    """The most bytes of activations at once in ``step``, a forward and a backward of a model on the meta device."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    with Live("meta", besides=model.parameters()) as live, _nothing_launched(kernels, live):
        step()
    return int(live.peak)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _step(model: Backbone, config: Config, grid: Grid, batch: int, dtype: torch.dtype) -> None:
    """What ``lingen.step.train_step`` does with a micro-batch, from the latents on."""
    sides = tuple(n * side for n, side in zip(grid, config.size.patch, strict=True))
    latents, noise = torch.empty(2, batch, config.autoencoder.channels, *sides, device="meta")
    sigma = torch.empty(batch, device="meta")
    encoders = config.text.encoders
    states = {name: torch.empty(batch, e.length, e.dim, device="meta", dtype=dtype) for name, e in encoders.items()}
    mask = torch.ones(batch, sum(config.text.lengths.values()), device="meta", dtype=torch.bool)
    x = interpolate(latents, noise, sigma)
    velocity = model(x.to(dtype), sigma, states, mask).float()
    sample_losses(velocity, latents, noise).sum().backward()  # type: ignore[no-untyped-call]


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors on a kind of device that operations inside it make or meet, while they live.

    ``bytes`` are those now, ``peak`` the most at once. What is not known yet when an operation reads it (a table that
    was cached before, say) counts from there on.
    """

    def __init__(self, device: str, besides: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._device = device
        self._known = {_storage(t)._cdata for t in besides}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.meet((args, kwargs, out))
        return out

    def meet(self, values: Any) -> None:
        """Count the tensors among ``values``, a tree of any kind."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                storage = _storage(tensor)
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.bytes += size
                    weakref.finalize(storage, self._lose, key, size)
        self.peak = max(self.peak, self.bytes)

    def _lose(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


# ------------------------------------------------------------------------------------ kernels that do not run


def planned_forms(config: Config, device: str) -> dict[str, str]:
    """The form that each kernel of the run takes on a ``device`` ("cpu" or "cuda") that need not be here.

    A form whose package is not installed here is planned as torch's, which takes more memory.
    """
    auto = {kernel: choices[0] if device == "cuda" else "torch" for kernel, choices in forms.FORMS.items()}
    if device != "cuda":
        auto["attention"] = "sdpa"
    wanted = {kernel: form for kernel, form in config.kernels.model_dump().items() if form != "auto"}
    return {kernel: _runnable(kernel, form) for kernel, form in (auto | wanted).items()}


def _runnable(kernel: str, form: str) -> str:
    """The form that stands for this one on the meta device."""
    if kernel == "attention" and form != "torch":
        return "sdpa"  # all fused forms keep the same
    packages = {"triton": ("triton",), "mamba-ssm": ("triton", "mamba_ssm"), "torch": ()}[form]
    # Mamba1's fused form is no Triton kernel, and does not run there.
    return form if kernel != "selective_scan" and all(map(importlib.util.find_spec, packages)) else "torch"


@contextlib.contextmanager
def _nothing_launched(kernels: Mapping[str, str], live: Live) -> Iterator[None]:
    """Inside, the kernels' seams take these forms on the meta device, and allocate what they do without computing."""

    def not_launched(kernel: Any, grid: object) -> Callable[..., None]:
        """In the place of ``kernel[grid]``."""
        if hasattr(kernel, "configs"):
            kernel.best_config = kernel.configs[0]  # mamba-ssm asks which block sizes were the fastest
        return lambda *arguments, **options: live.meet(arguments)

    with contextlib.ExitStack() as stack:

        def swap(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        forms_here = {kernel: _runnable(kernel, form) for kernel, form in kernels.items()}
        swap(forms, "chosen", lambda kernel, *_, **__: forms_here[kernel])
        swap(F, "scaled_dot_product_attention", _attention)
        for walk in (ssd_torch, selective_scan_torch):
            swap(walk, "_blocks", _unwalked(walk._blocks))
        swap(conv, "_weight_gradient", _no_weight_gradient)
        if {"triton", "mamba-ssm"} & set(forms_here.values()):
            from triton.runtime.jit import KernelInterface

            swap(KernelInterface, "__getitem__", not_launched)
            swap(torch.cuda, "device", contextlib.nullcontext)
            swap(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
        yield


def _no_weight_gradient(x: Tensor, grad: Tensor, taps: int) -> Tensor:
    """In the place of ``lingen.kernels.conv``'s, which walks over blocks."""
    return x.new_empty(grad.shape[2], taps, dtype=torch.promote_types(x.dtype, torch.float32))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """In the place of ``F.scaled_dot_product_attention``, for which torch takes its unfused form on the meta device."""
    seen: Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return seen


class _Attention(torch.autograd.Function):
    """What fused attention keeps: its inputs, its result and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # (B, h, N, P)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _Unwalked(list[Any]):
    """As long as the list it is made from, but nothing to walk over."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _unwalked(blocks: Callable[..., Sequence[Any]]) -> Callable[..., _Unwalked]:
    return lambda *shape: _Unwalked(blocks(*shape))
