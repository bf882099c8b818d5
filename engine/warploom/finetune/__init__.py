"""Fine-tuning: what is put together on top of train/ to go on from a trained model.

config.py      FinetuneConfig: what is trained, on which task
rows.py        JSON lines to conversations and preference pairs
packing.py     examples to rows of a fixed length, each example apart
data.py        TrainingData of answers, and of pairs
freeze.py      which parameters are trained, new layers, and the memory that training really holds
preference.py  the loss of direct preference optimization, and its reference
run.py         from a checkpoint and a file to the tuned model, its samples and its report
"""
