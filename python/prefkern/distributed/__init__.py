"""What of a loss crosses ranks, with torch.distributed: gloo on the CPU, NCCL on GPUs.

Every function takes `process_group`: ``"world"``, a group of `torch.distributed`, or None, which is one process and sends
nothing (`dist.group.WORLD` is None before `init_process_group`). It is called by all members of the group, in the same order,
and gives what one process would on the data of all ranks in their order. Results are equal on all ranks. docs/scaling.md lists
the messages. Tensors lie on a device that the group's backend serves.

A rank whose arguments are wrong does not leave the others waiting: its message says so, and all raise. What a rank raises
elsewhere, before it calls, others notice when the timeout of the process group is over.

A head whose vocabulary is cut over the processes of a group is :func:`prefkern.linear_logprobs` with ``group=``; `vocab_shard`
and `gathered` are for its weight.
"""

from .advantages import batch_moments, group_advantages, whiten
from .collectives import GatheredRows, gather_rows, global_count, packed_sum
from .filters import masked_quantile, top_quantile_mask
from .gathered import gathered
from .sequence import sequence_mean, sequence_sum
from .vocab_parallel import VocabShard, vocab_shard

__all__ = [
    "GatheredRows",
    "VocabShard",
    "batch_moments",
    "gather_rows",
    "gathered",
    "global_count",
    "group_advantages",
    "masked_quantile",
    "packed_sum",
    "sequence_mean",
    "sequence_sum",
    "top_quantile_mask",
    "vocab_shard",
    "whiten",
]
