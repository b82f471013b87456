r"""More is Less: pairs whose sides come from several models are told apart too easily.

Wang et al., "More is Less: The Pitfalls of Multi-Model Synthetic Preference Data in DPO Safety Alignment", arXiv:2504.02193.
Evidence: part. The pair builders follow the authors' code. Their analysis of linear separability is not in it, and neither
classifier nor layer is known: the probe here is inferred, this library's own, and reproduces none of their figures.

There is no loss of its own: training is DPO,

.. math::
    L = -\log\sigma\Bigl(\beta \Bigl[\log\frac{\pi(y_w)}{\pi_\mathrm{ref}(y_w)}
    - \log\frac{\pi(y_l)}{\pi_\mathrm{ref}(y_l)}\Bigr]\Bigr)

that is :func:`prefkern.preference_loss`. Here are the parts of the study:

- :func:`self_rm_pair`: of a model's own samples (five in the study) the best and the worst by a reward model;
  :func:`mix_pair`: an external response over the own one, exchanged if the reward model puts the own strictly higher. Their
  release carries leftovers of one prompt into the next; here every prompt is by itself.
- :func:`linear_separability`: how well a linear probe tells the sides of held-out pairs apart, from features such as
  :func:`pool_features` of a base model's hidden states; :func:`surface_features`: the same question of length, first token
  and mean log-prob, which should not suffice; :func:`margin_saturation_step`: when training no longer errs.

The builders compare sets that differ in margin as well as in source: match margins before blaming the source. That sides are
separable does not prove that a policy exploits it.
"""

from ..data import mix_pair, self_rm_pair
from ..diagnostics import auc, linear_probe, linear_separability, margin_saturation_step, pool_features, surface_features
from ._about import About

__all__ = [
    "about",
    "auc",
    "linear_probe",
    "linear_separability",
    "margin_saturation_step",
    "mix_pair",
    "pool_features",
    "self_rm_pair",
    "surface_features",
]

about = About(
    name="More is Less",
    title="More is Less: The Pitfalls of Multi-Model Synthetic Preference Data in DPO Safety Alignment",
    arxiv="2504.02193",
    year=2025,
    family="diagnostic",
    evidence="part",
    note="pair builders follow the authors' code; the probe is inferred",
)
