"""Advantages of samples against the others of their group, and what is done to them over a whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import GroupAdvantages, PairMaskedAdvantages, QuestionWeights

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "opo", "mad", "pass_at_k", "pass_at_k_no_std")
SINGLETONS = ("zero", "reward", "calibrate")
COMBINES = ("sum_then_normalize", "normalize_then_sum")
NAN_RULES = ("error", "zero", "ignore")
BATCHES = ("none", "std", "seq", "token", "nonzero")
STATISTICS = ("mean", "std", "count", "min", "max")


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    estimator: Literal["grpo", "dr_grpo", "rloo", "opo", "mad", "pass_at_k", "pass_at_k_no_std"] = "grpo",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Literal["zero", "reward", "calibrate"] = "zero",
    weights: Sequence[float] | Tensor | None = None,
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    nan: Literal["error", "zero", "ignore"] = "error",
    lengths: Tensor | None = None,
    virtual_value: float = 1.0,
    virtual_count: int = 0,
    batch: Literal["none", "std", "seq", "token", "nonzero"] = "none",
    batch_eps: float | None = None,
    outputs: Sequence[str] = (),
) -> GroupAdvantages:
    """Advantages within groups of G samples with mean m and standard deviation s (divisor G - ddof)

        grpo              (r - m) / (s + eps)
        dr_grpo           r - m
        rloo              G / (G - 1) (r - m), which is r minus the mean of the others
        opo               r - sum(n r) / sum(n), n the lengths
        mad               G (r - m) / (sum |r - m| + eps)
        pass_at_k         the best sample (the first of equals): (max - second) / (s + eps); the others: 0
        pass_at_k_no_std  the same without the divisor

    Args:
        rewards: [B], or [B, K] for K rewards per sample with `weights` [K] (None: ones).
        group: int64 [B], any ids in any order; equal ids belong together. Groups may differ in size.
        singleton: what a group of one gets: "zero"; "reward", as if m = 0 and s = 1: r, and r / (1 + eps) where the
            estimator divides; "calibrate": what the formula gives with the virtual samples.
        combine: "sum_then_normalize": r = sum_k w_k r_k, then the estimator. "normalize_then_sum": the estimator for each
            column, z_k, then sum_k w_k z_k.
        nan: "error"; "zero", NaN counts as 0; "ignore", NaN is left out of sums and statistics. Then a column with fewer
            than two values in a group that has NaN there contributes nothing, and a sample that is NaN throughout gets 0
            and is left out of the batch stage.
        lengths: int [B], token counts: for opo, and for batch="token".
        virtual_value, virtual_count: for grpo and dr_grpo, that many samples of that reward join each group's m and s:
            with d = value - m and M2 the sum of squares about m, m' = m + d count / (G + count) and
            s' = sqrt((M2 + d^2 G count / (G + count)) / (G + count - ddof)).
        batch: what follows, over the advantages a of all B samples:
            std      (r - m) / (std_B(r) + batch_eps), instead of the group's own s; for grpo and dr_grpo
            seq      (a - mean_B) / (std_B + batch_eps)
            token    the same over tokens, a counted n times: whiten(a, eps=batch_eps)
            nonzero  a B / max(1, number of rewards that are not 0)
        batch_eps: None: `eps`, and 1e-8 for "token".
        outputs: statistics of the sample's group that are wanted, any of "mean", "std", "count", "min", "max"; of each
            column, shaped like rewards, with "normalize_then_sum", of the combined rewards otherwise.

    A group whose rewards are all equal (after the combination) has exactly this mean, standard deviation 0 and, without
    virtual samples, advantages 0, whatever rounding would have made of it. Rewards are constants: no gradient.
    """
    _check_options(estimator, eps, ddof, singleton, combine, nan, lengths, virtual_count, batch, batch_eps, outputs)
    r = _widened(rewards)
    table = r if r.dim() == 2 else r[:, None]
    _check_rewards(table, nan)
    if nan == "zero":
        table = table.nan_to_num(nan=0.0)
    w = _weights(weights, table)
    groups = _Groups(group, len(r))
    n = None if lengths is None else _lengths(lengths, r)

    there = ~table.isnan()
    out = there.any(1)  # samples that take part
    if combine == "sum_then_normalize":
        # One by one, as the kernels add: a product and a sum per column.
        combined = torch.zeros_like(table[:, 0])
        for k in range(table.shape[1]):
            combined = combined + torch.where(there[:, k], w[k] * table[:, k], 0.0)
        columns, used, w = combined[:, None], out[:, None], torch.ones_like(w[:1])
    else:
        columns, used = table, there
    own = "dr_grpo" if batch == "std" else estimator
    parts = [
        _column(x, m, groups, own, eps, ddof, singleton, n, virtual_value, virtual_count)
        for x, m in zip(columns.unbind(1), used.unbind(1), strict=True)
    ]
    advantages = torch.zeros_like(columns[:, 0])
    for k, part in enumerate(parts):
        advantages = advantages + w[k] * part["advantages"]
    advantages = torch.where(out, _batch(advantages, columns[:, 0], out, n, batch, eps, batch_eps), 0.0)

    def statistic(name: str) -> Tensor | None:
        if name not in outputs:
            return None
        values = torch.stack([part[name] for part in parts], 1)
        return values if combine == "normalize_then_sum" and r.dim() == 2 else values[:, 0]

    return GroupAdvantages(advantages, *(statistic(name) for name in STATISTICS))


def _check_options(
    estimator: str, eps: float, ddof: int, singleton: str, combine: str, nan: str, lengths: Tensor | None, virtual_count: int,
    batch: str, batch_eps: float | None, outputs: Sequence[str],
) -> None:  # fmt: skip
    for name, value, accepted in (
        ("estimator", estimator, ESTIMATORS),
        ("singleton", singleton, SINGLETONS),
        ("combine", combine, COMBINES),
        ("nan", nan, NAN_RULES),
        ("batch", batch, BATCHES),
        ("ddof", ddof, (0, 1)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: got {value!r}, accepted are {list(accepted)}")
    for value in outputs:
        if value not in STATISTICS:
            raise ValueError(f"outputs: got {value!r}, accepted are {list(STATISTICS)}")
    if not eps >= 0 or (batch_eps is not None and not batch_eps >= 0):
        raise ValueError(f"eps, batch_eps: got {eps}, {batch_eps}, must not be negative")
    if virtual_count < 0 or (virtual_count > 0 and estimator not in ("grpo", "dr_grpo")):
        raise ValueError(f"virtual_count: got {virtual_count}, must not be negative, and 0 for {estimator!r}")
    if batch == "std" and estimator not in ("grpo", "dr_grpo"):
        raise ValueError(f"batch: got 'std' with {estimator!r}, accepted with 'grpo' and 'dr_grpo'")
    if batch in ("std", "nonzero") and combine == "normalize_then_sum":
        raise ValueError(f"batch: got {batch!r} with 'normalize_then_sum', accepted with 'sum_then_normalize'")
    if batch_eps is not None and batch in ("none", "nonzero"):
        raise ValueError(f"batch_eps: got {batch_eps} with batch {batch!r}, which has none")
    if lengths is None and (estimator == "opo" or batch == "token"):
        raise ValueError("lengths: needed by estimator 'opo' and batch 'token'")


class _Groups:
    """Reductions over groups, given back to every member."""

    def __init__(self, group: Tensor, rows: int) -> None:
        if group.shape != (rows,):
            raise ValueError(f"group: got shape {list(group.shape)}, accepted is [{rows}]")
        ids, self.index = torch.unique(group, return_inverse=True)
        self.groups = len(ids)

    def __call__(self, values: Tensor, how: Literal["sum", "amin", "amax"] = "sum") -> Tensor:
        return self.of_each(values, how)[self.index]

    def of_each(self, values: Tensor, how: Literal["sum", "amin", "amax"] = "sum") -> Tensor:
        return values.new_zeros(self.groups).scatter_reduce(0, self.index, values, how, include_self=False)


def _column(
    r: Tensor, used: Tensor, per_group: _Groups, estimator: str, eps: float, ddof: int, singleton: str, lengths: Tensor | None,
    virtual_value: float, virtual_count: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Advantages and statistics of one reward per sample; those that are not `used` take no part and get 0."""
    inf = torch.full_like(r, torch.inf)
    safe = torch.where(used, r, 0.0)
    size, count = per_group(torch.ones_like(r)), per_group(used.to(r.dtype))
    low, high = per_group(torch.where(used, r, inf), "amin"), per_group(torch.where(used, r, -inf), "amax")
    equal = low == high
    mean = torch.where(equal, low, per_group(safe) / count)
    deviation = torch.where(used, safe - mean, 0.0)
    squares = per_group(deviation.square())
    std = torch.sqrt(squares / (count - ddof).clamp_min(1))
    nothing = count == 0
    statistics = {
        "mean": mean.masked_fill(nothing, torch.nan), "std": std.masked_fill(nothing, torch.nan), "count": count.long(),
        "min": low.masked_fill(nothing, torch.nan), "max": high.masked_fill(nothing, torch.nan),
    }  # fmt: skip

    divides = estimator in ("grpo", "mad", "pass_at_k")
    zero = equal
    if estimator in ("grpo", "dr_grpo"):
        total = count + virtual_count
        towards = torch.where(nothing, 0.0, virtual_value - mean)
        center = mean + towards * virtual_count / total.clamp_min(1)
        squares = squares + towards.square() * count * virtual_count / total.clamp_min(1)
        zero = squares == 0 if virtual_count else equal
        a = safe - center
        if estimator == "grpo":
            a = a / (torch.sqrt(squares / (total - ddof).clamp_min(1)) + eps)
    elif estimator == "rloo":
        a = (safe - mean) * count / (count - 1).clamp_min(1)
    elif estimator == "opo":
        assert lengths is not None
        n = torch.where(used, lengths, 0.0)
        tokens = per_group(n)
        if bool(((tokens == 0) & used & (size > 1)).any()):
            raise ValueError("lengths: those of a group add up to 0")
        a = safe - per_group(n * safe) / tokens
    elif estimator == "mad":
        a = count * (safe - mean) / (per_group(deviation.abs()) + eps)
    else:
        row = torch.arange(len(r), device=r.device)
        best = row == per_group(torch.where(used & (r == high), row, len(r)), "amin")
        second = per_group(torch.where(used & ~best, r, -inf), "amax")
        a = torch.where(best & used, high - second, 0.0)
        if divides:
            a = a / (std + eps)
    a = torch.where(zero, 0.0, a)

    alone = (size == 1) & used
    if singleton == "zero":
        a = torch.where(alone, 0.0, a)
    elif singleton == "reward":
        a = torch.where(alone, safe / (1 + eps) if divides else safe, a)
    a = torch.where((count < 2) & (size > 1), 0.0, a)
    return {"advantages": torch.where(used, a, 0.0), **statistics}


