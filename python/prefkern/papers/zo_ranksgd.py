r"""ZO-RankSGD: descent that is told nothing but which of several points are the best, and in which order.

Tang, Rybin and Chang, "Zeroth-Order Optimization Meets Human Feedback: Provable Learning via Ranking Oracles",
arXiv:2303.03751.
Evidence: code. Direction, candidates, incumbent and averaging are those of the authors' `optimizer.py`; the hyperparameters of
their notebook are not recovered, so mu, eta, m and k have no defaults here.

To be minimised is f over :math:`R^d`. Of m probes :math:`x + \mu \xi_i`, :math:`\xi_i \sim N(0, I)`, an (m, k)-ranking oracle
names the k best, best first: k = m is a full ranking, k = 1 the best of m, m = 2 a comparison. Such an answer is a graph: an
edge (i, j) says that i is better than j, for all pairs within the best k, and for each of them with everyone else. The estimate

.. math::
    g = \frac{1}{|E|} \sum_{(i, j) \in E} (\xi_j - \xi_i), \qquad |E| = k m - \frac{k^2 + k}{2}

points along the gradient. With ranks r = 0, ..., k - 1 it is :math:`-\sum_i w_i \xi_i`, where

.. math::
    w_i = \frac{m - 1 - 2 r_i}{|E|} \text{ for the ranked}, \qquad w_i = -\frac{k}{|E|} \text{ for the others}

and the weights add up to 0: what all :math:`\xi_i` have in common cancels. The step is :math:`x - \eta g`, or the best of the
candidates :math:`x - \eta \gamma^i g` by another question, to a best-of-n oracle (:func:`line_search`).

No :math:`\xi_i` is stored: row i of a seed is computed again wherever it is needed (`prefkern.seeded_normal_combine`), so the
memory beside the parameters is a copy of them, and one direction where a line search or an average needs it. The scheme of
seeds is this library's own.

Where paper and code disagree:

- `variant`: the code's weight of a ranked probe is :math:`(m - 2 r)/|E|`, off by one, and its weights add up to :math:`k/|E|`.
  The estimate gains a pull to the ranked probes; with k = m that is their average, which is noise and no bias. "paper", the
  default, is the sum over edges that the theorem is about; "code" reproduces the released runs.
- `scale_mu`: the code's direction is made of :math:`x_i - x = \mu \xi_i` and so has a factor mu; the paper's has not. Default
  False; True for the code's.
- The code's round (:class:`RankSGD`) averages the directions of rounds that led nowhere, and offers the best probe and the
  incumbent beside the line search; the basic algorithm (:func:`zo_rank_step`) does neither.

Ties in values: the lower index comes first, as in a stable sort; `ties="drop"` (this library's own, variant "paper" only)
leaves out the edges between equal values. NaN and +inf rank last, and are equal to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._names import choice
from .._state import checked_state, save_state
from ..ops import seeded_normal_add_, seeded_normal_combine, seeded_normal_combine_
from ._about import About

about = About(
    name="ZO-RankSGD",
    title="Zeroth-Order Optimization Meets Human Feedback: Provable Learning via Ranking Oracles",
    arxiv="2303.03751",
    year=2023,
    family="zeroth-order",
    evidence="code",
    note="the authors' optimizer; their hyperparameters are not recovered",
)

Variant = Literal["paper", "code"]
Ties = Literal["stable", "drop"]
Ranking = Sequence[int] | Tensor
Params = nn.Module | Tensor | Sequence[Tensor]
Observation = TypeVar("Observation")

VARIANTS = ("paper", "code")
TIES = ("stable", "drop")


# ---- rankings


def ranking_oracle(values: Sequence[float] | Tensor, k: int | None = None) -> list[int]:
    """The k smallest of m values, smallest first: an (m, k)-ranking oracle for those who have values. k None: all.

    Of equal values the lower index comes first. NaN and +inf come last. ValueError if there is nothing else.
    """
    levels = _levels("values", values)
    k = len(levels) if k is None else _int("k", k)
    if not 1 <= k <= len(levels):
        raise ValueError(f"k is {k}; there are {len(levels)} values, so 1 to {len(levels)} is expected")
    if min(levels) == math.inf:
        raise ValueError("values are all NaN or +inf; one that can be ranked is expected")
    return sorted(range(len(levels)), key=levels.__getitem__)[:k]


def rank_weights(
    ranking: Ranking,
    m: int,
    *,
    variant: Variant = "paper",
    values: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """w [m]: the direction of descent is the sum of w_i xi_i.

    Args:
        ranking: the k best of the m probes, best first: distinct integers, on the host.
        m: how many probes, at least 2.
        variant: "paper" or "code"; the module says how they differ.
        values: of the probes, [m], if edges between equal ones are to be left out ("paper" only). All equal: w is 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    choice("variant", variant, VARIANTS)
    m = _probes(m)
    order = _checked_ranking(ranking, m)
    k = len(order)
    if values is not None:
        if variant != "paper":
            raise ValueError(f"values are given with variant={variant!r}; dropping ties is for variant='paper'")
        levels = _levels("values", values)
        if len(levels) != m:
            raise ValueError(f"values has {len(levels)} entries; m = {m} is expected")
        numerators, edges = _untied_edges(order, levels)
    else:
        edges = k * m - (k * k + k) // 2
        numerators = [-k] * m
        for r, i in enumerate(order):
            numerators[i] = m - 2 * r - (variant == "paper")
    return (torch.tensor(numerators, dtype=torch.float64) / max(edges, 1)).to(device, dtype)


