"""The hostile inputs of docs/reliability.md as a person meets them: damaged or planted files, a command, one sentence
with the value and the way out, exit code 2, and nothing lost."""

import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile

import pytest
import safetensors.torch
import torch
import zstandard
from tests.cli.scene import NEWER, SMALL, Marker, refusal

from warploom.checkpoint import format as fmt
from warploom.cli.main import main
from warploom.data import documents
from warploom.data.shards import TokenDataset


def nested(depth):
    return "[" * depth + "]" * depth


def tensor_file(header, payload=b""):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + payload


def entry(shape=(2,), offsets=(0, 8)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}


def truncate(path, size=None):
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def zip_bomb(scene):
    path = scene.folder / "weights.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", b"\0" * (1 << 20))
    return path


def torch_file(scene):
    path = scene.folder / "weights.pt"
    torch.save({"w": torch.zeros(4)}, path)
    return path


def archive_with_escapes(scene):
    path = scene.folder / "texts.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../escaped.txt", "/tmp/escaped.txt"):
            archive.addfile(tarfile.TarInfo(name))
    return path


def nan_weights(scene):
    weights = safetensors.torch.load_file(scene.newer / fmt.WEIGHTS)
    name = next(name for name, tensor in weights.items() if tensor.dim() == 2)
    weights[name][1, 2] = float("nan")
    digest = fmt.xxh3_128(weights[name].numpy().tobytes())  # before the file changes under the tensors mapped from it
    scene.forge(fmt.WEIGHTS, safetensors.torch.save(weights))
    scene.rewrite_manifest(lambda raw: raw["files"][fmt.WEIGHTS]["tensors"][name].update(xxh3_128=digest))
    return ["eval", scene.newer]


def eval_after(change, words):
    """A case: change the newer checkpoint, name it to `warploom eval`, and see it refused with these words."""

    def prepare(scene):
        change(scene)
        return ["eval", scene.newer]

    return prepare, words


def train_with(flags, words, change=lambda scene: None):
    def prepare(scene):
        change(scene)
        return scene.train(*(flags(scene) if callable(flags) else flags))

    return prepare, words


def tokenize(name, data, words, *flags):
    def prepare(scene):
        path = scene.plant(name, data)
        return ["tokenize", path, "--out", scene.folder / "tokens", "--vocab-size", "300", *flags]

    return prepare, words


def importing(make, words):
    def prepare(scene):
        return ["import", make(scene), scene.folder / "imported"]

    return prepare, words


