"""torch.optim.Optimizer without its detour through torch.compile's machinery."""

from __future__ import annotations

import inspect

from torch.optim import Optimizer


class EagerMethods:
    """Mixed in before an optimizer: the methods that torch keeps torch.compile out of, without that.

    Torch does it by a decorator that imports torch._dynamo at the first call, and with it sympy and Triton: about
    160 MB of memory and 3 seconds (torch 2.13.0) in a process that may never compile anything.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
