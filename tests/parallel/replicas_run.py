"""Processes that sum gradients by Buckets, for test_replicas.py."""

import functools
import sys

import torch
from tests.parallel.forked import Forks, main
from torch import nn

from warploom.parallel.mesh import Axis
from warploom.parallel.replicas import Buckets, begin_all_reduce

SIZE = 3


class Layers(nn.Module):
    """Matrices one behind the other, the first used again at the end, and one that is not used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(8, 8) / 3 for _ in range(6))
        self.unused = nn.Parameter(torch.ones(8))

    def forward(self, x):
        for matrix in [*self.matrices, self.matrices[0]]:
            x = torch.tanh(x @ matrix)
        return x.sum()


def inputs(rank):
    """Two micro batches, of as many rows as the rank and two more."""
    return torch.randn(2, rank + 2, 8, generator=torch.Generator().manual_seed(rank)).unbind()


def of_one_process():
    model = Layers()
    sum(model(x) for rank in range(SIZE) for x in inputs(rank)).backward()
    return [parameter.grad for parameter in model.parameters()]


def work(rank, bucket_bytes, early):
    model = Layers()
    parameters = list(model.parameters())
    axis = Axis(torch.distributed.group.WORLD, SIZE, rank)
    summing = Buckets(parameters, functools.partial(begin_all_reduce, axis=axis), bucket_bytes)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(summing.arrived)
    expected = of_one_process()
    for _ in range(2):  # the second time begins as the first did
        for parameter in parameters:
            parameter.grad = None
        first, last = inputs(rank)
        model(first).backward()
        assert not summing.num_sent
        loss = model(last)
        summing.start()
        loss.backward()
        assert summing.num_sent == early, summing.num_sent
        summing.finish()
        for parameter, grad in zip(parameters, expected, strict=True):
            assert (parameter.grad is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(parameter.grad, grad)


def run(bucket_bytes, early):
    """early: buckets that are to be on their way when the backward pass ends."""
    children = Forks(SIZE, lambda rank: work(rank, bucket_bytes, early))
    return {"codes": children.wait(), "errors": [children.error(rank) for rank in range(SIZE)]}


if __name__ == "__main__":
    main({"run": run}, sys.argv[1:])
