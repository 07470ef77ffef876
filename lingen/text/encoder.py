"""One frozen Hugging Face text encoder.

Shapes: N tokens of one caption, S width of the encoder.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from lingen.text_config import EncoderConfig

# A tokenizer reads all of a caption before it cuts it. Real tokens are shorter by far; a caption may be a whole book.
CHARACTERS_A_TOKEN = 100
QUOTES = re.compile('"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|「([^」]*)」|『([^』]*)』')


def quoted(caption: str) -> str:
    """What stands between quotation marks, a line each; apostrophes are none. Empty where nothing does."""
    found = (next(filter(None, match.groups()), "").strip() for match in QUOTES.finditer(caption))
    return "\n".join(filter(None, found))


class HuggingFaceEncoder:
    """The last hidden states of a frozen encoder, with an LRU cache of captions in CPU memory.

    Each caption is encoded alone and unpadded. So its states do not depend on its batch mates, nor on what the cache
    holds, bit for bit, and a resumed run sees what the uninterrupted one saw. On a CPU it costs no more a caption than
    a padded batch does.

    Args:
        fingerprint: of all that decides the states: weights, tokenizer, and how they are used.
        cache: captions whose states are kept.
    """

    def __init__(self, model: Any, tokenizer: Any, config: EncoderConfig, *, fingerprint: str, cache: int) -> None:
        self.config, self.fingerprint = config, fingerprint
        self._model = model
        self._tokenizer = tokenizer
        self._capacity = cache
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()  # text -> (N, S) on the CPU

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device  # type: ignore[no-any-return]

    def count(self, caption: str) -> int:
        """Tokens of a caption before any are cut."""
        text = quoted(caption) if self.config.quoted_only else caption
        return len(self._tokenizer(text)["input_ids"])

    def tokens(self, caption: str) -> torch.Tensor:
        """(N, S) on the CPU, in the encoder's dtype; not to be written to. Tokens after the first ``length`` are cut.

        N is 0 where the encoder reads quotes only and the caption has none, and 1 at least everywhere else.
        """
        text = quoted(caption) if self.config.quoted_only else caption
        if self.config.quoted_only and not text:
            return torch.empty(0, self.config.dim, dtype=self._model.dtype)
        text = text[: CHARACTERS_A_TOKEN * self.config.length]
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        states = self._forward(text)
        self._cache[text] = states
        if len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return states

    @torch.no_grad()
    def _forward(self, text: str) -> torch.Tensor:
        ids = self._tokenizer(text, truncation=True, max_length=self.config.length)["input_ids"]
        tokens = torch.tensor([ids], dtype=torch.long, device=self.device)  # (1, N)
        with torch.autocast(tokens.device.type, enabled=False):  # the same states inside and outside of a bf16 step
            states: torch.Tensor = self._model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return states[0].cpu()  # (N, S)


@dataclass(frozen=True)
class StoredEncoder:
    """Stands for an encoder whose states were computed before: it knows those of the empty caption."""

    config: EncoderConfig
    fingerprint: str
    empty: torch.Tensor  # (N, S)

    def count(self, caption: str) -> int:
        """Tokens of the empty caption."""
        return len(self.tokens(caption))

    def tokens(self, caption: str) -> torch.Tensor:
        """Those of the empty caption.

        Raises:
            ValueError: another is asked for.
        """
        if caption:
            raise ValueError("the states of this caption are read with its sample, and not computed")
        return self.empty
