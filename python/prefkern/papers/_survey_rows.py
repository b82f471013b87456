"""The methods of the DPO survey's taxonomy, a row each: what is known of their losses, and where this library has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["code", "known", "unverified", "module"]
Cover = Literal["loss", "weight", "list", "module", "none"]

SOURCES: dict[str, str] = {
    "code": "read in or confirmed against code",
    "known": "known from the method's paper, not read again",
    "unverified": "not verified; its formula is withheld",
    "module": "as its module says",
}
COVERS: dict[str, str] = {
    "loss": "a loss of pairs or of single responses",
    "weight": "a weight, an offset, a scale or a mask that such a loss takes",
    "list": "a loss of lists or groups",
    "module": "a paper of its own here",
    "none": "data, sampling, labelling, RL, decoding or a change of the model",
}
NOTATION = (
    "x = log pi - log ref of a response, summed over its tokens; w chosen, l rejected; D = x_w - x_l, z = beta D; "
    "l(t) = -log s(t), s logistic; n = tokens, a = mean token log-prob, u = e^x; sg: constant"
)


@dataclass(frozen=True)
class Row:
    """A method of the survey."""

    branch: str
    """Of the taxonomy."""
    name: str
    formula: str
    """Its loss, in the notation above; empty where it is withheld or there is none."""
    source: Source
    cover: Cover
    where: str | None = None
    """A path below `prefkern`, of a function or a paper's module."""


def _withheld(branch: str, names: str, cover: Cover = "none") -> tuple[Row, ...]:
    return tuple(Row(branch, name, "", "unverified", cover) for name in names.split(", "))


_S = "papers.dpo_survey."

