"""A trained run and its text, for the tests of hostile inputs and faults to damage, and what a refusal looks like."""

import hashlib
import json
import os
import shutil

from warploom.checkpoint import format as fmt
from warploom.cli.main import main

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


def refusal(argv, capsys):
    """Run a command that must refuse, and return what it said, which must be one line."""
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warploom: "), lines
    assert len(lines[0]) < 1200
    return lines[0]
