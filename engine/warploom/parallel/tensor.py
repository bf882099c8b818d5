"""Tensor parallelism: the heads, the feed-forward features and the vocabulary of each layer over the processes of one
axis (Shoeybi et al., 2019), the norms between them over the sequence (Korthikanti et al., 2022).

A layer works on whole sequences of its share of the features, so the fused ops run on shards as they are. Before it the
sequence is gathered and behind it the sum is scattered, which is what one all-reduce would cost:

    norm (sequence part) -> gather -> q, k, v / up, gate -> attention / activation -> o / down -> reduce-scatter
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warploom.models.transformer import Stack, Transformer
from warploom.nn.attention import CrossAttention, SelfAttention
from warploom.nn.embedding import Embedding
from warploom.nn.feed_forward import FeedForward, SwiGLU
from warploom.nn.linear import Linear
from warploom.nn.position import AlibiPosition, BucketPosition
from warploom.ops.linear import linear
from warploom.parallel.collectives import all_reduce, gather_sequence, reduce_scatter_sequence, take_sequence
from warploom.parallel.mesh import Axis, split_sizes


@dataclass(frozen=True)
class Slices:
    """How a parameter is cut: along dim, into pieces of these sizes, one for each process of the axis."""

    dim: int
    sizes: tuple[int, ...]

    def range(self, index: int) -> tuple[int, int]:
        return sum(self.sizes[:index]), sum(self.sizes[: index + 1])


@dataclass(frozen=True)
class TensorPlan:
    """What became of the parameters. Those not in slices are whole on every process."""

    slices: dict[str, Slices]
    partial: frozenset[str]
    """Whole parameters that each process applies to its part of the sequence: their gradients are to be summed."""

    def __or__(self, other: TensorPlan) -> TensorPlan:
        return TensorPlan(self.slices | other.slices, self.partial | other.partial)


def apply_tensor(model: Transformer, axis: Axis) -> TensorPlan:
    """Cut the model's layers to the share of this process, and put the exchanges between them."""
    cutter = _Cutter(model, axis)
    for name, module in list(model.named_modules()):
        if isinstance(module, Stack):
            cutter.stack(name, module)
    cutter.vocabulary(model)
    whole = {name for name, _ in model.named_parameters()} - cutter.slices.keys()
    # Learned positions are added, and embeddings normalised, before the sequence is cut.
    partial = {name for name in whole if not ("position.table." in name or "embedding_norm." in name)}
    return TensorPlan(cutter.slices, frozenset(partial))


