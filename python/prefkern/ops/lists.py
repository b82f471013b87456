"""Losses of lists of scored items, of two groups of them, and of a skew-symmetric score of two embeddings. Kernels:
``csrc/preference``; formulas: ``csrc/math/lists.h``."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, constant, integer, number, same_device
from ._call import call, no_double_backward, undivided, validation
from .types import LossOutput

_OPS = torch.ops.prefkern
_listwise, _listwise_fwd = _OPS.listwise_loss.default, _OPS.listwise_loss_fwd.default
_group, _group_fwd = _OPS.group_preference_loss.default, _OPS.group_preference_loss_fwd.default
_skew, _skew_fwd = _OPS.skew_score.default, _OPS.skew_score_fwd.default
_means, _rows_backward = _OPS.skew_row_means.default, _OPS.preference_rows_backward.default

# In the order of the enumerations of csrc/math/lists.h.
LIST_KINDS = ("plackett_luce", "lambda", "uniform", "exo", "infonca", "nca", "rrhf", "lire")
GAINS = ("exp2", "linear")
RANKS = ("labels", "scores")
NORMALIZATIONS = ("sum", "pairs")
REDUCTIONS = ("mean", "sum", "none")
VAR_SCALES = ("logratio", "reward")
LIST_METRICS = ("lists", "top1", "items")
GROUP_METRICS = ("rows", "preference", "variance")
SKEW_METRICS = ("rows", "prob", "accuracy")
_NONE = REDUCTIONS.index("none")

ListKind = Literal["plackett_luce", "lambda", "uniform", "exo", "infonca", "nca", "rrhf", "lire"]
RowReduction = Literal["mean", "sum", "none"]


def listwise_loss(
    scores: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: ListKind,
    beta: float = 1.0,
    gain: Literal["exp2", "linear"] = "exp2",
    rank: Literal["labels", "scores"] = "labels",
    normalize: Literal["sum", "pairs"] = "sum",
    label_temperature: float = 1.0,
    label_smoothing: float | None = None,
    reduction: RowReduction = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    r"""The loss of lists of K responses to one prompt each, by what their labels say of them, with its gradient, in one pass.

    With the scores s of a list, :math:`u = \beta s`, labels v of which higher is better, :math:`p = \mathrm{softmax}(u)` and a
    target t, the list's loss is by ``kind``:

    - ``"plackett_luce"``: :math:`-\sum_k [u_k - \log(e^{u_k} + \sum_{v_j < v_k} e^{u_j})]`: the likelihood of the order of the
      labels. Items of equal labels are not compared. Without labels the first item is the best.
    - ``"uniform"``: :math:`\sum_{v_i > v_j} -\log\sigma(u_i - u_j)`.
    - ``"lambda"``: the same with weights :math:`|G_i - G_j|\,|1/\log(1 + r_i) - 1/\log(1 + r_j)|`, the gain G being
      :math:`2^v - 1`, or v with ``gain="linear"``, and r the rank from 1 on by ``rank``: of the labels (TPO), or of the scores
      (LiPO-lambda), of equal ones the first being the better. The weights are constants.
    - ``"rrhf"``: :math:`\sum_{v_i > v_j} \max(0, u_j - u_i)`, the ranking term.
    - ``"exo"``: :math:`\mathrm{KL}(p \,\|\, t)`. Two items and a ``label_smoothing``: TRL's exo_pair.
    - ``"infonca"``: :math:`-\sum_i t_i \log p_i`.
    - ``"nca"``: :math:`-\sum_i [t_i \log\sigma(u_i) + \frac1n \log\sigma(-u_i)]` for n items. Two of them and
      ``label_smoothing=0``: TRL's nca_pair.
    - ``"lire"``: :math:`-\sum_i p_i v_i`; :math:`1/\beta` is its temperature.

    The target is :math:`\mathrm{softmax}(v / \mathrm{label\_temperature})`, or with a ``label_smoothing`` of e :math:`1 - e` on
    the best label and e on the others, shared out evenly in both.

    Args:
        scores: ``[B, K]`` float32, bfloat16 or float16 (float64 on the CPU). The only argument with a gradient.
        labels: ``[B, K]``, any numbers; constants. None: the order of the items, for ``"plackett_luce"``.
        mask: bool ``[B, K]``; True counts. What lies outside is never looked at, and its gradient is exactly 0.
        beta: positive.
        normalize: of lambda, uniform and rrhf: ``"pairs"`` divides by the number of pairs with :math:`v_i > v_j`.
        label_temperature, label_smoothing: of exo, infonca and nca. The second below 1, and positive for exo.
        reduction: ``"mean"`` over the lists that count, ``"sum"``, or ``"none"``: ``[B]``.
        norm: replaces the number of lists in the mean: a number, or a tensor of one element. 0 gives 0.

    Returns:
        LossOutput(loss, metrics). Where no two items that count have different labels there is nothing to compare: the list's
        loss and gradient are 0, and it does not count. Memory is O(K) per list, and scores of any size are safe. float32, or
        float64 for float64 scores. Metrics: ``lists`` (how many count), ``top1`` (the share of them whose highest score has the
        best label), ``items`` (of one of them). NaN in a score shows in the loss, and in the gradient of its list.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Labels that are not finite, or above 30 with
            ``gain="exp2"``, are always found on the CPU; on CUDA their list comes out NaN, or it raises under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(scores=scores)
    options = (
        choice("kind", kind, LIST_KINDS),
        choice("gain", gain, GAINS),
        choice("rank", rank, RANKS),
        choice("normalize", normalize, NORMALIZATIONS) == 1,
        choice("reduction", reduction, REDUCTIONS),
        number("beta", beta),
        number("label_temperature", label_temperature),
        _smoothing(label_smoothing),
    )
    labels = constant("labels", labels)
    mask = constant("mask", mask)
    norm_value, norm_tensor = _norm(norm)
    if scores.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_labels(scores, labels, mask, kind == "lambda" and gain == "exp2")
    loss, metrics = _run(_listwise, _listwise_fwd, _widened(scores), (labels, mask, norm_tensor, *options, norm_value))
    return LossOutput(loss, dict(zip(LIST_METRICS, metrics.unbind(0), strict=True)))


