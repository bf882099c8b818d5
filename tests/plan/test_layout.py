"""Memory and layouts of a plan."""

import dataclasses
from itertools import islice

import pytest
import torch

from warploom.errors import UserError
from warploom.models.presets import preset
from warploom.optim import OptimizerConfig
from warploom.plan.forecast import cheapest_change, fastest, forecast
from warploom.plan.hardware import DEVICES, Hardware, device_named
from warploom.plan.layout import Layout, Workload, layouts, memory, meta_model
from warploom.plan.timing import flops_per_token, step_time
from warploom.train.estimate import estimate

LLAMA = Workload(preset("llama2-7b"), 2e12, 4096, 1024)
SMALL = Workload(preset("small"), 1e9, 256, 64, torch.float32)
H100 = DEVICES["h100"]


@pytest.mark.parametrize("micro", [8, 64])
@pytest.mark.parametrize("recompute", ["none", "ops", "blocks"])
def test_one_device_takes_what_the_estimate_says(micro, recompute):
    found = memory(SMALL, Layout(micro_batch_size=micro, recompute=recompute), "cpu")
    exact = estimate(
        SMALL.model,
        seq_len=256,
        micro_batch_size=micro,
        dtype=torch.float32,
        optimizer=OptimizerConfig(name="adamw"),
        grad_checkpointing=recompute,
        num_micro_batches=64 // micro,
    )
    assert found.total == pytest.approx(exact.peak_bytes, rel=0.01)
    assert min(dataclasses.astuple(found)) >= 0


def test_depth_is_extrapolated_without_error():
    deep = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, num_layers=40))
    exact = estimate(
        deep.model, seq_len=256, micro_batch_size=4, dtype=torch.float32, optimizer=deep.optimizer
    ).peak_bytes
    assert memory(deep, Layout(micro_batch_size=4), "cpu").total == pytest.approx(exact, rel=0.01)


def test_sharding_divides_what_it_should():
    whole, sharded = memory(LLAMA, Layout(data=8)), memory(LLAMA, Layout(shard=8))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, name) == pytest.approx(getattr(whole, name) / 8)
    assert sharded.activations == whole.activations and sharded.working > whole.working
    tensor = memory(LLAMA, Layout(tensor=8))
    assert tensor.activations == pytest.approx(whole.activations / 8)
    staged = memory(LLAMA, Layout(pipeline=8))
    table = 32000 * 4096 * 4
    assert staged.weights == pytest.approx((whole.weights - 2 * table) / 8 + table, rel=1e-4)
    # The first of 8 stages holds 8 micro batches of an eighth of the blocks.
    assert staged.activations == pytest.approx(whole.activations, rel=0.1)
    assert memory(LLAMA, Layout(offload=True)).optimizer == 0


def test_every_layout_fills_the_devices_and_divides_the_model():
    found = list(layouts(LLAMA, Hardware(H100, 64)))
    assert len(found) == len(set(found)) > 100
    for layout in found:
        assert layout.devices == 64
        assert 32 % layout.tensor == 0 and 32 % layout.pipeline == 0 and layout.tensor <= 8
        assert layout.micro_batches(1024) * layout.replicas * layout.micro_batch_size == 1024
    translation = Workload(preset("transformer-base"), 1e9, 512, 64)
    assert {layout.pipeline for layout in layouts(translation, Hardware(H100, 8))} == {1}


def test_the_fastest_fit_and_come_in_order():
    hardware = Hardware(H100, 64)
    best = fastest(LLAMA, hardware)
    assert all(one.fits for one in best) and len(best) == 5
    assert [one.total_s for one in best] == sorted(one.total_s for one in best)
    others = (forecast(LLAMA, layout, hardware) for layout in islice(layouts(LLAMA, hardware), 0, None, 23))
    assert all(one.time.total >= best[0].time.total for one in others if one.fits)


@pytest.mark.parametrize("count", [1, 8])
def test_the_cheapest_change_fits_and_a_layout_that_fits_needs_none(count):
    hardware = Hardware(H100, count)
    change = cheapest_change(LLAMA, Layout(data=count), hardware)
    assert change.forecast.fits and not forecast(LLAMA, Layout(data=count), hardware).fits
    assert change.forecast.hardware.count >= count and change.what
    assert cheapest_change(LLAMA, change.forecast.layout, change.forecast.hardware) is None


def test_both_conventions_of_flops():
    flops, config = flops_per_token(LLAMA), LLAMA.model
    n = meta_model(config).num_parameters()
    assert flops.six_n == 6 * n
    assert flops.attention_full == 12 * 32 * 4096 * 4096 and flops.attention == flops.attention_full / 2
    assert flops.causal == pytest.approx(meta_model(config).flops_per_token(4096), rel=1e-9)
    table = 32000 * 4096
    assert flops.products == pytest.approx(6 * (n - table), rel=1e-3)  # norms multiply nothing


def test_more_devices_never_take_more_time_for_compute():
    one, eight = (step_time(LLAMA, Layout(data=n), Hardware(H100, n)) for n in (1, 8))
    assert eight.products == pytest.approx(one.products / 8)
    assert one.data == one.tensor == one.shard == one.bubble == 0
    slow = Hardware(dataclasses.replace(H100, network=1e9), 16)
    # 6.7e9 gradients of 4 bytes, twice 15 / 16 of them over the network, less what the backward pass hides.
    assert step_time(LLAMA, Layout(data=16), slow).data == pytest.approx(2 * 15 / 16 * 26.95e9 / 0.7e9, rel=0.05)


def test_recomputation_costs_a_third_of_the_products_and_the_bubble_shrinks_with_the_batch():
    plain, again = (step_time(LLAMA, Layout(recompute=r), Hardware(H100, 1)) for r in ("none", "blocks"))
    assert again.products == pytest.approx(4 / 3 * plain.products)
    staged = step_time(LLAMA, Layout(pipeline=4), Hardware(H100, 4))
    assert staged.bubble == pytest.approx(3 * (staged.products + staged.attention + staged.memory_bound) / 1024)


def test_an_unknown_device_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no device is called 'h10'.*h100"):
        device_named("h10")
