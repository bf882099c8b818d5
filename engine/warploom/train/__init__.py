"""Training: the one layer that composes model, data, optimizers and checkpoints.

step.py          the training step
trainer.py       Trainer: everything around the step; result.py: how a run ended
spikes.py        which loss or gradient norm is a spike
corruption.py    steps computed twice, against silent corruption
run_state.py     the state of a run, into a checkpoint and back; saving.py: when, and what it costs
config.py        RunConfig: model, train, optimizer, schedule
batches.py       what the trainer asks of data
heldout.py       loss, perplexity and bits per byte on the held-out split
batch_size.py    the largest micro batch that memory holds
guard.py         SIGINT and SIGTERM
diagnosis.py     overfitting and underfitting, read off the curve
device.py        which device and compute type
monitor.py       display, metrics.jsonl, TensorBoard events
matmul_rate.py   the measured ceiling of this machine
estimate.py      parameters, FLOPs and memory, reckoned
budget.py        --budget: from a time to everything else; probe.py measures for it
report.py        report.html, drawn with chart.py
run.py           from text to model, samples and report
ladder.py        from the naive step of naive.py to the engine's, a rung at a time
load_model.py    from a checkpoint to a model
"""
