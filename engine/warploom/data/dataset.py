"""TokenDataset: a folder of token shards opened for reading, mapped into memory. shards.py writes it and says what is
in it."""

from __future__ import annotations

import bisect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warploom.data.token_files import checksum, open_token_file, token_dtype
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError

FORMAT = "warploom-tokens"
VERSION = 1


class TokenSplit:
    """One side of a data set, mapped into memory, read as a ring: after the last token comes the first.

    num_tokens: tokens, one <|endoftext|> per document among them. num_bytes: UTF-8 bytes of the text behind them.
    document_starts: (num_documents,) uint64, where each document's <|endoftext|> stands. token_bytes: (vocab_size,)
    int64 bytes of text per token id. fingerprint: changes with any token.
    """

    def __init__(self, folder: Path, name: str, entry: dict[str, Any], tokenizer: Tokenizer):
        self.name = {"train": "training", "heldout": "held-out"}[name]
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int = entry["num_bytes"]
        self.token_bytes = tokenizer.token_bytes
        self._files = {folder / item["file"]: item["xxh3_128"] for item in (*entry["shards"], entry["offsets"])}
        identity = [tokenizer.sha256, *self._files.values()]
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())
        dtype = token_dtype(tokenizer.vocab_size)
        self._shards = [_open(folder, item, dtype) for item in entry["shards"]]
        self.document_starts = _open(folder, entry["offsets"], np.dtype("<u8"))[:-1]
        self._shard_starts = np.cumsum([0, *map(len, self._shards)]).tolist()
        if (self.num_tokens, self.num_documents) != (self._shard_starts[-1], len(self.document_starts)):
            raise UserError(
                f"the manifest of {folder} says {self.num_tokens} tokens of {self.num_documents} documents in {name}, "
                f"its files hold {self._shard_starts[-1]} of {len(self.document_starts)}; tokenize again"
            )

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Copy the tokens at starts[i] .. starts[i] + length of the ring; starts: (B,) in [0, num_tokens).

        Returns (B, length) int64.
        """
        windows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(windows, starts.tolist(), strict=True):
            filled = 0
            while filled < length:
                shard = bisect.bisect_right(self._shard_starts, start) - 1
                low = start - self._shard_starts[shard]
                piece = self._shards[shard][low : low + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                start = (start + len(piece)) % self.num_tokens
        return windows

    def verify(self) -> None:
        """Read every file through and hold it against its checksum. Raises UserError naming one that differs."""
        for path, expected in self._files.items():
            if checksum(open_token_file(path)) != expected:
                raise UserError(f"the checksum of {path} is not that of the manifest: it is damaged; tokenize again")


class TokenDataset:
    """A folder that tokenize_corpus has made: .manifest, .tokenizer, .train and .heldout."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Raises UserError if the folder is no complete data set of this version."""
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder / "manifest.json")
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        self.require_tokenizer(self.tokenizer)
        splits = self.manifest["splits"]
        self.train = TokenSplit(self.folder, "train", splits["train"], self.tokenizer)
        self.heldout = TokenSplit(self.folder, "heldout", splits["heldout"], self.tokenizer)

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the tokens are not this tokenizer's."""
        expected = self.manifest["tokenizer_sha256"]
        if tokenizer.sha256 != expected:
            raise UserError(
                f"the tokens in {self.folder} were made by the tokenizer {expected[:12]}, this one is "
                f"{tokenizer.sha256[:12]} (sha256); use the tokenizer of that folder, or tokenize again"
            )

    def verify(self) -> None:
        """Hold every file against its checksum. Raises UserError naming one that differs."""
        self.train.verify()
        self.heldout.verify()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path.parent} holds no tokens: no {path.name} there; run warploom tokenize first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; tokenize again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a {FORMAT} folder; tokenize again")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} has format version {manifest.get('version')!r}, this is {VERSION}; tokenize again")
    _require_fields(manifest, path)
    return manifest


def _require_fields(manifest: dict[str, Any], path: Path) -> None:
    """Refuse a manifest that lacks what is read from it, or names files outside its folder."""
    try:
        fields: list[tuple[object, type]] = [(manifest["tokenizer_sha256"], str), (manifest["request"], dict)]
        for name in ("train", "heldout"):
            split = manifest["splits"][name]
            fields += [(split[count], int) for count in ("num_tokens", "num_documents", "num_bytes")]
            for item in (*split["shards"], split["offsets"]):
                fields += [(item["file"], str), (item["count"], int), (item["xxh3_128"], str)]
                if Path(item["file"]).name != item["file"]:
                    raise UserError(f"{path} names a file outside its folder, {item['file']!r}; tokenize again")
                if not item["file"].isprintable():
                    raise UserError(f"{path} names a file {item['file']!a}, which no file is called; tokenize again")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged, a field is missing: {error!r}; tokenize again") from error
    for value, kind in fields:
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise UserError(f"{path} is damaged: {value!r:.80} stands where a {kind.__name__} should; tokenize again")


def _open(folder: Path, entry: dict[str, Any], dtype: np.dtype[Any]) -> np.ndarray:
    path = folder / entry["file"]
    values = open_token_file(path)
    if values.dtype != dtype:
        raise UserError(f"the token file {path} holds {values.dtype}, not {dtype} as it should; tokenize again")
    if len(values) != entry["count"]:
        raise UserError(
            f"the token file {path} holds {len(values)} tokens, the manifest says {entry['count']}; tokenize again"
        )
    return values
