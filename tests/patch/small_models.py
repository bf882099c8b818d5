"""Small random models of transformers, one per family that the tests are about, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as hf
from tests.patch.rule import excesses
from torch import Tensor, nn

from warploom.ops import REGISTRY

V = 96
WIDTH = dict(d_model=32, encoder_attention_heads=2, decoder_attention_heads=2)
LAYERS = dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
START = dict(decoder_start_token_id=0)
NO_DROPOUT = dict(dropout=0.0)

BUILDERS = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **(TOKENS | NO_DROPOUT),
            **dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2),
            **dict(vocab_size=V, max_position_embeddings=64),
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **TOKENS,
            **dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=V),
            **dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, loss_type="ForCausalLM"),
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **TOKENS,
            **dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=V),
            **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64),
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            **(TOKENS | START),
            **dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=V, dropout_rate=0.0),
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **(TOKENS | START | WIDTH | LAYERS | NO_DROPOUT),
            **dict(vocab_size=V, max_position_embeddings=64, activation_function="relu", forced_eos_token_id=None),
        )
    ),
    "marian": lambda: hf.MarianMTModel(
        hf.MarianConfig(
            **(TOKENS | START | WIDTH | LAYERS | NO_DROPOUT),
            **dict(vocab_size=V, decoder_vocab_size=V, max_position_embeddings=64, forced_eos_token_id=None),
            **dict(activation_function="relu", attention_dropout=0.0, activation_dropout=0.0),
        )
    ),
}
DECODERS = ("opt", "gpt2", "llama")


def build(name: str) -> nn.Module:
    """The same model at every call. Weights that a configuration starts at 0 or 1 are moved off it."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def batch(name: str, padding: str) -> dict[str, Tensor]:
    """Two sequences of which one is shorter, padded on the side that is asked for ("none": neither is)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, V, (2, 11), generator=generator)
    inputs = {"input_ids": tokens}
    if padding != "none":
        kept = torch.ones_like(tokens)
        kept[1, slice(7, None) if padding == "right" else slice(0, 4)] = 0
        inputs = {"input_ids": tokens * kept, "attention_mask": kept}
    if name in DECODERS:
        labels = tokens
    else:
        labels = torch.randint(3, V, (2, 9), generator=generator)
    inputs["labels"] = labels.clone()
    if padding != "none":
        inputs["labels"][1, :4] = -100
    return inputs


@dataclass(frozen=True)
class Outcome:
    """Loss, logits and gradients of one forward and backward pass, by name."""

    results: dict[str, Tensor]
    calls: dict[str, int]
    """Calls of each forward operator by op and back end, such as "linear/cpu"."""


def run(model: nn.Module, inputs: dict[str, Tensor], autocast: bool = False) -> Outcome:
    before = _forward_calls()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs, use_cache=False)
    output.loss.backward()
    # What a query of the padding gets is nobody's business, and differs between torch's own kernels.
    logits = output.logits
    if "attention_mask" in inputs and logits.shape[1] == inputs["attention_mask"].shape[1]:
        logits = logits[inputs["attention_mask"].bool()]
    results = {"loss": output.loss.detach(), "logits": logits.detach()}
    results |= {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    after = _forward_calls()
    return Outcome(results, {key: after[key] - before.get(key, 0) for key in after if after[key] > before.get(key, 0)})


def _exact_loss(logits, labels, vocab_size):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _forward_calls() -> dict[str, int]:
    return {
        f"{name}/{key.removeprefix('fwd/')}": count
        for name, op in REGISTRY.items()
        for key, count in op.calls.items()
        if key.startswith("fwd/")
    }


def deviations(found: Outcome, plain: Outcome, model: nn.Module, inputs: dict[str, Tensor], dtype) -> list[str]:
    """What the patched model computes more wrongly than the rule allows."""

    def evaluate(exact: nn.Module) -> dict[str, Tensor]:
        exact.loss_function = _exact_loss  # transformers' own rounds the logits to float32
        return run(exact, inputs).results

    return excesses(found.results, plain.results, model, evaluate, dtype)
