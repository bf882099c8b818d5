"""LayerNorm and RMSNorm of torch.nn, and the RMSNorms of transformers: ops.layer_norm, ops.rms_norm."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from warploom.nn.norm import epsilon
from warploom.ops.layer_norm import layer_norm
from warploom.ops.rms_norm import rms_norm
from warploom.patch.swap import Plan, Swap


class LayerNormSwap(Swap):
    """torch.nn.LayerNorm over the last dimension. Autocast on the CPU leaves it alone, and its output has its input's
    dtype, whatever the weights have."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return layer_norm(input.to(dtype), self.weight.to(dtype), bias, self.eps).to(input.dtype)  # type: ignore[union-attr]


class RMSNormSwap(Swap):
    """torch.nn.RMSNorm over the last dimension; dtypes as LayerNorm's."""

    weight: Tensor
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return rms_norm(x.to(dtype), self.weight.to(dtype), epsilon(self.eps, x.dtype)).to(x.dtype)  # type: ignore[union-attr]


class LlamaRMSNormSwap(Swap):
    """y = weight * x_hat, the wider of the two dtypes."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        y = rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)
        return y  # type: ignore[return-value]


class T5LayerNormSwap(LlamaRMSNormSwap):
    """The same, but 16-bit weights make 16-bit outputs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = super().forward(hidden_states)
        return y.to(self.weight.dtype) if self.weight.dtype in (torch.float16, torch.bfloat16) else y


def plan_norm(plan: Plan, path: str, module: nn.Module) -> None:
    forward = type(module).forward
    if forward is nn.LayerNorm.forward:
        _plan_torch_norm(plan, path, module, LayerNormSwap, "layer_norm")
    elif forward is nn.RMSNorm.forward:
        _plan_torch_norm(plan, path, module, RMSNormSwap, "rms_norm")
    elif _is_copy(forward, _llama_forward):
        plan.swap(path, module, LlamaRMSNormSwap, "rms_norm")
    elif _is_copy(forward, _t5_forward):
        plan.swap(path, module, T5LayerNormSwap, "rms_norm")


def _plan_torch_norm(plan: Plan, path: str, module: nn.Module, swap: type[Swap], kind: str) -> None:
    shape = module.normalized_shape
    if len(shape) != 1:  # type: ignore[arg-type]
        plan.leave(path, module, kind, f"it normalises over {len(shape)} dimensions")  # type: ignore[arg-type]
    elif module.weight is None:
        plan.leave(path, module, kind, "it has no weight (elementwise_affine=False)")
    else:
        plan.swap(path, module, swap, kind)


# transformers has one RMSNorm per model, many of them copies of Llama's or T5's, and some that look like them and
# compute something else (1 + weight, another order of roundings). What runs decides, not the name: the code of forward
# must be that of one of the two below.
def _llama_forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _t5_forward(self, hidden_states):
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states


def _is_copy(function: object, sample: object) -> bool:
    ours, theirs = getattr(sample, "__code__", None), getattr(function, "__code__", None)
    return theirs is not None and all(
        getattr(ours, part) == getattr(theirs, part) for part in ("co_code", "co_names", "co_varnames")
    )
