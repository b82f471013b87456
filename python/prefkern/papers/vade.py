r"""VADE: roll out the prompts whose groups will disagree, by Thompson sampling of every prompt's success probability.

"VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation for Multimodal RL", arXiv:2511.18902.
Evidence: part. Equations and update from the authors' page and its figure, with the numbers worked there; code was not seen.

A group of rollouts that all succeed or all fail has no advantage, and teaches nothing. Each of M prompts has counts of
successes and failures; the belief about its success probability under the current policy is
:math:`\mathrm{Beta}(\alpha + 1, \beta + 1)`, uniform without evidence. Once per step

.. math::
    \tilde p_i \sim \mathrm{Beta}(\alpha_i + 1, \beta_i + 1), \qquad I_i = \tilde p_i (1 - \tilde p_i)^2

and the B prompts with the largest I are rolled out, n times each, of which s succeed. Then

.. math::
    \text{selected: } \alpha \leftarrow \lambda_1 \alpha + s, \quad \beta \leftarrow \lambda_1 \beta + n - s; \qquad
    \text{others: } \alpha \leftarrow \lambda_2 \alpha, \quad \beta \leftarrow \lambda_2 \beta

A selected prompt is not also multiplied by lam2. Decay acts on the counts without the prior's 1, so that a prompt that is not
visited drifts back to the uniform belief and is explored again; one selected in every step keeps n / (1 - lam1) rollouts of
evidence. Nothing else is rolled out: no group is generated to be thrown away.

I is largest at p = 1/3: harder prompts than those of most variance. `utility="p1mp"` is :math:`p (1 - p)`, largest at 1/2.
`mode="mean"` ranks by the expected utility, without randomness.

Defaults: lam1 0.2 and lam2 0.999 are those that the numbers in the figure imply (0.1 with one success in 8 becomes 1.02; 9
becomes 8.991); whether training used them is not known, nor whether a first pass over the data fills the counts. They start at
0 here. The figure also has a slip, 1.998 where lam2 gives 0.1998. A success is a reward of 1; for other rewards the threshold
has to be given (`count_successes`).

Related, and not this: MoPPS, with the same belief and draw but another criterion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .._names import choice
from .._state import checked_state, save_state
from ..ops import beta_thompson_topk, decayed_beta_update_
from ..ops._arguments import check_tensors, integer, number, positive_int
from ..ops.thompson import MODES, MOST_EVIDENCE, UTILITIES
from ._about import About
from ._shared import check_values, may_look

__all__ = [
    "Selection",
    "SuccessCounts",
    "VadeBatchSampler",
    "VadeSampler",
    "about",
    "count_successes",
    "expected_utility",
    "select_from_draws",
]

about = About(
    name="VADE",
    title="VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation for Multimodal RL",
    arxiv="2511.18902",
    year=2025,
    family="sampler",
    evidence="part",
    note="the authors' page and its figure; the decays are read off the figure's numbers",
)

Utility = Literal["p1mp2", "p1mp"]
Mode = Literal["thompson", "mean"]


class Selection(NamedTuple):
    """Prompts chosen from M draws."""

    ids: Tensor
    """int64 [k], utilities falling; of equal ones the lowest first."""
    utilities: Tensor
    """[M], of every draw."""


class SuccessCounts(NamedTuple):
    """Of groups of rollouts, [B] each."""

    successes: Tensor
    n: Tensor
    """How many rollouts count."""


def expected_utility(alpha: Tensor, beta: Tensor, *, utility: Utility = "p1mp2") -> Tensor:
    r"""The utility expected of each prompt, shaped like the counts: with a, b the counts plus one and S = a + b,
    :math:`\frac{ab(b+1)}{S(S+1)(S+2)}`, or :math:`\frac{ab}{S(S+1)}` for ``utility="p1mp"``."""
    choice("utility", utility, UTILITIES)
    a, b = alpha + 1, beta + 1
    s = a + b
    variance = (a / s) * (b / (s + 1))
    return variance * ((b + 1) / (s + 2)) if utility == "p1mp2" else variance


def select_from_draws(p: Tensor, k: int, *, utility: Utility = "p1mp2", eligible: Tensor | None = None) -> Selection:
    """The k prompts whose success probabilities p [M], drawn elsewhere, are worth most.

    eligible: bool [M]; None: all. ValueError for p outside [0, 1], or fewer than k eligible prompts.
    """
    check_tensors(p=p)
    choice("utility", utility, UTILITIES)
    if p.dim() != 1 or not p.is_floating_point():
        raise ValueError(f"p is {p.dtype} {list(p.shape)}; floating [M] is expected")
    check_values("p", p, (p >= 0) & (p <= 1), "a probability is expected")
    keep = torch.ones_like(p, dtype=torch.bool) if eligible is None else eligible
    _check_eligible(keep, len(p))
    available = int(keep.sum()) if may_look(keep) else len(p)
    if not 0 < integer("k", k) <= available:
        raise ValueError(f"k is {k}; accepted: 1 to the {available} eligible prompts")
    q = 1 - p
    utilities = p * q * q if utility == "p1mp2" else p * q
    ids = torch.where(keep, utilities, -torch.inf).sort(descending=True, stable=True).indices[:k]
    return Selection(ids, utilities)


def count_successes(rewards: Tensor, mask: Tensor | None = None, *, threshold: float | None = None) -> SuccessCounts:
    """How many rollouts of each group [B, G] succeed, and how many count.

    threshold: the least reward of a success. None: rewards are 0 or 1, and anything else is refused. mask: bool [B, G], the
    rollouts that count.
    """
    check_tensors(rewards=rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {list(rewards.shape)}; [B, G] is expected")
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    if keep.shape != rewards.shape or keep.dtype != torch.bool:
        raise ValueError(f"mask is {keep.dtype} {list(keep.shape)}; bool {list(rewards.shape)} is expected")
    good = ~keep | ((rewards == 0) | (rewards == 1) if threshold is None else ~rewards.isnan())
    if may_look(rewards) and not bool(good.all()):
        i, j = (~good).nonzero()[0].tolist()
        accepted = "rewards are 0 or 1 unless a threshold is given" if threshold is None else "a number is expected"
        raise ValueError(f"rewards[{i}, {j}] is {rewards[i, j].item()}; {accepted}")
    least = 1.0 if threshold is None else number("threshold", threshold)
    return SuccessCounts(((rewards >= least) & keep).sum(1), keep.sum(1))


class VadeSampler:
    r"""Chooses the prompts of each step, and learns from how their rollouts went.

        sampler = VadeSampler(len(prompts), 64, seed=0)
        for _ in range(steps):
            ids = sampler.sample()                            # int64 [B], the most promising first
            successes, n = count_successes(roll_out(ids))     # ... and train on them
            sampler.update(ids, successes, n)

    A draw depends on the counts, the seed and the step alone: `sample` changes nothing, and after `load_state_dict` the draws
    are those that would have followed.

    Args:
        n_prompts: M.
        batch_size: B.
        lam1, lam2: decay of the counts of selected and of other prompts at an update, in [0, 1].
        utility: ``"p1mp2"``, :math:`p (1 - p)^2`, or ``"p1mp"``, :math:`p (1 - p)`.
        mode: ``"thompson"``, or ``"mean"``: by expected utilities, without randomness.
        seed: of the draws.
        allow_short: a batch may be smaller where fewer prompts are there, or eligible; else that is an error.
        dtype, device: of the counts; float32, or float64 on the CPU. On CUDA nothing waits for the device, unless `allow_short`
            has to count who is eligible.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        n_prompts: int,
        batch_size: int,
        *,
        lam1: float = 0.2,
        lam2: float = 0.999,
        utility: Utility = "p1mp2",
        mode: Mode = "thompson",
        seed: int = 0,
        allow_short: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; accepted: torch.float32, torch.float64")
        self.n_prompts = positive_int("n_prompts", n_prompts)
        options = {"lam1": lam1, "lam2": lam2, "utility": utility, "mode": mode, "seed": seed}
        self._set_options({"batch_size": batch_size, "allow_short": bool(allow_short), **options})
        self.alpha = torch.zeros(n_prompts, dtype=dtype, device=device)
        """Counts of successes [M], decayed."""
        self.beta = torch.zeros(n_prompts, dtype=dtype, device=device)
        """Counts of failures [M], decayed."""
        self.step = 0
        """How many updates there were: the step that `sample` draws for unless it is told another."""

    def _set_options(self, options: Mapping[str, Any]) -> None:
        batch_size = positive_int("batch_size", options["batch_size"])
        if batch_size > self.n_prompts and not options["allow_short"]:
            raise ValueError(f"batch_size is {batch_size}; there are {self.n_prompts} prompts, and allow_short is False")
        lams = {name: number(name, options[name]) for name in ("lam1", "lam2")}
        for name, value in lams.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
        choice("utility", options["utility"], UTILITIES)
        choice("mode", options["mode"], MODES)
        seed = integer("seed", options["seed"])
        self.batch_size, self.allow_short = batch_size, options["allow_short"]
        self.lam1, self.lam2 = lams["lam1"], lams["lam2"]
        self.utility: Utility = options["utility"]
        self.mode: Mode = options["mode"]
        self.seed = seed

    def sample(self, step: int | None = None, *, eligible: Tensor | None = None) -> Tensor:
        """The ids of a batch, int64 [B], utilities falling.

        step: which draw; None: `self.step`. Equal steps and counts give equal batches. eligible: bool [M], who may be chosen.
        """
        k = self.batch_size
        if eligible is not None:
            _check_eligible(eligible, self.n_prompts)
        if self.allow_short:
            k = min(k, self.n_prompts if eligible is None else int(eligible.sum()))
            if k == 0:
                return torch.empty(0, dtype=torch.int64, device=self.alpha.device)
        return beta_thompson_topk(
            self.alpha, self.beta, k, eligible=eligible, utility=self.utility, mode=self.mode, seed=self.seed,
            step=self.step if step is None else step,
        ).ids  # fmt: skip

    def update(self, ids: Tensor, successes: Tensor, n: Tensor | int) -> None:
        """Take over a step's results: of prompt ids [B], each once, `successes` [B] of `n` rollouts ([B], or one number).

        Successes may be fractional; n = 0, every rollout dropped, decays alone. Whatever was not in ids decays by lam2.
        """
        decayed_beta_update_(self.alpha, self.beta, ids, successes, n, lam1=self.lam1, lam2=self.lam2)
        self.step += 1

    def success_probability(self) -> Tensor:
        """The mean of each prompt's belief, [M]."""
        return (self.alpha + 1) / (self.alpha + self.beta + 2)

    def expected_utility(self) -> Tensor:
        """What each prompt is expected to be worth, [M]."""
        return expected_utility(self.alpha, self.beta, utility=self.utility)

    def batches(self, steps: int) -> VadeBatchSampler:
        """A `batch_sampler` for a DataLoader."""
        return VadeBatchSampler(self, steps)

    def state_dict(self) -> dict[str, Any]:
        """Counts, step, seed and options."""
        return save_state(self, 1, self._fields())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of a sampler for as many prompts gave, options included. Nothing changes on an error.

        Raises:
            ValueError: naming the field, what it holds and what is expected.
            TypeError: state is no mapping.
        """
        taken = checked_state(self, 1, state, self._fields())
        for name in ("alpha", "beta"):
            counts = taken[name]
            good = (counts >= 0) & (counts <= MOST_EVIDENCE)
            if not bool(good.all()):
                i = int((~good).nonzero()[0, 0])
                raise ValueError(
                    f"state[{name!r}][{i}] is {counts[i].item()}; a count is finite, not negative and at most 1e30"
                )
        if not 0 <= taken["step"] < 1 << 32:
            raise ValueError(f"state['step'] is {taken['step']}; accepted: 0 to 2^32 - 1")
        try:
            self._set_options(taken)
        except ValueError as error:
            raise ValueError(f"state: {error}") from None
        self.alpha, self.beta, self.step = taken["alpha"], taken["beta"], taken["step"]

    def _fields(self) -> dict[str, Any]:
        names = ("alpha", "beta", "step", "seed", "batch_size", "lam1", "lam2", "utility", "mode", "allow_short")
        return {name: getattr(self, name) for name in names}


class VadeBatchSampler(Sampler[list[int]]):
    """Batches of a `VadeSampler` for a DataLoader: `DataLoader(dataset, batch_sampler=sampler.batches(steps))`.

    Each batch is drawn when it is asked for, from the counts of that moment: with worker processes the loader asks ahead, and
    the draws miss the updates of as many steps. The i-th batch is that of the step at which iteration began, plus i.
    """

    def __init__(self, sampler: VadeSampler, steps: int) -> None:
        self.sampler = sampler
        self.steps = positive_int("steps", steps)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first = self.sampler.step
        for i in range(self.steps):
            yield self.sampler.sample(first + i).tolist()


def _check_eligible(eligible: Tensor, prompts: int) -> None:
    check_tensors(eligible=eligible)
    if eligible.shape != (prompts,) or eligible.dtype != torch.bool:
        raise ValueError(f"eligible is {eligible.dtype} {list(eligible.shape)}; bool [{prompts}] is expected")
