"""`warploom tune`: a training step of a model, with each kernel's tiles and each op's back ends measured at its shapes.

The fastest of each are kept in files per card, which every later run reads; without them tables of defaults serve.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from warploom.errors import UserError
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.ops import _triton, _tuning, grad_norm
from warploom.optim import OptimizerConfig, build_optimizers


@dataclass(frozen=True)
class Command:
    """Measure the GPU kernels and back ends at the shapes of a model and keep the fastest for this card."""

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
        transformer = Transformer(model).cuda()
        transformer.compute_dtype = torch.bfloat16
        packed = keep_packed(transformer)
        optimizers = build_optimizers(transformer, OptimizerConfig(), muon_dtype=torch.bfloat16, packed=packed)
        tokens = torch.randint(model.vocab_size, (self.micro_batch_size, self.seq_len + 1), device="cuda")
        with contextlib.ExitStack() as blocks:
            if _triton.missing() is None:
                blocks.enter_context(_triton.tuning())
            blocks.enter_context(_tuning.tuning())
            transformer.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
            grad_norm([p.grad for p in transformer.parameters() if p.grad is not None])
            for optimizer in optimizers:
                optimizer.step()
        torch.cuda.synchronize()
        for line in report(_tuning.entries_of(torch.cuda.current_device())):
            print(line)
        print(f"tuned for {torch.cuda.get_device_name()}: {_tuning.file()}")
        if _triton.missing() is None:
            print(f"and the Triton kernels' tiles: {_triton.tuned_file()}")


def report(entries: dict[str, dict]) -> list[str]:
    """A line for each kind of call that is on file: each back end's time, and who won."""
    lines = []
    for call, entry in sorted(entries.items()):
        times = ", ".join(f"{name} {us:.0f} us" for name, us in sorted(entry["us"].items(), key=lambda each: each[1]))
        lines.append(f"{entry['winner']:<10} {call}: {times}")
    return lines
