"""Every instruction-set level this processor has is right, the choice is honoured, and no level's code leaks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warploom.ops import _extension

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(REPOSITORY / root) for root in ("engine", "kernels"))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def usable_levels() -> list[str]:
    return _extension.usable_levels() if _extension.missing is None else []


# The level in use is what all other tests run at. Attention's own tests run it at every level.
@pytest.mark.parametrize("level", [level for level in usable_levels() if level != _extension.level()])
def test_every_kernel_is_right_at(level):
    script = str(Path(__file__).with_name("check_level.py"))
    result = run_python(
        script,
        "layer_norm",
        "rms_norm",
        "rotary",
        "linear",
        "linear_qkv",
        "cross_entropy",
        "linear_cross_entropy",
        "adamw",
        "grad_norm",
        WARPLOOM_CPU_LEVEL=level,
    )
    assert result.returncode == 0, result.stderr


def test_control_a_wrong_level_fails_the_check():
    """check_level.py notices when it does not run at the level it was asked to check."""
    script = "import os, runpy, sys; import warploom.ops; os.environ['WARPLOOM_CPU_LEVEL'] = 'avx3'; "
    script += f"runpy.run_path({str(Path(__file__).with_name('check_level.py'))!r}, run_name='__main__')"
    result = run_python("-c", "from warploom.ops import _extension; _extension.level(); " + script)
    assert result.returncode != 0 and "AssertionError" in result.stderr


def test_the_highest_usable_level_is_in_use_unless_one_is_named():
    script = "from warploom.ops import _extension; print(_extension.level())"
    highest = usable_levels()[-1]
    # Intel's cores with fp16 arithmetic have slow dot products, see csrc/common/levels.cpp.
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    slow_dot = "GenuineIntel" in cpuinfo and "avx512_fp16" in cpuinfo
    expected = "avx512" if highest == "avx512_bf16" and slow_dot else highest
    assert run_python("-c", script, WARPLOOM_CPU_LEVEL="").stdout.strip() == expected
    assert run_python("-c", script, WARPLOOM_CPU_LEVEL="portable").stdout.strip() == "portable"


@pytest.mark.parametrize("level", ["avx3", "neon_bf16" if "avx2" in usable_levels() else "avx2"])
def test_a_level_that_is_not_here_is_refused_by_the_first_kernel(level):
    script = (
        "import torch; from warploom.ops import layer_norm\n"
        "try:\n    layer_norm(torch.ones(2, 4), torch.ones(4))\n"
        "except ValueError as error:\n    print(error)"
    )
    result = run_python("-c", script, WARPLOOM_CPU_LEVEL=level)
    assert result.stdout.strip() == (
        f"WARPLOOM_CPU_LEVEL is '{level}', which this build or this processor does not have; "
        f"usable here: {', '.join(usable_levels())}"
    )


def test_features_and_levels_agree():
    assert usable_levels()[0] == "portable"
    assert set(usable_levels()[1:]) <= set(_extension.processor_features())


def level_objects() -> list[Path]:
    folder = REPOSITORY / "build" / f"{platform.machine()}-{sys.implementation.cache_tag}"  # setup.py's
    return [path for path in folder.glob("cpu/*.o") if len(path.suffixes) == 2]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
@pytest.mark.skipif(not level_objects(), reason="no object files: the extension was not built in this checkout")
def test_no_function_of_a_level_can_replace_one_of_another():
    """The linker keeps one of several weak functions of a name; it must not be one with AVX-512 in it (levels.h)."""
    seen = 0
    for path in level_objects():
        level = path.suffixes[0].removeprefix(".")
        symbols = subprocess.check_output(["nm", "-C", str(path)], text=True).splitlines()
        defined = [line.split(maxsplit=2) for line in symbols if re.match(r"[0-9a-f]+ ", line)]
        # DW.ref.* point to the C++ runtime and hold no code.
        names = [name for _, kind, name in defined if kind in "TDRBVWu" and not name.startswith("DW.ref.")]
        leaks = [name for name in names if f"warploom::cpu::{level}::" not in name]
        assert not leaks, f"{path.name} defines {leaks} outside its namespace"
        assert names, f"{path.name} defines nothing"
        seen += 1
    assert seen >= 2


def test_level_files_run_nothing_when_the_library_is_loaded():
    """A constructor compiled for AVX-512 would kill the import on an older processor."""
    if shutil.which("objdump") is None or not level_objects():
        pytest.skip("no objdump or no object files")
    for path in level_objects():
        sections = subprocess.check_output(["objdump", "-h", str(path)], text=True)
        assert ".text" in sections
        assert ".init_array" not in sections and ".ctors" not in sections, f"{path.name} has static constructors"


def big_inputs(dtype: torch.dtype) -> dict[str, list[torch.Tensor | float | None]]:
    """Arguments of backward and forward operators with several blocks in every direction in which work is cut."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    N, C, F = 700, 900, 1000
    x, dy, weight, bias = draw(N, C), draw(N, C), draw(C), draw(C)
    _, _, mean, rstd = torch.ops.warploom_cpu.layer_norm_fwd(x, weight, bias, None, 1e-5)
    matrix = draw(F, C) * C**-0.5
    y = torch.ops.warploom_cpu.linear_fwd(x, matrix, draw(F), None, "relu", False)[0]
    targets = torch.randint(F, (N,), generator=generator)
    lse = torch.ops.warploom_cpu.linear_cross_entropy_fwd(x, matrix, targets, -100, False, False)[2]
    return {
        "layer_norm_fwd": [x, weight, bias, dy, 1e-5],
        "layer_norm_bwd": [dy, x, x, weight, mean, rstd],
        "rms_norm_fwd": [x, weight, dy, 1e-6],
        "rms_norm_bwd": [dy, x, x, weight, rstd],
        "linear_fwd": [x, matrix, draw(F), None, "relu", False],
        "linear_bwd": [draw(N, F), x, matrix, None, y, "relu", True, True, True],
        "cross_entropy_fwd": [draw(N, F), targets, -100, True, True],
        "linear_cross_entropy_fwd": [x, matrix, targets, -100, False, False],
        "linear_cross_entropy_bwd": [torch.ones(()), x, matrix, targets, lse, -100, True, True],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_and_two_threads_give_the_same_bits(dtype):
    threads = torch.get_num_threads()
    for name, arguments in big_inputs(dtype).items():
        kernel = getattr(torch.ops.warploom_cpu, name)
        try:
            torch.set_num_threads(1)
            one = kernel(*arguments)
            torch.set_num_threads(2)
            two = kernel(*arguments)
        finally:
            torch.set_num_threads(threads)
        pairs = zip(one, two, strict=True) if isinstance(one, tuple) else [(one, two)]
        for a, b in pairs:
            assert a.isfinite().all()
            assert torch.equal(a, b), name
