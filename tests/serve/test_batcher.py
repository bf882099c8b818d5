"""Continuous batching: who is decoded beside whom changes nothing, and every request ends."""

import queue
import threading

import pytest
import torch

from warploom.generate.continuous import Finish, Generation
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate, row_generator
from warploom.serve.batcher import Batcher, BatcherFull, BatcherStopped


class Caller:
    """Takes a request's events."""

    def __init__(self, prompt, sampling, tokenizer, number=0, num_top=0):
        self.events = queue.SimpleQueue()
        self.generation = Generation(
            prompt=prompt,
            sampling=sampling,
            end_ids=frozenset({tokenizer.eos_id}),
            generator=row_generator(sampling.seed, number, 0),
            num_top=num_top,
            on_event=self.events.put,
        )

    def result(self):
        """All tokens, the text, and the finish."""
        tokens, text = [], ""
        while True:
            event = self.events.get(timeout=60)
            text += event.text
            if isinstance(event, Finish):
                return tokens, text, event
            tokens.append(event)


@pytest.fixture
def running():
    batchers = []

    def start(*arguments, **settings):
        batcher = Batcher(*arguments, **settings)
        batchers.append(batcher)
        batcher.start()
        return batcher

    yield start
    for batcher in batchers:
        batcher.stop()


SETTINGS = [
    SamplingConfig(temperature=0.0, max_new_tokens=20),
    SamplingConfig(temperature=1.0, max_new_tokens=9, seed=3),
    SamplingConfig(temperature=0.7, top_p=0.8, max_new_tokens=14, seed=4),
    SamplingConfig(temperature=1.3, top_k=5, repetition_penalty=1.4, max_new_tokens=3, seed=5),
    SamplingConfig(temperature=1.0, stop=("e",), max_new_tokens=30, seed=6),
]
PROMPTS = ["the quick", "a", "", "sleeps on the mat and the lazy dog", "fox"]


@pytest.mark.parametrize("changes", [{}, {"position": "alibi"}, {"position": "learned", "num_kv_heads": 1}], ids=str)
@pytest.mark.parametrize("num_slots", [1, 2, 8])
def test_each_request_is_what_generate_gives_it_alone(make_model, tokenizer, running, num_slots, changes):
    model = make_model(**changes)
    batcher = running(model, tokenizer, num_slots=num_slots)
    callers = [
        Caller([tokenizer.eos_id, *tokenizer.encode(prompt)], sampling, tokenizer, number)
        for number, (prompt, sampling) in enumerate(zip(PROMPTS * 2, SETTINGS * 2, strict=True))
    ]
    for caller in callers:
        batcher.submit([caller.generation])
    for number, caller in enumerate(callers):
        tokens, text, finish = caller.result()
        sampling = caller.generation.sampling
        expected = sampled_alone(model, tokenizer, caller.generation.prompt, sampling, number)
        assert text == expected and finish.reason in ("stop", "length")
        assert len(tokens) <= sampling.max_new_tokens


def sampled_alone(model, tokenizer, prompt, sampling, number):
    """generate's text for the same random stream."""
    if sampling.temperature == 0.0 or number == 0:
        return generate(model, tokenizer, [prompt], sampling)[0][0]
    from warploom.generate.sampler import TextStream, sample_tokens

    stream, done = TextStream(tokenizer, sampling.stop), []

    def on_step(drawn):
        if drawn[0] == tokenizer.eos_id:
            return True
        done.append(drawn[0])
        return stream.add(drawn[0])[1]

    sample_tokens(model, [prompt], sampling, [row_generator(sampling.seed, number, 0)], on_step)
    stream.end()
    return stream.text


def test_probabilities_are_the_models(make_model, tokenizer, running):
    model = make_model()
    caller = Caller(tokenizer.encode("the quick"), SETTINGS[1], tokenizer, num_top=3)
    running(model, tokenizer).submit([caller.generation])
    tokens, _, _ = caller.result()
    ids = [*caller.generation.prompt, *(token.id for token in tokens)]
    with torch.no_grad():
        log_probs = model.logits(model(torch.tensor([ids]))).log_softmax(-1)[0]
    for at, token in enumerate(tokens, start=len(caller.generation.prompt) - 1):
        assert token.log_prob == pytest.approx(float(log_probs[at, token.id]), abs=1e-4)
        assert [each for each, _ in token.top] == log_probs[at].topk(3).indices.tolist()


def test_a_padded_vocabulary_has_no_words_of_its_own(make_model, tokenizer, running):
    """A model with more rows than the tokenizer has tokens, the likeliest words among them, as padding may make it."""
    model = make_model(vocab_size=tokenizer.vocab_size + 40)
    with torch.no_grad():
        model.output_weight[tokenizer.vocab_size :] *= 50
    sampling = [SamplingConfig(temperature=1.0, max_new_tokens=30, seed=2, repetition_penalty=1.2), SETTINGS[0]]
    callers = [Caller(tokenizer.encode("the quick"), each, tokenizer, num_top=5) for each in sampling]
    batcher = running(model, tokenizer)
    for caller in callers:
        batcher.submit([caller.generation])
    for caller in callers:
        tokens, _, finish = caller.result()
        assert finish.reason in ("stop", "length") and tokens
        assert max(id for token in tokens for id in (token.id, *(each for each, _ in token.top))) < tokenizer.vocab_size


def test_the_context_ends_a_request(make_model, tokenizer, running):
    model = make_model(max_seq_len=12)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=100)
    callers = [Caller([1] * size, sampling, tokenizer, number) for number, size in enumerate((3, 11))]
    for caller in callers:
        caller.generation.end_ids = frozenset()
    running(model, tokenizer).submit([caller.generation for caller in callers])
    for caller in callers:
        tokens, _, finish = caller.result()
        assert finish.reason == "length" and len(tokens) == 12 - len(caller.generation.prompt)


def endless(tokenizer, make_model):
    """A model and a request that go on for long."""
    caller = Caller([1], SamplingConfig(temperature=0.0, max_new_tokens=10**6), tokenizer)
    caller.generation.end_ids = frozenset()
    return make_model(max_seq_len=4096), caller


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(make_model, tokenizer, running):
    model, first = endless(tokenizer, make_model)
    batcher = running(model, tokenizer, num_slots=1, max_queue=1)
    batcher.submit([first.generation])
    first.events.get(timeout=60)
    waiting = Caller([1], SETTINGS[0], tokenizer)
    batcher.submit([waiting.generation])
    with pytest.raises(BatcherFull):
        batcher.submit([Caller([1], SETTINGS[0], tokenizer).generation])
    first.generation.cancelled = True
    assert waiting.result()[2].reason in ("stop", "length")


def test_stopping_ends_what_is_under_way(make_model, tokenizer):
    model, first = endless(tokenizer, make_model)
    batcher = Batcher(model, tokenizer)
    batcher.start()
    batcher.submit([first.generation])
    first.events.get(timeout=60)
    batcher.stop()
    assert first.result()[2].reason == "error"
    with pytest.raises(BatcherStopped, match="shutting down"):
        batcher.submit([first.generation])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_fails_is_said_and_nobody_waits_for_ever(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    batcher = Batcher(make_model(), tokenizer)
    callers = [Caller([10**6], SETTINGS[0], tokenizer), Caller([1], SETTINGS[0], tokenizer)]
    batcher.start()
    batcher.submit([caller.generation for caller in callers])
    for caller in callers:
        _, _, finish = caller.result()
        assert finish.reason == "error" and "the model stopped with ValueError" in finish.message
    with pytest.raises(BatcherStopped, match="ValueError"):
        batcher.submit([callers[0].generation])
