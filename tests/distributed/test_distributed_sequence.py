"""Sequences whose tokens lie on several ranks: sums, means, and losses of them with their gradients."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import distributed
from ranks import run_ranks

F64 = torch.float64
B, T = 6, 23
CUTS = {2: (0, 10, 23), 4: (0, 3, 3, 17, 23)}  # one of four ranks holds no token


def batch(dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    mask = torch.arange(T) < torch.tensor([[23], [11], [2], [0], [17], [9]])
    mask[0, 4] = False
    logp = -torch.rand(B, T, dtype=dtype)
    logp[0, 4] = math.nan
    return {
        "logp": logp, "old": logp + 0.1 * torch.randn(B, T, dtype=dtype), "weights": torch.rand(B, T, dtype=dtype),
        "mask": mask, "advantages": torch.randn(B, dtype=dtype), "lengths": mask.sum(1).to(dtype),
    }  # fmt: skip


def columns(rank: int, size: int, t: torch.Tensor, striped: bool) -> torch.Tensor:
    """This rank's tokens: a stretch of them, or every size-th."""
    return t[:, rank::size] if striped else t[:, CUTS[size][rank] : CUTS[size][rank + 1]]


def packed(t: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return t[mask], ends


KINDS: list[dict[str, Any]] = [{}, {"minus": "old"}, {"minus": "old", "transform": "exp", "weights": "weights"}]


def sums_of_a_share(rank: int, size: int) -> None:
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 1e-6)):
        rows = batch(dtype)
        for kind in KINDS:
            options = {name: rows.get(of, of) for name, of in kind.items()}
            for whole_op, op in (
                (prefkern.sequence_sum, distributed.sequence_sum),
                (prefkern.sequence_mean, distributed.sequence_mean),
            ):
                whole_logp = rows["logp"].clone().requires_grad_()
                expected = whole_op(whole_logp, rows["mask"], **options)
                slope = torch.linspace(-1, 2, B, dtype=dtype)
                (expected * slope).sum().backward()
                for striped in (False, True):
                    part = {name: columns(rank, size, t, striped) for name, t in rows.items() if t.dim() == 2}
                    own = {name: part.get(of, of) for name, of in kind.items()}
                    for gradient, factor in (("sum", 1), ("mean", size)):
                        logp = part["logp"].clone().requires_grad_()
                        found = op(logp, part["mask"], **own, process_group="world", gradient=gradient)
                        assert found.dtype == dtype
                        assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)
                        (found * slope).sum().backward()
                        grad = columns(rank, size, whole_logp.grad, striped)
                        assert_close(logp.grad, grad * factor, rtol=tolerance, atol=tolerance)
                    flat, ends = packed(part["logp"], part["mask"])
                    flat.requires_grad_()
                    own = {name: t[part["mask"]] if isinstance(t, torch.Tensor) else t for name, t in own.items()}
                    found = op(flat, cu_seqlens=ends, **own, process_group="world")
                    assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)
                    (found * slope).sum().backward()
                    assert_close(flat.grad, grad[part["mask"]], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [2, 4])
def test_sums_and_means(size: int) -> None:
    run_ranks(sums_of_a_share, size, size)


