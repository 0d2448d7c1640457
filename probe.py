"""What the heads of a model do: its attention recomputed with hooks, to be seen and to be changed.

    with hooked(model, edit=partial(mask_far, window=256)):
        nll = model.nll(ids, targets)      # as if no token could look 256 tokens back or further

While a model is hooked, the output of each layer's attention is replaced by what `attend` computes
from the same weights in plain steps. `see` is shown the scores and the weights, and an `edit`
returns other scores for the softmax. For models and texts that a CPU reads in seconds. A longer
text takes `first`: the queries before it are left to the layer's own attention, which is much
faster. That changes nothing in the losses where first <= window, because those queries have no far
keys.

A key is *far* where it lies at least `window` tokens before the query, and *near* otherwise.
Shapes: B texts, T tokens, R of them as queries, H heads, D = head_dim.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import LLaMA, Attention
from rope import apply_rope

SCORES_AT_ONCE = 2**23  # scores that are held at a time, of a few queries against all keys

# ---- attention in plain steps --------------------------------------------------------------------


@dataclass
class Scores:
    """The scores of some queries of a layer, for all keys, as they go into the softmax."""

    layer: int
    logits: Tensor  # (B, H, R, T), with the softmax's 1/sqrt(D); -inf at keys after the query
    distance: Tensor  # (R, T): the query's position minus the key's
    q: Tensor  # (B, H, T, D), of all tokens, before RoPE
    k: Tensor  # (B, H, T, D)
    cos: Tensor  # (T, D/2)
    sin: Tensor

    def of_pairs(self, pairs: Tensor, keys: int, at: int | None = None) -> Tensor:
        """What some of RoPE's pairs add to the logits of the first keys, (B, H, R, keys).

        pairs: (D/2,) bool. at: the distance that the keys are taken to have; default: their own.
        """
        queries = self.distance[:, 0]  # the key of column 0 is at position 0
        q = self.q[:, :, queries] * torch.cat([pairs, pairs])  # (B, H, R, D)
        k = self.k[:, :, :keys]  # (B, H, keys, D)
        if at is None:
            q = apply_rope(q, self.cos[queries], self.sin[queries])
            k = apply_rope(k, self.cos[:keys], self.sin[:keys])
        else:
            q = apply_rope(q, self.cos[at], self.sin[at])
            k = apply_rope(k, self.cos[0], self.sin[0])
        return q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))


Edit = Callable[[Scores], Tensor]  # returns the logits to use
See = Callable[[Scores, Tensor], None]  # is given the weights too, (B, H, R, T)


def attend(
    attention: Attention, layer: int, x: Tensor, cos: Tensor, sin: Tensor,
    edit: Edit | None = None, see: See | None = None, first: int = 0
) -> Tensor:
    """What the attention returns for the queries from `first` on, (B, T - first, C).

    Without an edit this equals attention(x, cos, sin)[:, first:]. x (B, T, C), cos and sin
    (T, D/2). edit, see: called with some queries at a time, in order.
    """
    B, T, _ = x.shape
    q = attention.q_proj(x).view(B, T, -1, attention.head_dim).transpose(1, 2)  # (B, H, T, D)
    k = attention.k_proj(x).view(B, T, -1, attention.head_dim).transpose(1, 2)
    v = attention.v_proj(x).view(B, T, -1, attention.head_dim).transpose(1, 2)
    k = k.repeat_interleave(attention.group, dim=1)  # (B, H, T, D)
    v = v.repeat_interleave(attention.group, dim=1)
    turned_q = apply_rope(q, cos, sin) / math.sqrt(attention.head_dim)
    turned_k = apply_rope(k, cos, sin)

    outputs = []
    positions = torch.arange(T)
    queries_at_once = max(1, SCORES_AT_ONCE // (B * q.size(1) * T))
    for queries in positions[first:].split(queries_at_once):
        distance = queries[:, None] - positions  # (R, T)
        logits = turned_q[:, :, queries] @ turned_k.transpose(-1, -2)  # (B, H, R, T)
        logits.masked_fill_(distance < 0, -torch.inf)
        scores = Scores(layer, logits, distance, q, k, cos, sin)
        if edit is not None:
            scores.logits = edit(scores)
        weights = scores.logits.softmax(dim=-1)
        if see is not None:
            see(scores, weights)
        outputs.append(weights @ v)
    y = torch.cat(outputs, dim=2)  # (B, H, T - first, D)
    return attention.o_proj(y.transpose(1, 2).reshape(B, T - first, -1))


@contextmanager
def hooked(
    model: LLaMA, edit: Edit | None = None, see: See | None = None,
    layers: Sequence[int] | None = None, first: int = 0
) -> Iterator[LLaMA]:
    """The model with `attend` in the place of its attention, within a `with` block.

    layers: in these alone; default: in all. first: for the queries from this one on.
    Raises ValueError if the model is given a KV cache.
    """

    def replace(attention: Attention, args: tuple, output: Tensor) -> Tensor:
        x, cos, sin, cache, layer = args
        if cache is not None:
            raise ValueError("a hooked model has no KV cache: call it with all tokens at once")
        attended = attend(attention, layer, x, cos, sin, edit, see, first)  # (B, T - first, C)
        return torch.cat([output[:, :first], attended], dim=1)

    hooks = []
    try:
        for layer, block in enumerate(model.layers):
            if layers is None or layer in layers:
                hooks.append(block.self_attn.register_forward_hook(replace))
        yield model
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def show(
    model: LLaMA, ids: Tensor, see: See, layers: Sequence[int] | None = None, first: int = 0
) -> None:
    """Show the scores and weights, one text at a time. ids (B, T); layers, first: as in `hooked`."""
    with hooked(model, see=see, layers=layers, first=first):
        for text in ids:
            model.hidden(text[None])


# ---- edits: other scores for far keys ------------------------------------------------------------


def mask_far(scores: Scores, window: int) -> Tensor:
    """No query sees a far key."""
    return scores.logits.masked_fill(scores.distance >= window, -torch.inf)


def cap_far(scores: Scores, window: int, top: Tensor) -> Tensor:
    """No far key scores above `top`, which is broadcast over (B, H, R, T)."""
    far = scores.distance >= window
    return torch.where(far, torch.minimum(scores.logits, top), scores.logits)


def cap_at_head(scores: Scores, window: int, tops: Tensor) -> Tensor:
    """No far key scores above a number that its head has, tops (layers, H)."""
    return cap_far(scores, window, tops[scores.layer][:, None, None])


def cap_at_query(scores: Scores, window: int) -> Tensor:
    """No far key scores above the highest near key of the same query."""
    return cap_far(scores, window, highest_near(scores, window))


def cap_at_mean(scores: Scores, window: int) -> Tensor:
    """No far key scores above the mean of the near keys of the same query."""
    near = (scores.distance >= 0) & (scores.distance < window)
    return cap_far(scores, window, mean_over(scores.logits, near)[..., None])


def drop_highest(scores: Scores, window: int) -> Tensor:
    """No query sees the far keys that score above all its near ones."""
    higher = scores.logits > highest_near(scores, window)
    return scores.logits.masked_fill(higher, -torch.inf)


def keep_highest(scores: Scores, window: int) -> Tensor:
    """Of the far keys, each query sees only those that score above all its near ones."""
    lower = scores.logits <= highest_near(scores, window)
    return scores.logits.masked_fill(lower & (scores.distance >= window), -torch.inf)


def hold_far(
    scores: Scores, window: int, at: int, pairs: Tensor, keys: int | None = None
) -> Tensor:
    """Far keys score as at the distance `at` in some pairs of RoPE, and as they do in the others.

    pairs: (D/2,) bool. keys: of the first so many tokens alone; default: of all.
    """
    far = scores.distance >= window
    if keys is None:
        keys = int(far.any(dim=0).sum())  # the far ones come first
    own = scores.logits[..., :keys]
    held = own - scores.of_pairs(pairs, keys) + scores.of_pairs(pairs, keys, at)
    held = torch.where(far[:, :keys], held, own)
    return torch.cat([held, scores.logits[..., keys:]], dim=-1)


def except_first(scores: Scores, edit: Edit) -> Tensor:
    """What the edit returns, but the text's first token keeps its score.

    Many models park on it the attention that they do not need elsewhere.
    """
    return torch.cat([scores.logits[..., :1], edit(scores)[..., 1:]], dim=-1)


def highest_near(scores: Scores, window: int) -> Tensor:
    """The highest score of each query's near keys, (B, H, R, 1)."""
    return mask_far(scores, window).amax(dim=-1, keepdim=True)


