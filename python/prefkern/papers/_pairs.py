"""Preference pairs as a trainer has them, and recipes for them: everything between two log-probs per token and a loss.

    recipe = prefkern.papers.load_pair_recipe("simpo:beta=2.5")
    pairs = Pairs(logp, mask, ref_logp)                # [2P, T]: the chosen responses, then the rejected ones
    out = recipe.loss(pairs)                           # LossOutput; gradient to logp

A recipe is a frozen dataclass whose fields are the paper's options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops import LossOutput, sequence_sum
from ._shared import check_values, may_look


class Sides(NamedTuple):
    """A number per pair for each of its sides, [P] each."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Pairs:
    """The tokens of P pairs: 2P responses, all chosen ones first, each rejected one P rows after its chosen one (TRL's
    concatenated layout). Padded `[2P, T]`, or packed `[N]` with `cu_seqlens`."""

    logp: Tensor
    """Log-probs of the tokens under the policy."""
    mask: Tensor | None = None
    """bool, like the tokens: True where a token belongs to the response and counts. None: all do."""
    ref_logp: Tensor | None = None
    """Log-probs under the reference model; a constant."""
    cu_seqlens: Tensor | None = None
    """int32 [2P + 1]: where packed responses begin and end."""
    extra: Mapping[str, Tensor] | None = None
    """What single papers ask for: margins and scores per pair [P], other models' log-probs per token, ..."""

    def __post_init__(self) -> None:
        rows = len(self.logp) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        if rows % 2:
            raise ValueError(f"logp has {rows} responses; chosen and rejected ones, so an even number is expected")

    def __len__(self) -> int:
        """P."""
        return (len(self.logp) if self.cu_seqlens is None else len(self.cu_seqlens) - 1) // 2

    def get(self, name: str) -> Tensor | None:
        """A field, or an entry of `extra`."""
        value = self.extra.get(name) if self.extra and name in self.extra else getattr(self, name, None)
        assert value is None or isinstance(value, Tensor)
        return value

    def require(self, name: str) -> Tensor:
        """The same; ValueError if it is None."""
        value = self.get(name)
        if value is None:
            place = name if name in self.__dataclass_fields__ else f"extra[{name!r}]"
            raise ValueError(f"pairs.{place} is None; a torch.Tensor is expected")
        return value

    def sums(self, values: Tensor | None = None, *, minus: Tensor | None = None, weights: Tensor | None = None) -> Sides:
        """Sums over each response's tokens of `values` (None: `logp`), less `minus`, times `weights`."""
        of = self.logp if values is None else values
        total = sequence_sum(of, self.mask, cu_seqlens=self.cu_seqlens, minus=minus, weights=weights)
        return Sides(*total.chunk(2))

    def log_probs(self) -> Sides:
        """log pi of the responses."""
        return self.sums()

    def ref_log_probs(self) -> Sides:
        """log pi_ref of the responses; zeros without a reference."""
        if self.ref_logp is None:
            zeros = self.logp.new_zeros(len(self), dtype=torch.promote_types(self.logp.dtype, torch.float32))
            return Sides(zeros, zeros)
        return self.sums(self.ref_logp.detach())

    def log_ratios(self) -> Sides:
        """log pi - log pi_ref of the responses, subtracted per token, so that two large sums do not cancel."""
        return self.sums(minus=self.ref_logp)

    def lengths(self) -> Sides:
        """How many tokens of each response count; ValueError for a response without any, where that may be looked at."""
        return Sides(*self.lengths_of_all().chunk(2))

    def lengths_of_all(self) -> Tensor:
        """The same of all 2P responses."""
        ones = torch.ones_like(self.logp, dtype=torch.float32)
        counts = sequence_sum(ones, self.mask, cu_seqlens=self.cu_seqlens)
        check_values("lengths", counts, counts > 0, "a response needs at least one token that counts")
        return counts


@dataclass(frozen=True)
class PairRecipe(ABC):
    """One preference objective. Subclasses set `name` and `needs`, and define `pair_loss`."""

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("ref_logp",)
    """Fields of the pairs, or names in their `extra`, without which `loss` raises."""

    @abstractmethod
    def pair_loss(self, pairs: Pairs) -> LossOutput:
        """The loss of pairs that have what is needed."""

    def loss(self, pairs: Pairs) -> LossOutput:
        """The loss of these pairs; gradient to `pairs.logp`. ValueError if they lack what this recipe needs, and
        for a response without tokens where that may be looked at."""
        for key in self.needs:
            if pairs.get(key) is None:
                place = key if key in Pairs.__dataclass_fields__ else f"extra[{key!r}]"
                raise ValueError(f"recipe {self.name!r} needs pairs.{place}, which is None")
        if may_look(pairs.logp):
            pairs.lengths()
        return self.pair_loss(pairs)

    def options(self) -> dict[str, Any]:
        """The options and their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_pair_lengths(**lengths: Tensor | None) -> None:
    """ValueError that names the first response without a token, where that may be looked at."""
    for name, t in lengths.items():
        if t is not None:
            check_values(name, t, t > 0, "a response needs at least one token")


def nll(chosen_logp: Tensor, chosen_lengths: Tensor, reduction: str) -> Tensor:
    """Negative log-likelihood of the chosen responses, from their summed log-probs [P] and lengths [P]: `"token"`, over all
    their tokens (TRL, Liger), `"response"`, the mean of each response's mean (OpenRLHF, the IRPO paper), or `"sum"`, the
    mean of their sums."""
    if reduction not in ("token", "response", "sum"):
        raise ValueError(f"nll_reduction is {reduction!r}; accepted: 'token', 'response', 'sum'")
    if reduction == "token":
        return -chosen_logp.sum() / chosen_lengths.sum()
    return -(chosen_logp / chosen_lengths if reduction == "response" else chosen_logp).mean()


def add_nll(
    out: LossOutput, weight: float, chosen_logp: Tensor, chosen_lengths: Tensor | None, reduction: str = "token"
) -> LossOutput:
    """The loss plus `weight` times :func:`nll`, which becomes a metric; unchanged for weight 0."""
    if weight == 0:
        return out
    if chosen_lengths is None and reduction != "sum":
        raise ValueError(f"chosen_lengths is None; nll_reduction {reduction!r} needs them")
    lengths = torch.ones_like(chosen_logp) if chosen_lengths is None else chosen_lengths
    check_pair_lengths(chosen_lengths=chosen_lengths)
    term = nll(chosen_logp, lengths, reduction)
    return LossOutput(out.loss + weight * term, {**out.metrics, "nll": term.detach()})
