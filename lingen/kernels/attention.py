"""Full softmax attention, the DiT's: one seam, the libraries' fused kernels and a pure-torch form.

Shapes: B batch, N tokens, h heads of P channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingen.kernels import forms
from lingen.kernels.layout import check_qkv, last_offset

MAX_ELEMENTS = 2**31 - 1  # the libraries compute some offsets in 32 bits, flash-attention those in its fp32 buffers
VECTOR = 16  # numbers of the widest vector registers
BLOCK_SCORES = 2**26  # scores that attention_ref holds at a time
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every token to every token, scores scaled by P**-0.5.

    Args:
        q, k, v: (B, N, h, P); views of one buffer are fine.

    Returns:
        (B, N, h, P).

    Raises:
        ValueError: an argument has a wrong shape, dtype or layout; the message names it.
    """
    check_qkv(q, k, v)
    form = forms.chosen("attention", q.device, q.dtype)
    return attention_ref(q, k, v) if form == "torch" else attend_in_pieces(_LIBRARIES[form], q, k, v, MAX_ELEMENTS)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``attention`` written out, in fp32 (fp64 where q is), some queries at a time: the forward's memory is bounded."""
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.transpose(1, 2).to(exact) for x in (q, k, v))  # (B, h, N, P) each
    keys = keys.transpose(2, 3) * q.shape[3] ** -0.5  # (B, h, P, N)
    rows = max(1, BLOCK_SCORES // (keys.numel() // q.shape[3]))
    seen = [(some @ keys).softmax(dim=-1) @ values for some in torch.split(queries, rows, dim=2)]  # (B, h, rows, P)
    return torch.cat(seen, dim=2).transpose(1, 2).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own choice among its kernels: q, k, v (B, h, N, P) -> (B, h, N, P).

    Its fused kernel for CPUs turns a query of NaN into zeros where there are fewer keys than a vector register holds.
    """
    if q.shape[2] >= VECTOR:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _tokens_first(attend: Attend) -> Attend:
    """From q, k, v (B, h, N, P), which torch's kernels take, to (B, N, h, P)."""
    return lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _pinned(backend: SDPBackend) -> Attend:
    """Torch's kernel of one backend, or an error."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return _tokens_first(attend)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attention's own package."""
    seen = importlib.import_module(forms.flash_attn_module()).flash_attn_func(q, k, v)
    out: Tensor = seen[0] if isinstance(seen, tuple) else seen  # some releases for Hopper give the log-sums too
    return out


_LIBRARIES: dict[str, Attend] = {
    "cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "flash-attn": _flash_attn,
    "flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "sdpa": _tokens_first(sdpa),
}


def attend_in_pieces(attend: Attend, q: Tensor, k: Tensor, v: Tensor, limit: int) -> Tensor:
    """``attend`` to all at once, to one sample at a time, or to some heads of one: no offset passes ``limit``."""
    if max(last_offset(x.shape, x.stride()) for x in (q, k, v)) <= limit:
        return attend(q, k, v)
    if q.shape[0] > 1:
        samples = zip(torch.split(q, 1), torch.split(k, 1), torch.split(v, 1), strict=True)
        return torch.cat([attend_in_pieces(attend, *sample, limit) for sample in samples])
    heads = max(1, limit // (q.shape[1] * q.shape[3]))
    outputs = []
    for piece in zip(*(torch.split(x, heads, dim=2) for x in (q, k, v)), strict=True):
        seen = attend(*(x.contiguous() for x in piece))  # else a piece would keep the strides of the whole
        if seen.requires_grad:
            seen.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]  # so would its gradient
        outputs.append(seen)
    return torch.cat(outputs, dim=2)
