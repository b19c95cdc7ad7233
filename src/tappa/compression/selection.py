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


def head_ranks(scores: Scores, protected: HeadTokens, present: HeadTokens) -> Ranks:
    """Rank of each token in its own head: protected ones first, then by falling score.

    Ties go to the earlier token, and so do protected ones, which stay in any case; NaN is the
    lowest score; where nothing is present the rank is behind all others.
    """
    scores = scores.nan_to_num(torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def pooled_ranks(scores: Scores, protected: HeadTokens, present: HeadTokens, floor: float) -> Ranks:
    """Rank of each token among those of all heads, which share a layer's budget.

    A token's place is the better of two queues: that of its head, which moves `floor` of the time
    and then serves one token of every head, and that of all heads by score, which moves the rest of
    the time. So each head has at least `floor` of an equal share, and the best scores get what is
    left. Source: AdaKV (arXiv 2407.11550), whose safeguard and top-k these queues are.
    """
    flat = [x.reshape(1, -1) for x in (scores, protected, present)]
    if floor == 0:
        return head_ranks(*flat).view_as(scores)
    always = (present & protected).sum(1, keepdim=True)
    own = (head_ranks(scores, protected, present) - always + 1) * len(scores) / floor
    place = own.double()
    if floor < 1:
        shared = (head_ranks(*flat).view_as(scores) - always.sum() + 1) / (1 - floor)
        place = torch.minimum(place, shared)
    return head_ranks(-place.reshape(1, -1), *flat[1:]).view_as(scores)
