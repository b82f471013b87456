"""Policy objectives over tokens, and the weights and masks that go with them. Kernels: ``csrc/policy``; formulas:
``csrc/math/policy.h`` and ``csrc/math/importance.h``."""

import math
import re
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import accumulator, check_ends, check_layout, check_tensors, number, same_device
from ._call import call, keeps_graph, no_double_backward, undivided, validation
from .types import LossOutput

_OPS = torch.ops.prefkern
_loss, _loss_fwd = _OPS.policy_loss.default, _OPS.policy_loss_fwd.default
_loss_backward, _loss_backward_ = _OPS.policy_loss_backward.default, _OPS.policy_loss_backward_.default
_importance_weights, _off_policy_mask = _OPS.importance_weights.default, _OPS.off_policy_mask.default

# In the order of the enumerations of csrc/math.
KINDS = ("clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "trl-grpo",
    "trl-dr_grpo",
)
KL_KINDS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")
ANCHOR_LOSSES = ("shaped", "nll")
METRICS = (
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "kl",
    "entropy",
    "tokens",
    "sequences",
)
WEIGHT_LEVELS = ("token", "sequence", "geometric")
WEIGHT_MODES = ("truncate", "mask")

Kind = Literal["clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum", "trl-grpo", "trl-dr_grpo"
]
Kl = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kind: Kind = "clip",
    eps_low: float | Tensor = 0.2,
    eps_high: float | Tensor = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
    scale: float | None = None,
    token_weight: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl: Kl = "k3",
    kl_clamp: float | None = None,
    kl_ratio: bool = False,
    ratio_clamp: float | tuple[float | None, float | None] | None = 20.0,
    anchor: Tensor | None = None,
    anchor_gamma: float = 0.1,
    anchor_loss: Literal["shaped", "nll"] = "shaped",
    entropy: Tensor | None = None,
) -> LossOutput:
    r"""A policy objective with its metrics, to be minimised, in one pass over the tokens.

    Per token, with :math:`d = \log\pi - \log\pi_\mathrm{old}`, the advantage A, the token's weight w, the log-ratio
    :math:`r = d`, or a mean of the sequence where the kind says so, and :math:`\rho = \exp(\mathrm{clamp}(r, -C, C))`, the loss
    is :math:`w\,l + \beta\,\mathrm{KL}` with l by ``kind``:

    - ``"clip"`` (PPO, GRPO, DAPO): :math:`\max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h))`, where A < 0
      at most :math:`-A c` if ``dual_clip`` is c. ``delta`` puts :math:`\min(\rho, \delta)` for the first :math:`\rho` (TRL).
    - ``"cispo"``: :math:`-\mathrm{sg}(\mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h))\, A \log\pi`. TRL's absolute cap K:
      ``eps_low=1, eps_high=K - 1``.
    - ``"reinforce"`` (GPG): :math:`-A \log\pi`.
    - ``"sapo"``: :math:`-A\,(4 / \tau)\,\mathrm{sigmoid}(\tau(\rho - 1))` with
      :math:`\tau` ``tau_pos`` where A > 0, else ``tau_neg``.
    - ``"gspo"``: clip, with r the mean of d over the sequence's tokens: one loss per sequence, which each of its tokens has.
      The mean over sequences (TRL) is ``agg="trl-grpo"``, or ``"seq-mean-token-mean"``. verl's has ``ratio_clamp=(None, 10)``.
    - ``"gspo_token"``: the same value, but the gradient of :math:`\mathrm{sg}(\rho)\,\pi / \mathrm{sg}(\pi)`; token advantages.
    - ``"gmpo"`` (verl's geo_mean): :math:`-A \rho` with :math:`r = \sum_t b_t / (n + 10^{-8})`, where b is d, at most
      :math:`\epsilon_h` where A > 0, at least :math:`-\epsilon_l` where A < 0. One loss per sequence, as for gspo. verl
      averages as ``"trl-grpo"`` does, and weighs a sequence by the geometric mean of its token weights.
    - ``"none"``: 0, so that only the KL remains.

    KL, with :math:`x = \log\pi_\mathrm{ref} - \log\pi`: ``"k1"`` :math:`-x`, ``"abs"`` :math:`|x|`, ``"k2"`` :math:`x^2 / 2`,
    ``"k3"`` :math:`e^x - 1 - x`; with a ``"+"`` it has that value and the gradient of k2.

    The gradient is 0 where a bound of the ratio, of r, of the dual clip or of the KL is passed; at the bound itself it flows.

    How tokens are summed up (``agg``), with n the tokens of a sequence that count and S the number of sequences that have any:

    ============================  ==================================================================================
    ``token-mean``                sum / number of tokens (TRL's dapo and cispo: with ``norm`` the global number)
    ``seq-mean-token-mean``       sum over sequences of sum / (n + 1e-8), / S
    ``seq-mean-token-sum``        sum / S
    ``seq-mean-token-sum-norm``   sum / S / scale (default T); verl's Dr. GRPO
    ``token-sum``                 sum
    ``trl-grpo``                  sum over sequences of sum / max(1, n), / B: empty sequences count in B
    ``trl-dr_grpo``               sum / (B scale), where TRL's scale is max_completion_length
    ============================  ==================================================================================

    Args:
        logp: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU); computed
            in float32 (float64). The only argument with a gradient: all others are constants, even if they require one.
        old_logp: shaped like ``logp``; any floating dtype, as are all tensors of numbers here. May be None for ``"reinforce"``
            and ``"none"``, whose ratio metrics are then those of equal policies.
        advantages: ``[B]``, or shaped like ``logp`` (which wins where a packed batch has as many tokens as sequences) unless
            the loss is one per sequence. Not looked at for ``"none"``.
        mask: bool, shaped like ``logp``; True counts. None: every token counts. What lies outside is never looked at: NaN
            there changes nothing, and its gradient is exactly 0.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.
        eps_low, eps_high: the bounds of the ratio, for gmpo of its logarithm; DAPO uses 0.2 and 0.28. Numbers, or tensors
            ``[B]``, or (not for gspo) shaped like ``logp``.
        dual_clip: :math:`c > 1`, or None; verl uses 3.
        delta: TRL's two-sided clipping, or None.
        norm: replaces the count of tokens, of S, of B (or the 1 of token-sum) in the denominator: a number, or a tensor of
            one element on the device of ``logp``, which costs no synchronisation. 0 gives 0.
        token_weight: ``[B]``, or shaped like ``logp``: multiplies l and its gradient, not the KL. Importance weights, an
            entropy mask, a weight per token.
        ref_logp: shaped like ``logp``. Given with ``beta = 0`` it only feeds the metric.
        beta: weight of the KL.
        kl_clamp: the KL is clamped to [-c, c], without gradient outside unless the estimate has a ``"+"``. verl: 10.
        kl_ratio: multiply the KL by :math:`\rho`, with its gradient (TRL's use_bias_correction_kl).
        ratio_clamp: C, or None (TRL), or (low, high) with None for no bound.
        anchor: bool ``[B]``, sequences that no known policy sampled. They have no ratio, whatever the kind; l is
            :math:`-A\, p / (p + g)` with the probability p and g ``anchor_gamma``, or :math:`-A \log\pi` with
            ``anchor_loss="nll"``. Their ``old_logp`` is not looked at, and ``kl_ratio`` does not apply to them.
        entropy: shaped like ``logp``, only for the metric.

    Returns:
        LossOutput(loss, metrics). Metrics are 0-d, of the loss's dtype, without gradient, over the tokens that count.
        Over those that are no anchors: ``clip_fraction_low`` (share with A < 0 and the ratio below its bound),
        ``clip_fraction_high`` (A > 0, above; for cispo both with any A; for gmpo the bounds of d), ``clip_fraction_dual``
        (A < 0, the dual bound or delta holds the loss), ``ratio_mean``, ``ratio_min``, ``ratio_max`` (of :math:`\rho`), and
        ``approx_kl`` (mean of :math:`e^d - 1 - d`). Over all: ``kl`` (mean, without kl_ratio's factor; 0 without ``ref_logp``),
        ``entropy`` (mean; 0 if not given), ``tokens`` and ``sequences``, how many count. If none does, everything is 0. NaN
        inside the mask makes the loss NaN, and the gradient of that token (for losses of a sequence, of all its tokens that
        have one).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens``, bounds in a tensor
            and ``norm`` in a tensor are always found on the CPU; on CUDA what they concern comes out NaN (with wrong
            ``cu_seqlens`` or ``norm`` loss and gradient, with a wrong bound those of its tokens), or it raises under
            ``prefkern.set_validation(True)``. Under that, a log-prob inside the mask that is not finite is an error too, on
            every device.
    """
    check_tensors(logp=logp)
    tensors, options = arguments(
        old_logp, advantages, mask, cu_seqlens, kind, eps_low, eps_high, dual_clip, delta, tau_pos, tau_neg, agg, norm, scale,
        token_weight, ref_logp, beta, kl, kl_clamp, kl_ratio, ratio_clamp, anchor, anchor_gamma, anchor_loss, entropy,
    )  # fmt: skip
    if validation() and not torch.compiler.is_compiling():
        validate(logp, tensors, kind)
    loss, metrics = _run(logp, (*tensors.values(), *options))
    return LossOutput(loss, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def arguments(
    old_logp: Tensor | None, advantages: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, kind: Kind,
    eps_low: float | Tensor, eps_high: float | Tensor, dual_clip: float | None, delta: float | None, tau_pos: float,
    tau_neg: float, agg: Aggregation, norm: float | Tensor | None, scale: float | None, token_weight: Tensor | None,
    ref_logp: Tensor | None, beta: float, kl: Kl, kl_clamp: float | None, kl_ratio: bool,
    ratio_clamp: float | tuple[float | None, float | None] | None, anchor: Tensor | None, anchor_gamma: float,
    anchor_loss: Literal["shaped", "nll"], entropy: Tensor | None,
) -> tuple[dict[str, Tensor | None], tuple[float, ...]]:  # fmt: skip
    """What :func:`policy_loss` is told beside logp, as its op takes it: tensors without gradients, then numbers, both in the
    order of the schema. All that can be seen without the log-probs' shape is checked."""
    if kind != "none":
        check_tensors(advantages=advantages)
    tensors = {
        "old_logp": old_logp, "advantages": None if kind == "none" else advantages, "mask": mask, "cu_seqlens": cu_seqlens,
        "ref_logp": ref_logp, "token_weight": token_weight, "eps_low": eps_low if isinstance(eps_low, Tensor) else None,
        "eps_high": eps_high if isinstance(eps_high, Tensor) else None, "anchor": anchor, "entropy": entropy,
        "norm": norm if isinstance(norm, Tensor) else None,
    }  # fmt: skip
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            check_tensors(**{name: t})
        if t.requires_grad:
            tensors[name] = t.detach()
    clamp = ratio_clamp if isinstance(ratio_clamp, tuple) else (ratio_clamp, ratio_clamp)
    if len(clamp) != 2:
        raise ValueError(f"ratio_clamp is {ratio_clamp!r}; a number, a pair or None is expected")
    low, high = (_bound("ratio_clamp", c) for c in clamp)
    flags = (1 if kl_ratio else 0) + 2 * choice("anchor_loss", anchor_loss, ANCHOR_LOSSES)
    options = (
        choice("kind", kind, KINDS),
        choice("agg", agg, AGGREGATIONS),
        choice("kl", kl, KL_KINDS),
        flags,
        0.2 if tensors["eps_low"] is not None else number("eps_low", eps_low, "a number or a torch.Tensor"),
        0.2 if tensors["eps_high"] is not None else number("eps_high", eps_high, "a number or a torch.Tensor"),
        _bound("dual_clip", dual_clip),
        _bound("delta", delta),
        number("tau_pos", tau_pos),
        number("tau_neg", tau_neg),
        low if isinstance(ratio_clamp, tuple) and clamp[0] is not None else -low,
        high,
        number("beta", beta),
        _bound("kl_clamp", kl_clamp),
        number("anchor_gamma", anchor_gamma),
        _scale(scale),
        -1.0 if norm is None or tensors["norm"] is not None else _norm(norm),
    )
    return tensors, options


def _run(logp: Tensor, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Loss and metrics, by the op that costs least."""
    if logp.dtype in (torch.bfloat16, torch.float16):
        logp = logp.float()
    if not (logp.requires_grad and torch.is_grad_enabled()):
        loss, metrics, *_ = call(_loss_fwd, logp, *constants, False)
    elif torch.compiler.is_compiling():
        loss, metrics, *_ = call(_loss, logp, *constants, True)
    else:
        loss, metrics = call(_PolicyLoss.apply, logp, constants)
    return loss, metrics


def masked_aggregate(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The values of tokens as one number, 0-d, summed up as ``agg`` of :func:`policy_loss` says: for losses of one's own.

    ``values`` is ``[B, T]`` or packed ``[N]``, and what gets the gradient. Everything else, and what is raised, as there.
    """
    check_tensors(values=values)
    check_layout(cu_seqlens, values, "values", mask)
    tensor = norm.detach() if isinstance(norm, Tensor) else None
    numbers = (_scale(scale), -1.0 if norm is None or tensor is not None else _norm(norm))
    constants = aggregation(mask, cu_seqlens, tensor, choice("agg", agg, AGGREGATIONS), *numbers)
    try:
        loss, _ = _run(values, constants)
    except (ValueError, TypeError) as error:
        raise type(error)(re.sub(r"\blogp\b", "values", str(error))) from None
    return loss


def aggregation(
    mask: Tensor | None, cu_seqlens: Tensor | None, norm_tensor: Tensor | None, agg: int, scale: float, norm: float
) -> tuple[Any, ...]:
    """The constants with which the op's loss is the sum of its values: without advantages that of "reinforce" is the log-prob
    itself."""
    modes = (KINDS.index("reinforce"), agg, 0, 0)
    off = (0.2, 0.2, math.inf, math.inf, 1.0, 1.0, -math.inf, math.inf, 0.0, math.inf, 1.0)  # options without effect here
    return (None, None, mask, cu_seqlens, *(None,) * 6, norm_tensor, *modes, *off, scale, norm)


def kl_penalty(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kl: Kl = "k3",
    kl_clamp: float | None = None,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """An estimate of KL(policy || reference), 0-d: the KL of :func:`policy_loss` alone. The gradient goes to ``logp``.

    All arguments, and what is raised, as there.
    """
    check_tensors(logp=logp, ref_logp=ref_logp)
    return policy_loss(
        logp, None, None, mask, cu_seqlens=cu_seqlens, kind="none", agg=agg, norm=norm, scale=scale, ref_logp=ref_logp,
        beta=1.0, kl=kl, kl_clamp=kl_clamp,
    ).loss  # fmt: skip


def importance_weights(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    level: Literal["token", "sequence", "geometric"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
    log_clamp: float | None = 20.0,
    normalize: bool = False,
) -> Tensor:
    r"""Weights that correct for an engine that samples with other probabilities than the trainer computes.

    With :math:`u = \log\pi_\mathrm{old} - \log\pi_\mathrm{rollout}` of the token, summed over the tokens of the sequence
    (``level="sequence"``: the ratio of the whole sequence), or their mean (``"geometric"``):

    .. math:: w = \exp(\mathrm{clamp}(u, -C, C))

    ``mode="truncate"`` (TIS) clips w to [clip_min, clip_max]; ``"mask"`` (IcePop, MIS) makes it 0 outside of them. verl: token,
    truncate, 2; TRL: sequence, mask, 3, no log_clamp.

    Args:
        old_logp: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU).
        rollout_logp: shaped like ``old_logp``.
        mask: bool, shaped like ``old_logp``; True counts. What lies outside is never looked at.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.
        clip_min, clip_max, log_clamp: None for no bound.
        normalize: divide by the mean weight, of the tokens or of the sequences that have any, unless that is at most 1e-8.

    Returns:
        The weights, shaped like ``old_logp``, float32 (float64): ``token_weight`` of :func:`policy_loss`. 0 outside the mask,
        NaN where one of the two is NaN. Constants: no gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` are always found on
            the CPU; on CUDA weights of sequences come out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(old_logp=old_logp, rollout_logp=rollout_logp)
    check_layout(cu_seqlens, old_logp, "old_logp", mask)
    arguments = (choice("level", level, WEIGHT_LEVELS), choice("mode", mode, WEIGHT_MODES))
    return call(
        _importance_weights, old_logp.detach(), rollout_logp.detach(), mask, cu_seqlens, *arguments,
        -math.inf if clip_min is None else number("clip_min", clip_min, "a number or None"), _bound("clip_max", clip_max),
        _bound("log_clamp", log_clamp), bool(normalize),
    )  # fmt: skip


def off_policy_mask(
    advantages: Tensor,
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Which sequences to keep (TRL, DeepSeek-V3.2): all but those with A < 0 and
    :math:`\mathrm{mean}_t(\log\pi_\mathrm{rollout} - \log\pi)` above ``threshold``.

    Args:
        advantages: ``[B]``.
        old_logp: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``: the old or the current policy; no gradient.
        rollout_logp: shaped like ``old_logp``. A token that one of the two could not score (NaN) counts as one without
            mismatch.
        mask: bool, shaped like ``old_logp``; True counts. What lies outside is never looked at.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.

    Returns:
        bool ``[B]``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` are always found on
            the CPU; on CUDA no sequence is kept then, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(advantages=advantages, old_logp=old_logp, rollout_logp=rollout_logp)
    check_layout(cu_seqlens, old_logp, "old_logp", mask)
    arguments = (advantages.detach(), old_logp.detach(), rollout_logp.detach(), mask, cu_seqlens)
    return call(_off_policy_mask, *arguments, number("threshold", threshold))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _bound(name: str, value: float | None) -> float:
    """A bound that may be missing: infinity then."""
    return math.inf if value is None else number(name, value, "a number or None")


def _scale(value: float | None) -> float:
    """0 stands for the default, so that it must not come from outside."""
    if value is None:
        return 0.0
    scale = number("scale", value, "a number or None")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {value}; it must be finite and positive, or None")
    return scale


def _norm(value: Any) -> float:
    """A negative one stands for none, so that it must not come from outside."""
    norm = number("norm", value, "a number, a torch.Tensor or None")
    if not 0 <= norm < math.inf:
        raise ValueError(f"norm is {value}; it must be finite and not negative, or None")
    return norm


def validate(logp: Tensor, tensors: dict[str, Any], kind: str) -> None:
    """The checks of ``prefkern.set_validation``."""
    if logp.is_cuda:
        _validate(logp, tensors, kind)
    _validate_finite(logp, tensors)


def _validate(logp: Tensor, tensors: dict[str, Any], kind: str) -> None:
    """What the kernels cannot say on CUDA, at the price of a synchronisation."""
    if tensors["cu_seqlens"] is not None:
        check_ends(tensors["cu_seqlens"], logp, "logp")
    for name, most in (("eps_low", math.inf if kind == "gmpo" else 1.0), ("eps_high", math.inf)):
        t, mask = tensors[name], tensors["mask"]
        if t is not None:
            counts = t[mask] if mask is not None and mask.shape == t.shape else t
            if not bool(((counts >= 0) & (counts <= most) & (counts < math.inf)).all()):
                accepted = "between 0 and 1" if most == 1 else "finite and not negative"
                raise ValueError(f"{name} has elements that are not {accepted}")
    norm = tensors["norm"]
    if norm is not None and not bool(((norm >= 0) & (norm < math.inf)).all()):
        raise ValueError(f"norm is {norm.item()}; it must be finite and not negative")


def _validate_finite(logp: Tensor, tensors: dict[str, Any]) -> None:
    """ValueError that names the first log-prob inside the mask which is not finite. An anchor's old_logp is not looked at."""
    mask, anchor = tensors["mask"], tensors["anchor"]
    counts = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    for name, t in (("logp", logp), ("old_logp", tensors["old_logp"]), ("ref_logp", tensors["ref_logp"])):
        if t is None or t.shape != logp.shape or counts.shape != logp.shape:
            continue  # the op says what is wrong
        looked_at = counts & ~anchor[:, None] if name == "old_logp" and anchor is not None and logp.dim() == 2 else counts
        if name == "old_logp" and anchor is not None and logp.dim() == 1:
            continue
        bad = looked_at & ~t.isfinite()
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{at} is {t[tuple(at)].item()}; every log-prob inside the mask must be finite")


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _fake_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
    lows: Tensor | None,
    highs: Tensor | None,
    anchor: Tensor | None,
    entropy: Tensor | None,
    norm_tensor: Tensor | None,
    *options: float,
) -> tuple[Tensor, ...]:
    tokens = {"old_logp": old_logp, "mask": mask, "ref_logp": ref_logp, "entropy": entropy}
    others = {"token_weight": token_weight, "eps_low": lows, "eps_high": highs, "anchor": anchor, "norm": norm_tensor}
    same_device("logp", logp, **tokens, advantages=advantages, cu_seqlens=cu_seqlens, **others)
    expected = 2 if cu_seqlens is None else 1
    torch._check(logp.dim() == expected, lambda: f"logp has shape {list(logp.shape)}; expected [B, T], or [N] with cu_seqlens")
    for name, t in tokens.items():
        torch._check(t is None or t.dim() == expected, lambda name=name: f"{name} must be shaped like logp")
    unnormalised = logp.new_empty(logp.shape if options[-1] else (0,))
    return logp.new_empty(()), logp.new_empty((len(METRICS),)), unnormalised, logp.new_empty(())


for _name in ("policy_loss", "policy_loss_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_loss)


@torch.library.register_fake("prefkern::policy_loss_backward")
def _fake_backward(g_loss: Tensor, unnormalised: Tensor, inverse_norm: Tensor) -> Tensor:
    return unnormalised.new_empty(unnormalised.shape)


@torch.library.register_fake("prefkern::policy_loss_backward_")
def _fake_backward_inplace(g_loss: Tensor, unnormalised: Tensor, inverse_norm: Tensor) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        raise ValueError("with_grad is False, but logp requires a gradient")
    _, metrics, unnormalised, inverse_norm = output
    ctx.save_for_backward(unnormalised, inverse_norm)
    ctx.mark_non_differentiable(metrics, unnormalised, inverse_norm)
    ctx.set_materialize_grads(False)


def _logp_grad(ctx: Any, g_loss: Tensor | None) -> Tensor | None:
    if g_loss is None:
        return None
    return _loss_backward(undivided(g_loss), *ctx.saved_tensors)


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (_logp_grad(ctx, g_loss), *(None,) * 29)


class _PolicyLoss(torch.autograd.Function):
    """What the registered formula does, for eager mode: without the op's Python autograd registration, and with one
    argument for all constants, a call costs a third."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        loss, metrics, unnormalised, inverse_norm = _loss_fwd(logp, *constants, True)
        ctx.save_for_backward(unnormalised, inverse_norm)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        if g_loss is None or torch.is_grad_enabled() or keeps_graph():
            return _logp_grad(ctx, g_loss), None
        unnormalised, inverse_norm = ctx.saved_tensors  # nobody will ask for them again
        _loss_backward_(g_loss, unnormalised, inverse_norm)
        return unnormalised, None


torch.library.register_autograd("prefkern::policy_loss", _backward, setup_context=_setup)
no_double_backward("policy_loss_backward")


@torch.library.register_fake("prefkern::importance_weights")
def _fake_weights(
    old_logp: Tensor, rollout_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *options: float
) -> Tensor:
    same_device("old_logp", old_logp, rollout_logp=rollout_logp, mask=mask, cu_seqlens=cu_seqlens)
    return old_logp.new_empty(old_logp.shape, dtype=accumulator(old_logp))


@torch.library.register_fake("prefkern::off_policy_mask")
def _fake_off_policy(
    advantages: Tensor, logp: Tensor, rollout_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, threshold: float
) -> Tensor:
    same_device("old_logp", logp, advantages=advantages, rollout_logp=rollout_logp, mask=mask, cu_seqlens=cu_seqlens)
    return logp.new_empty(advantages.shape, dtype=torch.bool)
