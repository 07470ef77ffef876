"""Several text encoders as one sequence: where tokens stand, who is left out, what is compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lingen.compose import compose
from lingen.diffusion import DiffusionInputs
from lingen.errors import UserError
from lingen.flow import draw_left_out
from lingen.runfolder import architecture, other_experiment
from lingen.text.encoders import TextEncoders, load_text_encoders, refuse_other_text
from lingen.text.join import Tokens, join, moved, stacked
from lingen.text_config import TextConfig
from tests.text_models import KINDS, save, save_byt5, save_t5, save_tokenizer

CAPTIONS = ["a red circle", 'a sign with "OK"', ""]
BASE = ["name=a", "data.path=x", "autoencoder.path=y"]
TWO = ["text.encoders.t5.path=p", "text.encoders.t5.length=8", "text.encoders.t5.dim=24"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    """A T5, a CLIP in bf16 and a ByT5 of what is quoted."""
    folder = tmp_path_factory.mktemp("encoders")
    save_t5(folder / "t5")
    model, of = KINDS["CLIPTextModel of a whole CLIP"]
    save_tokenizer(folder / "clip")
    save(folder / "clip", model, of())
    save_byt5(folder / "byt5")
    words: dict[str, dict[str, Any]] = {"t5": {"length": 6}, "clip": {"length": 5, "dtype": "bf16"}}
    words["byt5"] = {"length": 4, "quoted_only": True}
    encoders = {name: {"path": str(folder / name), "dim": 8, **own} for name, own in words.items()}
    return TextConfig.model_validate({"encoders": encoders})


@pytest.fixture(scope="module")
def encoders(config: TextConfig) -> TextEncoders:
    return load_text_encoders(config, "cpu")


def places(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_tokens_stand_encoder_by_encoder_in_the_order_of_the_configuration(encoders: TextEncoders) -> None:
    states, mask = encoders.encode(CAPTIONS)
    assert {name: tuple(part.shape) for name, part in states.items()} == {
        "t5": (3, 6, 8), "clip": (3, 5, 8), "byt5": (3, 4, 8),
    }  # fmt: skip
    assert list(states) == list(encoders.lengths) == ["t5", "clip", "byt5"]
    assert all(part.dtype == torch.float32 for part in states.values())
    found = places(mask)
    assert found[0] == [0, 1, 2, 3, 6, 7, 8, 9]  # three words and the end, twice; no quotes
    assert found[1][-3:] == [11, 12, 13] and found[2] == [0, 6]  # two letters and the end; the empty caption
    for name, part in states.items():
        assert torch.equal(
            part[0, : len(encoders.tokens(CAPTIONS[0])[name])], encoders.tokens(CAPTIONS[0])[name].float()
        )


def test_who_is_left_out_leaves_its_places_empty(encoders: TextEncoders) -> None:
    whole, mask = encoders.encode(CAPTIONS)
    states, seen = encoders.encode(CAPTIONS, [{"t5"}, {"clip"}, set()])
    assert places(seen)[0] == [6, 7, 8, 9] and not states["t5"][0].any()
    assert torch.equal(states["clip"][0], whole["clip"][0]) and torch.equal(states["byt5"], whole["byt5"])
    assert not set(places(seen)[1]) & set(range(6, 11)) and torch.equal(seen[2], mask[2])


def test_a_caption_that_loses_every_token_is_the_empty_one(encoders: TextEncoders) -> None:
    empty = encoders.encode([""])
    for caption, names in ((CAPTIONS[0], {"t5", "clip"}), (CAPTIONS[1], {"t5", "clip", "byt5"})):
        states, mask = encoders.encode([caption], [names])
        assert torch.equal(mask, empty[1]) and all(torch.equal(states[name], empty[0][name]) for name in states)
    assert places(encoders.encode([CAPTIONS[1]], [{"t5", "clip"}])[1])[0] == [11, 12, 13]  # the quotes are left


def test_stored_tokens_make_the_same_text(config: TextConfig, encoders: TextEncoders) -> None:
    from safetensors.torch import load, save

    rows: list[Tokens] = []
    for caption in CAPTIONS:
        rows.append(load(save(encoders.tokens(caption))))
    assert rows[0]["clip"].dtype == torch.bfloat16 and rows[0]["byt5"].shape == (0, 8)
    states, mask = join(rows, config.encoders, "cpu")
    expected, expected_mask = encoders.encode(CAPTIONS)
    assert torch.equal(mask, expected_mask) and all(torch.equal(states[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="no token of any text encoder"):
        join([{name: part[:0] for name, part in rows[0].items()}], config.encoders, "cpu")


def test_batches_are_moved_and_stacked(encoders: TextEncoders) -> None:
    text, other = encoders.encode(CAPTIONS), encoders.encode(["", ""])
    states, mask = stacked(moved(text, torch.device("cpu"), torch.bfloat16), other)
    assert mask.shape == (5, 15) and torch.equal(mask[3:], other[1])
    assert torch.equal(states["t5"][:3], text[0]["t5"].bfloat16().float())


# ---------------------------------------------------------------------------------------------------- dropout


def test_draws_are_a_pure_function_of_seed_samples_position_and_encoder() -> None:
    dropout, positions = {"t5": 0.5, "clip": 0.2, "byt5": 0.0}, list(range(2000))
    drawn = draw_left_out(positions, dropout, seed=1, samples_seen=64)
    share = {name: sum(name in out for out in drawn) / len(drawn) for name in dropout}
    assert share == pytest.approx(dropout, abs=0.03) and share["byt5"] == 0
    both = sum(out == {"t5", "clip"} for out in drawn) / len(drawn)
    assert both == pytest.approx(0.1, abs=0.03)  # independent of each other
    part = draw_left_out(positions[700:710], dropout, seed=1, samples_seen=64)  # another rank's share
    assert part == drawn[700:710]
    alone = draw_left_out(positions, {"clip": 0.2}, seed=1, samples_seen=64)
    assert [out & {"clip"} for out in drawn] == alone
    for key in ({"seed": 2, "samples_seen": 64}, {"seed": 1, "samples_seen": 65}):
        assert draw_left_out(positions, dropout, **key) != drawn


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["text.encoders.minilm.quoted_only=true"],
            r"text\.encoders\.minilm\.quoted_only=true: a caption without quotes",
        ),
        (["text.encoders.t5.path=p"], r"text\.encoders\.t5\.length is not set.*text\.encoders\.t5\.dim is not set"),
        (["~text.encoders.minilm"], r"text\.encoders=\{\}.*at least 1"),
        (["++text.encoders={5t: {path: p, length: 8, dim: 8}}"], r"text\.encoders\.5t: a name is one word"),
        ([*TWO, "text.encoders.t5.dropout=1.0"], r"text\.encoders\.t5\.dropout=1.0"),
        ([*TWO, "text.encoders.t5.lenght=8"], r"unknown key 'text\.encoders\.t5\.lenght'; did you mean 'length'"),
        (["text=movie_gen"], r"text\.encoders\.byt5\.path is not set; .*text\.encoders\.ul2\.path is not set"),
    ],
)
def test_bad_words_are_named(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        compose([*BASE, *words])


def test_every_choice_of_encoders_composes() -> None:
    three = compose(
        [*BASE, "text=movie_gen", *(f"text.encoders.{name}.path=p" for name in ("ul2", "metaclip", "byt5"))]
    )
    assert three.text.lengths == {"ul2": 512, "metaclip": 77, "byt5": 100}
    swapped = compose(
        [*BASE, "experiment=paper_4b", "text=t5", "text.encoders.t5.path=p"]
    )  # not 512 of minilm beside it
    assert list(swapped.text.encoders) == ["t5"]
    assert list(compose([*BASE, *TWO]).text.encoders) == ["minilm", "t5"]
    assert list(compose([*BASE, "~text.encoders.minilm", *TWO]).text.encoders) == ["t5"]


def test_what_of_an_encoder_makes_another_experiment() -> None:
    before = compose([*BASE, *TWO])
    assert other_experiment(before, compose([*BASE, *TWO, "text.encoders.t5.path=elsewhere"])) is None
    for word in ("length=9", "dim=8", "dtype=bf16", "dropout=0.1", "quoted_only=true", "projection=linear"):
        found = other_experiment(before, compose([*BASE, *TWO, f"text.encoders.t5.{word}"]))
        assert found is not None and found.startswith(f"text.encoders.t5.{word.split('=')[0]}="), word
    fewer = other_experiment(before, compose(BASE))
    assert fewer is not None and fewer.startswith("text.encoders.t5={'length': 8, 'dim': 24,")
    assert architecture(before)["text"]["t5"] == {"dim": 24, "projection": "mlp"}


def test_other_fingerprints_are_refused() -> None:
    refuse_other_text({"t5": "a", "clip": "b"}, {"clip": "b", "t5": "a"}, "DIR was trained with")
    with pytest.raises(
        UserError, match=r"text\.encoders\.clip: .*fingerprint c\) are not what DIR was trained with \(b"
    ):
        refuse_other_text({"t5": "a", "clip": "b"}, {"t5": "a", "clip": "c"}, "DIR was trained with")
    with pytest.raises(UserError, match=r"text\.encoders\.clip: .*fingerprint none"):
        refuse_other_text({"t5": "a", "clip": "b"}, {"t5": "a"}, "DIR was trained with")


def test_all_ranks_must_have_the_same_encoders(encoders: TextEncoders) -> None:
    autoencoder: Any = SimpleNamespace(fingerprint="a")
    inputs = DiffusionInputs(compose(BASE), cast(Any, None), autoencoder, encoders)
    found = {f"text.encoders.{name}": fingerprint for name, fingerprint in encoders.fingerprints.items()}
    assert len(found) == 3 and inputs.frozen() == {"autoencoder": "a", **found}
