"""Folders as Hugging Face transformers writes them: config.json, safetensors, tokenizer.json.

The files are not trusted: JSON is parsed strictly, safetensors headers are checked byte for byte, pickles are never
opened.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warploom.checkpoint.format import encode_json, parse_json
from warploom.checkpoint.load import load_weights
from warploom.checkpoint.tensors import build_header, read_header, tensor_bytes
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError, nearest
from warploom.interchange import decoders, encoders, translators
from warploom.interchange.family import Family, Settings
from warploom.interchange.mapping import dump_tensors, load_tensors, refuse_rest
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        decoders.LLAMA,
        decoders.GPT2,
        decoders.OPT,
        decoders.FALCON,
        translators.T5,
        translators.BART,
        translators.MARIAN,
        encoders.BERT,
    )
}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


@dataclass(frozen=True)
class ImportedModel:
    """A model of another framework, in evaluation mode, and what its config.json says of its tokens."""

    model: Transformer
    token_ids: dict[str, int]
    """bos, eos, pad, decoder_start: those that are given."""


def import_model(folder: str | os.PathLike[str]) -> ImportedModel:
    """Build the model of a folder with config.json and safetensors, in float32 on the CPU.

    Raises UserError for an unknown architecture or variant, a file that is damaged or a pickle, and for a tensor that
    is missing or that nothing reads.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    family = FAMILIES[settings.values["model_type"]]
    files = _weight_files(folder)
    stored = {name: file for file in files for name in tensor_names(file)}
    # What is not under the prefix of the model with its output layer is of one without.
    is_bare = not any(name.startswith(family.prefix) for name in stored)
    names = {(family.prefix if is_bare else "") + name: (file, name) for name, file in stored.items()}
    with TensorReader(names) as read:
        used = {name for name in names if not family.ignored.fullmatch(name)}
        is_tied = _is_tied(family, settings, used, read)
        config = TransformerConfig(**family.read_config(settings), tie_embeddings=is_tied)
        if is_tied:
            used.discard(family.head[0])
        if config.output_bias and "final_logits_bias" in names and not read("final_logits_bias").any():
            config = dataclasses.replace(config, output_bias=False)
            used.discard("final_logits_bias")
        entries = family.all_entries(config)
        weights = load_tensors(entries, read, set(names), str(folder))
        refuse_rest(entries, used, str(folder))
        if family.correct is not None:
            family.correct(settings, config, weights)
    with torch.device("meta"):
        model = Transformer(config)
    load_weights(model, weights)
    return ImportedModel(model.eval(), _token_ids(settings))


def export_model(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    family: str | None = None,
    token_ids: Mapping[str, int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write config.json and model.safetensors, which transformers' from_pretrained reads, and for a tokenizer
    tokenizer.json and tokenizer_config.json, with its chat template.

    family: a key of FAMILIES; None takes the first that can express the model. token_ids: as in ImportedModel.
    Returns the folder. Raises UserError if no family can express the model, with the reasons, and if the folder has
    such files already.
    """
    folder = Path(folder)
    chosen, values = choose_family(model.config, family)
    tensors = dump_tensors(chosen.all_entries(model.config), model.state_dict())
    tensors |= chosen.constants(model.config)
    values = {"model_type": chosen.model_type, "architectures": [chosen.architecture], **values}
    values |= {"tie_word_embeddings": model.config.tie_embeddings, "dtype": "float32", "torch_dtype": "float32"}
    values |= {f"{name}_token_id": value for name, value in (token_ids or {}).items()}
    files = {}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.library_json()
        files["tokenizer_config.json"] = encode_json(_tokenizer_settings(tokenizer, model.config))
    return write_folder(folder, tensors, values, files)


def write_folder(
    folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], files: Mapping[str, bytes]
) -> Path:
    """Write model.safetensors, config.json and files by name. Returns the folder; UserError if it has such files."""
    existing = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if existing:
        raise UserError(f"{folder} already holds {existing[0]}; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_bytes(encode_json(config))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _tokenizer_settings(tokenizer: Tokenizer, config: TransformerConfig) -> dict[str, Any]:
    """What AutoTokenizer needs beside tokenizer.json; it would else take the class that goes with the architecture."""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_id is not None:
        values["bos_token"] = tokenizer.token(tokenizer.bos_id)
    if tokenizer.chat_template is not None:
        values["chat_template"] = tokenizer.chat_template
    return values


def choose_family(config: TransformerConfig, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Return the family called name, or the first that can express config, and its config.json. Else UserError."""
    if name is not None and name not in FAMILIES:
        raise UserError(f"there is no family {name!r}{nearest(name, FAMILIES)}")
    reasons = []
    for family in FAMILIES.values() if name is None else [FAMILIES[name]]:
        try:
            return family, family.write_config(config)
        except UserError as error:
            reasons.append(f"{family.model_type} {error}")
    raise UserError(f"no architecture of transformers that is known here is this model: {'; '.join(reasons)}")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that transformers reads."""
    header, order = build_header(tensors)
    # transformers refuses a file without the note of who wrote its layout.
    values = json.loads(header[8:])
    text = json.dumps({"__metadata__": {"format": "pt"}, **values}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensor_bytes(tensors[name]))


def _read_settings(folder: Path) -> Settings:
    path = folder / CONFIG
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {CONFIG}; name a folder as transformers writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"{path} says no model_type; name a folder as transformers writes it")
    if values["model_type"] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path} is of a {values['model_type']!r} model; those that can be imported: {known}")
    return Settings(values, str(path))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            index = parse_json((folder / INDEX).read_bytes())
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is no index of safetensors files: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{folder / INDEX} names {name!r}, which is not a plain file name")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} lists; fetch the whole folder")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds no {WEIGHTS} but {pickles[0]}, which may run code when it is opened and never is; "
            "get the safetensors form of the model, or convert it where that is safe"
        )
    raise UserError(f"{folder} holds no {WEIGHTS}")


def tensor_names(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            return list(read_header(file, os.fstat(file.fileno()).st_size))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} {error}") from error


class TensorReader:
    """Reads tensors by name: name -> (file, name in it)."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = places
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> TensorReader:
        try:
            for file in {file for file, _ in self._places.values()}:
                self._open[file] = safe_open(file, framework="pt").__enter__()
        except SafetensorError as error:
            self.__exit__()
            raise UserError(f"{file} cannot be read: {error}") from error
        return self

    def __exit__(self, *error: object) -> None:
        for library in self._open.values():
            library.__exit__(None, None, None)

    def __call__(self, name: str) -> Tensor:
        file, tensor = self._places[name]
        # The library maps the file: without the copy, a later change of the file would change the weights.
        return self._open[file].get_tensor(tensor).clone()


def _is_tied(family: Family, settings: Settings, names: set[str], read: TensorReader) -> bool:
    """Whether embedding and output layer are one matrix. What is stored counts first, since a config.json may leave
    out a default."""
    head, embedding = family.head
    stated = settings.values.get("tie_word_embeddings")
    if head not in names:
        if stated is False:
            raise UserError(f"{settings.path} says tie_word_embeddings false, but there is no tensor {head}")
        return True
    return stated is not False and embedding in names and torch.equal(read(head), read(embedding))


def _token_ids(settings: Settings) -> dict[str, int]:
    ids = {}
    for name in ("bos", "eos", "pad", "decoder_start"):
        value = settings.values.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            ids[name] = value
    return ids
