"""The token states of several encoders as one sequence.

Shapes: B captions; of an encoder: L its length, N <= L tokens of one caption, S its width. The joined sequence has
sum(L) places: those of the first encoder, then those of the next, each block padded by itself. So where a token stands
depends neither on the caption nor on the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from data.batch import Tokens
from lingen.text_config import EncoderConfig

Text = tuple[dict[str, torch.Tensor], torch.Tensor]  # states (B, L, S) fp32 by encoder; mask (B, sum(L)) bool


def join(rows: Sequence[Tokens], encoders: Mapping[str, EncoderConfig], device: torch.device | str) -> Text:
    """What the model takes, on ``device``: states are zero where the mask is False.

    ``rows`` holds one entry a caption: what ``TextEncoders.tokens`` gave, now or when it was stored.

    Raises:
        ValueError: a caption has no token of any encoder.
    """
    states: dict[str, torch.Tensor] = {}
    masks = []
    for name, encoder in encoders.items():
        padded = torch.zeros(len(rows), encoder.length, encoder.dim)  # (B, L, S)
        mask = torch.zeros(len(rows), encoder.length, dtype=torch.bool)  # (B, L)
        for row, tokens in enumerate(rows):
            count = len(tokens[name])
            padded[row, :count] = tokens[name]
            mask[row, :count] = True
        states[name] = padded.to(device)
        masks.append(mask)
    joined = torch.cat(masks, dim=1)  # (B, sum(L))
    if not joined.any(1).all():
        raise ValueError("a caption has no token of any text encoder")
    return states, joined.to(device)


def without(tokens: Tokens, left_out: Collection[str], empty: Tokens) -> Tokens:
    """``tokens`` without those of some encoders.

    Where nothing would be left, they are those of the empty caption (``empty``): attention needs a token to look at,
    and a sample that knows no encoder's tokens is one without its caption.
    """
    rest = {name: states[:0] if name in left_out else states for name, states in tokens.items()}
    return rest if any(map(len, rest.values())) else empty


def moved(text: Text, device: torch.device, dtype: torch.dtype) -> Text:
    """The states on ``device`` in ``dtype``, and the mask there."""
    states, mask = text
    return {name: part.to(device, dtype) for name, part in states.items()}, mask.to(device)


def stacked(first: Text, second: Text) -> Text:
    """Two batches as one."""
    states = {name: torch.cat([part, second[0][name]]) for name, part in first[0].items()}
    return states, torch.cat([first[1], second[1]])
