r"""LCPO, now RE-PO: latent collective preference optimisation. How far each label is believed, by EM, over any base loss.

Cao et al., "Latent Collective Preference Optimization: A General Framework for Robust LLM Alignment", arXiv:2509.24159.
(First RPO, then LCPO, then RE-PO.)
Evidence: paper. From the equations of its ICLR 2026 version; the announced code could not be had. The column d below is
algebra on its equation 2.

Pair i was labelled by annotator k with reliability :math:`\eta_k`, the probability that a label is right. With the base loss
in both orders, :math:`d = L(y_l \succ y_w) - L(y_w \succ y_l)`, :math:`p = \sigma(d)` (equations 2, 4 and 5)

.. math::
    w = \frac{p\,\eta}{p\,\eta + (1 - p)(1 - \eta)} = \sigma(d + \mathrm{logit}\,\eta), \qquad
    L = \mathrm{mean}\; -\bigl[w \log p + (1 - w) \log(1 - p)\bigr]

=========  ==============================================================  ==========================================
base       loss, with D the difference of log-ratios                       d
=========  ==============================================================  ==========================================
dpo        :math:`-\log\sigma(m)`, :math:`m = \beta D`                     m
ipo        :math:`(D - 1/(2\beta))^2`                                      :math:`2 D / \beta`
simpo      :math:`-\log\sigma(m - \gamma)`,                                :math:`\log\sigma(m - \gamma)
           :math:`m = \beta (a_w - a_l)`, a means over tokens              - \log\sigma(-m - \gamma)`
cpo        :math:`-\log\sigma(m) - \log\pi(y_w)`,                          :math:`(1 + \beta)(\log\pi(y_w) - \log\pi(y_l))`
           :math:`m = \beta (\log\pi(y_w) - \log\pi(y_l))`
=========  ==============================================================  ==========================================

w is a constant, so :math:`\partial L / \partial d = p - w`: exactly the gradient of the marginal likelihood
:math:`-\log(\eta p + (1 - \eta)(1 - p))`. A step is one of DPO whose weight is bounded and goes to 0 where the policy disagrees
with the label confidently; a label that is not believed is trained the other way round. Reliabilities move after each optimiser
step (equation 7): :class:`prefkern.AnnotatorReliability`. With :math:`\eta = \frac12` nothing is learned; with 1 it is the base
loss of Bradley and Terry; eta is held in [1e-6, 1 - 1e-6].

Inside the paper: for bases that are no likelihoods equation 5 is not the base loss reweighted. RE-IPO becomes logistic and
loses IPO's finite target, RE-CPO loses its likelihood anchor. `variant="log_p"` is equation 5; `"weighted"` (inferred, from
earlier versions' wording) is :math:`w L(y_w \succ y_l) + (1 - w) L(y_l \succ y_w)`, which for dpo is the same. The paper sums
over pairs, here it is the mean.

Defaults: eta 0.9, the moving average's 0.1. A NaN in d is a ValueError on the CPU, before reliabilities hear of it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, label_posterior, preference_loss
from ..reliability import AnnotatorReliability
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_values

__all__ = ["LCPO", "AnnotatorReliability", "about", "label_posterior", "lcpo_loss", "lcpo_margin", "recipe"]

about = About(
    name="LCPO",
    title="Latent Collective Preference Optimization: A General Framework for Robust LLM Alignment",
    arxiv="2509.24159",
    year=2025,
    family="pair weight",
    evidence="paper",
    note="the equations of its ICLR version, RE-PO",
)

Base = Literal["dpo", "ipo", "simpo", "cpo"]
BASES = ("dpo", "ipo", "simpo", "cpo")
VARIANTS = ("log_p", "weighted")


def lcpo_margin(
    kind: Base,
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float,
    gamma: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """d [P] of a base loss; with a gradient. Arguments as of :func:`lcpo_loss`."""
    _check_base(kind, beta, gamma, (ref_chosen_logp, ref_rejected_logp), (chosen_lengths, rejected_lengths))
    chosen, rejected = (t if t.dtype == torch.float64 else t.float() for t in (chosen_logp, rejected_logp))
    if ref_chosen_logp is not None and ref_rejected_logp is not None:
        chosen, rejected = chosen - ref_chosen_logp.detach(), rejected - ref_rejected_logp.detach()
    if kind == "simpo":
        assert gamma is not None and chosen_lengths is not None and rejected_lengths is not None
        m = beta * (chosen / chosen_lengths - rejected / rejected_lengths)
        return F.logsigmoid(m - gamma) - F.logsigmoid(-m - gamma)
    return {"dpo": beta, "ipo": 2 / beta, "cpo": 1 + beta}[kind] * (chosen - rejected)


def lcpo_loss(
    kind: Base,
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float,
    eta: float | Tensor | AnnotatorReliability = 0.9,
    annotator: Tensor | None = None,
    variant: Literal["log_p", "weighted"] = "log_p",
    gamma: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> LossOutput:
    """The loss of P pairs. Gradient to chosen_logp and rejected_logp.

    Args:
        kind: the base loss: "dpo", "ipo", "simpo" or "cpo".
        chosen_logp, rejected_logp: [P], sums over tokens.
        ref_chosen_logp, ref_rejected_logp: [P]; for "dpo" and "ipo", None for 0.
        beta, gamma: of the base loss. gamma, chosen_lengths and rejected_lengths ([P]) are for "simpo", which needs them.
        eta: the reliability, a number, or one per annotator [K] with annotator: int64 or int32 [P]. Or the
            :class:`prefkern.AnnotatorReliability` itself: its values are used, and where a gradient is wanted it is told of
            the w of these pairs; call its `update` once per optimiser step.
        variant: "log_p", or "weighted".

    Metrics: chosen_reward and rejected_reward (beta times the log-ratio, or for "simpo" and "cpo" the log-prob, per token for
    "simpo"), reward_margin, accuracy, pairs, and posterior, the mean of w.
    """
    choice("variant", variant, VARIANTS)
    refs, lengths = (ref_chosen_logp, ref_rejected_logp), (chosen_lengths, rejected_lengths)
    options = {"beta": beta, "gamma": gamma, "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    d = lcpo_margin(kind, chosen_logp, rejected_logp, *refs, **options)  # type: ignore[arg-type]
    check_values("d", d, ~d.isnan(), "the margin of every pair must be a number")
    rates = eta.eta if isinstance(eta, AnnotatorReliability) else eta
    w = label_posterior(d, rates, annotator)
    if isinstance(eta, AnnotatorReliability) and d.requires_grad:
        eta.accumulate(w, annotator)
    average: Literal["logp"] | None = "logp" if kind == "simpo" else None
    smoothing = 1 - w if kind == "dpo" else 0.0  # the two variants are one, and its loss is the op's own
    with torch.set_grad_enabled(kind == "dpo" and torch.is_grad_enabled()):
        loss, metrics = preference_loss(
            chosen_logp, rejected_logp, *refs, beta=beta, average=average, chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths, label_smoothing=smoothing,
        )  # fmt: skip
    if kind != "dpo" and variant == "log_p":
        loss = preference_loss(d, torch.zeros_like(d), beta=1.0, label_smoothing=1 - w).loss
    elif kind != "dpo":
        loss = _weighted(kind, (chosen_logp, rejected_logp), refs, lengths, w, beta, gamma)
    metrics = {name: value for name, value in metrics.items() if name != "clamped"}
    return LossOutput(loss, {**metrics, "posterior": w.sum() / max(len(w), 1)})


@dataclass(frozen=True)
class LCPO(PairRecipe):
    """A base loss whose labels are believed as far as the policy and their annotator say.

    `extra` may hold `annotator`, ids [P], and `eta`, [K], which goes before the option: the reliabilities as they are now. To
    move them, give :meth:`posterior` to `AnnotatorReliability.update` after each step of the optimiser.
    """

    name: ClassVar[str] = "lcpo"
    needs: ClassVar[tuple[str, ...]] = ()
    kind: Literal["dpo", "ipo", "simpo", "cpo"] = "dpo"
    beta: float = 0.1
    gamma: float | None = None
    eta: float = 0.9
    variant: Literal["log_p", "weighted"] = "log_p"

    def posterior(self, pairs: Pairs) -> Tensor:
        """w [P] of these pairs, a constant."""
        d = lcpo_margin(self.kind, *self._sides(pairs), beta=self.beta, gamma=self.gamma, **self._lengths(pairs))
        return label_posterior(d, self._eta(pairs), pairs.get("annotator"))

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return lcpo_loss(
            self.kind, *self._sides(pairs), beta=self.beta, gamma=self.gamma, eta=self._eta(pairs),
            annotator=pairs.get("annotator"), variant=self.variant, **self._lengths(pairs),
        )  # fmt: skip

    def _sides(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        if self.kind in ("simpo", "cpo"):
            return pairs.log_probs()
        pairs.require("ref_logp")
        return pairs.log_ratios()

    def _lengths(self, pairs: Pairs) -> dict[str, Tensor]:
        if self.kind != "simpo":
            return {}
        chosen, rejected = pairs.lengths()
        return {"chosen_lengths": chosen, "rejected_lengths": rejected}

    def _eta(self, pairs: Pairs) -> float | Tensor:
        given = pairs.get("eta")
        return self.eta if given is None else given


recipe = LCPO()


def _weighted(
    kind: Base,
    logps: tuple[Tensor, Tensor],
    refs: tuple[Tensor | None, Tensor | None],
    lengths: tuple[Tensor | None, Tensor | None],
    w: Tensor,
    beta: float,
    gamma: float | None,
) -> Tensor:
    """w times the base loss plus 1 - w times that of the pair the other way round."""
    if kind == "cpo":
        pair = preference_loss(*logps, beta=beta, label_smoothing=1 - w).loss
        return pair - (w * logps[0] + (1 - w) * logps[1]).sum() / max(len(w), 1)
    total = w.new_zeros(())
    for weight, i, j in ((w, 0, 1), (1 - w, 1, 0)):
        if kind == "ipo":
            output = preference_loss(logps[i], logps[j], refs[i], refs[j], kind="ipo", beta=beta, weight=weight)
        else:
            assert gamma is not None
            output = preference_loss(
                logps[i], logps[j], beta=beta, offset=gamma, average="logp", chosen_lengths=lengths[i],
                rejected_lengths=lengths[j], weight=weight,
            )  # fmt: skip
        total = total + output.loss
    return total


def _check_base(
    kind: Base,
    beta: float,
    gamma: float | None,
    refs: tuple[Tensor | None, Tensor | None],
    lengths: tuple[Tensor | None, Tensor | None],
) -> None:
    choice("kind", kind, BASES)
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
    if (refs[0] is None) != (refs[1] is None):
        raise ValueError("one of ref_chosen_logp and ref_rejected_logp is None; both are expected, or neither")
    if kind in ("simpo", "cpo") and refs[0] is not None:
        raise ValueError(f"ref_chosen_logp is given but kind is {kind!r}, which has no reference")
    needed = {"gamma": gamma, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    for name, value in needed.items():
        if kind == "simpo" and value is None:
            raise ValueError(f"{name} is None; kind 'simpo' needs it")
        if kind != "simpo" and value is not None:
            raise ValueError(f"{name} is given but kind is {kind!r}; it means something for 'simpo'")
        if isinstance(value, Tensor):
            check_values(name, value, value > 0, "every response needs a token")
