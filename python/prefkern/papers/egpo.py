r"""EGPO: extragradient steps to the Nash policy of a KL-regularised preference game, as an online squared pair loss.

Zhou et al., "Extragradient Preference Optimization (EGPO): Beyond Last-Iterate Convergence for Nash Learning from Human
Feedback", arXiv:2503.08942.
Evidence: code. Losses, gradients and the two-step update were checked against the authors' release, in tables.

With :math:`P_{yy'}` the probability that y beats y', :math:`P + P^\top = 1`, and :math:`\theta` the logits of
:math:`\pi`, the game is

.. math:: V(p, q) = p^\top P q - \beta\,\mathrm{KL}(p\|\pi_\mathrm{ref}) + \beta\,\mathrm{KL}(q\|\pi_\mathrm{ref}),

whose Nash policy solves :math:`\pi^* \propto \pi_\mathrm{ref}\, e^{P\pi^*/\beta}`. One iteration of extragradient takes both
steps from :math:`\theta_t` (`egpo_tabular_step`):

.. math::
    \theta_{t+1/2} &= (1 - \eta\beta)\,\theta_t + \eta\beta\,(\theta_\mathrm{ref} + P\pi_t/\beta) \\
    \theta_{t+1} &= (1 - \eta\beta)\,\theta_t + \eta\beta\,(\theta_\mathrm{ref} + P\pi_{t+1/2}/\beta)

The first step alone is mirror descent, which is online IPO. As losses, with :math:`h_y = \log\pi(y) - \log\pi_\mathrm{ref}(y)`
and an opponent :math:`\mu` that is a constant:

.. math::
    L_1(\theta; \mu) &= \frac1{n^2} \sum_{y,y'} \bigl[h_y - h_{y'} - ((P\mu)_y - (P\mu)_{y'})/\beta\bigr]^2 \\
    L_2(\theta) &= \sum_{y,y'} \bar\pi_y \bar\pi_{y'} \bigl[h_y - h_{y'} - (P_{yy'} - \tfrac12)/\beta\bigr]^2

(`online_ipo_uniform`, `online_ipo_on_policy`; :math:`\bar\pi` is a constant.) SGD at rate :math:`l` on :math:`L_1` with
:math:`\mu = \pi_t` is the first step with :math:`\eta = 4l/(\beta n)`, with :math:`\mu = \pi_{t+1/2}` the second, up to a
constant in the logits. Adam and gradient clipping break that equality. For sampled responses (`online_ipo_loss`), with
:math:`a = P(y \succ y'')` and :math:`b = P(y' \succ y'')` for a third response that the opponent sampled:

.. math:: L = \frac1B \sum \bigl[h_y - h_{y'} - (a - b)/\beta\bigr]^2

One EGPO iteration on a model: sample with :math:`\theta_t` and step; sample with the result, return to :math:`\theta_t` and
the optimiser's state there, and step on the new samples (`prefkern.optim.ExtragradientStep`). It costs two rounds of sampling
and two steps.

Where theory and release differ: theory draws y and y' uniformly, which no language model can; the release draws them from a
hotter copy of the policy, without a correction; this loss takes any pairs, without one. The release divides each log-prob
by its response's length (`lengths`, `pair_lengths`), which moves the fixed point; the default is the theory. Where y, y', y''
share one distribution the release compares y with y' directly: :math:`a = P(y \succ y'), b = 1/2` (`pair_preference=None`). Its
evaluation on several prefixes of a response is left to the caller. Its step size for Nash-MD's mixture is half of the above.

Defaults: beta 0.1, as in paper and release. Equal preferences are a target of 0, and a response paired with itself an error
of 0; both stay in the mean. A preference that is no probability is a ValueError; on CUDA its pair is NaN.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values, may_look

about = About(
    name="EGPO",
    title="Extragradient Preference Optimization (EGPO): Beyond Last-Iterate Convergence for Nash Learning from Human Feedback",
    arxiv="2503.08942",
    year=2025,
    family="pairwise, optimiser",
    evidence="code",
    note="the authors' release, tables; its language-model trainer was read, not run",
)


def egpo_tabular_step(
    logits: Tensor, ref_logits: Tensor, preference: Tensor, *, beta: float, eta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [..., n] after the half step (mirror descent's) and after the full one. No gradient.

    preference: [..., n, n], the probability that the row's response beats the column's. eta: a number, or one per game [...].
    ValueError unless eta beta > 0; a warning where it is above 1, since there the policy steps beyond its target.
    """
    _check_game(logits, ref_logits, preference, beta)
    rate = torch.as_tensor(eta, dtype=logits.dtype, device=logits.device).unsqueeze(-1) * beta
    if may_look(rate):
        if not bool((rate > 0).all()):
            raise ValueError(f"eta is {eta}; eta * beta must be positive")
        if bool((rate > 1 + 4 * torch.finfo(rate.dtype).eps).any()):
            warnings.warn(f"eta * beta is {rate.max().item():.3g}; above 1 a step goes beyond its target", stacklevel=2)
    with torch.no_grad():
        half = _step_towards(logits, ref_logits, preference, logits, beta, rate)
        return half, _step_towards(logits, ref_logits, preference, half, beta, rate)


