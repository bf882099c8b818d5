"""Who optimizes what, and Muon against its definition and against torch's."""

import pytest
import torch
from torch import nn

from warploom.errors import UserError
from warploom.ops import newton_schulz
from warploom.optim import Muon, OptimizerConfig, build_optimizers


class Toy(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    @property
    def output_weight(self):
        return self.head.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_hidden_matrices_decay(name, tied):
    model = Toy(tied)
    optimizers = build_optimizers(model, OptimizerConfig(name=name, weight_decay=0.3))
    groups = [(o, g, p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(id(p) for _, _, p in groups) == sorted(id(p) for p in model.parameters())
    hidden = {id(model.up.weight), id(model.down.weight)}
    assert {id(p) for _, g, p in groups if g["weight_decay"] == 0.3} == hidden
    assert all(g["weight_decay"] in (0.0, 0.3) for _, g, _ in groups)
    assert {id(p) for o, _, p in groups if isinstance(o, Muon)} == (hidden if name == "muon" else set())
    assert all(g["peak_lr"] == g["lr"] for _, g, _ in groups)


def test_frozen_parameters_are_left_out():
    model = Toy()
    model.up.weight.requires_grad_(False)
    groups = [g for o in build_optimizers(model, OptimizerConfig()) for g in o.param_groups]
    assert all(p is not model.up.weight for g in groups for p in g["params"])


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5), (3, 1)])
def test_newton_schulz_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(4, *shape, generator=generator)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ newton_schulz(matrix) @ vh.mT  # diagonal if the vectors are kept
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.equal(newton_schulz(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_muon_agrees_with_torch_up_to_its_bfloat16():
    generator = torch.Generator().manual_seed(2)
    shapes = [(16, 16), (16, 48), (48, 16), (16, 16)]
    start = [torch.randn(s, generator=generator) for s in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    mine = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b, shape in zip(ours, theirs, shapes, strict=True):
            a.grad = torch.randn(shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        moved = (b - w).norm()
        assert moved > 0.01 * w.norm()
        assert (a - b).norm() < 0.05 * moved  # bfloat16 has 8 bits, and either side rounds in its own order


def test_muons_factor_is_a_product_that_the_gradients_do_not_see():
    generator = torch.Generator().manual_seed(4)
    start, first, second = (torch.randn(6, 9, generator=generator) for _ in range(3))
    folded, apart, unclipped = (nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [Muon([p], lr=0.1) for p in (folded, apart, unclipped)]
    # Two steps: one alone is the same for every factor, as Muon's update has a size of its own.
    for grad, factor in ((first, 0.25), (second, 1.0)):
        for p, of_gradient, of_step in ((folded, 1.0, factor), (apart, factor, 1.0), (unclipped, 1.0, 1.0)):
            p.grad = grad * of_gradient
            optimizer = next(o for o in optimizers if o.param_groups[0]["params"][0] is p)
            optimizer.step(grad_factor=of_step)
        assert torch.equal(folded.grad, grad)
    assert torch.equal(folded, apart) and not torch.allclose(folded, unclipped)


def test_muon_updates_have_the_size_of_adamw_for_every_shape():
    for shape in [(32, 32), (16, 128), (128, 16)]:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        Muon([weight], lr=1.0, weight_decay=0.0).step()
        assert 0.14 < weight.detach().square().mean().sqrt() < 0.24


def test_muon_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match=r"got one of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"muon_lr": -1.0}, {"eps": 0.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"momentum": 1.0}],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(UserError, match=f"optimizer.{next(iter(settings))}"):
        OptimizerConfig(**settings)
