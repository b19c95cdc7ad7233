"""In which order tokens stay: the only place that ranks scores.

The ranks do not depend on the budget. A layer that holds n tokens holds those of rank below n, so
that fewer tokens are always a part of more, and a layer can be cut again and again.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scores = Float[Tensor, "kv_heads tokens"]
HeadTokens = Bool[Tensor, "kv_heads tokens"]
Ranks = Int[Tensor, "kv_heads tokens"]
Flat = Float[Tensor, " tokens"]
FlatMask = Bool[Tensor, " tokens"]
Group = Int[Tensor, " tokens"]


def head_ranks(scores: Scores, protected: HeadTokens, present: HeadTokens) -> Ranks:
    """Rank of each token in its own head: protected ones first, then by falling score.

    Ties go to the earlier token, and so do protected ones, which stay in any case; NaN is the
    lowest score; where nothing is present the rank is behind all others.
    """
    heads = _head_of_each(scores)
    ranks = ranks_within(scores.flatten(), protected.flatten(), present.flatten(), heads)
    return ranks.view_as(scores)


def pooled_ranks(scores: Scores, protected: HeadTokens, present: HeadTokens, floor: float) -> Ranks:
    """Rank of each token among those of all heads, which share a layer's budget.

    A token's place is the better of two queues: that of its head, which moves `floor` of the time
    and then serves one token of every head, and that of all heads by score, which moves the rest of
    the time. So each head has at least `floor` of an equal share, and the best scores get what is
    left. Source: AdaKV (arXiv 2407.11550), whose safeguard and top-k these queues are.
    """
    flat = scores.flatten(), protected.flatten(), present.flatten()
    heads = _head_of_each(scores)
    return ranks_shared(*flat, heads, None, len(scores), floor).view_as(scores)


def ranks_within(scores: Flat, protected: FlatMask, present: FlatMask, head: Group) -> Group:
    """`head_ranks` of the heads of any number of layers at once, given the head of each token."""
    return _ranks(_keys(scores, protected, present), head)[0]


def ranks_shared(
    scores: Flat,
    protected: FlatMask,
    present: FlatMask,
    head: Group,
    layer: Group | None,
    kv_heads: int,
    floor: float,
) -> Group:
    """`pooled_ranks` of any number of layers at once, given the head and layer of each token.

    Without `layer` all heads are of one. Heads are numbered through all layers, each of which has
    `kv_heads`; tokens of a head, and heads of a layer, come one after the other.
    """
    keys = _keys(scores, protected, present)
    if floor == 0:
        return _ranks(keys, layer)[0]
    own, shared = _ranks(keys, head, layer)
    always = protected & present
    place = (own - _count_in_group(always, head) + 1).double() * kv_heads / floor
    if floor < 1:
        elsewhere = (shared - _count_in_group(always, layer) + 1) / (1 - floor)
        place = torch.minimum(place, elsewhere)
    return _ranks(_keys(-place, protected, present), layer)[0]


def _head_of_each(scores: Scores) -> Int[Tensor, " all"]:
    heads = torch.arange(len(scores), dtype=torch.int16, device=scores.device)
    return heads[:, None].expand_as(scores).flatten()


def _keys(scores: Flat, protected: FlatMask, present: FlatMask) -> Flat:
    """What to sort by."""
    scores = scores.nan_to_num(torch.finfo(scores.dtype).min)
    return scores.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)


def _ranks(keys: Flat, *groupings: Group | None) -> list[Group]:
    """Rank of each token by falling key in its group, for several ways of grouping (None: none).

    One sort by key, then one by group for each, which stays in order: quicker on a GPU than a sort
    of every group, and without a word from the CPU.
    """
    order = torch.sort(keys, descending=True, stable=True).indices
    places = torch.arange(len(keys), device=keys.device)
    out = []
    for group in groupings:
        by_group, rank = order, places
        if group is not None:
            groups, again = torch.sort(group[order], stable=True)
            by_group = order[again]
            rank = places - torch.searchsorted(groups, groups)  # less where its group begins
        out.append(torch.empty_like(order).scatter_(0, by_group, rank))
    return out


def _count_in_group(true: FlatMask, group: Group | None) -> Int[Tensor, "*tokens"]:
    """For each token how many are true in its group, whose tokens come one after the other."""
    if group is None:
        return true.sum()
    # not by adding into a place for each group: on a GPU, all would wait for the same few places
    before = torch.nn.functional.pad(true.cumsum(0), (1, 0))
    group = group.contiguous()
    first, end = (torch.searchsorted(group, group, right=right) for right in (False, True))
    return before[end] - before[first]
