"""One step of AdamW (Loshchilov and Hutter, 2019) for many parameters in one pass, in place.

Each parameter, gradient and moment is read once and written at most once: 28 bytes a parameter in float32. The contract
tests hold it to the results it leaves in its arguments; what they ask of a function with a gradient does not apply to
it, and tests/ops/test_adamw.py asks the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op
from warploom.ops.grad_norm import SMALL_SHAPES


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    grad_factor: float = 1.0,
    clear_grads: bool = False,
    packed: Sequence[Tensor] = (),
) -> None:
    """Add 1 to each of state_steps, then with g = grad_factor * grad, its sign turned if maximize:

        exp_avg    = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        param      = (1 - lr * weight_decay) * param
                     - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    Lists of equal length; each parameter's tensors have its shape and device, and all of them one floating dtype,
    except that grads may be bfloat16 beside float32. max_exp_avg_sqs is empty, or takes the maxima of exp_avg_sq and
    serves in its place under the root (AMSGrad). state_steps: one float32 or float64 number each, on the CPU for back
    ends cpu and cuda. The arithmetic is float32 at least. clear_grads writes zeros into grads, which otherwise stay as
    they are: grad_factor never reaches them. packed is empty, or holds for each parameter the memory of its
    PackedWeight for bfloat16 activations, panels of the CPU's products or a plain copy, which receives the new values
    in the same pass, or an empty tensor. Raises ValueError for a wrong length or shape, TypeError for a wrong dtype.
    """
    if not params:
        return
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed)
    torch.ops.warploom.adamw_step(
        params, grads, *state, lr, beta1, beta2, weight_decay, eps, maximize, grad_factor, clear_grads
    )


def adamw_reference(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    state_steps,
    *,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    maximize=False,
    grad_factor=1.0,
    clear_grads=False,
):
    for i, (param, grad, m, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True)):
        step += 1
        g = grad * (-grad_factor if maximize else grad_factor)
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g.square())
        largest = v
        if max_exp_avg_sqs:
            largest = max_exp_avg_sqs[i].copy_(torch.maximum(max_exp_avg_sqs[i], v))
        denominator = (largest / (1 - beta2**step)).sqrt() + eps
        param.copy_((1 - lr * weight_decay) * param - lr / (1 - beta1**step) * m / denominator)
        if clear_grads:
            grad.zero_()


def _torch_peer(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    state_steps,
    *,
    maximize=False,
    grad_factor=1.0,
    clear_grads=False,
    **settings,
):
    if grad_factor != 1.0:
        torch._foreach_mul_(grads, grad_factor)
    torch_adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        fused=True,
        amsgrad=bool(max_exp_avg_sqs),
        maximize=maximize,
        **settings,
    )
    if clear_grads:
        torch._foreach_zero_(grads)


def _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps):
    dtype = params[0].dtype
    if not dtype.is_floating_point:
        raise TypeError(f"params must be floating point, got {dtype}")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in {**lists, "state_steps": state_steps}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must hold {len(params)} tensors as params does, got {len(tensors)}")
    grad_dtype = torch.bfloat16 if (dtype, grads[0].dtype) == (torch.float32, torch.bfloat16) else dtype
    for name, tensors in lists.items():
        expected = grad_dtype if name == "grads" else dtype
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(f"{name}[{i}] must be {list(param.shape)} as params[{i}] is, got {list(tensor.shape)}")
            if tensor.dtype != expected:
                raise TypeError(f"{name}[{i}] must be {expected}, got {tensor.dtype}")
    for i, step in enumerate(state_steps):
        if step.numel() != 1:
            raise ValueError(f"state_steps[{i}] must be one number, got {list(step.shape)}")
        if step.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"state_steps[{i}] must be torch.float32 or torch.float64, got {step.dtype}")


def _reference_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    state_steps,
    packed,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    maximize,
    grad_factor,
    clear_grads,
):
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    torch._foreach_add_(state_steps, 1)
    steps = torch.stack([step.reshape(()).double() for step in state_steps]).tolist()  # of a GPU in one transfer
    wide = torch.promote_types(params[0].dtype, torch.float32)
    narrow = (*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs)
    # What is wide already is itself here, and changed in place.
    p, m, v, max_v = ([t.to(wide) for t in tensors] for tensors in (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs))
    g = torch._foreach_mul([grad.to(wide) for grad in grads], -grad_factor if maximize else grad_factor)
    torch._foreach_mul_(p, 1 - lr * weight_decay)
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    if max_v:
        torch._foreach_maximum_(max_v, v)
    denominators = torch._foreach_sqrt(max_v or v)
    torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(p, m, denominators, [-lr / (1 - beta1**step) for step in steps])
    for tensor, result in zip(narrow, (*p, *m, *v, *max_v), strict=True):
        if tensor is not result:
            tensor.copy_(result)
    if clear_grads:
        torch._foreach_zero_(grads)
    for param, panels in zip(params, packed, strict=False):
        if panels.dtype == torch.bfloat16:
            panels.copy_(param)
        elif panels.numel():
            torch.ops.warploom_cpu.linear_pack(param, torch.bfloat16, panels)


def _triton_refuses(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed, *_settings
) -> str | None:
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    if any(panels.dtype != torch.bfloat16 and panels.numel() for panels in packed):
        return "it does not write the panels of the CPU's products"
    if any(step.device != params[0].device for step in state_steps):
        return f"state_steps must be on {params[0].device} as params are"
    return _triton.refuses_tensor(params[0])


def _cuda_refuses(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed, *_settings) -> str | None:
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    if params[0].dtype == torch.float64:
        return "it computes in float32, not in float64"
    if any(panels.dtype != torch.bfloat16 and panels.numel() for panels in packed):
        return "it does not write the panels of the CPU's products"
    if any(step.device.type != "cpu" for step in state_steps):
        return "state_steps must be on the CPU"
    return None


def _fake_step(*args):
    return None


def _case(*shapes, steps=(3,), amsgrad=False, **settings):
    """Parameter i has made steps[i] steps, the last of steps counting for the rest; after 0 the moments are zero."""

    def make(generator):
        def draw(shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        counts = [steps[min(i, len(steps) - 1)] for i in range(len(shapes))]
        started = [min(count, 1) for count in counts]
        exp_avg_sqs = [0.1 * draw(shape).square() * s for shape, s in zip(shapes, started, strict=True)]
        return {
            "params": [draw(shape) for shape in shapes],
            "grads": [draw(shape) for shape in shapes],
            "exp_avgs": [0.3 * draw(shape) * s for shape, s in zip(shapes, started, strict=True)],
            "exp_avg_sqs": exp_avg_sqs,
            "max_exp_avg_sqs": [v * (0.5 + draw(v.shape).abs()) for v in exp_avg_sqs] if amsgrad else [],
            "state_steps": [torch.tensor(float(count), dtype=torch.float64) for count in counts],
            **_SETTINGS,
            **settings,
        }

    return make


_SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
_RAGGED = ((), (0,), (1,), (7,), (1023,), (1025,), (5, 7), (3, 0), (33, 40), (2, 3, 4, 5))
_WIDE = ("state_steps",)


def _bad(**changed):
    def make():
        lists = {name: [torch.ones(2, 3), torch.ones(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        lists |= {"max_exp_avg_sqs": [], "state_steps": [torch.tensor(1.0), torch.tensor(1.0)]}
        return {**lists, **changed, **_SETTINGS}

    return make


OP = Op(
    name="adamw",
    function=adamw,
    reference=adamw_reference,
    torch_peer=_torch_peer,
    schemas={
        "step": "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
        "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, Tensor(g!)[] packed, float lr, float beta1, "
        "float beta2, float weight_decay, float eps, bool maximize, float grad_factor, bool clear_grads) -> ()"
    },
    fakes={"step": _fake_step},
    backends={
        "reference": Backend(kernels={"step": _reference_step}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={"step": _extension.cpu_kernel("adamw_step")},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("adamw_step"),
        ),
        "triton": Backend(
            kernels={"step": _triton.launcher("adamw", "launch_adamw_step")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={"step": _triton_refuses},
        ),
        "cuda": Backend(
            kernels={"step": _extension.cuda_kernel("adamw_step")},
            devices=("cuda",),
            missing=lambda: _extension.why_cuda_missing("adamw_step"),
            refuses={"step": _cuda_refuses},
        ),
    },
    cases=(
        Case("ragged", _case(*_RAGGED, steps=(0, 5, 1, 2, 30)), wide=_WIDE),
        Case("first_step", _case((3, 50), (9,), steps=(0,)), wide=_WIDE),
        # More than one strip of 32 rows, one that is wide, one that is many; and more than one flat block.
        Case("several_blocks", _case((70, 600), (1000, 20), (20000,), steps=(99,)), wide=_WIDE),
        Case("amsgrad", _case(*_RAGGED, amsgrad=True, maximize=True), wide=_WIDE),
        Case("clipped_and_cleared", _case(*_RAGGED, grad_factor=0.37, clear_grads=True), wide=_WIDE),
        Case("maximize_without_decay", _case((40, 33), (5,), maximize=True, weight_decay=0.0), wide=_WIDE),
        Case("little_momentum", _case((40, 33), (5,), beta1=0.2, beta2=0.3, eps=0.1), wide=_WIDE),
        Case("no_momentum", _case((40, 33), (5,), beta1=0.0, beta2=0.0), wide=_WIDE),
    ),
    bad_cases=(
        BadCase("too_few_grads", _bad(grads=[torch.ones(2, 3)]), ValueError, "grads must hold 2 tensors as"),
        BadCase("too_few_steps", _bad(state_steps=[]), ValueError, "state_steps must hold 2 tensors"),
        BadCase(
            "grad_shape",
            _bad(grads=[torch.ones(2, 3), torch.ones(5)]),
            ValueError,
            r"grads\[1\] must be \[4\] as params\[1\] is, got \[5\]",
        ),
        BadCase(
            "transposed_moment",
            _bad(exp_avgs=[torch.ones(3, 2), torch.ones(4)]),
            ValueError,
            r"exp_avgs\[0\] must be \[2, 3\]",
        ),
        BadCase(
            "moment_dtype",
            _bad(exp_avg_sqs=[torch.ones(2, 3), torch.ones(4).double()]),
            TypeError,
            r"exp_avg_sqs\[1\] must be",
        ),
        BadCase(
            "grad_dtype", _bad(grads=[torch.ones(2, 3).half(), torch.ones(4).half()]), TypeError, r"grads\[0\] must be"
        ),
        BadCase("step_shape", _bad(state_steps=[torch.ones(2)] * 2), ValueError, r"state_steps\[0\] must be"),
        BadCase(
            "step_dtype",
            _bad(state_steps=[torch.tensor(1), torch.tensor(1)]),
            TypeError,
            r"state_steps\[0\] must be",
        ),
        BadCase(
            "integers",
            _bad(params=[torch.ones(2, 3, dtype=torch.int64), torch.ones(4, dtype=torch.int64)]),
            TypeError,
            "params must be floating",
        ),
    ),
    bench_cases=(
        BenchCase(
            "small",
            _case(*SMALL_SHAPES),
            wide=_WIDE,
            bytes_per_element=7 * sum(torch.Size(shape).numel() for shape in SMALL_SHAPES),  # 4 in, 3 out
        ),
    ),
    differentiable=False,
    mutates=("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
)
