"""Pipeline parallelism: the blocks of a model over the processes of one axis, run by torch's schedules.

A stage is the model with its other blocks taken out, so its parameters keep their names. What several stages need (a
tied embedding, T5's bias on attention) each has a copy of, and the copies' gradients are summed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from warploom.models.blocks import NoNorm
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Stack, Transformer
from warploom.nn.position import LearnedPosition, NoPosition
from warploom.optim.parts import local_part
from warploom.parallel.config import ParallelConfig
from warploom.parallel.mesh import Axis, Mesh, split_sizes
from warploom.parallel.rows import Inputs

SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
_SEVERAL_STAGES = (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble)


class StagePlan:
    """Which stage has which blocks: equally many each, the encoder's before the decoder's."""

    def __init__(self, config: TransformerConfig, num_stages: int) -> None:
        self.num_stages = num_stages
        self._tied = config.tie_embeddings
        self._bias_is_learned = config.position == "t5"
        self._source_vocabulary = config.source_vocab_size is not None
        encoder_layers = config.encoder_layers if config.architecture == "encoder-decoder" else 0
        layers = [("encoder", i) for i in range(encoder_layers)] + [("stack", i) for i in range(config.num_layers)]
        sizes = split_sizes(len(layers), num_stages)
        ends = [sum(sizes[: stage + 1]) for stage in range(num_stages)]
        self.blocks = [set(layers[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
        self._first = {
            stack: next(s for s in range(num_stages) if (stack, 0) in self.blocks[s])
            for stack in dict.fromkeys(stack for stack, _ in layers)
        }
        self._last = {"encoder": self._stage_of(("encoder", encoder_layers - 1)), "stack": num_stages - 1}

    def _stage_of(self, block: tuple[str, int]) -> int:
        return next((s for s, blocks in enumerate(self.blocks) if block in blocks), -1)

    def stages_of(self, name: str) -> list[int]:
        """Return the stages that hold a parameter of this name, in order."""
        stack, _, rest = name.partition(".")
        if stack in ("lm_head", "output_bias"):
            return [self.num_stages - 1]
        if stack == "source_embedding":
            return [self._first["encoder"]]
        if stack == "embedding":
            stages = {self._first["stack"]}
            if "encoder" in self._first and not self._source_vocabulary:
                stages.add(self._first["encoder"])
            if self._tied:
                stages.add(self.num_stages - 1)
            return sorted(stages)
        if rest.startswith("blocks."):
            return [self._stage_of((stack, int(rest.split(".")[1])))]
        if rest.startswith("position.") and self._bias_is_learned:
            return [s for s, blocks in enumerate(self.blocks) if any(one == stack for one, _ in blocks)]
        return [self._first[stack] if rest.startswith(("position.", "embedding_norm.")) else self._last[stack]]


class Stage(nn.Module):
    """The blocks of one stage. forward(*hidden, index) runs them on micro batch index of self.batches: from the tokens
    or from hidden, what the stage before returned, to the next stage's hidden or, in the last one, the loss."""

    def __init__(self, model: Transformer, plan: StagePlan, stage: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.batches: list[Inputs] = []
        self.num_targets = 1
        self.is_last = stage == plan.num_stages - 1
        self.encoder = self._cut("encoder", plan, stage)
        self.stack = self._cut("stack", plan, stage)
        for name in ("embedding", "source_embedding", "lm_head", "output_bias"):
            if getattr(self.model, name) is not None and stage not in plan.stages_of(f"{name}."):
                setattr(self.model, name, None)

    def _cut(self, name: str, plan: StagePlan, stage: int) -> _StackOfStage | None:
        stack = getattr(self.model, name)
        if stack is None:
            return None
        here = [(name, layer) in plan.blocks[stage] for layer in range(len(stack.blocks))]
        if not any(here):
            setattr(self.model, name, None)
            return None
        for layer, is_here in enumerate(here):
            if not is_here:
                stack.blocks[layer] = _Elsewhere()
        stack.begins, stack.ends = here[0], here[-1]
        if not stack.begins:
            stack.embedding_norm = NoNorm()
            if isinstance(stack.position, LearnedPosition):
                stack.position = NoPosition()
        if not stack.ends:
            stack.norm = _Sum()
        return _StackOfStage(stack)

    def forward(self, *hidden: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        inputs, model = self.batches[int(index)], self.model
        memory = None
        if self.encoder is not None:
            if self.encoder.stack.begins:
                embedding = model.embedding if model.source_embedding is None else model.source_embedding
                hidden = (embedding(inputs["source"]),)
            memory = self.encoder.run(hidden[0], inputs["source"], inputs.get("source_lengths"), model)
            hidden = ()
            if self.stack is None:
                return memory
        elif model.config.architecture == "encoder-decoder":
            memory, *rest = hidden
            hidden = tuple(rest)
        assert self.stack is not None
        tokens = inputs["tokens"]
        cu_seqlens, positions = inputs.get("cu_seqlens"), inputs.get("positions")
        if cu_seqlens is not None:
            tokens, positions = tokens.reshape(1, -1), inputs["positions"].reshape(1, -1)
        x = self.stack.run(
            model.embedding(tokens) if self.stack.stack.begins else hidden[0],
            inputs["tokens"],
            None if self.stack.stack.causal else inputs.get("lengths"),
            model,
            positions=positions,
            cu_seqlens=cu_seqlens,
            memory=memory,
            memory_lengths=inputs.get("source_lengths"),
        )
        if not self.is_last:
            # A copy, since a tensor cannot be input and output of one backward pass.
            return x if memory is None else (memory.clone(), x)
        return model.loss_of(x.view(*inputs["tokens"].shape, -1), inputs["targets"], "sum") / self.num_targets


class _StackOfStage:
    """Not a module, so that its stack, the model's, has one name."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def run(
        self,
        x: Tensor,
        tokens: Tensor,
        key_lengths: Tensor | None,
        model: Transformer,
        *,
        positions: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        T = tokens.shape[1]
        return self.stack(
            x,
            dtype=model.compute_dtype,
            positions=torch.arange(T, device=tokens.device) if positions is None else positions,
            window=T,
            key_lengths=key_lengths,
            **arguments,
        )


class _Elsewhere(nn.Module):
    """In the place of a block that another stage has."""

    def forward(self, x: Tensor, stream: Tensor | None, context: object) -> tuple[Tensor, Tensor | None]:
        return x, stream


class _Sum(nn.Module):
    """In the place of the final norm, where blocks of another stage follow: the residual stream, in one tensor."""

    def forward(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, None]:
        return (x if stream is None else stream + x), None


class Pipeline:
    """The stages of this process, and their schedule over the micro batches of a step."""

    def __init__(self, model: Transformer, config: ParallelConfig, mesh: Mesh) -> None:
        self.mesh, self.axis = mesh, mesh.axis["pipeline"]
        self.plan = StagePlan(model.config, config.num_stages)
        self._schedule_class = SCHEDULES[config.schedule]
        self.stages = {
            stage: Stage(model, self.plan, stage) for stage in range(self.axis.index, config.num_stages, self.axis.size)
        }
        self.has_last = config.num_stages - 1 in self.stages
        self._prepared: tuple[Any, Any] = (None, None)  # what a schedule was made for, and the schedule

    def num_micro_batches(self, wanted: int) -> int:
        """Return the least number from wanted on that the schedule can run."""
        number = wanted
        if self._schedule_class in _SEVERAL_STAGES:
            while number % max(1, number // self.axis.size):
                number += 1
        return max(number, self.plan.num_stages) if self._schedule_class is Schedule1F1B else number

    def run(self, batches: list[Inputs], num_targets: int) -> Tensor:
        """Leave the gradients of the batches' loss / num_targets in the stages' parameters. Return that loss in the
        process that has the last stage, 0 elsewhere."""
        key = (len(batches), [(name, x.shape) for name, x in batches[0].items() if name != "cu_seqlens"])
        if self._prepared[0] != key:
            self._prepared = key, self._schedule(batches)
        schedule = self._prepared[1]
        for stage in self.stages.values():
            stage.batches, stage.num_targets = batches, num_targets
        index = torch.arange(len(batches))
        losses: list[Tensor] = []
        with warnings.catch_warnings():
            # torch warns of what it does itself, once per process.
            warnings.simplefilter("ignore")
            schedule.step(
                *([index] if 0 in self.stages else []),
                index=index,
                target=index if self.has_last else None,
                losses=losses if self.has_last else None,
                return_outputs=False,
            )
        device = batches[0]["tokens"].device
        return torch.stack(losses).sum().to(device) if losses else torch.zeros((), device=device)

    def heldout_loss(self, batches: list[Inputs]) -> Tensor:
        """Return the summed loss of the batches in the process that has the last stage, 0 elsewhere."""
        total = torch.zeros((), dtype=torch.float64, device=batches[0]["tokens"].device)
        for index in range(len(batches)):
            hidden: tuple[Tensor, ...] = ()
            for number in range(self.plan.num_stages):
                if number not in self.stages:
                    continue
                stage = self.stages[number]
                stage.batches, stage.num_targets = batches, 1
                if number and number - 1 not in self.stages:
                    hidden = tuple(torch.empty_like(x) for x in self._hidden(number, batches[index]))
                    for x in hidden:
                        dist.recv(x, self.mesh.rank_at(pipeline=(number - 1) % self.axis.size))
                out = stage(*hidden, index=torch.tensor(index))
                hidden = out if isinstance(out, tuple) else (out,)
                if stage.is_last:
                    total += hidden[0]
                elif number + 1 not in self.stages:
                    for x in hidden:
                        dist.send(x.contiguous(), self.mesh.rank_at(pipeline=(number + 1) % self.axis.size))
        return total

    def _schedule(self, batches: list[Inputs]) -> Any:
        device = batches[0]["tokens"].device
        stages = []
        for number, module in self.stages.items():
            inputs = self._hidden(number, batches[0]) if number else (torch.empty(1, dtype=torch.int64),)
            outputs = (torch.empty(()),) if module.is_last else self._hidden(number + 1, batches[0])
            stages.append(
                PipelineStage(
                    module,
                    number,
                    self.plan.num_stages,
                    device,
                    input_args=tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs),
                    output_args=tuple(x.detach().requires_grad_() for x in outputs),
                    group=self.axis.group,
                )
            )
        return self._schedule_class(
            stages if self._schedule_class in _SEVERAL_STAGES else stages[0],
            n_microbatches=len(batches),
            loss_fn=lambda output, target: output,
            scale_grads=False,
        )

    def _hidden(self, number: int, batch: Inputs) -> tuple[Tensor, ...]:
        """Return tensors like those that enter a stage."""
        any_model = next(iter(self.stages.values())).model
        dtype, C = any_model.compute_dtype, any_model.config.d_model
        tensor = self.mesh.axis["tensor"]

        def like(name: str, packed: bool, cut: bool) -> Tensor:
            B, T = batch[name].shape
            B, T = (1, B * T) if packed else (B, T)
            return torch.empty(
                B, split_sizes(T, tensor.size)[tensor.index] if cut else T, C, dtype=dtype, device=batch[name].device
            )

        before = self.plan.blocks[number - 1]
        here = self.plan.blocks[number]
        if not any(stack == "encoder" for stack, _ in (*before, *here)) and "source" not in batch:
            return (like("tokens", "cu_seqlens" in batch, True),)
        if any(stack == "encoder" for stack, _ in here):
            return (like("source", False, True),)
        memory = like("source", False, False)
        return (memory,) if ("stack", 0) in here else (memory, like("tokens", False, True))


def sum_copies(named: list[tuple[str, nn.Parameter]], tied: dict[str, Tensor], axis: Axis) -> None:
    """Sum over the axis the gradients of parameters that several stages have a copy of.

    tied: a tensor like this process's part of each, whether or not it has a copy. Every process of the axis must call.
    """
    for name, like in tied.items():
        copies = [parameter for other, parameter in named if other == name]
        gradients = [local_part(p.grad) for p in copies if p.grad is not None]
        total = torch.zeros_like(like)
        for gradient in gradients:
            total += gradient
        dist.all_reduce(total, group=axis.group)
        for gradient in gradients:
            gradient.copy_(total)
