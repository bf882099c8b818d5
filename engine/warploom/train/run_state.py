"""Everything that a run is at a step boundary, into a checkpoint and back, so that it goes on bit for bit.

That is the weights, the optimizers, the position in the data, the random states and the counters. The schedule needs
no state of its own: it follows from the counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warploom.checkpoint import environment, rng
from warploom.checkpoint.format import (
    CheckpointState,
    Place,
    encode_json,
    folder_name,
    list_checkpoints,
    step_of,
    xxh3_128,
)
from warploom.checkpoint.load import (
    count_nonfinite,
    differing_fields,
    find_checkpoint,
    load_checkpoint,
    load_latest,
    load_weights,
    refuse_nonfinite,
    refuse_other_shapes,
)
from warploom.checkpoint.optimizer import flatten_optimizer, restore_optimizer
from warploom.checkpoint.ranks import load_over_ranks
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.models.transformer import Transformer
from warploom.nn.lora import adapter_state, base_state, lora_layers
from warploom.train.batches import BatchStream
from warploom.train.config import RunConfig, TrainConfig

if TYPE_CHECKING:
    from warploom.parallel.apply import ParallelModel

# Settings that decide the meaning of what a checkpoint holds: shapes, optimizer state, position in the data.
_FIXED = (
    "model.",
    "optimizer.name:",
    *(f"train.{name}:" for name in ("seed", "seq_len", "global_batch_size", "separate_documents", "deterministic")),
)
_FIXED_IN_TREE = ("train.micro_batch_size:",)  # the leaves of the sum of gradients
# Runs of before there was a choice are of this kind.
_DEFAULT_BEFORE = "train.deterministic: absent in the checkpoint, 'layout' now"
_OLD_NAMES = {"nonfinite_in_a_row": "skipped_in_a_row"}
_LENGTH = ("train.steps:", "train.epochs:")
_OF_NO_CONSEQUENCE = (
    "train.out_dir:",
    "train.resume:",
    "train.log_every:",
    "train.sample_prompts:",
    "parallel:",
    "train.save_in_background:",
    "train.fault_every_s:",
    "train.sdc_check_every:",
)


@dataclass
class Progress:
    """The counters of a run, plain JSON values."""

    num_steps: int  # where the run ends; a deadline may move it
    micro_batch_size: int
    step: int = 0  # global batches seen, skipped ones included
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rewinds: int = 0  # returns to an earlier checkpoint after too many of those
    train_loss_sum: float = 0.0  # since the last evaluation
    train_loss_steps: int = 0
    evaluated_step: int = 0  # of the last evaluation
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)  # EvalRecords
    recent: dict[str, list[float]] = field(default_factory=dict)  # what spikes are measured by, see spikes.py


def capture(
    progress: Progress,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    stream: BatchStream,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    parallel: ParallelModel | None = None,
    run: str | None = None,
) -> CheckpointState:
    """Return the state of the run; its tensors are the model's and the optimizers' own, not copies.

    run: the id of the run. With a parallel model it is what this process is to write.
    """
    random_tensors, random_values = rng.capture()
    rank = 0 if parallel is None else parallel.ranks.rank
    random_values |= {"rank": rank, "digest": rng.digest()}
    named = list(model.named_parameters()) if parallel is None else parallel.named
    optimizer_tensors: dict[str, Tensor] = {}
    optimizer_values: dict[str, Any] = {}
    for optimizer in optimizers:
        name = _name(optimizer)
        tensors, optimizer_values[name] = flatten_optimizer(optimizer, named, prefix=f"{name}/")
        optimizer_tensors.update(tensors)
    is_evaluated = progress.step == progress.evaluated_step > 0
    state = CheckpointState(
        step=progress.step,
        weights=own_weights(model) if parallel is None else {},
        optimizer=optimizer_tensors,
        meta={
            "config": config.to_dict(),
            "progress": dataclasses.asdict(progress),
            "loader": stream.state_dict(),
            "optimizer": optimizer_values,
            "rng": random_values,
            "environment": environment.capture(),
        },
        rng=random_tensors,
        tokenizer=None if tokenizer is None else tokenizer.to_bytes(),
        heldout_loss=progress.curve[-1]["heldout_loss"] if is_evaluated else None,
        run=run,
    )
    if parallel is not None:
        state.places = {
            name: Place(tuple(whole), start) for name, (whole, (start, _)) in parallel.own_share(state).items()
        }
    return state


def run_id(config: RunConfig, stream: BatchStream) -> str:
    """Return the id of a run that begins: what it is made from decides it, so that the same run is the same bits."""
    values = config.to_dict()
    values["train"] = {name: value for name, value in values["train"].items() if name not in ("out_dir", "resume")}
    return xxh3_128(encode_json([values, stream.state_dict()]))[:16]


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the model: all of it, or the adapters alone if it has some."""
    return adapter_state(model) if lora_layers(model) else model.state_dict()


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put what own_weights returned back into a model of the same kind; errors as checkpoint.load_weights."""
    load_weights(model, {**base_state(model.state_dict()), **weights} if lora_layers(model) else weights)


def find_state(
    config: TrainConfig, on_message: Callable[[str], None], parallel: ParallelModel | None = None
) -> tuple[Path, CheckpointState] | None:
    """Load the checkpoint that config.resume names, None for a new run; refuse what would mix two runs.

    With a parallel model each process loads its part, all of the same checkpoint, and all must call.
    """
    if config.resume == "auto":
        if parallel is not None:
            return load_over_ranks(config.out_dir, parallel.wanted, parallel.ranks, on_skip=on_message)
        latest = load_latest(config.out_dir, on_skip=on_message)
        return None if latest is None else (config.out_dir / folder_name(latest.step), latest)
    found = None
    if config.resume != "never":
        if parallel is None:
            path = find_checkpoint(config.resume, on_message)
            found = path, load_checkpoint(path)
        else:
            found = load_over_ranks(config.resume, parallel.wanted, parallel.ranks, on_skip=on_message)
            if found is None:
                raise UserError(f"{config.resume} holds no checkpoint; name a step-... folder or a run folder")
    existing = list_checkpoints(config.out_dir)
    if existing and (found is None or (step_of(existing[0].name) or 0) > found[1].step):
        raise UserError(
            f"train.out_dir {config.out_dir} already holds {existing[0].name}, which train.resume {config.resume!r} "
            "would mix with another run; choose another out_dir, or resume 'auto' to go on from there"
        )
    return found


def restore(
    path: Path,
    state: CheckpointState,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    config: RunConfig,
    planned_steps: int,
    on_message: Callable[[str], None],
    parallel: ParallelModel | None = None,
) -> Progress:
    """Put the state into the model, the optimizers and the generators, and return its progress. The data is the
    caller's to restore, and must not draw random numbers.

    Raises UserError if settings changed on which the state depends. Those that may change take effect, and are said.
    """
    changed = differing_fields(state.meta["config"], config.to_dict())
    changed = [line for line in changed if line != _DEFAULT_BEFORE]
    fixed = _FIXED + (_FIXED_IN_TREE if config.train.deterministic == "elastic" else ())
    fatal = [line for line in changed if line.startswith(fixed)]
    if fatal:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(fatal)}); set them back, or choose another out_dir"
        )
    if parallel is None:
        named = list(model.named_parameters())
        restore_weights(model, state.weights)
    else:
        named = parallel.named
        with torch.device("meta"):
            refuse_other_shapes(Transformer(config.model), state.shapes)
        for counts in parallel.ranks.exchange(count_nonfinite(state.weights)):
            refuse_nonfinite(counts)
        parallel.take_up(state)
    for optimizer in optimizers:
        configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        name = _name(optimizer)
        values = state.meta["optimizer"][name]
        restore_optimizer(optimizer, state.optimizer, values, named, prefix=f"{name}/")
        for group, options in zip(optimizer.param_groups, configured, strict=True):
            group.update(options)
    progress = Progress(**{_OLD_NAMES.get(name, name): value for name, value in state.meta["progress"].items()})
    progress.micro_batch_size = config.train.micro_batch_size or progress.micro_batch_size
    if any(line.startswith(_LENGTH) for line in changed):
        progress.num_steps = planned_steps
    on_message(f"Going on from step {state.step:,}.")
    for line in changed:
        if not line.startswith(_OF_NO_CONSEQUENCE):
            on_message(f"Changed since then: {line}.")
    warnings = [environment.warning(state.meta["environment"]), *rng.restore(state.rng, state.meta["rng"])]
    warnings += _check_random_states(path, state, parallel)
    for warning in filter(None, warnings):
        on_message(warning)
    return progress


def _check_random_states(path: Path, state: CheckpointState, parallel: ParallelModel | None) -> list[str]:
    """Raise UserError unless every process has the random states that it saved; say so where it never had any."""
    saved = state.meta.get("rng_of_ranks", [state.meta["rng"]])
    rank, size = (0, 1) if parallel is None else (parallel.ranks.rank, parallel.ranks.size)
    is_right = rank >= len(saved) or saved[rank].get("digest") in (None, rng.digest())
    everywhere = [is_right] if parallel is None else parallel.ranks.exchange(is_right)
    if not all(everywhere):
        raise UserError(
            f"process {everywhere.index(False)} did not get back the random states that it saved in {path}; "
            "go on from another checkpoint of the run"
        )
    if len(saved) == size or state.meta["config"]["train"].get("deterministic") == "elastic":  # dropout has other seeds
        return []
    return [
        f"the checkpoint has random states of {len(saved)} processes and there are {size} here: dropout does not go on "
        "bit for bit"
    ]


def rewind(
    progress: Progress,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    config: RunConfig,
    planned_steps: int,
    on_message: Callable[[str], None],
    parallel: ParallelModel | None = None,
    *,
    why: str,
) -> None:
    """Take weights, optimizers and random states from a checkpoint before the last steps, which were skipped; the data
    goes on after them. Each rewind of a run goes back one checkpoint more. why: what the last of them was skipped for.

    Raises UserError if there is none, or after train.max_rewinds.
    """
    train, bad = config.train, progress.skipped_in_a_row
    existing = list_checkpoints(train.out_dir)
    before = [path for path in existing if (step_of(path.name) or 0) <= progress.step - bad]
    if not before or progress.rewinds >= train.max_rewinds:
        raise UserError(
            f"{bad} steps in a row were skipped, and the last of them, {progress.step}, {why}, after "
            f"{progress.rewinds} returns to an earlier checkpoint; lower optimizer.lr (now {config.optimizer.lr:g}) or "
            f"look at the data, and go on from {existing[0] if existing else 'the start: there is no checkpoint yet'}"
        )
    path = before[min(progress.rewinds, len(before) - 1)]
    on_message(
        f"{bad} steps in a row were skipped, and the last of them, {progress.step}, {why}: taking the weights of "
        f"{path.name}, and leaving out the batches since."
    )
    if parallel is None:
        state = load_checkpoint(path)
    else:
        loaded = load_over_ranks(path, parallel.wanted, parallel.ranks, on_skip=on_message)
        assert loaded is not None  # a checkpoint that is named is loaded, or an error
        state = loaded[1]
    then = restore(path, state, model, optimizers, config, planned_steps, lambda text: None, parallel)
    # The updates since then are undone, so the schedule goes back over them; steps count batches, and go on.
    progress.skipped_steps = progress.step - (then.step - then.skipped_steps)
    progress.skipped_in_a_row = 0
    progress.rewinds += 1
    progress.train_loss_sum, progress.train_loss_steps = 0.0, 0


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__.lower()