def hugging_face(weights):
    """Make a folder as transformers writes it, with these bytes as weights."""

    def make(scene):
        folder = scene.folder / "model"
        folder.mkdir()
        config = dict(
            model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8,
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(weights(scene) if callable(weights) else weights)
        return folder

    return make


def pickled(scene):
    return pickle.dumps(Marker(scene.folder / "executed"))


def shard(scene):
    return next((scene.run / "data").glob("train-*.tokens"))


def damaged_shards(change, words):
    def prepare(scene):
        path = shard(scene)
        path.write_bytes(change(path.read_bytes()))
        return scene.train(data=scene.run / "data")

    return prepare, words


def forged_shards(scene):
    path = scene.run / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    name = shard(scene).name
    path.write_text(json.dumps(manifest).replace(json.dumps(name), json.dumps("../../tokenizer.pkl")))
    return scene.train(data=scene.run / "data")


def another_text(scene):
    shutil.copytree(scene.text, scene.folder / "text")
    (scene.folder / "text" / "3.txt").write_text("another text. " * 500)
    return scene.train(data=scene.folder / "text")


def shards_of_another_text(scene):
    tokens = scene.folder / "others"
    scene.plant("text.txt", "another text of other words. " * 500)
    argv = ["tokenize", str(scene.folder / "text.txt"), "--out", str(tokens)]
    assert main([*argv, "--tokenizer", str(scene.run / "data" / "tokenizer.json")]) == 0
    return scene.train(data=tokens)


# Row of the table, what it is -> how the scene is made and which command meets it, and what is said.
REFUSED = {
    (7, "a file in the place of the folder"): train_with(
        lambda scene: ["--train.out-dir", scene.text / "0.txt" / "run"],
        ["0.txt/run", "Not a directory", "name another folder"],
    ),
    (7, "a file system that takes no folders"): train_with(
        ["--train.out-dir", "/proc/run"], ["/proc/run", "name another folder"]
    ),
    (8, "flipped bit in a tensor"): eval_after(
        lambda scene: scene.flip(fmt.WEIGHTS), [NEWER, "model.safetensors", "tensor", "does not match its checksum"]
    ),
    (9, "flipped bit in a header"): eval_after(
        lambda scene: scene.flip(fmt.WEIGHTS, (scene.newer / fmt.WEIGHTS).stat().st_size - 9), ["model.safetensors"]
    ),
    (9, "flipped bit in the manifest"): eval_after(
        lambda scene: scene.flip(fmt.MANIFEST, 40), ["manifest.json", "does not match its checksum"]
    ),
    (10, "truncated"): eval_after(
        lambda scene: truncate(scene.newer / fmt.WEIGHTS), ["model.safetensors", "bytes, its manifest says"]
    ),
    (10, "empty"): eval_after(lambda scene: truncate(scene.newer / fmt.CONFIG, 0), ["config.json", "has 0 bytes"]),
    (10, "missing"): eval_after(
        lambda scene: (scene.newer / fmt.WEIGHTS).unlink(), ["model.safetensors", "is missing"]
    ),
    (14, "newer format"): eval_after(
        lambda scene: scene.rewrite_manifest(lambda raw: raw.update(version=99)), ["format version 99", "reads up to"]
    ),
    (15, "another width"): train_with(
        ["--model.d-model", "64"], ["model.d_model: 32 in the checkpoint, 64 now", "set them back"]
    ),
    (15, "another batch"): train_with(
        ["--train.global-batch-size", "16"], ["train.global_batch_size: 8 in the checkpoint, 16 now", "out_dir"]
    ),
    (16, "micro batches that do not divide"): train_with(
        ["--train.micro-batch-size", "3"], ["global_batch_size is 8", "micro_batch_size 3", "change one of them"]
    ),
    (18, "text changed since the save"): (another_text, ["tokens of another text", "the same text as then"]),
    (18, "token shards of another text"): (
        shards_of_another_text, ["position in the data was saved with fingerprint", "go on with the same data"]
    ),
    (31, "pickle as weights"): eval_after(
        lambda scene: scene.forge(fmt.WEIGHTS, pickled(scene)), ["model.safetensors", "is a pickle", "never opened"]
    ),
    (31, "pickle as a checkpoint"): (lambda scene: ["sample", torch_file(scene)], ["weights.pt is a file", "pickle"]),
    (31, "pickle as a tokenizer"): tokenize(
        "text.txt", "some text", ["tokenizer.pkl"], "--tokenizer", "tokenizer.pkl"
    ),
    (31, "pickle as a model of another framework"): importing(hugging_face(pickled), ["model.safetensors"]),
    (32, "header of 2^63 bytes"): importing(hugging_face(struct.pack("<Q", 2**63)), ["9223372036854775808"]),
    (32, "overlap"): importing(
        hugging_face(tensor_file({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12)), ["overlap", "'b'"]
    ),
    (32, "hole"): importing(hugging_face(tensor_file({"a": entry(offsets=(8, 16))}, b"\0" * 16)), ["hole", "'a'"]),
    (32, "negative dimension"): importing(hugging_face(tensor_file({"a": entry((-2, -1))}, b"\0" * 8)), ["[-2, -1]"]),
    (32, "shape overflow"): importing(
        hugging_face(tensor_file({"a": entry((2**32, 2**32, 4))}, b"\0" * 8)), ["in 8 bytes"]
    ),
    (32, "trailing bytes"): importing(hugging_face(tensor_file({"a": entry()}, b"\0" * 9)), ["accounts for"]),
    (33, "a tensor twice"): importing(
        hugging_face(tensor_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8)),
        ["'a' appears twice"],
    ),
    (34, "NaN in the weights"): (nan_weights, ["NaN or infinite", "has 1", "earlier checkpoint"]),
    (35, "a bomb of numpy's"): importing(zip_bomb, ["weights.npz", "neither"]),
    (35, "a .pt file"): importing(torch_file, ["weights.pt", "neither"]),
    (36, "a zstandard bomb"): tokenize(
        "bomb.jsonl.zst", zstandard.compress(b"\0" * (9 << 20), 19), ["bomb.jsonl.zst", "unfolds to more than"]
    ),
    (36, "a cut zstandard file"): tokenize(
        "cut.jsonl.zst", zstandard.compress(b'{"text": "abc"}\n' * 999)[:-9], ["cut.jsonl.zst is damaged or cut short"]
    ),
    (37, "an archive"): (
        lambda scene: ["tokenize", archive_with_escapes(scene), "--out", scene.folder / "tokens"],
        ["texts.tar is of an unknown kind", "known are"],
    ),
    (38, "a manifest that leads out"): eval_after(
        lambda scene: scene.rewrite_manifest(
            lambda raw: raw["files"].update({"../../x": raw["files"][fmt.STATE]})
        ),
        ["'../../x'", "lead out"],
    ),
    (38, "token shards that lead out"): (
        lambda scene: forged_shards(scene), ["outside its folder", "'../../tokenizer.pkl'", "tokenize again"]
    ),
    (39, "JSON nested 100,000 deep"): tokenize("a.jsonl", nested(100_000), ["a.jsonl:1", "nested too deeply", "skip"]),
    (39, "a number of 5,000 digits"): tokenize("a.jsonl", '{"text": ' + "9" * 5000 + "}", ["a.jsonl:1", "skip"]),
    (39, "NaN"): tokenize("a.jsonl", '{"text": NaN}', ["a.jsonl:1", "NaN, which is not JSON"]),
    (39, "a key twice"): tokenize("a.jsonl", '{"text": "a", "text": "b"}', ["a.jsonl:1", "'text' twice"]),
    (39, "a lone surrogate"): tokenize("a.jsonl", r'{"text": "a\ud800"}', ["a.jsonl:1", "lone surrogate"]),
    (40, "not UTF-8"): tokenize("a.txt", b"abc\xff", ["a.txt is not UTF-8 at byte 3 (0xff)", "on-bad-utf8"]),
    (40, "a document without end"): tokenize("a.jsonl", '{"text": "' + "a" * 5000, ["longer than 4096 bytes", "split"]),
    (43, "a token that the tokenizer does not have"): damaged_shards(
        lambda data: data[: len(data) // 2] + b"\xff" * (len(data) - len(data) // 2),
        ["the training split holds the token 65535", "from 0 to 2", "tokenize again"],
    ),
    (44, "token shard of another kind"): damaged_shards(
        lambda data: b"GIF89a.." + data[8:], ["is no token file", "GIF89a", "tokenize again"]
    ),
    (44, "token shard with an odd byte"): damaged_shards(lambda data: data + b"\0", ["tokens need", "tokenize again"]),
    (44, "token shard cut short"): damaged_shards(lambda data: data[:10], ["cut short", "10 bytes", "tokenize again"]),
    (45, "an empty file"): tokenize("a.txt", b"", ["a.txt is empty"]),
    (45, "no text in the file"): tokenize("a.jsonl", '{"text": ""}\n', ["no text found", "1 empty"]),
    (45, "text shorter than a sequence"): (
        lambda scene: [
            *("train", "--data", scene.plant("short.txt", "ab cd. " * 40), "--train.out-dir", scene.folder / "new"),
            *SMALL,
        ],
        ["too little text", "give more text"],
    ),
    (52, "an unknown verb"): (lambda scene: ["trian"], ["no verb 'trian'", "did you mean 'train'"]),
    (52, "a file that is no TOML"): (
        lambda scene: ["train", "--config", scene.plant("run.toml", "[train\n")],
        ["run.toml", "not valid TOML", "line 1"],
    ),
    (52, "a value out of range"): train_with(["--train.save-every", "0"], ["train.save_every is 0", "give 1 or more"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {case[1]}")
def test_refused_in_one_sentence_and_nothing_lost(case, scene, capsys, monkeypatch):
    monkeypatch.setattr(documents, "EXPANSION_FLOOR_BYTES", 1 << 20)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 4096 if case[1] == "a document without end" else 1 << 20)
    monkeypatch.chdir(scene.folder)
    (scene.folder / "tokenizer.pkl").write_bytes(pickled(scene))
    prepare, words = REFUSED[case]
    argv = prepare(scene)
    before = scene.digests()
    said = refusal(argv, capsys)
    for word in words:
        assert word in said
    after = scene.digests()
    assert {path: after.get(path) for path in before} == before
    assert not (scene.folder / "executed").exists()  # the planted pickle
    assert not (scene.folder / "tokens" / "manifest.json").exists()


BAD_LINES = [
    nested(100_000), '{"text": ' + "9" * 5000 + "}", '{"text": NaN}', '{"text": "a", "text": "b"}',
    r'{"text": "a\ud800"}', "[]", "{", '{"text": 3}', '{"other": "x"}', '{"text": "' + "a" * 5000 + '"}', "\0",
]  # fmt: skip


def test_bad_lines_are_skipped_and_counted_if_asked(scene, capsys, monkeypatch):
    """Row 39."""
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 4096)
    good = [json.dumps({"text": f"document {number} of words. " * 20}) for number in range(40)]
    lines = [line for pair in zip(BAD_LINES, good, strict=False) for line in pair] + good[len(BAD_LINES) :]
    path, out = scene.plant("mixed.jsonl", "\n".join(lines)), scene.folder / "tokens"
    argv = ["tokenize", str(path), "--out", str(out), "--vocab-size", "300"]
    refusal(argv, capsys)
    assert main([*argv, "--on-bad-line", "skip"]) == 0
    dataset = TokenDataset(out)
    assert dataset.manifest["documents_read"] == len(good)
    assert sum(dataset.manifest["documents_left_out"].values()) == len(BAD_LINES)
    assert "left out" in capsys.readouterr().out


def test_strange_text_is_text(scene):
    """Rows 40 and 42: a mark at the beginning is dropped; NUL, controls of direction and the spelling of a control
    token come back as they were."""
    text = "a\0b \u202egnol\u202c <|endoftext|> \U0001f642 \r\n" * 3000
    path, out = scene.plant("strange.txt", "\ufeff" + text), scene.folder / "tokens"
    assert main(["tokenize", str(path), "--out", str(out), "--vocab-size", "300"]) == 0
    dataset = TokenDataset(out)
    assert dataset.train.num_bytes + dataset.heldout.num_bytes == len(text.encode())
    ids = dataset.tokenizer.encode(text)
    assert dataset.tokenizer.eos_id not in ids and dataset.tokenizer.decode(ids) == text
