"""Losses of diffusion and flow models: of preference pairs, of predicted clean latents; steps between noise levels; a balance
of losses. Kernels: ``csrc/diffusion``; formulas: ``csrc/math/diffusion.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import accumulator, check_tensors, constant, number, same_device
from ._call import call, no_double_backward, undivided, validation
from .lists import REDUCTIONS
from .types import BalancedLoss, LossOutput

_OPS = torch.ops.prefkern
_pairs, _pairs_fwd = _OPS.diffusion_pair_loss.default, _OPS.diffusion_pair_loss_fwd.default
_pairs_backward, _mse = _OPS.diffusion_pair_loss_backward.default, _OPS.diffusion_mse.default
_x0, _x0_fwd, _x0_backward = _OPS.x0_loss.default, _OPS.x0_loss_fwd.default, _OPS.x0_loss_backward.default
_step = _OPS.ddim_invert_step.default

# In the order of the enumerations of csrc/math/diffusion.h; "margin" is that of diffusion_margin.
LOSS_TYPES = ("sigmoid", "hinge", "ipo")
_MARGIN = len(LOSS_TYPES)
X0_LOSS_TYPES = ("huber", "l2")
DIFFUSION_METRICS = ("margin", "accuracy", "mse_w", "mse_l", "ref_mse_w", "ref_mse_l")
_NONE = REDUCTIONS.index("none")

DiffusionLossType = Literal["sigmoid", "hinge", "ipo"]
Reduction = Literal["mean", "sum", "none"]


def diffusion_pref_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    target_l: Tensor | None = None,
    beta: float,
    half: bool = True,
    weight: Tensor | None = None,
    negative: bool = False,
    loss_type: DiffusionLossType = "sigmoid",
    reduction: Reduction = "mean",
) -> LossOutput:
    r"""The preference loss of B pairs of denoised latents (Diffusion-DPO and its kin), with its gradient, in one pass each.

    With mean squared errors over the elements of a latent, :math:`m` of the policy and :math:`r` of the reference,

    .. math::
        g = w\,[(r_w - r_l) - (m_w - m_l)], \qquad z = k \beta g, \qquad k = \tfrac12 \text{ or } 1

    the loss of a pair is by ``loss_type`` :math:`-\log\sigma(z)` (``"sigmoid"``), :math:`\max(0, 1 - z)` (``"hinge"``) or
    :math:`(g - \frac{1}{2\beta})^2` (``"ipo"``, without k and beta in front of g). ``negative`` exchanges winner and loser:
    :math:`g \to -g` (Diffusion-NPO).

    Args:
        pred_w, pred_l: ``[B, ...]`` predictions of the policy at the winner's and the loser's noised latent, float32, bfloat16
            or float16 (float64 on the CPU). The only arguments with gradients.
        target: ``[B, ...]`` what they should be: the noise that both share, or a velocity.
        ref_mse_w, ref_mse_l: r, ``[B]``, known beforehand, as from :func:`diffusion_mse`. Or else:
        ref_w, ref_l: ``[B, ...]`` predictions of the reference.
        target_l: of the loser; None: the same target.
        beta: positive. Means, not sums, are what it multiplies.
        half: k = 1/2, as in Diffusion-DPO and SmPO; False: k = 1, as in Diffusion-NPO.
        weight: w, ``[B]``, finite numbers of any sign; None: 1.
        reduction: ``"mean"`` over the pairs, ``"sum"``, or ``"none"``: ``[B]``.

    Latents may have any shape behind the first dimension, and lie in memory as they like: means do not ask for an order, so
    that channels-last latents are read as they are, and their gradients come channels-last. Latents that lie otherwise than
    pred_w, and those of another dtype than the widest, are copied.

    Returns:
        LossOutput(loss, metrics). float32, or float64 for float64 latents. Metrics, means over the pairs: ``margin`` (z; g for
        ipo), ``accuracy`` (the share of positive margins), ``mse_w``, ``mse_l``, ``ref_mse_w``, ``ref_mse_l``.

        Differences and squares are formed in float32, sums of a few of them are added in float64. With ref_w and ref_l what is
        summed is :math:`(p - r)((p - t) + (r - t))`, whose mean is :math:`m - r`: nothing cancels, and where the policy is the
        reference the margin is exactly 0. Memory is O(B) beside inputs and gradients. An element that is not finite makes its
        pair NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; both forms of the reference or none; an
            empty batch; on the CPU, weights or errors that are not finite (on CUDA their pair comes out NaN).
    """
    check_tensors(pred_w=pred_w, pred_l=pred_l, target=target)
    options = (choice("loss_type", loss_type, LOSS_TYPES), choice("reduction", reduction, REDUCTIONS), *_scale(beta, half))
    loss, metrics = _pair_loss(
        pred_w, pred_l, (target, target_l, ref_w, ref_l), (ref_mse_w, ref_mse_l, weight), (*options, bool(negative))
    )
    return LossOutput(loss, dict(zip(DIFFUSION_METRICS, metrics.unbind(0), strict=True)))


def diffusion_margin(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    target_l: Tensor | None = None,
    beta: float,
    half: bool = True,
    weight: Tensor | None = None,
    negative: bool = False,
) -> Tensor:
    r"""The margins z of :func:`diffusion_pref_loss`, ``[B]``, for a loss of one's own; gradients to pred_w and pred_l.

    Arguments as there. float32, or float64 for float64 latents.
    """
    check_tensors(pred_w=pred_w, pred_l=pred_l, target=target)
    options = (_MARGIN, _NONE, *_scale(beta, half), bool(negative))
    return _pair_loss(pred_w, pred_l, (target, target_l, ref_w, ref_l), (ref_mse_w, ref_mse_l, weight), options)[0]


def diffusion_pref_loss_stacked(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    *,
    ref_mse: Tensor | None = None,
    beta: float,
    half: bool = True,
    weight: Tensor | None = None,
    negative: bool = False,
    loss_type: DiffusionLossType = "sigmoid",
    reduction: Reduction = "mean",
) -> LossOutput:
    """:func:`diffusion_pref_loss` of a batch as training scripts of diffusers have it: winners in the first half, losers in the
    second. No half is copied, and the gradient is one tensor.

    Args:
        model_pred: ``[2B, ...]``. The only argument with a gradient.
        target: ``[2B, ...]``; ``[B, ...]`` for both halves.
        ref_pred: ``[2B, ...]``. Or else:
        ref_mse: ``[2B]``.
        weight: ``[B]``.

    Everything else as there.
    """
    check_tensors(model_pred=model_pred, target=target)
    rows = model_pred.shape[0] if model_pred.dim() else 0
    if rows == 0 or rows % 2:
        raise ValueError(f"model_pred has shape {list(model_pred.shape)}; [2B, ...] is expected, winners first, B at least 1")
    for name, t, halves in (("target", target, True), ("ref_pred", ref_pred, False)):
        if t is not None:
            check_tensors(**{name: t})
            accepted = (rows, rows // 2) if halves else (rows,)
            if t.dim() == 0 or t.shape[1:] != model_pred.shape[1:] or t.shape[0] not in accepted:
                also = ", or half as many rows" if halves else ""
                raise ValueError(
                    f"{name} has shape {list(t.shape)}; model_pred has shape {list(model_pred.shape)}, "
                    f"so the same is expected{also}"
                )
    if ref_mse is not None:
        check_tensors(ref_mse=ref_mse)
        if ref_mse.shape != (rows,):
            raise ValueError(f"ref_mse has shape {list(ref_mse.shape)}; [{rows}] is expected")
    options = (choice("loss_type", loss_type, LOSS_TYPES), choice("reduction", reduction, REDUCTIONS), *_scale(beta, half))
    targets = target.chunk(2) if target.shape[0] == rows else (target, None)
    refs = (None, None) if ref_pred is None else ref_pred.chunk(2)
    errors = (None, None) if ref_mse is None else ref_mse.chunk(2)
    loss, metrics = _pair_loss(model_pred, None, (*targets, *refs), (*errors, weight), (*options, bool(negative)))
    return LossOutput(loss, dict(zip(DIFFUSION_METRICS, metrics.unbind(0), strict=True)))


def diffusion_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared errors over the elements of each latent, as :func:`diffusion_pref_loss` takes them of a reference.

    pred, target: ``[B, ...]``. Returns float64 ``[B]``, constants: differences of errors are taken of it. Added up as there.
    """
    check_tensors(pred=pred, target=target)
    _check_shapes("pred", pred, target=target)
    pred, target = _one_dtype(pred.detach(), target.detach())
    order = _memory_order(pred)
    errors: Tensor = call(_mse, _rows(pred, order), _rows(target, order))
    return errors


