"""The inner loss of a learned policy update, and the recurrent network behind it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import LossOutput
from prefkern.reference._tokens import widen

EPS = 1e-8
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
    """The mean over all rows of s log(p + 1e-8) pi_hat + alpha_y KL(y, y_hat).

    Args:
        probs: [..., A]; p is that of the action. Gradients to all floating arguments, any number of times.
        actions: int64 [...].
        y, y_hat: [..., W]; 1e-8 is added inside both logarithms of the divergence.
        pi_hat: [...].
        sign: s is 1 for "code", -1 for "paper".
    """
    p, q, y, target = (widen(t) for t in (probs, pi_hat, y, y_hat))
    taken = p.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    policy = ((taken + EPS).log() * q).mean()
    kl = (y * ((y + EPS).log() - (target + EPS).log())).sum(-1).mean()
    return LossOutput(SIGNS[sign] * policy + alpha_y * kl, {"policy": policy.detach(), "kl": kl.detach()})


def reverse_gru_reset(
    x: Tensor,
    done: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_n: Tensor | None = None,
) -> Tensor:
    """States [B, T, H] of a GRU from the last step to the first; where done, what comes from behind is 0.

    Args:
        x: [B, T, I].
        done: bool [B, T].
        weight_ih, weight_hh: [3H, I] and [3H, H] in the order r, z, n.
        bias_ih, bias_n: [3H]; [H], inside n, beside its product with the state.
    """
    x, w, u = widen(x), widen(weight_ih), widen(weight_hh)
    hidden = u.shape[1]
    b = x.new_zeros(3 * hidden) if bias_ih is None else widen(bias_ih)
    c = x.new_zeros(hidden) if bias_n is None else widen(bias_n)
    h, states = x.new_zeros(x.shape[0], hidden), []
    for t in range(x.shape[1] - 1, -1, -1):
        if done is not None:
            h = torch.where(done[:, t, None], 0.0, h)
        from_x, from_h = (x[:, t] @ w.T + b).chunk(3, -1), (h @ u.T).chunk(3, -1)
        r, z = (torch.sigmoid(from_x[k] + from_h[k]) for k in (0, 1))
        n = torch.tanh(from_x[2] + r * (from_h[2] + c))
        h = (1 - z) * n + z * h
        states.append(h)
    return torch.stack(states[::-1], 1) if states else x.new_zeros(x.shape[0], 0, hidden)