class _Cutter:
    def __init__(self, model: Transformer, axis: Axis) -> None:
        self.axis = axis
        self.slices: dict[str, Slices] = {}
        config = model.config
        self.kv_sizes = split_sizes(config.kv_heads, axis.size)
        # A query head stays with the key/value head that it reads.
        self.q_sizes = [size * (config.num_heads // config.kv_heads) for size in self.kv_sizes]
        self.ff_sizes = split_sizes(config.ff_width, axis.size)

    def stack(self, name: str, stack: Stack) -> None:
        """The sequence is cut where the stack begins and gathered where it ends, if both are on this process."""
        length = _SequenceLength()
        stack.register_forward_pre_hook(length.note, with_kwargs=True)
        if stack.begins:
            stack.dropout = nn.Sequential(_TakeSequence(self.axis), stack.dropout)  # type: ignore[assignment]
        for part, module in list(stack.named_modules()):
            if isinstance(module, SelfAttention | CrossAttention):
                self._attention(f"{name}.{part}", module)
                module.register_forward_pre_hook(_GatherBefore(self.axis, length))
            elif isinstance(module, FeedForward | SwiGLU):
                self._feed_forward(f"{name}.{part}", module)
                module.register_forward_pre_hook(_GatherBefore(self.axis, length))
        if stack.ends:
            stack.norm.register_forward_hook(_GatherBehind(self.axis, length))
        position = stack.position
        if isinstance(position, AlibiPosition):
            position.heads = slice(*Slices(0, tuple(self.q_sizes)).range(self.axis.index))
        elif isinstance(position, BucketPosition):
            self._cut(f"{name}.position.table.weight", position.table, "weight", 1, self.q_sizes)

    def vocabulary(self, model: Transformer) -> None:
        for name in ("embedding", "source_embedding"):
            module = getattr(model, name)
            if module is not None:
                sizes = split_sizes(module.num_embeddings, self.axis.size)
                setattr(model, name, _VocabularyEmbedding(module, Slices(0, tuple(sizes)), self.axis))
                self._cut(f"{name}.weight", getattr(model, name), "weight", 0, sizes)
        sizes = split_sizes(model.config.vocab_size, self.axis.size)
        if model.lm_head is not None:
            self._rows("lm_head", model.lm_head, sizes)
        if model.output_bias is not None:
            self._cut("output_bias", model, "output_bias", 0, sizes)
        model.class_shard = VocabularyShard(Slices(0, tuple(sizes)).range(self.axis.index)[0], self.axis)

    def _attention(self, name: str, module: SelfAttention | CrossAttention) -> None:
        q, kv = ([size * module.head_dim for size in sizes] for sizes in (self.q_sizes, self.kv_sizes))
        for part, sizes in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            self._rows(f"{name}.{part}", module.get_submodule(part), sizes)
        self._columns(name, module, "o_proj", q)

    def _feed_forward(self, name: str, module: FeedForward | SwiGLU) -> None:
        for part in ("up_proj", "gate_proj"):
            if hasattr(module, part):
                self._rows(f"{name}.{part}", module.get_submodule(part), self.ff_sizes)
        self._columns(name, module, "down_proj", self.ff_sizes)

    def _rows(self, name: str, module: nn.Module, sizes: list[int]) -> None:
        assert isinstance(module, Linear)
        self._cut(f"{name}.weight", module, "weight", 0, sizes)
        if module.bias is not None:
            self._cut(f"{name}.bias", module, "bias", 0, sizes)
        module.out_features = sizes[self.axis.index]

    def _columns(self, name: str, owner: nn.Module, part: str, sizes: list[int]) -> None:
        module = owner.get_submodule(part)
        assert isinstance(module, Linear)
        setattr(owner, part, _RowParallelLinear(module, self.axis))
        self._cut(f"{name}.{part}.weight", owner.get_submodule(part), "weight", 1, sizes)

    def _cut(self, name: str, module: nn.Module, part: str, dim: int, sizes: list[int]) -> None:
        whole = module.get_parameter(part)
        piece = whole.detach().split(sizes, dim)[self.axis.index].clone(memory_format=torch.contiguous_format)
        setattr(module, part, nn.Parameter(piece, requires_grad=whole.requires_grad))
        self.slices[name] = Slices(dim, tuple(sizes))


class _RowParallelLinear(Linear):
    """A Linear over some of its input features. It returns the part of the sequence of the sum over processes."""

    def __init__(self, whole: Linear, axis: Axis) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight, self.bias, self.activation, self.axis = whole.weight, whole.bias, whole.activation, axis

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters_for(x)
        y = reduce_scatter_sequence(linear(x, weight, None, self.activation, self.packed), self.axis)
        return y if bias is None else y + bias.to(y.dtype)


class _VocabularyEmbedding(Embedding):
    """An Embedding that holds some of the words. It returns the whole sequence, looked up wherever its words are."""

    def __init__(self, whole: Embedding, words: Slices, axis: Axis) -> None:
        nn.Module.__init__(self)
        self.first, last = words.range(axis.index)
        self.num_embeddings, self.embedding_dim, self.scale = last - self.first, whole.embedding_dim, whole.scale
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight, self.axis = whole.weight, axis

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens - self.first
        elsewhere = (tokens < 0) | (tokens >= self.num_embeddings)
        embedded = super().forward(tokens.masked_fill(elsewhere, 0))
        return all_reduce(embedded.masked_fill(elsewhere[..., None], 0.0), self.axis)


class _SequenceLength:
    """The length of the sequence that a stack is at work on, which its parts do not tell."""

    value = 0

    def note(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.value = kwargs["positions"].shape[-1]


class _GatherBefore:
    """Before a layer: gather the sequence of its first argument."""

    def __init__(self, axis: Axis, length: _SequenceLength) -> None:
        self.axis, self.length = axis, length

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return gather_sequence(args[0], self.axis, self.length.value), *args[1:]


class _GatherBehind:
    """Behind the norm that ends a stack: gather its sequence."""

    def __init__(self, axis: Axis, length: _SequenceLength) -> None:
        self.axis, self.length = axis, length

    def __call__(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return gather_sequence(output[0], self.axis, self.length.value), output[1]


class _TakeSequence(nn.Module):
    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return take_sequence(x, self.axis)


class VocabularyShard:
    """The words of this process among all, for linear_cross_entropy."""

    def __init__(self, first: int, axis: Axis) -> None:
        self.first, self._axis = first, axis

    def combined_lse(self, lse: Tensor) -> Tensor:
        parts = [torch.empty_like(lse) for _ in range(self._axis.size)]
        dist.all_gather(parts, lse, group=self._axis.group)
        return torch.stack(parts).logsumexp(0)

    def total(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=self._axis.group)
        return total
