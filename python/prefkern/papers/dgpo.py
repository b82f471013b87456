r"""DGPO (difficulty-aware, MathForge): updates of equal size for easy and hard questions, then tilted to the hard ones.

"Harder Is Better: Boosting Mathematical Reasoning via Difficulty-Aware GRPO and Multi-Aspect Question Reformulation",
arXiv:2601.20614. Other papers are called DGPO too (decoupled gradient policy optimisation, arXiv:2603.14389); they are
unrelated.
Evidence: code. Advantages, weights, rescaling and their composition were checked against the authors' release to 1e-12.

For question s with G completions, total rewards R, main rewards M (accuracy: the first reward function) and token counts n:

.. math::
    A_{si} = \frac{G\,d_{si}}{\sum_j |d_{sj}| + 10^{-4}}, \qquad d_{si} = R_{si} - \mathrm{mean}_j R_{sj}

the mean absolute deviation about the mean instead of the std, so that :math:`\sum_i |A_{si}| = G` whatever the difficulty
(GRPO: about :math:`2 G \sqrt{p(1-p)}` for 0/1 rewards). Questions V whose rewards differ are valid; over them

.. math::
    \lambda_s = |V| \frac{e^{-\bar M_s / T}}{\sum_{s' \in V} e^{-\bar M_{s'} / T}}, \qquad
    \tau = \frac{\sum_{\text{all}} n}{\sum_{\text{valid}} n}, \qquad \hat A_{si} = \tau \lambda_s A_{si}

and :math:`\hat A` goes into the clipped loss, a mean over tokens; tau makes that the mean over tokens of valid questions.
All is constant.

Where paper and release differ, the release is the default: difficulty by the main reward alone (the paper: the total; the
same for one reward); a valid question of accuracy 0, mixed only through other rewards, counts as the *easiest*
(`zero_accuracy_as_easy=False`: as the hardest); 1e-4 added to the sum of deviations. The release calls a question valid by
a std above 1e-8, which rounding can fake; here the rewards must differ by more than 1e-8.

The questions are those of the whole batch: over several ranks, gather rewards and lengths first. The release then scales
each rank by world n_local / n_global for its local token mean; `policy_loss(norm=n_global / world)` is the same. Constant
groups and groups of one get 0; groups of unequal size use their own G [inferred]. T 2, clip 0.2, no KL.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import group_advantages, question_weights
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_finite

about = About(
    name="DGPO",
    title=(
        "Harder Is Better: Boosting Mathematical Reasoning via Difficulty-Aware GRPO and Multi-Aspect Question Reformulation"
    ),
    arxiv="2601.20614",
    year=2026,
    family="advantage, weight",
    evidence="code",
    note="the authors' release, to 1e-12",
)


def dgpo_advantages(
    rewards: Tensor,
    lengths: Tensor | None,
    group: Tensor,
    *,
    main_rewards: Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    temperature: float = 2.0,
    eps: float = 1e-4,
    scale: bool = True,
    dqw: bool = True,
    token_rescale: bool = True,
    zero_accuracy_as_easy: bool = True,
) -> Tensor:
    """Advantages [B] of rewards [B], or [B, K] summed with `weights` [K], in groups given by id [B]. Constants.

    NaN among several rewards of a completion is left out of its sum.

    Args:
        lengths: [B] token counts; may be None without `token_rescale`.
        main_rewards: [B], what difficulty is judged by; None: the first column of rewards. NaN: ValueError.
        temperature: T of the weights.
        scale: False leaves out the division by the mean absolute deviation.
        dqw: False leaves out the difficulty weights lambda.
        token_rescale: False leaves out tau.
    """
    if token_rescale and lengths is None:
        raise ValueError("lengths is None; [B] is expected with token_rescale")
    main = (rewards[:, 0] if rewards.dim() == 2 else rewards) if main_rewards is None else main_rewards
    check_finite("main_rewards", main)
    total = _total(rewards, weights)
    a = group_advantages(total, group, estimator="mad" if scale else "dr_grpo", eps=eps).advantages
    if not (dqw or token_rescale):
        return a
    questions = question_weights(
        total, group, lengths=lengths if token_rescale else None, main_rewards=main, temperature=temperature,
        zero_accuracy_as_easy=zero_accuracy_as_easy,
    )  # fmt: skip
    a = a * questions.weights if dqw else a
    return a * questions.scale if token_rescale else a


def _total(rewards: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """The weighted sum of the rewards of a completion that there are, [B]."""
    if rewards.dim() == 1:
        rewards = rewards[:, None]
    r = rewards.detach()
    r = torch.where(r.isnan(), 0.0, r if r.dtype == torch.float64 else r.float())
    if weights is None:
        return r.sum(1)
    w = torch.as_tensor(weights, dtype=r.dtype, device=r.device)
    if w.shape != (r.shape[1],):
        raise ValueError(f"weights is {list(w.shape)}; [{r.shape[1]}] is expected, one per reward")
    return (r * w).sum(1)


@dataclass(frozen=True)
class DGPO(Recipe):
    """Balanced advantages, difficulty weights; the clipped loss, or the plain policy gradient."""

    name: ClassVar[str] = "dgpo"
    weights: tuple[float, ...] | None = None
    temperature: float = 2.0
    eps: float = 1e-4
    scale: bool = True
    dqw: bool = True
    token_rescale: bool = True
    zero_accuracy_as_easy: bool = True
    gpg: bool = False
    """-A logp instead of the clipped loss."""
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return dgpo_advantages(
            rollout.rewards, rollout.token_counts() if self.token_rescale else None, rollout.group,
            main_rewards=rollout.get("main_rewards"), weights=self.weights, temperature=self.temperature, eps=self.eps,
            scale=self.scale, dqw=self.dqw, token_rescale=self.token_rescale, zero_accuracy_as_easy=self.zero_accuracy_as_easy,
        )  # fmt: skip

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options = {"kind": "reinforce" if self.gpg else "clip", "eps_low": self.eps_low, "eps_high": self.eps_high}
        return {**options, "beta": self.beta, "agg": self.agg}


recipe = DGPO()
