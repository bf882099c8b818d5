"""Attention as torch and transformers ask for it, with masks of any form, on ops.attention.

The op takes a causal flag, a number of keys per row of the batch, and a bias shared by the batch. A mask that says
nothing else is read into those, and hidden blocks of keys are then skipped. Any other mask is added as a bias, row by
row of the batch where the rows differ. Compiled code cannot read values: there every mask is a bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from warploom.nn.autocast import autocast
from warploom.ops.attention import attention

# The op multiplies scores by log2(e), which takes the least finite number to -inf. They are not the same: a query whose
# keys are all masked by a finite number sees them all alike, one whose keys are all at -inf sees none.
LEAST = -1e30


@dataclass(frozen=True)
class _Sight:
    """Which keys the queries see, as the op takes it."""

    causal: bool
    num_keys: int  # no query sees a key from here on; the last query of a causal sight stands at the last of these
    key_lengths: Tensor | None = None  # (B,) or (1,), None if every row of the batch sees num_keys


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[Tensor] = (),
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T + bias + masks) v, (B, H, T, D), inside autocast and outside.

    q: (B, H, T, D); k, v: (B, H_kv, S, D). masks, bias: each broadcasts to (B, H, T, S). A bool mask is True where a
    key is seen; a floating one is added to the scores. Where bool masks hide every key from a query it gets zeros, but
    with a bias (floating) it sees all keys alike, as in transformers. causal: as ops.attention has it.
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    sight = _read(masks, causal, q.shape[2], k.shape[2])
    if sight is None or (bias is not None and _blind(sight, q.shape[2])):
        return _attend_biased(q, k, v, _total(masks, bias), causal, scale)
    n, lengths = sight.num_keys, sight.key_lengths
    if n < k.shape[2]:
        k, v = k[:, :, :n], v[:, :, :n]
    if lengths is not None:
        lengths = lengths.expand(q.shape[0])
    if bias is not None:
        bias = bias[..., :n]
        if bias.shape[0] > 1:
            if lengths is not None:
                bias = bias.masked_fill(torch.arange(n, device=k.device) >= lengths[:, None, None, None], -math.inf)
            return _attend_biased(q, k, v, bias, sight.causal, scale)
        bias = _placed(bias[0], q, n)
    return attention(q, k, v, causal=sight.causal, bias=bias, key_lengths=lengths, softmax_scale=scale)


def _read(masks: Sequence[Tensor], causal: bool, T: int, S: int) -> _Sight | None:
    """Read masks and flag together as one sight, None if that cannot be."""
    sights = [_Sight(True, S)] if causal else []
    if masks and torch.compiler.is_compiling():
        return None
    for mask in masks:
        sight = _read_once(mask, T, S)
        if sight is None:
            return None
        sights.append(sight)
    ends = {sight.num_keys for sight in sights if sight.causal}
    if len(ends) > 1:
        return None
    n = ends.pop() if ends else S
    lengths = [sight.key_lengths for sight in sights if sight.key_lengths is not None]
    shortest = None if not lengths else torch.stack(torch.broadcast_tensors(*lengths)).amin(0).clamp(max=n)
    return _Sight(any(sight.causal for sight in sights), n, shortest)


# One mask serves every layer of a model.
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _read_once(mask: Tensor, T: int, S: int) -> _Sight | None:
    if mask.is_inference():  # these count no versions
        return _read_mask(mask, T, S)
    key = mask._version, T, S
    if mask not in _READ or _READ[mask][0] != key:
        _READ[mask] = key, _read_mask(mask, T, S)
    return _READ[mask][1]


def _read_mask(mask: Tensor, T: int, S: int) -> _Sight | None:
    if mask.shape[1] != 1 or mask.shape[3] != S or mask.numel() == 0 or mask.requires_grad:
        return None
    if mask.dtype != torch.bool:
        visible = mask == 0
        if not bool((visible | (mask == -math.inf)).all()):
            return None
        mask = visible
    visible = mask[:, 0]  # (B, T, S), either of the first two may be 1
    lengths = visible[:, -1].sum(-1)  # the last query sees the most keys, if the mask is one of those below
    keys = torch.arange(S, device=mask.device)
    seen = keys < lengths[:, None, None]  # (B, 1, S)
    longest = int(lengths.max())
    key_lengths = None if int(lengths.min()) == S else lengths
    if torch.equal(visible, seen.expand_as(visible)):
        return _Sight(False, S, key_lengths)
    if visible.shape[1] != T:
        return None
    rows = torch.arange(T, device=mask.device)[:, None]
    if torch.equal(visible, seen & (keys <= rows + (S - T))):
        return _Sight(True, S, key_lengths)
    # A cache of fixed size: the keys after the last query's are not written yet.
    if torch.equal(visible, seen & (keys <= rows + (longest - T))):
        return _Sight(True, longest, lengths)
    return None


def _blind(sight: _Sight, T: int) -> bool:
    """Whether some query sees no key."""
    if sight.causal and sight.num_keys < T:
        return True
    return sight.key_lengths is not None and not bool((sight.key_lengths > 0).all())


def _total(masks: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """What the masks and the bias add to the scores, with as few dimensions expanded as they have."""
    total = bias
    for mask in masks:
        if mask.dtype == torch.bool:
            if bias is None:
                zero = torch.zeros((), device=mask.device) if total is None else total
                total = zero.where(mask, -math.inf)
            else:
                assert total is not None
                total = total.where(mask, LEAST)
        else:
            finite = mask.where((mask >= LEAST) | (mask == -math.inf), LEAST)
            total = finite if total is None else total + finite
    assert total is not None
    return total


def _attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool, scale: float | None) -> Tensor:
    if bias.shape[0] == 1:
        return attention(q, k, v, causal=causal, bias=_placed(bias[0], q, k.shape[2]), softmax_scale=scale)
    outputs = []
    for b in range(q.shape[0]):
        row = slice(b, b + 1)
        placed = _placed(bias[b], q, k.shape[2])
        outputs.append(attention(q[row], k[row], v[row], causal=causal, bias=placed, softmax_scale=scale))
    return torch.cat(outputs)


def _placed(bias: Tensor, q: Tensor, S: int) -> Tensor:
    """The bias of one batch as the op takes it: (1 or H, T, S), of q's dtype or float32."""
    bias = bias.expand(bias.shape[0], q.shape[2], S)
    return bias if bias.dtype in (q.dtype, torch.float32) else bias.float()
