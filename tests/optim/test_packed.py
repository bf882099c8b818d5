"""The optimizer that leaves new weights packed: the panels are those of the new weights, and stale ones are noticed."""

import pytest
import torch
from torch import nn

from warploom.nn.linear import Linear, keep_packed
from warploom.ops import _extension
from warploom.optim import AdamW

pytestmark = pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))


def fresh_panels(weight):
    panels = torch.empty(torch.ops.warploom_cpu.linear_packed_bytes(weight, torch.bfloat16), dtype=torch.uint8)
    torch.ops.warploom_cpu.linear_pack(weight.detach(), torch.bfloat16, panels)
    return panels


@pytest.mark.parametrize(("F", "C"), [(1, 1), (31, 33), (64, 96), (200, 70), (65, 600)])
@pytest.mark.parametrize("forced", ["cpu", "reference"])
def test_the_step_writes_the_panels_of_the_new_weight(F, C, forced):
    from warploom.ops import backend

    torch.manual_seed(0)
    layer = Linear(C, F)
    optimizer = AdamW(layer.parameters(), lr=0.1)
    packed = keep_packed(layer)
    optimizer.pack_into(packed)
    x = torch.randn(5, C).bfloat16()
    for _ in range(2):
        layer(x).float().square().sum().backward()
        before = layer.packed.panels(layer.weight, torch.bfloat16).clone()
        with backend(adamw=forced):
            optimizer.step()
        memory = layer.packed.memory_for(layer.weight)
        assert not torch.equal(memory, before)
        assert torch.equal(memory, fresh_panels(layer.weight))
        memory.zero_()  # if the next use packed again, these would be overwritten
        assert not layer.packed.panels(layer.weight, torch.bfloat16).any()
        layer.packed.now_hold(layer.weight)
        torch.ops.warploom_cpu.linear_pack(layer.weight.detach(), torch.bfloat16, memory)


def change_in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def change_data(weight):
    weight.data.mul_(1.5)


def fused_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def load(weight):
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": weight.detach() * 1.5})


@pytest.mark.parametrize("change", [change_in_place, change_data, fused_step, load])
def test_a_changed_weight_is_packed_anew(change):
    torch.manual_seed(0)
    layer = Linear(40, 50)
    keep_packed(layer)
    x = torch.randn(3, 40).bfloat16()
    before = layer(x)
    change(layer.weight)
    after = layer(x)
    layer.packed = None
    assert torch.equal(after, layer(x))
    assert not torch.equal(after, before)


def test_for_a_gpu_it_is_a_copy_that_the_step_writes():
    """The rule of a GPU, which forcing the Triton kernels brings to the CPU."""
    from warploom.ops import backend

    torch.manual_seed(0)
    layer = Linear(40, 50)
    optimizer = AdamW(layer.parameters(), lr=0.1)
    packed = keep_packed(layer)
    optimizer.pack_into(packed)

    def copy():
        with backend(linear="triton"):
            return layer.packed.panels(layer.weight, torch.bfloat16)

    first = copy()
    assert torch.equal(first, layer.weight.bfloat16())
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    with backend(adamw="reference"):
        optimizer.step()
    memory = layer.packed.memory_for(layer.weight)
    assert memory is first and torch.equal(memory, layer.weight.bfloat16())
    memory.zero_()  # if the next use made it again, this would be overwritten
    assert not copy().any()
    change_in_place(layer.weight)
    assert torch.equal(copy(), layer.weight.bfloat16())
    with backend(linear="triton"):
        assert layer.packed.panels(layer.weight, torch.float32) is None
