"""One model over many processes, on torch.distributed: each dimension takes a finished model and returns it changed.

config.py       the sizes of the dimensions, checked against the world
mesh.py         the processes as a grid, and one process's place in it
collectives.py  sequence and head exchanges with a gradient
rows.py         a global batch cut into the micro batches of one process
tensor.py       heads, features and vocabulary over processes, norms over the sequence
context.py      the sequence over processes
pipeline.py     the blocks over processes
replicas.py     gradients of whole weights summed over replicas
shard.py        shards of every weight, and their replicas (fully_shard), and which part of a weight lies here
tree.py         gradients summed over replicas in one order for any number of them
muon.py         Muon's orthogonalisation of matrices that lie in parts
state.py        what each process writes into a checkpoint and reads from one
heartbeat.py    what this process is doing, for its launcher
fork_server.py  what the processes of a run are forked from
watched.py      every collective as it begins: reported, and compared over the processes if wanted
checksums.py    of what processes compute: which of them computed something else than before
devices.py      the blocks over the devices of one process
apply.py        all of it, in the one order that is right

Only config.py, heartbeat.py and fork_server.py are imported without torch.distributed: a run of one process pays
nothing for the rest.
"""

from warploom.parallel.config import ParallelConfig

__all__ = ["ParallelConfig"]
