"""Likelihoods in shared passes against each request read by itself."""

import random

import pytest
import torch

from warploom.errors import UserError
from warploom.evaluation.likelihood import Request, log_likelihoods
from warploom.evaluation.text_model import TextModel

V = 101


def words(chance, count):
    return tuple(chance.randrange(V) for _ in range(count))


def requests(seed, beginning=40):
    """Contexts with and without a common beginning, some longer than the model's; one to four continuations each."""
    chance = random.Random(seed)
    common = words(chance, beginning)
    made = []
    for n in range(24):
        context = (common if n % 2 else ()) + words(chance, chance.randint(1, 80))
        made += [
            Request(context, words(chance, 1 if n % 3 else chance.randint(1, 9))) for _ in range(chance.randint(1, 4))
        ]
    return made


@torch.no_grad()
def by_itself(model, request):
    ids = (request.context + request.continuation)[-model.config.max_seq_len - 1 :]
    wanted = torch.tensor(request.continuation)
    log_probs = model.logits(model(torch.tensor([ids[:-1]])))[0, -len(wanted) :].double().log_softmax(-1)
    return float(log_probs.gather(1, wanted[:, None]).sum()), bool((log_probs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("position", ["rotary", "learned", "alibi", "t5", "sinusoidal", "none"])
def test_every_request_gets_the_likelihood_it_has_alone(make_model, position):
    model = make_model(position=position, vocab_size=V, max_seq_len=96)
    asked = requests(position)
    found = list(log_likelihoods(model, asked, max_tokens=400))
    assert sorted(index for index, _ in found) == list(range(len(asked)))
    for index, likelihood in found:
        log_prob, is_greedy = by_itself(model, asked[index])
        assert likelihood.log_prob == pytest.approx(log_prob, abs=2e-4)
        assert likelihood.is_greedy == is_greedy


def test_greedy_continuations_are_known(make_model):
    model = make_model(vocab_size=V, max_seq_len=96)
    context = words(random.Random(0), 5)
    ids = list(context)
    for _ in range(4):
        ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    right = tuple(ids[5:])
    wrong = (*right[:-1], (right[-1] + 1) % V)
    found = dict(
        log_likelihoods(model, [Request(context, right), Request(context, wrong), Request(context, right[:1])])
    )
    assert [found[n].is_greedy for n in range(3)] == [True, False, True]


def test_shared_text_is_read_once(make_model):
    """One-token choices after a common beginning: the beginning once, each context once, no choice at all."""
    model = make_model(vocab_size=V, max_seq_len=256)
    chance = random.Random(0)
    common = words(chance, 100)
    contexts = [(*common, n, *words(chance, 9)) for n in range(20)]
    asked = [Request(context, (choice,)) for context in contexts for choice in range(4)]
    num_read = 0

    def count(module, arguments, keywords):
        nonlocal num_read
        num_read += arguments[0].numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    assert len(dict(log_likelihoods(model, asked))) == 80
    handle.remove()
    assert num_read == 100 + 20 * 10


def test_continuations_longer_than_the_context_and_other_models_are_refused(make_model):
    with pytest.raises(UserError, match="a continuation has 9 tokens and the model's context is 8"):
        list(log_likelihoods(make_model(vocab_size=V, max_seq_len=8), [Request((1,), (2,) * 9)]))
    assert list(log_likelihoods(make_model(vocab_size=V, max_seq_len=8), [Request((1,) * 50, (2,) * 8)]))
    with pytest.raises(UserError, match="only a decoder"):
        list(log_likelihoods(make_model(architecture="encoder"), [Request((1,), (2,))]))


def test_the_border_of_a_pair_is_where_running_text_has_it(make_model, tokenizer):
    model = TextModel(make_model(), tokenizer)
    (moved, plain, empty) = model.encode_pairs([("Question: ", "what"), ("Question:", " what"), ("", "what")])
    assert moved == plain
    assert list(plain.context + plain.continuation) == tokenizer.encode_beginning("Question: what")
    assert list(empty.context) == [tokenizer.eos_id]
    with pytest.raises(UserError, match="has no token of its own"):
        model.encode_pairs([("Question:", "")])


def test_contexts_begin_as_the_tokenizer_says(make_model, tokenizer):
    """An imported model may begin with a token that is not its end of text, or with none."""
    document = tokenizer.library_json().decode()
    for begin in ([], [5], [5, 6]):
        adopted = type(tokenizer).adopt(document, eos_id=tokenizer.eos_id, begin_ids=begin)
        pair, empty = TextModel(make_model(), adopted).encode_pairs([("what", " is"), ("", "is")])
        assert list(pair.context) == [*begin, *adopted.encode("what")]
        assert list(empty.context) == (begin or [adopted.eos_id])
