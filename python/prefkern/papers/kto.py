r"""KTO: single responses, judged desirable or not, and a loss that saturates both ways about a reference point.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306.
Evidence: code. Values and gradients were checked against Liger-Kernel's loss; TRL's trainer was read.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`, and :math:`\hat z` (`kl`):

.. math::
    L = \begin{cases}
        w_D\,(1 - \sigma(\beta (x - \hat z))) & \text{desirable} \\
        w_U\,(1 - \sigma(\beta (\hat z - x))) & \text{undesirable}
    \end{cases}

averaged over responses. The reference point estimates the divergence from the reference,

.. math:: \hat z = \max\Bigl(0,\ \frac{1}{B} \sum_i x(y_{i-1} \mid \text{prompt}_i)\Bigr)

from mismatched pairs: TRL's batch of B gives every prompt the response of the one before (`kto_mismatched`), which takes a
second pass through both models, and takes the mean over ranks before the bound at 0 (`all_reduce`). It is a constant; a batch
with one class alone uses it all the same. One below 0, given by hand, counts as 0.

Where libraries differ: Liger has no weights and divides by the batch; TRL's mean leaves out NaN and so hides it, here a NaN
makes the loss NaN, or an error under `prefkern.set_validation(True)`. TRL's `apo_zero_unpaired` is this with kl = 0.

From pairs, every chosen response is desirable and every rejected one is not. The recipe takes the reference point from
`extra["kl"]`, and without it 0.

Defaults of TRL: beta 0.1, both weights 1. The paper's guide: :math:`w_D n_D / (w_U n_U)` between 1 and 4/3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput, unpaired_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_finite, check_rows

about = About(
    name="KTO",
    title="KTO: Model Alignment as Prospect Theoretic Optimization",
    arxiv="2402.01306",
    year=2024,
    family="unpaired",
    evidence="code",
    note="Liger-Kernel; TRL's trainer was read",
)


def kto_mismatched(responses: Tensor) -> Tensor:
    """Rows [B, ...] given to the prompt after theirs, the last to the first: what `kto_kl` wants the log-ratios of."""
    if responses.dim() == 0 or len(responses) < 2:
        raise ValueError(f"responses has shape {list(responses.shape)}; at least two rows can be mismatched")
    return responses.roll(1, 0)


def kto_kl(logp: Tensor, ref_logp: Tensor | None = None, *, all_reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The reference point, a constant of one element: the mean of `logp` [B] less `ref_logp` [B], both summed over the tokens
    of mismatched responses, and not below 0.

    all_reduce: given the mean of this rank, returns that over all ranks; the bound at 0 comes after it.
    """
    check_rows(len(logp), logp=logp, ref_logp=ref_logp)
    if len(logp) == 0:
        raise ValueError("logp has no rows; the mean of at least one mismatched response is expected")
    ratios = (logp if ref_logp is None else logp - ref_logp).detach()
    check_finite("logp" if ref_logp is None else "logp - ref_logp", ratios)
    mean = ratios.mean()
    return (mean if all_reduce is None else all_reduce(mean).detach()).clamp_min(0)


def kto_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of N responses, from log-probs summed over each, [N], and bool `desirable` [N]. Gradient to logp.

    kl: a number or a tensor of one element (`kto_kl`), a constant. Metrics: those of `prefkern.unpaired_loss`, and kl.
    """
    out = unpaired_loss(
        logp, ref_logp, desirable, kind="kto", beta=beta, kl=kl, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight, mask=mask, reduction=reduction,
    )  # fmt: skip
    used = kl.detach() if isinstance(kl, Tensor) else out.metrics["pairs"].new_tensor(kl)
    return LossOutput(out.loss, {**out.metrics, "kl": used.clamp_min(0).mean()})


@dataclass(frozen=True)
class KTO(PairRecipe):
    """Chosen responses desirable, rejected ones undesirable; the reference point is `extra["kl"]`, or 0."""

    name: ClassVar[str] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        ratios = torch.cat(pairs.log_ratios())
        desirable = torch.arange(len(ratios), device=ratios.device) < len(pairs)
        kl = pairs.get("kl")
        out = kto_loss(ratios, None, desirable, kl=0.0 if kl is None else kl, **self.options())
        return LossOutput(out.loss, {**out.metrics, "pairs": out.metrics["pairs"] / 2})  # not responses


recipe = KTO()
