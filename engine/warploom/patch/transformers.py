"""Layers of Hugging Face transformers: dense layers with their activation, attention, the loss.

transformers is not imported by importing this: a model that needs it has imported it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
from functools import partial
from typing import Any, Literal

import torch.nn as nn
from torch import Tensor

from warploom.errors import UserError
from warploom.nn.masked_attention import attend
from warploom.ops.cross_entropy import cross_entropy
from warploom.patch.dense import plan_pair
from warploom.patch.swap import Plan, obstacle

NAME = "warploom"
"""attn_implementation."""

# Modules whose forward computes activation(linear(x)) and uses neither of the two otherwise.
PAIRS = {
    "OPTDecoderLayer": ("fc1", "activation_fn"),
    "BartEncoderLayer": ("fc1", "activation_fn"),
    "BartDecoderLayer": ("fc1", "activation_fn"),
    "MarianEncoderLayer": ("fc1", "activation_fn"),
    "MarianDecoderLayer": ("fc1", "activation_fn"),
    "T5DenseActDense": ("wi", "act"),
    "T5DenseGatedActDense": ("wi_0", "act"),
    "GPT2MLP": ("c_fc", "act"),
    "LlamaMLP": ("gate_proj", "act_fn"),
}
_KEPT_NAME = "_warploom_replaced_attention"
_log = logging.getLogger(__name__)
_told: set[str] = set()


def plan_model(plan: Plan) -> None:
    """Plan what is special to transformers; its Linears and norms are planned with torch.nn's."""
    if "transformers.modeling_utils" not in sys.modules:  # then the model is none of theirs
        return
    for path, module in plan.model.named_modules():
        cls = type(module)
        if cls.__name__ in PAIRS and cls.__module__.startswith("transformers.models."):
            plan_pair(plan, path, module, *PAIRS[cls.__name__])
    _plan_attention(plan)
    _plan_loss(plan)


def register_attention() -> None:
    """Make attn_implementation="warploom" known to transformers. patch does it by itself.

    Raises UserError if transformers is not installed.
    """
    try:
        modeling = importlib.import_module("transformers.modeling_utils")
        masking = importlib.import_module("transformers.masking_utils")
    except ModuleNotFoundError as error:
        raise UserError(f"transformers cannot be imported ({error}): pip install 'warploom[transformers]'") from None
    modeling.AttentionInterface.register(NAME, attention_forward)
    masking.AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**request: Any) -> Tensor | None:
    """Return transformers' mask for torch's attention: bool, or None where the causal flag or nothing says it all."""
    masking = sys.modules["transformers.masking_utils"]
    if request.get("attention_mask") is None and request.get("local_size") is None:
        # In code compiled by torch before 2.14 transformers would make these masks, which then cost a bias.
        function = request.get("mask_function")
        if (
            function is masking.causal_mask_function
            and request.get("allow_is_causal_skip", True)
            and isinstance(offset := request.get("q_offset", 0), int)
            and offset == 0
            and request["q_length"] == request["kv_length"]
        ):
            return None
        if function is masking.bidirectional_mask_function and request.get("allow_is_bidirectional_skip", False):
            return None
    return masking.sdpa_mask(**request)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, with the meaning that "sdpa" gives every argument. Returns (B, T, H, D).

    What the op does not have goes to "sdpa", which a warning says once: dropout, values narrower than keys.
    Raises ValueError for what neither has: softcap and sinks.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation {NAME!r} has no {name}, got {kwargs[name]}: load with 'eager'")
    reason = None
    if dropout > 0:
        reason = f"dropout {dropout:g} on attention probabilities"
    elif value.shape != key.shape:
        reason = "values of another width than keys"
    if reason is not None:
        if reason not in _told:
            _told.add(reason)
            _log.warning("%s: torch's attention runs instead of warploom's", reason)
        sdpa = sys.modules["transformers.integrations.sdpa_attention"].sdpa_attention_forward
        return sdpa(*(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias), **kwargs)
    T, S = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and T > 1 and attention_mask is None
    if causal and S > T:  # an empty cache of fixed size: what lies behind the queries is not written yet
        key, value = key[:, :, :T], value[:, :, :T]
        position_bias = None if position_bias is None else position_bias[..., :T]
    masks = () if attention_mask is None else (attention_mask,)
    o = attend(query, key, value, masks, bias=position_bias, causal=causal, scale=scaling)
    return o.transpose(1, 2).contiguous(), None


