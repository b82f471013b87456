"""How reliable each annotator is, learned while a policy trains (LCPO / RE-PO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import validation

_EDGE = 1e-6


class AnnotatorReliability:
    r"""The probability that an annotator's label is right, for K annotators: an exponential moving average.

    After each optimiser step, with w the posterior probability of each pair's label (`prefkern.label_posterior`), for every
    annotator k that the batch holds

    .. math:: \eta_k \leftarrow (1 - a)\,\eta_k + a\;\mathrm{mean}_{i:\,k_i = k}\, w_i

    Annotators that are absent keep their value. With a = 1 and all data in the batch this is the exact step of EM.

        reliability = AnnotatorReliability(K)
        for micro_batch in step:                       # the loss takes reliability.eta and the ids
            reliability.accumulate(w, annotator)
        reliability.update()                           # once per optimiser step

    Args:
        K: how many annotators; ids are 0 to K - 1. 1 if they are not known.
        init: where to start, in [0.5, 1]: a number, or one per annotator [K].
        ema: a, in (0, 1].
        reduce: with data parallelism, what sums a tensor over all ranks: ``"world"``, a process group of `torch.distributed`,
            or a function that takes a tensor and sums it in place or returns the sum. Every rank must then call `update`
            equally often; the sums and counts are summed before the average moves, so that ranks stay equal. None: one process.
        device: of eta; float64, since many small steps add up.

    eta is kept in [1e-6, 1 - 1e-6], where its logit is finite. A w that is NaN is a ValueError, before anything changes; on
    CUDA, where values are not looked at unless `prefkern.set_validation(True)`, its annotator keeps the value that it had.
    """

    def __init__(
        self,
        K: int,
        init: float | Tensor = 0.9,
        ema: float = 0.1,
        *,
        reduce: Callable[[Tensor], Tensor | None] | dist.ProcessGroup | Literal["world"] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(K, bool) or not isinstance(K, int) or K < 1:
            raise ValueError(f"K is {K!r}; a positive integer is expected")
        if not 0 < ema <= 1:
            raise ValueError(f"ema is {ema}; a number in (0, 1] is expected")
        if not (reduce is None or reduce == "world" or callable(reduce) or isinstance(reduce, dist.ProcessGroup)):
            raise TypeError(f"reduce is {reduce!r}; 'world', a process group, a function or None is expected")
        start = torch.as_tensor(init, dtype=torch.float64, device=device).detach()
        if start.shape not in ((), (K,)):
            raise ValueError(f"init has shape {list(start.shape)}; a number or [{K}] is expected")
        if not bool(((start >= 0.5) & (start <= 1)).all()):
            raise ValueError(f"init is {init}; numbers in [0.5, 1] are expected: below 0.5 labels would mean their opposite")
        self.ema = ema
        self.reduce = reduce
        self._eta = start.expand(K).clamp(_EDGE, 1 - _EDGE).clone()
        self._sums = self._eta.new_zeros(2, K)

    @property
    def K(self) -> int:
        return len(self._eta)

    @property
    def eta(self) -> Tensor:
        """[K], float64: a copy, which later updates do not change."""
        return self._eta.clone()

    def accumulate(self, w: Tensor, annotator: Tensor | None = None) -> None:
        """Add the pairs of a micro-batch to the next update.

        w: [P], the posterior of each label, in [0, 1]. annotator: int64 or int32 [P]; None if there is but one.
        """
        w = w.detach().to(self._sums)
        if w.dim() != 1:
            raise ValueError(f"w has shape {list(w.shape)}; [P] is expected")
        if annotator is None:
            if self.K > 1:
                raise ValueError(f"annotator is None; ids of {self.K} annotators are expected")
            annotator = torch.zeros(len(w), dtype=torch.int64, device=w.device)
        if annotator.shape != w.shape or annotator.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"annotator is {annotator.dtype} {list(annotator.shape)}; int64 or int32 {list(w.shape)} is expected"
            )
        annotator = annotator.to(w.device)
        if w.device.type == "cpu" or validation():
            self._look(w, annotator)
        mine = annotator == torch.arange(self.K, device=w.device)[:, None]  # sums in a fixed order: no atomics
        self._sums[0] += torch.where(mine, w, 0.0).sum(1)
        self._sums[1] += mine.sum(1)

    def update(self, w: Tensor | None = None, annotator: Tensor | None = None) -> Tensor:
        """Move the average by all that was accumulated, and by these pairs if there are any; returns the new eta."""
        if w is not None:
            self.accumulate(w, annotator)
        total = self._summed()
        mean = total[0] / total[1]  # NaN for the absent, as for those with a NaN
        moved = torch.lerp(self._eta, mean, self.ema).clamp(_EDGE, 1 - _EDGE)
        self._eta = torch.where(mean.isnan(), self._eta, moved)
        self._sums = torch.zeros_like(self._sums)
        return self.eta

    def state_dict(self) -> dict[str, Any]:
        """eta, what is accumulated, and the rate."""
        return {"eta": self.eta, "sums": self._sums.clone(), "ema": self.ema}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on the device that this object is on."""
        for name, like in (("eta", self._eta), ("sums", self._sums)):
            if name not in state or state[name].shape != like.shape:
                came = list(state[name].shape) if name in state else None
                raise ValueError(f"state has {name} of shape {came}; {list(like.shape)} is expected, for K = {self.K}")
        eta = state["eta"].to(self._eta)
        if not bool(((eta > 0) & (eta < 1)).all()):
            raise ValueError(f"state has eta {eta.tolist()}; numbers in (0, 1) are expected")
        self._eta, self._sums, self.ema = eta.clone(), state["sums"].to(self._sums).clone(), float(state["ema"])

    def to(self, device: torch.device | str) -> AnnotatorReliability:
        """Move to a device; returns itself."""
        self._eta, self._sums = self._eta.to(device), self._sums.to(device)
        return self

    def _summed(self) -> Tensor:
        total = self._sums.clone()
        if self.reduce is None:
            return total
        if isinstance(self.reduce, (str, dist.ProcessGroup)):
            from .distributed import packed_sum

            return packed_sum(total, process_group=self.reduce)[0]
        result = self.reduce(total)
        return total if result is None else result

    def _look(self, w: Tensor, annotator: Tensor) -> None:
        for name, values, good, accepted in (
            ("w", w, (w >= 0) & (w <= 1), "a probability is expected"),
            ("annotator", annotator, (annotator >= 0) & (annotator < self.K), f"ids are 0 to {self.K - 1}"),
        ):
            if not bool(good.all()):
                i = int((~good).nonzero()[0])
                raise ValueError(f"{name}[{i}] is {values[i].item()}; {accepted}")
