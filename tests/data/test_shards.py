"""Token shards: what is written, that it is all or nothing, that it is reused or refused for the right reason."""

import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.data import shards
from warploom.data.dataset import TokenDataset, TokenSplit
from warploom.data.documents import read_documents
from warploom.data.heldout import sides
from warploom.data.loader import Loader
from warploom.data.shards import tokenize_corpus
from warploom.data.token_files import TokenFileWriter, open_token_file, token_dtype
from warploom.data.tokenizer import END_OF_TEXT, Tokenizer
from warploom.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens(split):
    return split.read(np.array([0]), split.num_tokens)[0]


def documents(dataset, split):
    ends = [*split.document_starts.tolist()[1:], split.num_tokens]
    ring = tokens(split).tolist()
    starts = split.document_starts.tolist()
    assert all(ring[start] == dataset.tokenizer.eos_id for start in starts)
    return [dataset.tokenizer.decode(ring[start + 1 : end]) for start, end in zip(starts, ends, strict=True)]


def test_every_document_is_in_one_split_once(corpus, dataset):
    assert dataset.manifest["heldout_unit"] == "document"
    threshold = int(dataset.manifest["heldout_threshold"], 16)
    expected = {False: [], True: []}
    for _, text in read_documents(corpus):
        [(side, _)] = sides(text, "document", threshold)
        expected[side].append(text)
    assert documents(dataset, dataset.train) == expected[False]
    assert documents(dataset, dataset.heldout) == expected[True]
    assert 0.1 < len(expected[True]) / 301 < 0.3
    assert not set(expected[True]) & set(expected[False])


def test_the_figures_are_those_of_the_text(corpus, dataset):
    for split in (dataset.train, dataset.heldout):
        texts = documents(dataset, split)
        assert split.num_documents == len(texts)
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.token_bytes[tokens(split)].sum() == split.num_bytes
        assert split.num_tokens == sum(map(len, dataset.tokenizer.encode_batch(texts))) + len(texts)
    assert dataset.manifest["documents_read"] == 301
    assert [source["size"] for source in dataset.manifest["request"]["sources"]] == [
        path.stat().st_size for path in sorted(corpus.iterdir())
    ]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(shards, "_TASK_CHARS", 1000)  # many tasks in flight
    options = {"vocab_size": 400, "heldout_fraction": 0.2, "shard_tokens": 2000}
    one = tokenize_corpus(corpus, tmp_path / "one", workers=1, **options)
    many = tokenize_corpus(corpus, tmp_path / "many", workers=workers, **options)
    assert contents(one.folder) == contents(many.folder)
    assert len(one.manifest["splits"]["train"]["shards"]) > 5


def test_shards_read_as_one_ring(corpus, dataset, tmp_path):
    cut = tokenize_corpus(corpus, tmp_path / "cut", vocab_size=400, heldout_fraction=0.2, shard_tokens=500)
    ring = tokens(dataset.train)
    N = len(ring)
    assert np.array_equal(tokens(cut.train), ring)
    starts = np.arange(0, N, 37)
    for length in (1, 33, 1000, N, 2 * N + 5):
        expected = ring[(starts[:, None] + np.arange(length)) % N]
        assert np.array_equal(cut.train.read(starts, length), expected)


def test_the_split_and_the_tokenizer_do_not_depend_on_the_order_of_files(corpus, dataset, tmp_path):
    files = sorted(corpus.iterdir(), reverse=True)
    other = tokenize_corpus(files, tmp_path / "set", vocab_size=400, heldout_fraction=0.2)
    assert other.tokenizer.sha256 == dataset.tokenizer.sha256
    assert documents(other, other.train) != documents(dataset, dataset.train)
    for name in ("train", "heldout"):
        assert sorted(documents(other, getattr(other, name))) == sorted(documents(dataset, getattr(dataset, name)))


def test_one_long_document_is_split_by_blocks(shared_data, tmp_path):
    path = shared_data / "corpora/tinyshakespeare.txt"
    dataset = tokenize_corpus(path, tmp_path / "set", vocab_size=512)
    assert dataset.manifest["heldout_unit"] == "block"
    train, held = documents(dataset, dataset.train), documents(dataset, dataset.heldout)
    text = path.read_text()
    assert sum(map(len, train + held)) == len(text)
    assert all(piece in text for piece in train + held)
    assert 0.02 < dataset.heldout.num_bytes / len(text) < 0.12


