"""The configuration of a training run: what the trainer reads, and the whole of it with the model's, as exact JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from warploom.errors import UserError, nearest
from warploom.models.config import TransformerConfig
from warploom.optim import OptimizerConfig, ScheduleConfig
from warploom.parallel import ParallelConfig

__all__ = ["OptimizerConfig", "ParallelConfig", "RunConfig", "ScheduleConfig", "TrainConfig", "TransformerConfig"]


@dataclass(frozen=True)
class TrainConfig:
    out_dir: Path = Path("run")
    """Run folder: checkpoints, metrics, report."""
    seed: int = 0
    """Seed of the order of the data and of dropout."""
    steps: int | None = None
    """Length of the run in optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Length of the run in passes over the training split; None with steps None is one pass."""
    seq_len: int = 256
    """Tokens per training sequence."""
    global_batch_size: int = 32
    """Sequences per optimizer step."""
    micro_batch_size: int = 0
    """Sequences per forward and backward pass; 0 finds the most that memory holds."""
    separate_documents: bool = True
    """Packed documents do not attend to each other and their positions restart."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; weights and moments are always fp32. auto is bf16 on a GPU and fp32 on a CPU."""
    grad_clip: float = 1.0
    """Largest norm of the gradient, the rest is scaled away; 0 never clips."""
    grad_checkpointing: Literal["none", "blocks", "ops", "budget"] = "none"
    """What the backward pass computes again instead of keeping it; the gradients are the same bits. blocks: all of a
    block. ops: all but its matrix products and attention. budget: what costs the least time to fit memory_gb."""
    grad_checkpointing_every: int = 1
    """blocks and ops: of every n-th block only, beginning with the first."""
    memory_gb: float = 0.0
    """budget: gigabytes (1e9 bytes) that weights, gradients, optimizer and activations may take together."""
    deterministic: Literal["layout", "elastic"] = "layout"
    """Which runs give the same bits. layout: those on the same number of processes. elastic: also those that went on
    with another parallel.data in between; gradients are then summed in a fixed tree over the micro batches."""
    compile: bool = False
    """Run the model's forward and backward pass through torch.compile."""
    eval_every: int = 200
    """Steps between evaluations on the held-out split; there is always one at the end."""
    eval_tokens: int = 200_000
    """Tokens of the held-out split read by each evaluation, always the same; 0 reads the whole split."""
    patience: int = 0
    """Stop after this many evaluations without a better held-out loss; 0 never stops early."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end, and one when the run is interrupted."""
    fault_every_s: float = 0.0
    """Seconds after which a fault is to be expected. Above 0 the run is also saved when it has been for so long that
    more would be lost by a fault than saves take: Young's interval, from what saves have taken so far."""
    save_in_background: bool = True
    """Write checkpoints while training goes on, from a copy of weights and optimizer state in host memory, which takes
    as much again; without, and with parallel.check_collectives, training waits."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints of the lowest held-out loss kept; 0 does not save when the held-out loss improves."""
    resume: str = "auto"
    """auto goes on from the newest good checkpoint in out_dir if there is one, never begins anew, or a checkpoint."""
    spike_zscore: float = 20.0
    """A loss or gradient norm so many standard deviations above the median of the last spike_window steps is a spike,
    the standard deviation being 1.48 times the median absolute deviation, or 1% of the median if that is more; 0 looks
    for none."""
    spike_window: int = 128
    """Steps with which a step is compared; before there are so many, nothing is a spike."""
    on_spike: Literal["report", "skip"] = "report"
    """report: say which step and data it was. skip: make no update from it as well."""
    max_nonfinite_steps: int = 3
    """After so many steps in a row that were skipped, for a loss or gradient that was not finite or a spike, go back to
    the checkpoint before them and leave out their data."""
    max_rewinds: int = 3
    """Go back so many times in a run, one checkpoint further each time, then stop; 0 stops at once."""
    sdc_check_every: int = 0
    """Of every n-th step the gradients are computed twice, which must give the same bits, and the weights of replicas
    are compared: a processor or memory that errs without a word (silent data corruption) ends the run before that step
    is made. It costs 1/n of the time; 0 never checks."""
    log_every: int = 1
    """Steps between records of the metrics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the samples in the report."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError(f"train.steps is {self.steps} and train.epochs is {self.epochs}; give one of them")
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; give a number above 0")
        for name in (
            "seq_len", "global_batch_size", "eval_every", "save_every", "keep_last", "max_nonfinite_steps", "log_every",
            "grad_checkpointing_every", "spike_window",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; give 1 or more")
        for name in (
            *("seed", "micro_batch_size", "grad_clip", "eval_tokens", "patience", "keep_best", "threads"),
            *("memory_gb", "max_rewinds", "spike_zscore", "sdc_check_every", "fault_every_s"),
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; give 0 or more")
        if (self.grad_checkpointing == "budget") != (self.memory_gb > 0):
            raise UserError(
                f"train.grad_checkpointing is {self.grad_checkpointing!r} and train.memory_gb {self.memory_gb:g}; "
                "'budget' and a memory_gb above 0 belong together"
            )
        if self.grad_checkpointing == "budget" and not self.micro_batch_size:
            raise UserError(
                "train.grad_checkpointing 'budget' fits activations of a given size into memory_gb; give a "
                "train.micro_batch_size above 0"
            )
        if self.compile and self.grad_checkpointing in ("ops", "budget"):
            raise UserError(
                f"train.grad_checkpointing {self.grad_checkpointing!r} chooses among operators that train.compile "
                "would fuse; take 'blocks', or leave compile out"
            )
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"train.global_batch_size is {self.global_batch_size}, not a multiple of train.micro_batch_size "
                f"{self.micro_batch_size}; change one of them, or give micro_batch_size 0 to have it found"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, except the data."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.train.seq_len > self.model.max_seq_len:
            raise UserError(
                f"train.seq_len is {self.train.seq_len}, more than model.max_seq_len {self.model.max_seq_len}; "
                "lower the one or raise the other"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; from_dict gives the same configuration back."""
        return to_json(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Read what to_dict or a TOML file gives; absent keys take their defaults.

        Raises UserError for an unknown key and for a value of the wrong type or range.
        """
        return from_dict(cls, values)


def from_dict(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """Build the configuration dataclass cls from JSON values; path is where they stand, for error messages."""
    if not isinstance(values, dict):
        raise UserError(f"{path or 'the configuration'} is {values!r}; give a table of settings")
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in known:
            raise UserError(f"unknown setting {prefix}{key}{nearest(key, known)}")
    return cls(**{key: _from_json(hints[key], value, prefix + key) for key, value in values.items()})


def to_json(value: Any) -> Any:
    """Return a configuration dataclass, or a value of one, as plain JSON values."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _from_json(hint: Any, value: Any, path: str) -> Any:
    """Return value as the type of its field, or raise UserError: nothing is converted that would lose or guess."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return None if value is None else _from_json(inner, value, path)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{path} is {value!r}{nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            return tuple(_from_json(a, v, path) for a, v in zip(arguments, value, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{path} is {value!r}; give {_TYPE_NAMES.get(hint, str(hint))}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
