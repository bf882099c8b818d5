"""Packing: every example once, none too long, none that sees another, and only answers as targets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from warploom.data.chat import EncodedChat
from warploom.finetune.data import ExampleData
from warploom.finetune.packing import cut_to, pack, stack
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer


def chat(*ids, answers):
    return EncodedChat(list(ids), [index in answers for index in range(len(ids))])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_unit_is_in_one_row_and_rows_are_not_overfull(lengths):
    rows = pack(lengths, 20)
    assert sorted(unit for row in rows for unit in row) == list(range(len(lengths)))
    assert all(sum(lengths[unit] for unit in row) <= 20 for row in rows)
    # Best fit leaves no two rows that would go into one.
    loads = sorted(sum(lengths[unit] for unit in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > 20


def test_only_answers_are_targets_and_the_text_behind_them_is_counted():
    import numpy as np

    first, second = chat(0, 5, 6, 7, 0, answers={3, 4}), chat(0, 8, 9, answers={2})
    batch = stack([[(first,), (second,)]], 8, np.arange(10))
    assert batch.tokens.tolist() == [[0, 5, 6, 7, 0, 8, 0, 0]]
    assert batch.targets.tolist() == [[-100, -100, 7, 0, -100, 9, -100, -100]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.num_bytes == 7 + 0 + 9


def test_examples_of_a_row_do_not_see_each_other():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=20, d_model=16, num_layers=2, num_heads=2, max_seq_len=16))
    examples = [chat(0, 5, 6, 7, 0, answers={3, 4}), chat(0, 8, 9, 3, answers={2, 3}), chat(0, 4, 2, answers={2})]

    def loss(*rows):
        batch = stack([[(example,) for example in row] for row in rows], 16, None)
        inputs = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions}
        return model.loss(batch.tokens, batch.targets, reduction="sum", **inputs)

    alone = [loss([example]) for example in examples]
    torch.testing.assert_close(loss(examples), sum(alone))
    torch.testing.assert_close(loss(examples[:1], examples[1:]), sum(alone))
    blurred = stack([[(example,) for example in examples]], 16, None)
    mixed = model.loss(blurred.tokens, blurred.targets, reduction="sum", positions=blurred.positions)
    assert abs(mixed - sum(alone)) > 1e-3  # without cu_seqlens they would


def test_long_examples_are_cut_and_left_out_without_an_answer():
    (cut,) = cut_to((chat(*range(10), answers={2, 9}),), 5)
    assert cut.ids == [0, 1, 2, 3, 4, 5] and cut.is_answer[2]
    (cut,) = cut_to((chat(*range(20), answers={17, 18, 19}),), 8)
    assert cut.ids == [0, 12, 13, 14, 15, 16, 17, 18, 19]  # of a long prompt the end
    assert cut_to((chat(*range(10), answers=set()),), 5) is None
    chosen, rejected = chat(*range(12), answers={8, 9, 10, 11}), chat(*range(9), answers={8})
    both = cut_to((chosen, rejected), 12)
    assert [side.ids for side in both] == [[0, 6, 7, 8, 9, 10, 11], [0, 6, 7, 8]]


def test_order_of_rows_is_restored_and_each_epoch_sees_every_row():
    units = [(chat(0, *([1 + n % 7] * (3 + n % 5)), 9, answers={4}),) for n in range(40)]
    data = ExampleData(units, seq_len=12, seed=3, heldout_fraction=0.2, packing=True, token_bytes=None)
    orders = [data.row_order(epoch).tolist() for epoch in range(2)]
    assert orders[0] != orders[1] and all(sorted(o) == list(range(data.num_sequences)) for o in orders)
    stream = data.train_batches(2)
    for _ in range(data.num_sequences):
        next(stream)
    state = stream.state_dict()
    expected = [next(stream).tokens.tolist() for _ in range(5)]
    again = data.train_batches(2)
    again.load_state_dict(state)
    assert [next(again).tokens.tolist() for _ in range(5)] == expected
