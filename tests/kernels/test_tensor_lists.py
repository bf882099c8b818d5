"""Tables of many tensors: what they hold, how long they are kept, and what a CUDA graph keeps."""

import importlib.util
import weakref

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from warploom_kernels import _tensor_lists
from warploom_kernels._tensor_lists import PIECE, tables


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(_tensor_lists, "_tables", type(_tensor_lists._tables)())
    monkeypatch.setattr(_tensor_lists, "_captured", [])


@pytest.fixture
def capturing(monkeypatch):
    """As if a graph were captured on a card: memory of the host is pinned by the driver, which is not here."""
    pinned = []
    monkeypatch.setattr(_tensor_lists, "_is_captured", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    return pinned


def forget_all_but_the_last_ones():
    for size in range(1, 20):
        tables([[torch.empty(size)]])


def test_every_element_is_in_one_piece():
    tensors = [torch.empty(PIECE + 1), torch.empty(0), torch.empty(3)]
    addresses, sizes, pieces, _ = tables([tensors, []])
    assert addresses.tolist() == [[tensor.data_ptr() for tensor in tensors], [0, 0, 0]]
    assert sizes.tolist() == [PIECE + 1, 0, 3]
    assert pieces.tolist() == [[0, 0], [0, 1], [2, 0]]


def test_even_are_those_that_threads_may_read_sixteen_bytes_at_a_time():
    even, storage = [torch.empty(32), torch.empty(4, 16)], torch.empty(49)
    assert tables([even, [], even]).is_even
    assert not tables([[*even, torch.empty(24)]]).is_even
    assert tables([[*even, storage[16:48]]]).is_even
    assert not tables([[*even, storage[17:49]]]).is_even


def test_tables_are_kept_while_the_addresses_stay_and_not_for_ever():
    tensors = [torch.empty(5)]
    made = tables([tensors])
    assert tables([tensors]) is made
    gone = weakref.ref(made[0])
    del made
    forget_all_but_the_last_ones()
    assert gone() is None


def test_a_graph_keeps_what_it_was_captured_with(monkeypatch):
    tensors = [torch.empty(5)]
    made = weakref.ref(tables([tensors])[0])
    with monkeypatch.context() as patched:
        patched.setattr(_tensor_lists, "_is_captured", lambda device: True)
        assert tables([tensors])[0] is made()
    forget_all_but_the_last_ones()
    assert made() is not None


def test_a_table_that_a_graph_fills_is_pinned_and_found_by_no_other_call(capturing, monkeypatch):
    tensors = [torch.empty(5)]
    made = tables([tensors])
    assert len(capturing) == 3 and not _tensor_lists._tables
    host = weakref.ref(capturing.pop())
    capturing.clear()
    monkeypatch.setattr(_tensor_lists, "_is_captured", lambda device: False)
    assert tables([tensors])[0] is not made[0]
    forget_all_but_the_last_ones()
    assert host() is not None
