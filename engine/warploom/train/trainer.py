"""The trainer: everything around the training step. Evaluation, checkpoints, early stopping, interruption."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warploom.checkpoint import rng
from warploom.checkpoint.format import CheckpointState, list_checkpoints, step_of
from warploom.checkpoint.lock import FolderLock
from warploom.data.shards import TokenDataset
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import build_optimizers, lr_multiplier
from warploom.parallel import heartbeat
from warploom.parallel.config import process_seed
from warploom.parallel.devices import spread
from warploom.parallel.tree import TreeSum, step_seed
from warploom.parallel.tree import check as check_tree
from warploom.train import matmul_rate, run_state
from warploom.train.allocator import keep_freed_memory
from warploom.train.batch_size import find_micro_batch_size
from warploom.train.batches import TokenData, TrainingData, inputs_to
from warploom.train.budget import Deadline, corrected_steps, is_correction_due
from warploom.train.config import RunConfig
from warploom.train.corruption import ComputedTwice
from warploom.train.device import choose_device, choose_dtype, first_devices
from warploom.train.diagnosis import diagnose
from warploom.train.guard import LONG_STEP_S, SIGNALS, StepAbandoned, StopSignals
from warploom.train.heldout import heldout_loss
from warploom.train.monitor import (
    EvalRecord,
    MemoryGauge,
    Monitor,
    OddStep,
    RunInfo,
    StepRecord,
)
from warploom.train.recompute import set_kept
from warploom.train.result import TrainResult
from warploom.train.run_state import Progress
from warploom.train.saving import RunSaver
from warploom.train.spikes import SpikeWatch
from warploom.train.step import ONE_PROCESS, Processes, StepOutcome, training_step

if TYPE_CHECKING:
    from warploom.parallel.apply import Parallelize, ParallelModel


class Trainer:
    """Trains a model on data as config.train, config.optimizer and config.schedule say.

    data is a TokenDataset or any TrainingData. The tokenizer, by default the data set's, goes into the checkpoints.
    Without a monitor the run is silent. The run folder is config.train.out_dir; only one trainer at a time can work in
    it. With a deadline the number of steps is corrected to the pace of the run, so that the last step, with the
    evaluations and checkpoints before it, leaves time for what follows. loss_sum takes the place of
    model.loss (see training_step). extras, JSON values, go into the meta of every checkpoint. benchmark is given the
    model, in evaluation mode, after each held-out loss; what it returns is recorded beside it.

    parallelize spreads the model over the processes of its mesh. All of them make a Trainer with the same weights, data
    and configuration and call the same methods; rank 0 alone writes.
    """

    def __init__(
        self,
        model: Transformer,
        data: TokenDataset | TrainingData,
        config: RunConfig,
        *,
        tokenizer: Tokenizer | None = None,
        monitor: Monitor | None = None,
        deadline: Deadline | None = None,
        parallelize: Parallelize | None = None,
        loss_sum: Callable[..., Tensor] | None = None,
        extras: Mapping[str, Any] | None = None,
        benchmark: Callable[[Transformer], Mapping[str, float]] | None = None,
    ) -> None:
        if isinstance(data, TokenDataset):
            tokenizer = tokenizer or data.tokenizer
            data.require_tokenizer(tokenizer)
            if tokenizer.vocab_size > model.config.vocab_size:
                raise UserError(
                    f"model.vocab_size is {model.config.vocab_size}, and the tokenizer of {data.folder} has "
                    f"{tokenizer.vocab_size} tokens; make them equal"
                )
        self.model, self.config = model, config
        self._loss_sum: Callable[..., Tensor] = loss_sum or functools.partial(model.loss, reduction="sum")
        self._extras = extras or {}
        if benchmark is not None and parallelize is not None:
            raise UserError("tasks are answered by one process that has the whole model; leave them out, or start one")
        self._benchmark = benchmark
        self._data = TokenData(data, config.train) if isinstance(data, TokenDataset) else data
        self._tokenizer, self._monitor, self._deadline = tokenizer, monitor, deadline
        self._device = choose_device(config.train.device)
        self._dtype = choose_dtype(config.train.dtype, self._device)
        self._memory = MemoryGauge(self._device)
        self._parallelize, self._rank = parallelize, 0 if parallelize is None else parallelize.mesh.rank
        self._parallel: ParallelModel | None = None
        self._begun: set[str] = set()
        # What one of the processes says at least, of what all are to do alike.
        self._steps_are_long = True  # the first step may be
        self._is_save_due = False
        self._step_started = -math.inf
        self._planned_steps = config.train.steps or math.ceil(
            (config.train.epochs or 1) * self._data.num_sequences / config.train.global_batch_size
        )

    def fit(self) -> TrainResult:
        """Train to the end, or until early stopping or a signal ends the run; a checkpoint is the last thing written.

        Raises UserError if the run folder is in use or holds another run, if steps stay not finite after max_rewinds,
        if a GPU's memory is too small, and if the last checkpoint cannot be written. A checkpoint in between that
        cannot be (a full disk) is reported when the next one is due, which is tried as if nothing had been.
        """
        with self._run_lock(), StopSignals() as signals:
            self._signals = signals
            heartbeat.report("set-up")
            self._set_up()
            try:
                self._start_monitor()
                result = self._result(*self._loop(signals))
                heartbeat.report("end")
                if self._monitor is not None:
                    for warning in result.warnings:
                        self._monitor.message(warning)
                    self._monitor.finish(result)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"a micro batch of {self.progress.micro_batch_size} sequences does not fit the GPU's memory; give "
                    "train.micro_batch_size 0 to have it found, or train.grad_checkpointing"
                ) from error
            finally:
                self._saver.finish()  # before the folder is another's
                if self._monitor is not None:
                    self._monitor.close()
        return result

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """What holds the state of the run's trainable parameters, once fit has begun."""
        return self._optimizers

    def _set_up(self) -> None:
        """Bring model, optimizers, data and random states to the start of the run, or to where it was left."""
        train = self.config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.model.to(self._device)
        if self.config.parallel.devices > 1:
            if train.compile:
                raise UserError("train.compile works on one device; leave it out, or give parallel.devices 1")
            spread(self.model, first_devices(self._device, self.config.parallel.devices))
        self.model.compute_dtype = self._dtype
        self._num_parameters = self.model.num_parameters()
        self._flops_per_token = self.model.flops_per_token(train.seq_len)
        self.model.train()
        if self._parallelize is None:
            self._set_up_alone()
        else:
            self._set_up_parallel(self._parallelize)
        found = run_state.find_state(train, self._message, self._parallel)
        latest: Path | None = None
        if found is None:
            self.progress = Progress(self._planned_steps, train.micro_batch_size or self._find_micro_batch_size())
            self._stream = self._data.train_batches(self._rows_per_read)
            random.seed(train.seed)
            numpy.random.seed(train.seed % 2**32)
            torch.manual_seed(process_seed(train.seed, self._rank))
            self._run_id = run_state.run_id(self.config, self._stream)
        else:
            latest, state = found
            self.progress = run_state.restore(
                *found,
                self.model,
                self._optimizers,
                self.config,
                self._planned_steps,
                self._message,
                self._parallel,
            )
            self._stream = self._data.train_batches(self._rows_per_read)
            self._stream.load_state_dict(state.meta["loader"])
            self._run_id = state.run or run_state.run_id(self.config, self._stream)
        self._saver = RunSaver(
            self.config, self._capture, self.progress, self._monitor, latest=latest, parallel=self._parallel
        )
        if self._parallel is not None:
            self._parallel.flags = self._flags
        self._spikes = SpikeWatch(train, self.progress.recent)
        if self._device.type == "cpu":
            # After the search for the micro batch: it goes by how much memory the process takes from the system.
            keep_freed_memory()

    def _set_up_alone(self) -> None:
        train = self.config.train
        packed = keep_packed(self.model)
        self._module: nn.Module = self.model
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._processes: Processes = self._tree_sum() if train.deterministic == "elastic" else ONE_PROCESS
        if train.compile:
            self._loss_sum = torch.compile(self._loss_sum)
        self._heldout_loss_sum: Callable[..., Tensor] = self._loss_sum
        fit = set_kept(self.model, self.config, self._loss_sum, self._sample_inputs)
        if fit is not None:
            self._message(str(fit))
        # Muon's products follow the compute type: who trains in bfloat16 has fast products for it.
        self._optimizers = build_optimizers(self.model, self.config.optimizer, muon_dtype=self._dtype, packed=packed)

    def _set_up_parallel(self, parallelize: Parallelize) -> None:
        train = self.config.train
        if not train.micro_batch_size:
            raise UserError(
                "train.micro_batch_size is 0, which has it found for one process; give the sequences that one of the "
                "processes takes at a time"
            )
        if train.compile:
            raise UserError("train.compile works in one process; leave it out, or start one process")
        if self.config.optimizer.offload:
            raise UserError("optimizer.offload works in one process; leave it out: parallel.shard divides the moments")
        if train.grad_checkpointing == "budget":
            raise UserError(
                "train.grad_checkpointing 'budget' measures one process; take 'none', 'blocks' or 'ops' for several"
            )
        if train.deterministic == "elastic":
            self._set_up_replicas(parallelize)
            return
        set_kept(self.model, self.config, self.model.loss, self._sample_inputs)
        self._processes = self._parallel = parallel = parallelize(self.model, train.micro_batch_size)
        self._module, self._parameters = parallel.module, parallel.parameters
        self._loss_sum, self._heldout_loss_sum = parallel.loss_sum, parallel.heldout_loss_sum
        self._optimizers = build_optimizers(
            parallel.module,
            self.config.optimizer,
            muon_dtype=self._dtype,
            packed=keep_packed(parallel.module) if parallel.keeps_weights else None,
            exchange=parallel.matrices,
        )

    def _set_up_replicas(self, parallelize: Parallelize) -> None:
        """Replicas that compute as one process alone does, down to the bits."""
        sizes = parallelize.mesh.config.sizes
        others = [name for name, size in sizes.items() if name != "data" and size > 1]
        if others:
            raise UserError(
                f"train.deterministic 'elastic' is for replicas, and parallel.{others[0]} is {sizes[others[0]]}; give "
                f"parallel.{others[0]} 1, or deterministic 'layout'"
            )
        # First, since it counts the parameters as they are.
        self._parallel = parallelize(self.model, self.config.train.micro_batch_size, sums_gradients=False)
        self._set_up_alone()

    def _tree_sum(self) -> TreeSum:
        train = self.config.train
        axis = None if self._parallel is None else self._parallel.mesh.axis["data"]
        if not train.micro_batch_size:
            raise UserError(
                "train.deterministic 'elastic' sums over micro batches; give a train.micro_batch_size above 0"
            )
        check_tree(train.global_batch_size // train.micro_batch_size, 1 if axis is None else axis.size)
        return TreeSum(self._parameters, lambda: step_seed(train.seed, self.progress.step), axis)

    @property
    def _is_shared_out(self) -> bool:
        """Whether processes each take their share of the batches that they are given."""
        return self._parallel is not None and self.config.train.deterministic == "layout"

    @property
    def _rows_per_read(self) -> int:
        """Rows that are read at a time: a micro batch, or, for processes that each take their share, all."""
        return self.config.train.global_batch_size if self._is_shared_out else self.progress.micro_batch_size

    def _run_lock(self) -> AbstractContextManager[object]:
        return FolderLock(self.config.train.out_dir) if self._rank == 0 else nullcontext()

    def _start_monitor(self) -> None:
        if self._monitor is None:
            return
        num_processes = 1 if self._parallelize is None else self._parallelize.mesh.world_size
        self._matmul_flops = num_processes * matmul_rate.measure(self._dtype, self._device)
        self._monitor.start(
            RunInfo(
                steps=self.progress.num_steps,
                start_step=self.progress.step,
                num_parameters=self._num_parameters,
                tokens_per_step=self.config.train.global_batch_size * self.config.train.seq_len,
                matmul_flops=self._matmul_flops,
                device=str(self._device),
                dtype=str(self._dtype).removeprefix("torch."),
            )
        )

    def _loop(self, signals: StopSignals) -> tuple[str, int | None]:
        """Step, evaluate and save until something ends the run; return what did, and the signal if it was one."""
        train, progress = self.config.train, self.progress
        self._interval_s, self._interval_steps, self._interval_tokens = 0.0, 0, 0
        self._paced_since = (time.monotonic(), progress.step)
        self._pace_s = 0.0 if self._deadline is None else self._deadline.step_s
        heartbeat.report(step=progress.step)
        while True:
            is_last = progress.step >= progress.num_steps
            if progress.step > progress.evaluated_step and (is_last or progress.step % train.eval_every == 0):
                self._evaluate(signals)
            stopped_because = None
            signal = self._signal(signals)  # looked at once: a later one shall not end a run that is over
            if signal is not None:
                stopped_because = f"{signal.name} received"
            elif is_last:
                stopped_because = "all steps are done"
            elif train.patience and progress.evaluations_since_best >= train.patience:
                stopped_because = f"the held-out loss was no better for {train.patience} evaluations"
            is_best = train.keep_best > 0 and progress.step == progress.best_step
            is_due = stopped_because is not None or is_best or progress.step % train.save_every == 0
            if is_due or self._is_save_due:
                self._saver.save(is_final=stopped_because is not None)
            if stopped_because is not None:
                self._saver.say_stall()
                return stopped_because, signal
            self._step()
            if self._deadline is not None:
                self._keep_to(self._deadline)

    def _begin(self, phase: str) -> None:
        """Tell the launcher, if there is one. What is done for the first time may compile, and take longer."""
        heartbeat.report(phase if phase in self._begun else f"first {phase}")
        self._begun.add(phase)

    def _keep_to(self, deadline: Deadline) -> None:
        """Move the end of the run to where the pace since the last correction, pauses included, will be in time."""
        progress, now = self.progress, time.monotonic()
        since, first = self._paced_since
        if now >= deadline.of_steps(self._pace_s):
            progress.num_steps = progress.step
        elif progress.step > first and is_correction_due(
            progress.step, progress.num_steps, (now - since) / deadline.budget_s
        ):
            self._pace_s = (now - since) / (progress.step - first)
            left_s = deadline.of_steps(self._pace_s) - now
            progress.num_steps = corrected_steps(progress.step, self._pace_s, left_s)
            self._paced_since = (now, progress.step)
        if self._monitor is not None:
            self._monitor.set_steps(progress.num_steps)

    def _step(self) -> None:
        train, progress = self.config.train, self.progress
        self._begin("step")
        # Skipped steps made no update, so the schedule stands still over them.
        lr_factor = lr_multiplier(self.config.schedule, progress.step - progress.skipped_steps, progress.num_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        position = self._stream.state_dict()
        put_random_states_back = rng.remember() if self._steps_are_long else None
        self._spikes.found = None
        self._step_started = started = time.perf_counter()
        micro_batches = [next(self._stream) for _ in range(train.global_batch_size // self._rows_per_read)]
        try:
            outcome = training_step(
                self._loss_sum_until_signal,
                micro_batches,
                self._parameters,
                self._optimizers,
                grad_clip=train.grad_clip,
                processes=self._processes_of_step(),
                refuses=self._spikes.refuses,
            )
        except StepAbandoned:
            # As if it had not begun: what is saved now goes on with this very step.
            assert put_random_states_back is not None, "only long steps are given up"
            self._stream.load_state_dict(position)
            put_random_states_back()
            return
        step_s = time.perf_counter() - started
        heartbeat.report(step=progress.step + 1)

        num_tokens = sum(batch.tokens.numel() for batch in micro_batches)
        progress.step += 1
        progress.tokens += num_tokens
        if outcome.skipped:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
        else:
            progress.skipped_in_a_row = 0
            progress.train_loss_sum += outcome.loss
            progress.train_loss_steps += 1
        self._interval_s += step_s
        self._interval_steps += 1
        self._interval_tokens += num_tokens
        if self._monitor is not None and (progress.step % train.log_every == 0 or outcome.skipped):
            self._record_step(self._monitor, outcome)
        why = "was not finite" if self._spikes.found is None else f"was a spike: {self._spikes.found}"
        if (outcome.skipped or self._spikes.found is not None) and self._monitor is not None:
            numbers = outcome.loss, outcome.grad_norm, train.global_batch_size
            self._monitor.odd_step(OddStep(progress.step, *numbers, position, why, outcome.skipped))
        if progress.skipped_in_a_row >= train.max_nonfinite_steps:
            self._saver.collect()
            run_state.rewind(
                progress,
                self.model,
                self._optimizers,
                self.config,
                self._planned_steps,
                self._message,
                self._parallel,
                why=why,
            )

    def _processes_of_step(self) -> Processes:
        train, step = self.config.train, self.progress.step + 1
        if not train.sdc_check_every or step % train.sdc_check_every:
            return self._processes
        if self._parallel is not None:
            return ComputedTwice(self._processes, self._parallel.named, step, self._parallel.cross_check)
        return ComputedTwice(self._processes, [*self.model.named_parameters()], step)

    def _loss_sum_until_signal(self, **inputs: Tensor) -> Tensor:
        """The loss, unless a signal has been waiting for the end of the step for too long.

        Where steps are long, that is: others end in time. All processes give a step up at the same micro batch, so they
        ask each other before each. Not in a pipeline, whose schedule has all micro batches under way.
        """
        if self._steps_are_long and any(self._anywhere(self._signals.overdue)):
            raise StepAbandoned
        return self._loss_sum(**inputs)

    def _record_step(self, monitor: Monitor, outcome: StepOutcome) -> None:
        progress, train = self.progress, self.config.train
        memory_bytes, tensors_peak_bytes = self._memory.read()
        tokens_per_s = self._interval_tokens / self._interval_s
        monitor.step(
            StepRecord(
                step=progress.step,
                tokens=progress.tokens,
                loss=outcome.loss,
                lr=self._optimizers[-1].param_groups[0]["lr"],  # AdamW's, the last of the optimizers
                grad_norm=outcome.grad_norm,
                step_s=self._interval_s / self._interval_steps,
                tokens_per_s=tokens_per_s,
                mfu_measured=tokens_per_s * self._flops_per_token / self._matmul_flops,
                memory_bytes=memory_bytes,
                skipped=outcome.skipped,
                epoch=progress.step * train.global_batch_size / self._data.num_sequences,
                tensors_peak_bytes=tensors_peak_bytes,
            )
        )
        self._interval_s, self._interval_steps, self._interval_tokens = 0.0, 0, 0

    def _evaluate(self, signals: StopSignals) -> None:
        """Take the held-out loss into the progress. A signal ends it without result; then a resumed run repeats it."""
        self._begin("evaluation")
        self._module.eval()
        rows = self.progress.micro_batch_size
        if self._parallel is not None and self._is_shared_out:
            rows *= self._parallel.mesh.num_parts
        result = heldout_loss(
            self._heldout_loss_sum,
            self._data.heldout_batches(rows),
            self._device,
            stop=lambda: self._signal(signals) is not None,
        )
        scores = {} if result is None or self._benchmark is None else dict(self._benchmark(self.model))
        self._module.train()
        if result is None:
            return
        progress = self.progress
        record = EvalRecord(
            step=progress.step,
            heldout_loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            train_loss=progress.train_loss_sum / max(1, progress.train_loss_steps),
            scores=scores,
        )
        progress.train_loss_sum, progress.train_loss_steps = 0.0, 0
        progress.evaluated_step = progress.step
        progress.curve.append(dataclasses.asdict(record))
        if math.isfinite(result.loss) and (progress.best_loss is None or result.loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.evaluations_since_best = result.loss, progress.step, 0
        else:
            progress.evaluations_since_best += 1
        if self._monitor is not None:
            self._monitor.evaluation(record)

    def _capture(self) -> CheckpointState:
        state = run_state.capture(
            self.progress,
            self.model,
            self._optimizers,
            self._stream,
            self.config,
            self._tokenizer,
            self._parallel,
            self._run_id,
        )
        state.meta.update(self._extras)
        return state

    def _signal(self, signals: StopSignals) -> Signals | None:
        """Return the signal that one of the processes received. After a short step that is what its sums brought along:
        what came since is known after the next."""
        heartbeat.report()
        raised: Sequence[bool] | None = None if self._parallel is None else self._parallel.take_raised()
        if raised is None or raised[0]:
            raised = self._anywhere(*self._flags())
        self._steps_are_long, self._is_save_due, *received = raised
        return next((number for number, is_here in zip(SIGNALS, received, strict=True) if is_here), None)

    def _flags(self) -> Sequence[bool]:
        """What this process tells the others in each step."""
        is_long = time.perf_counter() - self._step_started > LONG_STEP_S
        is_received = (self._signals.received is number for number in SIGNALS)
        return (is_long, self._rank == 0 and self._saver.is_due, *is_received)

    def _anywhere(self, *flags: bool) -> Sequence[bool]:
        return flags if self._parallel is None else self._parallel.any_process(*flags)

    def _sample_inputs(self, micro_batch_size: int | None = None) -> dict[str, Any]:
        size = micro_batch_size or self.config.train.micro_batch_size
        return inputs_to(next(self._data.train_batches(size)), self._device)

    def _find_micro_batch_size(self) -> int:
        def run_step(size: int) -> None:
            self._loss_sum(**self._sample_inputs(size)).backward()

        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer_bytes = 2 * sum(p.nbytes for p in self._parameters)
        size = find_micro_batch_size(
            run_step, self.config.train.global_batch_size, self._device, reserve_bytes=optimizer_bytes
        )
        self._message(f"Memory holds micro batches of {size} sequences.")
        return size

    def _result(self, stopped_because: str, stop_signal: int | None) -> TrainResult:
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
            stop_signal=stop_signal,
            checkpoint=self._saver.latest,
            best_checkpoint=kept.get(progress.best_step),
            warnings=tuple(diagnose(curve)),
        )

    def _message(self, text: str) -> None:
        if self._monitor is not None:
            self._monitor.message(text)
