"""Full softmax attention, the DiT's: one seam, the libraries' fused kernels and a pure-torch form.

Shapes: B batch, N tokens, h heads of P channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingen.kernels import forms

BLOCK_SCORES = 2**26  # scores that attention_ref holds at a time
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every token to every token, scores scaled by P**-0.5.

    Args:
        q, k, v: (B, N, h, P); views of one buffer are fine.

    Returns:
        (B, N, h, P).

    Raises:
        ValueError: an argument has a wrong shape, dtype or layout; the message names it.
    """
    _check(q, k, v)
    form = forms.chosen("attention", q.device)
    return _FORMS[form](q, k, v)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``attention`` written out, in fp32 (fp64 where q is), some queries at a time: the forward's memory is bounded."""
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.transpose(1, 2).to(exact) for x in (q, k, v))  # (B, h, N, P) each
    batch, heads, tokens, channels = queries.shape
    rows = max(1, BLOCK_SCORES // (batch * heads * tokens))
    keys = keys.transpose(2, 3) * channels**-0.5  # (B, h, P, N)
    seen = [(block @ keys).softmax(dim=-1) @ values for block in queries.split(rows, dim=2)]  # (B, h, rows, P) each
    return torch.cat(seen, dim=2).transpose(1, 2).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own choice among its kernels."""
    seen = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, h, N, P)
    return seen.transpose(1, 2)


def _pinned(backend: SDPBackend) -> Attention:
    """Torch's kernel of one backend, or an error."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return run


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attention's own package."""
    from flash_attn import flash_attn_func

    seen: Tensor = flash_attn_func(q, k, v)
    return seen


_FORMS: dict[str, Attention] = {
    "torch": attention_ref,
    "sdpa": _sdpa,
    "flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "flash-attn": _flash_attn,
}


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, N, h, P), each at least 1")
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; "
                f"it must be as q is, {tuple(q.shape)} {q.dtype} on {q.device}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} {tuple(x.shape)} has dtype {x.dtype}; it must be floating point")
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; the last must be 1")
