"""The inner loss of a learned policy update, differentiable twice, and the recurrent network that makes its targets. Kernels:
``csrc/meta``; formulas: ``csrc/math/meta.h``."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, number, same_device
from ._call import call, no_double_backward, undivided, validation
from .types import LossOutput

_OPS = torch.ops.prefkern
_loss, _loss_fwd = _OPS.lpg_inner_loss.default, _OPS.lpg_inner_loss_fwd.default
_loss_backward, _loss_second = _OPS.lpg_inner_loss_backward.default, _OPS.lpg_inner_loss_second.default
_gru, _gru_fwd, _gru_backward = _OPS.reverse_gru.default, _OPS.reverse_gru_fwd.default, _OPS.reverse_gru_backward.default

SIGNS = {"code": 1.0, "paper": -1.0}


def lpg_inner_loss(
    probs: Tensor,
    actions: Tensor,
    y: Tensor,
    pi_hat: Tensor,
    y_hat: Tensor,
    *,
    alpha_y: float = 0.5,
    sign: Literal["code", "paper"] = "code",
) -> LossOutput:
    r"""What an agent minimises that is taught by a learned policy gradient (LPG, as GROOVE releases it):

    .. math::
        L = \frac1N \sum_n \Bigl[ s \log(\pi_n + \epsilon)\, \hat\pi_n
        + \alpha_y \sum_w y_{nw} \bigl(\log(y_{nw} + \epsilon) - \log(\hat y_{nw} + \epsilon)\bigr) \Bigr]

    over all N steps of all workers, with the probability :math:`\pi_n` of the action taken, :math:`\epsilon = 10^{-8}` and
    s = 1, or -1 with ``sign="paper"``.

    Gradients flow to ``probs``, to ``y`` (as weight and in the logarithm), and to ``pi_hat`` and ``y_hat``. All of them may be
    differentiated again, so that a gradient taken with ``create_graph=True`` carries the meta-gradient of what made ``pi_hat``
    and ``y_hat``. A third differentiation is an error.

    Args:
        probs: ``[..., A]`` float32, bfloat16 or float16 (float64 on the CPU), such as ``[B, T, A]``: the agent's policy.
        actions: int64 or int32 ``[...]``, in ``[0, A)``.
        y: ``[..., W]``: the agent's prediction, a distribution.
        pi_hat: ``[...]``: how to adjust the probability of the action.
        y_hat: ``[..., W]``: the target of the prediction, a distribution.
        alpha_y: finite.
        sign: ``"code"`` or ``"paper"``.

    Returns:
        LossOutput(loss, metrics), computed in float32 (float64 for float64 input) in one pass over the rows, and so is each
        derivative. A probability of 0 has the logarithm -18.42. Metrics: ``policy``, the mean of
        :math:`\log(\pi + \epsilon)\, \hat\pi` without s, and ``kl``, the mean divergence. NaN shows in the loss.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; no steps at all are an error. An action out
            of range is always found on the CPU; on CUDA the loss and the gradients of its row come out NaN, or it raises under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(probs=probs, actions=actions, y=y, pi_hat=pi_hat, y_hat=y_hat)
    choice("sign", sign, tuple(SIGNS))
    alpha = number("alpha_y", alpha_y)
    if probs.dim() < 1:
        raise ValueError(f"probs has shape {list(probs.shape)}; [..., A] is expected")
    rows = probs.shape[:-1]
    for name, t in (("actions", actions), ("pi_hat", pi_hat)):
        if t.shape != rows:
            raise ValueError(
                f"{name} has shape {list(t.shape)}; probs has shape {list(probs.shape)}, so {list(rows)} is expected"
            )
    if y.dim() < 1 or y.shape[:-1] != rows:
        raise ValueError(
            f"y has shape {list(y.shape)}; probs has shape {list(probs.shape)}, so {[*rows, 'W']} is expected".replace("'", "")
        )
    if y_hat.shape != y.shape:
        raise ValueError(f"y_hat has shape {list(y_hat.shape)}; y has shape {list(y.shape)}, so the same is expected")
    if probs.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_actions(actions, probs.shape[-1])
    wide = [_widened(t) for t in (probs, y, pi_hat, y_hat)]
    flat_probs, flat_y, flat_y_hat = (t.reshape(actions.numel(), t.shape[-1]) for t in (wide[0], wide[1], wide[3]))
    op = _loss if torch.is_grad_enabled() and any(t.requires_grad for t in wide) else _loss_fwd
    loss, terms = call(
        op, flat_probs, actions.reshape(-1), flat_y, wide[2].reshape(-1), flat_y_hat, alpha, SIGNS[sign]
    )  # fmt: skip
    policy, kl = terms.unbind(0)
    return LossOutput(loss, {"policy": policy, "kl": kl})