def test_novels_and_wikitext(shared_data, tmp_path):
    """Real text of two kinds, several documents, Unicode."""
    novels = (text for _, text in read_documents(shared_data / "corpora/novels-en.jsonl.xz"))
    (tmp_path / "novel.txt").write_text(next(novels)[:200_000])
    wikitext = (shared_data / "corpora/wikitext-2-raw/wiki.valid.raw").read_bytes()
    (tmp_path / "wiki.md").write_bytes(wikitext[:200_000])
    dataset = tokenize_corpus(tmp_path / "*.*", tmp_path / "set", vocab_size=1000, on_bad_utf8="replace")
    sources = "".join(text for _, text in read_documents(tmp_path / "*.*", on_bad_utf8="replace"))
    pieces = documents(dataset, dataset.train) + documents(dataset, dataset.heldout)
    assert sum(map(len, pieces)) == len(sources)
    assert all(piece in sources for piece in pieces)


def test_text_that_spells_the_control_token_makes_no_document(tmp_path):
    text = f"one {END_OF_TEXT} two"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(50)))
    dataset = tokenize_corpus(tmp_path / "a.jsonl", tmp_path / "set", vocab_size=300)
    assert dataset.train.num_documents + dataset.heldout.num_documents == 50
    ring = tokens(dataset.train)
    assert (ring == dataset.tokenizer.eos_id).sum() == dataset.train.num_documents


def test_a_smaller_vocabulary_than_asked_for_is_noted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abab"}\n{"text": "baba"}\n')
    dataset = tokenize_corpus(tmp_path / "a.jsonl", tmp_path / "set", vocab_size=5000)
    assert dataset.manifest["vocab_size"] < 5000
    [note] = dataset.manifest["notes"]
    assert note.startswith(f"the vocabulary has {dataset.manifest['vocab_size']} tokens of the 5000 asked for")


def test_a_given_tokenizer_is_used_and_large_vocabularies_take_four_bytes(corpus, dataset, tmp_path):
    given = dataset.tokenizer
    again = tokenize_corpus(corpus, tmp_path / "set", tokenizer=given, heldout_fraction=0.2)
    assert again.manifest["notes"] == [] and again.tokenizer.sha256 == given.sha256
    assert again.train.fingerprint == dataset.train.fingerprint

    wide = json.loads(given.to_bytes())
    wide["model"]["vocab"].update({f"unused{i}": i for i in range(given.vocab_size, 1 << 17)})
    wide = Tokenizer(json.dumps(wide))
    assert wide.vocab_size == 1 << 17
    four = tokenize_corpus(corpus, tmp_path / "wide", tokenizer=wide, heldout_fraction=0.2)
    assert np.array_equal(tokens(four.train), tokens(dataset.train))
    shard = four.manifest["splits"]["train"]["shards"][0]
    assert shard["size"] == 32 + 4 * shard["count"]
    assert (token_dtype(1 << 16), token_dtype((1 << 16) + 1)) == (np.uint16, np.uint32)


def test_left_out_documents_are_counted_in_the_manifest(tmp_path):
    lines = [json.dumps({"text": f"good {i}"}) for i in range(50)] + ["not json", '{"body": 1}', '{"text": ""}', "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    dataset = tokenize_corpus(tmp_path / "a.jsonl", tmp_path / "set", vocab_size=300, on_bad_line="skip")
    assert dataset.manifest["documents_read"] == 50
    assert dataset.manifest["documents_left_out"] == {
        "not JSON": 1,
        "no such field": 1,
        "empty": 1,
        "not an object": 1,
    }


# Reuse


@pytest.fixture
def copy(corpus, tmp_path):
    """A corpus of its own and its data set."""
    shutil.copytree(corpus, tmp_path / "corpus")
    return tokenize_corpus(tmp_path / "corpus", tmp_path / "set", vocab_size=300, heldout_fraction=0.2)


def again(dataset, **options):
    options = {"vocab_size": 300, "heldout_fraction": 0.2, **options}
    return tokenize_corpus(dataset.folder.parent / "corpus", dataset.folder, **options)


def built(dataset):
    return (dataset.folder / "manifest.json").stat().st_ino


def test_the_same_request_is_answered_from_the_folder(copy):
    before = built(copy)
    stages = []
    second = again(copy, workers=1, progress=lambda stage, done, total: stages.append(stage))
    assert built(second) == before and stages == []
    assert second.train.fingerprint == copy.train.fingerprint


def test_a_data_set_that_others_rest_on_is_not_replaced(copy):
    before = built(copy)
    assert built(again(copy, replace=False)) == before
    with pytest.raises(UserError, match="tokens of another text or other settings.* or another folder"):
        again(copy, replace=False, heldout_fraction=0.3)
    assert built(copy) == before
    assert built(again(copy, heldout_fraction=0.3)) != before


def test_asking_for_the_words_that_were_found_is_asking_for_the_same(copy):
    more = again(copy, vocab_size=100_000)
    assert more.tokenizer.vocab_size < 100_000
    assert built(again(copy, vocab_size=more.tokenizer.vocab_size)) == built(more)
    assert again(copy, vocab_size=more.tokenizer.vocab_size - 1).tokenizer.vocab_size == more.tokenizer.vocab_size - 1


def test_two_runs_for_one_folder_build_it_once(corpus, tmp_path):
    builds = []

    def run(name):
        def progress(stage, done, total):
            if stage == "train tokenizer":
                builds.append(name)

        return tokenize_corpus(corpus, tmp_path / "set", vocab_size=300, heldout_fraction=0.2, progress=progress)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, ("first", "second"))
    assert len(builds) == 1
    assert first.train.fingerprint == second.train.fingerprint


