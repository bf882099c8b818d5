"""Texts that a model writes for a benchmark: each is what the model writes alone, and no work is done twice."""

import pytest

from warploom.evaluation.likelihood import shared_prefix
from warploom.evaluation.text_model import TextModel
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import generate

SHARED = "Question: what is a plant that grows in the sun? Answer: the green leaf.\n\n" * 4
WORDS = ("one", "the other one", "café", "你好", "green and in the sun", "")
PROMPTS = [SHARED + f"Question: {word}?" for word in WORDS]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)


class Counted:
    """Counts the passes of a model and the tokens read in them."""

    def __init__(self, model):
        self.passes, self.tokens = 0, 0
        model.register_forward_pre_hook(self.count)

    def count(self, module, arguments):
        self.passes, self.tokens = self.passes + 1, self.tokens + arguments[0].numel()


@pytest.mark.parametrize("changes", [{}, {"position": "alibi"}, {"position": "learned", "num_kv_heads": 1}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_text_is_what_is_written_alone(make_model, tokenizer, changes, batch_size):
    model = make_model(**changes)
    settings = [SamplingConfig(temperature=0.0, max_new_tokens=size, stop=("e",)) for size in (12, 1, 7, 30, 5, 9)]
    found = TextModel(model, tokenizer, batch_size=batch_size).complete(PROMPTS, settings)
    expected = {
        n: (generate(model, tokenizer, [prompt], one)[0], False)
        for n, (prompt, one) in enumerate(zip(PROMPTS, settings, strict=True))
    }
    assert {n: (texts, cut) for n, texts, cut in found} == expected


def test_what_is_drawn_goes_by_name(make_model, tokenizer):
    """So that the rest of an interrupted evaluation draws what the whole one would have drawn."""
    model = TextModel(make_model(), tokenizer, batch_size=4)
    drawn = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=10, num_samples=3)
    names = [f"item/{n}" for n in range(6)]
    whole = {names[n]: texts for n, texts, _ in model.complete(PROMPTS, drawn, names=names)}
    rest = {names[3 + n]: texts for n, texts, _ in model.complete(PROMPTS[3:], drawn, names=names[3:])}
    assert rest == {name: whole[name] for name in names[3:]}
    assert len({text for texts in whole.values() for text in texts}) == 18


def test_a_shared_beginning_and_a_prompt_of_several_samples_are_read_once(make_model, tokenizer):
    model = make_model()
    lengths = [len(tokenizer.encode_beginning(prompt)) for prompt in PROMPTS]
    shared = len(shared_prefix([tokenizer.encode_beginning(prompt) for prompt in PROMPTS]))
    assert shared > 0.8 * min(lengths)
    drawn = SamplingConfig(temperature=1.0, max_new_tokens=1, num_samples=4)
    counted = Counted(model)
    list(TextModel(model, tokenizer, batch_size=24).complete(PROMPTS, drawn))
    padded = 6 * (max(lengths) - shared)
    assert counted.tokens == shared + padded


def test_a_text_that_ends_makes_room(make_model, tokenizer):
    """One long text beside many short ones: no pass waits for the long one to end."""
    model = make_model()
    settings = [SamplingConfig(temperature=0.0, max_new_tokens=size) for size in (40, 5, 5, 5, 5, 5)]
    ends = [generate(model, tokenizer, [prompt], one) for prompt, one in zip(PROMPTS, settings, strict=True)]
    assert all(len(tokenizer.encode(text)) >= 4 for ((text,),) in ends)  # none ends at once by itself
    counted = Counted(model)
    order = [n for n, _, _ in TextModel(model, tokenizer, batch_size=2).complete(PROMPTS, settings)]
    assert order[-1] == 0 and sorted(order) == list(range(6))
    assert counted.passes < 40 + 12  # the prefix, and the prompts as they come


def test_nothing_is_shared_where_little_is_saved():
    assert shared_prefix([]) == [] and shared_prefix([[1] * 500]) == []
    assert shared_prefix([[1] * 31 + [2], [1] * 31 + [3]] * 50) == []
    assert shared_prefix([[1] * 300, [1] * 300 + [2]]) == [1] * 299
    assert shared_prefix([[1, 2] * 200, [2, 1] * 200]) == []


def test_a_prompt_that_is_too_long_is_cut_on_the_left(make_model, tokenizer):
    model = make_model(max_seq_len=64)
    long = TextModel(model, tokenizer).complete([SHARED, "one"], GREEDY)
    ids = tokenizer.encode_beginning(SHARED)[-(64 - 12) :]
    assert {n: (texts, cut) for n, texts, cut in long} == {
        0: (generate(model, tokenizer, [ids], GREEDY)[0], True),
        1: (generate(model, tokenizer, ["one"], GREEDY)[0], False),
    }
