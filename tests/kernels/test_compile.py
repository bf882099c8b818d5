"""The machine code of every Triton kernel, without a GPU: compiled for the cards, and read."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch
import triton
import triton.language as tl
from bench import static
from bench.static import CARDS, Compiled, Shape, all_shapes, compile_all

from warploom_kernels._launch import Config, launch

# 32 keys a tile, all that a head of 256 with a bias and more leaves registers for; wgmma begins at 64 rows.
NARROW = {("attention_bwd_dkdv_kernel", "distances D 256"), ("attention_bwd_dkdv_kernel", "everything D 256")}
SHAPES = list(all_shapes())


def assert_sound(compiled: list[Compiled]) -> None:
    faults = [
        f"{each.kernel}, {each.shape}, {each.card}, {each.config}: {each.fault}" for each in compiled if each.fault
    ]
    assert not faults, "\n".join(faults)
    slow = [
        f"{each.kernel}, {each.shape}, {each.config}: {each.matrix_instruction}"
        for each in compiled
        if each.card == "H100"
        and "float32" not in each.shape
        and each.kernel in static.PRODUCT_KERNELS
        and each.matrix_instruction != "wgmma"
        and (each.kernel, each.shape) not in NARROW
    ]
    assert not slow, "\n".join(slow)


def test_everyday_shapes_compile_for_an_h100():
    compiled = compile_all([shape for shape in SHAPES if shape.common], [CARDS["H100"]], every=False)
    assert len(compiled) >= 15
    assert_sound(compiled)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("card", CARDS)
def test_every_configuration_compiles(card):
    compiled = compile_all(SHAPES, [CARDS[card]])
    assert {each.kernel for each in compiled} >= static.PRODUCT_KERNELS
    assert_sound(compiled)


def test_every_kernel_has_a_shape():
    """What no shape launches is compiled by nobody."""
    launched = {launch.kernel.__name__ for shape in SHAPES for launch in static.launches(shape, CARDS["H100"])}
    assert launched == static.kernel_names()


@triton.jit
def _spilling_kernel(x, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a = tl.load(x + index)
    b = tl.load(x + index + BLOCK)
    for _ in range(100):
        a, b = tl.sin(b) + a, tl.cos(a) * b
    tl.store(x + index, a + b)


def test_a_spill_is_a_fault():
    """16384 floats, twice, in one warp: 1024 for each thread, which has 255 registers."""

    def call():
        launch(
            _spilling_kernel,
            lambda _: (1,),
            {"x": static._empty(8, dtype=torch.float32)},
            [Config({"BLOCK": 16384}, num_warps=1)],
        )

    (compiled,) = compile_all([Shape("spills", call, {}, {})], [CARDS["H100"]])
    assert compiled.spilled_bytes > 0
    with pytest.raises(AssertionError, match="spills"):
        assert_sound([compiled])
