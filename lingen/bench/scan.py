"""The scan's cost per token against length, against full attention of the same width, and against other scans in torch.

All on one thread. The others are what mamba-ssm and transformers run where they have no fused kernel: on the same
inputs, in the same rounds, and with the same result, whose difference is reported.

Shapes: L tokens, H heads, P channels a head, G groups, N state channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from lingen.bench.timing import Case, Seconds, interleave, median, ratio
from lingen.kernels.mamba_package import bare_mamba_package
from lingen.kernels.ssd import ssd_ref

Lengths = Annotated[list[PositiveInt], Field(min_length=1)]
Scan = Callable[..., Tensor]


class ScanWords(BaseModel):
    """The default compares at one width: 256 = 4 heads of 64 for both.

    ``expand=2 directions=2`` is the scan of LinGen's MA-branch at that model width: 16 heads in two groups.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    attention_tokens: Lengths = [1024, 2048, 4096, 8192]
    rival_tokens: Lengths = [2048, 4096]  # where mamba-ssm's and transformers' torch scans are compared
    width: PositiveInt = 256
    head_dim: PositiveInt = 64
    d_state: PositiveInt = 64
    chunk_size: PositiveInt = 64
    expand: PositiveInt = 1
    directions: PositiveInt = 1  # each has its own heads, and its own group of B and C
    rounds: PositiveInt = 5

    @model_validator(mode="after")
    def _lengths_fit(self) -> ScanWords:
        if self.width % self.head_dim:
            raise ValueError(f"width={self.width} must be a multiple of head_dim={self.head_dim}")
        if missing := set(self.attention_tokens) - set(self.tokens):
            raise ValueError(f"attention_tokens={sorted(missing)} must be among tokens={self.tokens} to be compared")
        if ragged := [n for n in self.rival_tokens if n % self.chunk_size]:
            raise ValueError(
                f"rival_tokens={ragged} must be multiples of chunk_size={self.chunk_size}: mamba-ssm's are"
            )
        return self


