"""Sampling from small random models: with and without the cache, ragged prompts, stop strings, streaming."""

import pytest
import torch

from warploom.errors import UserError
from warploom.generate.beam import beam_search
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import TextStream, generate, pad_right
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer


class ByteCodec:
    """Token i is byte i; 256 ends a document."""

    eos_id = 256
    vocab_size = 257

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_beginning(self, text):
        return [256, *self.encode(text)]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=257, max_seq_len=48, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, init_std=0.3)
    return Transformer(TransformerConfig(**{**shape, **changes}))


def test_a_padded_vocabulary_has_no_words_of_its_own():
    """Rows of the output layer that no token goes with are never drawn, however likely they are."""
    model = tiny(vocab_size=320)
    with torch.no_grad():
        model.output_weight[257:] *= 50
    drawn = []

    class Watching(ByteCodec):
        def decode(self, ids):
            drawn.extend(ids)
            return super().decode(ids)

    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=20, repetition_penalty=1.3, num_samples=3)
        generate(model, Watching(), ["the quick", "a"], sampling)
    assert len(drawn) > 20 and max(drawn) < 257


def test_tokens_are_told_apart_that_bfloat16_does_not():
    """The last product is made in float32: logits of 8 and more lie 1/16 apart in bfloat16."""
    model = tiny(tie_embeddings=False)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        hidden = model(torch.tensor([[256]]))[0, 0].float()  # of the empty prompt
        model.output_weight.zero_()
        model.output_weight[70] = 9.0 * hidden / hidden.dot(hidden)
        model.output_weight[71] = 9.01 * hidden / hidden.dot(hidden)
        assert torch.equal(*model.logits(hidden.bfloat16())[70:72])
    assert generate(model, ByteCodec(), [""], SamplingConfig(temperature=0.0, max_new_tokens=1)) == [["G"]]


POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "t5", "none")
RAGGED = ["a", "the quick brown fox", "", "hello"]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_and_no_cache_give_the_same_tokens(position, temperature):
    model = tiny(position=position)
    outputs = [
        generate(
            model,
            ByteCodec(),
            RAGGED,
            SamplingConfig(temperature=temperature, max_new_tokens=12, use_cache=use_cache, seed=3),
        )
        for use_cache in (True, False)
    ]
    assert outputs[0] == outputs[1]


def test_a_prompt_is_continued_the_same_alone_and_in_a_batch():
    model = tiny()
    sampling = SamplingConfig(temperature=0.9, max_new_tokens=10, num_samples=2)
    together = generate(model, ByteCodec(), RAGGED, sampling)
    assert generate(model, ByteCodec(), RAGGED[0], sampling) == together[:1]


def test_greedy_matches_a_plain_loop():
    model = tiny().eval()
    ids = [256, *b"abc"]
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    text = generate(model, ByteCodec(), "abc", SamplingConfig(temperature=0.0, max_new_tokens=10))[0][0]
    expected = ids[4:]
    if 256 in expected:
        expected = expected[: expected.index(256)]
    assert text == ByteCodec().decode(expected)


