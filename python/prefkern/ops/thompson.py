"""Which prompts to roll out next, by Thompson sampling, and what is known of them afterwards. Kernels:
``csrc/sampling/beta_thompson*``; formulas: ``csrc/math/thompson.h``."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, constant, integer, number, same_device
from ._call import call, validation

_topk, _update = torch.ops.prefkern.beta_thompson_topk.default, torch.ops.prefkern.decayed_beta_update_.default

UTILITIES = ("p1mp2", "p1mp")
MODES = ("thompson", "mean")
MOST_EVIDENCE = 1e30


class ThompsonTopk(NamedTuple):
    """The k prompts of `beta_thompson_topk` that are worth most, and what M prompts drew."""

    ids: Tensor
    """int64 [k], utilities falling; of equal ones the lowest first."""
    utilities: Tensor
    """[k], of the dtype of the counts."""
    draws: Tensor | None = None
    """[M]: p of every prompt, with mode "mean" its expectation; None unless asked for."""


def beta_thompson_topk(
    alpha: Tensor,
    beta: Tensor,
    k: int,
    *,
    eligible: Tensor | None = None,
    utility: Literal["p1mp2", "p1mp"] = "p1mp2",
    mode: Literal["thompson", "mean"] = "thompson",
    seed: int = 0,
    step: int = 0,
    return_draws: bool = False,
) -> ThompsonTopk:
    r"""The k prompts whose drawn success probabilities promise the most to a group of rollouts (VADE).

    For each of M prompts :math:`p \sim \mathrm{Beta}(\alpha + 1, \beta + 1)`, and its utility :math:`p (1 - p)^2`, largest at
    1/3, or :math:`p (1 - p)`, the variance of a binary reward, largest at 1/2. A draw is two gamma variates by Marsaglia and
    Tsang's method, made of Philox words for (seed, step, prompt): it does not depend on threads, on the other prompts, on
    ``eligible`` or on what was drawn before. Other devices, and CPUs with other instruction sets, use the same words: their
    draws are equal up to rounding, which once in some ten million draws accepts a proposal that was rejected elsewhere.

    Args:
        alpha, beta: ``[M]`` counts of successes and failures, without the prior's 1; float32 (float64 on the CPU). Finite, not
            negative, at most 1e30. M below 2^32.
        k: how many, 1 to M.
        eligible: bool ``[M]``; None: all are. What counts say elsewhere does not matter.
        utility: ``"p1mp2"`` or ``"p1mp"``.
        mode: ``"thompson"`` draws; ``"mean"`` ranks by the expected utility, :math:`\frac{ab(b+1)}{S(S+1)(S+2)}` or
            :math:`\frac{ab}{S(S+1)}` with a, b the counts plus one and S their sum, without randomness.
        seed: any integer; its lowest 64 bits count.
        step: 0 to 2^32 - 1.
        return_draws: whether all draws are wanted.

    Returns:
        ThompsonTopk(ids, utilities, draws). Constants: no gradient. Memory besides them: on the CPU O(k) per thread, on CUDA
        O(M). CUDA does not wait: there a wrong count has utility and draw NaN, and comes first, and where fewer than k prompts
        are eligible the others follow with utility -inf; under ``prefkern.set_validation(True)``, as on the CPU, both are
            errors.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(alpha=alpha, beta=beta)
    if eligible is not None:
        check_tensors(eligible=eligible)
    if alpha.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate(alpha, beta, eligible, k)
    options = (integer("k", k), choice("utility", utility, UTILITIES), choice("mode", mode, MODES), _signed("seed", seed))
    ids, utilities, draws = call(
        _topk, constant("alpha", alpha), constant("beta", beta), eligible, *options, _word("step", step), bool(return_draws)
    )
    return ThompsonTopk(ids, utilities, draws if return_draws else None)


