"""Random pairs of responses, and the calls on them: chosen ones first, then the rejected, as TRL and Liger lay them out."""

from dataclasses import dataclass, replace

import torch

from parity.batches import F64, value_and_gradient


@dataclass
class PairBatch:
    """2P sequences of prompt and response. Everything per token is [2P, T] and belongs to the token that is predicted."""

    logp: torch.Tensor
    ref_logp: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    mask: torch.Tensor  # of the response
    inside: torch.Tensor  # of prompt and response
    margins: torch.Tensor  # [P]

    @property
    def pairs(self):
        return len(self.mask) // 2

    @property
    def lengths(self):
        """Of the chosen responses, and of the rejected ones."""
        return self.mask.sum(1).chunk(2)

    @property
    def ref_sums(self):
        return response_sums(self.ref_logp, self.mask)

    def nan_outside(self):
        """The same batch, NaN where there is no response token."""
        hidden = {
            name: getattr(self, name).masked_fill(~self.mask, float("nan")) for name in ("logp", "ref_logp", "log_sum_sq_probs")
        }
        return replace(self, **hidden)


def make_pairs(seed, dtype=F64, *, pairs=5, columns=13, spread=0.4):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size):
        return torch.rand(size, generator=generator, dtype=F64)

    shape = (2 * pairs, columns)
    prompts = torch.randint(3, (pairs,), generator=generator).repeat(2)  # of tokens that something predicts
    lengths = torch.randint(2, columns - 2, (2 * pairs,), generator=generator)
    lengths[0], lengths[-1] = 1, columns - 2
    position = torch.arange(columns)
    mask = (position >= prompts[:, None]) & (position < (prompts + lengths)[:, None])
    logp = -3 * uniform(*shape) - 0.01
    floats = {
        "logp": logp,
        "ref_logp": logp + spread * torch.randn(shape, generator=generator, dtype=F64),
        "log_sum_sq_probs": -3 * uniform(*shape),
        "margins": uniform(pairs),
    }
    # Multiples of 2^-20: exact in both types, and so are their sums.
    rounded = {name: (value * 2**20).round().mul(2.0**-20).to(dtype) for name, value in floats.items()}
    return PairBatch(**rounded, mask=mask, inside=position < (prompts + lengths)[:, None])


def response_sums(tokens, mask):
    """[2P, T] -> those of the chosen responses [P], and of the rejected ones."""
    return tokens.where(mask, 0.0).sum(1).chunk(2)


def our_pairs(loss, batch):
    """`loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)` of the responses' sums, NaN outside the mask:
    loss, gradient of every token, metrics."""
    hidden = batch.nan_outside()
    refs = response_sums(hidden.ref_logp, batch.mask)

    def of(leaf):
        out = loss(*response_sums(leaf, batch.mask), *refs)
        return (out, None) if isinstance(out, torch.Tensor) else (out.loss, out.metrics)

    return value_and_gradient(of, hidden.logp)
