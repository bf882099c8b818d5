import pytest

from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.parallel import ParallelConfig


def test_the_rest_goes_to_the_dimension_that_asks_for_it():
    assert ParallelConfig(tensor=2).resolve(8).data == 4
    assert ParallelConfig(data=1, shard=-1, tensor=2, pipeline=2).resolve(8).shard == 2
    assert ParallelConfig().resolve(1).sizes == dict.fromkeys(ParallelConfig().sizes, 1)


@pytest.mark.parametrize(
    ("sizes", "world_size", "said"),
    [
        ({"tensor": 3}, 8, "tensor 3 = 3 does not divide the 8 processes; give parallel.tensor 8"),
        ({"data": 2, "tensor": 2}, 8, "does not fill the 8 processes; give parallel.data 4 or parallel.tensor 4"),
        ({"data": 3, "tensor": 5}, 8, r"a divisor of 8 \(1, 2, 4, 8\) so that their product is it, or start 15"),
    ],
)
def test_a_bad_product_names_the_sizes_and_those_that_would_work(sizes, world_size, said):
    with pytest.raises(UserError, match=said):
        ParallelConfig(**sizes).resolve(world_size)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tensor": 0}, "parallel.tensor is 0; give 1 or more, or -1"),
        ({"data": -1, "shard": -1}, "parallel.data and parallel.shard are -1; only one"),
        ({"stages_per_rank": 0}, "parallel.stages_per_rank is 0"),
    ],
)
def test_bad_sizes_are_refused(sizes, said):
    with pytest.raises(UserError, match=said):
        ParallelConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tensor": 4}, "parallel.tensor is 4, and the model has 2 key/value heads"),
        ({"context": 8}, "parallel.context is 8, and each process has 4 heads"),
        ({"context": 3}, "train.seq_len is 16, not a multiple of parallel.context 3; give train.seq_len 18"),
        ({"pipeline": 4, "schedule": "interleaved"}, "makes 8 stages, and the model has 6 blocks"),
    ],
)
def test_more_processes_than_parts_are_refused(sizes, said):
    with pytest.raises(UserError, match=said):
        ParallelConfig(**sizes).check_model(TransformerConfig(num_heads=4, num_kv_heads=2, d_model=32), 16)
