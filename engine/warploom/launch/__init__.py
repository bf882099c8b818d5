"""Starts the processes of a run on this machine, watches over them and starts them again, on torch's elastic agent.

processes.py  the processes, as forks of one that has imported everything
watch.py      dead, frozen or stuck: what exit codes and heartbeats say
agent.py      the elastic agent over these two
run.py        launch: rendezvous, agent, exit code
"""

from warploom.launch.run import LaunchConfig, launch

__all__ = ["LaunchConfig", "launch"]
