"""Tokenizer: any text comes back, control tokens cannot be smuggled in, and training is deterministic."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from warploom.data import tokenizer as tokenizer_module
from warploom.data.tokenizer import END_OF_TEXT, Tokenizer
from warploom.errors import UserError

TEXTS = ["the cat sat on the mat\n", "def f(x):\n    return x**2  # square\n", "caf\u00e9 na\u00efve \u65e5\u672c"] * 3
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@given(text=any_text)
@example(text=f"a{END_OF_TEXT}b")
@example(text="\x00\ufeff\u202e\r\n\t  \u200b")
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.fixture(scope="module")
def whitespace_tokenizer():
    """One whose tokens join white space of every kind, so that a cut in the wrong place shows."""
    rng = random.Random(0)
    runs = ["".join(rng.choices(" \n\r\t", k=rng.randrange(1, 5))) for _ in range(2000)]
    return Tokenizer.train([run + rng.choice(["", "a", "."]) for run in runs], 500)


@given(text=st.text(st.sampled_from("ab \n.'s\r\t\u00e9\x1c"), max_size=300))
def test_encoding_in_pieces_gives_the_same_ids(whitespace_tokenizer, text):
    tokenizer = whitespace_tokenizer
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE_CHARS", 5)
        assert "".join(tokenizer._pieces(text)) == text
        assert tokenizer.encode(text) == whole
        assert tokenizer.encode_array(text).tolist() == whole


def test_encoding_in_pieces_of_real_text(shared_data):
    text = (shared_data / "corpora/tinyshakespeare.txt").read_text()[:300_000]
    tokenizer = Tokenizer.train([text], 2000)
    pieces = list(tokenizer._pieces(text))
    assert len(pieces) == 5
    assert max(map(len, pieces)) < 1.01 * tokenizer_module._PIECE_CHARS
    whole = tokenizer._encoder.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_array(text).tolist() == whole


@pytest.mark.parametrize("text", ["a" * 10**6, "^" * 10**6, " " * 10**6, "\n" * 10**6, "ab" * 500_000])
def test_a_megabyte_without_a_word_border(tokenizer, text):
    """Quadratic work would take 10**12 steps here and run into the test's timeout."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_come_only_from_us(tokenizer):
    assert tokenizer.eos_id == 0
    assert tokenizer.decode([tokenizer.eos_id]) == END_OF_TEXT
    ids = tokenizer.encode(END_OF_TEXT)
    assert len(ids) > 1 and tokenizer.eos_id not in ids
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


def test_training_is_deterministic_and_does_not_depend_on_order(shared_data):
    lines = (shared_data / "corpora/tinyshakespeare.txt").read_text()[:200_000].splitlines(keepends=True)
    first = Tokenizer.train(lines, 1000)
    random.Random(0).shuffle(lines)
    assert Tokenizer.train(lines, 1000).to_bytes() == first.to_bytes()
    assert first.vocab_size == 1000
    assert len(first.encode("the king")) < len("the king")


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so():
    tokenizer = Tokenizer.train(["abab"], 5000)
    assert tokenizer.vocab_size == 258  # bytes, end of text, "ab"
    assert Tokenizer.train([], 5000).vocab_size == 257


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for loaded in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "tokenizer.json"),
        Tokenizer.from_bytes(tokenizer.to_bytes()),
    ):
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode(TEXTS[2] + END_OF_TEXT) == tokenizer.encode(TEXTS[2] + END_OF_TEXT)


def test_the_hash_depends_on_content_not_layout(tokenizer):
    pretty = json.dumps(json.loads(tokenizer.to_bytes()), indent=2).encode()
    assert Tokenizer.from_bytes(pretty).sha256 == tokenizer.sha256
    assert Tokenizer.train(TEXTS, 299).sha256 != tokenizer.sha256


def test_gpt2_style_files(tokenizer, tmp_path):
    model = json.loads(tokenizer.to_bytes())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size and loaded.eos_id == tokenizer.eos_id
    text = TEXTS[1] + END_OF_TEXT
    assert loaded.encode(text) == tokenizer.encode(text)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="vocab.json and .*merges.txt make no BPE"):
        Tokenizer.load(tmp_path)


def _other(model=None, normalizer=None, splitter=None, decoder=None, end_of_text=True):
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    encoder = tokenizers.Tokenizer(model or models.BPE(vocab, []))
    encoder.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoder or decoders.ByteLevel()
    if normalizer:
        encoder.normalizer = normalizer
    if end_of_text:
        encoder.add_special_tokens([END_OF_TEXT])
    return encoder.to_str().encode()


def _said_to_be_adopted(**changes):
    entry = {"eos_id": 0, "begin_ids": [], "bos_id": None, "chat_template": None, **changes}
    return json.dumps({**json.loads(_other()), "warploom": entry}).encode()


def test_a_tokenizer_that_was_adopted_is_taken():
    assert Tokenizer.from_bytes(_said_to_be_adopted()).eos_id == 0


def test_another_byte_level_tokenizer_is_taken():
    """As Llama 3 has it: a pattern of its own, then bytes; no line end is a safe place to cut."""
    digits = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    loaded = Tokenizer.from_bytes(_other(splitter=pre_tokenizers.Sequence([digits, byte_level])))
    text = "a1\nb" * 50_000
    assert loaded.decode(loaded.encode(text)) == text
    assert len(list(loaded._pieces(text))) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04.", "is not UTF-8 at byte 0"),
        (b"{", "cannot be used"),
        (b"[]", "cannot be used"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": {"type": "BPE"}}', "cannot be used"),
        (_other(model=models.WordLevel({"a": 0}, unk_token="a")), "must be byte-level BPE .* got model WordLevel"),
        (_other(normalizer=normalizers.NFC()), "without a normalizer .* normalizer NFC"),
        (_other(splitter=pre_tokenizers.ByteLevel(add_prefix_space=True)), "an added first space"),
        (_other(decoder=decoders.Fuse()), "got .* decoder Fuse"),
        (_other(model=models.BPE({"a": 0}, [])), "lacks 255 of the 256 byte tokens"),
        (_other(end_of_text=False), r"has no token '<\|endoftext\|>'"),
        (_said_to_be_adopted(eos_id=None), "cannot be used"),
        (_said_to_be_adopted(eos_id=99_999), "has no token 99999, which is said to begin or end a text"),
        (_said_to_be_adopted(begin_ids=[-1]), "cannot be used"),
    ],
)
def test_a_file_that_is_no_byte_level_tokenizer_is_refused(tmp_path, data, message):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(UserError, match=f"tokenizer.json: the tokenizer .*{message}") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer .*tokenizer.json: No such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"ids\[1\] must be in \[0, {tokenizer.vocab_size}\), got {bad}"):
        tokenizer.decode([5, bad])


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"the text 'a\\ud800' holds a lone surrogate"):
        tokenizer.encode("a\ud800")


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab-size must be at least 257.*got 256"):
        Tokenizer.train(TEXTS, 256)


def test_token_bytes_are_the_bytes_of_each_token(tokenizer):
    lengths = tokenizer.token_bytes
    assert lengths.shape == (tokenizer.vocab_size,)
    assert np.array_equal(np.flatnonzero(lengths == 0), [tokenizer.eos_id])
    assert (lengths == 1).sum() == 256
