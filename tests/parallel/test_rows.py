import pytest
import torch

from warploom.data.loader import IGNORE_INDEX
from warploom.parallel.rows import micro_batches, take_rows


def batch(rows, T=4):
    tokens = torch.arange(rows * T).view(rows, T)
    cuts = torch.stack((torch.arange(rows) * T, torch.arange(rows) * T + 1 + torch.arange(rows) % 3), 1)
    offsets = torch.cat((cuts.reshape(-1), torch.tensor([rows * T]))).int()
    return {"tokens": tokens, "targets": tokens + 1, "positions": tokens % T, "cu_seqlens": offsets}


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("same_size", [False, True])
def test_the_parts_are_the_batch_once_and_equally_many(rows, num_parts, same_size):
    parts = [micro_batches(batch(rows), num_parts, part, 2, same_size=same_size) for part in range(num_parts)]
    assert len({len(part) for part in parts}) == 1
    counted = torch.cat([b["targets"][b["targets"] != IGNORE_INDEX] for part in parts for b in part])
    assert counted.tolist() == batch(rows)["targets"].reshape(-1).tolist()
    for part in parts:
        for one in part:
            B, T = one["tokens"].shape
            assert (B == 2 or not same_size) and one["cu_seqlens"][-1] == B * T
            assert {b * T for b in range(B)} <= set(one["cu_seqlens"].tolist())


def test_documents_keep_their_offsets_within_the_rows():
    assert take_rows(batch(4), 1, 3)["cu_seqlens"].tolist() == [0, 2, 4, 7, 8]
