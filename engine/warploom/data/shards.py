"""Token shards: a folder with a corpus encoded once, to be mapped into memory by every run after.

    manifest.json                      counts, checksums, tokenizer hash, sources, settings; without it, no data set
    tokenizer.json
    train-00000.tokens ...             <|endoftext|>, text, <|endoftext|>, text, ...
    train.offsets                      where each document's <|endoftext|> stands, and the end
    heldout-00000.tokens, heldout.offsets

The folder is written beside its place and renamed into it when complete. The same sources and settings give the same
bytes, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from warploom.data.dataset import FORMAT, VERSION, TokenDataset
from warploom.data.documents import Paths, list_files, read_documents
from warploom.data.heldout import sides
from warploom.data.survey import survey
from warploom.data.token_files import TokenFileWriter, token_dtype
from warploom.data.tokenizer import Tokenizer, require_vocab_size
from warploom.errors import UserError

SHARD_TOKENS = 1 << 27
_TASK_CHARS = 1 << 18
_OURS = (".tokens", ".offsets")

Progress = Callable[[str, int, int | None], None]  # stage, bytes of text so far, bytes of text in all if known


@dataclass(frozen=True)
class _Settings:
    """What besides the sources decides the content of a data set."""

    vocab_size: int | None  # asked for; None if the tokenizer was given
    tokenizer_sha256: str | None  # given; None if it was to be trained
    heldout_fraction: float
    heldout_unit: Literal["auto", "document", "block"]
    text_column: str
    on_bad_utf8: Literal["error", "replace"]
    on_bad_line: Literal["error", "skip"]
    shard_tokens: int

    def documents(self, files: list[Path], counts: Counter[str] | None = None) -> Iterator[str]:
        for _, text in read_documents(files, self.text_column, self.on_bad_utf8, self.on_bad_line, counts):
            yield text


def tokenize_corpus(
    paths: Paths,
    out_dir: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    tokenizer: Tokenizer | None = None,
    heldout_fraction: float = 0.05,
    heldout_unit: Literal["auto", "document", "block"] = "auto",
    text_column: str = "text",
    on_bad_utf8: Literal["error", "replace"] = "error",
    on_bad_line: Literal["error", "skip"] = "error",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda stage, done, total: None,
    replace: bool = True,
) -> TokenDataset:
    """Encode the documents of paths (see read_documents) into out_dir and open it.

    If out_dir already holds the data set of the same sources (names, sizes, checksums) and settings, it is only
    opened; if it holds another, it is replaced or, without `replace`, refused. A second process that wants the same
    folder waits for the first.
    tokenizer: used as it is; None trains one of vocab_size on the training side, or a sample of it.
    heldout_unit: what the hash decides on, see data/heldout.py; "auto" takes documents if there are enough.
    workers: threads that encode, all cores by default.
    Raises UserError for unusable input, if either side of the split would be empty, if out_dir holds anything else,
    or if it cannot be written.
    """
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout-fraction must be between 0 and 1, got {heldout_fraction}; 0.05 is usual")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if tokenizer is None:
        require_vocab_size(vocab_size)
    files = list_files(paths)
    settings = _Settings(
        vocab_size=vocab_size if tokenizer is None else None,
        tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
        heldout_fraction=heldout_fraction,
        heldout_unit=heldout_unit,
        text_column=text_column,
        on_bad_utf8=on_bad_utf8,
        on_bad_line=on_bad_line,
        shard_tokens=shard_tokens,
    )
    out = Path(out_dir).expanduser().absolute()
    request = {"sources": [_source(file) for file in files], "settings": asdict(settings)}
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out.parent / f".{out.name}.lock"):
            partial, old = (out.parent / f".{out.name}.{state}" for state in ("partial", "old"))
            for leftover in (partial, old):  # under the lock, it belongs to a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if (out / "manifest.json").exists():
                dataset = None
                with contextlib.suppress(UserError):  # damaged or of another version: made anew
                    dataset = TokenDataset(out)
                    if _answers(dataset, request):
                        dataset.verify()
                        return dataset
                if dataset is not None and not replace and not _answers(dataset, request):
                    raise UserError(
                        f"{out} holds the tokens of another text or other settings, and checkpoints beside it were "
                        f"trained on them; give the same text as then, or {out} itself as the data, or another folder "
                        "for the run"
                    )
            _require_replaceable(out)
            partial.mkdir()
            try:
                _build(partial, files, settings, request, tokenizer, workers or _num_cores(), progress)
                _put_in_place(partial, out, old)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return TokenDataset(out)


def _build(
    folder: Path,
    files: list[Path],
    settings: _Settings,
    request: dict[str, Any],
    tokenizer: Tokenizer | None,
    workers: int,
    progress: Progress,
) -> None:
    plan = survey(
        lambda: settings.documents(files),
        settings.heldout_fraction,
        settings.heldout_unit,
        lambda num_bytes: progress("survey", num_bytes, None),
    )
    notes = []
    if tokenizer is None:
        assert settings.vocab_size is not None
        progress("train tokenizer", 0, None)
        tokenizer = Tokenizer.train(plan.sample, settings.vocab_size)
        if tokenizer.vocab_size < settings.vocab_size:
            notes.append(
                f"the vocabulary has {tokenizer.vocab_size} tokens of the {settings.vocab_size} asked for: "
                "no other pair of tokens occurs twice in the text it was learnt from"
            )
    tokenizer.save(folder / "tokenizer.json")

    counts: Counter[str] = Counter()
    writers = {
        heldout: SplitWriter(folder, name, tokenizer, settings.shard_tokens)
        for heldout, name in ((False, "train"), (True, "heldout"))
    }
    try:
        pieces = (
            piece for text in settings.documents(files, counts) for piece in sides(text, plan.unit, plan.threshold)
        )
        done = 0
        for heldout, num_bytes, ids in _encode(pieces, tokenizer, workers):
            writers[heldout].append(ids, num_bytes)
            done += num_bytes
            progress("encode", done, plan.num_bytes)
        splits = {writer.name: writer.close() for writer in writers.values()}
    finally:
        for writer in writers.values():
            writer.abandon()
    write_manifest(
        folder,
        tokenizer,
        splits,
        documents_read=plan.num_documents,
        documents_left_out=dict(counts),
        heldout_unit=plan.unit,
        heldout_threshold=f"{plan.threshold:016x}",
        notes=notes,
        request=request,
    )


def write_split(
    folder: Path,
    name: Literal["train", "heldout"],
    tokenizer: Tokenizer,
    documents: Iterable[tuple[np.ndarray, int]],
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the files of one split from (token ids, bytes of text) of its documents, and return its manifest entry."""
    writer = SplitWriter(folder, name, tokenizer, shard_tokens)
    try:
        for ids, num_bytes in documents:
            writer.append(ids, num_bytes)
        return writer.close()
    finally:
        writer.abandon()