def gspo(logp: torch.Tensor, mean: Callable[..., torch.Tensor], rows: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    s = mean(logp, rows["mask"], minus=rows["old"], **options).exp()
    a, n = rows["advantages"], rows["lengths"]
    each = torch.maximum(-a * s, -a * s.clamp(1 - 3e-4, 1 + 4e-4)) * n / (n + 1e-8)  # as seq-mean-token-mean does
    return each[n > 0].mean()


def losses_of_a_share(rank: int, logp: torch.Tensor, ref: torch.Tensor, kernel: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Log-probs that depend on a parameter which all ranks share, as a model's would."""
    rows = batch()
    results = []
    for gradient in ("sum", "mean"):
        shared = kernel.clone().requires_grad_()
        part = {name: columns(rank, size, t, True) if t.dim() == 2 else t for name, t in rows.items()}
        own = columns(rank, size, logp, True) * shared
        mean = distributed.sequence_mean
        loss = gspo(own, mean, part, process_group="world", gradient=gradient)
        loss.backward()
        results += [loss.detach(), shared.grad]

        shared = kernel.clone().requires_grad_()
        own = columns(rank, size, logp, True) * shared
        s = distributed.sequence_sum(
            own, part["mask"], minus=columns(rank, size, ref, True), process_group="world", gradient=gradient
        )
        loss = prefkern.preference_loss(s[: B // 2], s[B // 2 :], beta=0.3).loss
        loss.backward()
        results += [loss.detach(), shared.grad]
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_gspo_and_dpo_of_sharded_sequences(size: int) -> None:
    rows = batch()
    logp, ref = -torch.rand(B, T, dtype=F64), -torch.rand(B, T, dtype=F64)
    kernel = torch.tensor(1.02, dtype=F64)

    shared = kernel.clone().requires_grad_()
    expected = prefkern.policy_loss(
        logp * shared, rows["old"], rows["advantages"], rows["mask"], kind="gspo", eps_low=3e-4, eps_high=4e-4,
        ratio_clamp=None, agg="seq-mean-token-mean",
    ).loss  # fmt: skip
    expected.backward()
    by_gspo = shared.grad.clone()
    shared.grad = None
    s = prefkern.sequence_sum(logp * shared, rows["mask"], minus=ref)
    dpo = prefkern.preference_loss(s[: B // 2], s[B // 2 :], beta=0.3).loss
    dpo.backward()

    ranks = run_ranks(losses_of_a_share, size, logp, ref, kernel, size)
    for i, (loss, gradient) in enumerate(((expected, by_gspo), (dpo, shared.grad))):
        for rank in ranks:
            assert torch.equal(rank[2 * i], ranks[0][2 * i])
            assert_close(rank[2 * i], loss.detach(), rtol=1e-12, atol=0)
        assert_close(sum(rank[2 * i + 1] for rank in ranks), gradient, rtol=1e-11, atol=0)  # gradient="sum"
        assert_close(sum(rank[4 + 2 * i + 1] for rank in ranks) / size, gradient, rtol=1e-11, atol=0)  # "mean"


def test_without_a_group_it_is_the_op() -> None:
    rows = batch(torch.float32)
    logp, mask = rows["logp"], rows["mask"]
    found = distributed.sequence_sum(logp, mask, minus=rows["old"], process_group=None)
    assert torch.equal(found, prefkern.sequence_sum(logp, mask, minus=rows["old"]))
    assert_close(distributed.sequence_mean(logp, mask, process_group=None), prefkern.sequence_mean(logp, mask))
    low = logp.bfloat16()
    assert torch.equal(distributed.sequence_sum(low, mask, process_group=None), prefkern.sequence_sum(low, mask))


def second_derivative(rank: int) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 8, dtype=F64).view(2, 4)[:, 2 * rank : 2 * rank + 2].clone().requires_grad_()
    (total,) = distributed.packed_sum(x.square().sum(1), process_group="world")
    (first,) = torch.autograd.grad(total.pow(3).sum(), x, create_graph=True)
    return [first.detach(), torch.autograd.grad(first.sum(), x)[0]]


def test_second_derivatives_are_those_of_the_local_part() -> None:
    """The whole gradient, differentiated with respect to one's own tokens."""
    x = torch.linspace(-1, 1, 8, dtype=F64).view(2, 4).requires_grad_()
    (first,) = torch.autograd.grad(x.square().sum(1).pow(3).sum(), x, create_graph=True)
    found = run_ranks(second_derivative, 2)
    assert_close(torch.cat([part[0] for part in found], 1), first.detach(), rtol=1e-13, atol=1e-15)
    for rank, part in enumerate(found):
        columns_of_rank = slice(2 * rank, 2 * rank + 2)
        second = torch.autograd.grad(first[:, columns_of_rank].sum(), x, retain_graph=True)[0][:, columns_of_rank]
        assert_close(part[1], second, rtol=1e-12, atol=1e-14)


def outcome(call: Callable[[], Any]) -> str:
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused(rank: int) -> list[str]:
    x, other = torch.ones(4, 3), rank == 1
    many = torch.ones(700, 1)
    op, mean = distributed.sequence_sum, distributed.sequence_mean
    calls: list[Callable[[], Any]] = [
        lambda: op(x[:3] if other else x, process_group="world"),
        lambda: op(many if other else x, process_group="world"),
        lambda: op(x.double() if other else x, process_group="world"),
        lambda: op(x, gradient="mean" if other else "sum", process_group="world"),
        lambda: mean(x, process_group="world") if other else op(x, process_group="world"),
        lambda: op(x, torch.ones(4, 2, dtype=torch.bool) if other else None, process_group="world"),
        lambda: op("x" if other else x, process_group="world"),
        lambda: op(x, gradient="max", process_group="world"),
        lambda: mean(x, transform="log" if other else "none", process_group="world"),
        lambda: op(many, process_group="world").sum().item(),
        lambda: op(x, process_group="world").tolist(),
    ]
    return [outcome(call) for call in calls]


def test_a_bad_argument_is_an_error_on_every_rank() -> None:
    disagree = "ValueError: sequence_(sum|mean): the ranks of process_group disagree"
    refuses = "RuntimeError: sequence_(sum|mean): rank 1 refuses its arguments"
    expected = [
        (
            disagree + r"; rank 1 has sequence_sum of tensor 0 float32 \[3\], gradient sum",
            disagree + r"; rank [02] has .* \[4\]",
        ),
        (disagree + r"; rank 1 has sequence_sum of tensor 0 float32 \[700\]", disagree),
        (disagree + r".*float64", disagree),
        (disagree + ".*gradient mean", disagree),
        (disagree, disagree),
        ("ValueError: mask has shape", refuses),
        ("TypeError: values is a str", refuses),
        ("ValueError: gradient is 'max'; accepted: 'sum', 'mean'", "ValueError: gradient is 'max'"),
        ("ValueError: transform is 'log'", refuses),
        ("returned 2100.0", "returned 2100.0"),
        (r"returned \[9.0, 9.0, 9.0, 9.0\]", r"returned \[9.0, 9.0, 9.0, 9.0\]"),
    ]
    ranks = run_ranks(refused, 3)
    for i, (on_rank_1, on_others) in enumerate(expected):
        for rank, heard in enumerate(ranks):
            assert re.search(on_rank_1 if rank == 1 else on_others, heard[i]), (i, rank, heard[i])
