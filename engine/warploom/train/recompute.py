"""train.grad_checkpointing: what each block keeps for the backward pass. "budget" measures what each product of a block
costs on this machine and what it holds, and gives up the cheapest seconds per byte until the run fits."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.errors import UserError
from warploom.models.recompute import NOTHING, PRODUCTS, Kept, Recomputable, keep, recomputable_blocks
from warploom.models.transformer import Transformer
from warploom.train.config import RunConfig
from warploom.train.estimate import KEPT, Estimate, estimate

_REPEATS = 3


@dataclass(frozen=True)
class Level:
    """One way to run the blocks of a stack."""

    kept: Kept | None
    again_s: float  # that one block adds to a forward and backward pass
    block_bytes: float  # that one block keeps


@dataclass(frozen=True)
class Fit:
    """What blocks keep so that a training step stays within some memory."""

    kept: tuple[Kept | None, ...]  # per block
    peak_bytes: int
    slowdown: float  # predicted: seconds added to a forward and backward pass, over those without checkpointing

    def __str__(self) -> str:
        everything = sum(kept is None for kept in self.kept)
        nothing = sum(kept == NOTHING for kept in self.kept)
        return (
            f"Of {len(self.kept)} blocks {everything} keep all activations, {nothing} none, "
            f"{len(self.kept) - everything - nothing} some products: {self.peak_bytes / 1e9:.2f} GB at the peak, and "
            f"{self.slowdown:.0%} more time for the passes, by measurement."
        )


def set_kept(
    model: Transformer, config: RunConfig, loss_sum: Callable[..., Tensor], inputs: Callable[[], Mapping[str, Any]]
) -> Fit | None:
    """Let the blocks of model keep what config.train.grad_checkpointing says; for "budget" see fit.

    inputs() gives a micro batch for it.
    """
    train = config.train
    if train.grad_checkpointing != "budget":
        keep(model, KEPT[train.grad_checkpointing], train.grad_checkpointing_every)
        return None
    batch = inputs()
    cost = functools.partial(
        estimate,
        config.model,
        seq_len=batch["tokens"].shape[1],
        micro_batch_size=train.micro_batch_size,
        dtype=model.compute_dtype,
        optimizer=config.optimizer,
        num_micro_batches=train.global_batch_size // train.micro_batch_size,
        device=batch["tokens"].device.type,
    )
    return fit(model, loss_sum, batch, lambda kept: cost(kept=kept), train.memory_gb * 1e9)


Cost = Callable[[Sequence["Kept | None"]], Estimate]
"""The estimate of a training step in which each block keeps that."""


def fit(
    model: Transformer,
    loss_sum: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    cost: Cost,
    room_bytes: float,
) -> Fit:
    """Let the blocks of model keep what costs the least time within room_bytes, and say what that is.

    loss_sum(**inputs) is the loss of a micro batch. Random states are as before; gradients are cleared.
    Raises UserError if keeping nothing is still too much.
    """
    blocks = recomputable_blocks(model)
    least = cost([NOTHING] * len(blocks)).peak_bytes
    if least > room_bytes:
        raise UserError(
            f"train.memory_gb is {room_bytes / 1e9:g}, and with every block recomputed the run still takes "
            f"{least / 1e9:.2f} GB; give that much, or a smaller train.micro_batch_size or model"
        )
    device = model.output_weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        stacks = measure_stacks(model, loss_sum, inputs, cost)
        passes_s = _fastest_s(lambda: _pass(model, loss_sum, inputs), device)
    passes_s -= sum(len(stack.blocks) * stack.forward_s for stack in stacks)  # which they made twice
    kept = _fewest(_descent(stacks), cost, room_bytes)
    for block, choice in zip(blocks, kept, strict=True):
        block.kept = choice
    return Fit(tuple(kept), cost(kept).peak_bytes, added_s(stacks) / passes_s)


@dataclass(frozen=True)
class MeasuredStack:
    """The blocks of one stack, and the time that one of them takes."""

    blocks: Sequence[Recomputable]
    forward_s: float
    dispatched_s: float  # forward, with each operator going through Python, as happens where outputs are kept
    products: Mapping[str, tuple[float, int]]  # seconds and output bytes, by key of models.recompute
    levels: Sequence[Level]  # from the most bytes to the fewest

    def again_s(self, kept: Kept | None) -> float:
        """Seconds that one block adds to a forward and backward pass if it keeps that."""
        if kept is None:
            return 0.0
        if not kept:
            return self.forward_s
        saved_s = sum(s for key, (s, _) in self.products.items() if key in kept or key.partition("#")[0] in kept)
        # Both passes are dispatched, the first one too.
        return max(0.0, 2 * self.dispatched_s - self.forward_s - saved_s)


def added_s(stacks: Sequence[MeasuredStack]) -> float:
    """Seconds that recomputation adds to a forward and backward pass, with what the blocks keep now."""
    return sum(stack.again_s(block.kept) for stack in stacks for block in stack.blocks)


def measure_stacks(
    model: Transformer, loss_sum: Callable[..., Tensor], inputs: Mapping[str, Any], cost: Cost
) -> list[MeasuredStack]:
    """Time a block of each stack, and find the ways to run it.

    Besides all and nothing it can keep some products, given up one by one, the least seconds per byte first.
    """
    blocks = recomputable_blocks(model)
    found = []
    for part in filter(None, (model.encoder, model.stack)):
        members = recomputable_blocks(part)
        block = members[-1]
        stack = MeasuredStack(members, *_profile(block, _arguments_of(block, loss_sum, inputs)), levels=())
        names = sorted(stack.products, key=lambda key: stack.products[key][0] / max(1, stack.products[key][1]))
        levels = []
        for kept in (None, *(frozenset(names[first:]) for first in range(len(names) + 1))):
            per_block = [kept if any(one is member for member in members) else None for one in blocks]
            block_bytes = cost(per_block).activations_bytes / len(members)
            levels.append(Level(kept, stack.again_s(kept), block_bytes))
        found.append(dataclasses.replace(stack, levels=hull(levels)))
    return found


def hull(levels: Sequence[Level]) -> list[Level]:
    """The lower convex hull of seconds over bytes, from the most bytes to the fewest."""
    on_hull: list[Level] = []
    for level in sorted(levels, key=lambda level: (-level.block_bytes, level.again_s)):
        while len(on_hull) > 1 and _price(on_hull[-2], on_hull[-1]) >= _price(on_hull[-2], level):
            on_hull.pop()
        if not on_hull or level.block_bytes < on_hull[-1].block_bytes:
            on_hull.append(level)
    return on_hull


def _price(before: Level, after: Level) -> float:
    """Seconds per byte given up."""
    freed = before.block_bytes - after.block_bytes
    return (after.again_s - before.again_s) / freed if freed > 0 else math.inf


def _descent(stacks: Sequence[MeasuredStack]) -> list[list[Kept | None]]:
    """What each block keeps, for ever less memory: one block at a time goes down one level, the cheapest first, and
    earlier blocks before later ones, since their activations live the longest."""
    now: list[Kept | None] = []
    moves = []
    for stack in stacks:
        for before, after in zip(stack.levels, stack.levels[1:], strict=False):
            price = _price(before, after)
            moves += [(price, len(now) + index, after.kept) for index in range(len(stack.blocks))]
        now += [stack.levels[0].kept] * len(stack.blocks)
    found = [list(now)]
    for _, index, kept in sorted(moves, key=lambda move: move[:2]):
        now[index] = kept
        found.append(list(now))
    return found


def _fewest(steps: Sequence[list[Kept | None]], cost: Cost, room_bytes: float) -> list[Kept | None]:
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if cost(steps[middle]).peak_bytes <= room_bytes:
            high = middle
        else:
            low = middle + 1
    return steps[low]


def _arguments_of(block: Recomputable, loss_sum: Callable[..., Tensor], inputs: Mapping[str, Any]) -> tuple:
    """What block is called with in a forward pass, as leaves that want gradients."""
    found: list[tuple] = []
    handle = block.register_forward_pre_hook(lambda module, arguments: found.append(arguments))
    try:
        with torch.no_grad():
            loss_sum(**inputs)
    finally:
        handle.remove()
    x, stream, context = found[0]
    if context.memory is not None:
        context = dataclasses.replace(context, memory=context.memory.detach().requires_grad_())
    return x.detach().requires_grad_(), None if stream is None else stream.detach().requires_grad_(), context


def _profile(block: Recomputable, arguments: tuple) -> tuple[float, float, dict[str, tuple[float, int]]]:
    """Return the seconds of the block's forward pass, alone and under a dispatch mode, and per product the seconds and
    the bytes of its output."""
    device = arguments[0].device
    plain_s = _fastest_s(lambda: block(*arguments), device)
    products: dict[str, tuple[float, int]] = {}
    counted_s = math.inf
    for _ in range(_REPEATS):
        with _Timing(device) as timing:
            counted_s = min(counted_s, _seconds(lambda: block(*arguments), device))
        for name, (seconds, size) in timing.products.items():
            products[name] = (min(seconds, products.get(name, (math.inf, 0))[0]), size)
    return plain_s, counted_s, products


class _Timing(TorchDispatchMode):
    """Seconds and output bytes of each call of the products, by their keys of models.recompute."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.products: dict[str, tuple[float, int]] = {}
        self._device = device
        self._calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        output, seconds = None, 0.0

        def call() -> None:
            nonlocal output
            output = func(*args, **(kwargs or {}))

        seconds = _seconds(call, self._device)
        tensors = (output,) if isinstance(output, Tensor) else output or ()
        self.products[f"{name}#{self._calls[name]}"] = seconds, sum(tensor.nbytes for tensor in tensors)
        self._calls[name] += 1
        return output


def _pass(model: Transformer, loss_sum: Callable[..., Tensor], inputs: Mapping[str, Any]) -> None:
    """A forward and backward pass that keeps the least."""
    keep(model, NOTHING)
    loss_sum(**inputs).backward()
    for parameter in model.parameters():
        parameter.grad = None


def _fastest_s(call: Callable[[], object], device: torch.device) -> float:
    return min(_seconds(call, device) for _ in range(_REPEATS))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else _no_wait
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def _no_wait() -> None:
    pass
