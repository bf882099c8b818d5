import math

import pytest
import torch

from warploom.nn.position import AlibiPosition, BucketPosition, LearnedPosition, RotaryPosition, SinusoidalPosition


def test_sinusoids_follow_the_paper():
    x = SinusoidalPosition(8).embed(torch.zeros(1, 5, 8), torch.arange(5))[0]
    for position in range(5):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            assert x[position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert x[position, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("position", [SinusoidalPosition(8), LearnedPosition(16, 8)])
def test_embedded_positions_may_differ_by_row(position):
    x, positions = torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [7, 8, 9]])
    rows = [position.embed(x[b : b + 1], positions[b]) for b in range(2)]
    torch.testing.assert_close(position.embed(x, positions), torch.cat(rows))


def test_rotary_keeps_products_of_equal_distance():
    rotary = RotaryPosition(base=100.0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def product(query_position, key_position):
        q_turned = rotary.rotate(q, torch.tensor([query_position]))
        return (q_turned * rotary.rotate(k, torch.tensor([key_position]))).sum()

    torch.testing.assert_close(product(9, 4), product(5, 0))
    assert not torch.isclose(product(9, 4), product(9, 3))


def test_alibi_slopes():
    def slopes(num_heads):
        return AlibiPosition(num_heads).slopes(torch.device("cpu")).tolist()

    # From the authors' get_slopes: 8 heads halve from 1/2; 12 heads are those of 8 and every other one of 16.
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)])
    assert slopes(1) == [2.0**-8]


def by_pair(bias, T):
    """(H, T + S - 1), a number for each distance, as (H, T, S)."""
    S = bias.shape[1] - T + 1
    return torch.stack([bias[:, T - 1 - i : T - 1 - i + S] for i in range(T)], 1)


def test_alibi_bias_falls_with_distance():
    bias = by_pair(AlibiPosition(2).bias(torch.tensor([3, 4]), 5), 2)
    distances = torch.tensor([[3, 2, 1, 0, 1], [4, 3, 2, 1, 0]])
    assert torch.equal(bias, torch.stack([-(2.0**-4) * distances, -(2.0**-8) * distances]))


def exact_bucket(relative, bidirectional, num_buckets, max_distance):
    """T5's rule in integers: bucket exact + n begins where distance / exact = (max_distance / exact)^(n / coarse)."""
    first, distance = 0, max(-relative, 0)
    if bidirectional:
        num_buckets //= 2
        first, distance = (num_buckets if relative > 0 else 0), abs(relative)
    exact = coarse = num_buckets // 2
    if distance < exact:
        return first + distance
    n = sum(distance**coarse >= max_distance**i * exact ** (coarse - i) for i in range(1, coarse))
    return first + exact + n


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets(bidirectional):
    position = BucketPosition(3, bidirectional)
    relative = torch.arange(-300, 301)
    expected = [exact_bucket(r, bidirectional, 32, 128) for r in relative.tolist()]
    assert position._bucket(relative).tolist() == expected


def test_t5_bias_reads_the_table_by_head_and_trains_it():
    position = BucketPosition(3, bidirectional=False)
    bias = position.bias(torch.tensor([4, 5]), 6)
    assert bias.shape == (3, 7)
    assert torch.equal(by_pair(bias, 2)[:, 0, 2], position.table.weight[2])
    assert torch.equal(by_pair(bias, 2)[:, 1, 1], position.table.weight[4])
    bias.sum().backward()
    assert position.table.weight.grad[0].tolist() == [2.0] * 3  # distance 0, and one after the query


@pytest.mark.parametrize("position", [AlibiPosition(3), BucketPosition(3, True), BucketPosition(3, False)])
def test_biases_may_differ_by_row(position):
    positions = torch.tensor([[0, 1], [6, 7]])
    rows = [by_pair(position.bias(positions[b], 9), 2) for b in range(2)]
    assert torch.equal(position.bias(positions, 9), torch.stack(rows))
