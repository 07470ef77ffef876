"""One text encoder: token states that depend on the caption alone, of any class, and what it says of bad input."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lingen.errors import UserError
from lingen.text.encoder import HuggingFaceEncoder, quoted
from lingen.text.encoders import TextEncoders
from lingen.text.load import MINILM_PACKAGE, load_encoder
from lingen.text_config import EncoderConfig
from tests.text_models import KINDS, T5, save, save_byt5, save_t5, save_tokenizer

CAPTIONS = ["a red circle moving left", "", "a blue square", "a red circle moving right " * 10]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the demo extra is not installed"
)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder)
    return folder


def load(folder: Path | str, *, cache: int = 16, **words: Any) -> HuggingFaceEncoder:
    config = EncoderConfig.model_validate({"path": str(folder), "length": 12, "dim": 8} | words)
    return load_encoder("mine", config, cache, "cpu")


def encode(encoder: HuggingFaceEncoder, captions: list[str] = CAPTIONS) -> tuple[torch.Tensor, torch.Tensor]:
    states, mask = _alone(encoder).encode(captions)
    return states["mine"], mask


def _alone(encoder: HuggingFaceEncoder) -> TextEncoders:
    return TextEncoders({"mine": encoder}, "cpu")


def test_states_are_padded_masked_and_fp32(t5: Path) -> None:
    states, mask = encode(load(t5))
    assert states.shape == (4, 12, 8) and states.dtype == torch.float32
    assert mask.shape == (4, 12) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [6, 1, 4, 12]  # words and </s>; the empty caption keeps one; the long one is cut
    assert states[~mask].abs().max() == 0
    assert states[mask].abs().amin(1).max() > 0


def test_states_do_not_depend_on_the_batch_nor_on_the_cache(t5: Path) -> None:
    cached, uncached = load(t5), load(t5, cache=0)
    together, _ = encode(cached)
    assert torch.equal(encode(cached)[0], together)  # now out of the cache
    for row, caption in enumerate(CAPTIONS):
        assert torch.equal(encode(uncached, [caption])[0][0], together[row])
    assert torch.equal(encode(uncached, CAPTIONS[::-1])[0].flip(0), together)


def test_cache_forgets_the_caption_that_was_used_longest_ago(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(t5, cache=2)
    forward, encoded = encoder._forward, []
    monkeypatch.setattr(encoder, "_forward", lambda caption: encoded.append(caption) or forward(caption))
    for caption in ("a", "red", "a", "blue", "a", "red"):  # "red" leaves when "blue" comes: "a" was used after it
        encoder.tokens(caption)
    assert encoded == ["a", "red", "blue", "red"]


def test_writing_into_the_result_leaves_the_cache_alone(t5: Path) -> None:
    encoder = load(t5)
    states, _ = encode(encoder, ["a red circle"])
    kept = states.clone()
    states.zero_()
    assert torch.equal(encode(encoder, ["a red circle"])[0], kept)


def test_autocast_changes_nothing(t5: Path) -> None:
    plain, _ = encode(load(t5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(load(t5))[0], plain)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_states_of_its_own_class(kind: str, dtype: str, tmp_path: Path) -> None:
    model, config = KINDS[kind]
    save_tokenizer(tmp_path)
    save(tmp_path, model, config())
    encoder = load(tmp_path, dtype=dtype)
    name = kind.split()[0]
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    truth = getattr(hf, name).from_pretrained(tmp_path, dtype=precision).eval()
    ids = torch.tensor([[3, 4, 6, 1]])  # a red circle </s>
    with torch.no_grad():
        expected = truth(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    found = encoder.tokens("a red circle")
    assert type(encoder._model).__name__ == name and found.dtype == precision
    assert torch.equal(found, expected) and found.std() > 0
    assert len(encoder.tokens("")) == 1


def test_byt5_reads_bytes(tmp_path: Path) -> None:
    save_byt5(tmp_path)
    assert [len(load(tmp_path).tokens(text)) for text in ("", "Ä", "Äb", "b" * 99)] == [1, 3, 4, 12]


def test_quotes_are_found() -> None:
    assert quoted('a sign says "OPEN", and „Tür zu“; it\'s “late”') == "OPEN\nTür zu\nlate"
    assert quoted("«a» 「b」『c』") == "a\nb\nc"
    assert quoted('it\'s the dog\'s, an inch is 1" "" " "') == ""
    assert quoted("") == quoted("a red circle") == ""


def test_an_encoder_of_quotes_has_no_tokens_without_them(tmp_path: Path) -> None:
    save_byt5(tmp_path)
    whole, encoder = load(tmp_path), load(tmp_path, quoted_only=True)
    assert torch.equal(encoder.tokens('a sign says "NO"'), whole.tokens("NO"))
    assert encoder.tokens("a red circle").shape == encoder.tokens("").shape == (0, 8)
    assert load(tmp_path, quoted_only=True, dtype="bf16").tokens("a red circle").dtype == torch.bfloat16


def test_a_caption_as_long_as_a_book_is_cut_before_it_is_tokenized(tmp_path: Path) -> None:
    save_byt5(tmp_path)
    encoder = load(tmp_path)
    start = time.process_time()
    states = encoder.tokens("a" * 10_000_000)
    assert time.process_time() - start < 1 and torch.equal(states, encoder.tokens("a" * 1000))
    assert max(map(len, encoder._cache)) == 1200  # nor does the cache hold the book


@needs_minilm
def test_minilm_tells_left_from_right() -> None:
    states, mask = encode(load("minilm", length=32, dim=384), ["a red circle moving left", "a red circle moving right"])
    assert states.shape == (2, 32, 384)
    assert mask.sum(1).tolist() == [7, 7]  # [CLS], five words, [SEP]
    last_word = torch.nn.functional.normalize(states[:, 5], dim=-1)
    assert last_word[0] @ last_word[1] < 0.9


# ---------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_names_what_decides_the_states(t5: Path, tmp_path: Path) -> None:
    first = load(t5).fingerprint
    assert len(first) == 64
    shutil.copytree(t5, tmp_path / "copy")
    model = hf.T5EncoderModel.from_pretrained(t5)
    model.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    save_tokenizer(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    same = [load(tmp_path / "copy"), load(tmp_path / "parts"), load(t5, dropout=0.5, projection="linear", cache=0)]
    assert {encoder.fingerprint for encoder in same} == {first}
    assert torch.equal(same[1].tokens("a red circle"), load(t5).tokens("a red circle"))
    save_t5(tmp_path / "other", seed=1)
    shutil.copytree(t5, tmp_path / "words")
    vocabulary = tmp_path / "words" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("circle", "cercle"))
    shutil.copytree(t5, tmp_path / "config")
    settings = tmp_path / "config" / "config.json"
    settings.write_text(settings.read_text().replace('"layer_norm_epsilon": 1e-06', '"layer_norm_epsilon": 1e-05'))
    others = [load(tmp_path / name) for name in ("other", "words", "config")]
    others += [load(t5, length=11), load(t5, dtype="bf16"), load(t5, quoted_only=True)]
    assert len({first} | {encoder.fingerprint for encoder in others}) == 7


def test_a_hub_id_is_found_where_it_was_fetched_to(t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download some/t5 --include"):
        load("some/t5")
    fetched = tmp_path / "models--some--t5"
    shutil.copytree(t5, fetched / "snapshots" / ("0" * 40))
    (fetched / "refs").mkdir()
    (fetched / "refs" / "main").write_text("0" * 40)
    assert load("some/t5").fingerprint == load(t5).fingerprint


def test_a_tokenizer_may_lie_beside_as_in_pipelines(t5: Path, tmp_path: Path) -> None:
    encoder, tokenizer = tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    encoder.mkdir(), tokenizer.mkdir()
    for path in t5.iterdir():
        shutil.copy(path, (tokenizer if "token" in path.name else encoder) / path.name)
    assert not (encoder / "tokenizer.json").exists()
    assert load(encoder).fingerprint == load(t5).fingerprint
    assert torch.equal(load(encoder).tokens("a red circle"), load(t5).tokens("a red circle"))


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": 16}, r"text\.encoders\.mine\.dim=16.* is 8 wide; set text\.encoders\.mine\.dim=8"),
        ({"path": "no/such/folder/here"}, r"text\.encoders\.mine\.path=no/such/folder/here: there is no such folder"),
        (
            {"path": "somebody/never-fetched"},
            r"mine\.path=somebody/never-fetched is neither .* fetch it with: hf download somebody/never-fetched -",
        ),
        ({"path": "never--fetched"}, r"mine\.path=never--fetched is neither a folder nor"),
        (
            {"length": 1},
            r"mine\.length=1 leaves no token .* adds 1 to each; set text\.encoders\.mine\.length=2 or more",
        ),
    ],
)
def test_bad_config_is_named(t5: Path, change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load(t5, **change)


@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel", "CLIPTextModel"])
def test_a_length_beyond_the_positions_is_refused(kind: str, tmp_path: Path) -> None:
    model, config = KINDS[kind]
    save_tokenizer(tmp_path)
    save(tmp_path, model, config())
    most = 15 if kind == "RobertaModel" else 16  # it counts from after the padding
    assert len(load(tmp_path, length=most).tokens("a " * 40)) == most
    with pytest.raises(UserError, match=f"{most} tokens at most"):
        load(tmp_path, length=most + 1)


def test_the_least_length_leaves_a_word(t5: Path) -> None:
    assert encode(load(t5, length=2))[1].sum(1).tolist() == [2, 1, 2, 2]


@needs_minilm
def test_the_least_length_of_minilm_counts_both_its_ends() -> None:
    with pytest.raises(UserError, match=r"length=2 .* set text\.encoders\.mine\.length=3 or more"):
        load("minilm", length=2, dim=384)
    assert encode(load("minilm", length=3, dim=384))[0].shape == (4, 3, 384)


def test_broken_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)  # empty
    save_t5(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    save_t5(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(hf.T5EncoderModel(hf.T5Config(**T5)).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has neither model\.safetensors .* a pickle can run code"):
        load(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    save_t5(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["ViTModel", "BartModel"])
def test_what_is_no_text_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = {"ViTModel": hf.ViTConfig, "BartModel": hf.BartConfig}[kind]()
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"a model of the type {config.model_type}, which is no text encoder"):
        load(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_t5(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors .* encoder\.final_layer_norm\.weight"):
        load(tmp_path)


def test_a_tokenizer_without_end_token_is_refused_but_for_quotes(tmp_path: Path) -> None:
    save_t5(tmp_path, end_token=False)
    with pytest.raises(UserError, match="empty caption"):
        load(tmp_path)
    assert len(load(tmp_path, quoted_only=True).tokens('a "red circle"')) == 2
