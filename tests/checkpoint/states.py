"""Small checkpoint states that differ in every field by step, and a digest that tells any two apart."""

import hashlib
import json

import torch

from warploom.checkpoint.format import CheckpointState


def make_state(step: int, *, width: int = 24, heldout_loss: float | None = None, tokenizer: bool = True):
    """A state whose every file depends on step. width sets its size: about 40 * width**2 bytes."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    weights = {
        "embedding.weight": draw(2 * width, width),
        "blocks.0.attention.weight": draw(width, width).bfloat16(),
        "blocks.0.norm.weight": draw(width),
        "scale": draw(1)[0],
        "no_rows": torch.empty(0, width),
        "mask": draw(width) > 0,
    }
    optimizer = {
        f"adamw/{name}/{key}": draw(*tensor.shape)
        for name, tensor in weights.items()
        if tensor.dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq")
    }
    return CheckpointState(
        step=step,
        weights=weights,
        optimizer=optimizer,
        rng={"torch.cpu": torch.randint(0, 256, (500,), generator=generator, dtype=torch.uint8)},
        meta={"config": {"model": {"d_model": width}, "seed": step}, "loader": {"position": step * 7, "epoch": 0.5}},
        tokenizer=json.dumps({"step": step}).encode() if tokenizer else None,
        heldout_loss=heldout_loss,
    )


def digest(state: CheckpointState) -> str:
    """Hash everything a state holds."""
    total = hashlib.sha256()
    for tensors in (state.weights, state.optimizer, state.rng):
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    scalars = [state.step, state.meta, state.heldout_loss, (state.tokenizer or b"none").decode()]
    total.update(json.dumps(scalars, sort_keys=True).encode())
    return total.hexdigest()