def _step_towards(logits: Tensor, ref: Tensor, preference: Tensor, opponent: Tensor, beta: float, rate: Tensor) -> Tensor:
    # lerp's two forms keep rate = 1 exact; it is the best response to the opponent.
    return torch.lerp(logits, ref + _against(preference, opponent) / beta, rate)


def best_response(logits: Tensor, ref_logits: Tensor, preference: Tensor, *, beta: float) -> Tensor:
    r"""Log-probs [..., n] of the best policy against softmax(logits): :math:`\pi_\mathrm{ref} e^{P\pi/\beta}`, normalised."""
    _check_game(logits, ref_logits, preference, beta)
    return torch.log_softmax(ref_logits + _against(preference, logits) / beta, -1)


def dual_gap(logits: Tensor, ref_logits: Tensor, preference: Tensor, *, beta: float) -> Tensor:
    r""":math:`\max_p V(p, \pi) - \min_q V(\pi, q)` [...], at least 0, and 0 at the Nash policy only.

    The game is symmetric, so both players have the same best response and the gap is
    :math:`2\beta\,\mathrm{KL}(\pi \| \mathrm{best\ response})`, summed so that a gap of 1e-20 has its digits.
    """
    logp, best = torch.log_softmax(logits, -1), best_response(logits, ref_logits, preference, beta=beta)
    x, pi = logp - best, logp.exp()
    # Both are q - p + p log(p/q), whose sum is the KL; the first keeps its digits near 0, the second cannot overflow.
    near, far = pi * (torch.expm1(-x.clamp_min(-1)) + x), best.exp() - pi + pi * x
    return 2 * beta * torch.where(x > -1, near, far).sum(-1)


def online_ipo_uniform(
    logits: Tensor, ref_logits: Tensor, preference: Tensor, *, beta: float = 0.1, opponent: Tensor | None = None
) -> Tensor:
    """L1 over all pairs of n responses, [...]. opponent: logits [..., n], a constant; None: the policy itself.

    Gradient to logits only.
    """
    _check_game(logits, ref_logits, preference, beta)
    target = _against(preference, logits if opponent is None else opponent).detach() / beta
    d = torch.log_softmax(logits, -1) - torch.log_softmax(ref_logits.detach(), -1) - target
    # The mean over pairs of (d - d')^2 is twice the variance of d.
    return 2 * (d - d.mean(-1, keepdim=True)).square().mean(-1)


def online_ipo_on_policy(logits: Tensor, ref_logits: Tensor, preference: Tensor, *, beta: float = 0.1) -> Tensor:
    """L2, pairs drawn from the policy, whose probabilities are constants, [...]. Gradient to logits only."""
    _check_game(logits, ref_logits, preference, beta)
    pi = torch.softmax(logits.detach(), -1)
    h = torch.log_softmax(logits, -1) - torch.log_softmax(ref_logits.detach(), -1)
    error = h.unsqueeze(-1) - h.unsqueeze(-2) - (preference.detach() - 0.5) / beta
    return (pi.unsqueeze(-1) * pi.unsqueeze(-2) * error.square()).sum((-2, -1))


