"""Advantages whose groups lie on several ranks, and batch statistics of all ranks. Constants, as on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops._arguments import check_tensors, number
from ..ops.types import GroupAdvantages
from ._ranks import ProcessGroup, Ranks, attempt, device_for, looks, ranks_of
from .collectives import exchange_rows

MOMENTS = 4
"""Numbers of a rank's message in `batch_moments`: n, mean, M2, and whether it refuses."""


def group_advantages(
    rewards: Tensor, group: Tensor, *, lengths: Tensor | None = None, process_group: ProcessGroup, **options: Any
) -> GroupAdvantages:
    """:func:`prefkern.group_advantages` of the rows of all ranks together: groups may straddle ranks, and ``batch=`` is the
    batch of all. Returns this rank's rows.

    Every rank computes what one process would on the rows of all, in the order of the ranks, and takes its own: the bits are
    those of one process, for every estimator, statistic and option. One all-gather of ``(group, rewards[, lengths])``, see
    :func:`prefkern.distributed.gather_rows`: a few bytes a completion, once a rollout.

    Groups that are whole on their ranks, with ``batch="none"``, need no message: call :func:`prefkern.group_advantages`.

    Args:
        rewards: ``[B]`` or ``[B, K]``, as there. B may differ from rank to rank and be 0.
        group: int64 or int32 ``[B]``. Ids are shared by all ranks: equal ids on two ranks are one group. Where each rank
            numbers its prompts by itself, make them differ first, by ``group + rank * 2**32`` for instance.
        lengths: as there.
        process_group: ``"world"``, a group of `torch.distributed`, or None: one process.
        options: those of :func:`prefkern.group_advantages`, given alike on every rank, but for ``outputs``.

    Raises:
        ValueError, TypeError: as there, on every rank if a reward or length is bad on any (rows are then counted over all
            ranks); where ranks disagree in K, dtypes or options, naming what differs, on every rank.
        RuntimeError: on the other ranks, where one has arguments of a wrong type or shape.
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        return ops.group_advantages(rewards, group, lengths=lengths, **options)
    rows, refusal = attempt(lambda: _checked(rewards, group, lengths))
    agree = "; ".join(f"{name}={_plain(value)!r}" for name, value in sorted(options.items()) if name != "outputs")
    gathered = exchange_rows(rows, ranks, "group_advantages", agree, refusal, device_for(rewards, ranks))
    whole = gathered.tensors
    try:
        result = ops.group_advantages(whole["rewards"], whole["group"], lengths=whole.get("lengths"), **options)
    except ValueError as error:
        own = gathered.own
        raise ValueError(
            f"{error} (rows of all ranks in order; rank {ranks.rank}, this one, has {own.stop - own.start} from {own.start} on)"
        ) from None
    own_rows: Any = (None if t is None else t[gathered.own].clone() for t in result)
    return GroupAdvantages(*own_rows)


def batch_moments(values: Tensor, weights: Tensor | None = None, *, process_group: ProcessGroup) -> Tensor:
    """:func:`prefkern.batch_moments` of the values of all ranks: number, mean and sum of squares about the mean, float64 [3].

    Each rank's moments, 32 bytes, in one all-gather, merged in the order of the ranks (:func:`prefkern.merge_moments`): equal
    bits on all ranks, and those of one process up to rounding in float64. GDPO and REINFORCE++ on ranks that hold whole groups:

        a = gdpo_advantages(rewards, group, batch_norm="none")
        a = prefkern.batch_normalize(a, batch_moments(a, process_group="world"), mode="seq", eps=1e-4)

    Args:
        values, weights: as there; their shapes may differ from rank to rank.
        process_group: ``"world"``, a group of `torch.distributed`, or None: one process.

    Raises:
        ValueError, TypeError: as there.
        RuntimeError: on the other ranks, where one refuses its arguments; on CUDA, without `prefkern.set_validation(True)`,
            their moments come out NaN.
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        return ops.batch_moments(values, weights)
    return _merged(lambda: ops.batch_moments(values, weights), values, ranks, "batch_moments")


def whiten(values: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8, process_group: ProcessGroup) -> Tensor:
    """:func:`prefkern.whiten` by the moments of all ranks: one all-gather of 32 bytes a rank.

    Args, and what is raised: as there and in :func:`prefkern.distributed.batch_moments`. Fewer than 2 tokens on all ranks
    together are an error; a rank may have none.
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        return ops.whiten(values, mask, eps=eps)

    def moments() -> Tensor:
        if mask is not None:
            check_tensors(mask=mask)
            if mask.dtype != torch.bool:
                raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
        number("eps", eps)
        return ops.batch_moments(values, mask)

    return ops.whiten(values, mask, eps=eps, moments=_merged(moments, values, ranks, "whiten"))


def _merged(make: Callable[[], Tensor], values: Tensor, ranks: Ranks, what: str) -> Tensor:
    """The moments that all ranks make, as those of the whole."""
    moments, refusal = attempt(make)
    if moments is None:
        ranks.gather(torch.full((MOMENTS,), torch.nan, dtype=torch.float64, device=device_for(values, ranks)))
        raise refusal or AssertionError
    received = ranks.gather(torch.cat([moments, moments.new_zeros(1)]))
    if looks(received):
        who = received[:, 3].isnan().nonzero()
        if len(who):
            raise RuntimeError(f"{what}: rank {int(who[0])} of process_group refuses its arguments; its own error says why")
    return ops.merge_moments(received[:, :3].contiguous())


def _checked(rewards: Tensor, group: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
    check_tensors(rewards=rewards, group=group)
    rows: dict[str, Tensor] = {"rewards": rewards.detach(), "group": group}
    if lengths is not None:
        check_tensors(lengths=lengths)
        rows["lengths"] = lengths
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards has shape {list(rewards.shape)}; expected [B] or [B, K]")
    if not rewards.is_floating_point():
        raise TypeError(f"rewards has dtype {rewards.dtype}; accepted: float32, bfloat16, float16, float64")
    for name, t in rows.items():
        if name == "rewards":
            continue
        if t.shape != rewards.shape[:1]:
            raise ValueError(f"{name} has shape {list(t.shape)}; [{len(rewards)}] is expected, a row for each of rewards")
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} has dtype {t.dtype}; accepted: int64, int32")
        if t.device != rewards.device:
            raise ValueError(f"{name} is on {t.device} but rewards is on {rewards.device}; they must be on the same device")
    return rows


def _plain(value: Any) -> Any:
    """An option as text that says its value: of tensors and tuples, lists."""
    return value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value
