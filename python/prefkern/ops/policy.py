"""Policy objectives over tokens. Kernels: ``csrc/policy``; formulas: ``csrc/math/policy.h``."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ._arguments import check_tensors, number, same_device
from ._call import call, choice, no_double_backward, validation
from .types import LossOutput

_OPS = torch.ops.prefkern
_loss, _loss_fwd, _loss_backward = _OPS.policy_loss.default, _OPS.policy_loss_fwd.default, _OPS.policy_loss_backward.default

KINDS = ("clip",)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean")
KL_KINDS = ("k3",)
METRICS = (
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "kl",
    "tokens",
)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kind: Literal["clip"] = "clip",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    agg: Literal["token-mean", "seq-mean-token-mean"] = "token-mean",
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl: Literal["k3"] = "k3",
    ratio_clamp: float | None = 20.0,
) -> LossOutput:
    r"""A clipped policy objective with its metrics, to be minimised, in one pass over the tokens.

    Per token, with :math:`d = \log\pi - \log\pi_\mathrm{old}`, :math:`\rho = \exp(\mathrm{clamp}(d, -C, C))`, the advantage A
    and :math:`x = \log\pi_\mathrm{ref} - \log\pi`:

    .. math::
        l = \max(-A \rho,\; -A\,\mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)), \qquad
        l \leftarrow \min(l, -A c) \text{ where } A < 0, \qquad
        l \leftarrow l + \beta\,(e^x - 1 - x)

    The gradient is 0 where a bound of the ratio, of d or of the dual clip is passed; at the bound itself it flows.

    Args:
        logp: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU); computed
            in float32 (float64). The only argument with a gradient: all others are constants, even if they require one.
        old_logp: shaped like ``logp``; any floating dtype, as are ``advantages`` and ``ref_logp``.
        advantages: ``[B]``, or shaped like ``logp`` (which wins where a packed batch has as many tokens as sequences).
        mask: bool, shaped like ``logp``; True counts. None: every token counts. What lies outside is never looked at: NaN
            there changes nothing, and its gradient is exactly 0.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.
        kind: ``"clip"``.
        eps_low, eps_high: the bounds of the ratio; DAPO uses 0.2 and 0.28.
        dual_clip: :math:`c > 1`, or None; verl uses 3.
        agg: ``"token-mean"``, the sum over all tokens divided by their number, or ``"seq-mean-token-mean"``, the mean over the
            sequences that have tokens of sum / (n + 1e-8).
        ref_logp: shaped like ``logp``. Given with ``beta = 0`` it only feeds the metric.
        beta: weight of the penalty.
        kl: ``"k3"``.
        ratio_clamp: C, or None (TRL).

    Returns:
        LossOutput(loss, metrics). Metrics are 0-d, of the loss's dtype, without gradient, over the tokens that count:
        ``clip_fraction_low`` (share with A < 0 and the ratio below its bound), ``clip_fraction_high`` (A > 0, above),
        ``clip_fraction_dual`` (A < 0, the dual bound holds the loss), ``ratio_mean``, ``ratio_min``, ``ratio_max``,
        ``approx_kl`` (mean of :math:`e^d - 1 - d`), ``kl`` (mean of :math:`e^x - 1 - x`; 0 without ``ref_logp``) and
        ``tokens``, how many count. If none does, everything is 0. NaN inside the mask makes the loss NaN, and the gradient of
        that token.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` are always found on
            the CPU; on CUDA loss, metrics and gradient come out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(logp=logp, old_logp=old_logp, advantages=advantages)
    if mask is not None:
        check_tensors(mask=mask)
    if cu_seqlens is not None:
        check_tensors(cu_seqlens=cu_seqlens)
        if cu_seqlens.is_cuda:
            _validate(cu_seqlens, logp)
    if ref_logp is not None:
        check_tensors(ref_logp=ref_logp)
        ref_logp = ref_logp.detach() if ref_logp.requires_grad else ref_logp
    options = (
        choice("kind", kind, KINDS),
        choice("agg", agg, AGGREGATIONS),
        choice("kl", kl, KL_KINDS),
        number("eps_low", eps_low),
        number("eps_high", eps_high),
        math.inf if dual_clip is None else number("dual_clip", dual_clip, "a number or None"),
        number("beta", beta),
        math.inf if ratio_clamp is None else number("ratio_clamp", ratio_clamp, "a number or None"),
    )
    if old_logp.requires_grad:
        old_logp = old_logp.detach()
    if advantages.requires_grad:
        advantages = advantages.detach()
    if logp.dtype in (torch.bfloat16, torch.float16):
        logp = logp.float()
    constants = (old_logp, advantages, mask, cu_seqlens, ref_logp, *options)
    if not (logp.requires_grad and torch.is_grad_enabled()):
        loss, metrics, *_ = call(_loss_fwd, logp, *constants, False)
    elif torch.compiler.is_compiling():
        loss, metrics, *_ = call(_loss, logp, *constants, True)
    else:
        loss, metrics = call(_PolicyLoss.apply, logp, constants)
    return LossOutput(loss, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def _validate(cu_seqlens: Tensor, logp: Tensor) -> None:
    if not validation() or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != logp.numel() or ends != sorted(ends):
        raise ValueError(f"cu_seqlens is {ends}; it must ascend from 0 to the {logp.numel()} tokens of logp")


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _fake_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logp: Tensor | None,
    kind: int,
    agg: int,
    kl: int,
    eps_low: float,
    eps_high: float,
    dual_clip: float,
    beta: float,
    ratio_clamp: float,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    same_device("logp", logp, old_logp=old_logp, advantages=advantages, mask=mask, cu_seqlens=cu_seqlens, ref_logp=ref_logp)
    expected = 2 if cu_seqlens is None else 1
    torch._check(logp.dim() == expected, lambda: f"logp has shape {list(logp.shape)}; expected [B, T], or [N] with cu_seqlens")
    for name, t in (("old_logp", old_logp), ("mask", mask), ("ref_logp", ref_logp)):
        torch._check(t is None or t.dim() == expected, lambda name=name: f"{name} must be shaped like logp")
    unnormalised = logp.new_empty(logp.shape if with_grad else (0,))
    return logp.new_empty(()), logp.new_empty((len(METRICS),)), unnormalised, logp.new_empty(())


for _name in ("policy_loss", "policy_loss_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_loss)


@torch.library.register_fake("prefkern::policy_loss_backward")
def _fake_backward(g_loss: Tensor, unnormalised: Tensor, inverse_norm: Tensor) -> Tensor:
    return unnormalised.new_empty(unnormalised.shape)


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
    if torch.is_grad_enabled() and not g_loss.requires_grad:  # create_graph: a second differentiation must not find a constant
        g_loss = g_loss.detach().requires_grad_()
    return _loss_backward(g_loss, *ctx.saved_tensors)


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (_logp_grad(ctx, g_loss), *(None,) * 14)


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
        return _logp_grad(ctx, g_loss), None


torch.library.register_autograd("prefkern::policy_loss", _backward, setup_context=_setup)
no_double_backward("policy_loss_backward")
