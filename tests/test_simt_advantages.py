"""The CUDA kernels of csrc/advantages, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import INF, NAN, close, pointer, same_bits, same_bits_in_every_order, tensor_like


def group_advantages(simt, rewards, group, *, order=None, estimator="grpo", eps=1e-6, singleton="zero"):
    """Outputs by name. With `order`, `group` is sorted and `order` says where its ids come from."""
    out = {name: tensor_like(rewards, fill=NAN) for name in ("advantages", "mean", "std")}
    sizes = tensor_like(rewards, fill=-1, dtype=torch.int64)
    args = simt.GroupArgs()
    args.rule.estimator = getattr(simt.AdvantageEstimator, estimator)
    args.rule.singleton = getattr(simt.SingletonRule, singleton)
    args.rule.eps = eps
    args.count = len(rewards)
    args.rewards, args.group, args.order, args.sizes = map(pointer, (rewards, group, order, sizes))
    for name, tensor in out.items():
        setattr(args, name, pointer(tensor))
    simt.cuda_group_advantages(args)
    return {**out, "count": sizes.int()}


def sample_groups(size: int) -> tuple[Tensor, Tensor]:
    """Rewards, and ids of groups of all sizes, among them one of equal rewards and, if there is room, groups of one."""
    rewards, group = torch.randn(size), torch.randint(-3, max(1, size // 9), (size,)) * 2**33
    rewards[group == group[0]] = 0.1
    group[1:4] = torch.arange(3)[: max(0, size - 1)] + 1
    return rewards, group


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("singleton", ["zero", "reward"])
@pytest.mark.parametrize("size", [1, 2, 8, 33, 500])
def test_group_advantages(simt, by_order, estimator, singleton, size):
    rewards, group = sample_groups(size)
    ids, order = torch.sort(group, stable=True) if by_order else (group, None)
    options = {"estimator": estimator, "singleton": singleton, "eps": 0.01}
    out = same_bits_in_every_order(simt, lambda: group_advantages(simt, rewards, ids, order=order, **options))
    expected = reference.group_advantages(rewards.double(), group, **options)
    for name in ("advantages", "mean", "std"):
        close(out[name], getattr(expected, name), atol=1e-7, rtol=5e-7)
    assert torch.equal(out["count"].long(), expected.count)
    if singleton == "zero":
        assert not out["advantages"][group == group[0]].any()


def test_group_advantages_of_ids_at_an_odd_address(simt):
    rewards, group = sample_groups(101)
    moved = torch.cat([group[:1], group])[1:]
    assert moved.data_ptr() % 16 == 8
    for name, values in group_advantages(simt, rewards, group).items():
        close(group_advantages(simt, rewards, moved)[name], values, atol=1e-7)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
def test_group_advantages_of_a_reward_that_is_not_finite(simt, bad, by_order):
    rewards, group = torch.randn(40), torch.arange(40) % 5
    ids, order = torch.sort(group, stable=True) if by_order else (group, None)
    clean = group_advantages(simt, rewards, ids, order=order)
    rewards[13] = bad
    out = group_advantages(simt, rewards, ids, order=order)
    for name in ("advantages", "mean", "std"):
        assert torch.equal(out[name].isnan(), group == 3)
        assert same_bits(out[name][group != 3], clean[name][group != 3])


def test_no_rows_launch_nothing(simt):
    simt.cuda_group_advantages(simt.GroupArgs())
