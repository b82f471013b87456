"""Log-probabilities from hidden states and from logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import prefkern
from prefkern import reference
from prefkern.cli.problems.base import Problem


def logprob_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Sizes that no tile divides; targets of which some are ignored and some are the most likely token."""
    shape, hidden_size, vocab = (3, 37), 72, 1003
    hidden = torch.randn(*shape, hidden_size).to(dtype)
    weight = (2 / math.sqrt(hidden_size) * torch.randn(vocab, hidden_size)).to(dtype)
    bias = torch.randn(vocab).to(dtype)
    logits = (hidden.double() @ weight.double().T).to(dtype)
    targets = torch.randint(vocab, shape)
    targets[0] = logits[0].argmax(-1)
    some = targets.masked_fill(torch.rand(shape) < 0.3, -100)
    every = {"targets": some, "outputs": ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")}
    bent = {**every, "temperature": 0.5 + torch.rand(shape), "softcap": 4.0, "logit_scale": 1.3}

    def plain_linear(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any = None, **options: Any) -> Any:
        y = hidden @ weight.T
        return reference.logits_logprobs(y if bias is None else y + bias, targets, **options)

    kept = (torch.rand(*shape, vocab) < 0.1).scatter(-1, some.clamp_min(0).unsqueeze(-1), True)
    rows = kept.view(-1, vocab)
    csr = {"offsets": torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0)), "ids": rows.nonzero()[:, 1].contiguous()}

    def replayed(function: Any) -> Any:
        def call(offsets: Tensor, ids: Tensor, kept: Tensor, **arguments: Any) -> Any:
            return function(**arguments, keep=(offsets, ids))

        return call

    def plain_replayed(hidden: Tensor, weight: Tensor, targets: Tensor, outputs: Any, kept: Tensor, **_: Any) -> Any:
        return reference.logits_logprobs((hidden @ weight.T).masked_fill(~kept, -math.inf), targets, outputs=outputs)

    linear = (prefkern.linear_logprobs, reference.linear_logprobs, plain_linear)
    over_logits = (prefkern.logits_logprobs, reference.logits_logprobs, reference.logits_logprobs)
    both = {"hidden": hidden, "weight": weight}
    one, far = {"logits": logits}, {"logits": logits + 500}
    yield Problem("linear_logprobs", "logp", both, {"targets": targets}, *linear)
    yield Problem("linear_logprobs", "all outputs, ignored rows", both, every, *linear)
    yield Problem("linear_logprobs", "bias, softcap, temperatures", {**both, "bias": bias}, bent, *linear)
    yield Problem(
        "linear_logprobs",
        "kept tokens",
        both,
        {"targets": some, "outputs": ("entropy", "lse", "sum_sq_probs"), "kept": kept, **csr},
        replayed(prefkern.linear_logprobs),
        replayed(reference.linear_logprobs),
        plain_replayed,
    )
    yield Problem("logits_logprobs", "logp", one, {"targets": targets}, *over_logits)
    yield Problem("logits_logprobs", "all outputs, ignored rows", one, every, *over_logits)
    yield Problem("logits_logprobs", "softcap, temperatures", one, bent, *over_logits)
    yield Problem("logits_logprobs", "offset of 500", far, every, *over_logits)
