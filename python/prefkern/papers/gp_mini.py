r"""mini-GP-UCB and mini-GP-EI: a few unique candidates, each evaluated several times.

Calandriello et al., "Scaling Gaussian Process Optimization by Evaluating a Few Unique Candidates Multiple Times",
arXiv:2201.12909.
Evidence: part. The posterior from unique points is algebra, checked against the direct one; how often a choice is repeated, and
the score of EI, are the paper's as they are remembered; there is no released code of this paper, and the width beta is the
self-normalised bound of the literature, beside the one in the code of its predecessors (BKB, Batch-BKB).

A function f is observed with noise at t times, at q <= t unique points :math:`u_i`, there :math:`n_i` times with rewards of sum
:math:`s_i` and mean :math:`\bar y_i`. With :math:`K = k(U, U)`, :math:`N = \mathrm{diag}(n)` and the noise variance
:math:`\lambda`, the posterior of all t observations is

.. math::
    \mathrm{mean}(x) = k(x)^\top (K + \lambda N^{-1})^{-1} \bar y, \qquad
    \mathrm{var}(x) = k(x, x) - k(x)^\top (K + \lambda N^{-1})^{-1} k(x)

so that time and memory go with q and not with t. All rules measure the deviation in units of the noise,
:math:`\sigma(x) = \sqrt{\mathrm{var}(x) / \lambda}`: leaving that division out is a factor :math:`\lambda` in B. Of
the candidates

.. math::
    \mathrm{UCB}: \ \mathrm{mean} + \beta \sigma, \qquad
    \mathrm{EI}: \ \sigma \beta \Bigl( \tfrac{z}{\beta} \Phi(\tfrac{z}{\beta}) + \phi(\tfrac{z}{\beta}) \Bigr), \quad
    z = \frac{\mathrm{mean} - \max \mathrm{mean}}{\sigma}

the first with the highest score is chosen, and is evaluated

.. math:: B = \max\bigl(1, \lfloor (C^2 - 1) / \sigma^2 \rfloor\bigr)

times before the posterior is formed again: B observations more change :math:`\sigma^2` there by the factor
:math:`1 + B \sigma^2 \le C^2`, and by no more anywhere else, so that a bound formed before holds up to C. The floor stops
before that is exceeded; the predecessors' loop stops after. Where :math:`\sigma^2` is large the floor is 0, and one evaluation
is made.

:func:`mini_gp_opt` is the whole loop, :class:`MiniGP` its choices one at a time (which prompts to label again, say), and
:class:`UniqueGP` the posterior, over :func:`prefkern.gp_unique_posterior`.

Defaults: none for C, lambda and beta, of which the paper's values are not known (C slightly above 1; 1.1 is a choice). F = 1
and delta are constants of the theory; the predecessors' code has F = 1, delta = 0.5 and lambda = 1, to be set to the noise
variance.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from .._state import checked_state, save_state
from ..ops import GpPosterior, chol_append, chol_rank1, gp_unique_posterior
from ..ops.gaussian import GP_KERNELS, GpKernelName
from ..reference.gaussian import gp_covariance
from ._about import About

about = About(
    name="mini-GP-UCB",
    title="Scaling Gaussian Process Optimization by Evaluating a Few Unique Candidates Multiple Times",
    arxiv="2201.12909",
    year=2022,
    family="sampler",
    evidence="part",
    note="the posterior is checked algebra; the repeat rule and EI are remembered, beta is inferred, and there is no code",
)

F64 = torch.float64
RULES = ("ucb", "ei")
BOUNDS = ("self_normalised", "predecessor")
Rule = Literal["ucb", "ei"]
Covariance = Callable[[Tensor, Tensor], Tensor]
"""k(A, B) [n, m] float64 of points [n, d] and [m, d]."""


@dataclass(frozen=True)
class Kernel:
    """A stationary kernel as :func:`prefkern.gp_unique_posterior` takes it, which also gives matrices of its values."""

    kind: GpKernelName = "rbf"
    length: float | tuple[float, ...] = 1.0
    """A number, or one per dimension."""
    variance: float = 1.0

    def __post_init__(self) -> None:
        choice("kind", self.kind, GP_KERNELS)
        lengths = self.length if isinstance(self.length, tuple) else (self.length,)
        if not lengths or not all(0 < x < math.inf for x in lengths):
            raise ValueError(f"length is {self.length}; it must be finite and positive")
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance is {self.variance}; it must be finite and positive")

    def __call__(self, A: Tensor, B: Tensor) -> Tensor:
        """k(A, B), [n, m] float64. Every difference is taken by itself: equal points have exactly the variance."""
        return gp_covariance(A.double(), B.double(), kernel=self.kind, length=self._length(A), variance=self.variance)

    def posterior(self, L: Tensor, a: Tensor, U: Tensor, X: Tensor) -> GpPosterior:
        return gp_unique_posterior(L, a, U, X, kernel=self.kind, length=self._length(X), variance=self.variance)

    def _length(self, X: Tensor) -> float | Tensor:
        if not isinstance(self.length, tuple):
            return self.length
        if len(self.length) != X.shape[-1]:
            raise ValueError(f"length has {len(self.length)} numbers; the points have {X.shape[-1]} dimensions")
        return torch.tensor(self.length, dtype=F64, device=X.device)


class UniqueGP:
    r"""The posterior of a Gaussian process that is held by its unique points.

    Points are one if they are equal to the bit, and for no tolerance: 0.0 and -0.0 are two, which does no harm. It holds the
    Cholesky factor L of :math:`K + \lambda N^{-1}`: a new point is a row more, one that was seen a change of rank one (both
    :math:`O(q^2)`), and after `REFACTOR` of those L is factored anew, so that rounding does not add up.

        gp = UniqueGP(Kernel("matern52", length=0.2), lam=0.01)
        gp.update(x, y)                      # [n, d] and [n]; or one point [d] and its rewards, a number or [n]
        mean, var = gp.posterior(candidates)

    Args:
        kernel: a :class:`Kernel`; or a function k(A, B) of points [n, d] and [m, d] that returns [n, m], by which the posterior
            is formed in plain PyTorch.
        lam: the noise variance, positive.
        device: where it computes, in float64. On CUDA every update waits for the device, and q is at most 512.
    """

    REFACTOR = 256

    def __init__(self, kernel: Kernel | Covariance, lam: float, *, device: torch.device | str | None = None) -> None:
        if not callable(kernel):
            raise TypeError(f"kernel is a {type(kernel).__name__}; a Kernel or a function is expected")
        self.kernel, self.lam, self.device = kernel, _positive("lam", lam), torch.device(device or "cpu")
        self._rows: dict[bytes, int] = {}
        self._points = self._empty(0, 0)
        self._factor = self._empty(0, 0)
        self._counts = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._sums = self._empty(0)
        self._changes = 0
        self._weights: Tensor | None = None

    def __len__(self) -> int:
        """q, how many unique points there are."""
        return len(self._rows)

    @property
    def points(self) -> Tensor:
        """The unique points [q, d] in the order in which they came: a copy, as all of these."""
        return self._points.clone()

    @property
    def counts(self) -> Tensor:
        """n, int64 [q]."""
        return self._counts.clone()

    @property
    def sums(self) -> Tensor:
        """s, [q]."""
        return self._sums.clone()

    @property
    def observations(self) -> int:
        """t."""
        return int(self._counts.sum())

    def update(self, x: Tensor, y: Tensor | Sequence[float] | float) -> None:
        """Take in observations.

        Args:
            x: points [n, d] of any floating dtype; or one, [d].
            y: their rewards [n]; of one point a number, or several.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, or with the pivot, a kernel that is not positive
                semi-definite. Nothing has changed then.
        """
        points, rewards = self._checked(x, y)
        counts, sums, rows = self._counts.tolist(), self._sums.tolist(), dict(self._rows)
        fresh: list[int] = []
        for k, (key, reward) in enumerate(zip(_keys(points), rewards.tolist(), strict=True)):
            row = rows.setdefault(key, len(rows))
            if row == len(counts):
                fresh.append(k)
                counts.append(0)
                sums.append(0.0)
            counts[row] += 1
            sums[row] += reward
        before, q = self._counts, len(self)
        new_counts = torch.tensor(counts, dtype=torch.int64, device=self.device)
        new_points = torch.cat([self._points if q else self._empty(0, points.shape[1]), points[fresh].to(self.device)])
        self._grow(len(counts))
        kept, changes = self._factor[:q, :q].clone(), self._changes
        try:
            self._change_factor(new_points, before, new_counts)
        except Exception as error:  # of the kernel, whatever it raises
            self._factor[:q, :q], self._changes = kept, changes
            if isinstance(error, _IndefiniteError):
                raise ValueError(
                    f"kernel is not positive semi-definite: of K + lam / n of {len(counts)} points {error}"
                ) from None
            raise
        self._rows, self._points, self._counts = rows, new_points, new_counts
        self._sums = torch.tensor(sums, dtype=F64, device=self.device)
        self._weights = None

    def posterior(self, X: Tensor) -> GpPosterior:
        """Mean and variance, without the noise, at candidates [M, d]: two float64 [M]. Without observations the prior."""
        if X.dim() != 2 or (len(self) and X.shape[1] != self._points.shape[1]):
            wanted = self._points.shape[1] if len(self) else "d"
            raise ValueError(f"X has shape {list(X.shape)}; [M, {wanted}] is expected")
        X = X.detach().to(self.device, F64)
        q = len(self)
        L, a, U = self._factor[:q, :q], self._solved(), self._points.reshape(q, X.shape[1])
        if isinstance(self.kernel, Kernel):
            return self.kernel.posterior(L, a, U, X)
        parts = [self._plain(L, a, U, part) for part in X.split(1024)] or [(X.new_empty(0), X.new_empty(0))]
        mean, var = (torch.cat(side) for side in zip(*parts, strict=True))
        return GpPosterior(mean, var)

    def logdet(self) -> float:
        r"""log det(I + K_t / lam) of all t observations: :math:`2 \sum \log L_{ii} + \sum \log n_i - q \log\lambda`."""
        q = len(self)
        diagonal = self._factor[:q, :q].diagonal()
        return float(2 * diagonal.log().sum() + self._counts.double().log().sum() - q * math.log(self.lam))

    def state_dict(self) -> dict[str, Any]:
        """Points, counts, sums and the factor as it is, so that what goes on from it is the same to the bit."""
        q = len(self)
        return save_state(self, 1, {
            "kernel": repr(self.kernel) if isinstance(self.kernel, Kernel) else "a function", "lam": self.lam,
            "points": self._points, "counts": self._counts, "sums": self._sums,
            "factor": self._factor[:q, :q].tril(), "changes": self._changes,
        })  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, for the same kernel (of functions it is the caller's to know) and lam.

        Raises:
            ValueError: naming the field, what it holds and what is expected. Nothing has changed then.
        """
        points = state.get("points") if isinstance(state, Mapping) else None
        q, d = points.shape if isinstance(points, Tensor) and points.dim() == 2 else (0, 0)
        own = self.state_dict()
        sized = {
            "points": self._empty(q, d), "counts": self._counts.new_empty(q), "sums": self._empty(q),
            "factor": self._empty(q, q),
        }  # fmt: skip
        like = {name: sized.get(name, value) for name, value in own.items() if name not in ("class", "version")}
        taken = checked_state(self, 1, state, like)
        for name in ("kernel", "lam"):
            if taken[name] != own[name]:
                raise ValueError(f"state[{name!r}] is {taken[name]!r}; {own[name]!r} is expected")
        diagonal = taken["factor"].diagonal()
        for name, good in (
            ("points", taken["points"].isfinite()), ("counts", taken["counts"] > 0), ("sums", taken["sums"].isfinite()),
            ("factor", taken["factor"].isfinite().all() & (diagonal > 0)),
        ):  # fmt: skip
            if not bool(good.all()):
                raise ValueError(f"state[{name!r}] holds numbers that no {type(self).__name__} has")
        rows = {key: i for i, key in enumerate(_keys(taken["points"]))}
        if len(rows) != q:
            raise ValueError("state['points'] holds a point twice")
        self._rows, self._points, self._counts, self._sums = rows, taken["points"], taken["counts"], taken["sums"]
        self._factor, self._changes, self._weights = taken["factor"], taken["changes"], None

    # ---- inside

    def _empty(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=F64, device=self.device)

    def _checked(self, x: Tensor, y: Tensor | Sequence[float] | float) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TypeError(f"x is {came}; a tensor of a floating dtype is expected")
        rewards = torch.as_tensor(y, dtype=F64).detach().cpu()
        points = x.detach().cpu().double()
        if points.dim() == 1 and rewards.dim() <= 1:
            rewards = rewards.reshape(-1)
            points = points.expand(len(rewards), -1)
        if points.dim() != 2 or rewards.shape != points.shape[:1]:
            raise ValueError(
                f"x and y have shapes {list(x.shape)} and {list(rewards.shape)}; [n, d] and [n], or [d] and [n], are expected"
            )
        if len(self) and points.shape[1] != self._points.shape[1]:
            raise ValueError(f"x has points of {points.shape[1]} dimensions; those before have {self._points.shape[1]}")
        for name, values in (("x", points), ("y", rewards)):
            if not bool(values.isfinite().all()):
                at = (~values.isfinite()).nonzero()[0].tolist()
                raise ValueError(f"{name}{at} is {values[tuple(at)].item()}; it must be finite")
        return points, rewards

    def _grow(self, q: int) -> None:
        """Room for q rows, at least twice as much as before."""
        if q > len(self._factor):
            larger = self._empty(*(2 * (max(q, 2 * len(self._factor), 8),)))
            kept = len(self._factor)
            larger[:kept, :kept] = self._factor
            self._factor = larger

    def _change_factor(self, points: Tensor, before: Tensor, counts: Tensor) -> None:
        """From the factor of `before` to that of `counts`, whichever way is shorter."""
        old = len(before)
        changed = (counts[:old] != before).nonzero().flatten().tolist()
        if self._changes + len(changed) > self.REFACTOR or 3 * len(changed) > max(old, 3):
            return self._refactor(points, counts)
        for row in changed:
            unit = self._empty(old)
            unit[row] = 1
            sigma = self.lam / int(counts[row]) - self.lam / int(before[row])
            _stays_positive(chol_rank1, self._factor, unit, sigma, size=old)
        self._changes += len(changed)
        self._append_rows(points, counts, old)

    def _refactor(self, points: Tensor, counts: Tensor) -> None:
        self._append_rows(points, counts, 0)
        self._changes = 0

    def _append_rows(self, points: Tensor, counts: Tensor, first: int) -> None:
        for row in range(first, len(points)):
            values = self._covariance(points[row : row + 1], points[: row + 1])[0]
            values = torch.cat([values[:-1], values[-1:] + self.lam / counts[row].double()])
            _stays_positive(chol_append, self._factor, values, row)

    def _covariance(self, A: Tensor, B: Tensor) -> Tensor:
        k = self.kernel(A, B)
        if not isinstance(k, Tensor) or k.shape != (len(A), len(B)):
            came = list(k.shape) if isinstance(k, Tensor) else f"a {type(k).__name__}"
            raise ValueError(f"kernel returned {came}; [{len(A)}, {len(B)}] is expected")
        return k.detach().to(self.device, F64)

    def _solved(self) -> Tensor:
        """a = L^-1 ybar."""
        if self._weights is None:
            q = len(self)
            means = (self._sums / self._counts).unsqueeze(1)
            L = self._factor[:q, :q].contiguous()  # the same memory layout whatever the room, so the same bits
            self._weights = torch.linalg.solve_triangular(L, means, upper=False).squeeze(1)
        return self._weights

    def _plain(self, L: Tensor, a: Tensor, U: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        prior = torch.cat([self._covariance(x, x)[0] for x in X.split(1)]) if len(X) else X.new_empty(0)
        if not len(U):
            return torch.zeros_like(prior), prior
        v = torch.linalg.solve_triangular(L.tril(), self._covariance(U, X), upper=False)
        return a @ v, (prior - v.square().sum(0)).clamp_min(0.0)


def _keys(points: Tensor) -> list[bytes]:
    """The bits of every row."""
    return [array("d", row).tobytes() for row in points.tolist()]


class _IndefiniteError(ValueError):
    """A pivot that is not positive, in words."""


def _stays_positive(change: Callable[..., Tensor], *args: Any, **options: Any) -> None:
    """Change a factor. The op looks at its pivot on the CPU alone."""
    try:
        pivot = change(*args, **options)
    except ValueError as error:
        if "indefinite" not in str(error):
            raise
        raise _IndefiniteError(str(error).partition(": ")[2].partition(";")[0]) from None
    if not bool(pivot > 0):
        raise _IndefiniteError(f"its smallest pivot is {pivot.item()}")


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; a number is expected")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be finite and positive")
    return float(value)


