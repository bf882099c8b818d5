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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer

from warploom.checkpoint import environment, rng
from warploom.checkpoint.format import CheckpointState, folder_name, list_checkpoints, step_of
from warploom.checkpoint.load import differing_fields, find_checkpoint, load_checkpoint, load_latest, load_weights
from warploom.checkpoint.lock import RunLock
from warploom.checkpoint.optimizer import flatten_optimizer, restore_optimizer
from warploom.checkpoint.retention import apply_retention
from warploom.checkpoint.save import SaveFailed, save_checkpoint
from warploom.data.shards import TokenDataset
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.models.transformer import Transformer
from warploom.optim import build_optimizers, lr_multiplier
from warploom.train import matmul_rate
from warploom.train.batch_size import find_micro_batch_size
from warploom.train.batches import TokenData, TrainingData, inputs_to
from warploom.train.budget import corrected_steps, is_correction_due
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
    checkpoint: Path | None
    """The last one, of the weights the model has now; None if a signal came before the first step."""
    best_checkpoint: Path | None
    warnings: tuple[str, ...]
    """What the curve says about overfitting and underfitting."""


@dataclass
class Progress:
    """The counters of a run, plain JSON values. They belong to the state that a checkpoint restores."""

    num_steps: int  # where the run ends; a time budget may move it
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
    silent. With a deadline, a moment of time.monotonic(), the number of steps is corrected to the pace of the run so
    that the last step, evaluations and checkpoints in between included, is done by then. The run folder is
    config.train.out_dir; only one trainer at a time can work in it.
    """

    def __init__(
        self,
        model: Transformer,
        data: TokenDataset | TrainingData,
        config: RunConfig,
        *,
        tokenizer: Tokenizer | None = None,
        monitor: Monitor | None = None,
        deadline: float | None = None,
    ) -> None:
        self.model, self.config = model, config
        self._data = TokenData(data, config.train) if isinstance(data, TokenDataset) else data
        self._tokenizer, self._monitor, self._deadline = tokenizer, monitor, deadline
        self._device = choose_device(config.train.device)
        self._dtype = choose_dtype(config.train.dtype, self._device)
        self._checkpoint: Path | None = None  # the last that was written or taken up
        self._planned_steps = config.train.steps or math.ceil(
            (config.train.epochs or 1) * self._data.num_sequences / config.train.global_batch_size
        )

    def fit(self) -> TrainResult:
        """Train to the end, or until early stopping or a signal ends the run; a checkpoint is the last thing written.

        Raises UserError if the run folder is in use or holds another run, if too many steps in a row were not finite,
        and if the last checkpoint cannot be written. A checkpoint in between that cannot be (a full disk) is reported,
        the run goes on, and the next one is tried at its time.
        """
        out_dir = self.config.train.out_dir
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
        loss_sum = functools.partial(self.model.loss, reduction="sum")
        self._loss_sum: Callable[..., Tensor] = torch.compile(loss_sum) if train.compile else loss_sum
        # Muon's products follow the compute type: who trains in bfloat16 has fast products for it.
        self._optimizers = build_optimizers(self.model, self.config.optimizer, muon_dtype=self._dtype)
        self.progress = Progress(num_steps=self._planned_steps)
        state = self._state_to_resume()
        if state is None:
            self._micro_batch_size = train.micro_batch_size or self._find_micro_batch_size()
            self._stream = self._data.train_batches(self._micro_batch_size)
            random.seed(train.seed)
            numpy.random.seed(train.seed % 2**32)
            torch.manual_seed(train.seed)
        else:
            self._restore(state)
        self._saved = (self.progress.step, self.progress.evaluated_step)

    def _start_monitor(self) -> None:
        if self._monitor is None:
            return
        self._flops_per_token = self.model.flops_per_token(self.config.train.seq_len)
        self._matmul_flops = matmul_rate.measure(self._dtype, self._device)
        self._monitor.start(
            RunInfo(
                steps=self.progress.num_steps,
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
        self._interval_s, self._interval_steps, self._interval_tokens = 0.0, 0, 0
        self._paced_since = (time.monotonic(), progress.step)
        while True:
            is_last = progress.step >= progress.num_steps
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
            is_due = stopped_because is not None or is_best or progress.step % train.save_every == 0
            if is_due and (progress.step, progress.evaluated_step) != self._saved:
                self._save(is_final=stopped_because is not None)
            if stopped_because is not None:
                return stopped_because
            self._step()
            if self._deadline is not None:
                self._keep_to(self._deadline)

    def _keep_to(self, deadline: float) -> None:
        """Move the end of the run to where the pace since the last correction, pauses included, will be at deadline."""
        progress, now = self.progress, time.monotonic()
        if now >= deadline:
            progress.num_steps = progress.step
        elif is_correction_due(progress.step, progress.num_steps):
            pace_s = (now - self._paced_since[0]) / (progress.step - self._paced_since[1])
            progress.num_steps = corrected_steps(progress.step, pace_s, deadline - now)
            self._paced_since = (now, progress.step)
        if self._monitor is not None:
            self._monitor.set_steps(progress.num_steps)

    def _step(self) -> None:
        train, progress = self.config.train, self.progress
        # Skipped steps made no update, so the schedule stands still over them.
        lr_factor = lr_multiplier(self.config.schedule, progress.step - progress.skipped_steps, progress.num_steps)
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
        self._interval_steps += 1
        self._interval_tokens += num_tokens
        if self._monitor is not None and (progress.step % train.log_every == 0 or outcome.skipped):
            self._record_step(self._monitor, outcome, lr=self.config.optimizer.lr * lr_factor)
        if progress.nonfinite_in_a_row >= train.max_nonfinite_steps:
            raise UserError(
                f"the loss or a gradient was not finite in {progress.nonfinite_in_a_row} steps in a row, the last of "
                f"them {progress.step}; lower optimizer.lr (now {self.config.optimizer.lr:g}) or look at the data, and "
                f"go on from {self._checkpoint or 'the start: there is no checkpoint yet'}"
            )

    def _record_step(self, monitor: Monitor, outcome: StepOutcome, lr: float) -> None:
        progress, train = self.progress, self.config.train
        tokens_per_s = self._interval_tokens / self._interval_s
        monitor.step(
            StepRecord(
                step=progress.step,
                tokens=progress.tokens,
                loss=outcome.loss,
                lr=lr,
                grad_norm=outcome.grad_norm,
                step_s=self._interval_s / self._interval_steps,
                tokens_per_s=tokens_per_s,
                mfu_measured=tokens_per_s * self._flops_per_token / self._matmul_flops,
                memory_bytes=memory_bytes(self._device),
                skipped=outcome.skipped,
                epoch=progress.step * train.global_batch_size / self._data.num_sequences,
            )
        )
        self._interval_s, self._interval_steps, self._interval_tokens = 0.0, 0, 0

    def _evaluate(self, signals: StopSignals) -> None:
        """Take the held-out loss into the progress. A signal ends it without result; then a resumed run repeats it."""
        self.model.eval()
        result = heldout_loss(
            self._loss_sum,
            self._data.heldout_batches(self._micro_batch_size),
            self._device,
            stop=lambda: signals.received is not None,
        )
        self.model.train()
        if result is None:
            return
        progress = self.progress
        record = EvalRecord(
            step=progress.step,
            heldout_loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            train_loss=progress.train_loss_sum / max(1, progress.train_loss_steps),
        )
        progress.train_loss_sum, progress.train_loss_steps = 0.0, 0
        progress.evaluated_step = progress.step
        progress.curve.append(dataclasses.asdict(record))
        if progress.best_loss is None or result.loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = result.loss, progress.step, 0
        else:
            progress.evaluations_since_best += 1
        if self._monitor is not None:
            self._monitor.evaluation(record)

    def _save(self, *, is_final: bool) -> None:
        train, progress = self.config.train, self.progress
        random_tensors, random_values = rng.capture()
        optimizer_values: dict[str, Any] = {}
        meta = {
            "config": self.config.to_dict(),
            "progress": dataclasses.asdict(progress),
            "loader": self._stream.state_dict(),
            "micro_batch_size": self._micro_batch_size,
            "environment": environment.capture(),
            "rng": random_values,
            "optimizer": optimizer_values,
        }
        optimizer_tensors: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            name = _name(optimizer)
            tensors, optimizer_values[name] = flatten_optimizer(
                optimizer, self.model.named_parameters(), prefix=f"{name}/"
            )
            optimizer_tensors.update(tensors)
        state = CheckpointState(
            step=progress.step,
            weights=self.model.state_dict(),
            optimizer=optimizer_tensors,
            meta=meta,
            rng=random_tensors,
            tokenizer=self._tokenizer.to_bytes() if self._tokenizer is not None else None,
            heldout_loss=progress.curve[-1]["heldout_loss"] if progress.evaluated_step == progress.step > 0 else None,
        )
        try:
            self._checkpoint = save_checkpoint(train.out_dir, state)
            apply_retention(train.out_dir, train.keep_last, train.keep_best)
        except SaveFailed as error:
            if is_final:
                raise
            self._message(f"{error} The run goes on, and the next checkpoint will be tried at its time.")
        else:
            self._saved = (progress.step, progress.evaluated_step)

    def _state_to_resume(self) -> CheckpointState | None:
        """Load the checkpoint this run goes on from, None for a new run; refuse what would mix two runs."""
        train = self.config.train
        if train.resume == "auto":
            state = load_latest(train.out_dir, on_skip=self._message)
            self._checkpoint = None if state is None else train.out_dir / folder_name(state.step)
            return state
        self._checkpoint = None if train.resume == "never" else find_checkpoint(train.resume, self._message)
        state = None if self._checkpoint is None else load_checkpoint(self._checkpoint)
        existing = list_checkpoints(train.out_dir)
        if existing and (state is None or (step_of(existing[0].name) or 0) > state.step):
            raise UserError(
                f"train.out_dir {train.out_dir} already holds {existing[0].name}, which train.resume {train.resume!r} "
                "would mix with another run; choose another out_dir, or resume 'auto' to go on from there"
            )
        return state

    def _restore(self, state: CheckpointState) -> None:
        """Take over the state of a run; raise UserError if it was another run."""
        changed = differing_fields(state.meta["config"], self.config.to_dict())
        fatal = [line for line in changed if line.startswith(_FIXED_FOR_A_RUN)]
        if fatal:
            raise UserError(
                f"{self._checkpoint} was trained with other settings "
                f"({'; '.join(fatal)}); set them back, or choose another out_dir"
            )
        load_weights(self.model, state.weights)
        for optimizer in self._optimizers:
            configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            restore_optimizer(
                optimizer,
                state.optimizer,
                state.meta["optimizer"][_name(optimizer)],
                self.model.named_parameters(),
                prefix=f"{_name(optimizer)}/",
            )
            for group, options in zip(optimizer.param_groups, configured, strict=True):
                group.update(options)  # this run's settings win; which of them changed is said below
        self._micro_batch_size = self.config.train.micro_batch_size or state.meta["micro_batch_size"]
        self._stream = self._data.train_batches(self._micro_batch_size)
        self._stream.load_state_dict(state.meta["loader"])
        self.progress = Progress(**state.meta["progress"])
        if any(line.startswith(("train.steps:", "train.epochs:")) for line in changed):
            self.progress.num_steps = self._planned_steps
        self._message(f"Going on from step {state.step:,}.")
        for line in changed:
            if not line.startswith(_OF_NO_CONSEQUENCE):
                self._message(f"Changed since then: {line}.")
        if (warning := environment.warning(state.meta["environment"])) is not None:
            self._message(warning)
        for warning in rng.restore(state.rng, state.meta["rng"]):  # last: nothing else may draw before the first step
            self._message(warning)

    def _find_micro_batch_size(self) -> int:
        def run_step(size: int) -> None:
            batch = next(self._data.train_batches(size))
            self._loss_sum(**inputs_to(batch, self._device)).backward()

        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer_bytes = 2 * sum(p.nbytes for p in self._parameters)
        size = find_micro_batch_size(
            run_step, self.config.train.global_batch_size, self._device, reserve_bytes=optimizer_bytes
        )
        self._message(f"Memory holds micro batches of {size} sequences.")
        return size

    def _result(self, stopped_because: str, signals: StopSignals) -> TrainResult:
        progress = self.progress
        curve = [EvalRecord(**record) for record in progress.curve]
        kept = {step_of(path.name): path for path in list_checkpoints(self.config.train.out_dir)}
        return TrainResult(
            steps=progress.step,
            tokens=progress.tokens,
            skipped_steps=progress.skipped_steps,
            heldout_loss=curve[-1].heldout_loss if curve else math.nan,
            bits_per_byte=curve[-1].bits_per_byte if curve else math.nan,
            best_heldout_loss=math.nan if progress.best_loss is None else progress.best_loss,
            stopped_because=stopped_because,
            stop_signal=signals.received,
            checkpoint=self._checkpoint,
            best_checkpoint=kept.get(progress.best_step),
            warnings=tuple(diagnose(curve)),
        )

    def _message(self, text: str) -> None:
        if self._monitor is not None:
            self._monitor.message(text)


# Settings that decide the meaning of what a checkpoint holds: shapes, optimizer state, position in the data.
_FIXED_FOR_A_RUN = (
    "model.",
    "optimizer.name:",
    *(f"train.{name}:" for name in ("seed", "seq_len", "global_batch_size", "separate_documents")),
)
_OF_NO_CONSEQUENCE = ("train.out_dir:", "train.resume:", "train.log_every:", "train.sample_prompts:")


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__.lower()


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but PyTorch finds no CUDA device here; give 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