def run(words: ScanWords) -> dict[str, Any]:
    """CPU time per token, forward and forward + backward, and the length from which the scan overtakes attention."""
    torch.set_num_threads(1)
    cases: dict[str, Case] = {}
    for length in sorted(set(words.tokens)):
        inputs, weight = _scan_inputs(words, length)
        calls = max(1, max(words.tokens) // length)  # each measurement covers as many tokens
        scan = _Step(_ours(words), inputs, weight)
        cases |= {f"ssd_fwd {length}": Case(scan.forward, calls), f"ssd_fwdbwd {length}": Case(scan.both, calls)}
    for length in sorted(set(words.attention_tokens)):
        inputs, weight = _attention_inputs(words, length)
        calls = max(1, max(words.attention_tokens) // length)
        attention = _Step(F.scaled_dot_product_attention, inputs, weight)
        cases |= {
            f"sdpa_fwd {length}": Case(attention.forward, calls),
            f"sdpa_fwdbwd {length}": Case(attention.both, calls),
        }
    scans = {"ours": _ours(words), **_rivals(words)}
    steps = {
        (name, length): _Step(scan, *_scan_inputs(words, length))
        for length in sorted(set(words.rival_tokens))
        for name, scan in scans.items()
    }
    for (name, length), step in steps.items():
        calls = 4 * max(words.rival_tokens) // length  # enough that a scan meets its own caches, not its rival's
        cases |= {f"{name}_fwd {length}": Case(step.forward, calls), f"{name}_fwdbwd {length}": Case(step.both, calls)}
    seconds = interleave(cases, words.rounds)
    return _report(words, seconds) | _report_rivals(steps, seconds)


class _Step:
    """A function with its inputs: forward alone, or forward and backward."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> None:
        self.function, self.inputs, self.weight = function, inputs, weight
        self.leaves = [t.detach().requires_grad_() for t in inputs]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.inputs)

    def both(self) -> None:
        torch.autograd.grad(self.function(*self.leaves), self.leaves, self.weight)


def _ours(words: ScanWords) -> Scan:
    """Of x, dt, A, B and C, as every scan here."""
    return lambda *inputs: ssd_ref(*inputs, chunk_size=words.chunk_size)


def _rivals(words: ScanWords) -> dict[str, Scan]:
    """The scans that other packages run in torch, of those that are installed; what is missing is said."""
    rivals: dict[str, Scan] = {}
    try:
        with bare_mamba_package():
            from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref
        rivals["mamba_ssm"] = lambda *inputs: ssd_chunk_scan_combined_ref(*inputs, words.chunk_size)
    except ImportError as problem:
        print(f"not compared with mamba-ssm's ssd_chunk_scan_combined_ref: {problem}")
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        in_torch = inspect.unwrap(mamba2_chunk_scan)  # without its choice of a kernel that may be installed
        rivals["transformers"] = lambda *inputs: in_torch(*inputs, words.chunk_size)
    except ImportError as problem:
        print(f"not compared with transformers' mamba2_chunk_scan: {problem}")
    return rivals


def _scan_inputs(words: ScanWords, length: int) -> tuple[list[Tensor], Tensor]:
    """x (1, L, H, P), dt (1, L, H), A (H,), B and C (1, L, G, N); the gradient of y."""
    torch.manual_seed(0)
    groups, heads = words.directions, words.directions * words.expand * words.width // words.head_dim
    x, weight = torch.randn(2, 1, length, heads, words.head_dim)
    dt = F.softplus(torch.randn(1, length, heads) - 3)
    B, C = torch.randn(2, 1, length, groups, words.d_state)
    return [x, dt, -torch.arange(1.0, heads + 1), B, C], weight


def _attention_inputs(words: ScanWords, length: int) -> tuple[list[Tensor], Tensor]:
    """q, k and v (1, H, L, P); the gradient of the output."""
    torch.manual_seed(0)
    q, k, v, weight = torch.randn(4, 1, words.width // words.head_dim, length, words.head_dim)
    return [q, k, v], weight


def _report(words: ScanWords, seconds: Seconds) -> dict[str, Any]:
    tokens, attention_tokens = sorted(set(words.tokens)), sorted(set(words.attention_tokens))
    result: dict[str, Any] = {
        "bench": "scan",
        "clock": "process CPU time, 1 thread, median of interleaved rounds",
        "torch": torch.__version__,
        **words.model_dump(),
        "tokens": tokens,
        "attention_tokens": attention_tokens,
    }
    for kind in ("ssd_fwd", "ssd_fwdbwd", "sdpa_fwd", "sdpa_fwdbwd"):
        lengths = tokens if kind.startswith("ssd") else attention_tokens
        costs = [median(seconds, f"{kind} {n}") / n * 1e6 for n in lengths]
        result[f"{kind}_us_per_token"] = [round(cost, 3) for cost in costs]
        print(f"{kind:12} us/token  " + "  ".join(f"{n}: {cost:.2f}" for n, cost in zip(lengths, costs, strict=True)))
    for kind, name in (("fwd", "crossover_tokens"), ("fwdbwd", "crossover_fwdbwd_tokens")):
        result[f"ratio_{kind}_64k_4k"] = _per_token_ratio(seconds, f"ssd_{kind}", 65536, 4096)
        speedups = {n: ratio(seconds, f"sdpa_{kind} {n}", f"ssd_{kind} {n}") for n in attention_tokens}
        result[f"sdpa_over_ssd_{kind}"] = [round(speedup, 3) for speedup in speedups.values()]
        result[name] = crossover(speedups)
    return result


def _report_rivals(steps: dict[tuple[str, int], _Step], seconds: Seconds) -> dict[str, Any]:
    """By rival: how many times the scan's CPU time it needs, and how far its result is from the scan's."""
    names, lengths = (list(dict.fromkeys(column)) for column in zip(*steps, strict=True))
    result: dict[str, Any] = {}
    for rival in names[1:]:
        pairs = [(steps[rival, n].forward(), steps["ours", n].forward()) for n in lengths]
        result[f"{rival}_difference"] = max(float((y - ours).abs().max() / ours.abs().max()) for y, ours in pairs)
        for kind in ("fwd", "fwdbwd"):
            ratios = {n: round(ratio(seconds, f"{rival}_{kind} {n}", f"ours_{kind} {n}"), 3) for n in lengths}
            result[f"{rival}_over_ssd_{kind}"] = list(ratios.values())
            print(f"{rival}_{kind} over ssd_{kind}  " + "  ".join(f"{n}: {times:.2f}" for n, times in ratios.items()))
    return result


def _per_token_ratio(seconds: Seconds, kind: str, long: int, short: int) -> float | None:
    """None where one of the lengths was not asked for."""
    if not {f"{kind} {long}", f"{kind} {short}"} <= seconds.keys():
        return None
    return round(ratio(seconds, f"{kind} {long}", f"{kind} {short}") * short / long, 3)


def crossover(speedups: dict[int, float]) -> int | None:
    """The length from which on every speedup is above 1; None where the longest one is not."""
    first = None
    for length in sorted(speedups, reverse=True):
        if speedups[length] <= 1:
            break
        first = length
    return first