# ---- the rules


def repeat_count(var: float | Tensor, lam: float, C: float, max_b: int | None = None) -> int | Tensor:
    r"""B, how often a choice of this posterior variance is evaluated: :math:`\max(1, \lfloor (C^2 - 1) \lambda / var \rfloor)`.

    Args:
        var: a number, or any tensor of them; not negative.
        lam: the noise variance, positive.
        C: above 1.
        max_b: at most so many, what is left of a budget; at least 1. Without it a variance of 0, where nothing is learned any
            more and B has no bound, is an error.

    Returns:
        An int, or for a tensor int64 of its shape.
    """
    lam, C = _positive("lam", lam), _above_one(C)
    if max_b is not None and max_b < 1:
        raise ValueError(f"max_b is {max_b}; at least 1 is expected")
    values = torch.as_tensor(var, dtype=F64)
    if not bool((values >= 0).all()):
        raise ValueError(f"var is {var}; it must be a number and not negative")
    exact = torch.where(values > 0, (C * C - 1) * lam / values, math.inf)
    if max_b is None:
        if not bool((exact < 2**62).all()):
            raise ValueError(f"var is {var}, of which C = {C} would have no end of repeats; max_b must bound them")
        counts = exact
    else:
        counts = exact.clamp_max(max_b)
    whole = counts.floor().clamp_min(1).to(torch.int64)
    return whole if isinstance(var, Tensor) else int(whole)