def mean_over(logits: Tensor, chosen: Tensor) -> Tensor:
    """The mean logit of each query over chosen keys: (B, H, R, T), (R, T) -> (B, H, R)."""
    return logits.masked_fill(~chosen, 0).sum(-1) / chosen.sum(-1)


# ---- the loss under an edit ----------------------------------------------------------------------


@torch.no_grad()
def nll_by_position(
    model: LLaMA, ids: Tensor, edit: Edit | None = None, layers: Sequence[int] | None = None,
    first: int = 0
) -> np.ndarray:
    """The mean loss in nats of ids (B, T), (T - 1,): entry i is that of token i + 1.

    edit, layers, first: as in `hooked`; without an edit the model is left as it is.
    """
    if edit is None:
        layers = []
    parts = []
    with hooked(model, edit, layers=layers, first=first):
        for part in ids.split(max(1, 4096 // ids.size(1))):
            parts.append(model.nll(part[:, :-1], part[:, 1:]))
    return torch.cat(parts).mean(dim=0).numpy()


@torch.no_grad()
def nll_within_windows(model: LLaMA, ids: Tensor, window: int, bos_ids: Sequence[int]) -> np.ndarray:
    """The same losses where the model never reads more than `window` tokens at a time.

    From position `window` on, each token has at least half a window before it. A window begins with
    bos_ids, in the place of its first tokens.
    """
    half = window // 2
    first = ids[:, :window]
    parts = [model.nll(first[:, :-1], first[:, 1:]).mean(dim=0)]
    for start in range(window, ids.size(1), half):
        part = ids[:, start - half : start + half].clone()
        part[:, : len(bos_ids)] = torch.tensor(bos_ids, dtype=part.dtype)
        nll = model.nll(part[:, :-1], part[:, 1:])
        parts.append(nll[:, half - 1 :].mean(dim=0))
    return torch.cat(parts).numpy()


# ---- what the weights and scores are -------------------------------------------------------------


def mean_weight(model: LLaMA, ids: Tensor, where: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight that each head gives to keys at some distances, (layers, H).

    where: from distances (R, T) to bool (R, T). The mean over the queries that have such a key.
    """
    total = torch.zeros(model.config.n_layer, model.config.n_head)
    count = torch.zeros(model.config.n_layer)

    def see(scores: Scores, weights: Tensor) -> None:
        chosen = where(scores.distance) & (scores.distance >= 0)
        total[scores.layer] += (weights * chosen).sum(dim=(0, 2, 3))
        count[scores.layer] += chosen.any(dim=-1).sum()

    show(model, ids, see)
    return total / count[:, None]


def weights_of_head(model: LLaMA, text: Tensor, layer: int, head: int) -> Tensor:
    """The weights of one head on one text (T,): (T, T), a row for each query."""
    rows = []

    def see(scores: Scores, weights: Tensor) -> None:
        rows.append(weights[0, head])

    show(model, text[None], see, layers=[layer])
    return torch.cat(rows)


def weights_of_queries(model: LLaMA, text: Tensor, first: int) -> Tensor:
    """The weights of all heads for the queries from `first` on: (layers, H, T - first, T)."""
    rows: list[list[Tensor]] = [[] for _ in model.layers]

    def see(scores: Scores, weights: Tensor) -> None:
        rows[scores.layer].append(weights[0])

    show(model, text[None], see, first=first)
    return torch.stack([torch.cat(parts, dim=1) for parts in rows])


class Drift(NamedTuple):
    """Where the attention of each layer goes: means over heads and queries, (layers,) each."""

    far_weight: np.ndarray  # the share of the weight on far keys
    entropy: np.ndarray  # of the weights, in nats
    far_highest: np.ndarray  # the share of queries whose highest score is at a far key
    far_minus_near: np.ndarray  # the mean logit of far keys minus that of near ones
    first_weight: np.ndarray  # the share of the weight on the text's first token


def attention_drift(model: LLaMA, ids: Tensor, window: float) -> Drift:
    """The drift in texts ids (B, T), for the queries of their last quarter."""
    start = 3 * ids.size(1) // 4
    total = np.zeros((len(Drift._fields), model.config.n_layer))
    count = np.zeros(model.config.n_layer)

    def see(scores: Scores, weights: Tensor) -> None:
        logits = scores.logits
        far = scores.distance >= window
        near = (scores.distance >= 0) & ~far
        highest_far = logits.masked_fill(~far, -torch.inf).amax(dim=-1)
        values = (
            (weights * far).sum(dim=-1),
            torch.special.entr(weights).sum(dim=-1),
            (highest_far > logits.masked_fill(far, -torch.inf).amax(dim=-1)).float(),
            mean_over(logits, far) - mean_over(logits, near),
            weights[..., 0],
        )  # (B, H, R) each
        total[:, scores.layer] += [value.mean(dim=(0, 1)).sum().item() for value in values]
        count[scores.layer] += len(far)

    show(model, ids, see, first=start)
    return Drift(*(total / count))


class Largest(NamedTuple):
    """The largest logits of each head over all queries of some texts, (layers, H) each."""

    inside: Tensor  # of |logit|, at distances below the window
    outside: Tensor  # of |logit|, at the window and beyond
    top: Tensor  # of the logit with its sign, at distances below the window
    late_top: Tensor  # the same, in the second half of the window


def largest_logits(model: LLaMA, ids: Tensor, window: int, first: int = 0) -> Largest:
    """The largest logits in texts ids (B, T), of the queries from `first` on."""
    shape = (model.config.n_layer, model.config.n_head)
    inside = torch.zeros(shape)
    outside = torch.zeros(shape)
    top = torch.full(shape, -torch.inf)
    late_top = torch.full(shape, -torch.inf)

    def raise_to(largest: Tensor, layer: int, logits: Tensor, chosen: Tensor) -> None:
        values = logits.masked_fill(~chosen, -torch.inf).amax(dim=(0, 2, 3))  # (H,)
        largest[layer] = torch.maximum(largest[layer], values)

    def see(scores: Scores, weights: Tensor) -> None:
        near = (scores.distance >= 0) & (scores.distance < window)
        raise_to(inside, scores.layer, scores.logits.abs(), near)
        raise_to(outside, scores.layer, scores.logits.abs(), scores.distance >= window)
        raise_to(top, scores.layer, scores.logits, near)
        raise_to(late_top, scores.layer, scores.logits, near & (scores.distance >= window // 2))

    show(model, ids, see, first=first)
    return Largest(inside, outside, top, late_top)


# ---- queries and keys before RoPE ----------------------------------------------------------------


@torch.no_grad()
def queries_keys(model: LLaMA, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys before RoPE, complex: (layers, H, B, T, D/2) each.

    Pair j is the complex number of dimensions j and j + D/2. Then h_j of eq. (3) is the query's
    number times the conjugate of the key's.
    """
    caught = []
    hooks = []
    for block in model.layers:
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
            # "append" returns None, so the hook leaves the output as it is
            hook = projection.register_forward_hook(lambda module, x, y: caught.append(y))
            hooks.append(hook)
    model.hidden(ids)
    for hook in hooks:
        hook.remove()

    config = model.config
    heads = []
    for x in caught:
        x = x.unflatten(-1, (-1, config.head_dim)).permute(2, 0, 1, 3)  # (H or K, B, T, D)
        pairs = torch.complex(*x.chunk(2, dim=-1))  # (H or K, B, T, D/2)
        heads.append(pairs.repeat_interleave(config.n_head // len(x), dim=0))
    return torch.stack(heads[::2]), torch.stack(heads[1::2])
