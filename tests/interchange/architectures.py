"""Small random models of transformers, one per architecture and variant that can be imported."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor, nn

V = 96
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
START = dict(decoder_start_token_id=0)
WIDTH = dict(d_model=32, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=V)
LAYERS = dict(encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=V, max_position_embeddings=40)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V)
OPT = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
T5 = dict(d_model=32, d_kv=12, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=2, vocab_size=V)
MARIAN = dict(activation_function="swish", scale_embedding=True, forced_eos_token_id=None)

ARCHITECTURES = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**TOKENS, **LLAMA, num_key_value_heads=2, max_position_embeddings=40)
    ),
    "llama-tied-wide-heads": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **TOKENS,
            **LLAMA,
            **dict(head_dim=16, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=40, vocab_size=V)
    ),
    "gpt2-untied": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **TOKENS,
            **dict(n_embd=32, n_layer=2, n_head=2, n_positions=40, vocab_size=V, n_inner=40),
            tie_word_embeddings=False,
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**TOKENS, **OPT, vocab_size=V, max_position_embeddings=40)),
    "opt-post-norm": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **TOKENS,
            **OPT,
            **dict(vocab_size=V, max_position_embeddings=40, do_layer_norm_before=False, enable_bias=False),
        )
    ),
    "falcon-7b": lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON)),
    "falcon-40b": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon-11b": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)
    ),
    "falcon-serial": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, bias=True)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**TOKENS, **START, **T5)),
    "t5-1.1": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**TOKENS, **START, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**TOKENS, **START, **WIDTH, **LAYERS, forced_eos_token_id=None)
    ),
    "marian": lambda: hf.MarianMTModel(
        hf.MarianConfig(**TOKENS, **START, **WIDTH, **LAYERS, **MARIAN, decoder_vocab_size=V)
    ),
    "marian-two-vocabularies": lambda: hf.MarianMTModel(
        hf.MarianConfig(
            **TOKENS,
            **START,
            **{**WIDTH, "vocab_size": 70},
            **LAYERS,
            **MARIAN,
            **dict(decoder_vocab_size=V, share_encoder_decoder_embeddings=False),
        )
    ),
    "bert": lambda: hf.BertModel(
        hf.BertConfig(
            **dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=V),
            max_position_embeddings=40,
        )
    ),
}


def _untied_t5() -> nn.Module:
    """As the published T5 1.1: an output layer of its own, which transformers 5 ties only if the file has none."""
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(**TOKENS, **START, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    )
    model.lm_head.weight = nn.Parameter(torch.randn(V, 32))
    return model


ARCHITECTURES["t5-1.1-untied"] = _untied_t5


def build(name: str) -> nn.Module:
    """The same model at every call, every weight random: those that start at 0 or 1 are moved off it."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # not Marian's sinusoids
                parameter += 0.1 * torch.randn_like(parameter)
        if name.startswith("marian"):
            model.final_logits_bias.normal_()
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Tokens that every one of the models knows: (2, 11) to read, (2, 9) to write."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randint(3, 70, shape, generator=generator)  # noqa: E731
    return {"tokens": draw(2, 11), "targets": draw(2, 9)}


@torch.no_grad()
def their_output(model: nn.Module) -> Tensor:
    """Logits, or the hidden states of an encoder."""
    inputs = batch()
    if isinstance(model, hf.BertModel):
        return model(input_ids=inputs["tokens"]).last_hidden_state
    if model.config.is_encoder_decoder:
        return model(input_ids=inputs["tokens"], decoder_input_ids=inputs["targets"]).logits
    return model(input_ids=inputs["tokens"]).logits


@torch.no_grad()
def our_output(model: nn.Module) -> Tensor:
    inputs = batch()
    if model.config.architecture == "encoder":
        return model(inputs["tokens"])
    if model.config.architecture == "encoder-decoder":
        return model.logits(model(inputs["targets"], source=inputs["tokens"]))
    return model.logits(model(inputs["tokens"]))
