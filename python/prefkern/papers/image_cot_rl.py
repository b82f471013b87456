r"""DPO and GRPO on the tokens of images, and log-probs under classifier-free guidance from one product with the head.

Tong et al., "Delving into RL for Image Generation with CoT: A Study on DPO vs. GRPO", arXiv:2505.17017.
Evidence: part. An empirical study: it has no loss of its own, and its code is not released. The losses here are those of the
repositories nearest to it, and agree with their code numerically: GRPO of T2I-R1 (same group, Janus-Pro), DPO of
Image-Generation-CoT (its predecessor, Show-o). What the study itself sets was read in summaries; not recovered are its
beta of either loss, its learning rates, and how ties among candidates become pairs.

An image is L discrete tokens (Janus-Pro 576 of a codebook of 16384, Show-o 256 of 8192) with log-probs lp and a mask m.

DPO, from sums over tokens :math:`S = \sum_t m_t\,\mathrm{lp}_t`, the reference constant (:func:`image_dpo_loss`):

.. math:: L = -\log\sigma\bigl(\beta [(S_w - S_w^\mathrm{ref}) - (S_l - S_l^\mathrm{ref})]\bigr)

GRPO, with the sum of all reward functions r and a group of G images of one prompt (:func:`image_grpo_loss`):

.. math::
    A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + 10^{-4}}, \qquad
    L = \frac{\sum_t m_t\bigl(-e^{\mathrm{lp}_t - \mathrm{sg}(\mathrm{lp}_t)} A + \beta\,k_3\bigr)}{\sum_t m_t}, \qquad
    k_3 = e^{\mathrm{ref} - \mathrm{lp}} - (\mathrm{ref} - \mathrm{lp}) - 1

std has the divisor G - 1. There is one update per rollout, so that the ratio is 1 and nothing is clipped:
:math:`\partial L / \partial\mathrm{lp} = \frac{m}{\sum m} (-A + \beta (1 - e^{\mathrm{ref} - \mathrm{lp}}))`.

Guidance. Images are drawn from :math:`\mathrm{softmax}((u + w (c - u)) / T)` with the conditional and unconditional logits c
and u. The head is linear, hence :math:`u + w (c - u) = W (h_u + w (h_c - h_u)) + b`: :func:`cfg_hidden` combines the hidden
states, and one product with the head gives guided log-probs (:func:`cfg_token_logps`), with gradients to both streams,
:math:`w\,dh` and :math:`(1 - w)\,dh`. A head whose logits are soft-capped is not linear and is not covered.

`logprob="conditional"`, the default, is the code's: it samples with guidance and takes log-probs of c alone, off-policy by
construction. `"guided"` is inferred: both policy and reference are those of guided logits, so that what is trained is what
samples. The study does not say.

Where paper and code differ, and choices of this library:

- Show-o's DPO adds a reward term that is built from constants: it has no gradient, and with it the other coefficients are
  ignored. It is left out.
- T2I-R1 takes the mean over tokens of one process and averages over processes, which is no mean over all tokens where
  sequences differ in length. `normalizer` takes the number of tokens to divide by. Images of a fixed number of tokens do not
  differ.
- T2I-R1 lets the tokens of its text plan into the mean; the study's mask is of image tokens alone.
- :func:`pick_pairs`: the best over the worst candidate of a prompt is the study's (summaries); the first of equals, and that
  a pair needs a gap above `min_gap`, 0, is inferred.
- :func:`yes_reward`: an answer that is neither yes nor no gets 0 in the code, and so counts as the worst image;
  `invalid="nan_drop"` gives NaN, which the functions here leave out under `nan="drop"`.

Defaults and where they come from: DPO beta 0.1 Show-o's script; KL weight 0.01 and eps 1e-4 T2I-R1's. Neither a group size
(the study 4, T2I-R1 8) nor a guidance weight (Janus-Pro samples with 5) is assumed.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import (
    LossOutput,
    group_advantages,
    group_reduce,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
    policy_loss,
    preference_loss,
    sequence_sum,
)
from ..ops._arguments import check_tensors, integer, number
from ..ops.policy import Aggregation
from ._about import About
from ._shared import check_rows, check_values, may_look

about = About(
    name="Image-CoT RL study",
    title="Delving into RL for Image Generation with CoT: A Study on DPO vs. GRPO",
    arxiv="2505.17017",
    year=2025,
    family="study: image tokens, pairwise and policy objective",
    evidence="part",
    note="an empirical study whose code is not released; losses agree with T2I-R1 and with Image-Generation-CoT",
)

LOGPROBS = ("conditional", "guided")
NORMALIZERS = ("token", "sequence")
NAN_RULES = ("error", "drop")
INVALID_RULES = ("zero", "nan_drop")


# Guidance


def cfg_hidden(h_c: Tensor, h_u: Tensor, w: float) -> Tensor:
    """h_u + w (h_c - h_u), shaped like both: the hidden states whose logits are the guided ones. Gradients w and 1 - w.

    h_c, h_u: conditional and unconditional, of one shape and floating dtype, any strides. w: finite; 1 is h_c and 0 is h_u,
    to the bit. Computed in float32 (float64) and rounded once: in bfloat16 that is a relative 2^-9 of the combined state.
    """
    check_tensors(h_c=h_c, h_u=h_u)
    if not h_c.is_floating_point():
        raise TypeError(f"h_c has dtype {h_c.dtype}; a floating dtype is expected")
    if h_c.dtype != h_u.dtype:
        raise TypeError(f"h_u has dtype {h_u.dtype} and h_c has {h_c.dtype}; the same is expected")
    if h_c.shape != h_u.shape:
        raise ValueError(f"h_u has shape {list(h_u.shape)}; {list(h_c.shape)} is expected, as h_c")
    w = number("w", w)
    if not math.isfinite(w):
        raise ValueError(f"w is {w}; a finite number is expected")
    return torch.lerp(h_u, h_c, w)


def cfg_token_logps(
    h_cond: Tensor,
    h_uncond: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    cfg_weight: float,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log softmax((u + w (c - u)) / T)[ids], shaped like `ids`, float32 (float64), by `prefkern.linear_logprobs` of
    `cfg_hidden`: the head is gone through once, and nothing of the size of the logits exists.

    h_cond, h_uncond: [..., H]. weight: [V, H]. bias: [V] or None. ids: [...] int64 or int32; `ignore_index` gives 0. The rest
    as for `linear_logprobs`. Gradients to both hidden states, weight and bias.
    """
    hidden = _combined(h_cond, h_uncond, cfg_weight)
    return linear_logprobs(
        hidden, weight, ids, bias=bias, temperature=temperature, ignore_index=ignore_index, chunk_bytes=chunk_bytes
    ).logp


