r"""TDPO: DPO with the divergence of every token's distribution from the reference's.

Zeng et al., "Token-level Direct Preference Optimization", arXiv:2404.11999.
Evidence: code. Values and gradients were checked against the authors' release.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`, and the forward divergence,
reference first, summed over its places, :math:`K = \sum_t \sum_v \pi_\mathrm{ref}(v) \log\frac{\pi_\mathrm{ref}(v)}{\pi(v)}`:

.. math::
    \text{TDPO}_1:&\quad L = -\log\sigma\bigl(\beta (x_w - x_l - (K_l - K_w))\bigr) \\
    \text{TDPO}_2:&\quad L = -\log\sigma\bigl(\beta (x_w - x_l - \alpha (K_l - \mathrm{sg}\,K_w))\bigr)

averaged over pairs. sg is a constant: the second form pushes the divergence of rejected responses down and leaves that of
chosen ones alone; the first has a gradient through both. With K left out both are DPO.

K takes the policy's and the reference's logits of the same places together: `position_kl` forms it from both in plain PyTorch,
and so holds tensors of their size.

The paper prefers the second form; the release's configuration ships the first (`if_tdpo2: false`). Default here: 2, beta 0.1,
alpha 0.5, as there. Rewards among the metrics are :math:`\beta (x + \alpha K)`, with alpha 1 in the first form; the release
has 1 in both.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows

about = About(
    name="TDPO",
    title="Token-level Direct Preference Optimization",
    arxiv="2404.11999",
    year=2024,
    family="pairwise, token divergence",
    evidence="code",
    note="the authors' release",
)


def position_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[...], from logits [..., V] of policy and reference: the divergence of the policy from the reference, reference first, at
    each place. Gradient to logits."""
    if logits.shape != ref_logits.shape:
        raise ValueError(f"ref_logits has shape {list(ref_logits.shape)}; {list(logits.shape)} is expected, like logits")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ref = ref_logits.detach().log_softmax(-1, dtype=dtype)
    # 0 where the reference has no probability, whatever the policy gives
    terms = torch.where(ref == -torch.inf, 0.0, ref.exp() * (ref - logits.log_softmax(-1, dtype=dtype)))
    return terms.sum(-1)


def tdpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    version: Literal[1, 2] = 2,
    beta: float = 0.1,
    alpha: float = 0.5,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs and divergences summed over each response, [P] each.

    Gradient to chosen_logp, rejected_logp, rejected_kl and, in version 1, chosen_kl. alpha: of version 2. Metrics: those of
    `prefkern.preference_loss`, and chosen_kl and rejected_kl, their means.
    """
    if version not in (1, 2):
        raise ValueError(f"version is {version!r}; accepted: 1, 2")
    check_rows(len(chosen_logp), chosen_kl=chosen_kl, rejected_kl=rejected_kl)
    share = 1.0 if version == 1 else alpha
    kept = chosen_kl if version == 1 else chosen_kl.detach()
    out = preference_loss(
        chosen_logp + share * kept, rejected_logp + share * rejected_kl, ref_chosen_logp, ref_rejected_logp, beta=beta,
        reduction=reduction,
    )  # fmt: skip
    count = max(len(chosen_kl), 1)
    means = {"chosen_kl": chosen_kl.detach().sum() / count, "rejected_kl": rejected_kl.detach().sum() / count}
    return LossOutput(out.loss, {**out.metrics, **means})


@dataclass(frozen=True)
class TDPO(PairRecipe):
    """DPO with token divergences: `extra["position_kl"]`, shaped like the log-probs; its gradient is the caller's."""

    name: ClassVar[str] = "tdpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "position_kl")
    version: Literal[1, 2] = 2
    beta: float = 0.1
    alpha: float = 0.5

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen_kl, rejected_kl = pairs.sums(pairs.require("position_kl"))
        return tdpo_loss(*pairs.log_ratios(), chosen_kl=chosen_kl, rejected_kl=rejected_kl, **self.options())


recipe = TDPO()
