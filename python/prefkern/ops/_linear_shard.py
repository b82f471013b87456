"""Fake implementations of the ops that linear_logprobs of a sharded vocabulary is made of. Their callers, with autograd, are in
``prefkern.distributed.vocab_parallel``; the ops themselves in ``csrc/logprobs/linear_shard.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import accumulator, same_device
from ._call import no_double_backward
from .logprobs import _GRAD_BIAS, _GRAD_HIDDEN, _GRAD_WEIGHT, _fake_outputs

STATE_ARRAYS = 7


@torch.library.register_fake("prefkern::linear_shard")
def _fake_shard(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_temperature: Tensor | None, *options: Any
) -> Tensor:
    same_device("hidden", hidden, weight=weight, targets=targets, bias=bias, temperature=row_temperature)
    torch._check(hidden.dim() == 2 and weight.dim() == 2, lambda: "hidden must be [N, H] and weight [V, H]")
    return hidden.new_empty((STATE_ARRAYS, hidden.shape[0]), dtype=accumulator(hidden))


@torch.library.register_fake("prefkern::merge_linear_shards")
def _fake_merge(
    states: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float, softcap: float, logit_scale: float,
    ignore_index: int, outputs: int, vocab: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    same_device("states", states, targets=targets, temperature=row_temperature)
    return _fake_outputs(states, states.shape[2], outputs)


@torch.library.register_fake("prefkern::linear_shard_backward")
def _fake_shard_backward(
    g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, row_temperature: Tensor | None, entropy: Tensor, stats: Tensor, temperature: float, softcap: float,
    logit_scale: float, ignore_index: int, needs: int, chunk_bytes: int, first_col: int, vocab: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = hidden.new_empty((0,), dtype=accumulator(hidden))
    return (
        hidden.new_empty(hidden.shape, dtype=accumulator(hidden)) if needs & _GRAD_HIDDEN else none,
        weight.new_empty(weight.shape) if needs & _GRAD_WEIGHT else none.clone(),
        bias.new_empty(bias.shape) if needs & _GRAD_BIAS and bias is not None else none.clone(),
    )


no_double_backward("linear_shard_backward")
