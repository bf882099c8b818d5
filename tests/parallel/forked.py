"""Processes of a group as forks of one that has imported torch: a start costs a tenth of a second, not several."""

import json
import os
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

GROUP_TIMEOUT_S = 60.0


class Forks:
    """size children that are in one gloo group and each call work(rank). The parent must have no threads."""

    def __init__(self, size, work, before_group=lambda rank: None, group_timeout_s=GROUP_TIMEOUT_S):
        self.folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.errors = [Path(self.folder.name, f"error-{rank}") for rank in range(size)]
        self.pids, self.group_timeout_s = [], group_timeout_s
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._child(rank, size, work, before_group)
            self.pids.append(pid)

    def _child(self, rank, size, work, before_group):
        code = 1
        try:
            before_group(rank)
            store = dist.FileStore(str(Path(self.folder.name, "store")), size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=self.group_timeout_s)
            )
            work(rank)
            code = 0
        except BaseException:
            self.errors[rank].write_text(traceback.format_exc())
        finally:
            os._exit(code)

    def wait(self, timeout_s=120.0):
        """Return the exit code of each child, -9 for one that was killed; those that do not end are killed."""
        codes, deadline = {}, time.monotonic() + timeout_s
        while len(codes) < len(self.pids):
            for pid in self.pids:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
            if time.monotonic() > deadline:
                for pid in self.pids:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]

    def error(self, rank):
        """Return the traceback with which a child ended, empty if it did not so."""
        return self.errors[rank].read_text() if self.errors[rank].exists() else ""


def main(scenarios, argv):
    """Run the scenarios that argv[0], a JSON object of name -> [function, arguments], names; print the results."""
    torch.set_num_threads(1)
    jobs = json.loads(argv[0])
    print(json.dumps({name: scenarios[function](**arguments) for name, (function, arguments) in jobs.items()}))
