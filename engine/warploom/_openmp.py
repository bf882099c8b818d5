"""How OpenMP's threads wait, which is read once, when torch loads its OpenMP library: so this is imported before torch.

Unless told otherwise a thread waits for work by spinning. Where another program wants the core, that time is lost to
both: beside six busy loops on two cores a training step took 1.6 times as long (13.8 against 8.6 s). Alone it makes no
difference (690 against 659 ms). A process that has torch already, or an OMP_WAIT_POLICY of its own, keeps its way.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
