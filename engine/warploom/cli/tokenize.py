"""warploom tokenize: encode text into token shards, with a tokenizer trained on it or one that exists."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from warploom.data.shards import TokenDataset, tokenize_corpus
from warploom.data.stdlib import stdlib_paths
from warploom.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Command:
    """Encode text into token shards that training maps into memory."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT ...]")] = ()
    """Files, folders or quoted globs: .txt .md .py .jsonl .jsonl.gz .jsonl.xz .jsonl.zst .parquet. Without any,
    the built-in corpus: the Python standard library."""
    out: Path = Path("tokens")
    """Folder to write. If it holds the same text with the same settings already, it is only checked."""
    vocab_size: int = 8192
    """Tokens of the tokenizer to be trained, the 256 bytes and <|endoftext|> included."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one or with GPT-2's vocab.json and merges.txt, instead of training one."""
    heldout_fraction: float = 0.05
    """Share of the text that is only measured on, chosen by a hash of the text."""
    heldout_unit: Literal["auto", "document", "block"] = "auto"
    """What is held out as one: whole documents, or blocks of about 4,000 characters; auto takes blocks if the
    documents are few."""
    text_column: str = "text"
    """Field of .jsonl and column of .parquet that holds the text."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """What to do where a file is not UTF-8: stop and name the byte, or put U+FFFD there."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What to do with a line that holds no usable text: stop and name it, or leave it out and count it."""
    workers: int | None = None
    """Threads that encode; all cores by default."""

    def run(self) -> None:
        tokenizer = None if self.tokenizer is None else Tokenizer.load(self.tokenizer)
        with _ProgressBar() as progress:
            dataset = tokenize_corpus(
                self.paths or stdlib_paths(),
                self.out,
                vocab_size=self.vocab_size,
                tokenizer=tokenizer,
                heldout_fraction=self.heldout_fraction,
                heldout_unit=self.heldout_unit,
                text_column=self.text_column,
                on_bad_utf8=self.on_bad_utf8,
                on_bad_line=self.on_bad_line,
                workers=self.workers,
                progress=progress.update,
            )
        print(summary(dataset))


def summary(dataset: TokenDataset) -> str:
    """The figures of a data set, one line each."""
    manifest = dataset.manifest
    lines = [
        f"{dataset.folder}: {len(manifest['request']['sources'])} files, {manifest['documents_read']} documents",
        f"vocabulary   {manifest['vocab_size']} tokens, sha256 {manifest['tokenizer_sha256'][:12]}",
    ]
    for split in (dataset.train, dataset.heldout):
        lines.append(
            f"{split.name:<13}{split.num_tokens:,} tokens, {split.num_documents:,} documents, "
            f"{split.num_bytes:,} bytes, {split.num_bytes / split.num_tokens:.2f} bytes per token"
        )
    lines.append(f"held out by the hash of each {manifest['heldout_unit']}")
    lines += [f"left out     {count} {reason}" for reason, count in manifest["documents_left_out"].items()]
    lines += [f"note: {note}" for note in manifest["notes"]]
    return "\n".join(lines)


class _ProgressBar:
    """Shows the stages of tokenize_corpus on stderr; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[megabytes]:.0f} MB"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._progress.add_task("", megabytes=0.0, total=None)

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int | None) -> None:
        self._progress.update(self._task, description=stage, completed=done, total=total, megabytes=done / 1e6)