def _batch(
    a: Tensor, r: Tensor, used: Tensor, lengths: Tensor | None, batch: str, eps: float, batch_eps: float | None
) -> Tensor:
    """The batch stage over the samples that are `used`."""
    if batch == "none":
        return a
    if batch == "nonzero":
        return a * used.sum() / (r[used] != 0).sum().clamp_min(1)
    if batch == "token":
        assert lengths is not None
        moments = batch_moments(torch.where(used, a, 0.0), torch.where(used, lengths, 0.0))
        return batch_normalize(a, moments, mode="token", eps=1e-8 if batch_eps is None else batch_eps)
    moments = batch_moments(a if batch == "seq" else torch.where(used, r, 0.0), used)
    if batch == "std":
        moments = moments * moments.new_tensor([1, 0, 1])  # centred already
    return batch_normalize(a, moments, mode="seq", eps=eps if batch_eps is None else batch_eps)


def question_weights(
    rewards: Tensor,
    group: Tensor,
    *,
    lengths: Tensor | None = None,
    main_rewards: Tensor | None = None,
    temperature: float = 2.0,
    tol: float = 1e-8,
    zero_accuracy_as_easy: bool = True,
) -> QuestionWeights:
    """Difficulty weights of questions (groups). A question is valid if max r - min r > tol; V is the number of valid ones.

        D = -mean of its main rewards
        weights = V exp(D / temperature) / sum over valid questions of exp(D / temperature); 1 for a question that is not valid
        scale = sum of all lengths / sum of the lengths in valid questions; 1 without lengths, or if none is valid

    main_rewards: [B], None: `rewards`. zero_accuracy_as_easy: a valid question whose main mean is within tol of 0 (it is
    valid because of other rewards) counts as mean 1.
    """
    r = _widened(rewards)
    main = r if main_rewards is None else _widened(main_rewards).to(r.dtype)
    _check_rewards(r[:, None], "error")
    _check_rewards(main[:, None], "error", "main_rewards")
    if not temperature > 0 or not tol >= 0:
        raise ValueError(f"temperature, tol: got {temperature}, {tol}, must be positive and not negative")
    per_group = _Groups(group, len(r))
    valid = per_group(r, "amax") - per_group(r, "amin") > tol
    ones = torch.ones_like(r)
    mean = per_group(main) / per_group(ones)
    if zero_accuracy_as_easy:
        mean = torch.where(mean.abs() <= tol, 1.0, mean)
    count = per_group(ones)
    questions = (valid / count).sum().round()  # each counted once
    d = -mean[valid] / temperature
    top = d.max() if len(d) else 0.0
    weights = torch.ones_like(r)
    e = torch.exp(d - top)
    weights[valid] = questions * e / (e / count[valid]).sum()
    scale = r.new_ones(())
    if lengths is not None:
        n = _lengths(lengths, r)
        if bool(valid.any()):
            if not bool(n[valid].sum() > 0):
                raise ValueError("lengths: those of the valid questions add up to 0")
            scale = n.sum() / n[valid].sum()
    return QuestionWeights(weights, valid, scale)