def _combined(h_cond: Tensor, h_uncond: Tensor, cfg_weight: float) -> Tensor:
    """`cfg_hidden`, whose complaints are in the names of its callers."""
    try:
        return cfg_hidden(h_cond, h_uncond, cfg_weight)
    except (ValueError, TypeError) as error:
        text = str(error).replace("h_c", "h_cond").replace("h_u", "h_uncond")
        raise type(error)("cfg_weight" + text[1:] if text.startswith("w is") else text) from None


def _hidden(h_cond: Tensor, logprob: str, h_uncond: Tensor | None, cfg_weight: float | None) -> Tensor:
    """The hidden states whose log-probs are asked for."""
    choice("logprob", logprob, LOGPROBS)
    given = {"h_uncond": h_uncond, "cfg_weight": cfg_weight}
    for name, value in given.items():
        if (value is None) == (logprob == "guided"):
            raise ValueError(f"{name} is {'None' if value is None else 'given'}, but logprob is {logprob!r}")
    return h_cond if h_uncond is None or cfg_weight is None else _combined(h_cond, h_uncond, cfg_weight)


# Rewards, advantages, pairs


def yes_reward(
    p_yes: Tensor,
    p_no: Tensor,
    answered: Tensor | None = None,
    *,
    invalid: Literal["zero", "nan_drop"] = "zero",
) -> Tensor:
    """p_yes / (p_yes + p_no) of a judge's first answer token, [B]: float32 (float64 for float64). Constants.

    p_yes, p_no: [B] probabilities of the two tokens. answered: bool [B], whether the judge said one of the two; None: it always
    did. invalid: what an image gets that was not answered, or whose both probabilities are 0: 0, or NaN with "nan_drop".
    """
    check_tensors(p_yes=p_yes, p_no=p_no)
    choice("invalid", invalid, INVALID_RULES)
    check_rows(len(p_yes), p_yes=p_yes, p_no=p_no, answered=answered)
    if answered is not None and answered.dtype != torch.bool:
        raise TypeError(f"answered has dtype {answered.dtype}; bool is expected")
    yes, no = (p.detach() if p.dtype == torch.float64 else p.detach().float() for p in (p_yes, p_no))
    for name, p in (("p_yes", yes), ("p_no", no)):
        check_values(name, p, (p >= 0) & (p <= 1), "a probability is expected")
    both = yes + no
    valid = both > 0 if answered is None else (both > 0) & answered
    return torch.where(valid, yes / torch.where(valid, both, 1.0), 0.0 if invalid == "zero" else math.nan)


