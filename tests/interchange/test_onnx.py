"""The ONNX graph against the model itself, run by ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch

from warploom.errors import UserError
from warploom.interchange.onnx import export_onnx
from warploom.models import Transformer, TransformerConfig

SMALL = {"vocab_size": 29, "max_seq_len": 24, "d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 20}
CASES = {
    "llama": dict(activation="swiglu", norm="rms_norm", num_kv_heads=2, tie_embeddings=False),
    "gpt2": dict(position="learned", activation="gelu_tanh", bias=True),
    "falcon": dict(activation="gelu", parallel_block=True, num_kv_heads=1),
    "falcon-180b": dict(activation="relu2", parallel_block=True, parallel_norms=2, num_kv_heads=2),
    "alibi": dict(position="alibi", activation="silu"),
    "no-position": dict(position="none", norm_bias=False),
    "t5": dict(architecture="encoder-decoder", position="t5", norm="rms_norm", activation="geglu", head_dim=8),
    "bart": dict(
        architecture="encoder-decoder", position="learned", norm_position="post", embedding_norm=True, bias=True
    ),
    "marian": dict(
        architecture="encoder-decoder",
        position="sinusoidal",
        norm_position="post",
        bias=True,
        output_bias=True,
        scale_embedding=True,
        source_vocab_size=31,
    ),
    "bert": dict(architecture="encoder", position="learned", norm_position="post", embedding_norm=True, bias=True),
    "rotary-encoder": dict(architecture="encoder"),
}


def build(name):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SMALL, **CASES[name]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_runtime_gives_the_models_numbers(name, tmp_path):
    model = build(name)
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for B, T in ((2, 7), (1, 24)):
        tokens, lengths = torch.randint(29, (B, T)), torch.tensor([T, 4][:B])
        feeds = {"tokens": tokens.numpy()}
        if model.config.architecture == "encoder":
            feeds["lengths"] = lengths.numpy()
            expected = model(tokens, lengths=lengths)
            real = np.arange(T) < lengths.numpy()[:, None]
        else:
            arguments = {}
            if model.config.architecture == "encoder-decoder":
                source = torch.randint(29, (B, T))
                feeds |= {"source": source.numpy(), "source_lengths": lengths.numpy()}
                arguments = {"source": source, "source_lengths": lengths}
            expected, real = model.logits(model(tokens, **arguments)), np.ones((B, T), bool)
        (found,) = session.run(None, feeds)
        np.testing.assert_allclose(found[real], expected.numpy()[real], atol=1e-4, rtol=0)
        assert expected.abs().max() > 0.5


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="exists already"):
        export_onnx(build("gpt2"), tmp_path / "model.onnx")