def reverse_gru_reset(
    x: Tensor,
    done: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_n: Tensor | None = None,
) -> Tensor:
    r"""States of a gated recurrent unit that runs from the last step of each row to the first, and forgets at terminal steps.

    From :math:`h_T = 0`, with :math:`\bar h = h_{t+1}`, or 0 where ``done`` at t:

    .. math::
        r &= \sigma(W_r x_t + b_r + U_r \bar h), \quad z = \sigma(W_z x_t + b_z + U_z \bar h) \\
        n &= \tanh(W_n x_t + b_n + r \odot (U_n \bar h + c_n)), \quad h_t = (1 - z) \odot n + z \odot \bar h

    So nothing behind a terminal step reaches it or what is before it. With the weights of a ``torch.nn.GRU`` it is this
    network on the reversed sequence: ``bias_n`` is the last third of its ``bias_hh``, the rest of which adds to ``bias_ih``.

    Args:
        x: ``[B, T, I]`` float32, bfloat16 or float16 (float64 on the CPU); computed in float32 (float64).
        done: bool ``[B, T]``; None: no step is terminal.
        weight_ih: ``[3H, I]``, W in the order r, z, n.
        weight_hh: ``[3H, H]``, U.
        bias_ih: ``[3H]``, b; None: 0.
        bias_n: ``[H]``, c; None: 0.

    Returns:
        h, ``[B, T, H]``, float32 or float64. Gradients flow to all but ``done``, through time. Once: a second differentiation
        is an error. The product with x is one for all steps, as are those of the weights' gradients; in between, on the CPU a
        task takes some rows through all steps, and on CUDA each step is a product by cuBLAS and a kernel, without
        synchronisation.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(x=x, weight_ih=weight_ih, weight_hh=weight_hh)
    for name, given in (("done", done), ("bias_ih", bias_ih), ("bias_n", bias_n)):
        if given is not None:
            check_tensors(**{name: given})
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; [B, T, I] is expected")
    if weight_hh.dim() != 2 or weight_hh.shape[1] == 0:
        raise ValueError(f"weight_hh has shape {list(weight_hh.shape)}; [3H, H] is expected")
    hidden = weight_hh.shape[1]
    shapes = {"weight_ih": (3 * hidden, x.shape[2]), "weight_hh": (3 * hidden, hidden), "bias_ih": (3 * hidden,)}
    for name, t in (("weight_ih", weight_ih), ("weight_hh", weight_hh), ("bias_ih", bias_ih)):
        if t is not None and t.shape != shapes[name]:
            raise ValueError(f"{name} has shape {list(t.shape)}; {list(shapes[name])} is expected")
    wide_x, wide_ih, wide_hh = _widened(x), _widened(weight_ih), _widened(weight_hh)
    wide_bias = None if bias_ih is None else _widened(bias_ih)
    for name, t in (("weight_ih", wide_ih), ("weight_hh", wide_hh), ("bias_ih", wide_bias)):
        if t is not None and (t.dtype, t.device) != (wide_x.dtype, wide_x.device):
            raise ValueError(
                f"{name} is {_kind(t)} and x {_kind(wide_x)} once both are widened; they must be of one kind"
            )  # fmt: skip
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # else the product would be rounded
            gates = F.linear(wide_x, wide_ih, wide_bias)
    else:
        gates = F.linear(wide_x, wide_ih, wide_bias)
    bias = wide_hh.new_zeros(hidden) if bias_n is None else _widened(bias_n)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (gates, wide_hh, bias))
    states: Tensor = call(_gru if differentiated else _gru_fwd, gates, done, wide_hh, bias, differentiated)[0]
    return states


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} on {t.device}"


def _validate_actions(actions: Tensor, count: int) -> None:
    bad = (actions < 0) | (actions >= count)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"actions{at} is {actions[tuple(at)].item()}; it must lie in [0, {count}), the actions that probs has")


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _check_fake_rows(probs: Tensor, actions: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor) -> None:
    same_device("probs", probs, actions=actions, y=y, pi_hat=pi_hat, y_hat=y_hat)
    for name, t, dims in (
        ("probs", probs, 2),
        ("y", y, 2),
        ("y_hat", y_hat, 2),
        ("actions", actions, 1),
        ("pi_hat", pi_hat, 1),
    ):
        torch._check(t.dim() == dims, lambda name=name, t=t: f"{name} has shape {list(t.shape)}; one row per step is expected")


def _fake_loss(
    probs: Tensor, actions: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor, alpha: float, sign: float
) -> tuple[Tensor, Tensor]:
    _check_fake_rows(probs, actions, y, pi_hat, y_hat)
    return probs.new_empty(()), probs.new_empty((2,))


def _fake_gradients(needs: int, *of: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if needs >> k & 1 else (0,)) for k, t in enumerate(of))


@torch.library.register_fake("prefkern::lpg_inner_loss_backward")
def _fake_loss_backward(
    g: Tensor, probs: Tensor, actions: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor, alpha: float, sign: float, needs: int
) -> tuple[Tensor, ...]:
    _check_fake_rows(probs, actions, y, pi_hat, y_hat)
    return _fake_gradients(needs, probs, y, pi_hat, y_hat)


@torch.library.register_fake("prefkern::lpg_inner_loss_second")
def _fake_loss_second(
    above_probs: Tensor | None, above_y: Tensor | None, above_pi_hat: Tensor | None, above_y_hat: Tensor | None, g: Tensor,
    probs: Tensor, actions: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor, alpha: float, sign: float, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_fake_rows(probs, actions, y, pi_hat, y_hat)
    return probs.new_empty(()), *_fake_gradients(needs, probs, y, pi_hat, y_hat)


def _fake_gru(gates: Tensor, done: Tensor | None, weight: Tensor, bias: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    torch._check(gates.dim() == 3, lambda: f"gates has shape {list(gates.shape)}; expected [B, T, 3H]")
    same_device("x", gates, done=done, weight_hh=weight, bias_n=bias)
    rows, steps, hidden = *gates.shape[:2], weight.shape[1]
    return gates.new_empty((rows, steps, hidden)), gates.new_empty((rows, steps, 4 * hidden) if with_grad else (0,))


@torch.library.register_fake("prefkern::reverse_gru_backward")
def _fake_gru_backward(
    grad: Tensor, states: Tensor, saved: Tensor, done: Tensor | None, weight: Tensor, needs_weights: bool
) -> tuple[Tensor, ...]:
    rows, steps, hidden = states.shape
    shapes = ((3 * hidden, hidden), (hidden,)) if needs_weights else ((0,), (0,))
    return states.new_empty((rows, steps, 3 * hidden)), *(states.new_empty(shape) for shape in shapes)


for _name, _fake in (("lpg_inner_loss", _fake_loss), ("reverse_gru", _fake_gru)):
    torch.library.register_fake(f"prefkern::{_name}", _fake)
    torch.library.register_fake(f"prefkern::{_name}_fwd", _fake)

# The four with a gradient among (probs, actions, y, pi_hat, y_hat), in the order of the bits of `needs`.
_LEAVES = (0, 2, 3, 4)


def _needs(wanted: tuple[bool, ...]) -> int:
    return sum(1 << k for k, i in enumerate(_LEAVES) if wanted[i])


def _placed(needs: int, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The gradients of (probs, actions, y, pi_hat, y_hat)."""
    placed: list[Tensor | None] = [None] * 5
    for k, (i, grad) in enumerate(zip(_LEAVES, grads, strict=True)):
        placed[i] = grad if needs >> k & 1 else None
    return placed


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.alpha, ctx.sign = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_loss(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 7
    needs = _needs(ctx.needs_input_grad)
    return (*_placed(needs, _loss_backward(g, *ctx.saved_tensors, ctx.alpha, ctx.sign, needs)), None, None)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.alpha, ctx.sign, needs = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*(grad for k, grad in enumerate(output) if not needs >> k & 1))
    ctx.set_materialize_grads(False)