def image_grpo_advantages(
    rewards: Tensor, *, group: int | Tensor, eps: float = 1e-4, nan: Literal["error", "drop"] = "error"
) -> Tensor:
    """A [B] of the sum of F reward functions, [B, F] or [B]: (r - mean) / (std + eps) in the group, std with ddof 1. Constants.

    group: how many images each prompt has, one after the other; or ids [B] int64 or int32, any values in any order. A group of
    one has no std and is an error. A group of equal rewards gets 0. nan: a reward that is NaN is an "error" that names its
    row, or its image is left out with "drop": it gets 0, and a group with fewer than two left as well.

    On CUDA, where values are looked at only under `prefkern.set_validation(True)`, rows in error come out NaN.
    """
    check_tensors(rewards=rewards)
    choice("nan", nan, NAN_RULES)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards has shape {list(rewards.shape)}; [B] or [B, F] is expected")
    ids = _group_ids(group, rewards)
    r = rewards.detach()
    if nan == "drop" and r.dim() == 2:
        r = torch.where(r.isnan().any(1, keepdim=True), math.nan, r)
    advantages = group_advantages(r, ids, eps=eps, ddof=1, nan="error" if nan == "error" else "ignore").advantages
    if isinstance(group, Tensor):
        count = group_reduce(torch.ones_like(advantages), ids, reduce="count")
        if may_look(ids):
            check_values("group", ids, count > 1, "it is the only image of its group, at least two are expected")
        else:
            advantages = torch.where(count > 1, advantages, math.nan)
    return advantages


def _group_ids(group: int | Tensor, rewards: Tensor) -> Tensor:
    """int64 or int32 [B]."""
    rows = len(rewards)
    if isinstance(group, Tensor):
        check_rows(rows, group=group)
        return group
    size = integer("group", group)
    if size < 2:
        raise ValueError(f"group is {size}; at least two images of each prompt are expected")
    if rows % size:
        raise ValueError(f"group is {size}, of which the {rows} rows of rewards are no multiple")
    return torch.arange(rows, device=rewards.device) // size


class ImagePairs(NamedTuple):
    """Of each of M groups, [M] each, in the order of their ids: rows of the flat rewards."""

    chosen: Tensor
    """int64: the best image."""
    rejected: Tensor
    """int64: the worst."""
    keep: Tensor
    """bool: whether they make a pair."""


