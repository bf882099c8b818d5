"""What a run shows and records while it trains: a live display, metrics.jsonl and TensorBoard events.

The trainer hands in records; nothing here reads the model. metrics.jsonl holds one JSON object per line, a record with
its "kind" ("step", "eval", "save", "skip" or "spike"), so that the report, and anyone else, can draw the run from it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from warploom.ops import _extension

if TYPE_CHECKING:
    from warploom.train.result import TrainResult

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_REDRAW_EVERY_S = 0.25
_WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step."""

    steps: int  # the step the run ends at
    start_step: int  # steps already done: 0, or where a resumed run goes on
    num_parameters: int
    tokens_per_step: int
    matmul_flops: float  # FLOP/s of a large matrix product here, in the compute dtype (train/matmul_rate.py)
    device: str
    dtype: str


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, after it."""

    step: int  # 1 for the first
    tokens: int  # trained on since the beginning of the run, this step included
    loss: float  # mean over the step's tokens, nats
    lr: float
    grad_norm: float  # before clipping
    step_s: float
    tokens_per_s: float
    mfu_measured: float  # achieved FLOP/s over RunInfo.matmul_flops
    memory_bytes: int
    skipped: bool  # not finite, or a spike that was to be skipped, so the weights did not move
    epoch: float  # passes over the training split so far
    tensors_peak_bytes: int = 0  # the most that tensors took at one time so far; 0 where nothing counts it


@dataclass(frozen=True)
class OddStep:
    """One step whose loss or gradient was not finite or a spike, so that it can be looked at: which sequences it was
    made of."""

    step: int
    loss: float
    grad_norm: float
    num_sequences: int
    position: Mapping[str, Any]  # the loader's state before the first of them
    why: str  # "was not finite", or "was a spike: ..."
    skipped: bool  # it changed nothing


@dataclass(frozen=True)
class SaveRecord:
    """One checkpoint between two steps."""

    step: int
    stall_s: float  # for which the steps waited; it is written beside them


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on the held-out split."""

    step: int
    heldout_loss: float  # nats per token
    bits_per_byte: float
    train_loss: float  # mean training loss since the evaluation before, nats per token
    scores: dict[str, float] = field(default_factory=dict)  # of benchmarks, such as arc_easy/acc; none unless asked for


Record = StepRecord | OddStep | SaveRecord | EvalRecord


def memory_bytes(device: torch.device) -> int:
    """Memory this process holds now: resident set on a CPU, PyTorch's allocator on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss


def tensors_peak_bytes(device: torch.device) -> int:
    """The most that tensors of this process have taken at one time: by PyTorch's allocator on a CUDA device, by the
    arena on a CPU; 0 without it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _extension.why_missing("arena_statistics") is not None:
        return 0
    return torch.ops.warploom_cpu.arena_statistics()["peak_bytes"]


