"""The tokenizer that lies beside the weights of a model, in whichever of its forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from warploom.checkpoint.format import parse_json
from warploom.data.tokenizer import END_OF_TEXT, Tokenizer
from warploom.errors import UserError
from warploom.interchange import vocabulary


def find_tokenizer(
    folder: Path, token_ids: Mapping[str, int], on_message: Callable[[str], None] = lambda text: None
) -> Tokenizer | None:
    """Read tokenizer.json, vocab.json with merges.txt, tokenizer.model or vocab.txt; None, and a message, if there is
    none of them. token_ids: bos and eos of config.json, where tokenizer_config.json names no tokens.

    Raises UserError for a file that cannot be used.
    """
    settings = _read_object(folder / "tokenizer_config.json")
    document = _document(folder)
    if document is None:
        on_message(f"{folder} holds no tokenizer that is known here: the checkpoint can be scored on tokens alone.")
        return None
    encoder = tokenizers.Tokenizer.from_str(document)
    eos_id = _named_id(encoder, settings.get("eos_token"), token_ids.get("eos"))
    if eos_id is None:
        eos_id = encoder.token_to_id(END_OF_TEXT)
    if eos_id is None:
        eos_id = _named_id(encoder, settings.get("sep_token"), encoder.token_to_id("[SEP]"))
    if eos_id is None:
        raise UserError(f"{folder} does not say which token ends a text: give eos_token_id in its config.json")
    bos_id = _named_id(encoder, settings.get("bos_token"), token_ids.get("bos"))
    template = settings.get("chat_template")
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return Tokenizer.adopt(
        document,
        eos_id=eos_id,
        begin_ids=_begin_ids(encoder, settings, bos_id),
        bos_id=bos_id,
        chat_template=template if isinstance(template, str) else None,
    )


def _document(folder: Path) -> str | None:
    if (folder / "tokenizer.json").is_file():
        document = (folder / "tokenizer.json").read_bytes()
        try:
            text = document.decode("utf-8")
            tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for JSON that it cannot use
            raise UserError(f"{folder / 'tokenizer.json'} cannot be used: {error}") from error
        return text
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Tokenizer.load(folder).library_json().decode("utf-8")
    if (folder / "tokenizer.model").is_file():
        return vocabulary.from_sentencepiece(folder / "tokenizer.model")
    if (folder / "vocab.txt").is_file():
        return _word_pieces(folder / "vocab.txt")
    return None


def _word_pieces(path: Path) -> str:
    """BERT's WordPiece in lower case, with its marks around a text."""
    words = path.read_text(encoding="utf-8").splitlines()
    vocab = {word: index for index, word in enumerate(words)}
    missing = [mark for mark in ("[UNK]", "[CLS]", "[SEP]") if mark not in vocab]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is no vocabulary of BERT")
    encoder = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    encoder.normalizer = normalizers.BertNormalizer()
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.decoder = tokenizers.decoders.WordPiece()
    encoder.add_special_tokens([mark for mark in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if mark in vocab])
    encoder.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(mark, vocab[mark]) for mark in ("[CLS]", "[SEP]")]
    )
    return encoder.to_str()


def _begin_ids(encoder: tokenizers.Tokenizer, settings: Mapping[str, Any], bos_id: int | None) -> list[int]:
    """What the file puts before a text; for files that do not say so, what its Python class would."""
    plain = encoder.encode("a", add_special_tokens=False).ids
    marked = encoder.encode("a", add_special_tokens=True).ids
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain and start:
            return marked[:start]
    adds = settings.get("add_bos_token")
    if adds is None:
        adds = str(settings.get("tokenizer_class", "")).startswith("Llama") or '"Prepend"' in encoder.to_str()
    return [bos_id] if adds and bos_id is not None else []


def _named_id(encoder: tokenizers.Tokenizer, token: Any, otherwise: int | None) -> int | None:
    """The id of a token of tokenizer_config.json, which is a text or {"content": text}."""
    name = token.get("content") if isinstance(token, dict) else token
    found = encoder.token_to_id(name) if isinstance(name, str) else None
    return otherwise if found is None else found


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return values if isinstance(values, dict) else {}