ROWS: tuple[Row, ...] = (
    Row("basic", "DPO", "l(z)", "code", "loss", "papers.dpo.dpo_loss"),
    Row("basic", "RRHF", "sum_{r_i < r_j} relu(a_i - a_j) + NLL(best)", "known", "list", "papers.rrhf.rrhf_loss"),
    Row("basic", "SLiC-HF", "relu(delta - (log pi_w - log pi_l)) + lambda NLL_w", "code", "loss", "papers.slic.slic_loss"),
    Row(
        "basic", "PRO", "Plackett-Luce of a over the ranked list + SFT(best)", "known", "list",
        "papers.plackett_luce.plackett_luce_loss",
    ),
    Row("heterogeneity", "MallowsPO", "l(phi(x) z), phi: weight of the prompt", "known", "weight", _S + "mallows_po_loss"),
    Row(
        "heterogeneity", "GRPO (group robust)", "sum_g q_g L_g, q_g <- q_g e^{eta sg L_g}, normalised", "known", "list",
        _S + "group_robust_loss",
    ),
    *_withheld("heterogeneity", "MinMax-DPO, GDPO (group distribution)"),
    Row("distinguishability", "ODPO", "l(z - delta), delta from the gap of scores", "code", "weight", "papers.odpo.odpo_loss"),
    Row(
        "distinguishability", "beta-DPO", "l(beta_b D), beta_b = sg max(beta (1 + a (mean D[sel] - M0)), 1e-3)", "code",
        "weight", "papers.beta_dpo.beta_dpo_loss",
    ),
    Row(
        "distinguishability", "GDPO (geometric)", "l((2 p - 1) z), p: soft label", "known", "weight",
        _S + "geometric_dpo_loss",
    ),
    *_withheld("distinguishability", "alpha-DPO, Ada-DPO, DPO-rc, Sr-DPO, GaPO", "weight"),
    Row("distinguishability", "FocalPO", "s(z)^g l(z), the factor not constant", "known", "loss", _S + "focal_po_loss"),
    Row("noise", "rDPO", "[(1 - e) l(z) - e l(-z)] / (1 - 2 e)", "code", "loss", "papers.robust_dpo.robust_dpo_loss"),
    Row("noise", "cDPO", "(1 - e) l(z) + e l(-z)", "code", "loss", "papers.dpo.dpo_loss"),
    Row("noise", "Dr. DPO", "-b log mean_B e^{-l(z) / b}", "known", "loss", _S + "dr_dpo_loss"),
    Row("point-wise", "KTO", "w_y [1 - s(+-beta (x - kl))]", "code", "loss", "papers.kto.kto_loss"),
    Row(
        "point-wise", "BCO", "l(beta x_w - delta) + l(-(beta x_l - delta)), delta: running mean", "code", "loss",
        "papers.bco.bco_loss",
    ),
    Row("point-wise", "Cal-DPO", "l(D) + (x_w - 1/(2 beta))^2 + (x_l + 1/(2 beta))^2", "code", "loss", _S + "cal_dpo_loss"),
    Row("point-wise", "DRO-V", "1/2 (r - V - tau x)^2", "known", "loss", _S + "dro_v_loss"),
    Row("point-wise", "NCA", "l(beta x_w) + 1/2 l(-beta x_w) + 1/2 l(-beta x_l)", "code", "loss", "papers.nca.nca_loss"),
    Row("point-wise", "AOT", "l of sorted x_w less sorted x_l, or of sorted margins", "code", "loss", "papers.aot.aot_loss"),
    Row("point-wise", "GPO (general preference, GPM)", "", "module", "module", "papers.gpm.gpo_loss"),
    Row("pair-wise", "IPO", "(D - 1/(2 beta))^2; TRL divides each x by its own length", "code", "loss", "papers.ipo.ipo_loss"),
    Row(
        "pair-wise", "DPO-RK (ties)", "win l(z - log nu); tie -log[(nu^2 - 1) s(z - log nu) s(-z - log nu)]", "known",
        "loss", _S + "tie_dpo_loss",
    ),
    Row(
        "pair-wise", "DPO-D (ties)", "win p = 1 / (1 + e^{-z} + 2 nu e^{-z/2}); tie 2 nu e^{-z/2} p; -log of it", "known",
        "loss", _S + "tie_dpo_loss",
    ),
    Row("pair-wise", "PMPO", "-alpha log pi_w + (1 - alpha) log pi_l + beta KL(ref, pi)", "known", "loss", _S + "pmpo_loss"),
    Row("pair-wise", "NPO", "(2 / beta) l(-beta x_l)", "known", "loss", _S + "npo_loss"),
    Row("pair-wise", "SimNPO", "(2 / beta) l(-beta a_l - gamma)", "known", "loss", _S + "simnpo_loss"),
    *_withheld("pair-wise", "BMC, IOPO, SAPO, D2O"),
    Row(
        "list-wise", "LiPO-lambda",
        "sum_{psi_i > psi_j} sg[abs(2^psi_i - 2^psi_j) abs(1/log(1 + r_i) - 1/log(1 + r_j))] l(s_i - s_j), s = beta x",
        "known", "list", "papers.lipo.lipo_loss",
    ),
    Row("list-wise", "LIRE", "-sum_j softmax(log pi / T)_j R_j", "known", "list", "papers.lire.lire_loss"),
    Row(
        "list-wise", "mDPO (multi-sample)", "l(beta (mean_k x_wk - mean_k x_lk))", "known", "list",
        _S + "multi_sample_dpo_loss",
    ),
    Row(
        "list-wise", "RPO (relative)", "mean_ij l(omega_ij beta (x_wi - x_lj)), omega: similarity of prompts", "known",
        "weight", _S + "relative_po_loss",
    ),
    Row("list-wise", "TODO", "DPO-RK with nu = e^alpha", "known", "loss", _S + "todo_loss"),
    Row(
        "list-wise", "Plackett-Luce DPO", "-sum_k [s_k - logsumexp_{j >= k} s_j], s = beta x", "known", "list",
        "papers.plackett_luce.plackett_luce_loss",
    ),
    *_withheld("list-wise", "Panacea, OPO, DRPO"),
    Row(
        "token", "TDPO", "l(beta (D - alpha (K_l - sg K_w))), K: forward KL(ref, pi) summed over places", "code", "loss",
        "papers.tdpo.tdpo_loss",
    ),
    Row("token", "TGDPO", "token factors 1 +- alpha r", "module", "module", "papers.tgdpo.tgdpo_loss"),
    *_withheld("token", "TIS-DPO", "weight"),
    Row(
        "token", "D2PO (temporal decay)", "l(z) with x = sum_t g^t x_t, t = 0 at the response's first token", "known",
        "weight", _S + "temporal_decay_weights",
    ),
    *_withheld("token", "SparsePO, SePO, RTO, EPO"),
    Row("step", "Step-DPO", "DPO on steps", "module", "module", "papers.step_dpo.step_dpo_loss"),
    Row("step", "MCTS-DPO", "DPO on the steps of a search", "module", "module", "papers.mcts_dpo.smoothed_dpo_loss"),
    Row("step", "TPO (tree)", "a ranked list of a tree's branches", "module", "module", "papers.tpo_tree.tpo_loss"),
    Row("sentence", "IRPO", "l(z) + alpha NLL_w / n_w", "code", "loss", "papers.rpo.rpo_loss"),
    Row("turn", "M-DPO", "l(z) with the turns of users and tools masked", "known", "weight", "papers.dpo.dpo_loss"),
    Row(
        "turn", "DMPO", "l(z) with weights g^t (1 - g^{T - t}) / (1 - g^T) of step t's x", "known", "weight",
        _S + "dmpo_token_weights",
    ),
    Row("offline", "CPO", "l(beta (log pi_w - log pi_l)) + alpha NLL_w", "code", "loss", "papers.cpo.cpo_loss"),
    Row("offline", "ORPO", "NLL_w + beta l(o_w - o_l), o = a - log(1 - e^a)", "code", "loss", "papers.orpo.orpo_loss"),
    Row("online", "XPO", "l(z) + alpha log pi(y), y from the reference", "code", "loss", _S + "xpo_loss"),
    Row("online", "VPO", "l(z) +- alpha beta mean x(y_cal)", "module", "module", "papers.vpo.vpo_loss"),
    Row("online", "APO (accelerated)", "an extrapolation between rounds", "module", "module", "papers.apo_accel"),
    Row("online", "DNO", "", "module", "module", "papers.dno.dno_loss"),
    *_withheld("online", "OAIF, RS-DPO, RSO, OPTUNE, XIONG, COMAL, SeRA, CREAM, HyPO, SELM, COPO, AIPO, BPO, OFS-DPO, DLMA"),
    Row("multi-objective", "MODPO", "l((1 / w_0) [z - w (m_w - m_l)])", "module", "module", "papers.modpo.modpo_loss"),
    *_withheld("multi-objective", "SPO (sequential), HPO, MOSLIM, CPO (controllable), DRDO"),
    Row("self-play", "SPIN", "l(lambda (x_data - x_generated))", "known", "loss", _S + "spin_loss"),
    Row("self-play", "SPPO", "squared regression to win probabilities", "module", "module", "papers.sppo.sppo_loss"),
    Row("reference-free", "SimPO", "l(beta (a_w - a_l) - gamma)", "module", "module", "papers.simpo.simpo_loss"),
    Row("reference-free", "SimPER", "-e^{a_w} + e^{a_l}", "known", "loss", _S + "simper_loss"),
    Row("reference, dynamic", "TR-DPO", "l(z), the reference moved towards the policy now and then", "code", "none"),
    Row("reference, dynamic", "Multi-ref", "l(z) with a mixture of references", "code", "none"),
    Row("divergence", "f-DPO", "l(beta (f'(u_w) - f'(u_l)))", "module", "module", "papers.f_dpo.f_dpo_loss"),
    Row(
        "divergence", "Soft Preference Learning", "l(alpha (log pi_w - log pi_l) - beta (log ref_w - log ref_l))", "known",
        "loss", "papers.soft_preference.soft_preference_loss",
    ),
    Row(
        "divergence", "GPO (generalized)", "f(z): l(z), relu(1 - z), (z - 1)^2, e^{-z}, relu(1 - z)^2, s(-z)^2", "known",
        "loss", _S + "gpo_loss",
    ),
    Row("divergence", "EXO", "KL(p_theta, smoothed label) of two responses", "code", "loss", "papers.exo.exo_loss"),
    Row(
        "divergence", "chi-PO", "l(clip(beta (phi(u_w) - phi(u_l)), +-c)), phi(u) = u + log u", "known", "loss",
        _S + "chi_po_loss",
    ),
    *_withheld("divergence", "DPO-Kernels, FlipGuard, FPO, SPO (soft), QDPO"),
    *_withheld("safety", "SafeDPO, SACPO, C-DPO, ADPO"),
    Row("shift", "e-DPO (reward distillation)", "(r_w - r_l - z)^2", "known", "loss", _S + "reward_distillation_loss"),
    Row("shift", "NS-DPO", "g^age l(z)", "known", "weight", _S + "ns_dpo_loss"),
    Row("length", "R-DPO", "l(z + alpha (n_w - n_l))", "known", "loss", "papers.r_dpo.r_dpo_loss"),
    Row("length", "LN-DPO", "l(beta (x_w / n_w - x_l / n_l))", "code", "loss", "papers.ln_dpo.ln_dpo_loss"),
    Row(
        "length", "SamPO", "l(z) with x over min(n_w, n_l) tokens drawn from each response", "known", "weight",
        _S + "sampo_mask",
    ),
    Row("length", "LD-DPO", "l(z), tokens beyond the shared length weigh alpha", "code", "loss", "papers.ld_dpo.ld_dpo_loss"),
    Row("likelihood", "APO-zero", "s(-beta x_w) + s(beta x_l)", "code", "loss", "papers.apo_anchored.apo_loss"),
    Row("likelihood", "APO-down", "s(beta x_w) + s(-z)", "code", "loss", "papers.apo_anchored.apo_loss"),
    Row("likelihood", "DPO-Positive", "l(beta (D - lambda relu(-x_w)))", "code", "loss", "papers.dpop.dpop_loss"),
    Row("likelihood", "Flex-DPO", "l(beta_w x_w - beta_l x_l)", "known", "loss", _S + "flex_dpo_loss"),
    Row("likelihood", "DPO-Shift", "l(beta x_w - f beta x_l), 0 < f < 1", "known", "loss", _S + "dpo_shift_loss"),
    Row("several", "Curri-DPO", "", "module", "module", "papers.curry_dpo"),
    *_withheld(
        "several",
        "ROPO, ULMA, SPO (minimax), BoNBoN, Nash-MD, IPO-MD, SRPO, DNPO, PerpCorrect, SPA, MPO, fDPO, sDPO, "
        "Omni-DPO, SCDPO, CPO (chain), RDPO, DAPO, MAPO, EURUS, FACTALIGN, ETO, AgentQ, PAFT, "
        "Linear Alignment, ICDPO, APL, divAPO, ADPO (active), LIFT, LongPO",
    ),
    *_withheld("several", "SDPO (segments)", "weight"),
)  # fmt: skip
