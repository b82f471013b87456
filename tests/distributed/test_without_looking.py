"""What a CUDA device does, where nobody waits to look at what the ranks say: the same results, and where a rank refuses or
disagrees NaN instead of an error on the others. Here on the CPU, with the looking switched off; on GPUs with `-m cuda`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import prefkern
from prefkern import distributed
from prefkern.distributed import advantages, collectives, filters
from ranks import run_ranks


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def blind(rank: int) -> dict[str, Any]:
    filters.looks = collectives.looks = advantages.looks = filters._narrows = lambda t: False
    values, mask = torch.randn(2, 300).round(decimals=1), torch.rand(2, 300) < 0.8
    values[0, :5], mask[0, :5] = math.nan, False
    own, own_mask, other = values[rank], mask[rank], rank == 1
    world: Any = {"process_group": "world"}
    for fraction in (0.0, 0.2, 0.77, 1.0):
        for rule in ("count", "trl"):
            found = distributed.top_quantile_mask(own, own_mask, fraction=fraction, rule=rule, **world)
            assert torch.equal(found, prefkern.top_quantile_mask(values, mask, fraction=fraction, rule=rule)[rank])
        found = distributed.masked_quantile(own, fraction, own_mask, **world)
        assert torch.equal(found, prefkern.masked_quantile(values, fraction, mask))
    wide = values.double()
    assert torch.equal(
        distributed.top_quantile_mask(wide[rank], own_mask, **world), prefkern.top_quantile_mask(wide, mask)[rank]
    )
    sums = distributed.packed_sum(torch.ones(3), torch.ones(600), torch.tensor([2]), **world)
    assert [t.sum().item() for t in sums] == [6, 1200, 4]
    assert distributed.global_count(own_mask, **world) == mask.sum()

    bad_mask = own_mask[:7] if other else own_mask
    ones = torch.ones(4, 3)
    return {
        "top, disagree": outcome(lambda: distributed.top_quantile_mask(own, fraction=0.2 + 0.1 * rank, **world).any().item()),
        "top, refused": outcome(lambda: distributed.top_quantile_mask(own, bad_mask, **world).any().item()),
        "trl, refused": outcome(lambda: distributed.top_quantile_mask(own, bad_mask, rule="trl", **world).any().item()),
        "quantile": outcome(lambda: float(distributed.masked_quantile(own, 0.5, bad_mask, **world))),
        "sums, disagree": outcome(lambda: distributed.sequence_sum(ones[: 4 - rank], **world).isnan().all().item()),
        "sums, refused": outcome(lambda: distributed.sequence_mean(ones if rank == 0 else "x", **world).isnan().all().item()),
        "count": outcome(lambda: distributed.global_count(own if other else own_mask, **world).item()),
        "moments": outcome(lambda: distributed.batch_moments(own, own[:2] if other else None, **world).isnan().all().item()),
        "afterwards": distributed.global_count(torch.ones(2, dtype=torch.bool), **world).item(),
    }


def test_without_looking() -> None:
    first, second = run_ranks(blind, 2, timeout=60)
    assert first == {
        "top, disagree": False, "top, refused": False, "trl, refused": False, "quantile": pytest.approx(math.nan, nan_ok=True),
        "sums, disagree": True, "sums, refused": True, "count": -1, "moments": True, "afterwards": 4,
    }  # fmt: skip
    assert second["top, disagree"] is False and second["sums, disagree"] is True and second["afterwards"] == 4
    mask, weights = "ValueError: mask has shape [7]", "ValueError: weights has shape [2]"
    for name, text in (
        ("top, refused", mask), ("trl, refused", mask), ("quantile", mask), ("moments", weights),
        ("sums, refused", "TypeError: values is a str"), ("count", "TypeError: mask has dtype torch.float32"),
    ):  # fmt: skip
        assert second[name].startswith(text), name


@pytest.mark.cuda
def test_on_a_gpu_one_process_over_nccl() -> None:
    """A group of one process, made to send all the same."""
    if not torch.cuda.is_available() or not prefkern.capabilities()["cuda_compiled"]:
        pytest.skip("needs an NVIDIA GPU and a build with CUDA")
    run_ranks(alone_on_a_gpu, 1)


def alone_on_a_gpu(rank: int) -> None:
    from prefkern.distributed import sequence
    from prefkern.distributed._ranks import Ranks

    torch.cuda.set_device(0)
    group = torch.distributed.new_group(backend="nccl")
    for module in (advantages, collectives, filters, sequence):
        module.ranks_of = lambda process_group: Ranks(process_group, 0, 1)
    rewards, ids = torch.rand(40, 2, device="cuda"), torch.arange(40, device="cuda") // 8
    options: dict[str, Any] = {"combine": "normalize_then_sum", "batch": "seq"}
    found = distributed.group_advantages(rewards, ids, process_group=group, **options).advantages
    assert torch.equal(found, prefkern.group_advantages(rewards, ids, **options).advantages)
    values, mask = torch.rand(16, 500, device="cuda"), torch.rand(16, 500, device="cuda") < 0.8
    torch.cuda.set_sync_debug_mode("error")
    tops = [distributed.top_quantile_mask(values, mask, rule=rule, process_group=group) for rule in ("count", "trl")]
    sums = distributed.sequence_sum(values, mask, process_group=group)
    white = distributed.whiten(values, mask, process_group=group)
    torch.cuda.set_sync_debug_mode("default")
    for rule, top in zip(("count", "trl"), tops, strict=True):
        assert torch.equal(top, prefkern.top_quantile_mask(values, mask, rule=rule))
    assert torch.equal(sums, prefkern.sequence_sum(values, mask))
    assert torch.equal(white, prefkern.whiten(values, mask))
