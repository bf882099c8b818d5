"""`warploom import`: a model of another framework as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from warploom.interchange.checkpoint import import_checkpoint
from warploom.train.load_model import load_model


@dataclass(frozen=True)
class Command:
    """Write a model of another framework as a checkpoint that every verb takes."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder as Hugging Face transformers writes it (config.json, safetensors, tokenizer.json), a .gguf file, or a
    .safetensors file with CTranslate2's names. Pickles (.bin, .pt) are refused."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write; its checkpoint is step-00000000."""
    num_heads: int | None = None
    """Attention heads, for a CTranslate2 file, which does not say."""

    def run(self) -> None:
        folder = import_checkpoint(self.source, self.out, num_heads=self.num_heads, on_message=print)
        loaded = load_model(folder)
        config = loaded.config.model
        print(f"checkpoint  {folder}")
        print(f"model       {config.architecture}, {loaded.model.num_parameters():,} parameters")
        print(f"context     {config.max_seq_len:,} tokens of a vocabulary of {config.vocab_size:,}")
        print(f"tokenizer   {'none' if loaded.tokenizer is None else f'{loaded.tokenizer.vocab_size:,} tokens'}")