def x0_regression_loss(
    pred: Tensor,
    x: Tensor,
    target: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    loss_type: Literal["huber", "l2"] = "huber",
    c: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far the clean latent that a noise prediction tells of is from a target, with its gradient, in one pass each:
    :math:`y = (x - \sigma e) / \alpha - x_0`, and :math:`\sqrt{y^2 + c^2} - c` (``"huber"``) or :math:`y^2` (``"l2"``),
    averaged over the elements of a latent.

    Args:
        pred: e, ``[B, ...]``: the noise predicted at x. The only argument with a gradient.
        x, target: ``[B, ...]``.
        alpha, sigma: of the noise level of each latent, ``[B]`` or one number; alpha not 0.
        c: positive; where the loss turns from a square to an absolute value.
        reduction: ``"mean"`` over the latents, ``"sum"``, or ``"none"``: ``[B]``.

    Returns:
        float32, or float64 for float64 latents. Memory is O(B) beside inputs and gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(pred=pred, x=x, target=target)
    options = (choice("loss_type", loss_type, X0_LOSS_TYPES), choice("reduction", reduction, REDUCTIONS), number("c", c))
    _check_shapes("pred", pred, x=x, target=target)
    alphas, sigmas = _each("alpha", alpha, pred), _each("sigma", sigma, pred)
    coefficients = torch.stack([1 / alphas, -sigmas / alphas])
    pred, x, target = _one_dtype(pred, x.detach(), target.detach())
    if not (pred.requires_grad and torch.is_grad_enabled()):
        order = _memory_order(pred)
        loss = call(_x0_fwd, _rows(pred, order), _rows(x, order), _rows(target, order), coefficients, *options)
    elif torch.compiler.is_compiling():
        order = _memory_order(pred)
        loss = call(_x0, _rows(pred, order), _rows(x, order), _rows(target, order), coefficients, *options)
    else:
        loss = call(_X0Loss.apply, pred, x, target, coefficients, options)
    result: Tensor = loss
    return result


def ddim_coefficients(abar: Tensor, to: Tensor | int, frm: Tensor | int) -> tuple[Tensor, Tensor]:
    r"""What :func:`ddim_invert_step` takes for a step from level `frm` to level `to`: :math:`c_1 = a_u / a_v` and
    :math:`c_2 = s_u - a_u s_v / a_v` with :math:`a = \sqrt{\bar\alpha}, s = \sqrt{1 - \bar\alpha}`, in float64, on the device
    of the levels: the second is a difference of nearly equal numbers.

    abar: the table of cumulative alphas, ``[T]``. Levels: integers, one or ``[B]``; outside of the table NaN on CUDA, and on
    the CPU an error.
    """
    a_u, s_u = _level(abar, to, "to")
    a_v, s_v = _level(abar, frm, "frm")
    return a_u / a_v, s_u - a_u / a_v * s_v


def ddim_invert_step(x: Tensor, e1: Tensor, e2: Tensor | None = None, *, c1: Tensor | float, c2: Tensor | float) -> Tensor:
    r"""A deterministic DDIM step, or its inverse: :math:`c_1 x + c_2 (e_1 + e_2) / 2`, without e2 :math:`c_1 x + c_2 e_1`, in
    one pass over the latents.

    Args:
        x, e1, e2: ``[B, ...]``; e1 and e2 are noise predictions.
        c1, c2: one number per latent, ``[B]``, or one, as from :func:`ddim_coefficients`. Where c2 is 0 predictions are not
        read.

    Returns:
        Shaped as x, of its dtype and, where its latents are dense, its strides; computed in float32, or float64 for float64. No
        gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(x=x, e1=e1)
    first, second = _each("c1", c1, x), _each("c2", c2, x)
    terms = [first, second] if e2 is None else [first, second / 2, second / 2]
    return latent_step(x, e1, e2, torch.stack(terms))


def latent_step(x: Tensor, e1: Tensor, e2: Tensor | None, coefficients: Tensor) -> Tensor:
    """c[0] x + c[1] e1 + c[2] e2, coefficients float64 ``[3, B]``, or ``[2, B]`` without e2; what has the coefficient 0 is not
    read. As :func:`ddim_invert_step`, which is one of its uses."""
    check_tensors(x=x, e1=e1, **({} if e2 is None else {"e2": e2}))
    _check_shapes("x", x, e1=e1, e2=e2)
    order = _memory_order(x)
    rows = [None if t is None else _rows(t.detach().to(x.dtype), order) for t in (x, e1, e2)]
    return _restored(call(_step, *rows, coefficients), x.shape, order)


def alb_combine(losses: Tensor | Sequence[Tensor], *, detach: bool = True, eps: float = 0.0, group: Any = None) -> BalancedLoss:
    r"""K losses weighted by themselves (adaptive loss balancing): :math:`L = \sum_k w_k L_k` with
    :math:`w_k = L_k / (\sum_j L_j + \epsilon)`, constants unless `detach` is False: the worse an objective is doing, the more
    it counts.

    Args:
        losses: ``[K]``, or K tensors of one element; not negative.
        eps: not negative.
        group: the ranks over which losses are summed before weights are taken of them, so that all ranks pursue the same
            objective: ``"world"``, a process group of `torch.distributed`, or None. One all-reduce; the loss is that of this
            rank.

    Returns:
        BalancedLoss(loss, weights ``[K]``). If all losses are 0 weights are 1/K. Nothing waits for the device.

    Raises:
        ValueError: losses that are negative or not finite, on the CPU, and under ``prefkern.set_validation(True)`` on CUDA;
            there NaN makes all weights NaN.
    """
    stacked = losses if isinstance(losses, Tensor) else _stacked(losses)
    if stacked.dim() != 1 or stacked.numel() == 0:
        raise ValueError(f"losses has shape {list(stacked.shape)}; [K] is expected, K at least 1")
    if not stacked.is_floating_point():
        raise TypeError(f"losses has dtype {str(stacked.dtype)[6:]}; a floating type is expected")
    if not 0 <= number("eps", eps) < float("inf"):
        raise ValueError(f"eps is {eps}; it must be finite and not negative")
    of = stacked.detach() if detach else stacked
    if group is not None:
        from ..distributed import packed_sum

        (of,) = packed_sum(of, process_group=group)
        of = of.to(stacked.dtype)
    weights = _balanced(of, eps)
    return BalancedLoss((weights * stacked).sum(), weights.detach())


def _balanced(losses: Tensor, eps: float = 0.0) -> Tensor:
    """Weights [..., K] that add up to 1."""
    _look_at_losses(losses.detach())
    total = losses.sum(-1, keepdim=True) + eps
    nothing = total == 0
    return torch.where(nothing, 1 / losses.shape[-1], losses / total.masked_fill(nothing, 1.0))


def _look_at_losses(losses: Tensor) -> None:
    if torch.compiler.is_compiling() or (losses.is_cuda and not validation()):
        return
    if not bool(((losses >= 0) & losses.isfinite()).all()):
        raise ValueError(f"losses is {losses.tolist()}; they must be finite and not negative")


def _stacked(losses: Sequence[Tensor]) -> Tensor:
    for k, loss in enumerate(losses):
        check_tensors(**{f"losses[{k}]": loss})
        if loss.numel() != 1:
            raise ValueError(f"losses[{k}] has shape {list(loss.shape)}; one element is expected")
    if not losses:
        raise ValueError("losses is empty; K losses are expected, K at least 1")
    return torch.stack([loss.reshape(()) for loss in losses])


# ---- arguments -------------------------------------------------------------------------------------------------------


def _scale(beta: float, half: bool) -> tuple[float, float]:
    beta = number("beta", beta)
    return beta, beta * 0.5 if half else beta


def _check_shapes(name: str, reference: Tensor, **others: Tensor | None) -> None:
    if reference.dim() == 0:
        raise ValueError(f"{name} has shape []; [B, ...] is expected")
    for other, t in others.items():
        if t is None:
            continue
        check_tensors(**{other: t})
        if t.shape != reference.shape:
            raise ValueError(
                f"{other} has shape {list(t.shape)}; {name} has shape {list(reference.shape)}, so the same is expected"
            )


def _one_dtype(first: Tensor, *others: Tensor | None) -> Any:
    """All in the widest dtype that one of them has."""
    dtype = first.dtype
    for t in others:
        if t is not None and t.dtype != dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in (first, *others))


def _memory_order(t: Tensor) -> tuple[int, ...]:
    """The dimensions behind the first as they lie in memory, outermost first."""
    if t.is_contiguous():
        return tuple(range(1, t.dim()))
    order: list[int] = []
    for d in range(1, t.dim()):  # sorted() takes no strides that a compiler does not know
        k = len(order)
        while k > 0 and t.stride(order[k - 1]) < t.stride(d):
            k -= 1
        order.insert(k, d)
    return tuple(order)


def _rows(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """[B, D], a view where the latents are dense and lie in that order."""
    if not order:
        return t.unsqueeze(1)
    return t.flatten(1) if order == tuple(range(1, t.dim())) else t.permute(0, *order).flatten(1)


def _restored(rows: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """[B, D] in that order as latents of this shape."""
    if order == tuple(range(1, len(shape))):
        return rows.view(shape)
    return rows.view(shape[0], *(shape[d] for d in order)).permute(0, *(order.index(d) + 1 for d in range(1, len(shape))))


def _each(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """float64 [B] on the device of `like`."""
    rows = like.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((rows,), number(name, value, "a number or a torch.Tensor"), dtype=torch.float64, device=like.device)
    if value.shape not in ((), (1,), (rows,)):
        raise ValueError(f"{name} has shape {list(value.shape)}; [{rows}] is expected, or one element")
    return value.detach().to(like.device, torch.float64).expand(rows)


def _level(abar: Tensor, t: Tensor | int, name: str) -> tuple[Tensor, Tensor]:
    """a and s at level t, float64, shaped as t."""
    table = check_schedule(abar)
    t = t if isinstance(t, Tensor) else torch.tensor(t)
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {str(t.dtype)[6:]}; integers are expected")
    inside = (t >= 0) & (t < len(table))
    if not torch.compiler.is_compiling() and (t.device.type == "cpu" or validation()) and not bool(inside.all()):
        raise ValueError(f"{name} is {t.tolist()}; the schedule has levels 0 to {len(table) - 1}")
    level = table.to(t.device)[t.clamp(0, len(table) - 1).long()].masked_fill(~inside, torch.nan)
    return level.sqrt(), (1 - level).sqrt()


def check_schedule(abar: Tensor) -> Tensor:
    """The table of cumulative alphas in float64; on the CPU, ValueError unless it falls, or stays, within (0, 1]."""
    check_tensors(abar=abar)
    if abar.dim() != 1 or len(abar) == 0:
        raise ValueError(f"abar has shape {list(abar.shape)}; [T] is expected")
    if not abar.is_floating_point():
        raise TypeError(f"abar has dtype {str(abar.dtype)[6:]}; a floating type is expected")
    table = abar.detach().double()
    if torch.compiler.is_compiling() or (table.is_cuda and not validation()):
        return table
    if not bool(((table > 0) & (table <= 1)).all()):
        i = int((~((table > 0) & (table <= 1))).nonzero()[0, 0])
        raise ValueError(f"abar[{i}] is {float(table[i])}; it must be greater than 0 and at most 1")
    if not bool((table.diff() <= 0).all()):
        i = int((table.diff() > 0).nonzero()[0, 0])
        raise ValueError(f"abar[{i + 1}] is {float(table[i + 1])} after {float(table[i])}; it must not ascend")
    return table


def _pair_loss(
    pred_w: Tensor,
    pred_l: Tensor | None,
    latents: tuple[Tensor | None, ...],
    numbers: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Loss and metrics, by the op that costs least. Without pred_l pred_w holds both, winners first."""
    target, target_l, ref_w, ref_l = latents
    ref_mse_w, ref_mse_l, _ = numbers
    refs, errors = ref_w is not None and ref_l is not None, ref_mse_w is not None and ref_mse_l is not None
    if refs == errors or (ref_w is None) != (ref_l is None) or (ref_mse_w is None) != (ref_mse_l is None):
        given = [
            name
            for name, t in zip(("ref_w", "ref_l", "ref_mse_w", "ref_mse_l"), (ref_w, ref_l, ref_mse_w, ref_mse_l), strict=True)
            if t is not None
        ]
        raise ValueError(
            f"{', '.join(given) if given else 'no reference'} given; either the reference's predictions of both sides are "
            "expected (ref_w and ref_l), or both of its errors (ref_mse_w and ref_mse_l)"
        )
    if pred_l is not None:
        _check_shapes("pred_w", pred_w, pred_l=pred_l, target=target, target_l=target_l, ref_w=ref_w, ref_l=ref_l)
    # Constants before dtypes: a copy must not drag in what requires a gradient.
    constants = tuple(None if t is None else t.detach() for t in latents)
    pred_w, pred_l, *rest = _one_dtype(pred_w, pred_l, *constants)
    names = ("ref_mse_w", "ref_mse_l", "weight")
    values = tuple(constant(name, t) for name, t in zip(names, numbers, strict=True))
    needs_grad = torch.is_grad_enabled() and (pred_w.requires_grad or (pred_l is not None and pred_l.requires_grad))
    if needs_grad and not torch.compiler.is_compiling():
        loss, metrics = call(_PairLoss.apply, pred_w, pred_l, (*rest, *values), options)
        return loss, metrics
    order = _memory_order(pred_w)
    winners, losers = _sides(pred_w, pred_l, order)
    rows = [None if t is None else _rows(t, order) for t in rest]
    loss, metrics, _ = call(_pairs if needs_grad else _pairs_fwd, winners, losers, *rows, *values, *options)
    return loss, metrics


def _sides(pred_w: Tensor, pred_l: Tensor | None, order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if pred_l is not None:
        return _rows(pred_w, order), _rows(pred_l, order)
    rows = _rows(pred_w, order)
    pairs = rows.shape[0] // 2
    return rows[:pairs], rows[pairs:]


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _check_latents(name: str, reference: Tensor, **others: Tensor | None) -> None:
    torch._check(reference.dim() == 2, lambda: f"{name} has shape {list(reference.shape)}; expected [B, D]")
    same_device(name, reference, **others)
    for other, t in others.items():
        if t is not None:
            torch._check(t.dim() == 2, lambda other=other: f"{other} must be shaped like {name}")


def _result(like: Tensor, reduction: int) -> Tensor:
    return like.new_empty((like.shape[0],) if reduction == _NONE else (), dtype=accumulator(like))


def _fake_pairs(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    target_l: Tensor | None,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    ref_error_w: Tensor | None,
    ref_error_l: Tensor | None,
    weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_latents("pred_w", pred_w, pred_l=pred_l, target=target, target_l=target_l, ref_w=ref_w, ref_l=ref_l)
    same_device("pred_w", pred_w, ref_mse_w=ref_error_w, ref_mse_l=ref_error_l, weight=weight)
    dtype = accumulator(pred_w)
    metrics = pred_w.new_empty((len(DIFFUSION_METRICS),), dtype=dtype)
    return _result(pred_w, options[1]), metrics, pred_w.new_empty((pred_w.shape[0],), dtype=dtype)


def _fake_x0(pred: Tensor, x: Tensor, target: Tensor, coefficients: Tensor, *options: Any) -> Tensor:
    _check_latents("pred", pred, x=x, target=target, coefficients=coefficients)
    return _result(pred, options[1])


for _name, _fake in (("diffusion_pair_loss", _fake_pairs), ("x0_loss", _fake_x0)):
    torch.library.register_fake(f"prefkern::{_name}", _fake)
    torch.library.register_fake(f"prefkern::{_name}_fwd", _fake)


@torch.library.register_fake("prefkern::diffusion_pair_loss_backward")
def _fake_pairs_backward(
    g_loss: Tensor,
    slopes: Tensor,
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    target_l: Tensor | None,
    reduction: int,
    needs: int,
) -> Tensor:
    return pred_w.new_empty(((needs & 1) + (needs >> 1), *pred_w.shape))


@torch.library.register_fake("prefkern::diffusion_mse")
def _fake_mse(pred: Tensor, target: Tensor) -> Tensor:
    _check_latents("pred", pred, target=target)
    return pred.new_empty((pred.shape[0],), dtype=torch.float64)


@torch.library.register_fake("prefkern::x0_loss_backward")
def _fake_x0_backward(
    g_loss: Tensor, pred: Tensor, x: Tensor, target: Tensor, coefficients: Tensor, kind: int, reduction: int, c: float
) -> Tensor:
    return pred.new_empty(pred.shape)


@torch.library.register_fake("prefkern::ddim_invert_step")
def _fake_step(x: Tensor, e1: Tensor, e2: Tensor | None, coefficients: Tensor) -> Tensor:
    _check_latents("x", x, e1=e1, e2=e2, coefficients=coefficients)
    return x.new_empty(x.shape)


def _pair_gradients(ctx: Any, g_loss: Tensor, needs: int) -> Tensor:
    winners, losers, target, target_l, slopes = ctx.saved_tensors
    grads: Tensor = _pairs_backward(undivided(g_loss), slopes, winners, losers, target, target_l, ctx.reduction, needs)
    return grads


def _setup_pairs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.reduction, ctx.arguments = inputs[10], len(inputs)
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_pairs(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    winner, loser = ctx.needs_input_grad[:2]
    grads: list[Tensor | None] = [None, None]
    if g_loss is not None:
        found = _pair_gradients(ctx, g_loss, winner + 2 * loser)
        grads = [found[0] if winner else None, found[-1] if loser else None]
    return (*grads, *(None,) * (ctx.arguments - 2))


class _PairLoss(torch.autograd.Function):
    """What the registered formula does, for eager mode: one node, and a batch of winners and losers gets one gradient."""

    @staticmethod
    def forward(
        ctx: Any, pred_w: Tensor, pred_l: Tensor | None, constants: tuple[Tensor | None, ...], options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        order = _memory_order(pred_w)
        winners, losers = _sides(pred_w, pred_l, order)
        rows = [None if t is None else _rows(t, order) for t in constants[:4]]
        loss, metrics, slopes = _pairs_fwd(winners, losers, *rows, *constants[4:], *options)
        ctx.order, ctx.shape, ctx.stacked, ctx.reduction = order, pred_w.shape, pred_l is None, options[1]
        ctx.save_for_backward(winners, losers, *rows[:2], slopes)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g_loss is None:
            return None, None, None, None
        winner, loser = (True, True) if ctx.stacked else ctx.needs_input_grad[:2]
        grads = _pair_gradients(ctx, g_loss, winner + 2 * loser)
        if ctx.stacked:
            return _restored(grads.flatten(0, 1), ctx.shape, ctx.order), None, None, None
        return (
            _restored(grads[0], ctx.shape, ctx.order) if winner else None,
            _restored(grads[-1], ctx.shape, ctx.order) if loser else None,
            None,
            None,
        )


def _setup_x0(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _backward_x0(ctx: Any, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = None if g_loss is None else _x0_backward(undivided(g_loss), *ctx.saved_tensors, *ctx.options)
    return (grad, *(None,) * 6)


class _X0Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, x: Tensor, target: Tensor, coefficients: Tensor, options: tuple[Any, ...]) -> Tensor:
        order = _memory_order(pred)
        rows = [_rows(t, order) for t in (pred, x, target)]
        ctx.order, ctx.shape, ctx.options = order, pred.shape, options
        ctx.save_for_backward(*rows, coefficients)
        ctx.set_materialize_grads(False)
        loss: Tensor = _x0_fwd(*rows, coefficients, *options)
        return loss

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if g_loss is None:
            return (None,) * 5
        grad = _x0_backward(undivided(g_loss), *ctx.saved_tensors, *ctx.options)
        return _restored(grad, ctx.shape, ctx.order), None, None, None, None


torch.library.register_autograd("prefkern::diffusion_pair_loss", _backward_pairs, setup_context=_setup_pairs)
torch.library.register_autograd("prefkern::x0_loss", _backward_x0, setup_context=_setup_x0)
for _name in ("diffusion_pair_loss_backward", "x0_loss_backward"):
    no_double_backward(_name)
