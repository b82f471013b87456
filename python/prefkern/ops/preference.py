"""Losses of preference pairs and of single judged responses. Kernels: ``csrc/preference``; formulas:
``csrc/math/preference.h``."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, number, same_device
from ._call import call, keeps_graph, no_double_backward, validation
from .types import LossOutput

_OPS = torch.ops.prefkern
_loss, _loss_fwd = _OPS.preference_loss.default, _OPS.preference_loss_fwd.default
_loss_backward, _loss_backward_ = _OPS.preference_loss_backward.default, _OPS.preference_loss_backward_.default
_posterior = _OPS.label_posterior.default

# In the order of the enumerations of csrc/math/preference.h.
_KERNEL_KINDS = (
    "sigmoid", "hinge", "squared", "exo_pair", "nca_pair", "bco_pair", "squared_targets", "apo_zero", "apo_down", "discopop",
    "dpop", "focal", "rao_kupper", "davidson", "exponential", "truncated_quadratic", "savage", "cal_dpo", "linear", "asft",
    "robust",
)  # fmt: skip
_KERNEL_KIND = {name: place for place, name in enumerate(_KERNEL_KINDS)} | {
    "ipo": _KERNEL_KINDS.index("squared"),
    "sppo_hard": _KERNEL_KINDS.index("squared_targets"),
}
KINDS = (*_KERNEL_KINDS, "ipo", "sppo_hard")
UNPAIRED_KINDS = ("kto", "bco", "squared", "apo_zero")
SCORES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "log_odds", "chi", "exp")
AVERAGES = (None, "logp", "score")
REDUCTIONS = ("mean", "weighted_mean", "sum", "none")
# The op's arguments behind the log-probs that are tensors.
NAMES = (
    "ref_chosen_logp", "ref_rejected_logp", "desirable", "chosen_lengths", "rejected_lengths", "scale", "offset",
    "label_smoothing", "chosen_target", "rejected_target", "weight", "tie", "mask", "norm",
)  # fmt: skip
PAIR_TENSORS = len(NAMES)
METRICS = ("chosen_reward", "rejected_reward", "reward_margin", "accuracy", "clamped", "pairs")

Kind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "squared_targets", "apo_zero",
    "apo_down", "discopop", "dpop", "focal", "rao_kupper", "davidson", "squared", "exponential", "truncated_quadratic",
    "savage", "cal_dpo", "linear", "asft",
]  # fmt: skip
UnpairedKind = Literal["kto", "bco", "squared", "apo_zero"]
Score = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "log_odds", "chi", "exp"]
Average = Literal["logp", "score"]
Reduction = Literal["mean", "weighted_mean", "sum", "none"]

# The kinds that an option means something for.
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "dpop", "cal_dpo")
_WITHOUT_OFFSET = ("nca_pair", "squared_targets", "sppo_hard", "apo_zero", "asft")
_WITH_TARGETS = ("squared_targets", "cal_dpo")
_WITH_TIES = ("rao_kupper", "davidson")
_WITH_FACTOR = ("squared_targets", "cal_dpo", "asft")
_OWN_TARGETS = ("ipo", "sppo_hard", "cal_dpo")  # beta is in them alone
_PARAMETERS = {"discopop": "tau", "dpop": "penalty", "focal": "gamma", "rao_kupper": "nu", "davidson": "nu", "asft": "sft"}
_PARAMETER_NAMES, _NO_PARAMETER = ("tau", "penalty", "gamma", "nu", "sft"), (None,) * 5
_PARAMETER_DEFAULTS = {"tau": 0.05, "penalty": 50.0, "gamma": 0.05, "sft": 1.0}


_STAND_IN = (1.0, 0.0, 0.25, 0.0, 0.0)  # for the numbers of scale, offset, ..., where a tensor is given

# What trainers call a loss of pairs that is no kind of its own: where it is.
_ELSEWHERE = {
    "sigmoid_norm": "kind 'sigmoid' with average='score', or prefkern.papers.ln_dpo",
    "aot": "prefkern.papers.aot",
    "aot_pair": "prefkern.papers.aot with form='unpaired'",
    "aot_unpaired": "prefkern.papers.aot with form='unpaired'",
    "apo_zero_unpaired": "prefkern.unpaired_loss with kind='apo_zero'",
    "kto": "prefkern.unpaired_loss, or prefkern.papers.kto",
    "kto_pair": "prefkern.unpaired_loss, or prefkern.papers.kto",
    "bco": "prefkern.papers.bco",
    "sft": "prefkern.papers.rpo, which adds it to a loss of pairs",
    "simpo": "prefkern.papers.simpo",
    "alphapo": "prefkern.papers.cpo with alpha",
    "orpo": "prefkern.papers.orpo",
    "cpo": "prefkern.papers.cpo",
    "dpo": "kind 'sigmoid'",
    "cdpo": "kind 'sigmoid' with label_smoothing",
    "slic": "kind 'hinge', or prefkern.papers.slic",
}


def preference_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    kind: Kind = "sigmoid",
    beta: float = 0.1,
    rejected_beta: float | None = None,
    scale: float | Tensor = 1.0,
    score: Score = "reverse_kl",
    alpha: float = 0.5,
    exp_cap: float = 80.0,
    max_p: float | None = None,
    average: Average | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    offset: float | Tensor = 0.0,
    label_smoothing: float | Tensor = 0.0,
    chosen_target: float | Tensor | None = None,
    rejected_target: float | Tensor | None = None,
    weight: Tensor | None = None,
    tie: Tensor | None = None,
    mask: Tensor | None = None,
    tau: float | None = None,
    penalty: float | None = None,
    gamma: float | None = None,
    nu: float | None = None,
    sft: float | None = None,
    clip: float | None = None,
    factor: float = 1.0,
    reduction: Reduction = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    r"""A loss of P preference pairs with its metrics, in one pass: value, derivatives, rewards and accuracy.

    With the log-ratio :math:`x = \log\pi - \log\pi_\mathrm{ref}` of a response and its score :math:`s(x)`,
    :math:`u_w = c\,\beta\,s_w` of the chosen response, :math:`u_l = c\,\beta_l\,s_l` of the rejected one, c the ``scale``,
    :math:`z = u_w - u_l - o` with the ``offset`` o, :math:`\sigma` the logistic function, :math:`\ell(t) = -\log\sigma(t)` and
    the label smoothing :math:`\varepsilon`, the loss of a pair is by ``kind``:

    - ``"sigmoid"`` (DPO, and much else): :math:`(1 - \varepsilon)\,\ell(z) + \varepsilon\,\ell(-z)`: cDPO's, which TRL's
      `sigmoid` has not had since 0.29. A soft label p is :math:`\varepsilon = 1 - p`, one per pair.
    - ``"robust"`` (rDPO): :math:`((1 - \varepsilon)\,\ell(z) - \varepsilon\,\ell(-z)) / (1 - 2\varepsilon)`,
      :math:`\varepsilon < 1/2`; may be negative.
    - ``"hinge"`` (SLiC): :math:`\max(0, 1 - z)`. ``"truncated_quadratic"``: its square. ``"exponential"``: :math:`e^{-z}`.
      ``"savage"``: :math:`\sigma(-z)^2`. ``"squared"``: :math:`z^2`. ``"linear"``: :math:`-z`.
    - ``"ipo"``: :math:`(c\,(s_w - s_l) - 1/(2\beta) - o)^2`. TRL divides by length (``average="score"``), OpenRLHF does not.
    - ``"exo_pair"``: :math:`\sigma \log\frac{\sigma}{1 - \varepsilon} + (1 - \sigma) \log\frac{1 - \sigma}{\varepsilon}` of z;
      :math:`0 < \varepsilon < 1` is required (EXO: 1e-3).
    - ``"nca_pair"``: :math:`\ell(u_w) + \frac12 \ell(-u_w) + \frac12 \ell(-u_l)`.
    - ``"bco_pair"``: :math:`\ell(u_w - o) + \ell(o - u_l)`; o is BCO's reward shift, 0 in TRL's DPO trainer.
    - ``"squared_targets"``: :math:`f ((u_w - t_w)^2 + (u_l - t_l)^2)` with ``factor`` f and targets t (SPPO, GPO, ...).
    - ``"sppo_hard"``: :math:`(s_w - 1/(2\beta))^2 + (s_l + 1/(2\beta))^2`.
    - ``"cal_dpo"``: that plus ``"sigmoid"``, with no :math:`\beta` inside (targets may be given).
    - ``"apo_zero"``, ``"apo_down"`` (anchored preference optimisation): :math:`1 - \sigma(u_w) + \sigma(u_l)`,
      :math:`\sigma(u_w) + 1 - \sigma(z)`.
    - ``"discopop"``: :math:`(1 - m)\,\ell(z) + m e^{-z}`, :math:`m = \sigma(z / \tau)`, through which the gradient flows.
    - ``"dpop"`` (Smaug): sigmoid of :math:`z - \lambda \max(0, -u_w)` with ``penalty`` :math:`\lambda`.
    - ``"focal"``: :math:`\sigma(z)^\gamma\,\ell(z)`, the factor not detached.
    - ``"rao_kupper"``, ``"davidson"``: DPO with ties, ``nu`` :math:`\nu`: :math:`-\log` of the probability of a win,
      :math:`\sigma(z - \log\nu)` and :math:`1 / (1 + e^{-z} + 2\nu e^{-z/2})`, or, for pairs in ``tie``, of a tie,
      :math:`(\nu^2 - 1)\,\sigma(z - \log\nu)\,\sigma(-z - \log\nu)` and :math:`2\nu e^{-z/2}` times that of the win.
    - ``"asft"``: :math:`-a\,x_w + f (\ell(u_w) + \ell(-u_l))`, with ``sft`` a; its score is ``"log_odds"``.

    Scores, those of divergences being 0 at the reference: ``"reverse_kl"`` x; ``"forward_kl"`` :math:`1 - e^{-x}`;
    ``"js_divergence"`` :math:`\log 2 - \log(1 + e^{-x})`; ``"alpha_divergence"`` :math:`(1 - e^{-\alpha x}) / \alpha` (the
    convention of the f-DPO paper; TRL's coefficient is :math:`1 - \alpha`); ``"log_odds"`` :math:`x - \log(1 - e^x)` (ORPO,
    ASFT; x < 0); ``"chi"`` :math:`x + e^x` (chi-PO); ``"exp"`` :math:`e^x` (SimPER). Stable for every x.

    Args:
        chosen_logp, rejected_logp: ``[P]`` log-probs of whole responses: sums over tokens, or means. float32, bfloat16 or
            float16 (float64 on the CPU); computed in float32 (float64). The only arguments with a gradient. The two halves of a
            concatenated batch are ``logp.chunk(2)``.
        ref_chosen_logp, ref_rejected_logp: ``[P]``, of the reference model; None for 0, without a reference. Where the sums are
            large, :func:`sequence_sum` with ``minus`` subtracts per token and loses less.
        beta: positive. ``rejected_beta``: that of the rejected side, None for the same (DPO-Shift, Flex-DPO).
        scale, offset, label_smoothing, chosen_target, rejected_target: a number, a tensor of one element (no synchronisation),
            or ``[P]``; constants.
        alpha: of ``"alpha_divergence"``. exp_cap: exponents of scores are held there, with gradient 0 above; ``clamped``
            counts.
        max_p: of ``"log_odds"``: where :math:`e^x` is above, the score is :math:`x - \log(1 - p_\max)`.
        average: ``"logp"`` divides x by the response's length before the score, ``"score"`` the score.
        chosen_lengths, rejected_lengths: ``[P]`` numbers of tokens, integers or floats; needed for ``average``, else None.
        weight: ``[P]``, not negative, constant: multiplies the pair's loss.
        tie: bool ``[P]``, of kinds that know ties: pairs judged equal.
        mask: bool ``[P]``; True counts. What does not count is never looked at: NaN there changes nothing.
        tau: of discopop, 0.05. penalty: of dpop, 50. gamma: of focal, 0.05. nu: of kinds with ties, no default. sft: of asft,
            1.
        clip: z is held in [-clip, clip], with gradient 0 outside.
        reduction: ``"mean"`` over the pairs that count, ``"weighted_mean"`` (over their weights), ``"sum"``, or ``"none"``:
            ``[P]``.
        norm: what the sum is divided by instead: a number or a tensor of one element, for a global mean over ranks or
            accumulated batches. 0 gives 0.

    Returns:
        LossOutput(loss, metrics). Metrics, without gradient, over the pairs that count: ``chosen_reward`` and
        ``rejected_reward`` (means of :math:`\beta s`), ``reward_margin``, ``accuracy`` (share of pairs with the larger chosen
        reward), ``clamped`` and ``pairs`` (counts). Without pairs everything is 0. NaN in a pair that counts makes the loss
        NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Values inside tensors are always checked on
            the CPU; on CUDA their pairs come out NaN. Under ``prefkern.set_validation(True)`` a log-prob that is NaN, or a
            pair whose both sides are -inf, is an error on every device.
    """
    check_tensors(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    arguments = pair_arguments(
        ref_chosen_logp, ref_rejected_logp, kind, beta, rejected_beta, scale, score, alpha, exp_cap, max_p, average,
        chosen_lengths, rejected_lengths, offset, label_smoothing, chosen_target, rejected_target, weight, tie, mask, tau,
        penalty, gamma, nu, sft, clip, factor, reduction, norm,
    )  # fmt: skip
    return _run(chosen_logp, rejected_logp, *arguments)


def pair_arguments(
    ref_chosen_logp: Tensor | None, ref_rejected_logp: Tensor | None, kind: str, beta: float, rejected_beta: float | None,
    scale: float | Tensor, score: Score, alpha: float, exp_cap: float, max_p: float | None, average: str | None,
    chosen_lengths: Tensor | None, rejected_lengths: Tensor | None, offset: float | Tensor, label_smoothing: float | Tensor,
    chosen_target: float | Tensor | None, rejected_target: float | Tensor | None, weight: Tensor | None, tie: Tensor | None,
    mask: Tensor | None, tau: float | None, penalty: float | None, gamma: float | None, nu: float | None, sft: float | None,
    clip: float | None, factor: float, reduction: str, norm: float | Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What :func:`preference_loss` is told beside log-probs, as :func:`constants` takes it; all but tensors is checked."""
    place = _kind(kind, KINDS)
    beta = number("beta", beta)
    inner = beta  # what multiplies the scores; rewards are beta s whatever the kind
    _check_kind(kind, label_smoothing, offset, chosen_target, rejected_target, factor, average, rejected_beta)
    margin, targets = _number_or_tensor("offset", offset), (chosen_target, rejected_target)
    if kind in _OWN_TARGETS:
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta is {beta}; it must be finite and positive")
        inner, half = 1.0, 0.5 / beta
        if kind == "ipo":
            margin = margin + half
        else:
            targets = (half if chosen_target is None else chosen_target, -half if rejected_target is None else rejected_target)
    other = inner if rejected_beta is None else number("rejected_beta", rejected_beta)
    rewards = (beta, beta if rejected_beta is None else other)
    score, alpha = _limit_of(score, alpha)
    given = (("label_smoothing", label_smoothing), ("chosen_target", targets[0]), ("rejected_target", targets[1]))
    values = (_number_or_tensor("scale", scale), margin, *(0.0 if t is None else _number_or_tensor(n, t) for n, t in given))
    own = (tau, penalty, gamma, nu, sft)
    without = kind not in _PARAMETERS and own == _NO_PARAMETER
    parameter = 1.0 if without else _parameter(kind, dict(zip(_PARAMETER_NAMES, own, strict=True)))
    modes = (place, _kind(score, SCORES, "score"), _average(average), _kind(reduction, REDUCTIONS, "reduction"))
    bounds = (alpha, number("exp_cap", exp_cap), _bound("max_p", max_p))
    return (
        (ref_chosen_logp, ref_rejected_logp), None, (chosen_lengths, rejected_lengths), values,
        (weight, tie, mask), norm, modes, (inner, other, *rewards),
        (*bounds, parameter, _bound("clip", clip), number("factor", factor), 1.0, 1.0),
    )  # fmt: skip


