r"""BideDPO: separate pairs for the prompt and for the structural condition, balanced by their own losses.

"BideDPO: Conditional Image Generation with Simultaneous Text and Condition Alignment", arXiv:2511.19268 (ICLR 2026).
Evidence: part. There is no released code. The formulas come from a public note of the paper; that weights are taken of the
losses of a mini-batch, from a later paper that applies them. The score of an image is inferred: the one of Diffusion-DPO.

Every sample has a pair of which only the first image obeys the prompt, both the condition, and one whose first image obeys the
condition better, both the prompt. With gaps h of implicit scores,

.. math::
    L_\mathrm{text} = -\log\sigma(h_\mathrm{text}), \qquad L_\mathrm{cond} = -\log\sigma(h_\mathrm{cond}), \qquad
    h = -k \beta [(m_+ - r_+) - (m_- - r_-)]

from :func:`bidedpo_gap`, and a detached balance (:func:`alb_weights`):

.. math::
    w_\mathrm{text} = \frac{L_\mathrm{text}}{L_\mathrm{text} + L_\mathrm{cond}}, \qquad
    L = w_\mathrm{text} L_\mathrm{text} + (1 - w_\mathrm{text}) L_\mathrm{cond}

Why separate: one pair whose score is the sum of both has one factor :math:`\sigma(-h)` for both gradients, so that a large gap
of one constraint takes away the gradient of the other.

What is not known: beta and k (`half`), the numbers of a run, whether weights are per mini-batch (`balance="batch"`, as a citing
paper has it) or per sample (`"sample"`), and what their ablation without a balance weighs; `"off"` is 1/2 each here, so that
gradients keep their scale.

In data-parallel training weights must be those of all ranks, or each pursues an objective of its own: `group`.
The balance knows nothing of images: :func:`bidedpo_loss` takes gaps of language models as well.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ..ops import BalancedLoss, alb_combine, diffusion_margin
from ..ops._arguments import check_tensors
from ..ops.diffusion import _balanced
from ._about import About

__all__ = ["about", "alb_combine", "alb_weights", "bidedpo_gap", "bidedpo_loss"]

about = About(
    name="BideDPO",
    title="BideDPO: Conditional Image Generation with Simultaneous Text and Condition Alignment",
    arxiv="2511.19268",
    year=2025,
    family="diffusion, pairwise",
    evidence="part",
    note="losses and balance from notes and a citing paper; the score of an image is inferred; nothing to compare with",
)


def bidedpo_gap(
    pred_pos: Tensor,
    pred_neg: Tensor,
    target_pos: Tensor,
    target_neg: Tensor | None = None,
    ref_mse_pos: Tensor | None = None,
    ref_mse_neg: Tensor | None = None,
    *,
    ref_pos: Tensor | None = None,
    ref_neg: Tensor | None = None,
    beta: float,
    half: bool = True,
) -> Tensor:
    """The gap of implicit scores of P pairs, [P], from predictions [P, ...] and their targets: noise, or for flow matching
    noise minus clean latents. Gradient to both predictions. It is `prefkern.diffusion_margin`."""
    return diffusion_margin(
        pred_pos, pred_neg, target_pos, ref_mse_pos, ref_mse_neg, ref_w=ref_pos, ref_l=ref_neg, target_l=target_neg, beta=beta,
        half=half,
    )  # fmt: skip


def alb_weights(losses: Tensor) -> Tensor:
    """[..., K] losses, not negative, as shares of their sum; 1/K each if all are 0. Constants.

    ValueError for losses that are negative or not finite, on the CPU; on CUDA NaN in one makes all of its row NaN.
    """
    check_tensors(losses=losses)
    if losses.dim() == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses has shape {list(losses.shape)}; [..., K] is expected, K at least 1")
    return _balanced(losses.detach())


def bidedpo_loss(
    gap_text: Tensor,
    gap_cond: Tensor,
    *,
    balance: Literal["batch", "sample", "off"] = "batch",
    group: Any = None,
    allow_missing: bool = False,
) -> BalancedLoss:
    """The balanced loss of the gaps of text pairs [P] and condition pairs [Q], beta included. Gradient to both.

    balance: "batch": weights [2] of the mean losses; "sample": weights [P, 2] of each sample's own, Q = P, and the mean over
    samples; "off": 1/2 each.
    group: of "batch": the ranks whose losses the weights are taken of, "world", a process group of `torch.distributed`, or
    None. One all-reduce of four numbers, sums and counts. The loss is this rank's.
    allow_missing: a side may have no pairs, and the weight of the other is then 1; otherwise an error.

    Returns BalancedLoss(loss, weights), text first. NaN in a gap is a ValueError on the CPU; on CUDA all is NaN.
    """
    check_tensors(gap_text=gap_text, gap_cond=gap_cond)
    choice("balance", balance, ("batch", "sample", "off"))
    if group is not None and balance != "batch":
        raise ValueError(f"group is given but balance is {balance!r}; only the weights of 'batch' are those of all ranks")
    for name, gap in (("gap_text", gap_text), ("gap_cond", gap_cond)):
        if gap.dim() != 1:
            raise ValueError(f"{name} has shape {list(gap.shape)}; [P] is expected")
        if not gap.is_floating_point():
            raise TypeError(f"{name} has dtype {str(gap.dtype)[6:]}; a floating type is expected")
        if len(gap) == 0 and not allow_missing:
            raise ValueError(f"{name} has no pairs: empty objective; with allow_missing=True the weight of the other is 1")
    dtype = torch.promote_types(torch.promote_types(gap_text.dtype, gap_cond.dtype), torch.float32)
    text, cond = (-F.logsigmoid(gap.to(dtype)) for gap in (gap_text, gap_cond))
    if balance == "sample":
        if len(text) != len(cond):
            raise ValueError(
                f"gap_text and gap_cond have {len(text)} and {len(cond)} pairs; balance 'sample' takes equally many"
            )
        if len(text) == 0:
            raise ValueError("gap_text and gap_cond have no pairs: empty objective")
        each = torch.stack([text, cond], 1)
        weights = _balanced(each.detach())
        return BalancedLoss((weights * each).sum(1).mean(), weights)
    counts = torch.tensor([len(text), len(cond)], dtype=torch.float64, device=text.device)
    sums = torch.stack([text.sum(), cond.sum()])
    means = sums / counts.clamp_min(1).to(dtype)
    if group is None and len(text) + len(cond) == 0:
        raise ValueError("gap_text and gap_cond have no pairs: empty objective")
    of, present = means.detach(), counts > 0
    if group is not None:
        from ..distributed import packed_sum

        totals, pairs = packed_sum(sums.detach(), counts, process_group=group)
        of, present = (totals / pairs.clamp_min(1)).to(dtype), pairs > 0
    weights = _balanced(of) if balance == "batch" else torch.full_like(of, 0.5)
    # A side without pairs has loss 0 and so weight 0, but where the other's is 0 too.
    weights = torch.where(present.all(), weights, present.to(dtype))
    return BalancedLoss((weights * means).sum(), weights)