def ucb(mean: Tensor, var: Tensor, lam: float, *, beta: float) -> Tensor:
    """mean + beta sqrt(var / lam), of candidates [M]."""
    return mean + _positive("beta", beta) * (var / _positive("lam", lam)).sqrt()


def ei(mean: Tensor, var: Tensor, lam: float, *, beta: float = 1.0, best: float | Tensor | None = None) -> Tensor:
    """The expected improvement with deviation beta sqrt(var / lam), of candidates [M], over `best`; None: over the highest of
    these means. Exactly 0 where the variance is 0."""
    sigma = (var / _positive("lam", lam)).sqrt() * _positive("beta", beta)
    top = mean.max() if best is None else best
    z = (mean - top) / torch.where(sigma > 0, sigma, 1.0)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    score = sigma * (z * torch.special.ndtr(z) + density)
    return torch.where(sigma > 0, score.clamp_min(0.0), 0.0)


def beta_bound(
    logdet: float,
    lam: float,
    *,
    xi: float,
    delta: float,
    F: float = 1.0,
    C: float = 1.0,
    form: Literal["self_normalised", "predecessor"] = "self_normalised",
) -> float:
    r"""A width beta with which the bounds hold with probability 1 - delta.

    ``"self_normalised"``: :math:`C (\sqrt\lambda F + \xi \sqrt{\mathrm{logdet} + 2 \log(1/\delta)})`;
    ``"predecessor"``, of the Batch-BKB code: :math:`\sqrt\lambda F + \sqrt{\xi^2 (C\, \mathrm{logdet} + \log(1/\delta))}`.

    Args:
        logdet: of :meth:`UniqueGP.logdet`, not negative.
        xi: the standard deviation of the noise. F: a bound of the norm of f.
        C: of posteriors that are as old as the repeat rule allows; 1 for those of now.
    """
    choice("form", form, BOUNDS)
    lam, xi, F = _positive("lam", lam), _positive("xi", xi), _positive("F", F)
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; a number in (0, 1) is expected")
    if not C >= 1 or math.inf == C:
        raise ValueError(f"C is {C}; at least 1 is expected")
    if not 0 <= logdet < math.inf:
        raise ValueError(f"logdet is {logdet}; it must be finite and not negative")
    if form == "predecessor":
        return math.sqrt(lam) * F + math.sqrt(xi * xi * (C * logdet + math.log(1 / delta)))
    return C * (math.sqrt(lam) * F + xi * math.sqrt(logdet + 2 * math.log(1 / delta)))