def _check_kind(
    kind: str,
    label_smoothing: float | Tensor,
    offset: float | Tensor,
    chosen_target: float | Tensor | None,
    rejected_target: float | Tensor | None,
    factor: float,
    average: str | None,
    rejected_beta: float | None,
) -> None:
    """ValueError for an option that means nothing for this kind."""
    if kind not in _SMOOTHED and not _is_zero(label_smoothing):
        _refuse("label_smoothing", label_smoothing, kind, _SMOOTHED)
    if kind in _WITHOUT_OFFSET and not _is_zero(offset):
        _refuse("offset", offset, kind, tuple(k for k in KINDS if k not in _WITHOUT_OFFSET))
    for name, target in (("chosen_target", chosen_target), ("rejected_target", rejected_target)):
        if target is not None and kind not in _WITH_TARGETS:
            _refuse(name, target, kind, _WITH_TARGETS)
    if factor != 1 and kind not in _WITH_FACTOR:
        _refuse("factor", factor, kind, _WITH_FACTOR)
    if average == "score" and kind == "asft":
        raise ValueError("average is 'score' but kind is 'asft', whose likelihood has no score; accepted: None, 'logp'")
    if rejected_beta is not None and kind in _OWN_TARGETS:
        raise ValueError(f"rejected_beta is {rejected_beta}; kind {kind!r} has one beta, in its target")


