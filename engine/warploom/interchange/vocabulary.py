"""Vocabularies of other programs as the JSON of a `tokenizers` tokenizer: tiktoken ranks, SentencePiece, GGUF."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from warploom.errors import UserError, nearest

# How each encoding cuts text before merging, as published in tiktoken's openai_public.py.
_CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k_base": _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k_base": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?:{_CONTRACTIONS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?:{_CONTRACTIONS})?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# tokenizer.ggml.pre of GGUF files -> the pattern, and whether digits are cut apart before it.
GGUF_PATTERNS = {
    "default": ("gpt2", False),
    "gpt-2": ("gpt2", False),
    "smollm": ("gpt2", True),
    "llama-bpe": ("cl100k_base", False),
    "gpt-4o": ("o200k_base", False),
}
SPACE = "\u2581"  # SentencePiece's
# Kinds of SentencePiece pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pattern: str, control: Sequence[str], digits: bool
) -> str:
    """The JSON of a byte-level BPE. vocab: tokens in GPT-2's alphabet for bytes; pattern: a key of PATTERNS; control:
    tokens that text never gives; digits: cut each digit apart first."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    splitters: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern == "gpt2":
        splitters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        splitters.append(pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"))
        splitters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = splitters[0] if len(splitters) == 1 else pre_tokenizers.Sequence(splitters)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer.to_str()


def from_tiktoken(path: Path, pattern: str, control: Mapping[str, int]) -> str:
    """The JSON of a .tiktoken file: lines of a token in base64 and its rank, which is its id.

    control: control tokens and their ids. Raises UserError for a file that is not one.
    """
    if pattern not in PATTERNS:
        raise UserError(f"there is no pattern {pattern!r}{nearest(pattern, PATTERNS)}")
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"{path} is no tiktoken file: {error}") from error
    spell = {byte: letter for letter, byte in _byte_alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join(spell[byte] for byte in token)

    vocab = {spelled(token): rank for token, rank in ranks.items()} | dict(control)
    # A token of more than one byte was made by one merge: of the two that its bytes come to under earlier ranks.
    merges = [
        (spelled(left), spelled(right))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for left, right in [_last_merge(ranks, token, rank)]
    ]
    return byte_level(vocab, merges, pattern, list(control), digits=False)


def from_sentencepiece(path: Path) -> str:
    """The JSON of a SentencePiece BPE .model file with byte fallback, such as Llama 2's or Mistral's.

    Raises UserError for a file that is not one.
    """
    try:
        pieces, settings = _parse_sentencepiece(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise UserError(f"{path} is no SentencePiece model: {error}") from error
    if settings["model_type"] != _SENTENCEPIECE_BPE:
        raise UserError(f"{path} is no SentencePiece BPE but model type {settings['model_type']}; convert it elsewhere")
    return pieces_bpe([p[0] for p in pieces], [p[1] for p in pieces], [p[2] for p in pieces], settings["dummy_prefix"])


def pieces_bpe(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], dummy_prefix: bool) -> str:
    """The JSON of SentencePiece's BPE: pieces by id, with a score each (higher merges first) and a kind.

    dummy_prefix: a space is put before the text.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for index, piece in enumerate(pieces):
        if kinds[index] == NORMAL and len(piece) > 1:
            splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            # Among the ways to make one piece, the one whose parts have the lower ids comes first.
            known = sorted(
                (pair for pair in splits if pair[0] in vocab and pair[1] in vocab),
                key=lambda p: (vocab[p[0]], vocab[p[1]]),
            )
            merges += [(-scores[index], pair) for pair in known]
    merges.sort(key=lambda item: item[0])
    unknown = next((pieces[i] for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=[pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    steps: list[Any] = [normalizers.Prepend(SPACE)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if dummy_prefix else [])
    )
    control = [pieces[i] for i, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    defined = [pieces[i] for i, kind in enumerate(kinds) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
    return tokenizer.to_str()


def from_gguf(fields: Mapping[str, Any]) -> str:
    """The JSON of the tokenizer in a GGUF file's metadata. Raises UserError for a kind that is not known."""
    model, tokens = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if model == "gpt2":
        pre = fields.get("tokenizer.ggml.pre", "default")
        if pre not in GGUF_PATTERNS:
            raise UserError(f"the GGUF file's tokenizer cuts text by {pre!r}; known: {', '.join(GGUF_PATTERNS)}")
        pattern, digits = GGUF_PATTERNS[pre]
        merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
        vocab = {token: index for index, token in enumerate(tokens)}
        return byte_level(vocab, merges, pattern, control, digits)
    if model == "llama":
        prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
        return pieces_bpe(tokens, fields["tokenizer.ggml.scores"], kinds, prefix)
    raise UserError(f"the GGUF file has a tokenizer of kind {model!r}; known: gpt2, llama")


def gguf_pattern(document: Mapping[str, Any]) -> str | None:
    """The tokenizer.ggml.pre that stands for the pre-tokenizer of a byte-level BPE, None if there is none."""
    wanted = document["pre_tokenizer"]
    for name, (pattern, digits) in GGUF_PATTERNS.items():
        made = json.loads(byte_level({}, [], pattern, [], digits))["pre_tokenizer"]
        if _without_defaults(made) == _without_defaults(wanted):
            return name
    return None


def _without_defaults(splitter: Any) -> Any:
    """A pre-tokenizer without trim_offsets, which changes no token."""
    if isinstance(splitter, dict):
        return {key: _without_defaults(value) for key, value in splitter.items() if key != "trim_offsets"}
    return [_without_defaults(part) for part in splitter] if isinstance(splitter, list) else splitter


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _last_merge(ranks: Mapping[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise UserError(f"the tiktoken file is not whole: no two earlier tokens make {token!r}")
    return parts[0], parts[1]


# SentencePiece's protocol buffer (sentencepiece_model.proto): the few fields that matter.
_SENTENCEPIECE_BPE = 2


def _parse_sentencepiece(data: bytes) -> tuple[list[tuple[str, float, int]], dict[str, Any]]:
    pieces, settings = [], {"model_type": 1, "dummy_prefix": True}
    for number, value in _fields(data):
        if number == 1:
            piece: dict[int, Any] = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))
            pieces.append((piece[1].decode("utf-8"), score, int(piece.get(3, NORMAL))))
        elif number == 2:
            settings["model_type"] = dict(_fields(value)).get(3, 1)
        elif number == 3:
            settings["dummy_prefix"] = bool(dict(_fields(value)).get(3, 1))
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces, settings


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: (number, int for varints, bytes for all else)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field {number} has wire type {kind}")
        size, at = _varint(data, at) if kind == 2 else ((8 if kind == 1 else 4), at)
        if at + size > len(data):
            raise ValueError("it ends within a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than 10 bytes")
