"""The text encoder: token states that depend on the caption alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lingen.config import TextConfig
from lingen.errors import UserError
from lingen.text import MINILM_PACKAGE, HuggingFaceEncoder, load_text_encoder

CAPTIONS = ["a red circle moving left", "", "a blue square", "a red circle moving right " * 10]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the demo extra is not installed"
)


def _save_t5(folder: Path, *, end_token: bool = True) -> None:
    """A random T5 encoder of 8 dimensions, with a tokenizer of whole words."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if end_token:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    _save_t5(folder)
    return folder


def _encoder(folder: Path, *, length: int = 12, cache: int = 16) -> HuggingFaceEncoder:
    return load_text_encoder(TextConfig(path=str(folder), length=length, dim=8, cache=cache), "cpu")


def test_states_are_padded_masked_and_fp32(t5: Path) -> None:
    states, mask = _encoder(t5).encode(CAPTIONS)
    assert states.shape == (4, 12, 8) and states.dtype == torch.float32
    assert mask.shape == (4, 12) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [6, 1, 4, 12]  # words and </s>; the empty caption keeps one; the long one is cut
    assert states[~mask].abs().max() == 0
    assert states[mask].abs().amin(1).max() > 0


def test_states_do_not_depend_on_the_batch_nor_on_the_cache(t5: Path) -> None:
    cached, uncached = _encoder(t5), _encoder(t5, cache=0)
    together, _ = cached.encode(CAPTIONS)
    assert torch.equal(cached.encode(CAPTIONS)[0], together)  # now out of the cache
    for row, caption in enumerate(CAPTIONS):
        assert torch.equal(uncached.encode([caption])[0][0], together[row])
    assert torch.equal(uncached.encode(CAPTIONS[::-1])[0].flip(0), together)


def test_cache_forgets_the_caption_that_was_used_longest_ago(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = _encoder(t5, cache=2)
    forward, encoded = encoder._forward, []
    monkeypatch.setattr(encoder, "_forward", lambda caption: encoded.append(caption) or forward(caption))
    encoder.encode(["a", "red", "a", "blue", "a", "red"])  # "red" leaves when "blue" comes: "a" was used after it
    assert encoded == ["a", "red", "blue", "red"]


def test_writing_into_the_result_leaves_the_cache_alone(t5: Path) -> None:
    encoder = _encoder(t5)
    states, _ = encoder.encode(["a red circle"])
    kept = states.clone()
    states.zero_()
    assert torch.equal(encoder.encode(["a red circle"])[0], kept)


def test_autocast_changes_nothing(t5: Path) -> None:
    plain, _ = _encoder(t5).encode(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_encoder(t5).encode(CAPTIONS)[0], plain)


@needs_minilm
def test_minilm_tells_left_from_right() -> None:
    encoder = load_text_encoder(TextConfig(path="minilm"), "cpu")
    states, mask = encoder.encode(["a red circle moving left", "a red circle moving right"])
    assert states.shape == (2, 32, 384)
    assert mask.sum(1).tolist() == [7, 7]  # [CLS], five words, [SEP]
    last_word = torch.nn.functional.normalize(states[:, 5], dim=-1)
    assert last_word[0] @ last_word[1] < 0.9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": 16}, "text.dim=16"),
        ({"path": "no/such/folder/here"}, "text.path=no/such/folder/here"),
        ({"path": "somebody/never-fetched"}, "text.path=somebody/never-fetched"),
    ],
)
def test_bad_config_is_named(t5: Path, change: dict[str, object], named: str) -> None:
    config = TextConfig.model_validate({"path": str(t5), "dim": 8, **change})
    with pytest.raises(UserError, match=named):
        load_text_encoder(config, "cpu")


def test_a_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    _save_t5(tmp_path)  # for its tokenizer
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    assert load_text_encoder(TextConfig(path=str(tmp_path), dim=8, length=16), "cpu").dim == 8
    with pytest.raises(UserError, match="16 tokens at most"):
        load_text_encoder(TextConfig(path=str(tmp_path), dim=8, length=17), "cpu")


def test_a_length_that_leaves_a_caption_no_token_is_refused(t5: Path) -> None:
    with pytest.raises(UserError, match=r"text.length=1 leaves no token .* adds 1 to each; set text.length=2 or more"):
        _encoder(t5, length=1)
    assert _encoder(t5, length=2).encode(CAPTIONS)[1].sum(1).tolist() == [2, 1, 2, 2]


@needs_minilm
def test_the_least_length_of_minilm_counts_both_its_ends() -> None:
    with pytest.raises(UserError, match=r"text.length=2 .* set text.length=3 or more"):
        load_text_encoder(TextConfig(path="minilm", length=2), "cpu")
    assert load_text_encoder(TextConfig(path="minilm", length=3), "cpu").encode(CAPTIONS)[0].shape == (4, 3, 384)


def test_broken_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        _encoder(tmp_path)  # empty
    _save_t5(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        _encoder(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _save_t5(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors .* encoder\.final_layer_norm\.weight"):
        _encoder(tmp_path)


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    _save_t5(tmp_path, end_token=False)
    with pytest.raises(UserError, match="empty caption"):
        _encoder(tmp_path)
