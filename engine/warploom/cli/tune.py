"""`warploom tune`: run one training step of a model with every kernel's configurations measured at the shapes it has.

The fastest of each are kept in a file per card, which every later run reads; without it a table of defaults serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from warploom.errors import UserError
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.ops import _triton


@dataclass(frozen=True)
class Command:
    """Measure the GPU kernels' configurations for the shapes of a model and keep the fastest for this card."""

    preset: str = "gpt2"
    """The model, by the name that train takes."""
    micro_batch_size: int = 8
    """Sequences of one micro batch."""
    seq_len: int = 1024
    """Tokens of one sequence."""

    def run(self) -> None:
        model = preset(self.preset)
        for name in ("micro_batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not torch.cuda.is_available():
            raise UserError("there is no NVIDIA GPU to tune for: the table of defaults serves")
        reason = _triton.missing()
        if reason is not None:
            raise UserError(f"there are no kernels to tune: {reason}")
        transformer = Transformer(model).cuda()
        transformer.compute_dtype = torch.bfloat16
        tokens = torch.randint(model.vocab_size, (self.micro_batch_size, self.seq_len + 1), device="cuda")
        with _triton.tuning():
            transformer.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        torch.cuda.synchronize()
        print(f"tuned for {torch.cuda.get_device_name()}: {_triton.tuned_file()}")