@pytest.mark.parametrize(
    "change", [{"vocab_size": 310}, {"heldout_fraction": 0.3}, {"heldout_unit": "block"}, {"on_bad_line": "skip"}]
)
def test_another_setting_builds_anew(copy, change):
    before = built(copy)
    assert built(again(copy, **change)) != before


def test_another_source_builds_anew(copy):
    before, fingerprint = built(copy), copy.train.fingerprint
    path = copy.folder.parent / "corpus/0.jsonl"
    path.write_text(path.read_text().replace("cat", "cow"))
    second = again(copy)
    assert built(second) != before and second.train.fingerprint != fingerprint


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_data_set_builds_anew(copy, damage):
    before, good = built(copy), contents(copy.folder)
    path = copy.folder / "train-00000.tokens"
    if damage == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data[: -2 if damage == "cut" else None])
    again_ = again(copy)
    assert built(again_) != before and contents(copy.folder) == good


def test_a_folder_with_other_files_is_left_alone(copy):
    (copy.folder / "thesis.doc").write_text("x")
    with pytest.raises(UserError, match=r"set holds other files \(thesis.doc\); name an empty or new folder"):
        again(copy, vocab_size=310)
    assert (copy.folder / "thesis.doc").read_text() == "x"
    assert TokenDataset(copy.folder).manifest["vocab_size"] == 300


def test_a_file_in_the_place_of_the_folder_is_left_alone(corpus, tmp_path):
    (tmp_path / "set").write_text("x")
    with pytest.raises(UserError, match="set is a file; name a folder"):
        tokenize_corpus(corpus, tmp_path / "set", vocab_size=300)


# All or nothing

KILLED = """
import os, pathlib, signal, sys
from warploom.data.shards import tokenize_corpus
corpus, out, vocab_size, moment = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
rename = pathlib.Path.rename
def rename_or_die(path, target):
    renames.append(path)
    if moment == f"before rename {len(renames)}":
        die()
    rename(path, target)
    if moment == f"after rename {len(renames)}":
        die()
renames = []
pathlib.Path.rename = rename_or_die
progress = lambda stage, done, total: die() if stage == moment else None
tokenize_corpus(corpus, out, vocab_size=int(vocab_size), heldout_fraction=0.2, progress=progress)
"""


def run_and_kill(corpus, out, vocab_size, moment):
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(corpus), str(out), str(vocab_size), moment],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    ).returncode


