r"""Curry-DPO: pairs from easy to hard, and a new reference for each stage.

Pattnaik et al., "Enhancing Alignment using Curriculum Learning & Ranked Preferences", arXiv:2403.07230. (Later versions write
Curri-DPO. 2D-Curri-DPO, which adds the complexity of prompts, is another method.)
Evidence: paper. From its abstract, its figure and the released data, whose fields are easy, medium and hard; no code was
released, and the text of the method could not be read in full.

The responses to a prompt are ranked by rating, :math:`R_1 \ge R_2 \ge \dots`; the best is chosen over each of the others. The
gap of a pair's ratings says how easy it is, and nothing more: ratings do not enter the loss. Stage i trains on the i-th easiest
pair of every prompt, with DPO's loss of sums over tokens

.. math::
    L_i = -\log\sigma\Bigl(\beta \Bigl[\log\frac{\pi(y_w)}{\pi_{\mathrm{ref},i}(y_w)}
    - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref},i}(y_l)}\Bigr]\Bigr),
    \qquad \pi_{\mathrm{ref},0} = \pi_\mathrm{SFT}, \quad \pi_{\mathrm{ref},i} = \text{the result of stage } i - 1

The reference is constant. At the first step of a stage the policy is its reference, so the loss is log 2 exactly.

The parts: :func:`prefkern.data.ranked_pairs`, :class:`prefkern.data.Curriculum` for stages and whose reference they have, and
:func:`prefkern.data.refresh_reference` for the log-probs of that reference, once per stage, without a second model in memory.

The paper leaves open whether difficulty is ranked within a prompt or over the data set: `bucket="rank"` is the default,
`"global"` inferred. `reference="fixed"` and `n_stages=1` are the baselines, `pairs="all"` takes every ordered pair. Its
defaults: four responses, three pairs, three stages; beta is not given, 0.1 is DPO's. Ties with the best make no pair; a NaN
rating takes its response out; prompts without a pair are counted; a stage without pairs leaves the reference as it is.
"""

from torch import Tensor

from ..data import Curriculum, ranked_pairs
from ..ops import LossOutput, preference_loss
from ._about import About

__all__ = ["Curriculum", "about", "curry_dpo_loss", "ranked_pairs"]

about = About(
    name="Curry-DPO",
    title="Enhancing Alignment using Curriculum Learning & Ranked Preferences",
    arxiv="2403.07230",
    year=2024,
    family="curriculum",
    evidence="paper",
    note="its abstract, figure and released data",
)


def curry_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """The loss of a stage's pairs: DPO's, with the log-probs [P] of that stage's reference. Gradient to the first two.

    Sums over tokens. Metrics: those of :func:`prefkern.preference_loss`.
    """
    return preference_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta)
