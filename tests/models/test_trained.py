"""Real trained weights, loaded by name: a Llama-like decoder and an encoder-decoder, against recorded outputs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from warploom.models import Transformer, TransformerConfig

LLAMA_NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers": "stack.blocks",
    "model.norm": "stack.norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn": "attention",
    "mlp": "feed_forward",
}


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data / "models" / "stories260K"
    config = TransformerConfig(
        vocab_size=512,
        max_seq_len=512,
        d_model=64,
        num_layers=5,
        num_heads=8,
        num_kv_heads=4,
        d_ff=172,
        activation="swiglu",
        norm="rms_norm",
        norm_eps=1e-5,
    )
    state = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        for theirs, ours in LLAMA_NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = weight
    model = Transformer(config)
    model.load_state_dict(state)
    return model.eval(), json.loads((folder / "reference.json").read_text())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-6), (torch.float32, 5e-5)])
@torch.no_grad()
def test_stories260k_logits(stories, dtype, tolerance):
    model, reference = stories
    model.to(dtype).compute_dtype = dtype
    ids = torch.tensor([reference["greedy_ids"]])
    logits = model.logits(model(ids))[0]
    for position, name in ((0, "logits_first_position"), (-1, "logits_last_position")):
        expected = torch.tensor(reference[name], dtype=dtype)  # recorded to six decimals
        torch.testing.assert_close(logits[position], expected, rtol=tolerance, atol=tolerance)
    assert logits[:-1].argmax(-1).tolist() == reference["greedy_ids"][1:]
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(reference["mean_nll_of_greedy_ids"], abs=tolerance)


@torch.no_grad()
def test_stories260k_in_bfloat16(stories):
    model, reference = stories
    model.float().compute_dtype = torch.bfloat16
    ids = torch.tensor([reference["greedy_ids"]])
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(reference["mean_nll_of_greedy_ids"], abs=0.01)


@pytest.fixture(scope="module")
def transliterator(shared_data):
    """The model, the bias of its output layer (ours has none), its two vocabularies, the recorded cases."""
    folder = shared_data / "models" / "aren-transliteration"
    weights = load_file(folder / "model.safetensors")
    config = TransformerConfig(
        architecture="encoder-decoder",
        vocab_size=43,
        source_vocab_size=51,
        max_seq_len=64,
        d_model=32,
        num_layers=6,
        num_heads=8,
        d_ff=128,
        position="learned",
        bias=True,
        tie_embeddings=False,
        scale_embedding=True,
    )
    # Its sinusoids begin at position 1 and end at exactly 1 / 10000: not ours, so they are loaded as a table.
    angles = torch.arange(1, 65)[:, None] * 10000.0 ** (-torch.arange(16) / 15)
    table = torch.cat([angles.sin(), angles.cos()], -1)
    state = {
        "embedding.weight": weights["decoder/embeddings/weight"],
        "source_embedding.weight": weights["encoder/embeddings/weight"],
        "encoder.position.table.weight": table,
        "stack.position.table.weight": table,
        "lm_head.weight": weights["decoder/projection/weight"],
    }

    def norm(ours, theirs):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weights[f"{theirs}/gamma"], weights[f"{theirs}/beta"]

    def linear(ours, theirs):
        for end in ("weight", "bias"):
            parts = weights[f"{theirs}/{end}"].chunk(len(ours))
            state.update({f"{name}.{end}": part for name, part in zip(ours, parts, strict=True)})

    for ours, theirs in (("encoder", "encoder"), ("stack", "decoder")):
        norm(f"{ours}.norm", f"{theirs}/layer_norm")
        for i in range(6):
            block, layer = f"{ours}.blocks.{i}", f"{theirs}/layer_{i}"
            norm(f"{block}.attention_norm", f"{layer}/self_attention/layer_norm")
            linear([f"{block}.attention.{part}_proj" for part in "qkv"], f"{layer}/self_attention/linear_0")
            linear([f"{block}.attention.o_proj"], f"{layer}/self_attention/linear_1")
            norm(f"{block}.feed_forward_norm", f"{layer}/ffn/layer_norm")
            linear([f"{block}.feed_forward.up_proj"], f"{layer}/ffn/linear_0")
            linear([f"{block}.feed_forward.down_proj"], f"{layer}/ffn/linear_1")
            if theirs == "decoder":
                norm(f"{block}.cross_attention_norm", f"{layer}/attention/layer_norm")
                linear([f"{block}.cross_attention.q_proj"], f"{layer}/attention/linear_0")
                linear([f"{block}.cross_attention.{part}_proj" for part in "kv"], f"{layer}/attention/linear_1")
                linear([f"{block}.cross_attention.o_proj"], f"{layer}/attention/linear_2")
    model = Transformer(config)
    model.load_state_dict(state)
    vocabularies = [
        (folder / f"{side}_vocabulary.txt").read_text(encoding="utf-8").split("\n") for side in ("source", "target")
    ]
    cases = json.loads((folder / "reference.json").read_text())["cases"]
    return model.eval(), weights["decoder/projection/bias"], *vocabularies, cases


@torch.no_grad()
def test_transliteration(transliterator):
    """All recorded words in one padded batch: each greedy token is the most likely one, with its log-probability."""
    model, output_bias, source_vocabulary, target_vocabulary, cases = transliterator
    sources = [torch.tensor([source_vocabulary.index(piece) for piece in case["source"]]) for case in cases]
    targets = [torch.tensor([1, *map(target_vocabulary.index, case["greedy"]), 2]) for case in cases]
    source, target = (torch.nn.utils.rnn.pad_sequence(ids, batch_first=True) for ids in (sources, targets))
    assert len({len(ids) for ids in sources}) > 1
    hidden = model(target[:, :-1], source=source, source_lengths=torch.tensor([len(ids) for ids in sources]))
    log_probs = F.log_softmax(model.logits(hidden) + output_bias, -1)
    for row, ids, case in zip(log_probs, targets, cases, strict=True):
        row = row[: len(ids) - 1]
        assert row.argmax(-1).tolist() == ids[1:].tolist()
        found = row.gather(1, ids[1:, None])[:, 0].tolist()
        assert found == pytest.approx(case["greedy_token_logprobs"], abs=5e-6)
        assert not math.isclose(sum(found), 0.0, abs_tol=0.1)  # a control: the words are not certain
