"""What holds for every transformer, whatever its configuration."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.models import Transformer, TransformerConfig

POSITIONS = ("sinusoidal", "learned", "rotary", "alibi", "t5", "none")
TINY = {"vocab_size": 17, "max_seq_len": 32, "d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 20}
FACTORS = {
    "architecture": ("decoder", "encoder", "encoder-decoder"),
    "position": POSITIONS,
    "activation": ("relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"),
    "norm": ("layer_norm", "rms_norm"),
    "norm_position": ("pre", "post"),
    "norm_bias": (True, False),
    "num_kv_heads": (None, 2, 1),
    "head_dim": (None, 8),
    "parallel_block": (False, True),
    "parallel_norms": (1, 2),
    "bias": (True, False),
    "tie_embeddings": (True, False),
    "scale_embedding": (True, False),
    "embedding_norm": (True, False),
    "output_bias": (True, False),
    "dropout": (0.0, 0.1),
}


def pairwise() -> list[dict]:
    """Few settings of FACTORS in which every pair of values that may stand together does."""
    draw = random.Random(0)
    candidates = []
    while len(candidates) < 1500:
        fields = {name: draw.choice(values) for name, values in FACTORS.items()}
        try:
            TransformerConfig(**TINY, **fields)
        except UserError:
            continue
        candidates.append((fields, set(itertools.combinations(fields.items(), 2))))
    missing = set().union(*(pairs for _, pairs in candidates))
    chosen = []
    while missing:
        fields, pairs = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        chosen.append(fields)
        missing -= pairs
    return chosen


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> Transformer:
    """A tiny model, in float64 unless told; every weight random, so that none can be forgotten unseen."""
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**{**TINY, **fields})).to(dtype)
    model.compute_dtype = dtype
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: Transformer, B: int = 2, S: int = 5) -> dict:
    return {"source": tokens(B, S, seed=2)} if model.encoder is not None else {}


VARIANTS = pairwise()


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_every_parameter_of_every_variant_trains(fields):
    model = build(dtype=torch.float32, **fields)
    x = tokens(2, 9)
    loss = model.loss(x[:, :-1], x[:, 1:], **inputs(model))
    loss.backward()
    assert loss.isfinite() and loss.shape == ()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A shift of all keys moves no softmax: that gradient is zero but for rounding.
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name


def test_pairwise_covers_the_positions_of_every_architecture():
    met = {(fields["architecture"], fields["position"]) for fields in VARIANTS}
    assert met == set(itertools.product(FACTORS["architecture"], POSITIONS))
    parallel = {fields["parallel_norms"] for fields in VARIANTS if fields["parallel_block"]}
    assert parallel == {1, 2}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_no_token_sees_a_later_one(architecture, position):
    model = build(architecture=architecture, position=position)
    x, changed = tokens(2, 8), tokens(2, 8)
    changed[:, 5] = (changed[:, 5] + 1) % 17
    before, after = model(x, **inputs(model)), model(changed, **inputs(model))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


@pytest.mark.parametrize("position", POSITIONS)
def test_an_encoder_sees_every_token(position):
    model = build(architecture="encoder", position=position)
    x, changed = tokens(2, 8), tokens(2, 8)
    changed[:, 5] = (changed[:, 5] + 1) % 17
    assert not torch.isclose(model(x), model(changed)).all(-1).any()


@pytest.mark.parametrize("position", [position for position in POSITIONS if position != "none"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_order_matters(architecture, position):
    model = build(architecture=architecture, position=position)
    x = torch.tensor([[3, 5, 7, 9]])
    swapped = torch.tensor([[5, 3, 7, 9]])
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_packed_documents_equal_separate_ones(architecture, position):
    model = build(architecture=architecture, position=position)
    x = tokens(2, 12)
    lengths = [5, 7, 3, 1, 8]  # two rows of 12
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 12)
    packed = model(x, cu_seqlens=cu_seqlens, positions=positions)
    documents = torch.cat([model(document[None])[0] for document in x.flatten().split(lengths)])
    torch.testing.assert_close(packed.flatten(0, 1), documents)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_padding_changes_nothing(architecture, position):
    model = build(architecture=architecture, position=position)
    x, source, lengths, source_lengths = tokens(2, 6), tokens(2, 7, seed=2), torch.tensor([6, 4]), torch.tensor([3, 7])
    sources = {"source": source, "source_lengths": source_lengths} if model.encoder is not None else {}
    hidden = model(x, lengths=lengths, **sources)
    for b in range(2):
        alone = {"source": source[b : b + 1, : source_lengths[b]]} if sources else {}
        row = model(x[b : b + 1, : lengths[b]], **alone)
        torch.testing.assert_close(hidden[b : b + 1, : lengths[b]], row)


class ListCache:
    """The simplest AttentionCache: per layer and row, a growing (H_kv, length, D)."""

    def __init__(self, lengths: Tensor) -> None:
        self.cross = {}
        self.rows = {}
        self.prompt_lengths = lengths.tolist()
        self.held = [0] * len(self.prompt_lengths)

    def num_keys(self, num_new):
        return max(self.held) + num_new

    def update(self, layer, k, v):
        if layer not in self.rows:
            self.rows[layer] = [(k[b, :, :n], v[b, :, :n]) for b, n in enumerate(self.prompt_lengths)]
            return k, v, None
        rows = [
            (torch.cat([old_k, k[b]], 1), torch.cat([old_v, v[b]], 1))
            for b, (old_k, old_v) in enumerate(self.rows[layer])
        ]
        self.rows[layer] = rows
        padded = k.new_zeros(2, len(rows), k.shape[1], self.num_keys(1), k.shape[3])
        for b, (row_k, row_v) in enumerate(rows):
            padded[0, b, :, : row_k.shape[1]], padded[1, b, :, : row_v.shape[1]] = row_k, row_v
        return padded[0], padded[1], torch.tensor([row_k.shape[1] for row_k, _ in rows])

    def advance(self):
        self.held = [rows[0].shape[1] for rows in self.rows[0]]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_cached_decoding_equals_one_pass(architecture, position):
    """Prompts of 3 and 5 tokens, then four more each, one by one."""
    model = build(architecture=architecture, position=position, num_kv_heads=2)
    x, lengths = tokens(2, 9), torch.tensor([3, 5])
    source, source_lengths = tokens(2, 7, seed=2), torch.tensor([4, 7])
    given = {}
    if model.encoder is not None:
        given = {"memory": model.encode(source, source_lengths), "source_lengths": source_lengths}
    whole = model(x, **given)
    cache = ListCache(lengths)
    prompt = model(x[:, :5], cache=cache, **given)
    for b in range(2):
        torch.testing.assert_close(prompt[b, : lengths[b]], whole[b, : lengths[b]])
    if given:
        given["memory"] = torch.full_like(given["memory"], torch.nan)  # its keys and values are in the cache
    for step in range(4):
        cache.advance()
        at = lengths + step
        hidden = model(x.gather(1, at[:, None]), positions=at[:, None], cache=cache, **given)
        torch.testing.assert_close(hidden[:, 0], whole[torch.arange(2), at])


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    x = tokens(2, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "fields", [{}, {"norm": "rms_norm", "activation": "swiglu"}, {"position": "t5"}, {"norm_position": "post"}]
)
def test_bfloat16_is_near_float32(fields):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**TINY, "d_model": 64, "d_ff": 128, **fields}))
    x = tokens(4, 33)
    full = model.loss(x[:, :-1], x[:, 1:])
    full.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.compute_dtype = torch.bfloat16
    hidden = model(x)
    assert hidden.dtype == torch.bfloat16 and model.logits(hidden).dtype == torch.bfloat16
    low = model.loss(x[:, :-1], x[:, 1:])
    low.backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, atol=5e-3, rtol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        # Rounding flips the sign of half a percent of the ReLU's inputs: that alone moves gradients by sqrt(0.005).
        assert (parameter.grad - gradient).norm() <= 0.1 * gradient.norm() + 1e-4


def test_loss_is_the_cross_entropy_of_the_logits():
    model = build(tie_embeddings=False)
    x, targets = tokens(2, 8), tokens(2, 8, seed=3)
    targets[0, :3] = -100
    logits = model.logits(model(x)).flatten(0, 1)
    for reduction in ("mean", "sum"):
        expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction=reduction)
        torch.testing.assert_close(model.loss(x, targets, reduction=reduction), expected)


def test_initial_weights():
    config = TransformerConfig(
        **{**TINY, "d_model": 128, "num_layers": 3},
        architecture="encoder-decoder",
        num_encoder_layers=2,
        bias=True,
        position="t5",
        init_std=0.1,
        tie_embeddings=False,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.1
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (3 * 3 if name.startswith("stack") else 2 * 2) ** 0.5  # matrices that write to that stream
            error = 4 * std / (2 * weight.numel()) ** 0.5  # four standard errors of a sample's standard deviation
            assert abs(weight.std().item() - std) < error, name
    assert any(name.endswith("down_proj.weight") for name in state)


def test_initial_weights_repeat_and_follow_the_generator():
    config = TransformerConfig(**TINY, scale_embedding=True)
    with torch.device("meta"):
        late = Transformer(config)
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
    early = Transformer(config)
    early.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), early.parameters(), strict=True))
    # Embeddings times sqrt(d_model) have unit variance.
    assert early.embedding(torch.arange(17)).std().item() == pytest.approx(1.0, abs=0.15)


def test_tied_weights_are_one():
    model = build()
    assert model.output_weight is model.embedding.weight and "lm_head.weight" not in model.state_dict()
    assert build(tie_embeddings=False).output_weight.shape == (17, 24)


def test_state_dict_names():
    model = build(
        architecture="encoder-decoder", position="learned", activation="swiglu", source_vocab_size=5, num_layers=1
    )
    block = [f"{part}.weight" for part in ("attention_norm", *(f"attention.{x}_proj" for x in "qkvo"))]
    block += [f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")] + ["feed_forward_norm.weight"]
    block += ["attention_norm.bias", "feed_forward_norm.bias"]
    cross = [
        "cross_attention_norm.weight",
        "cross_attention_norm.bias",
        *(f"cross_attention.{x}_proj.weight" for x in "qkvo"),
    ]
    ends = ["position.table.weight", "norm.weight", "norm.bias"]
    expected = ["embedding.weight", "source_embedding.weight"]
    expected += [f"encoder.{name}" for name in ends] + [f"encoder.blocks.0.{name}" for name in block]
    expected += [f"stack.{name}" for name in ends] + [f"stack.blocks.0.{name}" for name in block + cross]
    assert sorted(model.state_dict()) == sorted(expected)


def test_arguments_that_do_not_fit():
    decoder, both = build(), build(architecture="encoder-decoder")
    x = tokens(1, 4)
    with pytest.raises(ValueError, match="needs source or memory"):
        both(x)
    with pytest.raises(ValueError, match="this model is a decoder"):
        decoder(x, source=x)
    with pytest.raises(ValueError, match="only an encoder-decoder encodes"):
        decoder.encode(x)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens excludes"):
        decoder(x, cu_seqlens=cu_seqlens, positions=torch.arange(4)[None], lengths=torch.tensor([4]))
    with pytest.raises(ValueError, match="cu_seqlens needs the positions"):
        decoder(x, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="at most 32 long"):
        build(position="learned")(tokens(1, 33))
    assert decoder(tokens(1, 33)).shape == (1, 33, 24)  # rotary positions do not end


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_by_row_equal_the_default(position):
    model, x = build(position=position), tokens(2, 6)
    assert torch.equal(model(x, positions=torch.arange(6).expand(2, 6)), model(x))


# Dynamo instantiates the Function it traces; that is torch's own affair.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("architecture, position", [("decoder", "t5"), ("encoder-decoder", "rotary")])
def test_the_whole_loss_is_one_graph(architecture, position):
    model, x = build(architecture=architecture, position=position), tokens(2, 9)
    compiled = torch.compile(model.loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x[:, :-1], x[:, 1:], **inputs(model)), model.loss(x[:, :-1], x[:, 1:], **inputs(model)))
