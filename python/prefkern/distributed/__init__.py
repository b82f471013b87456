"""Ops over several processes (torch.distributed): gloo on the CPU, NCCL on GPUs."""

from .vocab_parallel import VocabShard, vocab_shard

__all__ = ["VocabShard", "vocab_shard"]
