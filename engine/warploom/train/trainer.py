"""The trainer: everything around the training step. Evaluation, checkpoints, resuming, early stopping, interruption.

At a step boundary the whole state of a run is the weights, the optimizers, the position of the data, the random
states and a Progress; all of it goes into each checkpoint, so a run that was killed goes on bit for bit as if it had
not been.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from warploom.checkpoint import rng
from warploom.checkpoint.format import CheckpointState, flatten_optimizer, restore_optimizer
from warploom.checkpoint.load import latest_checkpoint, load_checkpoint
from warploom.checkpoint.lock import RunLock
from warploom.checkpoint.retention import apply_retention
from warploom.checkpoint.save import save_checkpoint
from warploom.data.shards import TokenDataset
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.models.transformer import Transformer
from warploom.optim import build_optimizers, lr_multiplier
from warploom.train import matmul_rate
from warploom.train.batch_size import find_micro_batch_size
from warploom.train.batches import TokenData, TrainingData, inputs_to
from warploom.train.config import RunConfig
from warploom.train.diagnosis import diagnose
from warploom.train.guard import StopSignals
from warploom.train.heldout import heldout_loss
from warploom.train.monitor import EvalRecord, Monitor, RunInfo, StepRecord, memory_bytes
from warploom.train.step import StepOutcome, training_step


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    tokens: int
    skipped_steps: int
    heldout_loss: float
    """Of the last evaluation, nats per token; nan if there was none."""
    bits_per_byte: float
    best_heldout_loss: float
    stopped_because: str
    stop_signal: int | None
    """SIGINT or SIGTERM if one ended the run."""
    checkpoint: Path
    """The last one, of the weights the model has now."""
    best_checkpoint: Path | None
    warnings: tuple[str, ...]
    """What the curve says about overfitting and underfitting."""


@dataclass
class Progress:
    """The counters of a run, plain JSON values. They belong to the state that a checkpoint restores."""

    step: int = 0  # global batches seen, skipped ones included
    tokens: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    train_loss_sum: float = 0.0  # since the last evaluation
    train_loss_steps: int = 0
    evaluated_step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a model on data as config.train, config.optimizer and config.schedule say.

    data is a TokenDataset or any TrainingData. The tokenizer goes into the checkpoints. Without a monitor the run is
    silent. The run folder is config.train.out_dir; only one trainer at a time can work in it.
    """

    def __init__(
        self,
        model: Transformer,
        data: TokenDataset | TrainingData,
        config: RunConfig,
        *,
        tokenizer: Tokenizer | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.model, self.config = model, config
        self._data = TokenData(data, config.train) if isinstance(data, TokenDataset) else data
        self._tokenizer, self._monitor = tokenizer, monitor
        self._device = _device(config.train.device)
        self._dtype = _compute_dtype(config.train.dtype, self._device)
        self.num_steps = config.train.steps or math.ceil(
            (config.train.epochs or 1) * self._data.num_sequences / config.train.global_batch_size
        )

    def fit(self) -> TrainResult:
        """Train to the end, or until early stopping or a signal ends the run; a checkpoint is the last thing written.

        Raises UserError if the run folder is in use or holds another run, if too many steps in a row were not finite,
        and if the last checkpoint cannot be written. A checkpoint in between that cannot be (a full disk) is reported,
        the run goes on, and the next one is tried at its time.
        """
        out_dir = self.config.train.out_dir
        out_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(out_dir), StopSignals() as signals:
            self._set_up()
            try:
                self._start_monitor()
                stopped_because = self._loop(signals)
                result = self._result(stopped_because, signals)
                if self._monitor is not None:
                    for warning in result.warnings:
                        self._monitor.message(warning)
                    self._monitor.finish(result)
            finally:
                if self._monitor is not None:
                    self._monitor.close()
        return result

    def _set_up(self) -> None:
        """Bring model, optimizers, data and random states to the start of the run, or to where it was left."""
        train = self.config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.model.to(self._device)
        self.model.compute_dtype = self._dtype
        self.model.gradient_checkpointing = train.grad_checkpointing
        self.model.train()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._loss_sum = functools.partial(self.model.loss, reduction="sum")
        if train.compile:
            self._loss_sum = torch.compile(self._loss_sum)
        # Muon's products follow the compute type: who trains in bfloat16 has fast products for it.
        self._optimizers = build_optimizers(self.model, self.config.optimizer, muon_dtype=self._dtype)
        self._checkpoint = self._checkpoint_to_resume()
        self.progress = Progress()
        if self._checkpoint is None:
            self._micro_batch_size = train.micro_batch_size or self._find_micro_batch_size()
            self._stream = self._data.train_batches(self._micro_batch_size)
            random.seed(train.seed)
            numpy.random.seed(train.seed % 2**32)
            torch.manual_seed(train.seed)
        else:
            self._restore(load_checkpoint(self._checkpoint))
        self._saved_step = self.progress.step

    def _start_monitor(self) -> None:
        if self._monitor is None:
            return
        self._flops_per_token = self.model.flops_per_token(self.config.train.seq_len)
        self._matmul_flops = matmul_rate.measure(self._dtype, self._device)
        self._monitor.start(
            RunInfo(
                steps=self.num_steps,
                start_step=self.progress.step,
                num_parameters=self.model.num_parameters(),
                tokens_per_step=self.config.train.global_batch_size * self.config.train.seq_len,
                matmul_flops=self._matmul_flops,
                device=str(self._device),
                dtype=str(self._dtype).removeprefix("torch."),
            )
        )

    def _loop(self, signals: StopSignals) -> str:
        """Step, evaluate and save until something ends the run; return what did."""
        train, progress = self.config.train, self.progress
        self._interval_s, self._interval_tokens = 0.0, 0
        while True:
            is_last = progress.step >= self.num_steps
            if progress.step > progress.evaluated_step and (is_last or progress.step % train.eval_every == 0):
                self._evaluate(signals)
            stopped_because = None
            if signals.received is not None:
                stopped_because = f"{signals.received.name} received"
            elif is_last:
                stopped_because = "all steps are done"
            elif train.patience and progress.evaluations_since_best >= train.patience:
                stopped_because = f"the held-out loss was no better for {train.patience} evaluations"
            is_best = train.keep_best > 0 and progress.step == progress.best_step
            if progress.step > self._saved_step and (stopped_because or is_best or progress.step % train.save_every == 0):
                self._save(is_final=stopped_because is not None)
            if stopped_because is not None:
                return stopped_because
            self._step()

    def _step(self) -> None:
        train, progress = self.config.train, self.progress
        # Skipped steps made no update, so the schedule stands still over them.
        lr_factor = lr_multiplier(self.config.schedule, progress.step - progress.skipped_steps, self.num_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        started = time.perf_counter()
        micro_batches = [next(self._stream) for _ in range(train.global_batch_size // self._micro_batch_size)]
        outcome = training_step(
            self._loss_sum, micro_batches, self._parameters, self._optimizers, grad_clip=train.grad_clip
        )
        step_s = time.perf_counter() - started

        num_tokens = sum(batch.tokens.numel() for batch in micro_batches)
        progress.step += 1
        progress.tokens += num_tokens
        if outcome.skipped:
            progress.skipped_steps += 1
            progress.nonfinite_in_a_row += 1
        else:
            progress.nonfinite_in_a_row = 0
            progress.train_loss_sum += outcome.loss
            progress.train_loss_steps += 1
        self._interval_s += step_s
        self._interval_tokens += num_tokens
        if self._monitor is not None and (progress.step % train.log_every == 0 or outcome.skipped):
            self._record_step(self._monitor, outcome, train_lr=self.config.optimizer.lr * lr_factor)
        if progress.nonfinite_in_a_row >= train.max_nonfinite_steps:
            raise UserError(
                f"the loss or a gradient was not finite in {progress.nonfinite_in_a_row} steps in a row, the last of "
                f"them {progress.step}; lower optimizer.lr (now {self.config.optimizer.lr:g}) or look at the data, and "
                f"go on from {self._checkpoint or 'the start: there is no checkpoint yet'}"
            )
