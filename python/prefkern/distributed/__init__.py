"""Ops over several processes (torch.distributed): gloo on the CPU, NCCL on GPUs."""

from .gathered import gathered
from .vocab_parallel import VocabShard, vocab_shard

__all__ = ["VocabShard", "gathered", "vocab_shard"]