def _plan_attention(plan: Plan) -> None:
    owners = [module for module in plan.model.modules() if isinstance(module, _pretrained_model())]
    for path, module in plan.model.named_modules():
        config: Any = getattr(module, "config", None)
        if not _is_attention(module, config) or config._attn_implementation == NAME:
            continue
        config_owners = [owner for owner in owners if owner.config is config]
        reason = obstacle(module, "attention") or _attention_obstacle(module, config, config_owners)
        if reason is not None:
            plan.leave(path, module, "attention", reason)
            continue
        plan.note(path, "attention")
        for owner in config_owners:
            plan.act(partial(_take_over_attention, owner))


def _is_attention(module: nn.Module, config: Any) -> bool:
    """Whether the module calls transformers' attention interface."""
    return (
        "Attention" in type(module).__name__
        and hasattr(config, "_attn_implementation")
        and isinstance(getattr(module, "is_causal", None), bool)
    )


def _attention_obstacle(module: nn.Module, config: Any, owners: list[Any]) -> str | None:
    if config._attn_implementation != "sdpa":
        return f"attn_implementation is {config._attn_implementation!r}, only 'sdpa' is replaced"
    if not owners or not owners[0]._can_set_attn_implementation():
        return "its attention cannot be set"
    source = inspect.getsource(sys.modules[type(module).__module__])
    if re.search(r"_attn_implementation\b[^\n]*\"sdpa\"", source):
        return "its model does other things too where attention is 'sdpa'"
    dropout: Any = next((getattr(module, name) for name in _DROPOUTS if hasattr(module, name)), 0.0)
    rate: Any = dropout.p if isinstance(dropout, nn.Module) else dropout
    return f"dropout {rate:g} on attention probabilities" if rate > 0 else None


_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout")


def _take_over_attention(owner: Any) -> None:
    register_attention()
    if _KEPT_NAME not in owner.__dict__:
        owner.__dict__[_KEPT_NAME] = "sdpa"
    owner.config._attn_implementation_internal = NAME


def restore(model: nn.Module) -> None:
    """Give the models in this one the attention and the loss back that they had before patch."""
    for module in model.modules():
        kept = module.__dict__.pop(_KEPT_NAME, None)
        if kept is not None:
            module.config._attn_implementation_internal = kept  # type: ignore[union-attr]
        if module.__dict__.get("_loss_function") is causal_lm_loss:
            del module._loss_function


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss on ops.cross_entropy: token i predicts label i + 1."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction: Literal["mean", "sum"] = "mean" if num_items_in_batch is None else "sum"
    targets = shift_labels.reshape(-1).to(logits.device)
    loss = cross_entropy(logits.view(-1, vocab_size), targets, ignore_index, reduction)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _plan_loss(plan: Plan) -> None:
    """The loss of a model with a language modelling head. Its logits are returned to the caller and so must be made
    whole, hence ops.cross_entropy: ops.linear_cross_entropy, which makes none, would pay for the head twice."""
    for path, module in plan.model.named_modules():
        if not isinstance(module, _pretrained_model()) or getattr(module, "lm_head", None) is None:
            continue
        loss = module.loss_function
        if loss is causal_lm_loss:
            continue
        if "self.loss_function(" not in inspect.getsource(type(module)):
            plan.leave(path, module, "loss", "its forward computes the loss itself")
        elif getattr(loss, "__name__", None) != "ForCausalLMLoss" or "_loss_function" in module.__dict__:
            plan.leave(path, module, "loss", f"its loss function is {getattr(loss, '__name__', loss)}")
        else:
            plan.note(path, "cross_entropy")
            plan.act(partial(setattr, module, "loss_function", causal_lm_loss))


def _pretrained_model() -> type[nn.Module]:
    return sys.modules["transformers.modeling_utils"].PreTrainedModel
