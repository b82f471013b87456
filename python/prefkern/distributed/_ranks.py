"""Which processes take part in a call, what each says of itself in the first numbers of its message, and how that is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import validation

ProcessGroup = dist.ProcessGroup | Literal["world"] | None
"""None: this process alone. "world": all of them. Or a group of torch.distributed that this process belongs to."""

HEAD = 8
"""Numbers that a summed message begins with: see `head`."""

_T = TypeVar("_T")


class Ranks(NamedTuple):
    """A group of more than one process, as one of them sees it."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def gather(self, message: Tensor) -> Tensor:
        """The messages of all ranks, [size, *]; of the same size and dtype on each."""
        out = message.new_empty(self.size, *message.shape)
        dist.all_gather(list(out.unbind(0)), message, group=self.group)
        return out

    def reduce(self, message: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduced in place over all ranks; of the same size and dtype on each."""
        dist.all_reduce(message, op=op, group=self.group)
        return message


def ranks_of(process_group: ProcessGroup, name: str = "process_group") -> Ranks | None:
    """The ranks that take part; None if this process is alone and there is nothing to send. `name` is that of the argument."""
    if process_group is None:
        return None
    if process_group == "world":
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{name} is 'world' but torch.distributed is not initialised; call torch.distributed.init_process_group "
                "first, or pass None for one process"
            )
        process_group = dist.group.WORLD
        assert process_group is not None
    elif process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} is one that this rank does not belong to; only its members may call")
    elif not isinstance(process_group, dist.ProcessGroup):
        hint = "; of a DeviceMesh, pass mesh.get_group()" if type(process_group).__name__ == "DeviceMesh" else ""
        raise TypeError(f"{name} is {process_group!r}; 'world', a process group of torch.distributed or None is expected{hint}")
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError(f"{name} is one that this rank does not belong to; only its members may call")
    size = dist.get_world_size(process_group)
    return None if size == 1 else Ranks(process_group, rank, size)


def looks(t: Tensor) -> bool:
    """Whether what the others say of themselves is looked at: always on the CPU; on CUDA, where it means to wait for the
    device, under `prefkern.set_validation(True)`."""
    return not torch.compiler.is_compiling() and (t.device.type == "cpu" or validation())


def attempt(make: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """What `make` returns, or what it raises. A rank whose own arguments are wrong still sends its message, which says so: the
    others would wait for it."""
    try:
        return make(), None
    except Exception as error:  # raised again when the message is out
        return None, error


def device_for(like: Any, ranks: Ranks) -> torch.device:
    """Where a message lies whose tensor is `like`, if it is one."""
    if isinstance(like, Tensor):
        return like.device
    nccl = "nccl" in str(dist.get_backend(ranks.group))
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def head(text: str, ranks: Ranks, refusal: Exception | None, like: Tensor) -> Tensor:
    """What a rank adds to the first numbers of a message that is summed: two halves of a checksum of what all must agree on,
    each with its square, since n numbers are equal exactly if n times the sum of their squares is the square of their sum;
    whether it refuses, and who it then is. [HEAD], of the dtype of the message; the sums are exact in float64 too."""
    high, low = divmod(checksum(text), 1 << 16)
    refuses = refusal is not None
    numbers = [high, high * high, low, low * low, int(refuses), (ranks.rank + 1) * refuses, 0, 0]
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


def all_well(sums: Tensor, ranks: Ranks) -> Tensor:
    """Whether no rank refuses and all agree, of the summed heads: bool, 0-d, without looking at it."""
    sums = sums[:HEAD].long()
    agree = (sums[0] * sums[0] == ranks.size * sums[1]) & (sums[2] * sums[2] == ranks.size * sums[3])
    return agree & (sums[4] == 0)


def check_heads(sums: Tensor, ranks: Ranks, what: str, text: str, refusal: Exception | None) -> None:
    """Raise what the summed heads say is wrong: on this rank its own refusal, on the others that there is one."""
    if refusal is not None:
        raise refusal
    high, high2, low, low2, refused, who = (int(x) for x in sums[:6].tolist())
    if refused:
        by = f"rank {who - 1} refuses its arguments" if refused == 1 else f"{refused} ranks refuse their arguments"
        raise RuntimeError(f"{what}: {by}; its own error says why")
    if high * high != ranks.size * high2 or low * low != ranks.size * low2:
        raise ValueError(
            f"{what}: the ranks of process_group disagree; rank {ranks.rank} has {text}, another rank something else"
        )


def describe(**tensors: Tensor | None) -> str:
    """Names, dtypes and shapes."""
    return ", ".join(f"{name} {str(t.dtype)[6:]} {list(t.shape)}" for name, t in tensors.items() if t is not None)
