"""ONNX out: the whole model as one graph of standard operators, for ONNX Runtime, and from there for TensorFlow.

Inputs, int64: `tokens` (batch, sequence), and for an encoder its `lengths` (batch,), for an encoder-decoder `source`
(batch, source) and `source_lengths` (batch,). Output, float32: `logits` (batch, sequence, vocabulary), or `hidden`
(batch, sequence, width) of an encoder. Sequences may be as long as max_seq_len.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from warploom.errors import UserError
from warploom.models import blocks
from warploom.models.transformer import Stack, Transformer
from warploom.nn.attention import CrossAttention, SelfAttention
from warploom.nn.feed_forward import GEGLU, SwiGLU
from warploom.nn.norm import LayerNorm, RMSNorm
from warploom.nn.position import LearnedPosition, RotaryPosition, SinusoidalPosition

OPSET = 20
# One protocol buffer may not pass 2 GiB; the weights of larger models go into a file beside it.
_MAX_INLINE_BYTES = 1_500_000_000
_GATES = {SwiGLU: "silu", GEGLU: "gelu_tanh"}


def export_onnx(model: Transformer, path: str | os.PathLike[str]) -> Path:
    """Write the model as an ONNX file, weights in float32; returns its path. Raises UserError if the file exists."""
    onnx, path = _library(), Path(path)
    if path.exists():
        raise UserError(f"{path} exists already; name a new file")
    graph = _Graph(onnx)
    with torch.no_grad():
        inputs, output = _transformer(graph, model)
    name, dims = output
    built = onnx.helper.make_graph(
        graph.nodes,
        "warploom",
        [onnx.helper.make_tensor_value_info(i, onnx.TensorProto.INT64, shape) for i, shape in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)],
        graph.initializers,
    )
    proto = onnx.helper.make_model(built, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="warploom")
    proto.ir_version = 10  # what runtimes of two years ago read
    path.parent.mkdir(parents=True, exist_ok=True)
    is_large = sum(p.nbytes for p in model.parameters()) > _MAX_INLINE_BYTES
    onnx.save_model(proto, path, save_as_external_data=is_large, location=f"{path.name}.data")
    onnx.checker.check_model(path)
    return path


def _library() -> Any:
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX files need the onnx library: pip install 'warploom[interchange]'") from None
    return onnx


class _Graph:
    """Nodes and initializers as they are made. Every value goes by its name."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._weights: dict[int, str] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, output: str | None = None, **attributes: Any) -> str:
        """Add a node; return the name of its first output."""
        names = [output or f"{kind.lower()}_{len(self.nodes)}"]
        names += [f"{names[0]}_{n}" for n in range(1, outputs)]
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, tensor: Tensor) -> str:
        """A parameter, stored once however often it is used."""
        if id(tensor) not in self._weights:
            array = tensor.detach().float().cpu().contiguous().numpy()
            self._weights[id(tensor)] = self.constant(array, np.float32)
        return self._weights[id(tensor)]

    def length(self, x: str, dim: int) -> str:
        """The size of one dimension, a scalar."""
        shape = self.op("Shape", x, start=dim, end=dim + 1)
        return self.op("Squeeze", shape)

    def range(self, count: str) -> str:
        return self.op("Range", self.constant(0), count, self.constant(1))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """0 keeps a dimension, -1 takes what is left."""
        return self.op("Reshape", x, self.constant(list(shape)))

    def linear(self, x: str, module: nn.Linear) -> str:
        y = self.op("MatMul", x, self.op("Transpose", self.weight(module.weight), perm=[1, 0]))
        y = y if module.bias is None else self.op("Add", y, self.weight(module.bias))
        return self.activation(y, getattr(module, "activation", "none"))

    def activation(self, x: str, name: str) -> str:
        if name == "none":
            return x
        if name == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if name == "relu2":
            y = self.op("Relu", x)
            return self.op("Mul", y, y)
        if name == "relu":
            return self.op("Relu", x)
        return self.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")

    def norm(self, x: str, module: nn.Module) -> str:
        if isinstance(module, LayerNorm):
            bias = [] if module.bias is None else [self.weight(module.bias)]
            return self.op("LayerNormalization", x, self.weight(module.weight), *bias, epsilon=module.eps)
        if isinstance(module, RMSNorm):
            square = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1]))
            rms = self.op("Sqrt", self.op("Add", square, self.constant(module.eps, np.float32)))
            return self.op("Mul", self.op("Div", x, rms), self.weight(module.weight))
        return x