def decayed_beta_update_(
    alpha: Tensor,
    beta: Tensor,
    ids: Tensor,
    successes: Tensor,
    n: Tensor | int | float,
    *,
    lam1: float = 0.2,
    lam2: float = 0.999,
) -> None:
    r"""Counts after a step, in place (VADE): for the prompts rolled out :math:`\alpha \leftarrow \lambda_1 \alpha + s` and
    :math:`\beta \leftarrow \lambda_1 \beta + n - s`, for all others :math:`\lambda_2 \alpha` and :math:`\lambda_2 \beta`.

    Args:
        alpha, beta: ``[M]`` as for :func:`beta_thompson_topk`, contiguous; changed.
        ids: int64 or int32 ``[B]``, each prompt at most once.
        successes: s ``[B]``, whole or not, in [0, n].
        n: rollouts of each, ``[B]`` or one number for all. 0, every rollout dropped: the counts decay by lam1 alone.
        lam1, lam2: in [0, 1]; both 1: the conjugate update.

    Nothing is changed if something is refused. CUDA does not wait: there an id that comes twice, and successes outside [0, n],
    make their prompt's counts NaN, and ids outside [0, M) are passed over; under ``prefkern.set_validation(True)`` they are
    errors.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(alpha=alpha, beta=beta, ids=ids, successes=successes)
    if not isinstance(n, Tensor):
        n = torch.full_like(successes, number("n", n, "a torch.Tensor or a number"), dtype=alpha.dtype)
    if alpha.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_update(alpha, ids, successes, n)
    call(_update, alpha, beta, ids, successes.detach(), n.detach(), number("lam1", lam1), number("lam2", lam2))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _signed(name: str, value: Any) -> int:
    """The lowest 64 bits, as the schema's signed integer."""
    low = integer(name, value) & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low


def _word(name: str, value: Any) -> int:
    number = integer(name, value)
    if not 0 <= number < 1 << 32:
        raise ValueError(f"{name} is {number}; accepted: 0 to 2^32 - 1")
    return number


def _validate(alpha: Tensor, beta: Tensor, eligible: Tensor | None, k: int) -> None:
    mask = torch.ones_like(alpha, dtype=torch.bool) if eligible is None else eligible
    for name, counts in (("alpha", alpha), ("beta", beta)):
        bad = mask & ~((counts >= 0) & (counts <= MOST_EVIDENCE))
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise ValueError(f"{name}[{i}] is {counts[i].item()}; a count is finite, not negative and at most 1e30")
    if int(mask.sum()) < k:
        raise ValueError(f"k is {k}; {int(mask.sum())} prompts are eligible")


def _validate_update(alpha: Tensor, ids: Tensor, successes: Tensor, n: Tensor) -> None:
    if bool(((ids < 0) | (ids >= len(alpha))).any()):
        raise ValueError(f"ids reach from {ids.min().item()} to {ids.max().item()}; accepted: 0 to {len(alpha) - 1}")
    if ids.unique().numel() < ids.numel():
        raise ValueError("ids holds a prompt twice; a prompt is selected once in a step")
    if not bool(((successes >= 0) & (successes <= n) & n.isfinite()).all()):
        raise ValueError("successes must lie between 0 and n, which is finite")


# ---- fake implementations --------------------------------------------------------------------------------------------


@torch.library.register_fake("prefkern::beta_thompson_topk")
def _fake_topk(
    alpha: Tensor, beta: Tensor, eligible: Tensor | None, k: int, utility: int, mode: int, seed: int, step: int, draws: bool
) -> tuple[Tensor, Tensor, Tensor]:
    same_device("alpha", alpha, beta=beta, eligible=eligible)
    torch._check(alpha.dim() == 1, lambda: f"alpha has shape {list(alpha.shape)}; expected [M]")
    return alpha.new_empty((k,), dtype=torch.int64), alpha.new_empty((k,)), alpha.new_empty((alpha.shape[0] if draws else 0,))


@torch.library.register_fake("prefkern::decayed_beta_update_")
def _fake_update(alpha: Tensor, beta: Tensor, ids: Tensor, successes: Tensor, n: Tensor, lam1: float, lam2: float) -> None:
    same_device("alpha", alpha, beta=beta, ids=ids, successes=successes, n=n)
