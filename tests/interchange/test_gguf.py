"""GGUF files out and in again, with their tokenizer."""

import pytest
import torch

from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.interchange.gguf import export_gguf, import_gguf
from warploom.models import Transformer, TransformerConfig

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 64, "num_layers": 2, "num_heads": 4}
LLAMA = dict(activation="swiglu", norm="rms_norm", num_kv_heads=2, d_ff=96)
GPT2 = dict(position="learned", activation="gelu_tanh", bias=True)


def build(**fields):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SMALL, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model):
    return model.logits(model(torch.arange(20)[None]))


@pytest.mark.parametrize(
    "fields", [LLAMA, {**LLAMA, "tie_embeddings": False, "bias": True, "head_dim": 8, "rotary_base": 5e4}, GPT2]
)
def test_a_model_comes_back_as_it_was(fields, tmp_path):
    model = build(**fields)
    again, tokenizer = import_gguf(export_gguf(model, tmp_path / "model.gguf"))
    assert tokenizer is None
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    for name in ("max_seq_len", "d_ff", "norm_eps", "rotary_base"):
        assert getattr(again.config, name) == pytest.approx(getattr(model.config, name)) or name == "d_ff"


def test_queries_are_stored_for_neighbouring_pairs(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = build(**LLAMA)
    reader = gguf.GGUFReader(export_gguf(model, tmp_path / "model.gguf"))
    (stored,) = (tensor.data for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    ours = model.stack.blocks[0].attention.q_proj.weight.detach().numpy()
    # Head 1, pair 3 of 8: rows 16 + 3 and 16 + 3 + 8 here, neighbours there.
    assert (stored[16 + 6] == ours[16 + 3]).all() and (stored[16 + 7] == ours[16 + 11]).all()


@pytest.mark.parametrize("precision, error", [("f16", 2e-3), ("q8_0", 2e-2)])
def test_smaller_files_are_close(precision, error, tmp_path):
    model = build(**LLAMA)
    whole, small = (
        export_gguf(model, tmp_path / "f32.gguf"),
        export_gguf(model, tmp_path / "s.gguf", precision=precision),
    )
    assert small.stat().st_size < whole.stat().st_size
    found = import_gguf(small)[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert (found[name] - tensor).abs().max() <= error * tensor.abs().max(), name
        assert tensor.dim() == 1 or not torch.equal(found[name], tensor)


def test_the_tokenizer_goes_along(tmp_path):
    own = Tokenizer.train(["to be or not to be, that is the question. 42 42"] * 3, 300)
    text = "to be 42 times\n\tnaive caf\u00e9 <|endoftext|>"
    adopted = Tokenizer.adopt(own.library_json().decode(), eos_id=own.eos_id, begin_ids=[], chat_template="{{ x }}")
    for tokenizer in (own, adopted):
        path = export_gguf(build(**LLAMA), tmp_path / f"{len(tokenizer.begin_ids)}.gguf", tokenizer=tokenizer)
        found = import_gguf(path)[1]
        assert found.encode(text) == tokenizer.encode(text) and found.decode(found.encode(text)) == text
        assert (found.eos_id, found.begin_ids) == (tokenizer.eos_id, tokenizer.begin_ids)
        assert found.chat_template == tokenizer.chat_template


def test_what_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="llama cannot have position 'alibi'; gpt2 cannot have position 'alibi'"):
        export_gguf(build(position="alibi"), tmp_path / "model.gguf")
    path = export_gguf(build(**LLAMA), tmp_path / "model.gguf")
    with pytest.raises(UserError, match="exists already"):
        export_gguf(build(**LLAMA), path)
    data = path.read_bytes()
    for size in (0, 3, 20, 400, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="is no whole GGUF file"):
            import_gguf(path)
    name = (5).to_bytes(8, "little") + b"llama"  # the architecture, a text of five bytes
    path.write_bytes(data.replace(name, name[:8] + b"lmxma", 1))
    with pytest.raises(UserError, match="'lmxma' model"):
        import_gguf(path)
    with pytest.raises(UserError, match="cannot be read"):
        import_gguf(tmp_path / "absent.gguf")