def _transformer(graph: _Graph, model: Transformer) -> tuple[dict[str, list[str]], tuple[str, list[Any]]]:
    config = model.config
    inputs: dict[str, list[str]] = {"tokens": ["batch", "sequence"]}
    memory = lengths = None
    if model.encoder is not None:
        inputs |= {"source": ["batch", "source"], "source_lengths": ["batch"]}
        embedding = model.embedding if model.source_embedding is None else model.source_embedding
        lengths = "source_lengths"
        memory = _stack(
            graph, model.encoder, _embed(graph, embedding, "source"), "source", config.max_seq_len, lengths=lengths
        )
    elif config.architecture == "encoder":
        inputs["lengths"] = ["batch"]
        lengths = "lengths"
    own_lengths = lengths if model.encoder is None else None
    hidden = _stack(
        graph,
        model.stack,
        _embed(graph, model.embedding, "tokens"),
        "tokens",
        config.max_seq_len,
        lengths=own_lengths,
        memory=memory,
        memory_lengths=lengths,
    )
    if config.architecture == "encoder":
        return inputs, (graph.op("Identity", hidden, output="hidden"), ["batch", "sequence", config.d_model])
    transposed = graph.op("Transpose", graph.weight(model.output_weight), perm=[1, 0])
    logits = graph.op("MatMul", hidden, transposed)
    if model.output_bias is not None:
        logits = graph.op("Add", logits, graph.weight(model.output_bias))
    return inputs, (graph.op("Identity", logits, output="logits"), ["batch", "sequence", config.vocab_size])


def _embed(graph: _Graph, embedding: Any, tokens: str) -> str:
    x = graph.op("Gather", graph.weight(embedding.weight), tokens)
    return x if embedding.scale == 1.0 else graph.op("Mul", x, graph.constant(embedding.scale, np.float32))


class _Context:
    """What the attention layers of one stack share: a table of angles, and what is added to the logits."""

    def __init__(self, graph: _Graph, stack: Stack, length: str, max_seq_len: int, lengths: str | None) -> None:
        self.graph, self.position = graph, stack.position
        self.positions = graph.range(length)  # (T,)
        self.mask: str | None = None
        queries, keys = (graph.op("Unsqueeze", self.positions, graph.constant([axis])) for axis in (1, 0))
        distance = graph.op("Sub", keys, queries)  # (T, T)
        positions = torch.arange(max_seq_len)
        bias = stack.position.bias(positions, max_seq_len)  # (H, 2 * max_seq_len - 1), by distance
        if bias is not None:
            index = graph.op("Add", distance, graph.constant(max_seq_len - 1))
            self.mask = graph.op("Gather", graph.constant(bias.numpy(), np.float32), index, axis=1)  # (H, T, T)
        if stack.causal:
            future = graph.op("Greater", distance, graph.constant(0))
            self.add(graph.op("Where", future, *_infinity_and_zero(graph)))
        if lengths is not None:
            self.add(padding_mask(graph, self.positions, lengths))

    def add(self, mask: str) -> None:
        self.mask = mask if self.mask is None else self.graph.op("Add", self.mask, mask)

    def rotate(self, x: str, head_dim: int) -> str:
        if not isinstance(self.position, RotaryPosition):
            return x
        graph, half = self.graph, head_dim // 2
        rates = self.position.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        places = graph.op("Unsqueeze", graph.op("Cast", self.positions, to=1), graph.constant([1]))
        angles = graph.op("Mul", places, graph.constant(rates, np.float32))  # (T, D / 2)
        cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)
        first = graph.op("Slice", x, graph.constant([0]), graph.constant([half]), graph.constant([-1]))
        second = graph.op("Slice", x, graph.constant([half]), graph.constant([head_dim]), graph.constant([-1]))
        turned = [
            graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin)),
            graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin)),
        ]
        return graph.op("Concat", *turned, axis=-1)


def padding_mask(graph: _Graph, positions: str, lengths: str) -> str:
    """(B, 1, 1, S): minus infinity behind each row's length."""
    behind = graph.op("GreaterOrEqual", positions, graph.op("Unsqueeze", lengths, graph.constant([1])))  # (B, S)
    mask = graph.op("Where", behind, *_infinity_and_zero(graph))
    return graph.op("Unsqueeze", mask, graph.constant([1, 2]))


def _infinity_and_zero(graph: _Graph) -> tuple[str, str]:
    return graph.constant(-np.inf, np.float32), graph.constant(0.0, np.float32)


