"""What a run will cost, from its configuration alone: parameters, FLOPs per token, bytes of memory. For --dry-run, for
--budget and for plans.

Memory is not reckoned by formulas: the training step itself runs, on torch's meta device, where tensors have shapes
but no memory, and a ledger follows what lives when. So whatever the model, its checkpointing and its optimizer do is in
the estimate. Only what ops take inside themselves is invisible there, and for the loss, where it is large, reckoned.
tests/train/test_estimate.py holds the result to 5 % of the measured peak of tensors.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from warploom.models.config import TransformerConfig
from warploom.models.recompute import NOTHING, PRODUCTS, Kept, keep, recomputable_blocks
from warploom.models.transformer import Transformer
from warploom.ops.linear_cross_entropy import CHUNK_ELEMENTS, CHUNK_ROWS
from warploom.optim import OptimizerConfig, build_optimizers

KEPT: Mapping[str, Kept | None] = {"none": None, "blocks": NOTHING, "ops": PRODUCTS}  # by train.grad_checkpointing


@dataclass(frozen=True)
class Estimate:
    """Cost of one configuration. Bytes are those of tensors, without the process itself and the kernels' scratch."""

    num_parameters: int
    flops_per_token: int  # forward and backward
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    packed_bytes: int  # weights as CPU products read them, kept between products
    activations_bytes: int  # kept for the backward pass, at its beginning
    peak_bytes: int
    """The most at one time. Less than all parts together: activations go as gradients come. More than weights,
    gradients and optimizer by what lives for an op or two: logits, gradients that flow, the update."""


def estimate(
    config: TransformerConfig,
    *,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
    grad_checkpointing: str = "none",
    grad_checkpointing_every: int = 1,
    kept: Sequence[Kept | None] | None = None,
    num_micro_batches: int = 2,
    device: str = "cpu",
) -> Estimate:
    """Follow the memory of training `config` on micro batches of (micro_batch_size, seq_len) tokens in `dtype`.

    grad_checkpointing: a key of KEPT; or kept: what each block keeps (models.recompute). num_micro_batches: per update;
    with one, no gradient is there before its block's backward pass. device: "cpu" or "cuda", whose ops differ.
    For an encoder-decoder the source is taken to be as long as the target. Dropout's masks are counted as on a CPU,
    where they have the activations' dtype. Takes 0.1 s for the largest models.
    """
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
    model.compute_dtype = dtype
    keep(model, KEPT[grad_checkpointing], grad_checkpointing_every)
    for block, choice in zip(recomputable_blocks(model), kept or (), strict=bool(kept)):
        block.kept = choice
    parameters = list(model.parameters())
    weights = sum(p.nbytes for p in parameters)
    packed = _packed_bytes(model, dtype, device)
    inputs = {"source": tokens} if config.architecture == "encoder-decoder" else {}
    is_away = optimizer.offload and device != "cpu"
    optimizers = build_optimizers(model, dataclasses.replace(optimizer, offload=False), muon_dtype=dtype)

    ledger = Ledger(parameters, device)
    with ledger:
        # State that the first step makes is there from the second on, where the peak is.
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        for one in optimizers:
            one.step()
        state = ledger.live_bytes - 2 * weights
        if is_away:
            state = 0
            for one in optimizers:
                one.state.clear()
        ledger.peak_bytes = 0
        for index in range(min(2, num_micro_batches)):
            if index == 0:
                for parameter in parameters:
                    parameter.grad = None
            before = ledger.live_bytes
            loss = model.loss(tokens, tokens, reduction="sum", **inputs)
            activations = ledger.live_bytes - before
            loss.backward()
            del loss
        if is_away:  # the moments of one parameter at a time come
            largest = max(p.nbytes for p in parameters)
            ledger.peak_bytes = max(ledger.peak_bytes, ledger.live_bytes + 2 * largest)
        else:
            for one in optimizers:
                one.step()
    return Estimate(
        num_parameters=model.num_parameters(),
        flops_per_token=model.flops_per_token(seq_len),
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_bytes=state,
        packed_bytes=packed,
        activations_bytes=activations,
        peak_bytes=ledger.peak_bytes + packed,
    )


class Ledger(TorchDispatchMode):
    """Within the block: the bytes of storages that operators have made, or that tensors given at first have, now and
    at the most. It holds no tensor itself."""

    def __init__(self, tensors: Sequence[Tensor] = (), device: str = "cpu") -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._device = device
        self._sizes: dict[int, int] = {}
        self._add(tensors)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._add(tree_leaves(output))
        inner = _inner_bytes(func.name(), args, self._device)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + inner)
        return output

    def _add(self, values: Sequence[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata  # of the storage in C++, which views share and Python's objects come and go for
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _inner_bytes(name: str, args: tuple, device: str) -> int:
    """Bytes that an operator takes and gives back before it returns, where they are many."""
    if name == "warploom::linear_cross_entropy_fwd":
        hidden, weight = args[:2]
        gradients_are_made = args[4] or args[5]
    elif name == "warploom::linear_cross_entropy_bwd":
        _, hidden, weight = args[:3]
        gradients_are_made = True
    else:
        return 0
    half = hidden.dtype != torch.float32
    if device == "cpu" and (half or not gradients_are_made):
        return 0  # a kernel of ours, which keeps some words of some rows in its scratch
    V, C = weight.shape
    rows = hidden.numel() // C
    chunk = min(rows, max(CHUNK_ELEMENTS // V, CHUNK_ROWS)) * V
    # A chunk of logits, the temporary of logsumexp (a CPU kernel needs none), and hidden without its ignored rows.
    inner = (1 if device == "cpu" else 2) * chunk * 4 + hidden.nbytes
    if half:
        # The products themselves, the rounded weight, and the part of its gradient that one chunk makes.
        inner += (chunk + (2 if gradients_are_made else 1) * V * C) * hidden.dtype.itemsize
    return inner


def _packed_bytes(model: Transformer, dtype: torch.dtype, device: str) -> int:
    """What nn.linear.keep_packed keeps: CPU products of 16-bit types read weights packed."""
    if device != "cpu" or dtype == torch.float32:
        return 0
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
    return sum(weight.numel() for weight in matrices) * dtype.itemsize
