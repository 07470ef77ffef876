"""Captions as token states: any number of frozen text encoders, joined as one token sequence."""

from lingen.text.encoder import HuggingFaceEncoder, quoted
from lingen.text.encoders import TextEncoder, TextEncoders, load_text_encoders, refuse_other_text
from lingen.text.join import Text, Tokens, join, moved, stacked, without
from lingen.text.load import MINILM_PACKAGE, load_encoder

__all__ = [
    "MINILM_PACKAGE",
    "HuggingFaceEncoder",
    "Text",
    "TextEncoder",
    "TextEncoders",
    "Tokens",
    "join",
    "load_encoder",
    "load_text_encoders",
    "moved",
    "quoted",
    "refuse_other_text",
    "stacked",
    "without",
]
