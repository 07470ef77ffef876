"""The contract between the data and the training loop.

Shapes: B samples of this rank's micro-batch, F frames, H height, W width, all in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tokens = dict[str, torch.Tensor]  # one caption's states (N, S) by text encoder, unpadded; N may be 0


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of sample that a stage trains on. An image is a clip of one frame."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Batch:
    """The samples at ``positions`` of one global batch.

    A sample that could not be decoded is a *hole*: its ``valid`` is False, its pixels are grey, its caption is empty.
    It keeps its position, so that every rank stays in step and the loss masks it. A batch is *lost* where a shard could
    not be read: that says nothing against its samples, so it is no batch of holes, and nobody may train on it.

    From shards of latents ``latents`` are there (zeros for a hole), and ``pixels`` have no frames.
    """

    bucket: Bucket
    pixels: torch.Tensor  # (B, 3, F, H, W) uint8
    captions: list[str]
    keys: list[str]
    valid: torch.Tensor  # (B,) bool
    positions: torch.Tensor  # (B,) int64, position of each sample in the global batch
    lost: str | None = None  # the shard that could not be read, and the error
    latents: torch.Tensor | None = None  # (B, C, T, h, w), in the dtype that they are stored in
    states: States | None = None  # of the captions, where they lie beside the latents


@dataclass(frozen=True)
class States:
    """The stored states of B captions, of N <= L tokens each; a hole has none."""

    padded: dict[str, torch.Tensor]  # by text encoder, (B, L, S); behind the N-th token lies anything
    counts: torch.Tensor  # (B, encoders) int64, each N

    def rows(self) -> list[Tokens]:
        """One entry a caption."""
        return [
            {name: padded[n, :count] for (name, padded), count in zip(self.padded.items(), counts, strict=True)}
            for n, counts in enumerate(self.counts.tolist())
        ]
