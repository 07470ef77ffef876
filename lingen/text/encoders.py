"""All text encoders of a run.

Shapes: B captions; of an encoder: L its length, N <= L tokens of one caption, S its width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch

from data.batch import Tokens
from lingen.errors import UserError
from lingen.text.encoder import HuggingFaceEncoder, StoredEncoder
from lingen.text.join import Text, join, without
from lingen.text.load import load_encoder, load_fingerprint
from lingen.text_config import EncoderConfig, TextConfig


class TextEncoder(Protocol):
    """What the training loop and the sampler need to know of a run's text encoders."""

    fingerprints: dict[str, str]  # by encoder, of all that decides its states: runs with others cannot be compared
    lengths: dict[str, int]  # tokens of each encoder
    dropout: dict[str, float]  # the share of the samples that train without its tokens

    def encode(
        self,
        captions: Sequence[str],
        left_out: Sequence[Collection[str]] = (),
        stored: Sequence[Tokens] | None = None,
    ) -> Text:
        """States (B, L, S) fp32 by encoder, zero where the mask (B, sum(L)) bool is False; each row has one token at
        least.

        The empty caption stands for "no condition" in classifier-free guidance. ``left_out`` names for each caption the
        encoders whose tokens it goes without; a caption that would go without all is the empty one. ``stored`` are
        the captions' states, where they were computed before; those of the empty caption are not looked at.
        """
        ...


class TextEncoders:
    """The encoders of a run, in the order of the configuration."""

    def __init__(self, encoders: Mapping[str, HuggingFaceEncoder | StoredEncoder], device: torch.device | str) -> None:
        self._encoders = dict(encoders)
        self._device = device
        self.configs: dict[str, EncoderConfig] = {name: encoder.config for name, encoder in encoders.items()}
        self.fingerprints = {name: encoder.fingerprint for name, encoder in encoders.items()}
        self.lengths = {name: config.length for name, config in self.configs.items()}
        self.dropout = {name: config.dropout for name, config in self.configs.items()}

    def tokens(self, caption: str) -> Tokens:
        """One caption's states (N, S) by encoder, on the CPU and in that encoder's dtype: what can be stored, and what
        ``join`` makes the model's text of. They depend on the caption and the fingerprints alone."""
        return {name: encoder.tokens(caption) for name, encoder in self._encoders.items()}

    def counts(self, caption: str) -> dict[str, int]:
        """Tokens of one caption by encoder, before any are cut."""
        return {name: encoder.count(caption) for name, encoder in self._encoders.items()}

    def encode(
        self,
        captions: Sequence[str],
        left_out: Sequence[Collection[str]] = (),
        stored: Sequence[Tokens] | None = None,
    ) -> Text:
        """See ``TextEncoder.encode``."""
        rows = [stored[n] if stored and caption else self.tokens(caption) for n, caption in enumerate(captions)]
        if left_out:
            rows = [without(row, names, self.tokens("")) for row, names in zip(rows, left_out, strict=True)]
        return join(rows, self.configs, self._device)


def refuse_other_text(before: Mapping[str, str], now: Mapping[str, str], who: str) -> None:
    """Compare fingerprints by encoder. ``who`` has those ``before``: 'DIR was trained with'.

    Raises:
        UserError: an encoder's is another one.
    """
    for name in (name for name in {**before, **now} if before.get(name) != now.get(name)):
        here, there = (values.get(name, "none")[:12] for values in (now, before))
        raise UserError(
            f"text.encoders.{name}: its weights, tokenizer, length, dtype or quoted_only (fingerprint {here}) are not "
            f"what {who} ({there}); name that encoder"
        )


def load_text_encoders(config: TextConfig, device: torch.device | str) -> TextEncoders:
    """The encoders of ``config.encoders``, frozen, on ``device``.

    Raises:
        UserError: as ``load_encoder``.
    """
    return TextEncoders(
        {name: load_encoder(name, encoder, config.cache, device) for name, encoder in config.encoders.items()}, device
    )


def stored_encoders(
    config: TextConfig, before: Mapping[str, str], empty: Tokens, where: str, device: torch.device | str
) -> TextEncoders:
    """The encoders of ``config.encoders`` where the states of all captions are stored. No model is built.

    Args:
        before: the fingerprints of the encoders that made the states; the files are read to compare them.
        empty: the states of the empty caption.
        where: 'data.path=DIR', for messages.

    Raises:
        UserError: the files are not there, or are of other encoders; or ``dim`` is not the width of the states.
    """
    now = {name: load_fingerprint(name, encoder) for name, encoder in config.encoders.items()}
    refuse_other_text(before, now, f"made the states in {where}")
    for name, encoder in config.encoders.items():
        width = empty[name].shape[1]
        if width != encoder.dim:
            raise UserError(
                f"text.encoders.{name}.dim={encoder.dim}, but the states in {where} are {width} wide; "
                f"set text.encoders.{name}.dim={width}"
            )
    return TextEncoders(
        {name: StoredEncoder(encoder, now[name], empty[name]) for name, encoder in config.encoders.items()}, device
    )