def _stack(
    graph: _Graph,
    stack: Stack,
    x: str,
    tokens: str,
    max_seq_len: int,
    *,
    lengths: str | None,
    memory: str | None = None,
    memory_lengths: str | None = None,
) -> str:
    length = graph.length(tokens, 1)
    context = _Context(graph, stack, length, max_seq_len, lengths)
    x = _add_positions(graph, stack, x, context.positions)
    x = graph.norm(x, stack.embedding_norm)
    cross_mask = None
    if memory is not None and memory_lengths is not None:
        cross_mask = padding_mask(graph, graph.range(graph.length(memory, 1)), memory_lengths)
    for block in stack.blocks:
        x = _block(graph, block, x, context, memory, cross_mask)
    return graph.norm(x, stack.norm)


def _add_positions(graph: _Graph, stack: Stack, x: str, positions: str) -> str:
    if isinstance(stack.position, LearnedPosition):
        return graph.op("Add", x, graph.op("Gather", graph.weight(stack.position.table.weight), positions))
    if isinstance(stack.position, SinusoidalPosition):
        C = stack.position.d_model
        rates = np.exp(np.arange(0, C, 2, dtype=np.float64) * (-math.log(10000.0) / C))
        places = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), graph.constant([1]))
        angles = graph.op("Mul", places, graph.constant(rates, np.float32))
        return graph.op("Add", x, graph.op("Concat", graph.op("Sin", angles), graph.op("Cos", angles), axis=-1))
    return x


def _block(graph: _Graph, block: Any, x: str, context: _Context, memory: str | None, cross_mask: str | None) -> str:
    """One block in evaluation mode, its residual sums written out."""

    def attend(y: str) -> str:
        return _attention(graph, block.attention, y, y, context, context.mask)

    def cross(y: str) -> str:
        assert memory is not None
        return _attention(graph, block.cross_attention, y, memory, None, cross_mask)

    def feed(y: str) -> str:
        return _feed_forward(graph, block.feed_forward, y)

    if isinstance(block, blocks.ParallelBlock | blocks.SharedNormParallelBlock):
        y = graph.norm(x, block.attention_norm)
        z = graph.norm(x, block.feed_forward_norm) if isinstance(block, blocks.ParallelBlock) else y
        return graph.op("Add", x, graph.op("Add", attend(y), feed(z)))
    sub_layers = [(attend, block.attention_norm), (feed, block.feed_forward_norm)]
    if isinstance(block, blocks.PreNormCrossBlock | blocks.PostNormCrossBlock):
        sub_layers.insert(1, (cross, block.cross_attention_norm))
    is_post = isinstance(block, blocks.PostNormBlock | blocks.PostNormCrossBlock)
    for sub_layer, norm in sub_layers:
        if is_post:
            x = graph.norm(graph.op("Add", x, sub_layer(x)), norm)
        else:
            x = graph.op("Add", x, sub_layer(graph.norm(x, norm)))
    return x


def _attention(
    graph: _Graph,
    module: SelfAttention | CrossAttention,
    x: str,
    source: str,
    context: _Context | None,
    mask: str | None,
) -> str:
    D = module.head_dim
    H, H_kv = module.q_proj.out_features // D, module.k_proj.out_features // D

    def heads(y: str, count: int) -> str:
        return graph.op("Transpose", graph.reshape(y, [0, 0, count, D]), perm=[0, 2, 1, 3])

    def shared(y: str) -> str:
        """Each key/value head once per query head that reads it."""
        if H_kv == H:
            return y
        y = graph.op("Unsqueeze", y, graph.constant([2]))
        y = graph.op("Expand", y, graph.constant([1, 1, H // H_kv, 1, 1]))
        return graph.reshape(y, [0, H, -1, D])

    q, k = heads(graph.linear(x, module.q_proj), H), heads(graph.linear(source, module.k_proj), H_kv)
    v = heads(graph.linear(source, module.v_proj), H_kv)
    if context is not None:
        q, k = context.rotate(q, D), context.rotate(k, D)
    logits = graph.op("MatMul", q, graph.op("Transpose", shared(k), perm=[0, 1, 3, 2]))
    logits = graph.op("Mul", logits, graph.constant(1 / math.sqrt(D), np.float32))
    logits = logits if mask is None else graph.op("Add", logits, mask)
    o = graph.op("MatMul", graph.op("Softmax", logits, axis=-1), shared(v))
    return graph.linear(graph.reshape(graph.op("Transpose", o, perm=[0, 2, 1, 3]), [0, 0, H * D]), module.o_proj)


def _feed_forward(graph: _Graph, module: Any, x: str) -> str:
    if hasattr(module, "gate_proj"):
        gate = graph.activation(graph.linear(x, module.gate_proj), _GATES[type(module)])
        return graph.linear(graph.op("Mul", gate, graph.linear(x, module.up_proj)), module.down_proj)
    return graph.linear(graph.linear(x, module.up_proj), module.down_proj)
