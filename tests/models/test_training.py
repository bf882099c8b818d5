"""The original transformer, shrunk in width and depth, learns to translate between two invented languages."""

import dataclasses

import torch
from torch import Tensor

from warploom.models import Transformer, preset

BEGIN, END, LETTERS, LONGEST = 0, 1, 10, 8


def sentences(B: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sources of 3 to LONGEST letters, their lengths, and decoder inputs and targets of the translation: each letter
    becomes another (a fixed permutation) and the order is reversed."""
    source = torch.randint(0, LETTERS, (B, LONGEST), generator=generator)
    lengths = torch.randint(3, LONGEST + 1, (B, 1), generator=generator)
    place = torch.arange(LONGEST)
    reversed_source = source.gather(1, (lengths - 1 - place).clamp(min=0))
    translated = torch.where(place < lengths, 12 + (7 * reversed_source + 3) % LETTERS, -100)
    inputs = torch.cat([torch.full((B, 1), BEGIN), translated.clamp(min=0)], 1)
    targets = torch.cat([translated, torch.full((B, 1), -100)], 1).scatter(1, lengths, END)
    return source + 2, lengths[:, 0], inputs, targets


def test_transformer_base_learns_to_translate():
    torch.manual_seed(0)
    config = dataclasses.replace(
        preset("transformer-base"), vocab_size=22, d_model=64, d_ff=256, num_layers=2, dropout=0.0, init_std=0.15
    )
    model, steps, peak_lr = Transformer(config), 300, 4e-3
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_lr, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        source, lengths, inputs, targets = sentences(32, generator)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((step + 1) / 50, (steps - step) / (steps - 50))
        optimizer.zero_grad()
        model.loss(inputs, targets, source=source, source_lengths=lengths).backward()
        optimizer.step()
    model.eval()
    source, lengths, inputs, targets = sentences(64, generator)  # of 10^8 sentences: not seen before
    with torch.no_grad():
        assert model.loss(inputs, targets, source=source, source_lengths=lengths).item() < 0.05
        wrong_source = model.loss(inputs, targets, source=source.roll(1, 0), source_lengths=lengths.roll(1))
        assert wrong_source.item() > 1.0  # a control: without its source no target can be guessed
        written = torch.full((64, 1), BEGIN)
        for _ in range(LONGEST + 1):
            hidden = model(written, source=source, source_lengths=lengths)
            written = torch.cat([written, model.logits(hidden[:, -1:]).argmax(-1)], 1)
    right = ((written[:, 1:] == targets) | (targets == -100)).all(1)
    assert right.float().mean().item() > 0.95
