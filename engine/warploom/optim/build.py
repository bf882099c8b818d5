"""Which optimizer takes which parameter: AdamW takes all, or Muon the hidden matrices and AdamW the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from warploom.errors import UserError
from warploom.ops.linear import PackedWeight
from warploom.optim import offload
from warploom.optim.adamw import AdamW
from warploom.optim.muon import MatrixExchange, Muon


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "muon"
    """muon for the hidden matrices and adamw for embeddings, norms and biases, or adamw for every parameter."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment, per step."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the hidden matrices, times the learning rate, per step; the rest never decays."""
    muon_lr: float = 0.01
    """Peak learning rate of Muon; its updates have AdamW's usual size whatever the matrix's shape."""
    momentum: float = 0.95
    """Momentum of Muon, per step."""
    offload: bool = False
    """Keep the moments in the host's memory; those of one parameter at a time visit the GPU in each update."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps"):
            if not 0 < getattr(self, name) < 10:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; give a number above 0 and below 10")
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; give 0 or more")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name} holds {value}; give fractions from 0 to below 1")


def build_optimizers(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    muon_dtype: torch.dtype = torch.float32,
    packed: Mapping[Tensor, PackedWeight] | None = None,
    exchange: MatrixExchange | None = None,
) -> list[AdamW | Muon]:
    """Return the optimizers that together hold every trainable parameter of model once, AdamW as the last.

    Hidden matrices are the parameters of two dimensions that belong to no embedding and not to the output layer.
    Each group keeps its peak learning rate under "peak_lr". muon_dtype is the dtype of Muon's matrix products.
    packed: what nn.linear.keep_packed returned for model; AdamW then writes it in its own pass.
    exchange: for matrices that lie in parts on several processes.
    """
    hidden = _hidden_matrices(model)
    is_hidden = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in is_hidden]
    no_decay = {"params": rest, "weight_decay": 0.0}

    adamw_kind, muon_kind = (offload.AdamW, offload.Muon) if config.offload else (AdamW, Muon)

    def adamw(groups: list[dict]) -> AdamW:
        optimizer = adamw_kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        optimizer.pack_into(packed or {})
        return optimizer

    optimizers: list[AdamW | Muon]
    if config.name == "muon" and hidden:  # none is left where all of them are frozen
        muon = muon_kind(
            hidden,
            lr=config.muon_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            dtype=muon_dtype,
            exchange=exchange,
        )
        optimizers = [muon, adamw([no_decay])]
    else:
        optimizers = [adamw([{"params": hidden, "weight_decay": config.weight_decay}, no_decay])]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables.update(id(getattr(m, "output_weight", None)) for m in model.modules())
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in tables]
