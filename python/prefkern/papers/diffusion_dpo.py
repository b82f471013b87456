r"""Diffusion-DPO: the preference loss that methods for diffusion models vary.

Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv:2311.12908.
Evidence: code. The authors' training script, values and gradients.

The winner and the loser are noised to the same timestep with the same noise, and with mean squared errors m of the predicted
noise, r those of the frozen reference,

.. math:: L = -\log\sigma\bigl(-\tfrac12 \beta [(m_w - m_l) - (r_w - r_l)]\bigr)

averaged over pairs: :func:`prefkern.diffusion_pref_loss`. Means over the elements of a latent, not sums, are what beta
multiplies, so that it is in the thousands. The half is in the code; scripts without it have the same loss at half the beta.

With policy and reference equal the loss is log 2 and the gradient not 0. Default: beta 5000, the code's (the paper tried 2000
to 5000).
"""

from __future__ import annotations

from torch import Tensor

from ..ops import LossOutput, diffusion_pref_loss
from ..ops.diffusion import Reduction
from ._about import About

about = About(
    name="Diffusion-DPO",
    title="Diffusion Model Alignment Using Direct Preference Optimization",
    arxiv="2311.12908",
    year=2023,
    family="diffusion, pairwise",
    evidence="code",
    note="the authors' training script",
)


def diffusion_dpo_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    beta: float = 5000.0,
    half: bool = True,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of B pairs, from predictions [B, ...] and the noise that both sides share. Gradient to pred_w and pred_l.

    The reference: ref_w and ref_l [B, ...], or its errors ref_mse_w and ref_mse_l [B], as from `prefkern.diffusion_mse`.
    Arguments and metrics are those of `prefkern.diffusion_pref_loss`; `prefkern.diffusion_pref_loss_stacked` takes batches with
    the winners in the first half.
    """
    return diffusion_pref_loss(
        pred_w, pred_l, target, ref_mse_w, ref_mse_l, ref_w=ref_w, ref_l=ref_l, beta=beta, half=half, weight=weight,
        reduction=reduction,
    )  # fmt: skip
