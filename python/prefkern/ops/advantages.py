"""Group-relative advantages. Kernels: ``csrc/advantages``; formulas: ``csrc/math/advantages.h``."""

from typing import Literal

import torch
from torch import Tensor

from ._arguments import accumulator, check_tensors, number, same_device
from ._call import call, choice, validation
from .types import GroupAdvantages

_group_advantages = torch.ops.prefkern.group_advantages.default

ESTIMATORS = ("grpo", "dr_grpo", "rloo")
SINGLETONS = ("zero", "reward")


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo",
    eps: float = 1e-6,
    singleton: Literal["zero", "reward"] = "zero",
) -> GroupAdvantages:
    r"""Advantages of rewards against the others of their group.

    For a group of n rewards with mean m and standard deviation s (ddof 1):

    - ``"grpo"``: :math:`(r - m) / (s + \epsilon)`
    - ``"dr_grpo"``: :math:`r - m`
    - ``"rloo"``: :math:`r` minus the mean of the other n - 1, which is :math:`n / (n - 1) \cdot (r - m)`

    Args:
        rewards: ``[B]`` float32, bfloat16 or float16 (float64 on the CPU). Constants: no gradient flows to them.
        group: ``[B]`` int64 or int32, same device. Equal ids belong together; any values, any order, groups of any sizes. On
            the CPU ids in ascending order are the fastest.
        eps: :math:`\epsilon \ge 0`. TRL uses 1e-4, verl 1e-6.
        singleton: what a group of one gets: ``"zero"`` (TRL), or ``"reward"`` (verl), as if m = 0 and s = 1: its reward,
            for ``"grpo"`` divided by 1 + eps.

    Returns:
        GroupAdvantages(advantages, mean, std, count), each ``[B]``; statistics are those of the row's group, whatever
        ``singleton`` says. Everything is summed in double, in the order of the rows. A group of equal rewards has exactly
        this mean, std 0 and advantages 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A reward that is not finite is always
            found on the CPU; on CUDA the rows of its group come out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(rewards=rewards, group=group)
    estimator_id, singleton_id = choice("estimator", estimator, ESTIMATORS), choice("singleton", singleton, SINGLETONS)
    if rewards.requires_grad:
        rewards = rewards.detach()
    if rewards.is_cuda:
        _validate(rewards)
    return GroupAdvantages(*call(_group_advantages, rewards, group, estimator_id, number("eps", eps), singleton_id))


def _validate(rewards: Tensor) -> None:
    if not validation() or torch.compiler.is_compiling():
        return
    bad = ~rewards.isfinite()
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"rewards[{i}] is {rewards[i].item()}; every reward must be finite")


@torch.library.register_fake("prefkern::group_advantages")
def _fake(rewards: Tensor, group: Tensor, estimator: int, eps: float, singleton: int) -> tuple[Tensor, ...]:
    same_device("rewards", rewards, group=group)
    torch._check(rewards.dim() == 1 and group.dim() == 1, lambda: "rewards and group must be [B]")
    torch._check(rewards.shape[0] == group.shape[0], lambda: f"group has {group.shape[0]} rows; rewards has {rewards.shape[0]}")
    dtypes = (*(accumulator(rewards),) * 3, torch.int64)
    return tuple(rewards.new_empty(rewards.shape, dtype=dtype) for dtype in dtypes)