def online_ipo_loss(
    logp: Tensor,
    pair_logp: Tensor,
    ref_logp: Tensor,
    pair_ref_logp: Tensor,
    preference: Tensor,
    pair_preference: Tensor | None = None,
    *,
    beta: float = 0.1,
    lengths: Tensor | None = None,
    pair_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P sampled pairs y, y' (`pair_...`), all [P]. Gradient to logp and pair_logp.

    logp, ref_logp: sums over the tokens of each response; from tokens take `prefkern.sequence_sum(logp, mask, minus=ref_logp)`
    as logp and zeros as ref_logp, which loses fewest digits.
    preference, pair_preference: the probability that y, and y', beats one third response y'' that the opponent sampled.
    pair_preference None: y and y' were compared with each other, and preference is how likely y wins.
    lengths, pair_lengths: tokens of each response, to divide its log-ratio by.
    mask: bool, the pairs that count.

    Metrics: those of `prefkern.preference_loss`, whose chosen response is y; its rewards are the log-ratios.
    """
    _check_beta(beta)
    check_rows(
        len(logp), pair_logp=pair_logp, ref_logp=ref_logp, pair_ref_logp=pair_ref_logp, preference=preference,
        pair_preference=pair_preference, lengths=lengths, pair_lengths=pair_lengths, mask=mask,
    )  # fmt: skip
    counts = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    dtype = torch.promote_types(logp.dtype, torch.float32)
    first = _probability("preference", preference, counts).to(dtype)
    second = 0.5 if pair_preference is None else _probability("pair_preference", pair_preference, counts).to(dtype)
    if (lengths is None) != (pair_lengths is None):
        missing = "lengths" if lengths is None else "pair_lengths"
        raise ValueError(f"{missing} is None; both lengths are expected, or neither")
    for name, n in (("lengths", lengths), ("pair_lengths", pair_lengths)):
        if n is not None:
            check_values(name, n, ~counts | (n > 0), "every response needs a token that counts")
    return preference_loss(
        logp, pair_logp, ref_logp, pair_ref_logp, kind="squared", beta=1.0,
        offset=(first - second) / beta, average=None if lengths is None else "logp",
        chosen_lengths=lengths, rejected_lengths=pair_lengths, mask=mask, reduction=reduction,
    )  # fmt: skip


def _probability(name: str, p: Tensor, counts: Tensor) -> Tensor:
    """A preference as a constant; NaN, which makes its pair NaN, where it is none and that may not be looked at."""
    p = p.detach()
    good = (p >= 0) & (p <= 1)
    check_values(name, p, good | ~counts, "a probability in [0, 1] is expected")
    return torch.where(good, p, torch.nan)


def _against(preference: Tensor, logits: Tensor) -> Tensor:
    """How often each response beats one that softmax(logits) draws."""
    return (preference @ torch.softmax(logits, -1).unsqueeze(-1)).squeeze(-1)


def _check_game(logits: Tensor, ref_logits: Tensor, preference: Tensor, beta: float) -> None:
    _check_beta(beta)
    n = logits.shape[-1]
    if ref_logits.shape[-1:] != (n,) or preference.shape[-2:] != (n, n):
        raise ValueError(
            f"logits has shape {list(logits.shape)}, ref_logits {list(ref_logits.shape)}, preference {list(preference.shape)}; "
            "[..., n], [..., n] and [..., n, n] are expected"
        )
    if may_look(preference):
        if not bool(((preference >= 0) & (preference <= 1)).all()):
            raise ValueError("preference has an entry outside [0, 1]")
        tolerance = 64 * torch.finfo(preference.dtype).eps
        if not bool(((preference + preference.mT - 1).abs() <= tolerance).all()):
            raise ValueError("preference plus its transpose is not 1 everywhere")


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")


@dataclass(frozen=True)
class EGPO(PairRecipe):
    """Online IPO's loss of pairs in either order; the extragradient is how the optimiser steps.

    `pairs.extra` holds "preference" and, unless the pair was compared with itself, "pair_preference", [P] each.
    """

    name: ClassVar[str] = "egpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "preference")
    beta: float = 0.1
    normalize: bool = False

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        first, second = pairs.log_ratios()
        zeros = torch.zeros_like(first).detach()
        lengths, pair_lengths = pairs.lengths() if self.normalize else (None, None)
        return online_ipo_loss(
            first, second, zeros, zeros, pairs.require("preference"), pairs.get("pair_preference"),
            beta=self.beta, lengths=lengths, pair_lengths=pair_lengths,
        )  # fmt: skip


recipe = EGPO()
