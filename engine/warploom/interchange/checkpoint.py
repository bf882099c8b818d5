"""`import` and `export`: a model of another framework as a checkpoint of ours, and a checkpoint as one of theirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from warploom.checkpoint.format import CheckpointState, list_checkpoints
from warploom.checkpoint.save import save_checkpoint
from warploom.data.chat import ChatTemplate
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.interchange import ctranslate2, gguf, hugging_face, onnx
from warploom.interchange.tokenizer_files import find_tokenizer
from warploom.models.transformer import Transformer
from warploom.train.config import RunConfig, TrainConfig
from warploom.train.load_model import CHAT_TEMPLATE, load_model

Format = Literal["safetensors", "hf", "gguf", "onnx"]


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the model of source as out/step-00000000, which every verb takes; returns that folder.

    source: a folder as transformers writes it, a .gguf file, or a .safetensors file with CTranslate2's names, for
    which num_heads must be given. Raises UserError if it cannot be imported and if out has checkpoints already.
    """
    source, out = Path(source), Path(out)
    if out.is_dir() and list_checkpoints(out):
        raise UserError(f"{out} already holds {list_checkpoints(out)[0].name}; name a new folder")
    model, tokenizer = _read(source, num_heads, on_message)
    meta: dict[str, Any] = {"imported_from": source.name}
    if tokenizer is not None and tokenizer.chat_template is not None:
        try:
            ChatTemplate(tokenizer.chat_template).end_id(tokenizer)
            meta[CHAT_TEMPLATE] = tokenizer.chat_template
        except UserError as error:
            on_message(f"Its chat template is left out: {error}.")
    config = RunConfig(
        model=model.config, train=TrainConfig(out_dir=out, seq_len=min(model.config.max_seq_len, 1024), dtype="fp32")
    )
    return save_checkpoint(
        out,
        CheckpointState(
            step=0,
            weights=model.state_dict(),
            meta={"config": config.to_dict(), **meta},
            tokenizer=None if tokenizer is None else tokenizer.to_bytes(),
        ),
    )


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Format,
    *,
    family: str | None = None,
    precision: gguf.Precision = "f32",
) -> Path:
    """Write a checkpoint, or the newest of a run folder, for other programs: safetensors and hf a folder, gguf and onnx
    a file. safetensors has the model's own names and the configuration of the run; any model can be written so.

    Raises UserError if the format has no such model and if out exists.
    """
    loaded = load_model(checkpoint)
    tokenizer = loaded.tokenizer
    if tokenizer is not None and loaded.chat_template is not None:
        tokenizer.chat_template = loaded.chat_template.source
    if format == "gguf":
        return gguf.export_gguf(loaded.model, out, tokenizer=tokenizer, precision=precision)
    if format == "onnx":
        return onnx.export_onnx(loaded.model, out)
    if format == "safetensors":
        return hugging_face.write_folder(
            Path(out),
            loaded.model.state_dict(),
            loaded.config.to_dict(),
            {} if tokenizer is None else {"tokenizer.json": tokenizer.to_bytes()},
        )
    ids = {}
    if tokenizer is not None:
        ids = {"eos": tokenizer.eos_id, "bos": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id}
        if loaded.config.model.architecture == "encoder-decoder":
            ids["decoder_start"] = ids["bos"]
    return hugging_face.export_model(
        loaded.model,
        out,
        family=family,
        token_ids=ids,
        tokenizer=tokenizer,
    )


def _read(
    source: Path, num_heads: int | None, on_message: Callable[[str], None]
) -> tuple[Transformer, Tokenizer | None]:
    if source.is_dir():
        imported = hugging_face.import_model(source)
        tokenizer = find_tokenizer(source, imported.token_ids, on_message)
        return imported.model, tokenizer
    if source.suffix == ".gguf":
        return gguf.import_gguf(source)
    if source.suffix == ".safetensors":
        if num_heads is None:
            raise UserError(f"{source} does not say how many attention heads it has; give --num-heads")
        on_message("No tokenizer: the vocabulary of a CTranslate2 model is not read.")
        return ctranslate2.import_ctranslate2(source, num_heads), None
    raise UserError(f"{source} is neither a folder with a config.json nor a .gguf or .safetensors file")
