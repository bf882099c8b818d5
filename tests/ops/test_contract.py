"""What every op promises, asked of every op x back end x case x dtype. Built from the records in REGISTRY alone.

The error rule and its bound are in warploom/ops/_accuracy.py, the checks that `warploom verify` makes too in
warploom/ops/_proof.py. All checks are functions of an op, so that the last part of this file can hand them ops with
planted bugs: a check that lets one through is no check.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.optests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode

import warploom.ops
from warploom.ops import REGISTRY, Op, backend
from warploom.ops._accuracy import Trial, as_tuple
from warploom.ops._extension import missing as extension_missing
from warploom.ops._op import Backend, BackendUnavailable, Case
from warploom.ops._proof import check_accuracy, check_deterministic, check_writes_everything, require_same_bits

OPS = dict(REGISTRY)
FUNCTIONS = {name: op for name, op in OPS.items() if op.differentiable}
FLOAT64 = torch.float64


def available_backends(op: Op) -> list[str]:
    return [name for name in op.backends if op.refusal(name, "cpu") is None]


def parameters(ops=OPS, *, dtypes=False, gradcheck=False):
    """(op, back end, case[, dtype]) for pytest, only the small cases if gradcheck."""
    rows = []
    for op in ops.values():
        for name, case in itertools.product(available_backends(op), op.cases):
            if gradcheck and not case.gradcheck:
                continue
            for dtype in case.dtypes if dtypes else ():
                words = f"{op.name}-{name}-{case.name}-{str(dtype).removeprefix('torch.')}"
                rows.append(pytest.param(op.name, name, case.name, dtype, id=words))
            if not dtypes:
                rows.append(pytest.param(op.name, name, case.name, id=f"{op.name}-{name}-{case.name}"))
    return rows


def case_of(op: Op, name: str) -> Case:
    return next(case for case in op.cases if case.name == name)


@functools.cache  # one trial serves every back end and test; its truth and what it allows are the slow part
def trial_of(op: Op, case: str, dtype: torch.dtype) -> Trial:
    return Trial(op, case_of(op, case), dtype)


def forced(op: Op, name: str):
    """The op's function under a forced back end. Skips, visibly, where that back end refuses these arguments."""

    def function(**arguments):
        try:
            return op.function(**arguments)
        except BackendUnavailable as refusal:
            pytest.skip(str(refusal))

    return backend(**{op.name: name}), function


@contextlib.contextmanager
def refusals_skip():
    try:
        yield
    except BackendUnavailable as refusal:
        pytest.skip(str(refusal))


def each_tensor(function: Callable[[torch.Tensor], Any], argument: Any) -> Any:
    """The argument with its tensors, or those of the list that it is, replaced by the function's results."""
    if isinstance(argument, list | tuple):
        return [each_tensor(function, item) for item in argument]
    return function(argument) if isinstance(argument, torch.Tensor) else argument


def flat(outputs: Any) -> list[torch.Tensor]:
    """The tensors that an operator returns, those in lists too."""
    if isinstance(outputs, list | tuple):
        return [tensor for output in outputs for tensor in flat(output)]
    return [outputs]


class Recorder(TorchDispatchMode):
    """Keeps the arguments with which warploom operators are called."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "warploom":
            self.calls.append((func, tuple(each_tensor(lambda t: t.detach().clone(), a) for a in args)))
        return func(*args, **(kwargs or {}))


def record(op: Op, name: str, trial: Trial) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that one forward and backward calls, with their arguments."""
    force, function = forced(op, name)
    with force, Recorder() as recorder:
        trial.evaluate(function)
    assert recorder.calls
    return recorder.calls


# The check that only these tests make.


def check_fake(op: Op, name: str, trial: Trial) -> None:
    """Fake and meta results have the shapes, strides and dtypes of the real ones."""
    for operator, arguments in record(op, name, trial):
        with backend(**{op.name: name}):
            real = flat(operator(*arguments))
        with FakeTensorMode() as mode:
            fake = flat(operator(*(each_tensor(mode.from_tensor, a) for a in arguments)))
        on_meta = flat(operator(*(each_tensor(lambda t: t.to("meta"), a) for a in arguments)))
        for index, (r, f, m) in enumerate(zip(real, fake, on_meta, strict=True)):
            facts = [(tuple(t.shape), t.stride(), t.dtype) for t in (r, f, m)]
            assert facts[0] == facts[1] == facts[2], f"{operator} result {index}: real, fake, meta are {facts}"
            assert f.device == r.device, f"{operator} result {index}: {f.device} is not {r.device}"


# The tests.


