"""A model over the processes of a mesh: every dimension, in the one order that is right, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from warploom.models.transformer import Transformer
from warploom.ops import grad_norm
from warploom.optim.parts import local_part
from warploom.parallel import heartbeat
from warploom.parallel.checksums import CrossCheck
from warploom.parallel.context import apply_context, take_context
from warploom.parallel.mesh import Mesh
from warploom.parallel.muon import PartedMatrices
from warploom.parallel.pipeline import Pipeline, sum_copies
from warploom.parallel.replicas import Buckets, begin_all_reduce
from warploom.parallel.rows import Inputs, micro_batches
from warploom.parallel.shard import Part, apply_shard, part_at
from warploom.parallel.state import Box, Ranks, State, all_json, own_share, take_up, wanted
from warploom.parallel.tensor import Slices, TensorPlan, apply_tensor


@dataclass(frozen=True)
class Parallelize:
    """What spreads a model over the processes of a mesh, once it is known how many rows they take at a time."""

    mesh: Mesh

    def __call__(self, model: Transformer, micro_batch_size: int, *, sums_gradients: bool = True) -> ParallelModel:
        return ParallelModel(model, self.mesh, micro_batch_size, sums_gradients=sums_gradients)


class ParallelModel:
    """What is on this process of a model that all processes built alike.

    model is taken apart, and must not be used otherwise from here on. module: what is here of it. keeps_weights:
    whether its weights stay in memory between passes, where those that are sharded are gathered for each.
    micro_batch_size: rows of one forward pass. sums_gradients: without, replicas stay plain models, whose gradients
    someone else sums (tree.py).
    """

    def __init__(self, model: Transformer, mesh: Mesh, micro_batch_size: int, *, sums_gradients: bool = True) -> None:
        self.mesh, self._model, self._micro_batch_size = mesh, model, micro_batch_size
        self.flags: Callable[[], Sequence[bool]] = tuple
        """What this process has to say in each step; totals takes it along."""
        self._raised: Tensor | None = None
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        axis = mesh.axis
        # Stages take out whole blocks, so they come first. To what follows each is a model of its own.
        self._pipeline = Pipeline(model, mesh.config, mesh) if axis["pipeline"].size > 1 else None
        parts: list[nn.Module] = [model] if self._pipeline is None else list(self._pipeline.stages.values())
        models = [part for each in parts for part in each.modules() if isinstance(part, Transformer)]
        # Tensor parallelism cuts whole parameters, and finds the layers as the model has them.
        self._tensor = TensorPlan({}, frozenset())
        if axis["tensor"].size > 1:
            for each in models:
                self._tensor |= apply_tensor(each, axis["tensor"])
            # How the parameters of other stages are cut is for the whole of them to be put together.
            for said in all_json({name: (cut.dim, cut.sizes) for name, cut in self._tensor.slices.items()}):
                others = {name: Slices(dim, tuple(sizes)) for name, (dim, sizes) in said.items()}
                self._tensor |= TensorPlan(others, frozenset())
        # The context's exchange of heads is of those that tensor parallelism leaves here.
        if axis["context"].size > 1:
            for each in models:
                apply_context(each, axis["context"])
        # Sharding takes parameters as it finds them, so nothing may cut them afterwards.
        self.keeps_weights = axis["fsdp"].size == 1
        if not self.keeps_weights:
            for part in parts:
                apply_shard(part, mesh, reshard=self._pipeline is None)
        self.module: nn.Module = model if self._pipeline is None else nn.ModuleList(parts)
        self.named = [pair for each in models for pair in each.named_parameters() if pair[1].requires_grad]
        self.names = frozenset(name for name, _ in self.named)
        # Along the tensor axis every process has the whole loss.
        self._counts_once = axis["tensor"].index == 0
        self.parameters = [parameter for _, parameter in self.named]
        self._replicas = None
        if sums_gradients and self.keeps_weights and axis["data"].size > 1:
            self._replicas = Buckets(self.parameters, functools.partial(begin_all_reduce, axis=axis["data"]))
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._replicas.arrived)
        self._partial = [parameter for name, parameter in self.named if name in self._tensor.partial]
        self._tied = self._copies_of_stages()
        self.matrices = PartedMatrices(mesh, {p: (self.shapes[n], self._tensor.slices.get(n)) for n, p in self.named})

    def loss_sum(self, tokens: Tensor, targets: Tensor, **inputs: Tensor) -> Tensor:
        """As Transformer.loss, of the rows that these processes take together."""
        if self.keeps_weights and not self._tensor.slices:
            return self._model.loss(tokens, targets, reduction="sum", **inputs)
        return self._model.loss_of(self._model(tokens, **inputs), targets, "sum")

    def accumulate(self, loss_sum: Callable[..., Tensor], batches: list[Inputs], num_targets: int) -> Tensor:
        """Leave in .grad this process's part of the gradients of the whole batches' loss, summed over their targets
        and divided by num_targets. Return what this process has seen of that loss.

        The gradients are exchanged once, with the last micro batch.
        """
        micro = [part for batch in batches for part in self._micro_batches(batch)]
        if self._pipeline is not None:
            heartbeat.report(part="forward and backward")
            loss = self._pipeline.run(micro, num_targets)
        else:
            loss = torch.zeros((), device=micro[0]["tokens"].device)
            for index, inputs in enumerate(micro):
                if isinstance(self.module, FSDPModule):
                    self.module.set_requires_gradient_sync(index == len(micro) - 1)
                heartbeat.report(part="forward")
                micro_loss = loss_sum(**inputs) / num_targets
                heartbeat.report(part="backward")
                if self._replicas is not None and index == len(micro) - 1:
                    self._replicas.start()
                micro_loss.backward()
                loss += micro_loss.detach()
        heartbeat.report(part="exchange")
        if self._replicas is not None:
            self._replicas.finish()
        self._sum_partial()
        sum_copies(self.named, self._tied, self.mesh.axis["pipeline"])
        return loss

    def totals(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient's norm over all processes, float64, the same bits on each.

        The flags of all processes go the same way, which spares each step another collective; see take_raised.
        """
        axis = self.mesh.axis
        # What several processes have count once: copies of stages, the whole along the tensor axis, and replicas.
        slices = self._tensor.slices
        counted = {p for name, p in self._first_copies() if name in slices or axis["tensor"].index == 0}
        grads = {p: local_part(p.grad) for p in self.parameters if p.grad is not None}
        norm = grad_norm([grad for p, grad in grads.items() if p in counted]).double()
        # The rest is not counted, but if it is not finite here alone, that is to be known everywhere: 0 * inf is nan.
        rest = 0.0 * grad_norm([grad for p, grad in grads.items() if p not in counted]).double()
        totals = torch.stack(
            (
                loss.double() * self._counts_once,
                norm.square() * (axis["data"].index == 0) + rest,
            )
        )
        flags = torch.tensor(self.flags(), dtype=totals.dtype)
        totals = torch.cat((totals, flags.to(totals.device)))
        dist.all_reduce(totals)
        self._raised = totals[2:]
        heartbeat.report(part="update")
        return totals[0], totals[1].sqrt()

    def take_raised(self) -> list[bool] | None:
        """Return for each flag whether one of the processes raised it in the step before; once, None afterwards."""
        raised, self._raised = self._raised, None
        return None if raised is None else [count > 0 for count in raised.tolist()]

    @torch.no_grad()
    def heldout_loss_sum(self, **inputs: Tensor) -> Tensor:
        """Return the summed loss of a whole batch, whose rows the processes share: the same on each."""
        micro = list(self._micro_batches(inputs))
        if self._pipeline is not None:
            total = self._pipeline.heldout_loss(micro) * self._counts_once
        else:
            total = torch.stack([self.loss_sum(**part) for part in micro]).double().sum() * self._counts_once
        dist.all_reduce(total)
        return total

    def part(self, name: str) -> Part:
        """Return which part of a parameter lies on this process."""
        axis = self.mesh.axis
        return self._part_at(name, axis["tensor"].index, axis["fsdp"].index)

    def holders(self, name: str, replica: int = 0) -> list[tuple[int, Part]]:
        """Return the ranks of a replica whose parts make up the parameter, each part once, and which these are."""
        axis = self.mesh.axis
        tensors = range(axis["tensor"].size if name in self._tensor.slices else 1)
        pipeline = 0
        if self._pipeline is not None:
            pipeline = self._pipeline.plan.stages_of(name)[0] % axis["pipeline"].size
        rank_at = functools.partial(self.mesh.rank_at, pipeline=pipeline, data=replica)
        return [
            (rank_at(fsdp=fsdp, tensor=tensor), self._part_at(name, tensor, fsdp))
            for fsdp in range(axis["fsdp"].size)
            for tensor in tensors
        ]

    def _part_at(self, name: str, tensor: int, fsdp: int) -> Part:
        slices = self._tensor.slices.get(name)
        return part_at(self.shapes[name], slices, tensor, (fsdp, self.mesh.axis["fsdp"].size))

    @functools.cached_property
    def ranks(self) -> Ranks:
        """The processes as a checkpoint needs them. All must ask for it first at the same time."""
        return Ranks(self)

    @functools.cached_property
    def cross_check(self) -> CrossCheck:
        return CrossCheck(self.mesh, all_json)

    def own_share(self, state: State) -> dict[str, tuple[torch.Size, Box]]:
        return own_share(self, state)

    def wanted(self, kind: str, name: str, shape: tuple[int, ...]) -> Box | None:
        return wanted(self, kind, name, shape)

    def take_up(self, state: State) -> None:
        take_up(self, state)

    def any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether one of the processes raises it. All must ask at the same time."""
        values = torch.tensor(flags, dtype=torch.int64, device=self.mesh.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def _micro_batches(self, batch: Inputs) -> Iterator[Inputs]:
        axis = self.mesh.axis["context"]
        parts = micro_batches(
            batch,
            self.mesh.num_parts,
            self.mesh.part,
            self._micro_batch_size,
            same_size=self._pipeline is not None,
            number=None if self._pipeline is None else self._pipeline.num_micro_batches,
        )
        return (take_context(part, axis) if axis.size > 1 else part for part in parts)

    def _first_copies(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters, without those that an earlier stage has a copy of."""
        if self._pipeline is None:
            yield from self.named
            return
        seen: set[str] = set()
        for name, parameter in self.named:
            here = self._pipeline.plan.stages_of(name)[0] in self._pipeline.stages
            if here and name not in seen:
                yield name, parameter
            seen.add(name)

    def _copies_of_stages(self) -> dict[str, Tensor]:
        """A tensor like this process's part of each parameter that several stages have."""
        if self._pipeline is None:
            return {}
        like = local_part(self.parameters[0].detach())
        names = [name for name in self.shapes if len(self._pipeline.plan.stages_of(name)) > 1]
        return {name: like.new_empty(self.part(name).shape) for name in names}

    def _sum_partial(self) -> None:
        """Sum over the tensor axis the gradients of what was applied to parts of the sequence."""
        grads = [local_part(p.grad) for p in self._partial if p.grad is not None]
        if grads:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self.mesh.axis["tensor"].group)
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view(grad.shape))