def unpaired_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    desirable: Tensor,
    *,
    kind: UnpairedKind = "kto",
    beta: float = 0.1,
    kl: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    score: Score = "reverse_kl",
    alpha: float = 0.5,
    exp_cap: float = 80.0,
    max_p: float | None = None,
    average: Average | None = None,
    lengths: Tensor | None = None,
    offset: float | Tensor = 0.0,
    weight: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    factor: float = 1.0,
    reduction: Reduction = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    r"""A loss of N single responses, each judged desirable or not, with its metrics.

    With :math:`u = c\,\beta\,s(x)` as in :func:`preference_loss`, and :math:`v = u - o` for a desirable response,
    :math:`v = o - u` for an undesirable one, by ``kind``:

    - ``"kto"``: :math:`1 - \sigma(v)`, with :math:`o = \beta \max(0, \mathrm{kl})` if ``kl`` is given. A constant, which KTO
      estimates as the mean log-ratio of mismatched pairs (:func:`prefkern.papers.kto.kto_kl`).
    - ``"apo_zero"`` (TRL's apo_zero_unpaired): :math:`1 - \sigma(v)` with o = 0.
    - ``"bco"``: :math:`\ell(v)`, with BCO's reward shift as ``offset``. Undesirable responses alone are NPO, with
      ``factor=2 / beta`` and ``offset`` :math:`-\gamma` for SimNPO's margin.
    - ``"squared"``: :math:`\frac12 (u - o)^2`, whatever the judgement (DRO: o is reward less value, :math:`\beta` its tau).

    Args:
        logp: ``[N]``, as ``chosen_logp`` there; the only argument with a gradient. ref_logp: ``[N]``, or None for 0.
        desirable: bool ``[N]``.
        kl: a number, a tensor of one element, or ``[N]``; below 0 it counts as 0. Only for ``"kto"``.
        desirable_weight, undesirable_weight: multiply the losses of each side; not negative.
        factor: multiplies all losses. Everything else: as there. ``weighted_mean`` divides by ``weight``, not by these.

    Returns:
        LossOutput(loss, metrics), metrics as there: ``chosen_reward`` is the mean reward of desirable responses,
        ``rejected_reward`` of the others, 0 without any; ``accuracy`` is the share whose reward has the sign of the judgement.

    Raises:
        ValueError, TypeError: as there.
    """
    check_tensors(logp=logp, desirable=desirable)
    arguments = unpaired_arguments(
        ref_logp, desirable, kind, beta, kl, scale, score, alpha, exp_cap, max_p, average, lengths, offset, weight,
        desirable_weight, undesirable_weight, mask, factor, reduction, norm,
    )  # fmt: skip
    return _run(logp, None, *arguments)


