"""Tokenizer: byte-level BPE, a thin cover over Hugging Face `tokenizers`.

Any text round-trips: decode(encode(text)) == text, since each token is a string of bytes and nothing is normalised.
The control token <|endoftext|> comes only from us: the same characters inside text are encoded as plain text.

The tokenizer of an imported model may be of another kind (adopt), and says which of its tokens begin and end a text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from warploom.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # each byte, and the end of text
# A pair seen once would be a token learnt by heart.
_MIN_FREQUENCY = 2
# Longer texts are encoded in pieces: the library holds an object of some hundred bytes per token of one text.
_PIECE_CHARS = 1 << 16
# The entry that an adopted tokenizer has beside those of the library, which does not see it.
_ADOPTED = "warploom"


class Tokenizer:
    """Text to token ids and back. Made by train, load or from_bytes."""

    def __init__(self, document: str):
        """document: the JSON of a `tokenizers` tokenizer. Raises UserError if it is neither byte-level BPE nor made by
        adopt."""
        try:
            self._read(document)
        except UserError:
            raise
        except RecursionError as error:
            raise UserError("the tokenizer file is JSON nested too deeply; give a tokenizer.json") from error
        except BaseException as error:
            # The library raises bare Exception for JSON that it cannot use, and lets Rust's panics, which are none,
            # through where it did not think of it.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the tokenizer file cannot be used: {error}; give a tokenizer.json") from error

    def _read(self, document: str) -> None:
        settings = json.loads(document)
        # Canonical, so that the hash does not depend on the library's version or on how a file was laid out.
        self._json = json.dumps(settings, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self._json.encode()  # raises where there is half a surrogate pair
        adopted = settings.pop(_ADOPTED, None)
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(_without_strip(settings)))
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.chat_template: str | None = None
        if adopted is None:
            _require_byte_level(settings, self._encoder)
            eos_id = self._encoder.token_to_id(END_OF_TEXT)
            if eos_id is None:
                raise UserError(f"the tokenizer has no token {END_OF_TEXT!r}; give one that has")
            self.eos_id: int = eos_id
            self.begin_ids: tuple[int, ...] = (eos_id,)
            self.bos_id: int | None = eos_id  # what a chat template calls bos_token
        else:
            self.eos_id, self.begin_ids = int(adopted["eos_id"]), tuple(map(int, adopted["begin_ids"]))
            self.bos_id = adopted.get("bos_id")
            if self.bos_id is None and self.begin_ids:
                self.bos_id = self.begin_ids[0]
            self.chat_template = adopted["chat_template"]
            for token in (self.eos_id, *self.begin_ids, *(() if self.bos_id is None else (self.bos_id,))):
                if self._encoder.id_to_token(token) is None:
                    raise UserError(f"the tokenizer has no token {token}, which is said to begin or end a text")
        self._unit = _unit(settings)
        # GPT-2's pattern, and nothing before it.
        self._splittable = self._unit == "byte" and (settings.get("pre_tokenizer") or {}).get("use_regex", False)
        self.vocab_size: int = max(self._encoder.get_vocab().values()) + 1

    @classmethod
    def adopt(
        cls,
        document: str,
        *,
        eos_id: int,
        begin_ids: Sequence[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """Make the tokenizer of an imported model: document as in __init__, of any kind that the library has.

        eos_id ends a text; begin_ids come before every text that the model reads; bos_id is the token that its chat
        template may write first, by default the first of these. Raises UserError for a document that the library
        cannot use and for ids that it does not know.
        """
        try:
            settings = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the tokenizer file cannot be used: {error}; give a tokenizer.json") from error
        if not isinstance(settings, dict):
            raise UserError("the tokenizer file is not a JSON object; give a tokenizer.json")
        settings[_ADOPTED] = {
            "eos_id": eos_id,
            "begin_ids": list(begin_ids),
            "bos_id": bos_id,
            "chat_template": chat_template,
        }
        return cls(json.dumps(settings))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of at most vocab_size tokens, the 256 bytes and <|endoftext|> (id 0) included.

        The same texts give the same tokenizer, in any order and on any number of cores. It comes out smaller if the
        texts have too few pairs that occur twice: compare .vocab_size. Raises UserError if vocab_size < 257.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab-size must be at least {MIN_VOCAB_SIZE}, one per byte and one more, got {vocab_size}"
            )
        encoder = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        encoder.train_from_iterator(texts, trainer)
        return cls(encoder.to_str())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or a folder with one or with GPT-2's vocab.json and merges.txt.

        Raises UserError if there is none or it is not byte-level BPE.
        """
        path = Path(path)
        if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "merges.txt").exists():
            return cls._load_merges(path / "vocab.json", path / "merges.txt")
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls.from_bytes(file.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {file}: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    @classmethod
    def _load_merges(cls, vocab: Path, merges: Path) -> Tokenizer:
        try:
            encoder = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises bare Exception for files that it cannot use
            raise UserError(f"{vocab} and {merges} make no BPE: {error}") from error
        encoder.add_special_tokens([END_OF_TEXT])
        return cls(encoder.to_str())

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Make the tokenizer of to_bytes again. Raises UserError if it is not one."""
        try:
            return cls(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"the tokenizer file is not UTF-8 at byte {error.start}; give a tokenizer.json") from error

    def to_bytes(self) -> bytes:
        """The canonical JSON: sorted keys, no white space, UTF-8."""
        return self._json.encode("utf-8")

    def save(self, path: str | Path) -> None:
        """Write to_bytes to a file."""
        Path(path).write_bytes(self.to_bytes())

    def library_json(self) -> bytes:
        """to_bytes as every program that uses the library reads it: without what adopt added."""
        settings = json.loads(self._json)
        settings.pop(_ADOPTED, None)
        return json.dumps(settings, ensure_ascii=False, indent=2).encode("utf-8")

    def token(self, index: int) -> str | None:
        """The token with this id as the vocabulary writes it, None if there is none."""
        return self._encoder.id_to_token(index)

    def token_id(self, token: str) -> int | None:
        """The id of a token, control tokens among them; None if there is none."""
        return self._encoder.token_to_id(token)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of to_bytes: what token files and checkpoints are held against."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of text, without <|endoftext|>. Raises UserError for a lone surrogate, which is no text."""
        return self.encode_batch([text])[0]

    def encode_beginning(self, text: str) -> list[int]:
        """Token ids of a text that begins a document: begin_ids and those of encode. Never empty: a model that begins
        without a token reads the end of another text before no text at all."""
        return [*self.begin_ids, *self.encode(text)] or [self.eos_id]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode several texts at once, in the library's own threads and outside the interpreter's lock."""
        pieces = [list(self._pieces(text)) for text in texts]
        try:
            encoded = self._encoder.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False)
        except TypeError as error:  # what the library makes of a str that UTF-8 cannot hold
            bad = next((text for text in texts if not _is_utf8(text)), None)
            if bad is None:
                raise
            raise UserError(f"the text {bad[:40]!a} holds a lone surrogate; remove it") from error
        ids = (encoding.ids for encoding in encoded)
        return [next(ids) if len(ps) == 1 else [i for _ in ps for i in next(ids)] for ps in pieces]

    def encode_array(self, text: str) -> np.ndarray:
        """encode as an int64 array, in the calling thread alone and outside the interpreter's lock."""
        pieces = [
            self._encoder.encode_batch_fast([piece], add_special_tokens=False)[0].ids for piece in self._pieces(text)
        ]
        return np.concatenate([np.array(ids, dtype=np.int64) for ids in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; the control token shows as its name, and bytes that are not UTF-8 as U+FFFD.

        Raises ValueError for an id outside [0, vocab_size).
        """
        ids = list(ids)
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids[{index}] must be in [0, {self.vocab_size}), got {token}")
        return self._encoder.decode(ids, skip_special_tokens=False)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """The tokens that encode never makes of text, by name: <|endoftext|>, and what else the tokenizer brings."""
        added = self._encoder.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text behind each token, 0 for control tokens. They add up to the text's (and,
        with SentencePiece, the space put before it). Raises UserError for a vocabulary that does not keep the text."""
        if self._unit == "word":
            raise UserError("this tokenizer changes text, so its tokens cannot be counted in bytes of it; take another")
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._encoder.get_vocab().items():
            if self._unit == "byte":
                lengths[index] = len(token)  # one character per byte in the byte-level alphabet
            elif _BYTE_PIECE.fullmatch(token):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace(_SPACE_PIECE, " ").encode("utf-8"))
        for index in self.control_tokens.values():
            lengths[index] = 0
        return lengths

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a long text where its words are cut anyway, so that the ids stay the same.

        The pattern of GPT-2 takes a line end between two visible characters as a word of its own; other white space
        may join the word after it. A text without such a line end stays whole.
        """
        start = 0
        if self._splittable:
            while len(text) - start > _PIECE_CHARS:
                border = _BORDER.search(text, start + _PIECE_CHARS)
                if border is None:
                    break
                yield text[start : border.end()]
                start = border.end()
        yield text[start:]


def require_vocab_size(vocab_size: int) -> None:
    """Raise UserError if a vocabulary of this size cannot be trained."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab-size must be at least {MIN_VOCAB_SIZE}, one per byte and one more, got {vocab_size}")


_BORDER = re.compile(r"(?<=[!-~])\n(?=[!-~])")


# SentencePiece writes a space so, and a byte that is part of no piece.
_SPACE_PIECE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def _unit(settings: dict[str, Any]) -> str:
    """What the tokens of a vocabulary are written in: "byte", "piece" (SentencePiece) or "word" (all others)."""
    decoder = json.dumps(settings.get("decoder"))
    if '"ByteLevel"' in decoder:
        return "byte"
    return "piece" if '"ByteFallback"' in decoder or '"Metaspace"' in decoder else "word"


def _without_strip(settings: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's decoder drops the space before the first word, which is that of a text, but not of a
    continuation: what is decoded piece by piece must keep it."""
    decoder = settings.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "Sequence":
        return settings
    kept = [part for part in decoder["decoders"] if part["type"] != "Strip"]
    return {**settings, "decoder": {**decoder, "decoders": kept}}


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _require_byte_level(settings: dict[str, Any], encoder: tokenizers.Tokenizer) -> None:
    def part(name: str) -> dict[str, Any]:
        return settings.get(name) or {"type": None}

    splitters = part("pre_tokenizer").get("pretokenizers", [part("pre_tokenizer")])
    if (
        part("model")["type"] != "BPE"
        or part("normalizer")["type"] is not None
        or part("decoder")["type"] != "ByteLevel"
        or not any(s["type"] == "ByteLevel" and not s["add_prefix_space"] for s in splitters)
    ):
        got = ", ".join(f"{name} {part(name)['type']}" for name in ("model", "normalizer", "pre_tokenizer", "decoder"))
        raise UserError(
            "the tokenizer must be byte-level BPE without a normalizer or an added first space, so that text comes "
            f"back as it was, got {got}; train one, or give another"
        )
    missing = [byte for byte in pre_tokenizers.ByteLevel.alphabet() if encoder.token_to_id(byte) is None]
    if missing:
        raise UserError(f"the tokenizer lacks {len(missing)} of the 256 byte tokens; give one that has all")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