MOMENTS = ["survey", "train tokenizer", "encode", "before rename 1", "after rename 1"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_nothing_that_looks_complete(corpus, tmp_path, moment):
    out = tmp_path / "set"
    assert run_and_kill(corpus, out, 300, moment) == -signal.SIGKILL
    if moment == "after rename 1":
        assert TokenDataset(out).manifest["vocab_size"] == 300
    else:
        assert not out.exists()
        assert (tmp_path / ".set.partial").is_dir(), "it died while it wrote"
        with pytest.raises(UserError, match="set holds no tokens"):
            TokenDataset(out)
    fresh = tokenize_corpus(corpus, out, vocab_size=300, heldout_fraction=0.2)
    fresh.verify()
    assert not (tmp_path / ".set.partial").exists()


@pytest.mark.parametrize("moment", ["encode", "before rename 1", "after rename 1", "after rename 2"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(copy, moment):
    old = contents(copy.folder)
    corpus = copy.folder.parent / "corpus"
    assert run_and_kill(corpus, copy.folder, 310, moment) == -signal.SIGKILL
    if moment in ("encode", "before rename 1"):
        assert contents(copy.folder) == old
    elif moment == "after rename 1":
        assert not copy.folder.exists()
    else:
        assert TokenDataset(copy.folder).manifest["vocab_size"] == 310
    again(copy, vocab_size=310).verify()
    left = {path.name for path in copy.folder.parent.iterdir()}
    assert left == {"corpus", "set", ".set.lock"}


def test_the_run_that_is_not_killed_completes(corpus, tmp_path):
    assert run_and_kill(corpus, tmp_path / "set", 300, "never") == 0
    TokenDataset(tmp_path / "set").verify()


def test_all_is_on_disk_before_it_is_renamed(corpus, tmp_path, monkeypatch):
    synced, at_rename = [], []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(path, target):
        at_rename.append(sorted(synced))
        assert sorted(synced) == sorted([path.name, *(file.name for file in path.iterdir())])
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    tokenize_corpus(corpus, tmp_path / "set", vocab_size=300, heldout_fraction=0.2)
    assert len(at_rename) == 1
    assert synced[-1] == tmp_path.name, "and the folder that holds the new name after"


def test_an_error_leaves_nothing(corpus, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "encode":
            raise Stop

    with pytest.raises(Stop):
        tokenize_corpus(corpus, tmp_path / "set", vocab_size=300, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".set.lock"]


def test_a_full_disk_is_named_and_keeps_the_old(copy):
    """A limit on the size of files stands for the full disk: the write fails in the same place."""
    old = contents(copy.folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the tokens to .*set: File too large; what was there before"):
            again(copy, vocab_size=310)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(copy.folder) == old
    assert not (copy.folder.parent / ".set.partial").exists()


# Damage


def rewrite_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def shard_of(manifest):
    return manifest["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-00000.tokens", lambda data: b"PK" + data[2:], "is no token file: it begins with b'PKTOKENS'"),
        ("train-00000.tokens", lambda data: data[:8] + b"\x02" + data[9:], "has format version 2, this is 1"),
        ("train-00000.tokens", lambda data: data[:12] + b"\x03" + data[13:], "states 3 bytes per token, not 2, 4 or 8"),
        ("train-00000.tokens", lambda data: data[:-1], r"has \d+ bytes, its \d+ tokens need \d+"),
        ("train-00000.tokens", lambda data: data + b"\x00\x00", r"has \d+ bytes, its \d+ tokens need \d+"),
        ("train-00000.tokens", lambda data: data[:20], "is cut short: 20 bytes, not even a header"),
        ("heldout-00000.tokens", lambda data: b"", "is cut short: 0 bytes"),
        ("heldout.offsets", lambda data: data[:-8], r"heldout.offsets has \d+ bytes"),
        ("tokenizer.json", lambda data: data.replace(b'"merges":[[', b'"merges":[["a","b"],[', 1), "cannot be used"),
        ("manifest.json", lambda data: data[:100], "manifest.json is damaged"),
        ("manifest.json", lambda data: b"[" * 100_000, "manifest.json is damaged"),
        ("manifest.json", lambda data: b"[]", "is not the manifest of a warploom-tokens folder"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(copy, file, change, message):
    path = copy.folder / file
    before = path.read_bytes()
    TokenDataset(copy.folder)
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises(UserError, match=message) as error:
        TokenDataset(copy.folder)
    assert file in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "has format version 2, this is 1"),
        (lambda m: m.update(format="other"), "is not the manifest"),
        (lambda m: m.pop("splits"), "is damaged, a field is missing: KeyError"),
        (lambda m: m["splits"]["train"].update(num_tokens="3"), "is damaged: '3' stands where a int should"),
        (lambda m: shard_of(m).update(count=shard_of(m)["count"] + 1), r"holds \d+ tokens, the manifest says \d+"),
        (lambda m: m["splits"]["train"].update(num_tokens=-3), "is damaged: -3 stands where a int should"),
        (
            lambda m: m["splits"]["train"].update(num_tokens=3),
            r"says 3 tokens of \d+ documents in train, its files hold",
        ),
        (lambda m: m["splits"]["heldout"].update(num_documents=0), r"of 0 documents in heldout, its files hold"),
        (lambda m: shard_of(m).update(file="train.offsets"), "holds uint64, not uint16"),
        (lambda m: shard_of(m).update(file="../x.tokens"), r"names a file outside its folder, '../x.tokens'"),
        (lambda m: shard_of(m).update(file="\ud800"), "names a file '.ud800', which no file is called"),
        (lambda m: shard_of(m).update(file="gone.tokens"), "cannot read the token file .*gone.tokens: No such file"),
        (lambda m: m.update(tokenizer_sha256="0" * 64), "were made by the tokenizer 000000000000, this one is"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, change, message):
    rewrite_manifest(copy.folder, change)
    with pytest.raises(UserError, match=message):
        TokenDataset(copy.folder)


def test_another_tokenizer_is_refused(copy, dataset):
    copy.require_tokenizer(copy.tokenizer)
    with pytest.raises(UserError, match=r"were made by the tokenizer \w{12}, this one is \w{12} \(sha256\)"):
        copy.require_tokenizer(dataset.tokenizer)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_is_found_and_the_file_named(dataset, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip") / "set"
    shutil.copytree(dataset.folder, folder)
    TokenDataset(folder).verify()
    path = folder / data.draw(st.sampled_from([p.name for p in sorted(folder.iterdir()) if p.suffix != ".json"]))
    content = bytearray(path.read_bytes())
    # The last 8 bytes of the header are reserved and never read.
    bit = data.draw(st.integers(0, 8 * (len(content) - 8) - 1))
    at = bit // 8 if bit // 8 < 24 else bit // 8 + 8
    content[at] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        TokenDataset(folder).verify()
    shutil.rmtree(folder.parent)


# Memory


def test_the_files_are_mapped(dataset):
    for array in (*dataset.train._shards, dataset.train.document_starts):
        base = array
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        assert isinstance(base, mmap.mmap)
        assert not array.flags.writeable


def test_loading_never_holds_the_corpus(dataset, tmp_path):
    """40 MB of tokens and 4 MB of offsets, half a million documents: a batch costs kilobytes."""
    num_documents, length = 500_000, 40
    tokens = TokenFileWriter(tmp_path / "train-00000.tokens", np.dtype("<u2"))
    offsets = TokenFileWriter(tmp_path / "train.offsets", np.dtype("<u8"))
    for _ in range(10):
        tokens.append(np.zeros(num_documents * length // 10))
    offsets.append(np.arange(num_documents + 1) * length)
    entry = {
        "num_tokens": tokens.count,
        "num_documents": num_documents,
        "num_bytes": 0,
        "shards": [tokens.close()],
        "offsets": offsets.close(),
    }
    tracemalloc.start()
    try:
        split = TokenSplit(tmp_path, "train", entry, dataset.tokenizer)
        loader = Loader(split, seq_len=128, micro_batch_size=4, seed=0)
        for _ in range(20):
            assert len(next(loader).cu_seqlens) > 4
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400_000


def test_an_empty_token_file_opens(tmp_path):
    TokenFileWriter(tmp_path / "a.tokens", np.dtype("<u2")).close()
    assert open_token_file(tmp_path / "a.tokens").shape == (0,)


def test_a_file_without_its_header_is_no_token_file(tmp_path):
    writer = TokenFileWriter(tmp_path / "a.tokens", np.dtype("<u2"))
    writer.append(np.arange(10))
    writer.abandon()
    with pytest.raises(UserError, match="is no token file"):
        open_token_file(tmp_path / "a.tokens")


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout_fraction": 0.0}, "heldout-fraction must be between 0 and 1, got 0.0"),
        ({"heldout_fraction": 1.0}, "heldout-fraction must be between 0 and 1, got 1.0"),
        ({"vocab_size": 100}, "vocab-size must be at least 257"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"heldout_fraction": 0.9999}, "too little text to hold some out: .* give more text, or a smaller heldout"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("one small document")
    with pytest.raises(UserError, match=message):
        tokenize_corpus(tmp_path / "a.txt", tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_one_small_document_cannot_be_on_both_sides(tmp_path):
    (tmp_path / "a.txt").write_text("one small document")
    with pytest.raises(UserError, match=r"of its 18 bytes in 1 document\(s\) no block is left to train on"):
        tokenize_corpus(tmp_path / "a.txt", tmp_path / "set", vocab_size=300)