def unpaired_arguments(
    ref_logp: Tensor | None, desirable: Tensor, kind: str, beta: float, kl: float | Tensor | None, scale: float | Tensor,
    score: Score, alpha: float, exp_cap: float, max_p: float | None, average: str | None, lengths: Tensor | None,
    offset: float | Tensor, weight: Tensor | None, desirable_weight: float, undesirable_weight: float, mask: Tensor | None,
    factor: float, reduction: str, norm: float | Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What :func:`unpaired_loss` is told beside logp, as :func:`constants` takes it; all but tensors is checked."""
    _kind(kind, UNPAIRED_KINDS)
    shift = _number_or_tensor("offset", offset)
    beta = number("beta", beta)
    if kl is not None:
        if kind != "kto":
            _refuse("kl", kl, kind, ("kto",))
        if not _is_zero(offset):
            raise ValueError("offset and kl are given; the offset of 'kto' is beta times kl, so one of them is expected")
        if isinstance(kl, Tensor):
            shift = kl.detach().clamp_min(0) * beta
        else:
            shift = max(0.0, number("kl", kl, "a number or a torch.Tensor")) * beta
    if kind == "apo_zero" and not _is_zero(offset):
        _refuse("offset", offset, kind, ("kto", "bco", "squared"))
    score, alpha = _limit_of(score, alpha)
    place = 0 if kind == "apo_zero" else UNPAIRED_KINDS.index(kind)
    modes = (place, _kind(score, SCORES, "score"), _average(average), _kind(reduction, REDUCTIONS, "reduction"))
    bounds = (alpha, number("exp_cap", exp_cap), _bound("max_p", max_p))
    weights = (number("desirable_weight", desirable_weight), number("undesirable_weight", undesirable_weight))
    return (
        (ref_logp, None), desirable, (lengths, None), (_number_or_tensor("scale", scale), shift, 0.0, 0.0, 0.0),
        (weight, None, mask), norm, modes, (beta,) * 4, (*bounds, 1.0, math.inf, number("factor", factor), *weights),
    )  # fmt: skip


def label_posterior(margin: Tensor, reliability: float | Tensor, annotator: Tensor | None = None) -> Tensor:
    r"""How likely each of P labels is right, :math:`w = \sigma(d + \mathrm{logit}\,\eta)` (LCPO, RE-PO, equation 4).

    This is :math:`p\eta / (p\eta + (1 - p)(1 - \eta))` with :math:`p = \sigma(d)`, without its underflow. A constant: use
    :math:`1 - w` as ``label_smoothing`` of :func:`preference_loss`.

    Args:
        margin: d, ``[P]``: the loss of the opposite label less that of the given one, :math:`\beta (x_w - x_l)` for DPO.
            float32, bfloat16 or float16 (float64 on the CPU).
        reliability: :math:`\eta`, a number, or a tensor of one element, or ``[K]`` with ``annotator``; held in
            [1e-6, 1 - 1e-6].
        annotator: int64 or int32 ``[P]``, ids from 0 to K - 1.

    Returns:
        ``[P]`` float32, or float64 for float64 margins. NaN where the margin is.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A wrong id or reliability in a tensor is
            always found on the CPU; on CUDA its pairs come out NaN.
    """
    check_tensors(margin=margin)
    if annotator is not None:
        check_tensors(annotator=annotator)
    margin = margin.detach()
    if margin.dtype in (torch.bfloat16, torch.float16):
        margin = margin.float()
    if isinstance(reliability, Tensor):
        eta = reliability.detach()
    else:
        eta = margin.new_full((), number("reliability", reliability, "a number or a torch.Tensor"))
    result: Tensor = call(_posterior, margin, eta, annotator)
    return result


def _run(
    chosen: Tensor,
    rejected: Tensor | None,
    references: tuple[Tensor | None, Tensor | None],
    desirable: Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None],
    values: tuple[float | Tensor, ...],
    tensors: tuple[Tensor | None, ...],
    norm: float | Tensor | None,
    modes: tuple[int, ...],
    betas: tuple[float, ...],
    options: tuple[float, ...],
) -> LossOutput:
    """Loss and metrics, by the op that costs least."""
    fixed = constants(references, desirable, lengths, values, tensors, norm, modes, betas, options)
    chosen, rejected = _same_dtype(chosen, rejected)
    if validation() and not torch.compiler.is_compiling():
        validate_pairs(chosen, rejected, fixed)
    needs_grad = torch.is_grad_enabled() and (chosen.requires_grad or (rejected is not None and rejected.requires_grad))
    if not needs_grad:
        loss, metrics, *_ = call(_loss_fwd, chosen, rejected, *fixed, False)
    elif torch.compiler.is_compiling():
        loss, metrics, *_ = call(_loss, chosen, rejected, *fixed, True)
    else:
        loss, metrics = call(_PreferenceLoss.apply, chosen, rejected, fixed)
    return LossOutput(loss, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def constants(
    references: tuple[Tensor | None, Tensor | None],
    desirable: Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None],
    values: tuple[float | Tensor, ...],
    tensors: tuple[Tensor | None, ...],
    norm: float | Tensor | None,
    modes: tuple[int, ...],
    betas: tuple[float, ...],
    options: tuple[float, ...],
) -> tuple[Any, ...]:
    """The op's arguments between the log-probs and ``with_grad``. The first ``PAIR_TENSORS`` are tensors or None, [P] or of one
    element, in the order of the op's schema."""
    for t in (*tensors, *references, desirable, *lengths):
        if t is not None and not isinstance(t, Tensor):
            _refuse_other(tensors, references, desirable, lengths)
    refs = [t.detach() if t is not None and t.requires_grad else t for t in references]
    weight, tie, mask = [t.detach() if t is not None and t.requires_grad else t for t in tensors]
    given: list[Tensor | None] = [None] * len(values)
    numbers: list[Any] = list(values)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            given[place], numbers[place] = value.detach(), _STAND_IN[place]
    norm_tensor = norm.detach() if isinstance(norm, Tensor) else None
    norm_number = -1.0 if norm is None or isinstance(norm, Tensor) else _norm(norm)
    return (
        *refs, desirable, *lengths, *given, weight, tie, mask, norm_tensor, *modes, *betas, *numbers, *options, norm_number
    )  # fmt: skip


def _refuse_other(tensors: Any, references: Any, desirable: Any, lengths: Any) -> None:
    """TypeError that names the first of these which is neither a tensor nor None."""
    sides = ("chosen_", "rejected_") if desirable is None else ("", "")
    references_of, lengths_of = (f"ref_{side}logp" for side in sides), (f"{side}lengths" for side in sides)
    names = ("weight", "tie", "mask", *references_of, "desirable", *lengths_of)
    for name, t in zip(names, (*tensors, *references, desirable, *lengths), strict=True):
        if t is not None:
            check_tensors(**{name: t})


def _same_dtype(chosen: Tensor, rejected: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both sides in the type they are computed in."""
    low = (torch.bfloat16, torch.float16)
    if chosen.dtype in low:
        chosen = chosen.float()
    if rejected is not None and rejected.dtype != chosen.dtype:
        if rejected.dtype in low:
            rejected = rejected.float()
        if rejected.dtype != chosen.dtype:
            for name, t in (("chosen_logp", chosen), ("rejected_logp", rejected)):
                if not t.is_floating_point():
                    raise TypeError(f"{name} has dtype {t.dtype}; accepted: float32, bfloat16, float16, float64")
            both = torch.promote_types(chosen.dtype, rejected.dtype)
            chosen, rejected = chosen.to(both), rejected.to(both)
    return chosen, rejected


def _kind(value: str, accepted: tuple[str, ...], name: str = "kind") -> int:
    """The place of a name in the kernel's enumeration, or a ValueError with the nearest name."""
    if accepted is KINDS and value in _ELSEWHERE:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}; that is {_ELSEWHERE[value]}")
    place = choice(name, value, accepted)
    return _KERNEL_KIND[value] if accepted is KINDS else place


def _limit_of(score: Score, alpha: float) -> tuple[Score, float]:
    """The score, and alpha: at 0 the alpha divergence is the reverse KL."""
    alpha = number("alpha", alpha)
    return ("reverse_kl", 1.0) if score == "alpha_divergence" and abs(alpha) < 1e-6 else (score, alpha)


def _average(average: str | None) -> int:
    return choice("average", average, AVERAGES)


def _number_or_tensor(name: str, value: float | Tensor | None) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    return number(name, value, "a number or a torch.Tensor")


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _refuse(name: str, value: float | Tensor, kind: str, accepted: tuple[str, ...]) -> None:
    what = "a tensor" if isinstance(value, Tensor) else value
    raise ValueError(f"{name} is {what} but kind is {kind!r}; it means something for {', '.join(map(repr, accepted))}")


def _bound(name: str, value: float | None) -> float:
    return math.inf if value is None else number(name, value)


def _norm(norm: float) -> float:
    value = number("norm", norm, "a number, a torch.Tensor or None")
    if value < 0:
        raise ValueError(f"norm is {value}; it must be finite and not negative, or None")
    return value


def _parameter(kind: str, given: dict[str, float | None]) -> float:
    """The one number that this kind has of its own."""
    wanted = _PARAMETERS.get(kind)
    for name, value in given.items():
        if value is not None and name != wanted:
            _refuse(name, value, kind, tuple(k for k, p in _PARAMETERS.items() if p == name))
    if wanted is None:
        return 1.0
    value = given[wanted]
    if value is None:
        if wanted not in _PARAMETER_DEFAULTS:
            raise ValueError(f"{wanted} is None; kind {kind!r} needs a number")
        return _PARAMETER_DEFAULTS[wanted]
    return number(wanted, value)


def validate_pairs(chosen: Tensor, rejected: Tensor | None, fixed: tuple[Any, ...]) -> None:
    """ValueError for a pair that counts and has no loss. Waits for the device."""
    references, desirable, mask = fixed[:2], fixed[2], fixed[PAIR_TENSORS - 2]
    sides = ("chosen_", "rejected_") if desirable is None else ("", "")
    ratios = []
    for side, logp, ref in zip(sides, (chosen, rejected), references, strict=True):
        if logp is None:
            continue
        for name, t in ((f"{side}logp", logp), (f"ref_{side}logp", ref)):
            if t is None or t.shape != chosen.shape:
                continue
            bad = t.isnan() if mask is None else t.isnan() & mask
            if bad.any():
                raise ValueError(f"{name}[{int(bad.nonzero()[0, 0])}] is nan; a log-prob is expected")
        ratios.append(logp.detach() if ref is None else logp.detach() - ref)
    if len(ratios) == 2 and ratios[0].shape == ratios[1].shape:
        lost = ratios[0].isneginf() & ratios[1].isneginf()
        if mask is not None and mask.shape == lost.shape:
            lost = lost & mask
        if lost.any():
            pair = int(lost.nonzero()[0, 0])
            raise ValueError(f"chosen_logp[{pair}] and rejected_logp[{pair}] are -inf; their margin is undefined")


# ---- autograd and fake implementations -------------------------------------------------------------------------------


def _fake_loss(chosen: Tensor, rejected: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    tensors = dict(zip(NAMES, rest[:PAIR_TENSORS], strict=True))
    same_device("chosen_logp", chosen, rejected_logp=rejected, **tensors)
    torch._check(chosen.dim() == 1, lambda: f"chosen_logp has shape {list(chosen.shape)}; expected [P]")
    reduction, with_grad = rest[17], rest[-1]
    pairs = chosen.shape[0]
    sides = (1 if rejected is None else 2) if with_grad else 0
    loss = chosen.new_empty((pairs,) if reduction == REDUCTIONS.index("none") else ())
    return loss, chosen.new_empty((len(METRICS),)), chosen.new_empty((sides, pairs)), chosen.new_empty(())


for _name in ("preference_loss", "preference_loss_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_loss)


@torch.library.register_fake("prefkern::preference_loss_backward")
def _fake_backward(g_loss: Tensor, unnormalised: Tensor, inverse_norm: Tensor) -> Tensor:
    return unnormalised.new_empty(unnormalised.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        raise ValueError("with_grad is False, but chosen_logp or rejected_logp requires a gradient")
    _, metrics, unnormalised, inverse_norm = output
    ctx.save_for_backward(unnormalised, inverse_norm)
    ctx.mark_non_differentiable(metrics, unnormalised, inverse_norm)
    ctx.set_materialize_grads(False)
    ctx.paired = inputs[1] is not None


def _side_grads(ctx: Any, g_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if g_loss is None:
        return None, None
    if torch.is_grad_enabled() and not g_loss.requires_grad:  # create_graph: a second differentiation must not find a constant
        g_loss = g_loss.detach().requires_grad_()
    grads = _loss_backward(g_loss, *ctx.saved_tensors)
    return grads[0], grads[1] if ctx.paired else None


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (*_side_grads(ctx, g_loss), *(None,) * 37)


@torch.library.register_fake("prefkern::preference_loss_backward_")
def _fake_backward_inplace(g_loss: Tensor, unnormalised: Tensor, inverse_norm: Tensor) -> None:
    return None


class _PreferenceLoss(torch.autograd.Function):
    """What the registered formula does, for eager mode: without the op's Python autograd registration, and with one
    argument for all constants, a call costs a third."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor | None, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        loss, metrics, unnormalised, inverse_norm = _loss_fwd(chosen, rejected, *constants, True)
        ctx.save_for_backward(unnormalised, inverse_norm)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        ctx.paired = rejected is not None
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        if g_loss is None or torch.is_grad_enabled() or keeps_graph():
            return (*_side_grads(ctx, g_loss), None)
        unnormalised, inverse_norm = ctx.saved_tensors  # nobody will ask for them again
        _loss_backward_(g_loss, unnormalised, inverse_norm)
        sides = unnormalised.unbind(0)
        return sides[0], sides[1] if ctx.paired else None, None


@torch.library.register_fake("prefkern::label_posterior")
def _fake_posterior(margin: Tensor, reliability: Tensor, annotator: Tensor | None) -> Tensor:
    same_device("margin", margin, reliability=reliability, annotator=annotator)
    return margin.new_empty(margin.shape)


torch.library.register_autograd("prefkern::preference_loss", _backward, setup_context=_setup)
no_double_backward("preference_loss_backward")