def write_manifest(folder: Path, tokenizer: Tokenizer, splits: dict[str, Any], **fields: Any) -> None:
    """Write manifest.json, which makes the folder a data set. fields: what else it says; `request` must be there."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **{name: value for name, value in fields.items() if name != "request"},
        "splits": splits,
        "request": fields["request"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _encode(
    pieces: Iterator[tuple[bool, str]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[bool, int, np.ndarray]]:
    """Yield (held out, UTF-8 bytes, ids) in the order of pieces; a bounded number is in flight."""

    def encode(task: list[tuple[bool, str]]) -> list[tuple[bool, int, np.ndarray]]:
        return [(heldout, len(text.encode("utf-8")), tokenizer.encode_array(text)) for heldout, text in task]

    in_flight: deque[Future[list[tuple[bool, int, np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for task in _tasks(pieces):
                in_flight.append(pool.submit(encode, task))
                if len(in_flight) > 2 * workers:
                    yield from in_flight.popleft().result()
            while in_flight:
                yield from in_flight.popleft().result()
        finally:
            for future in in_flight:
                future.cancel()


def _tasks(pieces: Iterator[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Group small documents, so that handing one over costs little beside encoding it."""
    task: list[tuple[bool, str]] = []
    chars = 0
    for piece in pieces:
        task.append(piece)
        chars += len(piece[1])
        if chars >= _TASK_CHARS:
            yield task
            task, chars = [], 0
    if task:
        yield task


class SplitWriter:
    """Writes the files of one split."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, shard_tokens: int):
        self.name = name
        self._folder, self._shard_tokens = folder, shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end_of_text = np.array([tokenizer.eos_id])
        self._offsets = TokenFileWriter(folder / f"{name}.offsets", np.dtype("<u8"))
        self._shards: list[dict[str, Any]] = []
        self._shard: TokenFileWriter | None = None
        self._num_tokens = self._num_bytes = 0

    def append(self, ids: np.ndarray, num_bytes: int) -> None:
        if self._shard is None:
            path = self._folder / f"{self.name}-{len(self._shards):05d}.tokens"
            self._shard = TokenFileWriter(path, self._dtype)
        self._offsets.append(np.array([self._num_tokens]))
        self._shard.append(np.concatenate([self._end_of_text, ids]))
        self._num_tokens += 1 + len(ids)
        self._num_bytes += num_bytes
        if self._shard.count >= self._shard_tokens:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None

    def close(self) -> dict[str, Any]:
        """Return the split's entry for the manifest."""
        self._end_shard()
        num_documents = self._offsets.count
        self._offsets.append(np.array([self._num_tokens]))
        return {
            "num_tokens": self._num_tokens,
            "num_documents": num_documents,
            "num_bytes": self._num_bytes,
            "shards": self._shards,
            "offsets": self._offsets.close(),
        }

    def abandon(self) -> None:
        self._offsets.abandon()
        if self._shard is not None:
            self._shard.abandon()


def _answers(dataset: TokenDataset, request: dict[str, Any]) -> bool:
    """Whether a data set is the one asked for; also if it was made when more words were asked for than there are."""
    made_for = dataset.manifest["request"]
    if made_for == request:
        return True
    settings = made_for.get("settings", {})
    if settings.get("vocab_size") is None:
        return False
    return {**made_for, "settings": {**settings, "vocab_size": dataset.tokenizer.vocab_size}} == request


def _source(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            size = file.tell()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return {"path": str(path), "size": size, "xxh3_128": digest.hexdigest()}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = ", the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"cannot write the tokens to {out}: {error.strerror or error}{full}; what was there before is untouched, "
            "name another folder or make room"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_replaceable(out: Path) -> None:
    """Only a folder of our own files may go."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the tokens")
    foreign = [p.name for p in out.iterdir() if p.suffix not in _OURS and p.name not in _OUR_NAMES]
    if foreign:
        raise UserError(f"{out} holds other files ({', '.join(sorted(foreign)[:3])}); name an empty or new folder")


_OUR_NAMES = ("manifest.json", "tokenizer.json")


def _put_in_place(partial: Path, out: Path, old: Path) -> None:
    """Rename partial to out. Killed in between, out is the old data set, absent, or the new one."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
