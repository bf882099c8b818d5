"""`warploom tune`: one training step, with each kernel's tiles and each op's back ends measured at its shapes.

The fastest of each are kept in files per card, which every later run reads; without them tables of defaults serve.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch

from warploom.cli import train
from warploom.data.loader import Batch
from warploom.errors import UserError
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.ops import _triton, _tuning
from warploom.optim import build_optimizers
from warploom.train.config import RunConfig
from warploom.train.device import choose_dtype
from warploom.train.step import training_step


@dataclass(frozen=True)
class Command(train.Command):
    """Measure the GPU kernels and back ends at the shapes of a training run and keep the fastest for this card.

    Takes the flags and files of `warploom train`. The text is not read: tokens are random, documents half as long as a
    sequence.
    """

    def run(self) -> int:
        if self.budget is not None:
            raise UserError(f"budget {self.budget} chooses a model only when it runs; name a preset or a configuration")
        config = RunConfig(self.model, self.train, self.optimizer, self.schedule, self.parallel)
        if self.dry_run:
            train.dry_run(config)
            return 0
        if not torch.cuda.is_available():
            raise UserError("there is no NVIDIA GPU to tune for: the table of defaults serves")
        with contextlib.ExitStack() as blocks:
            if _triton.missing() is None:
                blocks.enter_context(_triton.tuning())
            blocks.enter_context(_tuning.tuning())
            take_a_step(config, torch.device("cuda"))
        torch.cuda.synchronize()
        for line in report(_tuning.entries_of(torch.cuda.current_device())):
            print(line)
        print(f"tuned for {torch.cuda.get_device_name()}: {_tuning.file()}")
        if _triton.missing() is None:
            print(f"and the Triton kernels' tiles: {_triton.tuned_file()}")
        return 0


def take_a_step(config: RunConfig, device: torch.device) -> None:
    """Train a fresh model on one micro batch as the trainer would: the whole batch, where its size is to be found."""
    model = Transformer(config.model).to(device)
    model.compute_dtype = choose_dtype(config.train.dtype, device)
    optimizers = build_optimizers(model, config.optimizer, muon_dtype=model.compute_dtype, packed=keep_packed(model))
    batch = random_batch(config)
    training_step(
        functools.partial(model.loss, reduction="sum"),
        [batch],
        list(model.parameters()),
        optimizers,
        grad_clip=config.train.grad_clip,
    )


def random_batch(config: RunConfig) -> Batch:
    B, T = config.train.micro_batch_size or config.train.global_batch_size, config.train.seq_len
    tokens = torch.randint(config.model.vocab_size, (B, T + 1))
    positions, cu_seqlens = torch.arange(T), None
    if config.train.separate_documents:
        length = -(-T // 2)
        positions = positions % length
        starts = torch.arange(B)[:, None] * T + torch.arange(0, T, length)
        cu_seqlens = torch.cat((starts.flatten(), torch.tensor([B * T]))).int()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions.repeat(B, 1), cu_seqlens, 0)


def report(entries: dict[str, dict]) -> list[str]:
    """A line for each kind of call that is on file: each back end's time, and who won."""
    lines = []
    for call, entry in sorted(entries.items()):
        times = ", ".join(f"{name} {us:.0f} us" for name, us in sorted(entry["us"].items(), key=lambda each: each[1]))
        lines.append(f"{entry['winner']:<10} {call}: {times}")
    return lines