def test_seeds_decide():
    model = tiny()
    first, again, other = (
        generate(model, ByteCodec(), "x", SamplingConfig(temperature=1.5, max_new_tokens=16, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_samples_of_one_prompt_differ():
    texts = generate(tiny(), ByteCodec(), "x", SamplingConfig(temperature=1.5, max_new_tokens=16, num_samples=3))[0]
    assert len(set(texts)) == 3


def test_stop_string_ends_the_sample_and_is_cut_off():
    model = tiny()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=30)
    full = generate(model, ByteCodec(), "abc", sampling)[0][0]
    stop = full[4:6]
    stopped = generate(
        model, ByteCodec(), "abc", SamplingConfig(temperature=0.0, max_new_tokens=30, stop=("never", stop))
    )
    assert stopped[0][0] == full[: full.index(stop)]


def test_streamed_pieces_add_up_to_the_text():
    pieces: dict[tuple[int, int], str] = {}

    def on_text(prompt, sample, piece):
        pieces[prompt, sample] = pieces.get((prompt, sample), "") + piece

    sampling = SamplingConfig(temperature=1.2, max_new_tokens=20, num_samples=2, stop=("q", "zz"))
    texts = generate(tiny(), ByteCodec(), RAGGED, sampling, on_text=on_text)
    for prompt, samples in enumerate(texts):
        for sample, text in enumerate(samples):
            assert pieces.get((prompt, sample), "") == text


def test_stream_holds_back_half_characters_and_possible_stops():
    stream = TextStream(ByteCodec(), stop=("END",))
    euro = "\u20ac".encode()
    assert [stream.add(byte) for byte in euro] == [("", False), ("", False), ("\u20ac", False)]
    assert stream.add(ord("E")) == ("", False)
    assert stream.add(ord("N")) == ("", False)
    assert stream.add(ord("x")) == ("ENx", False)
    assert [stream.add(ord(c)) for c in "yEND"] == [("y", False), ("", False), ("", False), ("", True)]
    assert stream.text == "\u20acENxy"
    tail = TextStream(ByteCodec(), stop=("END",))
    tail.add(ord("E"))
    assert tail.end() == "E"


def test_generation_stops_when_the_context_is_full():
    text = generate(tiny(), ByteCodec(), "x" * 40, SamplingConfig(temperature=1.0, max_new_tokens=500))[0][0]
    assert len(text) <= 7


def test_prompt_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="has 49 tokens and the model's context is 48"):
        generate(tiny(), ByteCodec(), "x" * 48)


def test_training_mode_is_restored():
    model = tiny(dropout=0.5).train()
    a, b = (generate(model, ByteCodec(), "x", SamplingConfig(temperature=0.0, max_new_tokens=8)) for _ in range(2))
    assert a == b and model.training


def test_encoder_decoder_samples_with_and_without_the_cache():
    model = tiny(architecture="encoder-decoder", position="sinusoidal")
    outputs = [
        generate(
            model,
            ByteCodec(),
            ["", "ab"],
            SamplingConfig(temperature=0.0, max_new_tokens=8, use_cache=use_cache),
            sources=["a long source", "short"],
        )
        for use_cache in (True, False)
    ]
    assert outputs[0] == outputs[1]


def test_beam_search_finds_the_likeliest_target_of_a_tiny_vocabulary():
    torch.manual_seed(1)
    config = TransformerConfig(
        architecture="encoder-decoder", vocab_size=5, d_model=16, num_layers=1, num_heads=2, init_std=0.8
    )
    model = Transformer(config).eval()
    source, lengths = pad_right([[1, 2, 3], [4]], torch.device("cpu"))
    bos, eos, longest = 0, 1, 3

    def log_probability(row, target):
        tokens = torch.tensor([[bos, *target[:-1]]])
        logits = model.logits(model(tokens, source=source[row : row + 1], source_lengths=lengths[row : row + 1]))
        return float(logits.log_softmax(-1)[0, range(len(target)), target].sum())

    found = beam_search(
        model, source, lengths, num_beams=64, max_new_tokens=longest, bos_id=bos, eos_id=eos, length_penalty=0.0
    )
    words = [t for t in range(5) if t != eos]
    targets = [[eos], *([a, eos] for a in words), *([a, b, eos] for a in words for b in words)]
    with torch.no_grad():
        for row in range(2):
            scored = sorted(((log_probability(row, target), target) for target in targets), reverse=True)
            ended = [h for h in found[row] if len(h.tokens) < longest]
            assert [*ended[0].tokens, eos] == scored[0][1]
            assert ended[0].score == pytest.approx(scored[0][0], abs=1e-4)


def test_one_beam_is_greedy():
    model = tiny(architecture="encoder-decoder")
    text = generate(model, ByteCodec(), "", SamplingConfig(temperature=0.0, max_new_tokens=8), sources=["source"])
    # generate() ends its sources with <|endoftext|>, so encode the same way here.
    source, lengths = pad_right([[*b"source", 256]], torch.device("cpu"))
    best = beam_search(model, source, lengths, num_beams=1, max_new_tokens=8, bos_id=256, eos_id=256)[0][0]
    assert ByteCodec().decode(best.tokens) == text[0][0]


def test_no_beams_are_refused():
    with pytest.raises(UserError, match="num_beams is 0"):
        beam_search(
            tiny(architecture="encoder-decoder"),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, dtype=torch.int64),
            num_beams=0,
            max_new_tokens=1,
            bos_id=0,
            eos_id=1,
        )
