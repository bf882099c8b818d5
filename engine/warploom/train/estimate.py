"""What a run will cost, from its configuration alone: parameters, FLOPs per token, bytes of memory. For --dry-run and
for --budget; nothing is allocated.

The memory count follows what the modules keep for the backward pass (nn/, models/blocks.py and the ops they call); it
was within 11 % of the measured peak of the tensors for every configuration of tests/train/test_estimate.py. The
resident set of a process on a CPU is larger, since malloc keeps freed blocks: up to twice as large in those cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.ops.linear_cross_entropy import CHUNK_ELEMENTS
from warploom.optim import OptimizerConfig

_MASTER_BYTES = 4  # weights, gradients and optimizer moments are float32 whatever the compute dtype


@dataclass(frozen=True)
class Estimate:
    """Cost of one configuration. Bytes are those of tensors at the peak of a step, without the process itself."""

    num_parameters: int
    flops_per_token: int  # forward and backward
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int  # kept for the backward pass, at its beginning
    logits_bytes: int  # the logits held at once, and the gradients that linear_cross_entropy makes beside them

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
        )


def estimate(
    config: TransformerConfig,
    *,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
    grad_checkpointing: bool = False,
) -> Estimate:
    """Reckon the cost of training `config` on micro batches of (micro_batch_size, seq_len) tokens in `dtype`.

    For an encoder-decoder the source is taken to be as long as the target.
    """
    with torch.device("meta"):
        model = Transformer(config)
    num_parameters = model.num_parameters()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name)
    rows = micro_batch_size * seq_len
    width = dtype.itemsize
    stacks = [(config.num_layers, config.architecture == "encoder-decoder")]
    if config.architecture == "encoder-decoder":
        stacks.append((config.encoder_layers, False))
    logits = _loss_bytes(config, rows, dtype)
    # Gradients that flow through one block of the backward pass: of the wide layer and of its input.
    flowing = rows * (2 * config.ff_width + 2 * config.d_model) * width
    activations = 0
    inner = 0  # the largest block's
    for layers, has_cross in stacks:
        block = rows * _block_bytes_per_token(config, width, has_cross)
        stream = rows * config.d_model * width
        # Recomputation keeps each block's inputs, and one block's inner tensors at a time.
        activations += layers * (2 * stream if grad_checkpointing else block)
        activations += 3 * stream  # embedding output, last residual sum, final norm
        inner = max(inner, block)
    # Recomputed inner tensors come when those of the loss are gone; without recomputation both are there.
    activations += max(inner + flowing - logits, 0) if grad_checkpointing else flowing
    if dtype != torch.float32:
        activations += 2 * matrices * width  # kept packed, for the forward and for the backward

    moments = 2 * num_parameters - (matrices if optimizer.name == "muon" else 0)
    return Estimate(
        num_parameters=num_parameters,
        flops_per_token=model.flops_per_token(seq_len),
        weights_bytes=num_parameters * _MASTER_BYTES,
        gradients_bytes=num_parameters * _MASTER_BYTES,
        optimizer_bytes=moments * _MASTER_BYTES,
        activations_bytes=activations,
        logits_bytes=logits,
    )


def _loss_bytes(config: TransformerConfig, rows: int, dtype: torch.dtype) -> int:
    """Bytes that linear_cross_entropy takes for `rows` tokens: logits, the gradients of its input and of its weight."""
    gradients = rows * config.d_model * dtype.itemsize + config.vocab_size * config.d_model * _MASTER_BYTES
    if dtype == torch.float32:
        return min(CHUNK_ELEMENTS, rows * config.vocab_size) * dtype.itemsize + gradients
    words = min(config.vocab_size, max(512, min(2048, CHUNK_ELEMENTS // rows)))
    return rows * words * dtype.itemsize + rows * config.d_model * _MASTER_BYTES + gradients


def _block_bytes_per_token(config: TransformerConfig, width: int, has_cross: bool) -> int:
    """Bytes that one block keeps for its backward pass, per token, at `width` bytes per element."""
    heads = config.num_heads * config.head_width
    kv = config.kv_heads * config.head_width
    C, F = config.d_model, config.ff_width
    dropout = C if config.dropout else 0  # a mask of one byte per element
    norm = 2 * C * width + 8  # the sum that was normalised, and the result that feeds the projections; mean and rstd
    attention = (2 * heads + 2 * kv) * width + 4 * config.num_heads  # q, k, v, o; log-sum-exp
    feed_forward = {
        "relu": F,
        "relu2": 2 * F,  # before and after the square
        "gelu": 2 * F,  # before and after the function
        "gelu_tanh": 2 * F,
        "silu": 2 * F,
        "swiglu": 4 * F,  # gate, up, silu(gate), product
        "geglu": 4 * F,
    }[config.activation] * width
    sub_layers = 2 * (norm + dropout) + attention + feed_forward
    if has_cross:
        sub_layers += norm + dropout + attention
    return sub_layers