class MemoryGauge:
    """What the two functions above return for one device, read again where the last reading is older than a second:
    asking the system takes a share of a step of milliseconds."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._read_at, self._reading = -math.inf, (0, 0)

    def read(self) -> tuple[int, int]:
        """Return the bytes that this process holds, and the most that tensors have taken."""
        now = self._clock()
        if now - self._read_at >= 1.0:
            self._read_at, self._reading = now, (memory_bytes(self._device), tensors_peak_bytes(self._device))
        return self._reading


class Monitor:
    """Shows and records one run. Use: start, then any of step, evaluation, message and set_steps, then finish.

    On a terminal three lines are redrawn in place; elsewhere a plain line is printed every `line_every_s` seconds and
    after each evaluation. Records of steps are written once a second, many at a time, which for steps of milliseconds
    costs a fraction of writing each; a run that is killed keeps its curve up to then.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        console: Console | None = None,
        line_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = run_dir
        self._console = console or Console()
        self._line_every_s = line_every_s
        self._clock = clock
        self._metrics: TextIO | None = None
        self._events: SummaryWriter | None = None
        self._live: Live | None = None
        self._step: StepRecord | None = None
        self._eval: EvalRecord | None = None
        self._drawn_at = self._written_at = -math.inf
        self._unwritten: list[tuple[str, Record, tuple[str, ...], float]] = []  # with the time of day of each
        self._odd_step = -1  # the last

    def start(self, info: RunInfo) -> None:
        """Open the outputs. What an earlier, longer run recorded after info.start_step is removed from them."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / METRICS_FILE
        truncate_metrics(path, info.start_step)
        self._metrics = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self._run_dir / TENSORBOARD_FOLDER), purge_step=info.start_step + 1)
        self._info, self._steps, self._started_at = info, info.steps, self._clock()
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        first = f"from step {info.start_step:,} " if info.start_step else ""
        self.message(
            f"Training {info.num_parameters:,} parameters {first}to step {info.steps:,}, with {info.tokens_per_step:,} "
            f"tokens a step, in {info.dtype} on {info.device}, which multiplies matrices at "
            f"{info.matmul_flops / 1e9:,.0f} GFLOP/s."
        )

    def set_steps(self, steps: int) -> None:
        """Move the end of the run, when the plan of a time budget is corrected."""
        self._steps = steps

    def step(self, record: StepRecord) -> None:
        self._step = record
        self._record("step", record, ("loss", "lr", "grad_norm", "tokens_per_s", "mfu_measured", "memory_bytes"))
        self._show(_REDRAW_EVERY_S if self._live else self._line_every_s)

    def odd_step(self, record: OddStep) -> None:
        self._record("skip" if record.skipped else "spike", record, ())
        is_news = record.skipped or record.step != self._odd_step + 1  # a loss that stays high is said once
        self._odd_step = record.step
        if not is_news:
            return
        where = ", ".join(f"{name} {value}" for name, value in record.position.items() if name in ("epoch", "index"))
        self.message(
            f"Step {record.step:,} {record.why} (loss {record.loss:.6g}, gradient norm {record.grad_norm:.6g})"
            f"{' and changed nothing' if record.skipped else ''}: {record.num_sequences} sequences from "
            f"{where or dict(record.position)} on."
        )

    def evaluation(self, record: EvalRecord) -> None:
        self._eval = record
        self._record("eval", record, ("heldout_loss", "bits_per_byte"))
        for name, score in record.scores.items():
            assert self._events is not None
            self._events.add_scalar(name, score, record.step)
        self._show(0.0)

    def save(self, record: SaveRecord) -> None:
        self._record("save", record, ("stall_s",))

    def write(self) -> None:
        """Write what is recorded so far. Before a checkpoint is begun, so that none has a step that no record has."""
        assert self._metrics is not None and self._events is not None, "start() comes first"
        records, self._unwritten = self._unwritten, []  # one that a full disk refuses is not tried again
        for kind, record, scalars, at in records:
            values = {"kind": kind, **vars(record)}
            if not values.get("scores", True):
                del values["scores"]
            line = json.dumps({key: _json_value(value) for key, value in values.items()}, allow_nan=False)
            self._metrics.write(line + "\n")
            # One event for all of them: add_scalar, which makes one of each, takes six times as long.
            found = [Summary.Value(tag=name, simple_value=values[name]) for name in scalars]
            found = [value for value in found if math.isfinite(value.simple_value)]
            if found:
                self._events.file_writer.add_summary(Summary(value=found), record.step, at)
        self._metrics.flush()
        self._written_at = self._clock()

    def message(self, text: str) -> None:
        """Print a sentence above the display."""
        self._console.print(text, markup=False, highlight=False)

    def finish(self, result: TrainResult) -> None:
        """Draw the last state, say how the run ended, close the outputs."""
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
        self.close()
        self.message(f"Stopped at step {result.steps:,}: {result.stopped_because}.")

    def close(self) -> None:
        """Close the outputs without a word; also right after an exception. May be called twice."""
        if self._live is not None:
            self._live.stop()
        if self._metrics is not None:
            self.write()
            self._metrics.close()
        if self._events is not None:
            self._events.close()
        self._live = self._metrics = self._events = None

    def _record(self, kind: str, record: Record, scalars: tuple[str, ...]) -> None:
        self._unwritten.append((kind, record, scalars, time.time()))
        if kind != "step" or self._clock() - self._written_at >= _WRITE_EVERY_S:
            self.write()

    def _show(self, at_most_every_s: float) -> None:
        now = self._clock()
        is_last = self._step is not None and self._step.step >= self._steps
        if now - self._drawn_at < at_most_every_s and not is_last:
            return
        self._drawn_at = now
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
        elif self._step is not None:
            self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def _left_s(self, record: StepRecord) -> float:
        # Evaluations and checkpoints count too, so this goes by the clock and not by step_s.
        per_step_s = (self._clock() - self._started_at) / max(1, record.step - self._info.start_step)
        return per_step_s * max(0, self._steps - record.step)

    def _parts(self, record: StepRecord) -> tuple[list[str], list[str]]:
        quality = [f"loss {record.loss:.3f}"]
        if self._eval is not None:
            quality.append(f"held-out {self._eval.heldout_loss:.3f} ({self._eval.bits_per_byte:.3f} bits/byte)")
        quality += [f"lr {record.lr:.2e}", f"grad norm {record.grad_norm:.2f}"]
        rate = [
            f"{record.tokens_per_s:,.0f} tokens/s",
            f"{record.mfu_measured:.0%} of matrix rate",
            f"{record.memory_bytes / 1e9:.2f} GB",
            f"epoch {record.epoch:.2f}",
        ]
        if record.skipped:
            rate.append("step skipped")
        return quality, rate

    def _line(self) -> str:
        assert self._step is not None
        quality, rate = self._parts(self._step)
        progress = [f"step {self._step.step}/{self._steps}"]
        return " | ".join(progress + quality + rate + [f"{format_duration(self._left_s(self._step))} left"])

    def _render(self) -> Group:
        record = self._step
        if record is None:
            return Group(Text("waiting for the first step", style="dim"))
        quality, rate = self._parts(record)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {record.step:,}/{self._steps:,}", style="bold"),
            ProgressBar(total=self._steps, completed=record.step, width=max(10, min(40, self._console.width - 40))),
            Text(f"{record.step / self._steps:.0%}"),
            Text(f"{format_duration(self._left_s(record))} left", style="dim"),
        )
        return Group(bar, Text("   ".join(quality)), Text("   ".join(rate), style="dim"))


def truncate_metrics(path: Path, step: int) -> None:
    """Cut metrics.jsonl after the last line of `step`, so that a resumed run leaves no doubles. Step 0 empties it.

    A last line torn by a kill is cut too. A missing file is fine.
    """
    if not path.exists():
        return
    keep = 0
    with path.open("r+b") as file:
        for line in file:
            if step == 0 or not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            keep += len(line)
        file.truncate(keep)


def format_duration(seconds: float) -> str:
    """59 s, 4 min 05 s or 3 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _json_value(value: Any) -> Any:
    """JSON has no NaN and no infinity: a loss that is not finite becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