def pick_pairs(
    rewards: Tensor, group: int | Tensor, *, min_gap: float = 0.0, nan: Literal["error", "drop"] = "error"
) -> ImagePairs:
    """The best over the worst image of each prompt, the first of equals; a pair where best - worst > min_gap.

    rewards: [B], or [B, F], summed in float64. group, nan: as for `image_grpo_advantages`; ids on CUDA cost a synchronisation,
    for the number of groups, and a group with a reward in error makes no pair there. Nor does a group of one, of equals, or
    without a number. min_gap: finite, not negative.
    """
    check_tensors(rewards=rewards)
    choice("nan", nan, NAN_RULES)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards has shape {list(rewards.shape)}; [B] or [B, F] is expected")
    min_gap = number("min_gap", min_gap)
    if not 0 <= min_gap < math.inf:
        raise ValueError(f"min_gap is {min_gap}; it must be finite and not negative")
    ids = _group_ids(group, rewards)
    total = rewards.detach().double()
    known = ~total.isinf() if nan == "drop" else total.isfinite()
    known = known if known.dim() == 1 else known.all(1)
    check_values("rewards", rewards.detach(), known, "finite numbers are expected" + (", or NaN" if nan == "drop" else ""))
    total = total if total.dim() == 1 else total.sum(1)
    if isinstance(group, Tensor):
        found, place = ids.unique(return_inverse=True)
        groups = len(found)
    else:
        place, groups = ids, len(total) // group
    rows = torch.arange(len(total), device=total.device)
    high, low = total, -total
    if nan == "drop":
        high, low = (torch.where(total.isnan(), -math.inf, t) for t in (high, low))
    chosen, best = _first_best(high, place, rows, groups)
    rejected, worst = _first_best(low, place, rows, groups)
    return ImagePairs(chosen, rejected, best + worst > min_gap)