def _above_one(C: float) -> float:
    if not _positive("C", C) > 1:
        raise ValueError(f"C is {C}; a number above 1 is expected")
    return float(C)


# ---- the loop


class Pick(NamedTuple):
    """A candidate, by its index, and how often it is to be evaluated before the next is asked for."""

    candidate: int
    repeats: int


class MiniGP:
    """Which of a fixed set of candidates to evaluate next, and how often.

        sampler = MiniGP(candidates, Kernel("rbf", 0.2), lam=0.01, C=1.1, beta=2.0, budget=1000)
        while sampler.spent < 1000:
            index, repeats = sampler.sample()
            sampler.update(index, label(index, repeats))      # in parallel, if that is possible

    Nothing is drawn: the choice is the first candidate of the highest score, and asking twice gives it twice. The scores are
    formed again only after an update.

    Args:
        candidates: [M, d], finite. Those that are equal to the bit share their observations.
        kernel, lam, device: of :class:`UniqueGP`.
        C: above 1; the higher, the more often a choice is repeated.
        beta: the width, positive: a number, or a function of the :class:`UniqueGP`, such as one of :func:`beta_bound`.
        rule: ``"ucb"`` or ``"ei"``.
        budget: evaluations in all, which bound the last repeats; None: no bound, and then a variance of 0 is an error.
    """

    def __init__(
        self,
        candidates: Tensor,
        kernel: Kernel | Covariance,
        *,
        lam: float,
        C: float,
        beta: float | Callable[[UniqueGP], float],
        rule: Rule = "ucb",
        budget: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        choice("rule", rule, RULES)
        if not isinstance(candidates, Tensor) or not candidates.is_floating_point():
            raise TypeError(f"candidates are {getattr(candidates, 'dtype', type(candidates).__name__)}; floats are expected")
        if candidates.dim() != 2 or not len(candidates):
            raise ValueError(f"candidates has shape {list(candidates.shape)}; [M, d] with M > 0 is expected")
        if not bool(candidates.isfinite().all()):
            raise ValueError("candidates holds numbers that are not finite")
        if budget is not None and budget < 1:
            raise ValueError(f"budget is {budget}; at least 1 is expected")
        self.gp = UniqueGP(kernel, lam, device=device)
        self.C, self.rule, self.budget = _above_one(C), rule, budget
        self.beta = beta if callable(beta) else _positive("beta", beta)
        self._candidates = candidates.detach().to(self.gp.device, F64)
        self._counts = torch.zeros(len(candidates), dtype=torch.int64)
        self.spent, self.switches, self._last = 0, 0, -1
        self._pick: tuple[int, float] | None = None

    @property
    def counts(self) -> Tensor:
        """How often each candidate was evaluated, int64 [M]: a copy."""
        return self._counts.clone()

    def scores(self) -> tuple[Tensor, GpPosterior]:
        """The scores of all candidates [M], and the posterior that they are of."""
        posterior = self.gp.posterior(self._candidates)
        beta = self.beta(self.gp) if callable(self.beta) else self.beta
        score = ucb if self.rule == "ucb" else ei
        return score(*posterior, self.gp.lam, beta=beta), posterior

    def sample(self, step: int = 0) -> Pick:
        """The next choice. `step` is that of other samplers, and is not looked at: nothing is drawn.

        Raises:
            ValueError: the budget is spent; or without one the variance of the choice is 0.
        """
        left = None if self.budget is None else self.budget - self.spent
        if left == 0:
            raise ValueError(f"budget is {self.budget}, and all of it is spent")
        if self._pick is None:
            scores, posterior = self.scores()
            index = int(scores.argmax())
            self._pick = index, float(posterior.var[index])
        index, var = self._pick
        return Pick(index, int(repeat_count(var, self.gp.lam, self.C, left)))

    def update(self, index: int, rewards: Tensor | Sequence[float] | float) -> None:
        """Take in the rewards of a candidate, as many as there are; it need not be the one that was chosen.

        Raises:
            ValueError: an index out of range, no reward or one that is not finite, or more than the budget. Nothing has changed
                then.
        """
        if not 0 <= index < len(self._counts):
            raise ValueError(f"index is {index}; candidates are 0 to {len(self._counts) - 1}")
        values = torch.as_tensor(rewards, dtype=F64).detach().reshape(-1)
        if not len(values):
            raise ValueError("rewards is empty; at least one is expected")
        if self.budget is not None and self.spent + len(values) > self.budget:
            raise ValueError(f"rewards has {len(values)} numbers; of the budget {self.budget - self.spent} are left")
        self.gp.update(self._candidates[index], values)
        self._counts[index] += len(values)
        self.spent += len(values)
        self.switches += index != self._last
        self._last, self._pick = index, None

    def best(self) -> int:
        """The first candidate of the highest posterior mean."""
        return int(self.gp.posterior(self._candidates).mean.argmax())

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the same choices, to the bit. A beta that is a function is the caller's to keep."""
        return save_state(self, 1, {
            "gp": self.gp.state_dict(), "candidates": self._candidates, "counts": self._counts, "spent": self.spent,
            "switches": self.switches, "last": self._last, "C": self.C, "rule": self.rule,
            "beta": 0.0 if callable(self.beta) else self.beta,
        })  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, for the same candidates and options; the budget is this object's own.

        Raises:
            ValueError: naming the field, what it holds and what is expected. Nothing has changed then.
        """
        own = self.state_dict()
        taken = checked_state(self, 1, state, {name: own[name] for name in own if name not in ("class", "version")})
        for name in ("C", "rule", "beta"):
            if taken[name] != own[name]:
                raise ValueError(f"state[{name!r}] is {taken[name]!r}; {own[name]!r} is expected")
        if not torch.equal(taken["candidates"], self._candidates):
            raise ValueError("state['candidates'] are others than this object's")
        if int(taken["counts"].sum()) != taken["spent"] or bool((taken["counts"] < 0).any()):
            raise ValueError(f"state['counts'] sum up to {int(taken['counts'].sum())}; {taken['spent']} are spent")
        if not -1 <= taken["last"] < len(self._counts):
            raise ValueError(f"state['last'] is {taken['last']}; candidates are 0 to {len(self._counts) - 1}")
        self.gp.load_state_dict(taken["gp"])
        self._counts, self.spent, self.switches = taken["counts"], taken["spent"], taken["switches"]
        self._last, self._pick = taken["last"], None


class MiniGPHistory(NamedTuple):
    """What :func:`mini_gp_opt` did, evaluation by evaluation."""

    picks: list[int]
    """The candidate of each evaluation."""
    rewards: list[float]
    rounds: list[Pick]
    """Choices with their repeats."""
    switches: int
    """How often the choice was another than before; the first counts."""
    counts: list[int]
    """Of each candidate."""
    sampler: MiniGP
    """With the posterior of all of it."""

    @property
    def unique(self) -> int:
        """How many candidates were evaluated at all."""
        return sum(n > 0 for n in self.counts)


def mini_gp_opt(
    candidates: Tensor,
    evaluate: Callable[[int, int], Tensor | Sequence[float]],
    *,
    rule: Rule = "ucb",
    C: float,
    lam: float,
    beta: float | Callable[[UniqueGP], float],
    budget: int,
    kernel: Kernel | Covariance | None = None,
) -> MiniGPHistory:
    """Maximise a noisy function over candidates [M, d] with `budget` evaluations.

    Args:
        evaluate: takes the index of a candidate and how often, and returns as many rewards. They may be made in parallel.
        kernel: None: ``Kernel()``, RBF with length and variance 1.
        rule, C, lam, beta: of :class:`MiniGP`. C close to 1 is ordinary GP-UCB or GP-EI.

    Raises:
        ValueError: as :class:`MiniGP`, or where `evaluate` returns another number of rewards than it was asked for.
    """
    chosen = Kernel() if kernel is None else kernel
    sampler = MiniGP(candidates, chosen, lam=lam, C=C, beta=beta, rule=rule, budget=budget)
    picks: list[int] = []
    rewards: list[float] = []
    rounds: list[Pick] = []
    while sampler.spent < budget:
        pick = sampler.sample()
        found = torch.as_tensor(evaluate(*pick), dtype=F64).detach().reshape(-1)
        if len(found) != pick.repeats:
            raise ValueError(
                f"evaluate returned {len(found)} rewards of candidate {pick.candidate}; it was asked for {pick.repeats}"
            )
        sampler.update(pick.candidate, found)
        rounds.append(pick)
        picks += [pick.candidate] * pick.repeats
        rewards += found.tolist()
    return MiniGPHistory(picks, rewards, rounds, sampler.switches, sampler.counts.tolist(), sampler)