def _untied_edges(order: list[int], levels: list[float]) -> tuple[list[int], int]:
    """How often each probe is the better one less how often it is the worse one, over edges between unequal levels."""
    others = sorted(set(range(len(levels))) - set(order))
    numerators, edges = [0] * len(levels), 0
    for r, i in enumerate(order):
        for j in [*order[r + 1 :], *others]:
            if levels[i] != levels[j]:
                numerators[i] += 1
                numerators[j] -= 1
                edges += 1
    return numerators, edges


def rank_gradient(
    xi: Tensor | int,
    ranking: Ranking,
    *,
    m: int | None = None,
    n: int | None = None,
    variant: Variant = "paper",
    values: Sequence[float] | Tensor | None = None,
    mu: float = 1.0,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """g, the estimate of the gradient's direction, from what was added to x and the ranking of what came of it.

    Args:
        xi: the probes' directions [m, ...], or the seed they are rows of.
        ranking, variant, values: as for :func:`rank_weights`.
        m, n: how many probes and how many elements, with a seed; of stored directions their shape says it.
        mu: a factor; the code's estimate has the smoothing there.
        first_row: with a seed, the row of probe 0.
        dtype, device: with a seed, what the result has: float32, or float64 on the CPU.

    Returns:
        Shaped like one direction: float32, or float64 for float64 directions. With a seed [n].
    """
    if isinstance(xi, Tensor):
        if xi.dim() == 0 or not xi.is_floating_point():
            raise ValueError(f"xi is {xi.dtype} {list(xi.shape)}; floating-point directions [m, ...] are expected")
        if m is not None and m != len(xi):
            raise ValueError(f"m is {m}; xi has {len(xi)} directions")
        wide = torch.float64 if xi.dtype == torch.float64 else torch.float32
        w = rank_weights(ranking, len(xi), variant=variant, values=values, dtype=wide, device=xi.device)
        return -mu * torch.tensordot(w, xi.to(wide), 1)
    seed = _int("xi", xi)
    if m is None or n is None:
        raise ValueError(f"m is {m} and n is {n}; both are expected with a seed")
    w = rank_weights(ranking, m, variant=variant, values=values, dtype=dtype, device=device)
    return seeded_normal_combine(seed, w, n, scale=-mu, first_row=first_row)


# ---- the line search


def line_search_candidates(x: Tensor, direction: Tensor, *, eta: float, n: int, gamma: float = 0.5) -> Tensor:
    """x + eta gamma^i direction for i = 0, ..., n - 1: [n, ...]."""
    _check_steps(eta, gamma)
    n = _int("n", n)
    if n < 1:
        raise ValueError(f"n is {n}; at least one candidate is expected")
    if direction.shape != x.shape:
        raise ValueError(f"direction has shape {list(direction.shape)}; {list(x.shape)} is that of x")
    steps = torch.tensor([eta * gamma**i for i in range(n)], dtype=direction.dtype, device=direction.device)
    return (x + steps.view(-1, *[1] * x.dim()) * direction).to(x.dtype)


def line_search(
    x: Tensor, direction: Tensor, best_of: Callable[[Tensor], int], *, eta: float, n: int, gamma: float = 0.5
) -> Tensor:
    """The candidate whose index `best_of` returns, given all [n, ...]. x itself if the direction is 0: nobody is asked."""
    candidates = line_search_candidates(x, direction, eta=eta, n=n, gamma=gamma)
    if not bool(direction.any()):
        return x.clone()
    return candidates[_checked_ranking([best_of(candidates)], n, name="best_of")[0]]


# ---- steps on parameters


@dataclass(frozen=True)
class Ranker(Generic[Observation]):
    """Somebody who compares: a person, or a model that judges.

    `observe(params)` makes of the parameters, as they are at that moment, something to look at: a picture, an answer. It is
    kept until all have been made. `rank(observations, k)` returns the indices of the k best of them, best first.
    """

    observe: Callable[[Any], Observation]
    rank: Callable[[list[Observation], int], Ranking]


class RankStep(NamedTuple):
    """What :func:`zo_rank_step` did."""

    ranking: list[int]
    """The probes, best first; k of them."""
    chosen: int | None
    """Which candidate of the line search was taken; None without one, or where the values of all probes were equal."""
    evaluations: int
    """How often the parameters were looked at."""


class RankRound(NamedTuple):
    """What :meth:`RankSGD.step` did."""

    ranking: list[int]
    """The probes, best first; k of them."""
    chosen: int
    """Which candidate won: a step along the direction, n_query - 2 for the best probe, n_query - 1 for staying."""
    moved: bool
    averaged: int
    """How many estimates the direction of this round was an average of."""
    evaluations: int
    """How often the parameters were looked at."""


def zo_rank_step(
    params: Params,
    f_or_ranker: Callable[[Any], Any] | Ranker[Any],
    *,
    m: int,
    k: int | None = None,
    mu: float,
    eta: float,
    seed: int,
    step: int = 0,
    line_search: int | None = None,
    gamma: float = 0.5,
    variant: Variant = "paper",
    scale_mu: bool = False,
    ties: Ties = "stable",
) -> RankStep:
    """One step of the paper's algorithm, in place.

    Args:
        params: a module, of which the parameters that require a gradient move; or a tensor; or several. On one device, floating
            point. Those of a module draw the same numbers as their concatenation would.
        f_or_ranker: f, called with `params` while they are a probe, returns what is to be minimised, a number; only its order
            counts. Or a :class:`Ranker`. No gradients are recorded meanwhile.
        m, k: how many probes, and how many of them are ranked; k None: all.
        mu: the smoothing, how far from the parameters the probes are, for each parameter, in its own unit.
        eta: the step size; with a line search the largest.
        seed, step: the probes are rows step * m to step * m + m - 1 of the seed: give each step another number.
        line_search: how many step sizes to offer, eta gamma^i; None: eta it is.
        variant, scale_mu, ties: see the module. `ties="drop"` needs f.

    Whatever is raised in between, by f too, leaves the parameters as they were.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; values that are all NaN or +inf; a ranker's
            answer that is no ranking.
    """
    options = _Options(m, k, mu, eta, gamma, variant, scale_mu, ties)
    point = _Point(params)
    first_row = _first_row(_int("step", step) * options.m, options.m)
    if line_search is not None and _int("line_search", line_search) < 1:
        raise ValueError(f"line_search is {line_search}; at least one step size is expected, or None")
    oracle = _Oracle(params, f_or_ranker, ties)
    with torch.no_grad(), point.kept():
        found = _estimate(point, oracle, options, seed, first_row)
        point.restore()
        if line_search is None or not any(found.weights):
            point.step(seed, found.weights, options.direction_scale * eta, first_row)
            return RankStep(found.ranking, None, options.m)
        direction = point.direction(seed, found.weights, options.direction_scale, first_row)
        seen = []
        for i in range(line_search):
            point.move(direction, eta * gamma**i)
            seen.append(oracle.observe())
        chosen = oracle.rank(seen, 1)[0]
        point.move(direction, eta * gamma**chosen)
    return RankStep(found.ranking, chosen, options.m + line_search)


class RankSGD:
    """The code's round, made for somebody who looks at few candidates at a time, and whose every comparison counts.

    A round ranks m probes, and averages the direction with those of the rounds before that led nowhere:
    D <- (D c + d) / (c + 1), c <- c + 1, from D = 0, c = 0. Then `n_query` candidates are compared: n_query - 2 steps
    eta gamma^i along D, the best probe of this round, and the incumbent, which loses ties. If another than the incumbent wins,
    it takes its place and D and c start over. Otherwise all stay, so that failures at one point pool their comparisons.

        optimizer = RankSGD(model, m=6, mu=0.1, eta=1.0, seed=0)
        for _ in range(20):
            optimizer.step(Ranker(lambda model: model(noise), ask_a_person))

    The best probe is not looked at again: it is compared by what was seen of it. A round whose values are all equal, with
    `ties="drop"`, changes nothing. What interrupts a round, or is raised in it, leaves everything as it was.

    Args:
        params, m, k, mu, eta, gamma, seed, variant, scale_mu, ties: as for :func:`zo_rank_step`. The code's own:
            variant="code", scale_mu=True.
        n_query: how many candidates the second question has, at least 3.
    """

    _VERSION = 1

    def __init__(
        self,
        params: Params,
        *,
        m: int,
        k: int | None = None,
        mu: float,
        eta: float,
        seed: int,
        n_query: int = 5,
        gamma: float = 0.5,
        variant: Variant = "paper",
        scale_mu: bool = False,
        ties: Ties = "stable",
    ) -> None:
        self._options = _Options(m, k, mu, eta, gamma, variant, scale_mu, ties)
        self.params = params
        self.n_query = _int("n_query", n_query)
        if self.n_query < 3:
            raise ValueError(f"n_query is {n_query}; at least 3 is expected: a step, the best probe and the incumbent")
        self.seed = _int("seed", seed)
        self.rounds = 0
        self.averaged = 0
        self._next_row = 0
        self._direction = _Point(params).zeros()

    def step(self, f_or_ranker: Callable[[Any], Any] | Ranker[Any]) -> RankRound:
        """One round, as :func:`zo_rank_step` takes f or a ranker."""
        options, point = self._options, _Point(self.params)
        oracle = _Oracle(self.params, f_or_ranker, options.ties)
        first_row, last = _first_row(self._next_row, options.m), self.n_query - 1
        with torch.no_grad(), point.kept():
            found = _estimate(point, oracle, options, self.seed, first_row)
            if not any(found.weights):
                point.restore()
                self._advance()
                return RankRound(found.ranking, last, False, self.averaged, options.m)
            d = point.direction(self.seed, found.weights, options.direction_scale, first_row)
            average = (self._direction * self.averaged + d) / (self.averaged + 1)
            seen = []
            for i in range(self.n_query - 2):
                point.move(average, options.eta * options.gamma**i)
                seen.append(oracle.observe())
            seen.append(found.seen[found.ranking[0]])
            point.restore()
            seen.append(oracle.observe())
            chosen = oracle.rank(seen, 1)[0]
            if chosen == last - 1:
                point.probe(self.seed, first_row + found.ranking[0], options.mu)
            elif chosen != last:
                point.move(average, options.eta * options.gamma**chosen)
        averaged, moved = self.averaged + 1, chosen != last
        self._direction, self.averaged = (torch.zeros_like(average), 0) if moved else (average, averaged)
        self._advance()
        return RankRound(found.ranking, chosen, moved, averaged, options.m + self.n_query - 1)

    def _advance(self) -> None:
        self.rounds += 1
        self._next_row += self._options.m

    @property
    def direction(self) -> Tensor:
        """D, the average of the estimates since the last move, [d] over all parameters; 0 after one."""
        return self._direction.clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters and the options: with it and them the next rounds are the same again."""
        return save_state(self, self._VERSION, self._fields())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError naming the field, and no change, if the state is of something else or does not fit."""
        taken = checked_state(self, self._VERSION, state, self._fields())
        for name in ("rounds", "averaged", "next_row"):
            if taken[name] < 0:
                raise ValueError(f"state[{name!r}] is {taken[name]}; it must not be negative")
        if taken["next_row"] >= 1 << 32:
            raise ValueError(f"state['next_row'] is {taken['next_row']}; a seed has 2^32 rows")
        self.seed, self.rounds, self.averaged = taken["seed"], taken["rounds"], taken["averaged"]
        self._next_row, self._direction = taken["next_row"], taken["direction"]

    def _fields(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rounds": self.rounds,
            "averaged": self.averaged,
            "next_row": self._next_row,
            "direction": self._direction,
        }


# ---- what both are made of


@dataclass(frozen=True)
class _Options:
    m: int
    k: int | None
    mu: float
    eta: float
    gamma: float
    variant: Variant
    scale_mu: bool
    ties: Ties

    def __post_init__(self) -> None:
        _probes(self.m)
        if self.k is not None and not 1 <= _int("k", self.k) <= self.m:
            raise ValueError(f"k is {self.k}; 1 to m = {self.m} is expected, or None for all")
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise ValueError(f"mu is {self.mu}; a positive number is expected")
        _check_steps(self.eta, self.gamma)
        choice("variant", self.variant, VARIANTS)
        choice("ties", self.ties, TIES)
        if self.ties == "drop" and self.variant != "paper":
            raise ValueError(f"ties is 'drop' with variant={self.variant!r}; it is for variant='paper'")

    @property
    def ranked(self) -> int:
        return self.m if self.k is None else self.k

    @property
    def direction_scale(self) -> float:
        return self.mu if self.scale_mu else 1.0


class _Point:
    """Where the parameters are, and places that are named from there."""

    def __init__(self, params: Params) -> None:
        self.tensors = _tensors(params)
        self.offsets, self.size = [], 0
        for t in self.tensors:
            self.offsets.append(self.size)
            self.size += t.numel()
        self.device = self.tensors[0].device
        self.wide = torch.float64 if any(t.dtype == torch.float64 for t in self.tensors) else torch.float32
        self.saved: list[Tensor] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps a copy, and puts it back if something is raised."""
        self.saved = [t.detach().clone() for t in self.tensors]
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        for t, saved in zip(self.tensors, self.saved, strict=True):
            t.copy_(saved)

    def probe(self, seed: int, row: int, mu: float) -> None:
        self.restore()
        for t, offset in zip(self.tensors, self.offsets, strict=True):
            seeded_normal_add_(t, seed, row, mu, element_offset=offset)

    def step(self, seed: int, weights: list[float], scale: float, first_row: int) -> None:
        """From where the parameters are along the weighted sum of rows, without that in memory."""
        w = torch.tensor(weights, dtype=torch.float64).to(self.device, self.wide)
        for t, offset in zip(self.tensors, self.offsets, strict=True):
            seeded_normal_combine_(t, seed, w, scale=scale, first_row=first_row, element_offset=offset)

    def direction(self, seed: int, weights: list[float], scale: float, first_row: int) -> Tensor:
        w = torch.tensor(weights, dtype=torch.float64).to(self.device, self.wide)
        return seeded_normal_combine(seed, w, self.size, scale=scale, first_row=first_row)

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.wide, device=self.device)

    def move(self, direction: Tensor, step: float) -> None:
        for t, saved, offset in zip(self.tensors, self.saved, self.offsets, strict=True):
            t.copy_(saved + step * direction[offset : offset + t.numel()].view(t.shape))


class _Oracle:
    """Numbers or a ranker, asked alike."""

    def __init__(self, params: Params, f_or_ranker: Callable[[Any], Any] | Ranker[Any], ties: Ties) -> None:
        self.params = params
        self.by_value = not isinstance(f_or_ranker, Ranker)
        self.ask: Any = f_or_ranker
        if self.by_value and not callable(f_or_ranker):
            raise TypeError(
                f"f_or_ranker is a {type(f_or_ranker).__name__}; a function of the parameters or a Ranker is expected"
            )
        if ties == "drop" and not self.by_value:
            raise ValueError("ties is 'drop' with a Ranker; it needs values, which f returns")

    def observe(self) -> Any:
        if not self.by_value:
            return self.ask.observe(self.params)
        value = self.ask(self.params)
        if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.numel() != 1):
            kind = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"f returned {kind}; a number is expected")
        return float(value)

    def rank(self, seen: list[Any], k: int) -> list[int]:
        if self.by_value:
            return ranking_oracle(seen, k)
        ranking = _checked_ranking(self.ask.rank(seen, k), len(seen), name="the ranker's answer")
        if len(ranking) != k:
            raise ValueError(f"the ranker's answer is {ranking}; {k} indices are expected, best first")
        return ranking


class _Estimate(NamedTuple):
    ranking: list[int]
    weights: list[float]
    seen: list[Any]


def _estimate(point: _Point, oracle: _Oracle, options: _Options, seed: int, first_row: int) -> _Estimate:
    seen = []
    for i in range(options.m):
        point.probe(seed, first_row + i, options.mu)
        seen.append(oracle.observe())
    ranking = oracle.rank(seen, options.ranked)
    values = seen if options.ties == "drop" else None
    weights = rank_weights(ranking, options.m, variant=options.variant, values=values).tolist()
    return _Estimate(ranking, weights, seen)


def _tensors(params: Params) -> list[Tensor]:
    if isinstance(params, nn.Module):
        tensors: list[Tensor] = [p for p in params.parameters() if p.requires_grad]
    elif isinstance(params, Tensor):
        tensors = [params]
    elif isinstance(params, Sequence) and all(isinstance(t, Tensor) for t in params):
        tensors = list(params)
    else:
        raise TypeError(f"params is a {type(params).__name__}; a module, a tensor or a sequence of tensors is expected")
    if not any(t.numel() for t in tensors):
        raise ValueError("params has no element that could move")
    for i, t in enumerate(tensors):
        if not t.is_floating_point():
            raise TypeError(f"params[{i}] has dtype {str(t.dtype).removeprefix('torch.')}; a floating-point one is expected")
        if t.device != tensors[0].device:
            raise ValueError(f"params[{i}] is on {t.device} but params[0] is on {tensors[0].device}; one device is expected")
    return tensors


def _checked_ranking(ranking: Ranking, m: int, name: str = "ranking") -> list[int]:
    given = ranking.tolist() if isinstance(ranking, Tensor) else ranking
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} is {given!r}; indices are expected, best first")
    order = [_int(f"{name}[{r}]", i) for r, i in enumerate(given)]
    if not 1 <= len(order) <= m:
        raise ValueError(f"{name} has {len(order)} indices; 1 to {m} of {m} points are expected")
    for r, i in enumerate(order):
        if not 0 <= i < m:
            raise ValueError(f"{name}[{r}] is {i}; 0 to {m - 1} is expected")
    if len(set(order)) != len(order):
        raise ValueError(f"{name} is {order}; an index comes twice")
    return order


def _levels(name: str, values: Sequence[float] | Tensor) -> list[float]:
    """The values as they are ranked: NaN is +inf."""
    if isinstance(values, Tensor) and values.dim() != 1:
        raise ValueError(f"{name} has shape {list(values.shape)}; [m] is expected")
    levels = [float(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
    if not levels:
        raise ValueError(f"{name} is empty")
    return [math.inf if math.isnan(v) else v for v in levels]


def _int(name: str, value: Any) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; an integer is expected")
    return int(value)


def _probes(m: int) -> int:
    m = _int("m", m)
    if m < 2:
        raise ValueError(f"m is {m}; at least 2 probes are expected, else there is nothing to compare")
    return m


def _check_steps(eta: float, gamma: float) -> None:
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta is {eta}; a positive number is expected")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma is {gamma}; a number in (0, 1) is expected")


def _first_row(row: int, m: int) -> int:
    if not 0 <= row <= (1 << 32) - m:
        raise ValueError(f"step: rows {row} to {row + m - 1} are wanted; a seed has rows 0 to 2^32 - 1. Take another seed")
    return row