@pytest.mark.parametrize(("op", "name", "case", "dtype"), parameters(dtypes=True))
def test_accuracy(op, name, case, dtype):
    with refusals_skip():
        check_accuracy(OPS[op], name, trial_of(OPS[op], case, dtype))


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 else every_second(tensor)


def every_second(tensor):
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0] if tensor.dim() else tensor


def misaligned(tensor):
    """Contiguous, but one element past an aligned address."""
    storage = tensor.new_zeros(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("layout", [transposed, every_second, misaligned], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("op", "name", "case"), parameters())
def test_layouts(op, name, case, layout):
    with refusals_skip():
        check_accuracy(OPS[op], name, trial_of(OPS[op], case, torch.float32), layout)


@pytest.mark.parametrize(("op", "name", "case"), parameters(gradcheck=True))
def test_expanded_output_gradient(op, name, case):
    """The backward of sum() hands over one element with all strides 0."""
    op = OPS[op]
    force, function = forced(op, name)
    trial = trial_of(op, case, torch.float32)
    arguments = trial.arguments()
    leaves = [arguments[leaf] for leaf in trial.differentiable]
    with force:
        outputs = as_tuple(function(**arguments))
        expanded = torch.autograd.grad(sum(y.sum() for y in outputs), leaves, retain_graph=True)
        dense = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    for leaf, a, b in zip(trial.differentiable, expanded, dense, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


@pytest.mark.parametrize(("op", "name", "case"), parameters(gradcheck=True))
def test_gradients_of_each_input_alone(op, name, case):
    op = OPS[op]
    force, function = forced(op, name)
    trial = trial_of(op, case, torch.float32)
    with force:
        all_results = trial.evaluate(function)
        for leaf in trial.differentiable:
            arguments = trial.arguments()
            for other in trial.differentiable:
                arguments[other].requires_grad_(other == leaf)
            outputs = as_tuple(function(**arguments))
            wanted = [
                (y, dy.to(y)) for y, dy in zip(outputs, trial.output_gradients(outputs), strict=True) if y.requires_grad
            ]
            (gradient,) = torch.autograd.grad([y for y, _ in wanted], [arguments[leaf]], [dy for _, dy in wanted])
            torch.testing.assert_close(gradient, all_results[f"d{leaf}"])
        with torch.no_grad():
            for i, y in enumerate(as_tuple(function(**trial.arguments()))):
                assert not y.requires_grad
                torch.testing.assert_close(y, all_results[f"output {i}"])


@pytest.mark.parametrize(("op", "name", "case"), parameters(gradcheck=True))
def test_gradcheck(op, name, case):
    op = OPS[op]
    force, function = forced(op, name)
    trial = Trial(op, case_of(op, case), FLOAT64)
    arguments = trial.arguments()
    leaves = trial.differentiable

    def call(*values):
        return function(**{**arguments, **dict(zip(leaves, values, strict=True))})

    with force:
        assert torch.autograd.gradcheck(call, [arguments[leaf] for leaf in leaves])


@pytest.mark.parametrize(("op", "name", "case"), parameters(gradcheck=True))
def test_second_derivative_is_refused(op, name, case):
    """The backward operators have no derivative; PyTorch's default would be zeros."""
    op = OPS[op]
    force, function = forced(op, name)
    trial = trial_of(op, case, torch.float32)
    arguments = trial.arguments()
    leaves = [arguments[leaf] for leaf in trial.differentiable]
    with force:
        y = as_tuple(function(**arguments))[0]
        gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            sum(g.sum() for g in gradients).backward()


@pytest.mark.parametrize(("op", "name", "case"), parameters(FUNCTIONS))
def test_fake(op, name, case):
    check_fake(OPS[op], name, trial_of(OPS[op], case, torch.float32))


@pytest.mark.parametrize(("op", "name", "case"), parameters(gradcheck=True))
def test_opcheck(op, name, case):
    """Schema, no mutation, no aliasing, fake results, and tracing with dynamic shapes. opcheck asks for a derivative
    registered on the operator where an input requires a gradient; ours is outside (docs/architecture.md), so the
    inputs here do not."""
    op = OPS[op]
    for operator, arguments in record(op, name, trial_of(op, case, torch.float32)):
        with backend(**{op.name: name}):
            torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(("op", "name", "case"), parameters())
def test_deterministic(op, name, case):
    with refusals_skip():
        check_deterministic(OPS[op], name, trial_of(OPS[op], case, torch.float32))


@pytest.mark.parametrize(("op", "name", "case"), parameters())
def test_writes_everything(op, name, case):
    with refusals_skip():
        check_writes_everything(OPS[op], name, trial_of(OPS[op], case, torch.float32))


# Dynamo makes itself an instance of torch.autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_compile(op):
    """One graph, forward and backward; the operators stay in it, and a back end forced later is obeyed."""
    op = OPS[op]
    trial = trial_of(op, op.cases[0].name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    for name in available_backends(op):
        with backend(**{op.name: name}):
            before = op.calls.copy()
            results = trial.evaluate(compiled)
            assert {key.partition("/")[2] for key in op.calls - before} == {name}
            require_same_bits(results, trial.evaluate(op.function), "compiled and eager differ")
    torch._dynamo.reset()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_export(op):
    op = OPS[op]
    arguments = trial_of(op, op.cases[0].name, torch.float32).arguments()
    arguments = {key: a.detach() if isinstance(a, torch.Tensor) else a for key, a in arguments.items()}

    class Module(torch.nn.Module):
        def forward(self, arguments):
            return op.function(**arguments)

    exported = torch.export.export(Module(), (arguments,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert any(target.startswith(f"warploom.{op.name}_fwd") for target in targets), targets
    for y, expected in zip(as_tuple(exported.module()(arguments)), as_tuple(op.function(**arguments)), strict=True):
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("op", "bad"),
    [pytest.param(op.name, bad, id=f"{op.name}-{bad.name}") for op in OPS.values() for bad in op.bad_cases],
)
def test_bad_input(op, bad):
    with pytest.raises(bad.error, match=bad.match) as caught:
        OPS[op].function(**bad.make())
    # The error that was promised, and not one that happens to derive from it.
    assert caught.type is bad.error


@pytest.mark.parametrize("op", OPS)
def test_record(op):
    op = OPS[op]
    assert op.bench_cases and op.bad_cases
    assert any(case.gradcheck for case in op.cases) == op.differentiable, "no case for the gradients"
    assert set(op.fakes) == set(op.schemas)
    for table in (op.checks, *(b.refuses for b in op.backends.values())):
        assert set(table) <= set(op.schemas)
    assert all(set(b.kernels) == set(op.schemas) for b in op.backends.values())
    assert getattr(warploom.ops, op.name) is op.function
    names = [case.name for case in op.cases]
    assert len(set(names)) == len(names)


def test_extension_is_not_lost():
    """When the extension was built it loads, and has a kernel for every op that lists the cpu back end."""
    record = Path(warploom.ops.__file__).parents[1] / "_build.json"
    if extension_missing is not None and not (record.exists() and json.loads(record.read_text())["built"]):
        pytest.skip(f"only the reference back ends are tested: {extension_missing}")
    assert extension_missing is None
    for op in OPS.values():
        if "cpu" in op.backends:
            assert op.refusal("cpu", "cpu") is None


@pytest.mark.parametrize("op", OPS)
def test_no_silent_fallback(op):
    """Unforced, every case runs on the op's first choice, unless that says in words why it refuses the arguments, or
    why it leaves them to the next, which is faster."""
    op = OPS[op]
    choice = op.choice("cpu")
    for name, dtype in [(case.name, dtype) for case in op.cases for dtype in case.dtypes]:
        trial = trial_of(op, name, dtype)
        for operator, arguments in record(op, "reference", trial):
            suffix = operator.__name__.removesuffix(".default").removeprefix(f"{op.name}_")
            slower = op.backends[choice].slower.get(suffix, lambda *_: None)
            refusal = op.refusal(choice, "cpu", suffix, *arguments) or slower(*arguments)
            before = op.calls.copy()
            operator(*arguments)
            (key,) = op.calls - before
            if refusal is None:
                assert key == f"{suffix}/{choice}", f"{name}: {key} ran"
            else:
                assert refusal and key == f"{suffix}/reference"


# Planted bugs: y = x weight, by a back end that is wrong in one way at a time.


def dot(x, weight):
    return _Dot.apply(x, weight)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.ops.warploom.planted_fwd(x, weight)

    @staticmethod
    def backward(ctx, dy):
        return torch.ops.warploom.planted_bwd(dy, *ctx.saved_tensors)


def dot_fwd(x, weight):
    return (x.double() @ weight.double()).to(x.dtype)


def dot_bwd(dy, x, weight):
    return torch.outer(dy, weight), (dy.double() @ x.double()).to(x.dtype)


def draw_dot(generator):
    return {
        name: torch.randn(*size, generator=generator, dtype=FLOAT64)
        for name, size in (("x", (40, 64)), ("weight", (64,)))
    }


KERNELS = {"fwd": dot_fwd, "bwd": dot_bwd}  # of the planted back end; each test puts its bug here
PLANTED = Op(
    name="planted",
    function=dot,
    reference=lambda x, weight: x @ weight,
    torch_peer=lambda x, weight: x @ weight,
    schemas={
        "fwd": "(Tensor x, Tensor weight) -> Tensor",
        "bwd": "(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    },
    fakes={
        "fwd": lambda x, weight: x.new_empty(x.shape[0]),
        "bwd": lambda dy, x, weight: (torch.empty_like(x), torch.empty_like(weight)),
    },
    backends={"reference": Backend({"fwd": dot_fwd, "bwd": dot_bwd}, ("cpu",)), "cpu": Backend(KERNELS, ("cpu",))},
    cases=(Case("plain", draw_dot),),
)
del REGISTRY["planted"]  # it is not one of the ops


def in_bfloat16(x, weight):
    """Sums in the narrow type: each addition rounds."""
    y = torch.zeros_like(x[:, 0])
    for c in range(x.shape[1]):
        y += x[:, c] * weight[c]
    return y


def skips_last_column(x, weight):
    return dot_fwd(x[:, :-1], weight[:-1])


def leaves_last_row(x, weight):
    y = torch.empty_like(x[:, 0])
    y[:-1] = dot_fwd(x, weight)[:-1]
    return y


def depends_on_history(x, weight):
    return dot_fwd(x, weight) * (1 + PLANTED.calls["fwd/cpu"] % 7 * 2**-20)


def depends_on_threads(x, weight):
    return dot_fwd(x, weight) * (1 + torch.get_num_threads() * 2**-20)


def assumes_dense(x, weight):
    return dot_fwd(torch.as_strided(x, x.shape, (x.shape[1], 1)), weight)


def writes_into_x(x, weight):
    y = dot_fwd(x, weight)
    x.zero_()
    return y


def returns_x(x, weight):
    return x[:, 0]


def strided(x, weight):
    return torch.stack([dot_fwd(x, weight)] * 2, 1)[:, 0]


def wrong_sign(dy, x, weight):
    dx, dweight = dot_bwd(dy, x, weight)
    return dx, -dweight


def check_opcheck(op, name, trial):
    for operator, arguments in record(op, "reference", trial):
        with backend(**{op.name: name}):
            torch.library.opcheck(operator, arguments)


def check_layouts(op, name, trial):
    check_accuracy(op, name, trial, transposed)


PLANTS = [
    (check_accuracy, "fwd", in_bfloat16, torch.bfloat16, "output 0: max error"),
    (check_accuracy, "fwd", skips_last_column, torch.float32, "output 0: max error"),
    (check_accuracy, "bwd", wrong_sign, torch.float32, "dweight: max error"),
    (check_layouts, "fwd", assumes_dense, torch.float32, "output 0: max error"),
    (check_writes_everything, "fwd", leaves_last_row, torch.float32, "never written"),
    (check_deterministic, "fwd", depends_on_history, torch.float32, "two runs differ"),
    (check_deterministic, "fwd", depends_on_threads, torch.float32, "1 and 2 threads differ"),
    (check_fake, "fwd", strided, torch.float32, "real, fake, meta are"),
    (check_opcheck, "fwd", writes_into_x, torch.float32, "mutated"),
    (check_opcheck, "fwd", returns_x, torch.float32, "alias"),
]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(REGISTRY, "planted", PLANTED)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("check", "operator", "bug", "dtype", "words"),
    [pytest.param(*plant, id=f"{plant[0].__name__}-{plant[2].__name__}") for plant in PLANTS],
)
def test_planted_bug_is_found(monkeypatch, check, operator, bug, dtype, words):
    trial = Trial(PLANTED, PLANTED.cases[0], dtype)
    check(PLANTED, "cpu", trial)  # the control: without the bug the check passes
    monkeypatch.setitem(KERNELS, operator, bug)
    with pytest.raises(Exception, match=words) as caught:
        check(PLANTED, "cpu", trial)
    assert isinstance(caught.value, (AssertionError, OpCheckError)), caught.value


@pytest.mark.usefixtures("registered")
def test_another_back_end_than_asked_for_is_found(monkeypatch):
    """A dispatcher that falls back although a back end is forced."""
    trial = Trial(PLANTED, PLANTED.cases[0], torch.float32)
    check_accuracy(PLANTED, "cpu", trial)
    monkeypatch.setattr(warploom.ops._op, "_parse_forced", lambda *_: {})
    with pytest.raises(AssertionError, match="reference was asked for"):
        check_accuracy(PLANTED, "reference", trial)
