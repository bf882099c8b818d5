"""The time of a training step: a roofline for what one device computes, latency and bandwidth for what it sends."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from warploom.plan.hardware import ATTENTION_SHARE, BANDWIDTH_SHARE, PRODUCT_SHARE, Hardware
from warploom.plan.layout import Layout, Workload, meta_model, num_parameters

# Bytes an update reads and writes per parameter: weight, gradient and two moments in, weight and moments out, float32.
_UPDATE_BYTES = 28
# Elements that norms, activations, rotations and residual sums of a block move per token, in units of d_model and of
# d_ff, forward and backward: each op reads and writes its rows once each way.
_PASSES_D_MODEL, _PASSES_D_FF = 40, 8
_HOST_LINK = 25e9  # bytes/s between a device and its host, for offloaded optimizer state


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of forward and backward, by both conventions."""

    six_n: float  # 6 per parameter, whatever it does (Kaplan et al., 2020; Hoffmann et al., 2022)
    products: float  # 6 per weight that multiplies: the output layer, but no table that is only looked up
    attention: float  # 12 H D per layer and key seen, a causal query seeing half of them
    attention_full: float  # as if it saw all (PaLM's 6 N + 12 L H D T, Chowdhery et al., 2022)

    @property
    def causal(self) -> float:
        return self.products + self.attention

    @property
    def full(self) -> float:
        return self.products + self.attention_full


@functools.lru_cache(maxsize=256)
def flops_per_token(workload: Workload) -> Flops:
    model, config = meta_model(workload.model), workload.model
    products = model.flops_per_token(0)
    attention = model.flops_per_token(workload.seq_len) - products
    causal_layers = config.num_layers if config.architecture != "encoder" else 0
    missing = 12 * config.num_heads * config.head_width * causal_layers * workload.seq_len / 2
    return Flops(6 * model.num_parameters(), products, attention, attention + missing)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update on each device, by part; communication only where nothing hides it."""

    products: float
    attention: float
    memory_bound: float
    update: float
    bubble: float
    tensor: float
    context: float
    shard: float
    data: float
    pipeline: float

    @property
    def total(self) -> float:
        return (
            self.products + self.attention + self.memory_bound + self.update + self.bubble
            + self.tensor + self.context + self.shard + self.data + self.pipeline
        )  # fmt: skip


def step_time(workload: Workload, layout: Layout, hardware: Hardware) -> StepTime:
    """Reckon the seconds of one update."""
    model, device = workload.model, hardware.device
    micro_batches = layout.micro_batches(workload.global_batch_size)
    rows = layout.micro_batch_size * workload.seq_len / layout.context  # tokens of a micro batch on one device
    width = workload.dtype.itemsize
    peak = device.flops["fp32" if workload.dtype == torch.float32 else "bf16"]
    bandwidth = BANDWIDTH_SHARE * device.bandwidth
    flops = flops_per_token(workload)
    share = layout.tensor * layout.pipeline
    passes = 4 / 3 if layout.recompute == "blocks" else 1.0  # the forward pass, a third, a second time
    encoder_layers = model.encoder_layers if model.architecture == "encoder-decoder" else 0
    layers = (model.num_layers + encoder_layers) / layout.pipeline

    products = flops.products * passes * rows / share / (PRODUCT_SHARE * peak)
    attention = flops.attention * passes * rows / share / (ATTENTION_SHARE * peak)
    moved = rows * layers * (_PASSES_D_MODEL * model.d_model + _PASSES_D_FF * model.ff_width) / layout.tensor * width
    memory_bound = moved * (4 / 3 if layout.recompute != "none" else 1.0) / bandwidth
    compute = products + attention + memory_bound  # of one micro batch

    parameters = num_parameters(model) / share
    owned = parameters / layout.shard
    update = owned * _UPDATE_BYTES / bandwidth
    if layout.offload:
        update += owned * 16 / _HOST_LINK  # both moments, there and back

    # A gather and a reduce-scatter in each direction, around attention and around the feed-forward, or around both.
    exchanges = 4 if model.parallel_block else 8
    rate, latency = hardware.ring(layout.tensor, 1)
    message = rows * model.d_model * width
    tensor = (
        exchanges
        * layers
        * _pass_s(layout.tensor, message, rate, latency)
        * (1.5 if layout.recompute == "blocks" else 1)
    )

    rate, latency = hardware.ring(layout.context, layout.tensor)
    keys = rows * 2 * model.kv_heads * model.head_width / layout.tensor * width
    sent = 3 * layers * (layout.context - 1) * (keys / rate + latency)
    context = max(0.0, sent - attention) if layout.context > 1 else 0.0

    rate, latency = hardware.ring(layout.shard, layout.tensor * layout.context)
    # Weights are gathered in each pass, or once a step where stages of a pipeline hold them. Gradients leave last.
    gather = _pass_s(layout.shard, parameters * width, rate, layers * latency)
    scatter = _pass_s(layout.shard, parameters * 4, rate, layers * latency)
    if layout.pipeline > 1:
        shard = gather + scatter
    else:
        shard = micro_batches * max(0.0, 2 * gather - compute) + max(0.0, scatter - 2 / 3 * compute)

    rate, latency = hardware.ring(layout.data, layout.tensor * layout.context * layout.shard)
    reduce = 2 * _pass_s(layout.data, owned * 4, rate, latency)
    data = max(0.0, reduce - 2 / 3 * compute)

    rate, latency = hardware.ring(layout.pipeline, hardware.device.per_node)
    pipeline = 2 * micro_batches * (message / rate + latency) if layout.pipeline > 1 else 0.0
    bubble = (layout.pipeline - 1) * (compute + tensor)
    return StepTime(
        products=products * micro_batches,
        attention=attention * micro_batches,
        memory_bound=memory_bound * micro_batches,
        update=update,
        bubble=bubble,
        tensor=tensor * micro_batches,
        context=context * micro_batches,
        shard=shard,
        data=data,
        pipeline=pipeline,
    )


def _pass_s(group: int, size: float, rate: float, latency: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of size bytes in a ring over the group."""
    return 0.0 if group == 1 else (group - 1) * (size / group / rate + latency)