def _backward_second(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(t is None for t in above):
        return (None,) * 9
    of_g, *of_inputs = ctx.needs_input_grad[:6]
    needs = _needs(tuple(of_inputs))
    by_g, *grads = _loss_second(*above, *ctx.saved_tensors, ctx.alpha, ctx.sign, needs)
    return (by_g if of_g else None, *_placed(needs, tuple(grads)), None, None, None)


def _setup_gru(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, done, weight, _, with_grad = inputs
    if not with_grad:
        raise ValueError("with_grad is False, but an input requires a gradient")
    ctx.save_for_backward(*output, done, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_gru(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 5
    g = undivided(g)
    of_gates, _, of_weight, of_bias, _ = ctx.needs_input_grad
    states, saved, done, weight = ctx.saved_tensors
    gates, by_weight, by_bias = _gru_backward(
        g, states.detach(), saved, done, weight.detach(), of_weight or of_bias
    )  # fmt: skip
    return gates if of_gates else None, None, by_weight if of_weight else None, by_bias if of_bias else None, None


torch.library.register_autograd("prefkern::lpg_inner_loss", _backward_loss, setup_context=_setup_loss)
torch.library.register_autograd("prefkern::lpg_inner_loss_backward", _backward_second, setup_context=_setup_second)
torch.library.register_autograd("prefkern::reverse_gru", _backward_gru, setup_context=_setup_gru)
no_double_backward("lpg_inner_loss_second")
no_double_backward("reverse_gru_backward")
