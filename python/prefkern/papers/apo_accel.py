r"""APO, Accelerated Preference Optimization: Nesterov momentum between the iterations of any preference loss.

He, Yuan and Gu, "Accelerated Preference Optimization for Large Language Model Alignment", arXiv:2410.06293. (Not Anchored
Preference Optimization, whose losses trainers know as `apo_zero` and `apo_down`.)
Evidence: paper. Equations from knowledge of the paper, in agreement with its abstract, its rate and reviews; the full text
could not be read, and no code was released.

From :math:`\pi_0 = \hat\pi_0 = \pi_\mathrm{ref}`, each iteration trains with the extrapolated policy as reference, and then
extrapolates:

.. math::
    \pi_{t+1} &\propto \hat\pi_t\, e^{r_t / \beta} \quad\text{(the optimum of a pair loss with reference } \hat\pi_t\text{)} \\
    \hat\pi_{t+1} &\propto \pi_{t+1}\, (\pi_{t+1} / \pi_t)^\alpha

:math:`\hat\pi_t` both samples the data and is the reference, a constant; it is not :math:`\pi_t`. With DPO as the loss
(:func:`apo_dpo_loss`) and :math:`\alpha = 0` this is iterated DPO. For a fixed reward :math:`\log\pi_t = \log\pi_0 + c_t r /
\beta + \text{const}` with steps :math:`c_{t+1} - c_t = 1 + \alpha + \dots + \alpha^t`, so that much of the gain is that of a
larger effective step, :math:`\beta (1 - \alpha)`: compare with that.

:func:`extrapolate` does it in one of three spaces. `"params"`, what the paper does with language models, moves weights
(:func:`prefkern.optim.nesterov_extrapolate`) and is exact for policies that are linear in them. `"policy"` is the definition,
for finitely many responses. `"logits"` (inferred) mixes the logits of two models token by token, as for decoding, which is
not the same for whole sequences.

Defaults: alpha 0.3, recalled and not verified, and beta 0.1, DPO's. The paper runs three iterations. Where both policies give a
response probability 0, so does the result; where only one does, it is a ValueError (on CUDA NaN).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..optim import nesterov_extrapolate
from ._about import About
from ._shared import may_look

__all__ = ["about", "apo_dpo_loss", "apo_tabular", "extrapolate", "extrapolate_logits", "extrapolate_policy"]

about = About(
    name="APO",
    title="Accelerated Preference Optimization for Large Language Model Alignment",
    arxiv="2410.06293",
    year=2024,
    family="outer loop",
    evidence="paper",
    note="recalled; agrees with its abstract and rate",
)

SPACES = ("params", "logits", "policy")


def apo_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    anchor_chosen_logp: Tensor,
    anchor_rejected_logp: Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """DPO's loss [P] with the extrapolated policy, not the last one, as reference. Gradient to the first two.

    Sums over tokens. Metrics: those of :func:`prefkern.preference_loss`.
    """
    return preference_loss(chosen_logp, rejected_logp, anchor_chosen_logp, anchor_rejected_logp, beta=beta)


def extrapolate(
    new: Any, old: Any, *, alpha: float = 0.3, space: Literal["params", "logits", "policy"] = "params", **options: Any
) -> Any:
    """The extrapolated policy, from the two last ones.

    "params": :func:`prefkern.optim.nesterov_extrapolate`, which takes the options. "logits": :func:`extrapolate_logits`.
    "policy": :func:`extrapolate_policy`.
    """
    choice("space", space, SPACES)
    if space == "params":
        return nesterov_extrapolate(new, old, alpha, **options)
    if options:
        raise ValueError(f"{next(iter(options))} is given but space is {space!r}; options are of space 'params'")
    return (extrapolate_logits if space == "logits" else extrapolate_policy)(new, old, alpha)


def extrapolate_policy(new_logp: Tensor, old_logp: Tensor, alpha: float = 0.3) -> Tensor:
    """log-probs [..., n] of the extrapolated policy over n responses; normalised. Inputs need not be."""
    return torch.log_softmax(_beyond(new_logp, old_logp, alpha, "new_logp", "old_logp"), -1)


def extrapolate_logits(new_logits: Tensor, old_logits: Tensor, alpha: float = 0.3) -> Tensor:
    """(1 + alpha) new - alpha old, of any shape: the logits to decode with; each token is normalised by itself."""
    return _beyond(new_logits, old_logits, alpha, "new_logits", "old_logits")


def apo_tabular(logpi0: Tensor, reward: Tensor, *, beta: float, alpha: float, steps: int) -> tuple[Tensor, Tensor]:
    """Exact iterations for a fixed reward: log-probs of pi_t and of its extrapolation, [steps + 1, ..., n] each, from t = 0.

    logpi0: [..., n], normalised or not. reward: [..., n].
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must not be negative")
    policies = [torch.log_softmax(logpi0, -1)]
    extrapolated = [policies[0]]
    for _ in range(steps):
        policies.append(torch.log_softmax(extrapolated[-1] + reward / beta, -1))
        extrapolated.append(extrapolate_policy(policies[-1], policies[-2], alpha))
    return torch.stack(policies), torch.stack(extrapolated)


def _beyond(new: Tensor, old: Tensor, alpha: float, new_name: str, old_name: str) -> Tensor:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; a number in [0, 1) is expected")
    if new.shape != old.shape:
        raise ValueError(f"{old_name} has shape {list(old.shape)}; {list(new.shape)} is expected, as {new_name} has")
    lost, before = new.isneginf(), old.isneginf()
    if may_look(new, old) and bool((lost != before).any()):
        place = (lost != before).nonzero()[0].tolist()
        only = new_name if bool(lost[tuple(place)]) else old_name
        raise ValueError(f"{only}{place} is -inf; where one of the two is, the other must be")
    moved = new + alpha * (new - old)
    return torch.where(lost & before, new, torch.where(lost | before, torch.nan, moved))
