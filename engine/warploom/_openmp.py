"""How OpenMP's threads wait, which is read once, when torch loads its OpenMP library: so this is imported before torch.

A thread that waits for work spins for some milliseconds before it sleeps. Where another program wants the core, that
time is lost to both. After 1,000 turns, tens of microseconds, a thread still meets the next op of a small model awake:
beside six busy loops on two cores a training step took 5.8 s instead of 11.0 s. With no spinning at all it took 4.9 s,
but small models become slower on a quiet machine: a step of `nano` took 57 ms at best, 37 ms with 1,000 turns, 44 ms as
it is otherwise.

A process that has torch already, or says in its environment how threads wait, keeps its way. The name is that of GNU's
library, which torch's Linux wheels carry.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
