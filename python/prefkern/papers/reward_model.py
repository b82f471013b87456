r"""The Bradley-Terry loss of a reward model, with a margin per pair and a pull of rewards towards 0.

The loss: Ouyang et al., "Training language models to follow instructions with human feedback", arXiv:2203.02155; margin:
Touvron et al., "Llama 2", arXiv:2307.09288; centring: Eisenstein et al., "Helping or Herding?", arXiv:2312.09244.
Evidence: code. Values and gradients were checked against OpenRLHF; TRL's reward trainer was read.

With rewards r of the two responses, the margin m and the centring c:

.. math:: L = -\log\sigma(r_w - r_l - m) + c\,(r_w + r_l)^2

averaged over pairs. The margin is a constant.

OpenRLHF's `LogExpLoss`, :math:`\log(1 + e^{r_l - r_w})`, has the same value with m = 0, overflows for large gaps and ignores
its
margin: it is this function.

Defaults of both: no margin, no centring (TRL's `center_rewards_coefficient`; 0.01 is what it suggests).
"""

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About

about = About(
    name="Bradley-Terry reward model",
    title="Training language models to follow instructions with human feedback",
    arxiv="2203.02155",
    year=2022,
    family="reward model",
    evidence="code",
    note="OpenRLHF; TRL was read",
)


def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor = 0.0,
    centering: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs from the rewards of their responses, [P] each. Gradient to both.

    margin, label_smoothing: a number, or [P] constants. weight: [P] constants, of the first term alone. Metrics: those of
    `prefkern.preference_loss`, and centering where it is not 0: the mean of :math:`(r_w + r_l)^2`.
    """
    if centering < 0:
        raise ValueError(f"centering is {centering}; it must not be negative")
    out = preference_loss(
        chosen_rewards, rejected_rewards, beta=1.0, offset=margin, label_smoothing=label_smoothing, weight=weight,
        reduction=reduction,
    )  # fmt: skip
    if centering == 0:
        return out
    squares = (chosen_rewards + rejected_rewards).square().to(out.loss.dtype)
    mean = squares.sum() / max(len(squares), 1)
    term = {"none": squares, "sum": squares.sum()}.get(reduction, mean)
    return LossOutput(out.loss + centering * term, {**out.metrics, "centering": mean.detach()})
