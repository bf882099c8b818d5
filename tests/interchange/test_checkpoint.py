"""Checkpoints of ours out and in again, as the verbs do it, with tokenizer and chat template."""

import json

import pytest
import tokenizers
import torch
import transformers

from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.save import save_checkpoint
from warploom.cli.main import main
from warploom.data.chat import TEMPLATES
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.interchange.checkpoint import export_checkpoint, import_checkpoint
from warploom.models import Transformer, TransformerConfig
from warploom.train.config import RunConfig, TrainConfig
from warploom.train.load_model import CHAT_TEMPLATE, load_model

MESSAGES = [{"role": "user", "content": "to be?"}, {"role": "assistant", "content": "or not"}]
TEXT = "to be 42 times\n\n\tnaive caf\u00e9"


@pytest.fixture
def checkpoint(tmp_path):
    """A run folder of a small chat model of random weights."""
    tokenizer = Tokenizer.train(["to be or not to be, that is the question. 42 42"] * 3, 300)
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            **dict(max_seq_len=32, d_model=64, num_layers=2, num_heads=4, activation="swiglu", norm="rms_norm"),
        )
    )
    config = RunConfig(model=model.config, train=TrainConfig(out_dir=tmp_path / "run", seq_len=32))
    meta = {"config": config.to_dict(), CHAT_TEMPLATE: TEMPLATES["turns"]}
    state = CheckpointState(step=3, weights=model.state_dict(), meta=meta, tokenizer=tokenizer.to_bytes())
    save_checkpoint(tmp_path / "run", state)
    return tmp_path / "run"


@torch.no_grad()
def logits(loaded):
    return loaded.model.logits(loaded.model(torch.arange(20)[None]))


@pytest.mark.parametrize("form, name", [("hf", "folder"), ("gguf", "model.gguf")])
def test_a_checkpoint_comes_back_with_tokenizer_and_chat_template(form, name, checkpoint, tmp_path):
    before = load_model(checkpoint)
    said = []
    written = export_checkpoint(checkpoint, tmp_path / name, form)
    after = load_model(import_checkpoint(written, tmp_path / "again", on_message=said.append))
    assert said == []
    torch.testing.assert_close(logits(after), logits(before), atol=1e-6, rtol=0)
    assert after.tokenizer.encode(TEXT) == before.tokenizer.encode(TEXT)
    assert after.tokenizer.eos_id == before.tokenizer.eos_id
    chats = [each.chat_template.encode(each.tokenizer, MESSAGES) for each in (before, after)]
    assert chats[0] == chats[1] and any(chats[0].is_answer)


def test_transformers_reads_tokenizer_and_template(checkpoint, tmp_path):
    loaded = load_model(checkpoint)
    theirs = transformers.AutoTokenizer.from_pretrained(export_checkpoint(checkpoint, tmp_path / "hf", "hf"))
    assert theirs(TEXT).input_ids == loaded.tokenizer.encode(TEXT)
    assert theirs.eos_token_id == theirs.bos_token_id == loaded.tokenizer.eos_id
    chat = loaded.chat_template.encode(loaded.tokenizer, MESSAGES)
    assert theirs.apply_chat_template(MESSAGES)["input_ids"] == chat.ids


def test_the_marks_of_a_foreign_tokenizer_are_in_its_chats(tmp_path, checkpoint):
    """bos_token and eos_token of a template are those of the tokenizer, whatever they are called."""
    loaded = load_model(checkpoint)
    library = tokenizers.Tokenizer.from_str(loaded.tokenizer.library_json().decode().replace("<|endoftext|>", "</s>"))
    library.add_special_tokens(["<s>"])
    bos_id = library.token_to_id("<s>")
    tokenizer = Tokenizer.adopt(library.to_str(), eos_id=loaded.tokenizer.eos_id, bos_id=bos_id)
    chat = loaded.chat_template.encode(tokenizer, MESSAGES)
    assert (
        chat.ids[0] == bos_id and [token for token, own in zip(chat.ids, chat.is_answer, strict=True) if own][-1] == 0
    )
    assert tokenizer.begin_ids == () and tokenizer.token(0) == "</s>"


def test_a_template_that_cannot_be_used_is_left_out_by_name(checkpoint, tmp_path):
    folder = export_checkpoint(checkpoint, tmp_path / "hf", "hf")
    settings = folder / "tokenizer_config.json"
    for number, template in enumerate(("{% for", "{{ messages[0].content }}", "{% for m in messages %}x{% endfor %}")):
        settings.write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": template}))
        said = []
        again = load_model(import_checkpoint(folder, tmp_path / str(number), on_message=said.append))
        assert again.chat_template is None
        (message,) = said
        assert message.startswith("Its chat template is left out: ")


def test_the_verbs(checkpoint, tmp_path, capsys):
    for form, name in (("hf", "folder"), ("gguf", "model.gguf"), ("onnx", "model.onnx")):
        assert main(["export", str(checkpoint), str(tmp_path / name), "--format", form]) == 0
        assert main(["export", str(checkpoint), str(tmp_path / name), "--format", form]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "folder"), str(tmp_path / "in")]) == 0
    assert "300 tokens" not in (said := capsys.readouterr().out) and "decoder" in said
    assert main(["sample", str(tmp_path / "in"), "--chat", "--prompt", "to be", "--max-new-tokens", "3"]) == 0
    assert main(["import", str(tmp_path / "model.onnx"), str(tmp_path / "no")]) == 2
    assert "neither a folder with a config.json nor" in capsys.readouterr().err


def test_what_is_there_already_stays(checkpoint, tmp_path):
    folder = export_checkpoint(checkpoint, tmp_path / "hf", "hf")
    with pytest.raises(UserError, match="already holds step-00000003"):
        import_checkpoint(folder, checkpoint)
