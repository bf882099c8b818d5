"""The parsers of files that may come from anywhere, each with a sound input, what it may raise, and what must hold of
all that it takes.

Run as a program: argv[1] inputs of a seed, argv[2], to each parser in turn; prints how many each has seen and taken. A
process apart, with a limit to its memory and to the time of an input: a crash, a hang and an allocation without bound
are an exit code.
"""

import io
import json
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import torch
from tests.fuzz.mutations import changed_bytes, changed_json, encoded

from warploom.checkpoint.format import FileRecord, Manifest, TensorRecord, encode_manifest, parse_manifest
from warploom.checkpoint.tensors import build_header, parse_header, tensor_bytes
from warploom.data.dataset import TokenDataset
from warploom.data.shards import tokenize_corpus
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError

MEMORY_BYTES = 1 << 30  # more than the process has at the start
SECONDS = 20.0  # of one input, on a machine that others use


class Tensors:
    """Headers of safetensors files, and the bytes behind them."""

    refusal = ValueError

    def __init__(self, folder):
        tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.ones(())}
        header, order = build_header(tensors, {"step": "3"})
        self.data = b"".join(bytes(tensor_bytes(tensors[name])) for name in order)
        self.document, self.sound = json.loads(header[8:]), header + self.data

    def draw(self, chance):
        if chance.randrange(3) == 0:
            return changed_bytes(self.sound, chance)
        text = encoded(changed_json(self.document, chance), chance)
        return len(text).to_bytes(8, "little") + text + self.data

    def take(self, data):
        entries, _ = parse_header(io.BytesIO(data), len(data))
        # What is taken here the library takes as well, and finds the same in it.
        theirs = dict(safetensors.deserialize(data))
        assert theirs.keys() == entries.keys()
        for name, entry in entries.items():
            assert data[entry.start : entry.end] == bytes(theirs[name]["data"])
            assert list(entry.shape) == theirs[name]["shape"]


class Manifests:
    """Manifests of checkpoints."""

    refusal = (ValueError, UserError)

    def __init__(self, folder):
        tensors = {"w": TensorRecord("F32", (2, 3), "0" * 32), "v": TensorRecord("BF16", (), "1" * 32)}
        files = {name: FileRecord(48, "2" * 32, tensors) for name in ("model.safetensors", "optimizer.safetensors")}
        files |= {"rng.safetensors": FileRecord(8, "3" * 32, {})}
        files |= {name: FileRecord(9, "4" * 32) for name in ("config.json", "state.json", "tokenizer.json")}
        self.sound = encode_manifest(Manifest(7, 1.5, files, "run"))
        self.document = json.loads(self.sound)

    def draw(self, chance):
        if chance.randrange(3) == 0:
            return changed_bytes(self.sound, chance)
        return encoded(changed_json(self.document, chance), chance)

    def take(self, data):
        manifest = parse_manifest(data)
        assert parse_manifest(encode_manifest(manifest)) == manifest
        assert all(Path("folder", name).parent == Path("folder") for name in manifest.files)


class Tokenizers:
    """tokenizer.json, of our own making and adopted."""

    refusal = UserError
    text = "the quick\n  brown <|endoftext|> é 中"

    def __init__(self, folder):
        made = Tokenizer.train(["the quick the quick"], 259).to_bytes()
        adopted = Tokenizer.adopt(made.decode(), eos_id=0, begin_ids=[1], chat_template="{{ messages }}").to_bytes()
        self.sounds = [made, adopted]
        self.sound = made
        # The 256 entries of the vocabulary would take most of the changes.
        self.documents = [json.loads(sound) for sound in self.sounds]

    def draw(self, chance):
        which = chance.randrange(2)
        if chance.randrange(3) == 0:
            return changed_bytes(self.sounds[which], chance)
        document = self.documents[which]
        if chance.randrange(4):
            rest = changed_json({name: value for name, value in document.items() if name != "model"}, chance)
            if isinstance(rest, dict):
                return encoded({"model": document["model"], **rest}, chance)
            return encoded(rest, chance)
        return encoded(changed_json(document, chance), chance)

    def take(self, data):
        tokenizer = Tokenizer.from_bytes(data)
        ids = tokenizer.encode(self.text)
        assert all(0 <= token < tokenizer.vocab_size for token in (*ids, tokenizer.eos_id, *tokenizer.begin_ids))
        tokenizer.decode(ids)
        assert Tokenizer.from_bytes(tokenizer.to_bytes()).sha256 == tokenizer.sha256


class Shards:
    """Folders of token shards: one file of them changed, and the manifest that says how many there are."""

    refusal = UserError

    def __init__(self, folder):
        text = folder / "text.jsonl"
        text.write_text("".join(f'{{"text": "chapter {number} of a small book"}}\n' for number in range(40)))
        self.folder = folder / "tokens"
        tokenize_corpus([text], self.folder, vocab_size=260, heldout_fraction=0.3, workers=1)
        self.files = {path: path.read_bytes() for path in sorted(self.folder.iterdir()) if path.is_file()}
        self.manifest = self.folder / "manifest.json"
        self.document = json.loads(self.files[self.manifest])
        self.sound = (self.manifest, self.files[self.manifest])

    def draw(self, chance):
        if chance.randrange(2):
            return self.manifest, encoded(changed_json(self.document, chance), chance)
        path = chance.choice([path for path in self.files if path.suffix != ".json" or path == self.manifest])
        return path, changed_bytes(self.files[path], chance)

    def take(self, change):
        path, data = change
        path.write_bytes(data)
        try:
            dataset = TokenDataset(self.folder)
            for split in (dataset.train, dataset.heldout):
                if split.num_tokens == 0:
                    continue
                starts = np.array([0, split.num_tokens // 2, split.num_tokens - 1])
                windows = split.read(starts, 7)
                assert windows.shape == (3, 7)
                assert split.document_starts.shape == (split.num_documents,)
        finally:
            path.write_bytes(self.files[path])


PARSERS = (Tensors, Manifests, Tokenizers, Shards)


def main():
    count, seed = int(sys.argv[1]), int(sys.argv[2])

    def too_long(number, frame):
        raise RuntimeError(f"one input took more than {SECONDS:.0f} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        parsers = [parser(Path(scratch)) for parser in PARSERS]
        for parser in parsers:
            parser.take(parser.sound)  # the control
            found[type(parser).__name__] = [0, 0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        for number in range(count):
            parser = parsers[number % len(parsers)]
            data = parser.draw(random.Random(seed * count + number))
            counts = found[type(parser).__name__]
            counts[0] += 1
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                parser.take(data)
                counts[1] += 1
            except parser.refusal:
                pass
            except BaseException:  # also what Rust calls a panic
                print(f"{type(parser).__name__}, input {number} of seed {seed}: {data!r:.2000}", file=sys.stderr)
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
