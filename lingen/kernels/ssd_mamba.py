"""mamba-ssm's Triton kernels behind ``ssd``, and the pieces in which they can address what they are given.

They add up ids times strides in 32 bits, and read and write the wrong places, silently, past 2^31 - 1 elements. A
tensor's largest offset counts, not its size: a view that skips columns reaches further than its elements. So the batch
and the sequence are cut where some tensor of some launch, forward or backward, would reach too far, and the state is
carried. Slices are views: nothing is copied but results and gradients, which are put together.

They multiply fp32 in TF32, Triton's default, so in fp32 the torch form is the more exact one.

Shapes: B batch, L tokens, H heads, P channels a head, G groups of heads that share B and C, N state channels a head.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lingen.kernels.layout import last_offset
from lingen.kernels.mamba_package import bare_mamba_package

MAX_OFFSET = 2**31 - 1
MAX_GRID = 65535  # programs along the second and third axis of a launch
PROCESSORS = 1024  # more than any device has: dB and dC are kept apart for so many programs' heads, and then added
TILE = 32  # tokens or channels: the smallest block whose partial sums the kernels keep apart

Kernel = Callable[..., tuple[Tensor, Tensor]]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def scan_mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """``ssd_ref`` without its checks: y (B, L, H, P) in x's dtype and the final states (B, H, P, N) in fp32.

    Raises:
        ValueError: one chunk of one sample cannot be addressed.
    """
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B.to(x.dtype), C.to(x.dtype)))
    D = None if D is None else D.float().contiguous()
    return scan_in_pieces(_kernel(), x, dt, A.float(), B, C, D, initial, chunk_size, MAX_OFFSET)


@functools.cache
def _kernel() -> Kernel:
    with bare_mamba_package():
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    kernel: Kernel = mamba_chunk_scan_combined
    return kernel


def scan_in_pieces(
    kernel: Kernel,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None,
    chunk_size: int, limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernel`` over the pieces: y (B, L, H, P) and the final states (B, H, P, N)."""
    samples, tokens = piece(x, dt, B, C, chunk_size, limit)
    starts = [None] * x.shape[0] if initial is None else _cut(initial, samples, 0)
    outputs, finals = [], []
    for state, *sample in zip(starts, *(_cut(t, samples, 0) for t in (x, dt, B, C)), strict=False):
        ys = []
        for x_, dt_, B_, C_ in zip(*(_cut(t, tokens, 1) for t in sample), strict=True):
            y, state = kernel(x_, dt_, A, B_, C_, chunk_size, D=D, initial_states=state, return_final_states=True)
            if y.requires_grad:  # its gradient may be a view into a larger tensor
                y.register_hook(functools.partial(_addressable, limit=limit))  # type: ignore[no-untyped-call]
            ys.append(y)
        outputs.append(_join(ys, 1))
        finals.append(state)
    return _join(outputs, 0), _join(finals, 0)


def _addressable(gradient: Tensor, limit: int) -> Tensor:
    return gradient if last_offset(gradient.shape, gradient.stride()) <= limit else gradient.contiguous()


def _cut(t: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    return torch.split(t, size, dim) if t.shape[dim] > size else [t]  # splitting in one costs the backward a copy


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def piece(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, chunk_size: int, limit: int) -> tuple[int, int]:
    """Samples and tokens of a piece, such that no launch passes ``limit`` and that there are as few as possible.

    x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N), of which only shapes and strides are looked at. Whole chunks,
    unless a piece is the whole sequence.

    Raises:
        ValueError: one chunk of one sample cannot be addressed.
    """
    batch, length, heads = x.shape[:3]
    chunks = -(-length // chunk_size)

    def fitting(samples: int) -> int:
        """How many chunks of that many samples one launch can take."""

        def reach(chunks: int) -> int:
            tokens = min(chunks * chunk_size, length)
            return max(largest_offsets(x, dt, B, C, chunk_size, samples, tokens).values())

        launched = min(chunks, MAX_GRID // samples, MAX_GRID // B.shape[2]) if heads <= MAX_GRID else 0
        if launched and reach(launched) <= limit:
            return launched
        return bisect.bisect_right(range(1, launched + 1), limit, key=reach)

    fewest, best = batch * chunks + 1, (0, 0)
    for cuts in range(1, batch + 1):
        if cuts >= fewest:
            break
        samples = -(-batch // cuts)
        if (fit := fitting(samples)) and (pieces := -(-batch // samples) * -(-chunks // fit)) < fewest:
            fewest, best = pieces, (samples, min(fit * chunk_size, length))
    if not all(best):
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()}: a chunk of chunk_size={chunk_size} tokens reaches past "
            f"element {limit}, the last that mamba-ssm can address; make it contiguous, or chunk_size smaller"
        )
    return best


def largest_offsets(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, chunk_size: int, samples: int, tokens: int
) -> dict[str, int]:
    """By kernel of mamba-ssm: the largest offset of any of its tensors on that piece, forward and then backward.

    x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N) are the whole, and a piece keeps their strides. What the kernels
    allocate is contiguous: one state a chunk, dt and the decays by chunk, C B^T once a group, and gradients.
    """
    (H, P), (G, N), q = x.shape[2:], B.shape[2:], chunk_size
    chunks = samples * -(-tokens // q)
    view_x, view_dt, view_B, view_C = (last_offset((samples, tokens, *t.shape[2:]), t.stride()) for t in (x, dt, B, C))
    y, steps = samples * tokens * H * P - 1, chunks * H * q - 1
    states, scores = chunks * H * P * N - 1, chunks * G * q * q - 1
    skip = -(-q // TILE) * chunks * H * P - 1  # the gradient of D, chunk by chunk

    def tiled(extent: int) -> int:  # per step, over blocks of ``extent``
        return chunks * H * q * -(-extent // TILE) - 1

    def split(extent: int) -> int:  # dB, dC (N) and dC B^T (q), before the sum over the programs that share a group
        return min(chunks * q * H, chunks * q * G + PROCESSORS * q) * extent - 1

    return {
        "_chunk_cumsum_fwd_kernel": max(view_dt, steps),
        "_chunk_state_fwd_kernel": max(view_x, view_B, steps, states),
        "_state_passing_fwd_kernel": max(steps, states),
        "_bmm_chunk_fwd_kernel": max(view_B, view_C, scores),
        "_chunk_scan_fwd_kernel": max(view_x, view_C, y, steps, states, scores),
        "_chunk_scan_bwd_dstates_kernel": max(view_C, y, steps, states),
        "_state_passing_bwd_kernel": max(steps, states),
        "_chunk_scan_chunk_state_bwd_dx_kernel": max(view_x, view_B, y, tiled(P), states, scores, skip),
        "_chunk_state_bwd_db_kernel": max(view_x, view_B, tiled(N), states, split(N)),
        "_chunk_scan_bwd_dc_kernel": max(view_C, y, tiled(N), states, split(N)),
        "_chunk_scan_bwd_dcb_kernel": max(view_x, y, steps, split(q)),
        "_bmm_chunk_bwd_kernel": max(view_B, view_C, split(N), scores),
        "_chunk_scan_bwd_ddAcs_stable_kernel": max(view_x, y, tiled(q), scores),
        "_chunk_cumsum_bwd_kernel": max(view_dt, steps),
    }