def group_preference_loss(
    scores: Tensor,
    is_winner: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    lam: float = 1.0,
    ddof: int = 0,
    var_scale: Literal["logratio", "reward"] = "logratio",
    reduction: RowReduction = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    r"""Winners and losers of one prompt compared by the means of their scores, and held together (GEPO), in one pass.

    Per row, with n winners W and m losers L:

    .. math::
        \ell = -\log\sigma\Bigl(\beta \bigl[\tfrac1n \sum_{i \in W} s_i - \tfrac1m \sum_{j \in L} s_j\bigr]\Bigr)
        + \lambda\, c\, \mathrm{Var}_{i \in W}(s_i)

    The variance has the divisor n - ddof, and is 0 for n <= ddof; c is 1, or :math:`\beta^2` with ``var_scale="reward"``. With
    ``lam=0`` this is the multi-sample mDPO, with one of each DPO.

    Args:
        scores: ``[B, G]`` float32, bfloat16 or float16 (float64 on the CPU): log-ratios. The only argument with a gradient.
        is_winner: bool ``[B, G]``.
        mask: bool ``[B, G]``; True counts. What lies outside is never looked at, and its gradient is exactly 0.
        beta, lam: positive; not negative.
        ddof: 0 or 1.
        reduction, norm: as for :func:`listwise_loss`.

    Returns:
        LossOutput(loss, metrics). A row without a winner or without a loser has loss 0 and does not count. Metrics: ``rows``
        (how many count), ``preference`` and ``variance`` (means of the two terms over them, the second without lam).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(scores=scores, is_winner=is_winner)
    options = (
        integer("ddof", ddof),
        choice("var_scale", var_scale, VAR_SCALES) == 1,
        choice("reduction", reduction, REDUCTIONS),
        number("beta", beta),
        number("lam", lam),
    )
    norm_value, norm_tensor = _norm(norm)
    constants = (is_winner, constant("mask", mask), norm_tensor, *options, norm_value)
    loss, metrics = _run(_group, _group_fwd, _widened(scores), constants)
    return LossOutput(loss, dict(zip(GROUP_METRICS, metrics.unbind(0), strict=True)))


def skew_score(v_i: Tensor, v_j: Tensor, scales: Tensor | None = None, *, normalize: bool = True) -> Tensor:
    r"""How much i is preferred to j by their embeddings (GPM):
    :math:`s = \sum_l s_l (v_{i,2l} v_{j,2l+1} - v_{i,2l+1} v_{j,2l})`.

    Skew-symmetric: exchanging the two changes the sign, so that preferences may form cycles.

    Args:
        v_i, v_j: ``[B, 2k]`` float32, bfloat16 or float16 (float64 on the CPU), with gradients.
        scales: ``[B, k]``, with a gradient; None: 1.
        normalize: divide both by their lengths, at least 1e-12, first; differentiated.

    Returns:
        ``[B]`` float32, or float64 for float64 embeddings.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(v_i=v_i, v_j=v_j)
    return _run_skew(v_i, v_j, scales, (None, None, bool(normalize), False, _NONE, 1.0, -1.0))[0]


def skew_loss(
    v_chosen: Tensor,
    v_rejected: Tensor,
    scales: Tensor | None = None,
    *,
    tau: float = 0.1,
    margin: Tensor | None = None,
    normalize: bool = True,
    reduction: RowReduction = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    r"""The loss of the preference model GPM, :math:`-\log\sigma((s - m) / \tau)` with the score s of :func:`skew_score`, in one
    pass.

    Args:
        v_chosen, v_rejected, scales, normalize: as for :func:`skew_score`; gradients to all three tensors.
        tau: positive.
        margin: m, ``[B]``, a constant; None: 0.
        reduction, norm: as for :func:`listwise_loss`.

    Returns:
        LossOutput(loss, metrics). Metrics: ``rows``, ``prob`` (mean of :math:`\sigma((s - m) / \tau)`), ``accuracy`` (share of
        positive scores). NaN in an embedding shows in the loss, and in the gradient of its row.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(v_chosen=v_chosen, v_rejected=v_rejected)
    norm_value, norm_tensor = _norm(norm)
    options = (bool(normalize), True, choice("reduction", reduction, REDUCTIONS), number("tau", tau), norm_value)
    constants = (constant("margin", margin), norm_tensor, *options)
    try:
        loss, metrics = _run_skew(v_chosen, v_rejected, scales, constants)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("v_i", "v_chosen").replace("v_j", "v_rejected")) from None
    return LossOutput(loss, dict(zip(SKEW_METRICS, metrics.unbind(0), strict=True)))


def skew_row_means(
    v: Tensor, mask: Tensor | None = None, scales: Tensor | None = None, *, tau: float = 0.1, normalize: bool = True
) -> Tensor:
    r"""The mean score of each item of a list over all of them, :math:`\frac1K \sum_j s(v_i, v_j) / \tau` (itself, with 0,
    included).

    By :math:`s(v_i, \frac1K \sum_j v_j)`: no table of pairs is formed, and time is linear in K.

    Args:
        v: ``[B, K, 2k]`` float32, bfloat16 or float16 (float64 on the CPU).
        mask: bool ``[B, K]``; True counts. What lies outside is never looked at.
        scales, normalize: as for :func:`skew_score`.
        tau: positive.

    Returns:
        ``[B, K]`` float32, or float64 for float64 embeddings; 0 outside the mask. Constants: no gradient. NaN in an embedding
        makes its list NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(v=v)
    constants = (constant("mask", mask), constant("scales", scales), bool(normalize), number("tau", tau))
    means: Tensor = call(_means, _widened(v.detach()), *constants)
    return means


# ---- arguments -------------------------------------------------------------------------------------------------------


def _norm(norm: float | Tensor | None) -> tuple[float, Tensor | None]:
    """A negative number stands for none, so that it must not come from outside."""
    if norm is None:
        return -1.0, None
    if isinstance(norm, Tensor):
        if (
            norm.is_cuda
            and validation()
            and not torch.compiler.is_compiling()
            and not bool(((norm >= 0) & norm.isfinite()).all())
        ):
            raise ValueError(f"norm is {norm.tolist()}; it must be finite and not negative")
        return -1.0, norm.detach()
    value = number("norm", norm, "a number, a torch.Tensor or None")
    if not 0 <= value < math.inf:
        raise ValueError(f"norm is {norm}; it must be finite and not negative, or None")
    return value, None


def _smoothing(value: float | None) -> float:
    """Likewise."""
    if value is None:
        return -1.0
    smoothing = number("label_smoothing", value, "a number or None")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing is {value}; it must be at least 0 and below 1, or None")
    return smoothing


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _validate_labels(scores: Tensor, labels: Tensor | None, mask: Tensor | None, exp2: bool) -> None:
    if labels is None or labels.shape != scores.shape:
        return
    bad = ~labels.isfinite() | ((labels > 30) & exp2)
    bad = bad if mask is None else bad & mask
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        accepted = "gain 'exp2' takes finite labels up to 30" if exp2 else "every label that counts must be finite"
        raise ValueError(f"labels{at} is {labels[tuple(at)].item()}; {accepted}")


def _run(op: Any, op_fwd: Any, scores: Tensor, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Loss and metrics, by the op that costs least."""
    if not (scores.requires_grad and torch.is_grad_enabled()):
        loss, metrics, *_ = call(op_fwd, scores, *constants, False)
    elif torch.compiler.is_compiling():
        loss, metrics, *_ = call(op, scores, *constants, True)
    else:
        loss, metrics = call(_RowLoss.apply, op_fwd, scores, constants)
    return loss, metrics


def _run_skew(v_i: Tensor, v_j: Tensor, scales: Tensor | None, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if scales is not None:
        check_tensors(scales=scales)
    v_i, v_j = _widened(v_i), _widened(v_j)
    given = (v_i, v_j, scales)
    needs = sum(1 << k for k, t in enumerate(given) if t is not None and t.requires_grad) if torch.is_grad_enabled() else 0
    if not needs:
        loss, metrics, *_ = call(_skew_fwd, *given, *constants, 0)
    elif torch.compiler.is_compiling():
        loss, metrics, *_ = call(_skew, *given, *constants, needs)
    else:
        loss, metrics = call(_SkewScore.apply, *given, constants, needs)
    return loss, metrics


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _row_outputs(like: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    return like.new_empty((like.shape[0],) if reduction == _NONE else ()), like.new_empty((len(LIST_METRICS),))


def _check_shaped(name: str, reference: Tensor, **others: Tensor | None) -> None:
    same_device(name, reference, **others)
    for other, t in others.items():
        if t is not None:
            torch._check(t.dim() == reference.dim(), lambda other=other: f"{other} must be shaped like {name}")


def _fake_listwise(
    scores: Tensor, labels: Tensor | None, mask: Tensor | None, norm_tensor: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    torch._check(scores.dim() == 2, lambda: f"scores has shape {list(scores.shape)}; expected [B, K]")
    _check_shaped("scores", scores, labels=labels, mask=mask)
    same_device("scores", scores, norm=norm_tensor)
    grad = scores.new_empty(scores.shape if options[-1] else (0,))
    return *_row_outputs(scores, options[4]), grad, scores.new_empty(())


def _fake_group(
    scores: Tensor, is_winner: Tensor, mask: Tensor | None, norm_tensor: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    torch._check(scores.dim() == 2, lambda: f"scores has shape {list(scores.shape)}; expected [B, G]")
    _check_shaped("scores", scores, is_winner=is_winner, mask=mask)
    same_device("scores", scores, norm=norm_tensor)
    grad = scores.new_empty(scores.shape if options[-1] else (0,))
    return *_row_outputs(scores, options[2]), grad, scores.new_empty(())


def _fake_skew(
    v_i: Tensor, v_j: Tensor, scales: Tensor | None, margin: Tensor | None, norm_tensor: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    torch._check(v_i.dim() == 2, lambda: f"v_i has shape {list(v_i.shape)}; expected [B, 2k]")
    _check_shaped("v_i", v_i, v_j=v_j, scales=scales)
    same_device("v_i", v_i, margin=margin, norm=norm_tensor)
    needs, width = options[-1], v_i.shape[1]
    left, right = (v_i.new_empty((v_i.shape[0], width) if needs & bit else (0,)) for bit in (1, 2))
    of_scales = v_i.new_empty((v_i.shape[0], width // 2) if needs & 4 and scales is not None else (0,))
    return *_row_outputs(v_i, options[2]), left, right, of_scales, v_i.new_empty(())


for _name, _fake in (("listwise_loss", _fake_listwise), ("group_preference_loss", _fake_group), ("skew_score", _fake_skew)):
    torch.library.register_fake(f"prefkern::{_name}", _fake)
    torch.library.register_fake(f"prefkern::{_name}_fwd", _fake)


@torch.library.register_fake("prefkern::skew_row_means")
def _fake_means(v: Tensor, mask: Tensor | None, scales: Tensor | None, normalize: bool, tau: float) -> Tensor:
    torch._check(v.dim() == 3, lambda: f"v has shape {list(v.shape)}; expected [B, K, 2k]")
    same_device("v", v, mask=mask, scales=scales)
    return v.new_empty(v.shape[:2])


@torch.library.register_fake("prefkern::preference_rows_backward")
def _fake_rows_backward(g_loss: Tensor, unnormalised: Tensor, inverse: Tensor) -> Tensor:
    return unnormalised.new_empty(unnormalised.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        raise ValueError("with_grad is False, but scores requires a gradient")
    ctx.arguments = len(inputs)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad = None if g_loss is None else _rows_backward(undivided(g_loss), *ctx.saved_tensors)
    return (grad, *(None,) * (ctx.arguments - 1))


class _RowLoss(torch.autograd.Function):
    """What the registered formula does, for eager mode: without the op's Python autograd registration, and with one
    argument for all constants, a call costs less."""

    @staticmethod
    def forward(ctx: Any, op: Any, scores: Tensor, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        loss, metrics, unnormalised, inverse = op(scores, *constants, True)
        ctx.save_for_backward(unnormalised, inverse)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[None, Tensor | None, None]:
        return None, None if g_loss is None else _rows_backward(undivided(g_loss), *ctx.saved_tensors), None


def _setup_skew(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    missing = [name for k, name in enumerate(("v_i", "v_j", "scales")) if ctx.needs_input_grad[k] and not ctx.needs >> k & 1]
    if missing:
        raise ValueError(f"needs is {ctx.needs}, but {missing[0]} requires a gradient")
    ctx.scales_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _skew_grads(ctx: Any, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_loss is None:
        return None, None, None
    g = undivided(g_loss)
    *unnormalised, inverse = ctx.saved_tensors
    grads = [_rows_backward(g, u, inverse) if ctx.needs >> k & 1 else None for k, u in enumerate(unnormalised)]
    if grads[2] is not None:
        grads[2] = grads[2].to(ctx.scales_dtype)
    return tuple(grads)


def _backward_skew(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (*_skew_grads(ctx, g_loss), *(None,) * 8)


class _SkewScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v_i: Tensor, v_j: Tensor, scales: Tensor | None, constants: tuple[Any, ...], needs: int
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, *unnormalised, inverse = _skew_fwd(v_i, v_j, scales, *constants, needs)
        ctx.needs, ctx.scales_dtype = needs, None if scales is None else scales.dtype
        ctx.save_for_backward(*unnormalised, inverse)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (*_skew_grads(ctx, g_loss), None, None)


for _name in ("listwise_loss", "group_preference_loss"):
    torch.library.register_autograd(f"prefkern::{_name}", _backward, setup_context=_setup)
torch.library.register_autograd("prefkern::skew_score", _backward_skew, setup_context=_setup_skew)
no_double_backward("preference_rows_backward")