def _first_best(values: Tensor, place: Tensor, rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of each group the first row with the largest value, or with NaN, and that value. Maxima and minima: the same in any
    order."""
    best = values.new_full((groups,), -math.inf).scatter_reduce(0, place, values, "amax")
    candidates = torch.where((values == best[place]) | values.isnan(), rows, len(rows))
    return rows.new_full((groups,), len(rows)).scatter_reduce(0, place, candidates, "amin"), best


# Losses


def image_dpo_loss(
    lp_w: Tensor,
    lp_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    mask_w: Tensor | None = None,
    mask_l: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """DPO of P pairs of images from log-probs of their tokens, summed where the masks count. Gradient to lp_w and lp_l.

    lp_w, ref_w: [P, L], of the winners; lp_l, ref_l: [P, L'] of the losers. Policy and reference are subtracted per token.
    masks: bool, shaped alike, None: every token counts. Show-o masks winner and loser each at random, so that the sums have
    different numbers of tokens. An image without tokens is an error (its pair NaN on CUDA, unless values may be looked at).

    Returns loss and metrics of `prefkern.preference_loss`.
    """
    sums = []
    for side, lp, ref, mask in (("w", lp_w, ref_w, mask_w), ("l", lp_l, ref_l, mask_l)):
        check_tensors(**{f"lp_{side}": lp, f"ref_{side}": ref})
        _check_tokens(f"lp_{side}", lp, **{f"ref_{side}": ref, f"mask_{side}": mask})
        if len(lp) != len(lp_w):
            raise ValueError(f"lp_{side} has {len(lp)} rows; {len(lp_w)} are expected, as lp_w has")
        empty = _nan_if_empty(f"mask_{side}", lp, mask)
        total = sequence_sum(lp, mask, minus=ref)
        sums.append(total if isinstance(empty, float) else total + empty)
    return preference_loss(sums[0], sums[1], beta=beta)


def linear_image_dpo_loss(
    h_cond: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    ref_lp: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    logprob: Literal["conditional", "guided"] = "conditional",
    h_uncond: Tensor | None = None,
    cfg_weight: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """`image_dpo_loss` straight from hidden states by `prefkern.linear_preference_loss`: the head is gone through once.

    h_cond: [2P, L, H], winners first, then losers. weight: [V, H]. bias: [V] or None. ids, ref_lp, mask: [2P, L]; what is
    `ignore_index` does not count either. logprob: "guided" needs h_uncond, shaped like h_cond, and cfg_weight, and ref_lp from
    `cfg_token_logps` of the reference; "conditional" takes neither. Gradients to hidden states, weight and bias.
    """
    check_tensors(h_cond=h_cond, ids=ids, ref_lp=ref_lp)
    hidden = _hidden(h_cond, logprob, h_uncond, cfg_weight)
    _check_tokens("ids", ids, ref_lp=ref_lp, mask=mask)
    counts = _counts(ids, mask, ignore_index)
    empty = _nan_if_empty("mask" if mask is not None else "ids", ids, counts)
    out = linear_preference_loss(
        hidden, weight, ids, mask=counts, ref_logp=ref_lp, bias=bias, temperature=temperature, ignore_index=ignore_index,
        beta=beta, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return out if isinstance(empty, float) else LossOutput(out.loss + empty.sum(), out.metrics)


def image_policy_loss(
    lp: Tensor,
    ref_lp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    beta_kl: float = 0.01,
    normalizer: str | float | Tensor = "token",
) -> LossOutput:
    """GRPO's loss of given advantages [B], from log-probs of B images' tokens [B, L]. Gradient to lp.

    mask: bool [B, L]; without any token it is an error (NaN on CUDA, unless values may be looked at). normalizer: "token": the
    number of tokens that count here; "sequence": the mean over an image's tokens, then over images; or the number to divide
    by, also as a tensor of one element: where gradients are averaged over R processes, the tokens of all divided by R.

    Returns loss and metrics of `prefkern.policy_loss`; `kl` is the mean of k3.
    """
    check_tensors(lp=lp, ref_lp=ref_lp, advantages=advantages)
    _check_tokens("lp", lp, ref_lp=ref_lp, mask=mask)
    check_rows(len(lp), advantages=advantages)
    agg, norm = _aggregation(normalizer)
    empty = _nan_if_all_empty("mask", lp, mask)
    out = policy_loss(lp, lp.detach(), advantages, mask, ref_logp=ref_lp, beta=beta_kl, kl="k3", agg=agg, norm=norm)
    return out if isinstance(empty, float) else LossOutput(out.loss + empty, out.metrics)


def image_grpo_loss(
    lp: Tensor,
    ref_lp: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    group: int | Tensor,
    beta_kl: float = 0.01,
    normalizer: str | float | Tensor = "token",
    eps: float = 1e-4,
    nan: Literal["error", "drop"] = "error",
) -> LossOutput:
    """`image_policy_loss` with the `image_grpo_advantages` of rewards [B] or [B, F]. Gradient to lp [B, L].

    nan: with "drop" an image without a reward leaves the loss: its tokens do not count.
    """
    check_tensors(lp=lp, ref_lp=ref_lp, rewards=rewards)
    _check_tokens("lp", lp, ref_lp=ref_lp, mask=mask)
    if len(rewards) != len(lp):
        raise ValueError(f"rewards has {len(rewards)} rows; {len(lp)} are expected, as lp has")
    advantages = image_grpo_advantages(rewards, group=group, eps=eps, nan=nan)
    mask = _without_dropped(lp, mask, rewards, nan)
    return image_policy_loss(lp, ref_lp, advantages, mask, beta_kl=beta_kl, normalizer=normalizer)


def linear_image_grpo_loss(
    h_cond: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    ref_lp: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    group: int | Tensor,
    beta_kl: float = 0.01,
    normalizer: str | float | Tensor = "token",
    eps: float = 1e-4,
    nan: Literal["error", "drop"] = "error",
    logprob: Literal["conditional", "guided"] = "conditional",
    h_uncond: Tensor | None = None,
    cfg_weight: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """`image_grpo_loss` straight from hidden states [B, L, H] by `prefkern.linear_policy_loss`: the head is gone through once.

    ids, ref_lp, mask: [B, L]; what is `ignore_index` does not count either. The rest as for `linear_image_dpo_loss`.
    """
    check_tensors(h_cond=h_cond, ids=ids, ref_lp=ref_lp, rewards=rewards)
    hidden = _hidden(h_cond, logprob, h_uncond, cfg_weight)
    _check_tokens("ids", ids, ref_lp=ref_lp, mask=mask)
    if len(rewards) != len(ids):
        raise ValueError(f"rewards has {len(rewards)} rows; {len(ids)} are expected, as ids has")
    advantages = image_grpo_advantages(rewards, group=group, eps=eps, nan=nan)
    counts = _without_dropped(ids, _counts(ids, mask, ignore_index), rewards, nan)
    agg, norm = _aggregation(normalizer)
    empty = _nan_if_all_empty("mask" if mask is not None else "ids", ids, counts)
    out = linear_policy_loss(
        hidden, weight, ids, None, advantages, counts, bias=bias, temperature=temperature, ignore_index=ignore_index,
        ref_logp=ref_lp, beta=beta_kl, kl="k3", agg=agg, norm=norm, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return out if isinstance(empty, float) else LossOutput(out.loss + empty, out.metrics)


def _aggregation(normalizer: str | float | Tensor) -> tuple[Aggregation, float | Tensor | None]:
    if isinstance(normalizer, str):
        choice("normalizer", normalizer, NORMALIZERS)
        return ("token-mean" if normalizer == "token" else "seq-mean-token-mean"), None
    if isinstance(normalizer, Tensor):
        return "token-mean", normalizer
    tokens = number("normalizer", normalizer, "'token', 'sequence', a number or a torch.Tensor")
    if not 0 < tokens < math.inf:
        raise ValueError(f"normalizer is {tokens}; a number of tokens must be finite and positive")
    return "token-mean", tokens


def _check_tokens(name: str, tokens: Tensor, **others: Tensor | None) -> None:
    """ValueError unless `tokens` is [B, L] and all others are shaped like it."""
    if tokens.dim() != 2:
        raise ValueError(f"{name} has shape {list(tokens.shape)}; [B, L] is expected")
    for other, t in others.items():
        if t is not None and t.shape != tokens.shape:
            raise ValueError(f"{other} has shape {list(t.shape)}; {list(tokens.shape)} is expected, as {name}")
        if t is not None and other.startswith("mask") and t.dtype != torch.bool:
            raise TypeError(f"{other} has dtype {t.dtype}; bool is expected")


def _counts(ids: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    counts = ids != integer("ignore_index", ignore_index)
    return counts if mask is None else counts & mask


def _without_dropped(like: Tensor, mask: Tensor | None, rewards: Tensor, nan: str) -> Tensor | None:
    """The mask without the images that have no reward."""
    if nan == "error":
        return mask
    there = ~rewards.detach().isnan()
    there = there if there.dim() == 1 else there.all(1)
    return there[:, None].expand(like.shape) if mask is None else mask & there[:, None]


def _nan_if_empty(name: str, tokens: Tensor, mask: Tensor | None) -> Tensor | float:
    """ValueError that names the first image without tokens; where values may not be looked at, NaN for it and 0 for others."""
    full = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    some = full.any(1)
    if not may_look(some):
        return torch.where(some, 0.0, math.nan)
    if not bool(some.all()):
        raise ValueError(f"{name}[{int((~some).nonzero()[0, 0])}] counts no token; each image must have one at least")
    return 0.0


def _nan_if_all_empty(name: str, tokens: Tensor, mask: Tensor | None) -> Tensor | float:
    """The same for all images together."""
    some = (torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask).any()
    if not may_look(some):
        return torch.where(some, 0.0, math.nan)
    if not bool(some):
        raise ValueError(f"{name} counts no token; at least one is expected")
    return 0.0
