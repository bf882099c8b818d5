"""What a training run takes, before it is paid for: operations, memory, layouts over devices, time, cost.

hardware.py   devices and links
layout.py     data x shard x tensor x pipeline x context: which fit, and the memory per device by part
timing.py     step time: roofline for the device, latency and bandwidth for the links
forecast.py   all layouts of a workload, and the cheapest change that makes one fit
published.py  runs whose device-hours were published, to compare with
here.py       this machine, measured
"""