def pair_masked_advantages(
    rewards: Tensor,
    scores: Tensor,
    group: Tensor,
    *,
    tau: float = 0.1,
    mode: Literal["gap", "abs"] = "gap",
    level: Literal["pair", "sequence"] = "pair",
    eps: float = 1e-6,
    ddof: int = 1,
    sigma: Literal["all", "kept"] = "all",
    renormalise: bool = False,
) -> PairMaskedAdvantages:
    """Advantages from which pairs of samples with too little distance in their scores q are masked.

        W_ij = 1 if r_i = r_j, else
               gap  sign(r_i - r_j) (q_i - q_j) >= tau
               abs  |q_i - q_j| >= tau
        pair      A_i = 1 / G sum_j W_ij (r_i - r_j) / (sigma + eps)
        sequence  A_i = k_i (r_i - m) / (sigma + eps)
        k_i = 1 if W_ij = 1 for some j with r_j != r_i

    sigma: the standard deviation of the group's rewards, "all" of them or those of the samples with k = 1 ("kept"; 1 if
    these are fewer than two). renormalise: times B over the number of samples that are not masked out; masked out is who has
    partners of another reward, all of them masked. Returns A, k, and for each sample how many pairs it lost.
    """
    for name, value, accepted in (
        ("mode", mode, ("gap", "abs")),
        ("level", level, ("pair", "sequence")),
        ("sigma", sigma, ("all", "kept")),
        ("ddof", ddof, (0, 1)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: got {value!r}, accepted are {list(accepted)}")
    if math.isnan(tau) or not eps >= 0:
        raise ValueError(f"tau, eps: got {tau}, {eps}, must be a number and not negative")
    r, q = _widened(rewards), _widened(scores)
    _check_rewards(r[:, None], "error")
    _check_rewards(q[:, None], "error", "scores")
    _Groups(group, len(r))
    q = q.to(r.dtype)
    advantages, kept = torch.zeros_like(r), torch.zeros_like(r, dtype=torch.bool)
    masked = torch.zeros_like(kept, dtype=torch.int64)
    for g in group.unique():
        rows = (group == g).nonzero()[:, 0]
        x, gap = r[rows], q[rows, None] - q[rows]
        difference = x[:, None] - x
        distance = difference.sign() * gap if mode == "gap" else gap.abs()
        differs = difference != 0
        there = ~differs | (distance >= tau)
        k = (there & differs).any(1)
        kept[rows], masked[rows] = k, (~there).sum(1)
        std = _std(x, ddof) if sigma == "all" else _std(x[k], ddof) if k.sum() > 1 else x.new_ones(())
        sums = (there * difference).sum(1) if level == "pair" else k * difference.sum(1)
        advantages[rows] = torch.where(sums == 0, 0.0, sums / len(x) / (std + eps))
    if renormalise:
        left = len(r) - int(((masked > 0) & ~kept).sum())
        advantages = advantages * len(r) / max(left, 1)
    return PairMaskedAdvantages(advantages, kept, masked)


def batch_moments(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """float64 [3]: n = sum w, mean = sum w v / n, M2 = sum w (v - mean)^2 over all elements; (0, 0, 0) if n is 0.

    weights: shaped like `values`: a bool mask, or non-negative numbers. Where the weight is 0 the value is not looked at.
    """
    v = values.detach().double().reshape(-1)
    w = torch.ones_like(v) if weights is None else weights.detach().double().reshape(-1)
    if bool((w < 0).any()):
        raise ValueError("weights: must not be negative")
    v = torch.where(w > 0, v, 0.0)
    n = w.sum()
    mean = torch.where(n > 0, (w * v).sum() / n, 0.0)
    return torch.stack([n, mean, (w * (v - mean).square()).sum()])


def merge_moments(moments: Tensor) -> Tensor:
    """Moments [R, 3] of R parts as those of the whole, [3]."""
    n, mean, squares = moments.double().unbind(1)
    total = n.sum()
    whole = torch.where(total > 0, (n * mean).sum() / total, 0.0)
    return torch.stack([total, whole, (squares + n * (mean - whole).square()).sum()])


def batch_normalize(
    values: Tensor, moments: Tensor, *, mode: Literal["seq", "token"] = "seq", eps: float = 1e-8, mask: Tensor | None = None
) -> Tensor:
    """Values normalised by moments (n, mean, M2); 0 outside the mask.

    seq    (v - mean) / (sqrt(M2 / (n - 1)) + eps); for n < 2 the standard deviation is 0
    token  mu = n mean / (n + 1e-8),  var = sum (v - mu)^2 / (n + 1e-8) n / (n - 1),  (v - mu) / sqrt(var + eps)
    """
    if mode not in ("seq", "token"):
        raise ValueError(f"mode: got {mode!r}, accepted are ['seq', 'token']")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, must not be negative")
    n, mean, squares = moments.double().unbind(0)
    v = _widened(values)
    if mode == "token":
        if not bool(n >= 2):
            raise ValueError(f"moments: n is {float(n)}, at least 2 tokens are needed")
        shifted = n * mean / (n + 1e-8)
        squares = squares + n * (mean - shifted).square()
        center, divisor = shifted, torch.sqrt(squares / (n + 1e-8) * n / (n - 1) + eps)
    else:
        center, divisor = mean, torch.sqrt(squares / (n - 1).clamp_min(1)) + eps
    out = torch.where(divisor > 0, (v.double() - center) / divisor, 0.0).to(v.dtype)
    return out if mask is None else torch.where(mask, out, 0.0)


def whiten(values: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8, moments: Tensor | None = None) -> Tensor:
    """batch_normalize(mode="token") over everything inside the mask, by its own moments unless given."""
    moments = batch_moments(values, mask) if moments is None else moments
    return batch_normalize(values, moments, mode="token", eps=eps, mask=mask)


def _std(x: Tensor, ddof: int) -> Tensor:
    return torch.sqrt((x - x.mean()).square().sum() / max(len(x) - ddof, 1))


def _widened(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _check_rewards(table: Tensor, nan: str, name: str = "rewards") -> None:
    bad = ~table.isfinite() if nan == "error" else table.isinf()
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: row {row}, column {column} is {table[row, column].item()}; every reward must be finite")


def _weights(weights: Sequence[float] | Tensor | None, table: Tensor) -> Tensor:
    if weights is None:
        return table.new_ones(table.shape[1])
    w = torch.as_tensor(weights, dtype=torch.float64, device=table.device).to(table.dtype)
    if w.shape != (table.shape[1],) or not bool(w.isfinite().all()):
        raise ValueError(f"weights: got {weights}, accepted are {table.shape[1]} finite numbers")
    return w


def _lengths(lengths: Tensor, rows: Tensor) -> Tensor:
    if lengths.shape != (len(rows),) or bool((lengths < 0).any()):
        raise ValueError(f"lengths: got {lengths}, accepted are {len(rows)} counts that are not negative")
    return lengths.to(rows.dtype)
