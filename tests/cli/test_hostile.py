"""The hostile inputs and faults of docs/reliability.md as a person meets them: a command, damaged or planted files, one
sentence with the value and the way out, exit code 2, and nothing lost. What needs processes that die, kernels or a
server is tested beside its source; the page says where."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zstandard

from warploom.checkpoint import format as fmt
from warploom.checkpoint import save
from warploom.checkpoint.lock import FolderLock
from warploom.cli.main import main
from warploom.data import documents
from warploom.data.shards import TokenDataset
from warploom.train import trainer

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.max-seq-len", "32", "--train.seq-len", "32", "--train.global-batch-size", "8"),
    *("--train.micro-batch-size", "8", "--train.save-every", "2", "--train.keep-best", "0", "--train.device", "cpu"),
]
OLDER, NEWER = "step-00000002", "step-00000004"


class Marker:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


class Scene:
    """A run of four steps with two checkpoints, its text, and a folder for what is planted."""

    def __init__(self, folder, run, text):
        self.folder, self.run, self.text = folder, folder / "run", text
        shutil.copytree(run, self.run)

    @property
    def newer(self):
        return self.run / NEWER

    def train(self, *flags, steps=6, data=None):
        return [
            *("train", "--data", str(data or self.text), "--train.out-dir", str(self.run), "--train.steps", str(steps)),
            *SMALL,
            *flags,
        ]

    def plant(self, name, data):
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def flip(self, name, from_end=1):
        """Flip a bit of a file of the newer checkpoint."""
        path = self.newer / name
        data = bytearray(path.read_bytes())
        data[-from_end] ^= 4
        path.write_bytes(data)

    def forge(self, name, data):
        """Give the newer checkpoint a file that its manifest vouches for, as an adversary would."""
        (self.newer / name).write_bytes(data)
        record = {"size": len(data), "xxh3_128": fmt.xxh3_128(data)}
        self.rewrite_manifest(lambda raw: raw["files"][name].update(record))

    def rewrite_manifest(self, change):
        raw = json.loads((self.newer / fmt.MANIFEST).read_text())
        change(raw)
        data = json.dumps(raw).encode()
        (self.newer / fmt.MANIFEST).write_bytes(data)
        (self.newer / fmt.MANIFEST_DIGEST).write_bytes(fmt.manifest_digest_line(data))

    def digests(self):
        """The files of the scene and what is in them; what a run writes as it goes along does not count."""
        passing = (".lock", "metrics.jsonl", "tensorboard")
        return {
            path.relative_to(self.folder): hashlib.sha256(path.read_bytes()).digest()
            for path in self.folder.rglob("*")
            if path.is_file() and not any(part in passing for part in path.parts)
        }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    words = ["".join(draw.choices("abdegiklmou", k=draw.randint(2, 7))) for _ in range(200)]
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        lines = (" ".join(draw.choices(words, k=12)) + "." for _ in range(40))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    argv = ["train", "--data", str(text), "--train.out-dir", str(out), "--train.steps", "4", *SMALL]
    assert main(argv) == 0
    assert {OLDER, NEWER} <= set(os.listdir(out))
    return out


@pytest.fixture
def scene(tmp_path, trained, text):
    return Scene(tmp_path, trained, text)


def refusal(argv, capsys):
    """Run a command that must refuse, and return what it said, which must be one line."""
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warploom: "), lines
    assert len(lines[0]) < 1200
    return lines[0]


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


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, scene, capsys):
    """Rows 8 to 10, where a run is named and not a checkpoint; the control is the run as it was."""
    assert main(["eval", str(scene.run)]) == 0
    output = capsys.readouterr()
    assert NEWER in output.out and output.err == ""
    weights = scene.newer / fmt.WEIGHTS
    {"flip": lambda: scene.flip(fmt.WEIGHTS), "truncate": lambda: truncate(weights), "remove": weights.unlink}[damage]()
    before = scene.digests()
    assert main(["eval", str(scene.run)]) == 0
    output = capsys.readouterr()
    assert OLDER in output.out
    assert len(output.err.splitlines()) == 1
    assert "skipped a checkpoint" in output.err and NEWER in output.err and fmt.WEIGHTS in output.err
    assert scene.digests() == before


@pytest.fixture
def small_files():
    """No file may grow beyond the bytes that are set; the kernel refuses the write with EFBIG."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_is_full(scene, capsys, small_files):
    """Row 5: the run goes on past the checkpoint that cannot be saved, and ends in words on the last."""
    before = scene.digests()
    small_files(40_000)
    said = refusal(scene.train(steps=8), capsys)
    small_files(resource.RLIM_INFINITY)
    assert f"step 8 could not be saved in {scene.run}: File too large (EFBIG)" in said
    assert re.search(r"it needs [\d,]+ bytes and [\d,]+ are free; step-00000004 is kept; make room", said)
    records = [json.loads(line) for line in (scene.run / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records) == 8  # step 6, the first to be saved, did not end it
    assert scene.digests() == before
    assert main(scene.train(steps=8)) == 0  # the control, and the way out
    assert "Going on from step 4" in capsys.readouterr().out


def test_an_input_output_error(scene, capsys, monkeypatch):
    """Row 6: one is retried without a word; those that last are said."""
    calls = []

    def failing(times):
        def write(fd, data):
            calls.append(fd)
            if len(calls) <= times:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.write(fd, data)

        return write

    before = scene.digests()
    monkeypatch.setattr(save, "_write", failing(10**9))
    said = refusal(scene.train(), capsys)
    assert len(calls) == 2 and "Input/output error (EIO)" in said and "step-00000004 is kept" in said
    assert scene.digests() == before
    calls.clear()
    monkeypatch.setattr(save, "_write", failing(1))
    assert main(scene.train()) == 0 and len(calls) > 2
    assert (scene.run / "step-00000006").is_dir()


def test_what_a_dead_run_left_is_swept(scene):
    """Row 11. No process has the highest id that there is."""
    dead = Path("/proc/sys/kernel/pid_max").read_text().strip()
    left = [scene.run / f".tmp-step-00000006-{dead}", scene.run / f".trash-step-00000002-{dead}"]
    for folder in left:
        folder.mkdir()
        (folder / fmt.WEIGHTS).write_bytes(b"half of it")
    assert main(["eval", str(scene.run)]) == 0
    assert main(scene.train()) == 0
    assert not any(folder.exists() for folder in left)
    assert (scene.run / "step-00000006" / fmt.WEIGHTS).is_file()


def test_two_trainers_in_one_folder(scene, capsys):
    """Row 12."""
    before = scene.digests()
    with FolderLock(scene.run):
        assert f"in use by process {os.getpid()}; stop it or choose another folder" in refusal(scene.train(), capsys)
    assert scene.digests() == before
    assert main(scene.train()) == 0


def test_a_clock_that_was_set_back(scene, capsys):
    """Row 13: the newest is that of the highest step."""
    os.utime(scene.newer, (0, 0))
    assert main(["eval", str(scene.run)]) == 0
    assert "step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel.tensor", "3"], ["tensor 3 = 3 does not divide the 8 processes", "give parallel.tensor 8"]),
        (["--parallel.tensor", "8"], ["2 key/value heads", "give parallel.tensor 2 or less"]),
        (["--parallel.data", "4", "--parallel.shard", "4"], ["= 16 does not fill the 8", "start 16 processes"]),
        (["--train.global-batch-size", "4", "--train.micro-batch-size", "1"], ["data 8", "give 8 or more"]),
    ],
)
def test_other_numbers_of_processes(flags, words, scene, capsys, monkeypatch):
    """Row 16."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    before = scene.digests()
    said = refusal(scene.train(*flags), capsys)
    assert all(word in said for word in words), said
    assert scene.digests() == before


def test_another_number_of_threads_is_said(scene, capsys):
    """Row 17."""
    threads = torch.get_num_threads()
    try:
        assert main(scene.train("--train.threads", str(threads + 1))) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert f"perhaps not bit for bit, since the machine differs: threads {threads} then, {threads + 1} now" in said


def test_a_port_that_is_taken(scene, capsys):
    """Row 24."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        said = refusal(["serve", scene.run, "--port", port], capsys)
    assert str(port) in said


def test_a_signal_to_stop(scene, capsys, monkeypatch):
    """Row 27; a second one is sent in tests/train/test_resume.py."""
    step = trainer.training_step

    def signalled(*arguments, **named):
        outcome = step(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(trainer, "training_step", signalled)
    assert main(scene.train(steps=50)) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "training_step", step)
    assert main(scene.train(steps=6)) == 0
    assert "Going on from step 5" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--model.d-modl", "3"], ["--model.d-modl", "--model.d-model"]),
        (["train", "--model.d-model", "wide"], ["--model.d-model", "wide"]),
        (["train", "--train.dtype", "fp64"], ["fp64", "bf16"]),
    ],
)
def test_unknown_flags_and_wrong_types(argv, words, capsys):
    """Row 52: the parser's own words, over several lines."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
