"""`warploom serve`: a trained model over HTTP."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from warploom.errors import UserError
from warploom.serve.config import ServeConfig
from warploom.train.device import choose_device, choose_dtype


@dataclass(frozen=True)
class Command:
    """Serve checkpoints: OpenAI's API for completions and chat, and a page to try and compare them."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT ...]")]
    """step-... folders, or run folders, whose newest sound checkpoints are taken; the first is the default model."""
    base: Path | None = None
    """The base of an adapter, where it is no longer where it was."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type of the models but for the last layer's products, which are float32; auto takes bf16 on a GPU. bf16
    reads half the bytes a token."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    server: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)

    def run(self) -> None:
        try:
            from warploom.serve.server import load_models, serve
        except ImportError as error:
            raise UserError(f"serving needs {error.name}: pip install 'warploom[serve]'") from error
        if not self.checkpoints:
            raise UserError("no checkpoint was given; name a run folder")
        if self.threads:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        models = load_models(
            self.checkpoints,
            self.server,
            device=device,
            dtype=choose_dtype(self.dtype, device),
            base=self.base,
            on_skip=lambda text: print(text, file=sys.stderr),
        )
        serve(models, self.server, lambda text: print(text, flush=True))
