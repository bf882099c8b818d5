"""Small models and data for the trainer's tests. The data follow a rule that a small model learns in some steps."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.train.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from warploom.train.trainer import Trainer

VOCABULARY = 29


@dataclass
class ToyBatch:
    tokens: Tensor
    targets: Tensor
    num_bytes: int | None = None
    source: Tensor | None = None
    source_lengths: Tensor | None = None


class ToyStream:
    """Batch after batch from a seed and a position, which is its whole state."""

    def __init__(self, make_batch, batch_size, seed):
        self.make_batch, self.batch_size, self.seed, self.position = make_batch, batch_size, seed, 0

    def __next__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.position)
        self.position += 1
        return self.make_batch(self.batch_size, generator)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class ToyData:
    num_sequences = 64

    def __init__(self, make_batch, num_heldout=2):
        self.make_batch, self.num_heldout = make_batch, num_heldout

    def train_batches(self, micro_batch_size):
        return ToyStream(self.make_batch, micro_batch_size, seed=1)

    def heldout_batches(self, micro_batch_size):
        stream = ToyStream(self.make_batch, micro_batch_size, seed=2)
        return [next(stream) for _ in range(self.num_heldout)]


def counting(batch_size, generator, seq_len=16):
    """Sequences that go up by a step of their own, 1 to 3."""
    start = torch.randint(VOCABULARY, (batch_size, 1), generator=generator)
    step = torch.randint(1, 4, (batch_size, 1), generator=generator)
    sequence = (start + step * torch.arange(seq_len + 1)) % VOCABULARY
    return ToyBatch(sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous(), num_bytes=2 * batch_size * seq_len)


def ragged(batch_size, generator, seq_len=16):
    """Like counting, with a tail of each row ignored."""
    batch = counting(batch_size, generator, seq_len)
    lengths = torch.randint(1, seq_len + 1, (batch_size, 1), generator=generator)
    return replace(batch, num_bytes=None, targets=batch.targets.masked_fill(torch.arange(seq_len) >= lengths, -100))


def reversing(batch_size, generator, length=5):
    """A toy translation: the target is the source backwards, after a token 0."""
    source = torch.randint(1, VOCABULARY, (batch_size, length), generator=generator)
    targets = source.flip(1)
    tokens = torch.cat((torch.zeros(batch_size, 1, dtype=torch.int64), targets[:, :-1]), dim=1)
    return ToyBatch(tokens, targets, source=source, source_lengths=torch.full((batch_size,), length))


def toy_config(out_dir, *, model=None, optimizer=None, schedule=None, vocab_size=VOCABULARY, **overrides):
    model = {"d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 16, "dropout": 0.1, **(model or {})}
    train = {"steps": 12, "seq_len": 16, "global_batch_size": 8, "micro_batch_size": 4, "device": "cpu", "threads": 1}
    train.update(overrides)
    return RunConfig(
        model=TransformerConfig(vocab_size=vocab_size, **model),
        train=TrainConfig(out_dir=out_dir, **train),
        optimizer=OptimizerConfig(**{"name": "adamw", "lr": 3e-3, **(optimizer or {})}),
        schedule=ScheduleConfig(**(schedule or {})),
    )


def toy_model(config, seed=0):
    torch.manual_seed(seed)
    return Transformer(config.model)


class Poisoned(ToyData):
    """The micro batches at the given places, counted from 0, are marked for the model of fit_poisoned."""

    def __init__(self, places):
        super().__init__(counting)
        self.places = places

    def train_batches(self, micro_batch_size):
        stream = super().train_batches(micro_batch_size)
        make_batch = stream.make_batch

        def poisoned(size, generator):
            batch = make_batch(size, generator)
            if stream.position - 1 in self.places:
                batch.source_lengths = torch.tensor(0)
            return batch

        stream.make_batch = poisoned
        return stream


def fit_poisoned(config, steps, monitor=None, factor=math.nan):
    """Train on batches of two micro batches; in those steps, counted from 1, the loss of the second is multiplied by
    the factor. Return the result or error, the weights before each step, and the trainer."""
    model = toy_model(config)
    true_loss, weights = model.loss, []

    def loss(tokens, targets, reduction, source_lengths=None):
        if model.training:
            weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        value = true_loss(tokens, targets, reduction=reduction)
        return value if source_lengths is None else value * factor

    model.loss = loss
    trainer = Trainer(model, Poisoned([2 * step - 1 for step in steps]), config, monitor=monitor)
    try:
        return trainer.fit(), weights[::2], trainer
    except UserError as error:
        return error, weights[::2], trainer


class Log:
    """A monitor that keeps what it is told."""

    def __init__(self):
        self.steps, self.evaluations, self.messages, self.results, self.is_closed = [], [], [], [], False
        self.skips, self.spikes, self.saves = [], [], []

    def start(self, info):
        self.info = info

    def step(self, record):
        self.steps.append(record)

    def odd_step(self, record):
        (self.skips if record.skipped else self.spikes).append(record)

    def save(self, record):
        self.saves.append(record)

    def write(self):
        pass

    def evaluation(self, record):
        self.evaluations.append(record)

    def message(self, text):
        self.messages.append(text)

    def finish(self, result):
        self.results.append(result)

    def close(self):
        self.is_closed = True
