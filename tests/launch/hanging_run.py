"""Two processes that step and exchange. In the first start rank 1 waits for a lock that it holds, in the second rank 0
holds the interpreter in a C call, the third is well. `hanging_run.py launch EVENTS` launches them."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from warploom.launch import LaunchConfig, launch
from warploom.parallel import heartbeat
from warploom.parallel.mesh import processes


def wait_for_a_lock_of_its_own():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(600)


HANGS = [(1, wait_for_a_lock_of_its_own), (0, hold_the_interpreter), (None, None)]


def step_and_exchange(orders):
    os.environ.update(orders["environment"])
    faulthandler.register(signal.SIGUSR1)
    path, num_slots, slot = orders["heartbeat"]
    with heartbeat.beating(Path(path), num_slots, slot), processes("cpu"):
        rank, hang = HANGS[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
        for step in range(40):
            heartbeat.report("step", step=step)
            if step == 30 and rank == dist.get_rank():
                hang()
            dist.all_reduce(torch.zeros(5))
            time.sleep(0.01)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        config = LaunchConfig(nproc=2, max_restarts=2, events=Path(sys.argv[2]))
        sys.exit(launch(config, ["step"], step_and_exchange))
