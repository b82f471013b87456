r"""SPO, self-supervised preference optimisation: a small loss that tells how much of a response's key content is left.

"Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness", arXiv:2409.17791.
Evidence: inferred. The authors' repository holds no code. Known is the mechanism: key content of a response, found by RAKE, is
removed in different amounts; a module on top of the model is trained, beside the alignment loss, to tell the amounts apart. All
else below is this library's own parameterisation: a reconstruction, not a reproduction. Self-play preference optimisation and
other methods called SPO are something else.

RAKE: the lower-cased words of a text fall into phrases at stop words and punctuation. A word's frequency is how often it
occurs, its degree the sum over its occurrences of the length of their phrase; its score is degree / frequency, 0 for stop
words. View j of K drops the :math:`\lceil f_j n \rceil` highest-scoring of the n key tokens (score above 0; of equal ones the
earlier first), for fractions :math:`f_0 < f_1 < \dots`; its label is j. With the mean :math:`\bar h_j` of the last hidden
states over the tokens that are kept, and a linear head:

.. math::
    L_\mathrm{deg} = \frac{1}{|J|} \sum_{j \in J} -\log\mathrm{softmax}(W \bar h_j + b)_j, \qquad
    L = L_\mathrm{align} + \gamma\,(L_\mathrm{deg}(\mathrm{chosen}) + L_\mathrm{deg}(\mathrm{rejected}))

Gradient to hidden states and head; what is kept and the labels are constants, and dropped tokens get none. Features are formed
either of every view's own forward pass over the reduced text (nearest to the paper's words), or by pooling the hidden states of
the full text under each view's mask (`view_features`: one pass, every hidden state read once however many views there are).

Defaults, all ours: 4 views with fractions 0, 1/4, 1/2, 1; gamma 0.1; both sides, one head. A response without key words has no
views that differ, and is left out of :math:`L_\mathrm{deg}`; of views that are equal only the one with the smallest label
enters (`distinct_views`). A view keeps at least one token, the last that would be dropped. K = 1 gives 0. NaN in a feature is a
ValueError, as is a view without tokens (on CUDA the loss is NaN).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import masked_mean_pool, step_mean
from ..ops._arguments import check_tensors, number
from ._about import About
from ._shared import check_values, may_look

about = About(
    name="SPO (self-supervised)",
    title="Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness",
    arxiv="2409.17791",
    year=2024,
    family="auxiliary loss",
    evidence="inferred",
    note="no code and no equations could be had; every formula and default is this library's",
)

FRACTIONS = (0.0, 0.25, 0.5, 1.0)


def rake_scores(words: Sequence[str], stopwords: Collection[str]) -> list[float]:
    """The RAKE score of every word; 0 for stop words and for words without a letter or a digit, which end phrases too.

    words: in order, punctuation as words of its own. Compared lower-cased, as are the stop words.
    """
    if isinstance(words, str):
        raise TypeError("words is a str; a sequence of words is expected")
    stops = {word.lower() for word in stopwords}
    lowered = [word.lower() for word in words]
    keys = [word not in stops and any(c.isalnum() for c in word) for word in lowered]
    degree: dict[str, int] = {}
    frequency: dict[str, int] = {}
    begin = 0
    for end in range(len(lowered) + 1):
        if end < len(lowered) and keys[end]:
            continue
        for word in lowered[begin:end]:
            degree[word] = degree.get(word, 0) + end - begin
            frequency[word] = frequency.get(word, 0) + 1
        begin = end + 1
    return [degree[word] / frequency[word] if key else 0.0 for word, key in zip(lowered, keys, strict=True)]


def degree_views(
    scores: Tensor | Sequence[float], fractions: Sequence[float] = FRACTIONS, mask: Tensor | None = None
) -> Tensor:
    """What each view keeps: bool [K, T] for token scores [T], or [B, K, T] for [B, T] with a mask of the response's tokens.

    A token's score is that of its word. One row per fraction, in order; each keeps a subset of what the one before keeps, and
    at least one token where there is any. Ties go by position, so that every worker gets the same.
    """
    fractions = [number("fractions", f) for f in fractions]
    if not fractions:
        raise ValueError("fractions is empty; at least one is expected")
    for f, after in zip(fractions, [*fractions[1:], float("inf")], strict=True):
        if not 0 <= f <= 1:
            raise ValueError(f"fractions has {f}; it must lie in [0, 1]")
        if not f < after:
            raise ValueError(f"fractions has {after} behind {f}; they must ascend")
    scores = torch.as_tensor(scores)
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores has shape {list(scores.shape)}; expected [T] or [B, T]")
    kept = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if kept.shape != scores.shape:
        raise ValueError(f"mask has shape {list(kept.shape)}; scores has shape {list(scores.shape)}, so the same is expected")
    key = kept & (scores > 0)
    order = torch.argsort(torch.where(key, scores, -1.0), dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    share = torch.tensor(fractions, dtype=torch.float64, device=scores.device)
    drop = (share * key.sum(-1, keepdim=True) - 1e-12).ceil()  # [..., K]
    drop = torch.minimum(drop, (kept.sum(-1, keepdim=True) - 1).clamp_min(0).to(drop.dtype))
    dropped = key[..., None, :] & (rank[..., None, :] < drop[..., None])
    return kept[..., None, :] & ~dropped


def distinct_views(keep: Tensor) -> Tensor:
    """bool [..., K]: which of the views keep [..., K, T] enter the loss: of equal ones the first, and none where all are
    equal."""
    changed = (keep[..., 1:, :] != keep[..., :-1, :]).any(-1)
    return torch.cat([changed.any(-1, keepdim=True), changed], -1)


def view_features(hidden: Tensor, keep: Tensor) -> Tensor:
    """Means of hidden [B, T, H] over what each view keeps, [B, K, T] as from `degree_views`: [B, K, H]. Gradient to hidden.

    Since views are nested, a token belongs to the first so many of them: tokens are summed once by how many, and a view is the
    sum of what is in it and in those behind it.
    """
    check_tensors(hidden=hidden, keep=keep)
    if hidden.dim() != 3 or keep.dim() != 3 or keep.shape[::2] != hidden.shape[:2]:
        raise ValueError(
            f"keep has shape {list(keep.shape)}; [B, K, T] is expected, and [B, T, H] of hidden, which has {list(hidden.shape)}"
        )
    if may_look(keep) and bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        raise ValueError("keep has a token that comes back; every view must keep a subset of what the one before keeps")
    means, counts = step_mean(hidden, keep.sum(1), keep.shape[1])
    sums = (means * counts[..., None]).flip(1).cumsum(1).flip(1)
    return sums / counts.flip(1).cumsum(1).flip(1).clamp_min(1)[..., None]


def degree_loss(
    hidden: Tensor,
    keep: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """The mean cross entropy of the views that count, 0 if none does. Gradient to hidden, head_weight and head_bias.

    Args:
        hidden: [N, T, H], a forward pass per view, with keep bool [N, T]; or [B, T, H], one per response, with [B, K, T].
        head_weight, head_bias: [K, H] and [K], or None.
        labels: int64 [N], or [B, K].
        valid: bool, shaped like labels, as from `distinct_views`; None: all count. Others are never looked at.
    """
    check_tensors(hidden=hidden, keep=keep, head_weight=head_weight, labels=labels)
    if keep.shape[:-1] != labels.shape:
        raise ValueError(f"labels has shape {list(labels.shape)}; keep has shape {list(keep.shape)}; [N] or [B, K] is expected")
    counted = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    if counted.shape != labels.shape:
        raise ValueError(f"valid has shape {list(counted.shape)}; {list(labels.shape)} is expected, the shape of labels")
    features = view_features(hidden, keep) if keep.dim() == 3 else masked_mean_pool(hidden, keep)
    features, some = features.flatten(0, -2), keep.any(-1).flatten()
    counted, labels = counted.flatten(), labels.flatten()
    check_values("keep", some, some | ~counted, "every view that counts keeps a token")
    features = torch.where(counted[:, None], features, 0.0)
    check_values("features", features, features.isfinite().all(-1), "finite hidden states are expected")
    features = torch.where((some | ~counted)[:, None], features, torch.nan)
    dtype = features.dtype
    logits = F.linear(features, head_weight.to(dtype), None if head_bias is None else head_bias.to(dtype))
    each = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(counted, each, 0.0).sum() / counted.sum().clamp_min(1)


def spo_loss(align_loss: Tensor, degree_chosen: Tensor, degree_rejected: Tensor | None = None, *, gamma: float = 0.1) -> Tensor:
    """align_loss + gamma (degree_chosen + degree_rejected); with gamma 0 align_loss itself."""
    gamma = number("gamma", gamma)
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must not be negative")
    if gamma == 0:
        return align_loss
    return align_loss + gamma * (degree_chosen if degree_rejected is None else degree_chosen + degree_rejected)
