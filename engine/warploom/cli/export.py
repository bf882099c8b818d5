"""`warploom export`: a checkpoint for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from warploom.interchange.checkpoint import export_checkpoint


@dataclass(frozen=True)
class Command:
    """Write a checkpoint for other programs."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A step-... folder, or a run folder, whose newest sound checkpoint is taken."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """What to write: a folder for hf and safetensors, a file for gguf and onnx. It must not exist."""
    format: Literal["hf", "safetensors", "gguf", "onnx"] = "hf"
    """hf: config.json, model.safetensors and tokenizer.json for Hugging Face transformers. gguf: for llama.cpp.
    onnx: for ONNX Runtime. safetensors: the same files with this engine's names, whatever the model."""
    family: str | None = None
    """hf: the architecture to write, such as llama or falcon; None takes the first that has such models."""
    precision: Literal["f32", "f16", "q8_0"] = "f32"
    """gguf: of the matrices."""

    def run(self) -> None:
        written = export_checkpoint(
            self.checkpoint, self.out, self.format, family=self.family, precision=self.precision
        )
        print(f"written  {written}")
