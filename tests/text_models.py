"""Tiny random text encoders of each class, saved as the real ones are, with tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right"]
T5 = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
SIDES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}
BERT = {"vocab_size": 11, "hidden_size": 8, **SIDES}
CLIP: dict[str, Any] = {
    "text_config": {**BERT, "eos_token_id": 1, "bos_token_id": 1, "projection_dim": 8},
    "vision_config": {**BERT, "image_size": 8, "patch_size": 8, "projection_dim": 8},
    "projection_dim": 8,
}


def save_tokenizer(folder: Path, *, end_token: bool = True) -> None:
    """Whole words, and an end token."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if end_token:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_t5(folder: Path, *, end_token: bool = True, seed: int = 0) -> None:
    """A random T5 encoder of 8 dimensions."""
    save_tokenizer(folder, end_token=end_token)
    save(folder, hf.T5EncoderModel, hf.T5Config(**T5), seed)


def save(folder: Path, model: Any, config: Any, seed: int = 0) -> None:
    """The model with random weights."""
    torch.manual_seed(seed)
    model(config).save_pretrained(folder)


def save_byt5(folder: Path) -> None:
    """A random ByT5 of 8 dimensions: bytes need no vocabulary."""
    hf.ByT5Tokenizer().save_pretrained(folder)
    save(folder, hf.T5ForConditionalGeneration, hf.T5Config(**T5 | {"vocab_size": 384, "decoder_start_token_id": 0}))


# As they are found: alone, or inside a model of more than a text encoder.
KINDS: dict[str, tuple[Any, Any]] = {
    "T5EncoderModel": (hf.T5EncoderModel, lambda: hf.T5Config(**T5)),
    "T5EncoderModel of a whole T5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(**T5, decoder_start_token_id=0),
    ),
    "UMT5EncoderModel": (hf.UMT5EncoderModel, lambda: hf.UMT5Config(**T5)),
    "CLIPTextModel": (hf.CLIPTextModel, lambda: hf.CLIPTextConfig(**CLIP["text_config"])),
    "CLIPTextModel of a whole CLIP": (hf.CLIPModel, lambda: hf.CLIPConfig(**CLIP)),
    "MetaClip2TextModel of a whole MetaCLIP": (hf.MetaClip2Model, lambda: hf.MetaClip2Config(**CLIP)),
    "BertModel": (hf.BertModel, lambda: hf.BertConfig(**BERT)),
    "BertModel of a masked one": (hf.BertForMaskedLM, lambda: hf.BertConfig(**BERT)),
    "RobertaModel": (hf.RobertaModel, lambda: hf.RobertaConfig(**BERT, pad_token_id=0)),
    "DistilBertModel": (
        hf.DistilBertModel,
        lambda: hf.DistilBertConfig(
            vocab_size=11, dim=8, hidden_dim=8, n_layers=1, n_heads=2, max_position_embeddings=16
        ),
    ),
    "ModernBertModel": (
        hf.ModernBertModel,
        lambda: hf.ModernBertConfig(**BERT, pad_token_id=0, eos_token_id=1, bos_token_id=1, cls_token_id=1),
    ),
}
