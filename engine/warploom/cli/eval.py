"""`warploom eval`: held-out loss, perplexity and bits per byte."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from warploom.evaluate.perplexity import evaluate
from warploom.train.device import choose_device
from warploom.train.load_model import load_model


@dataclass(frozen=True)
class Command:
    """Measure a model on text it was not trained on."""

    checkpoint: tyro.conf.Positional[Path]
    """A step-... folder, or a run folder, whose newest sound checkpoint is taken."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of text, all of which is measured, or one folder made by `warploom tokenize`, of which
    the held-out split is; left out, the held-out split of the run's own text."""
    seq_len: int | None = None
    """Tokens the model may look back at most; None takes the length it was trained with."""
    batch_size: int = 16
    """Windows at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""

    def run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        loaded = load_model(self.checkpoint, device=device, on_skip=lambda text: print(text, file=sys.stderr))
        found = evaluate(loaded, self.data, seq_len=self.seq_len, batch_size=self.batch_size)
        print(f"checkpoint     {loaded.path} (step {loaded.step:,})")
        print(f"measured on    {found.num_targets:,} tokens, {found.num_bytes:,} bytes of text")
        print(f"loss           {found.loss:.4f} nats per token")
        print(f"perplexity     {found.perplexity:.3f}")
        print(f"bits per byte  {found.bits_per_byte:.4f}")
