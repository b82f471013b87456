r"""MPO, Mixed Preference Optimization: DPO on easy pairs, then PPO on the prompts of hard ones, with DPO's result as reference.

Gou and Nguyen, "Mixed Preference Optimization: Reinforcement Learning with Data Selection and Better Reference Model",
arXiv:2403.19443. (Not the MPO of InternVL, arXiv:2411.10442, which adds up three losses; trainers that speak of MPO mean that.)
Evidence: paper. From its abstracts and what others report of it; no code was released, and the text could not be read in full.

With the gap :math:`g = r(y_w) - r(y_l)` of a reward model and a threshold :math:`\gamma`, pairs are easy if
:math:`|g| > \gamma`, and hard if not (:func:`prefkern.data.split_by_reward_gap`).

.. math::
    \text{1: } L = -\log\sigma\bigl(\beta_1 [h(y_w) - h(y_l)]\bigr) \text{ on easy pairs}, \quad
    h = \log\pi - \log\pi_\mathrm{SFT}

.. math::
    \text{2: } r_t = s\,[t = \text{last}] - \beta_2 (\log\pi_{\mathrm{old},t} - \log\pi_{\mathrm{DPO},t})
    \text{ on prompts of hard pairs, by PPO}

Stage 2 starts from, and is held near, the result of stage 1. Its rewards of tokens (inferred: the standard of RLHF) are
constants; they are :func:`prefkern.papers.ppo.token_rewards`, and the rest is :mod:`prefkern.papers.ppo`. At its start the KL
is exactly 0.

The paper's thresholds depend on the data, so gamma has no default: name it, or the share of easy pairs. Both betas are not
known; 0.1 is DPO's. With `mode="abs"`, which the abstract suggests, a pair that is labelled wrongly with a large gap is easy
and keeps its label: `contradicted` counts these. `mode="signed"` (inferred) sets them apart as noisy: dropped, or, given as
`swapped`, trained the other way round.

A gap of exactly gamma is hard. A NaN or infinite reward puts the pair in no part. Without easy pairs stage 1 does nothing,
with a warning; with gamma infinite all is PPO from SFT, with gamma below every gap all is DPO. A completion without tokens
gets no reward, and its score is lost, with a warning."""

import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..data import split_by_reward_gap
from ..ops import LossOutput, preference_loss, sequence_sum
from ._about import About
from ._shared import check_rows, check_values, may_look
from .ppo import token_rewards

__all__ = ["about", "hard_prompts", "kl_shaped_rewards", "mpo_dpo_loss", "split_by_reward_gap"]

about = About(
    name="MPO",
    title="Mixed Preference Optimization: Reinforcement Learning with Data Selection and Better Reference Model",
    arxiv="2403.19443",
    year=2024,
    family="selection, two stages",
    evidence="paper",
    note="its abstracts and reports of others",
)

_Prompt = TypeVar("_Prompt", bound=Hashable)


def mpo_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    easy: Tensor | None = None,
    swapped: Tensor | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """Stage 1: DPO's loss, mean over the pairs that are easy. Gradient to chosen_logp and rejected_logp.

    chosen_logp to ref_rejected_logp: [P], sums over tokens; of the reference, SFT. easy: bool [P]; None: all. swapped:
    bool [P], noisy pairs to be trained with their sides exchanged, besides the easy ones; None: none.

    Metrics: those of :func:`prefkern.preference_loss`; by the labels as they are, also where swapped.
    """
    check_rows(len(chosen_logp), easy=easy, swapped=swapped)
    mask, smoothing = easy, 0.0 if swapped is None else swapped.to(chosen_logp.dtype)
    if easy is not None and swapped is not None:
        check_values("easy", easy, ~(easy & swapped), "a pair is easy or swapped, not both")
        mask = easy | swapped
    if mask is not None and may_look(mask) and not bool(mask.any()):
        warnings.warn("no pair is easy: stage 1 leaves the policy as it is", stacklevel=2)
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, mask=mask, label_smoothing=smoothing
    )


def hard_prompts(hard: Tensor | Sequence[bool], prompts: Iterable[_Prompt]) -> list[_Prompt]:
    """The prompts that stage 2 samples for: of the hard pairs [P], each once, in the order they first appear."""
    flags, given = [bool(flag) for flag in hard], list(prompts)
    if len(flags) != len(given):
        raise ValueError(f"prompts has {len(given)} entries; {len(flags)} are expected, one per pair")
    found = list(dict.fromkeys(prompt for flag, prompt in zip(flags, given, strict=True) if flag))
    if not found:
        warnings.warn("no pair is hard: stop after stage 1", stacklevel=2)
    return found


def kl_shaped_rewards(
    old_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Stage 2: rewards of tokens, like old_logp: the score at a completion's last token, less beta times each log-ratio.

    old_logp, ref_logp: of the policy that sampled and of the result of stage 1; [B, T] with a bool mask, or packed [N] with
    cu_seqlens. rewards: [B]. 0 outside the mask. Constants.
    """
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; it must not be negative")
    check_rows(len(old_logp) if cu_seqlens is None else len(cu_seqlens) - 1, rewards=rewards)
    if may_look(old_logp):
        lengths = sequence_sum(torch.ones_like(old_logp), mask, cu_seqlens=cu_seqlens)
        if not bool(lengths.all()):
            empty = int((lengths == 0).nonzero()[0])
            warnings.warn(f"completion {empty} has no token that counts: its score is dropped", stacklevel=2)
    return token_rewards(rewards, old_logp, mask, cu_seqlens=cu_seqlens, ref_logp=ref_logp, beta=beta)
