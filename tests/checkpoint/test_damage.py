"""Damaged, incomplete, foreign and hostile checkpoints: each is refused, file and tensor named, none executed."""

import json
import os
import pickle
import random
import shutil
import struct

import pytest
import safetensors.torch
import torch
from tests.checkpoint.states import digest, make_state

from warploom.checkpoint import format as fmt
from warploom.checkpoint import load
from warploom.checkpoint.format import CheckpointDamaged, CheckpointTooNew
from warploom.checkpoint.load import (
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    load_weights_only,
    verify_checkpoint,
)
from warploom.checkpoint.save import save_checkpoint
from warploom.checkpoint.tensors import read_header
from warploom.errors import UserError

TENSOR_FILES = (fmt.WEIGHTS, fmt.OPTIMIZER, fmt.RNG)


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path, make_state(42, heldout_loss=1.5))


def flip(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def header_bytes(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def tensor_at(path, byte):
    with open(path, "rb") as file:
        entries = read_header(file, os.path.getsize(path))
    return next(name for name, entry in entries.items() if entry.start <= byte < entry.end)


def drawn_flips(checkpoint, region, count, seed):
    """Yield (file, bit), drawn uniformly over all bits of a region of the checkpoint's files."""
    ranges = []
    for path in sorted(checkpoint.iterdir()):
        size = path.stat().st_size
        if path.name in TENSOR_FILES:
            header = header_bytes(path)
            if region == "payload":
                ranges.append((path, header, size))
            elif region == "header":
                ranges.append((path, 0, header))
        elif region == "json":
            ranges.append((path, 0, size))
    draw = random.Random(seed)
    for _ in range(count):
        path, start, end = draw.choices(ranges, [end - start for _, start, end in ranges])[0]
        yield path, draw.randrange(8 * start, 8 * end)


def undetected_flips(checkpoint, region, count, seed):
    """Flip bits one at a time; return those not found with the right file and tensor."""
    missed = []
    for number, (path, bit) in enumerate(drawn_flips(checkpoint, region, count, seed)):
        tensor = tensor_at(path, bit // 8) if region == "payload" else None
        file = fmt.MANIFEST if path.name == fmt.MANIFEST_DIGEST else path.name
        flip(path, bit)
        try:
            (load_checkpoint if number % 8 == 0 else verify_checkpoint)(checkpoint)
            missed.append((path.name, bit, "nothing found"))
        except CheckpointDamaged as error:
            if (error.file, error.tensor) != (file, tensor) or not (
                file in str(error) and str(tensor or "") in str(error)
            ):
                missed.append((path.name, bit, str(error)))
        flip(path, bit)
    return missed


@pytest.mark.parametrize(("region", "count"), [("payload", 400), ("header", 300), ("json", 300)])
def test_every_flipped_bit_is_found_and_named(checkpoint, region, count):
    assert undetected_flips(checkpoint, region, count, seed=3) == []
    verify_checkpoint(checkpoint)  # the control: with every bit flipped back it is sound


@pytest.mark.parametrize("region", ["payload", "json"])
def test_without_the_files_checksums_the_flip_test_fails(checkpoint, region, monkeypatch):
    monkeypatch.setattr(load, "verify_files", lambda folder, manifest: None)
    assert undetected_flips(checkpoint, region, 100, seed=3) != []


def test_without_the_manifest_checksum_the_flip_test_fails(checkpoint, monkeypatch):
    digest_line = (checkpoint / fmt.MANIFEST_DIGEST).read_bytes()
    monkeypatch.setattr(fmt, "manifest_digest_line", lambda data: digest_line)
    assert undetected_flips(checkpoint, "json", 300, seed=3) != []


def test_several_damaged_tensors(checkpoint):
    path = checkpoint / fmt.WEIGHTS
    for byte in (header_bytes(path) + 1, path.stat().st_size - 1):
        flip(path, 8 * byte)
    with pytest.raises(
        CheckpointDamaged, match=r"tensor 'blocks.0.norm.weight' .*\(and 1 other tensors do not either\)"
    ):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", [*TENSOR_FILES, fmt.CONFIG, fmt.STATE, fmt.TOKENIZER, fmt.MANIFEST, fmt.MANIFEST_DIGEST]
)
@pytest.mark.parametrize("fault", ["truncated", "empty", "missing", "longer", "link", "pipe", "folder"])
def test_incomplete_files(checkpoint, name, fault):
    path = checkpoint / name
    size = path.stat().st_size
    if fault == "truncated":
        os.truncate(path, size - 1)
    elif fault == "empty":
        os.truncate(path, 0)
    elif fault == "longer":
        os.truncate(path, size + 1)
    else:
        path.rename(checkpoint.parent / name)
        if fault == "link":
            path.symlink_to(checkpoint.parent / name)
        elif fault == "pipe":
            os.mkfifo(path)
        elif fault == "folder":
            path.mkdir()
    for function in (verify_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointDamaged) as caught:
            function(checkpoint)
        assert name in str(caught.value)
        if fault in ("truncated", "empty", "longer") and name not in (fmt.MANIFEST, fmt.MANIFEST_DIGEST):
            assert f"has {path.stat().st_size} bytes, its manifest says {size}" in str(caught.value)


def test_fall_back_to_the_newest_that_verifies(tmp_path):
    states = {step: make_state(step) for step in (1, 2, 3, 4)}
    paths = {step: save_checkpoint(tmp_path, state) for step, state in states.items()}
    skipped = []
    assert latest_checkpoint(tmp_path, skipped.append) == paths[4]
    assert skipped == []
    flip(paths[4] / fmt.OPTIMIZER, 8 * (header_bytes(paths[4] / fmt.OPTIMIZER) + 5))
    (paths[3] / fmt.STATE).unlink()
    assert latest_checkpoint(tmp_path, skipped.append) == paths[2]
    assert len(skipped) == 2
    assert "step-00000004" in skipped[0] and "optimizer.safetensors: tensor" in skipped[0]
    assert "step-00000003" in skipped[1] and "state.json is missing" in skipped[1]
    assert digest(load_latest(tmp_path, on_skip=skipped.append)) == digest(states[2])
    assert len(skipped) == 4
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        latest_checkpoint(tmp_path)


def test_no_checkpoint_verifies(tmp_path):
    for step in (1, 2):
        (save_checkpoint(tmp_path, make_state(step)) / fmt.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        latest_checkpoint(tmp_path, lambda message: None)


def rewrite_manifest(checkpoint, change):
    """Forge a manifest that passes its own checksum."""
    raw = json.loads((checkpoint / fmt.MANIFEST).read_text())
    raw = change(raw) or raw
    data = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    (checkpoint / fmt.MANIFEST).write_bytes(data)
    (checkpoint / fmt.MANIFEST_DIGEST).write_bytes(fmt.manifest_digest_line(data))


def test_newer_version_says_which_is_needed(checkpoint):
    save_checkpoint(checkpoint.parent, make_state(41))
    rewrite_manifest(checkpoint, lambda raw: raw.update(version=3, step="any"))
    for function in (verify_checkpoint, load_checkpoint, load_weights_only):
        with pytest.raises(CheckpointTooNew, match="has format version 3.*reads up to version 2; use a warploom that"):
            function(checkpoint)
    # Going on from an older one would fork the run.
    with pytest.raises(CheckpointTooNew):
        latest_checkpoint(checkpoint.parent)


MANIFEST_FORGERIES = {
    "path out of the folder": (lambda raw: raw["files"].update({"../x": raw["files"]["state.json"]}), "lead out"),
    "absolute path": (lambda raw: raw["files"].update({"/etc/passwd": raw["files"]["state.json"]}), "lead out"),
    "parent": (lambda raw: raw["files"].update({"..": raw["files"]["state.json"]}), "lead out"),
    "backslash": (lambda raw: raw["files"].update({"..\\x": raw["files"]["state.json"]}), "lead out"),
    "NUL": (lambda raw: raw["files"].update({"a\0b": raw["files"]["state.json"]}), "lead out"),
    "other format": (lambda raw: raw.update(format="something"), "does not say"),
    "version of another type": (lambda raw: raw.update(version="1"), "version '1'"),
    "negative step": (lambda raw: raw.update(step=-1), "step -1"),
    "boolean step": (lambda raw: raw.update(step=True), "step True"),
    "other step": (lambda raw: raw.update(step=43), "is that of step 43"),
    "loss NaN": (lambda raw: raw.update(heldout_loss=float("nan")), "heldout_loss nan"),
    "no files": (lambda raw: raw.update(files=[]), "lists no files"),
    "no weights": (lambda raw: raw["files"].pop("model.safetensors") and None, "does not list model.safetensors"),
    "no tensors": (lambda raw: raw["files"]["rng.safetensors"].pop("tensors") and None, "does not list rng"),
    "no state": (lambda raw: raw["files"].pop("state.json") and None, "does not list state.json"),
    "size missing": (lambda raw: raw["files"]["state.json"].pop("size") and None, "without its size"),
    "shape of text": (lambda raw: raw["files"]["model.safetensors"]["tensors"]["scale"].update(shape="x"), "'scale'"),
    "other dtype": (lambda raw: raw["files"]["model.safetensors"]["tensors"]["mask"].update(dtype="U8"), "header"),
    "tensor too many": (
        lambda raw: raw["files"]["model.safetensors"]["tensors"].update(
            y=raw["files"]["model.safetensors"]["tensors"]["mask"]
        ),
        "header",
    ),
    "a list": (lambda raw: b"[]", "does not say"),
    "a repeated key": (lambda raw: b'{"format": 1, "format": 2}', "'format' appears twice"),
    "deep nesting": (lambda raw: b"[" * 100_000, "nested too deeply"),
    "a huge number": (lambda raw: b'{"step": ' + b"9" * 5000 + b"}", "manifest.json"),
    "not UTF-8": (lambda raw: b'{"format": "\xff"}', "utf-8"),
}


@pytest.mark.parametrize("forgery", MANIFEST_FORGERIES)
def test_forged_manifests(checkpoint, forgery):
    change, words = MANIFEST_FORGERIES[forgery]
    load_checkpoint(checkpoint)
    rewrite_manifest(checkpoint, change)
    with pytest.raises(CheckpointDamaged) as caught:
        load_checkpoint(checkpoint)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", [fmt.CONFIG, fmt.STATE])
@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"a": 1, "a": 1}', b"[" * 100_000, b'{"step": 42, "meta": 3}', b"\xff"]
)
def test_forged_json(checkpoint, name, data):
    (checkpoint / name).write_bytes(data)
    rewrite_manifest(
        checkpoint, lambda raw: raw["files"].update({name: {"size": len(data), "xxh3_128": fmt.xxh3_128(data)}})
    )
    if (name, data) == (fmt.CONFIG, b'{"step": 42, "meta": 3}'):
        assert load_checkpoint(checkpoint).meta["config"] == {"step": 42, "meta": 3}
        return
    with pytest.raises(CheckpointDamaged, match=name):
        load_checkpoint(checkpoint)


def container(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE_FILES = {
    "empty": (b"", "header length of 0"),
    "seven bytes": (b"\0" * 7, "header length"),
    "length 2^63": (container({}, length=2**63), "header length of 9223372036854775808"),
    "length 2^64-1": (container({}, length=2**64 - 1), "header length"),
    "length past the end": (container({}, length=3), "header length of 3"),
    "not an object": (container(b"[]"), "not a JSON object"),
    "not JSON": (container(b"{x"), "cannot be read"),
    "not UTF-8": (container(b'{"\xff": 1}'), "cannot be read"),
    "deep": (container(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "repeated tensor": (
        container(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "'a' appears twice",
    ),
    "repeated field": (
        container(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "'dtype' appears twice",
    ),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "unknown dtype": (container({"a": entry("F33")}, b"\0" * 8), "unknown dtype 'F33'"),
    "dtype not text": (container({"a": entry(["F32"])}, b"\0" * 8), "unknown dtype"),
    "extra field": (container({"a": {**entry(), "x": 1}}, b"\0" * 8), "without exactly"),
    "not an entry": (container({"a": 3}), "without exactly"),
    "negative dimension": (container({"a": entry(shape=[-2, -1])}, b"\0" * 8), "shape [-2, -1]"),
    "boolean dimension": (container({"a": entry(shape=[True, 2])}, b"\0" * 8), "shape"),
    "shape overflow": (container({"a": entry(shape=[2**32, 2**32, 4])}, b"\0" * 8), "in 8 bytes"),
    "dimension over 64 bits": (container({"a": entry(shape=[2**64])}, b"\0" * 8), "shape"),
    "a thousand dimensions": (container({"a": entry(shape=[2] * 1000)}, b"\0" * 8), "shape"),
    "negative offsets": (container({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "data_offsets"),
    "offsets reversed": (container({"a": entry(offsets=[8, 0])}, b"\0" * 8), "in -8 bytes"),
    "one offset": (container({"a": entry(offsets=[8])}, b"\0" * 8), "data_offsets"),
    "too few bytes": (container({"a": entry(shape=[3])}, b"\0" * 8), "in 8 bytes"),
    "past the end": (container({"a": entry(shape=[4], offsets=[0, 16])}, b"\0" * 8), "accounts for"),
    "overlap": (container({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "an overlap at tensor 'b'"),
    "same bytes twice": (container({"a": entry(), "b": entry()}, b"\0" * 8), "an overlap at"),
    "hole": (container({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "a hole before tensor 'b'"),
    "hole at the start": (container({"a": entry(offsets=[8, 16])}, b"\0" * 16), "a hole before tensor 'a'"),
    "trailing bytes": (container({"a": entry()}, b"\0" * 9), "accounts for"),
    "long name": (container({"n" * 10**6: entry("F33")}, b"\0" * 8), "unknown dtype"),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_safetensors(checkpoint, case):
    data, words = HOSTILE_FILES[case]
    hand_in(checkpoint, data)
    for function in (verify_checkpoint, load_checkpoint, load_weights_only):
        if function is verify_checkpoint:
            function(checkpoint)  # its checksums are right; only reading it shows what it is
            continue
        with pytest.raises(CheckpointDamaged) as caught:
            function(checkpoint)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 1000


def hand_in(checkpoint, data):
    """Replace the weights by a file with right checksums, as an adversary would."""
    (checkpoint / fmt.WEIGHTS).write_bytes(data)
    rewrite_manifest(
        checkpoint,
        lambda raw: raw["files"].update(
            {fmt.WEIGHTS: {"size": len(data), "xxh3_128": fmt.xxh3_128(data), "tensors": {}}}
        ),
    )


def test_a_file_of_the_safetensors_library_is_accepted(checkpoint, tmp_path):
    """The control of the hostile files: the same way in, a sound file."""
    for weights in ({}, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}):
        data = safetensors.torch.save(weights, metadata={"made": "elsewhere"})
        hand_in(checkpoint, data)
        rewrite_manifest(
            checkpoint,
            lambda raw, weights=weights: raw["files"][fmt.WEIGHTS].update(
                tensors={
                    name: {
                        "dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype],
                        "shape": list(tensor.shape),
                        "xxh3_128": fmt.xxh3_128(tensor.view(torch.uint8).numpy().tobytes()),
                    }
                    for name, tensor in weights.items()
                }
            ),
        )
        loaded = load_checkpoint(checkpoint).weights
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


class Bomb:
    """Creates a marker file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "torch.save"])
@pytest.mark.parametrize("name", [*TENSOR_FILES, fmt.CONFIG, fmt.STATE, fmt.MANIFEST])
def test_nothing_is_unpickled(checkpoint, tmp_path, protocol, name):
    marker = tmp_path / "executed"
    path = checkpoint / name
    if protocol == "torch.save":
        torch.save({"weights": Bomb(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=protocol))
    data = path.read_bytes()
    if name == fmt.MANIFEST:
        (checkpoint / fmt.MANIFEST_DIGEST).write_bytes(fmt.manifest_digest_line(data))
    else:
        record = {"size": len(data), "xxh3_128": fmt.xxh3_128(data)}
        if name in TENSOR_FILES:
            record["tensors"] = {}
        rewrite_manifest(checkpoint, lambda raw: raw["files"].update({name: record}))
    with pytest.raises(CheckpointDamaged) as caught:
        load_checkpoint(checkpoint)
    assert name in str(caught.value)
    if name in TENSOR_FILES and protocol != 0:
        assert "is a pickle or a zip of pickles, which is never opened" in str(caught.value)
    assert not marker.exists()
    if protocol != "torch.save":
        pickle.loads(data)
        assert marker.exists()  # the control: the payload works


def test_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    """A header of 640 bytes begins with the bytes of a pickle of protocol 2, one of 19280 with those of a zip."""
    for length in (640, 19280):
        text = json.dumps({"a": entry()}).encode().ljust(length)
        path = tmp_path / "file"
        path.write_bytes(container(text, b"\0" * 8))
        with open(path, "rb") as file:
            assert read_header(file, path.stat().st_size).keys() == {"a"}


def test_a_copied_checkpoint_under_another_step_is_refused(checkpoint):
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000099"))
    with pytest.warns(UserWarning, match="is that of step 42"):
        assert latest_checkpoint(checkpoint.parent) == checkpoint
