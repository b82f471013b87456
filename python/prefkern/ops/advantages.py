"""Advantages of samples against the others of their group, and what a whole batch does to them.

Kernels: ``csrc/advantages``; formulas: ``csrc/math/advantages.h``. Everything here is a constant: no gradient flows."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import accumulator, check_tensors, integer, number, same_device
from ._call import call, validation
from .types import GroupAdvantages, PairMaskedAdvantages, QuestionWeights

_OPS = torch.ops.prefkern
_group_advantages, _group_advantages_stats = _OPS.group_advantages.default, _OPS.group_advantages_stats.default
_batch_moments, _merge_moments = _OPS.batch_moments.default, _OPS.merge_moments.default
_batch_normalize, _question_weights = _OPS.batch_normalize.default, _OPS.question_weights.default
_pair_masked_advantages = _OPS.pair_masked_advantages.default

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "opo", "mad", "pass_at_k", "pass_at_k_no_std")
SINGLETONS = ("zero", "reward", "calibrate")
COMBINES = ("sum_then_normalize", "normalize_then_sum")
NAN_RULES = ("error", "zero", "ignore")
BATCHES = ("none", "std", "seq", "token", "nonzero")
STATISTICS = ("mean", "std", "count", "min", "max")
MODES = ("seq", "token")
PAIR_MODES = ("gap", "abs")
PAIR_LEVELS = ("pair", "sequence")
SIGMAS = ("all", "kept")


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
    outputs: Iterable[str] = (),
) -> GroupAdvantages:
    r"""Advantages of rewards against the others of their group.

    For a group of n rewards with mean m and standard deviation s:

    - ``"grpo"``: :math:`(r - m) / (s + \epsilon)`
    - ``"dr_grpo"``: :math:`r - m`
    - ``"rloo"``: :math:`r` minus the mean of the other n - 1, which is :math:`n / (n - 1) \cdot (r - m)`
    - ``"opo"``: :math:`r - \sum l r / \sum l`, l the lengths
    - ``"mad"``: :math:`n (r - m) / (\sum |r - m| + \epsilon)`
    - ``"pass_at_k"``: the best sample, the first of equals, gets :math:`(r - r_\mathrm{second}) / (s + \epsilon)`, the others
      0; ``"pass_at_k_no_std"`` does not divide

    Args:
        rewards: ``[B]``, or ``[B, K]`` for K <= 64 rewards per sample; float32, bfloat16 or float16 (float64 on the CPU).
            Constants: no gradient flows to them.
        group: ``[B]`` int64 or int32, same device. Equal ids belong together; any values, any order, groups of any sizes. On
            the CPU ids in ascending order are the fastest.
        eps: :math:`\epsilon \ge 0`. TRL uses 1e-4, verl 1e-6.
        ddof: 0 or 1: s has the divisor n - ddof.
        singleton: what a group of one gets: ``"zero"`` (TRL); ``"reward"`` (verl), as if m = 0 and s = 1: its reward, divided
            by 1 + eps where the estimator divides; ``"calibrate"``, what the formula gives with the virtual samples.
        weights: K numbers, or a tensor ``[K]`` on the CPU or the device of the rewards; None: ones.
        combine: what K rewards turn into. ``"sum_then_normalize"``: :math:`r = \sum_k w_k r_k`, then the estimator.
            ``"normalize_then_sum"``: the estimator on every column, then :math:`\sum_k w_k z_k`. TRL's names.
        nan: a reward that is NaN is an ``"error"``, counts as ``"zero"``, or is left out: ``"ignore"`` (TRL). Then a column
            that has NaN in a group and fewer than two numbers contributes nothing there, and a sample without any number gets
            0 and is left out of the batch stage. Infinite rewards are always an error.
        lengths: ``[B]`` int64 or int32, token counts. Needed by ``"opo"`` and ``batch="token"``, else not looked at.
        virtual_value, virtual_count: for ``"grpo"`` and ``"dr_grpo"``: so many samples of that reward join m and s of every
            group; those of one only with ``singleton="calibrate"``.
        batch: what is done to the advantages a of all samples. ``"std"`` (TRL's ``scale_rewards="batch"``): divide by the
            standard deviation of all rewards instead of the group's, for ``"grpo"`` and ``"dr_grpo"``. ``"seq"`` (GDPO in TRL):
            :math:`(a - \bar a) / (\mathrm{std}(a) + \epsilon_B)`. ``"token"`` (GDPO and REINFORCE++ in verl): the same over
            tokens, see :func:`whiten`; a group of equal rewards then gets the negative mean, not 0. ``"nonzero"`` (GPG): times
            B over the number of rewards that are not 0. ``"std"`` and ``"nonzero"`` need one reward per sample.
        batch_eps: :math:`\epsilon_B`; None: ``eps`` for ``"std"`` and ``"seq"``, 1e-8, inside the root, for ``"token"``.
        outputs: any of ``"mean"``, ``"std"``, ``"count"``, ``"min"`` and ``"max"``, the statistics of a row's group. What is
            not named is not computed.

    Returns:
        GroupAdvantages(advantages ``[B]``, mean, std, count, min, max). Statistics are None where not asked for; ``[B]``, of
        the combined reward, and with ``"normalize_then_sum"`` of each column, shaped like the rewards. They are those of
        the real rewards that are numbers, whatever ``singleton`` and the virtual samples say; NaN where there is none.
        Everything is summed in double, in the order of the rows. A group of equal rewards has exactly this mean, std 0 and,
        before virtual samples and the batch, advantages 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A reward that is not finite, a length that
            is negative, a group without tokens for ``"opo"``, fewer than 2 tokens for ``"token"``: always found on the CPU; on
            CUDA the rows they touch come out NaN, or, but for the last two, it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(rewards=rewards, group=group)
    estimator_id, singleton_id = choice("estimator", estimator, ESTIMATORS), choice("singleton", singleton, SINGLETONS)
    combine_id, nan_id = choice("combine", combine, COMBINES), choice("nan", nan, NAN_RULES)
    batch_id, eps = choice("batch", batch, BATCHES), number("eps", eps)
    if batch_eps is not None:
        if batch in ("none", "nonzero"):
            raise ValueError(f"batch_eps is {batch_eps} but batch is {batch!r}; accepted with 'std', 'seq' and 'token'")
        batch_eps = number("batch_eps", batch_eps, "a number or None")
    else:
        batch_eps = 1e-8 if batch == "token" else eps
    bits = _statistic_bits(outputs) if outputs != () else 0
    if lengths is not None:
        check_tensors(lengths=lengths)
    if rewards.requires_grad:
        rewards = rewards.detach()
    weight = None if weights is None else _weights(weights)
    if rewards.is_cuda:
        _validate(rewards, weight, lengths, nan)
    arguments = (
        rewards, group, weight, lengths, estimator_id, singleton_id, integer("ddof", ddof), eps, combine_id, nan_id,
        number("virtual_value", virtual_value), integer("virtual_count", virtual_count), batch_id, batch_eps,
    )  # fmt: skip
    if not bits:
        return GroupAdvantages(call(_group_advantages, *arguments))
    advantages, *statistics = call(_group_advantages_stats, *arguments, bits)
    return GroupAdvantages(advantages, *(t if bits >> i & 1 else None for i, t in enumerate(statistics)))


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
    r"""Weights by difficulty of questions (groups), which add up to their number (DGPO).

    A question is valid if its largest and smallest reward differ by more than ``tol``. Of V valid questions s, with
    :math:`D_s = -\mathrm{mean}` of the main rewards,

    .. math:: \lambda_s = V \frac{\exp(D_s / T)}{\sum_{s'} \exp(D_{s'} / T)}

    and 1 for the others. The scale is the number of all tokens over that of the samples of valid questions.

    Args:
        rewards: ``[B]`` float32, bfloat16 or float16 (float64 on the CPU).
        group: ``[B]`` int64 or int32, any ids in any order.
        lengths: ``[B]`` int64 or int32, token counts; None: scale is 1.
        main_rewards: ``[B]``, what difficulty is measured by, usually accuracy; None: ``rewards``.
        temperature: T > 0; large values make all weights equal.
        tol: >= 0.
        zero_accuracy_as_easy: a valid question whose main mean is within ``tol`` of 0, valid because of other rewards only,
            counts as mean 1, the easiest (the authors' code); False: as the hardest (the paper).

    Returns:
        QuestionWeights(weights ``[B]``, valid bool ``[B]``, scale 0-d). Without a valid question weights and scale are 1.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A reward that is not finite, a negative
            length, valid questions without tokens: always found on the CPU; on CUDA weights and scale come out NaN.
    """
    check_tensors(rewards=rewards, group=group)
    _check_optional(lengths=lengths, main_rewards=main_rewards)
    if not isinstance(zero_accuracy_as_easy, bool):
        raise TypeError(f"zero_accuracy_as_easy is {zero_accuracy_as_easy!r}; True or False is expected")
    main = None if main_rewards is None else main_rewards.detach()
    if rewards.is_cuda:
        _validate(rewards, None, lengths, "error")
        if main is not None:
            _validate_finite("main_rewards", main)
    return QuestionWeights(
        *call(
            _question_weights, rewards.detach(), group, lengths, main, number("temperature", temperature), number("tol", tol),
            zero_accuracy_as_easy,
        )
    )  # fmt: skip


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
    r"""GRPO's advantages as averages over pairs, without the pairs of samples that are too alike (DaGRPO, inferred form).

    With fine-grained scores q, a pair of different rewards counts, :math:`W_{ij} = 1`, if the better one scores higher by tau:
    :math:`\mathrm{sign}(r_i - r_j)(q_i - q_j) \ge \tau` (``"gap"``), or if :math:`|q_i - q_j| \ge \tau` (``"abs"``). Then

    .. math:: A_i = \frac1G \sum_j W_{ij} \frac{r_i - r_j}{\sigma + \epsilon} \quad\text{(pair)}, \qquad
              A_i = k_i \frac{r_i - \bar r}{\sigma + \epsilon} \quad\text{(sequence)}

    where :math:`k_i = 1` if one of the sample's pairs of different rewards counts. If all do, both are GRPO's.

    Args:
        rewards, scores: ``[B]`` float32, bfloat16 or float16 (float64 on the CPU).
        group: ``[B]`` int64 or int32, any ids in any order. Time is quadratic in the size of a group, memory is not.
        tau: any number; ``-inf`` masks nothing in mode ``"gap"``.
        eps: :math:`\epsilon \ge 0`.
        ddof: 0 or 1, of :math:`\sigma`.
        sigma: the standard deviation of ``"all"`` rewards of the group, or of those of samples with k = 1: ``"kept"``; 1 if
            they are fewer than two.
        renormalise: times B over the number of samples that are not masked out, for losses that divide by all of them.
            Masked out is who has partners of another reward, none of which counts.

    Returns:
        PairMaskedAdvantages(advantages ``[B]``, kept bool ``[B]``: k, masked_pairs int64 ``[B]``: how many a sample lost).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A reward or score that is not finite is
            always found on the CPU; on CUDA the rows of its group come out NaN, or it raises under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(rewards=rewards, scores=scores, group=group)
    if not isinstance(renormalise, bool):
        raise TypeError(f"renormalise is {renormalise!r}; True or False is expected")
    if rewards.is_cuda:
        _validate_finite("rewards", rewards)
        _validate_finite("scores", scores)
    return PairMaskedAdvantages(
        *call(
            _pair_masked_advantages, rewards.detach(), scores.detach(), group, number("tau", tau),
            choice("mode", mode, PAIR_MODES), choice("level", level, PAIR_LEVELS), number("eps", eps), integer("ddof", ddof),
            choice("sigma", sigma, SIGMAS), renormalise,
        )
    )  # fmt: skip


def batch_moments(values: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Number, mean and sum of squares about the mean of everything in a tensor, for :func:`batch_normalize`.

    Args:
        values: any shape; float32, bfloat16 or float16 (float64 on the CPU).
        weights: shaped like ``values``: a bool mask, or how often each value counts, floating and not negative. Where it is 0
            the value is not looked at. None: everything counts once.

    Returns:
        float64 ``[3]``: :math:`n = \sum w`, :math:`\mu = \sum w v / n`, :math:`M_2 = \sum w (v - \mu)^2`, in two passes; zeros
        if n is 0. Where the batch is spread over ranks, each calls this, gathers what the others have, and takes
        :func:`merge_moments` of it.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A negative weight is found on the CPU; on
            CUDA the moments come out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(values=values)
    _check_optional(weights=weights)
    if weights is not None:
        weights = weights.detach()
        if weights.is_cuda and _validating() and bool((weights < 0).any()):
            raise ValueError("weights holds a negative number; every weight must be finite and not negative")
    return call(_batch_moments, values.detach(), weights)


def merge_moments(moments: Tensor) -> Tensor:
    """Moments of R parts, float64 ``[R, 3]``, as those of the whole, ``[3]``: Chan's formula, in the order of the rows."""
    check_tensors(moments=moments)
    return call(_merge_moments, moments.detach())


def batch_normalize(
    values: Tensor, moments: Tensor, *, mode: Literal["seq", "token"] = "seq", eps: float = 1e-8, mask: Tensor | None = None
) -> Tensor:
    r"""Values normalised by moments (n, mean, M2), which may be those of a larger batch.

    - ``"seq"``: :math:`(v - \mu) / (s + \epsilon)` with :math:`s = \sqrt{M_2 / (n - 1)}`, 0 for n < 2
    - ``"token"`` (verl's whitening): :math:`(v - \mu') / \sqrt{\sigma^2 + \epsilon}` with
      :math:`\mu' = n \mu / (n + 10^{-8})` and :math:`\sigma^2 = \frac{\sum (v - \mu')^2}{n + 10^{-8}} \frac{n}{n - 1}`

    Args:
        values: any shape; float32, bfloat16 or float16 (float64 on the CPU).
        moments: float64 ``[3]``, same device, of :func:`batch_moments` or :func:`merge_moments`.
        eps: :math:`\epsilon \ge 0`.
        mask: bool, shaped like ``values``. Outside the result is 0 and the value is not looked at.

    Returns:
        Shaped like ``values``, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; for ``"token"`` also where n < 2, which on
            CUDA makes everything NaN, or raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(values=values, moments=moments)
    _check_optional(mask=mask)
    if mode == "token" and moments.is_cuda and _validating() and float(moments[0]) < 2:
        raise ValueError(f"moments has n = {float(moments[0])}; mode 'token' needs at least 2 tokens")
    return call(
        _batch_normalize, values.detach(), moments.detach(), mask, choice("mode", mode, MODES), number("eps", eps)
    )  # fmt: skip


def whiten(values: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8, moments: Tensor | None = None) -> Tensor:
    """``batch_normalize(mode="token")`` over all tokens that count, by their own moments or by given ones: verl's
    ``masked_whiten``.

    Args:
        values: any shape, ``[B, T]`` or packed ``[N]``.
        mask: bool, shaped like ``values``; None: everything counts.
        eps: inside the root.
        moments: those of a batch that is spread over ranks, from :func:`merge_moments`.

    Raises:
        ValueError, TypeError: as :func:`batch_moments` and :func:`batch_normalize`; fewer than 2 tokens are an error.
    """
    check_tensors(values=values)
    _check_optional(mask=mask, moments=moments)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
    moments = batch_moments(values, mask) if moments is None else moments
    return batch_normalize(values, moments, mode="token", eps=eps, mask=mask)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_optional(**tensors: Any) -> None:
    check_tensors(**{name: value for name, value in tensors.items() if value is not None})


def _statistic_bits(outputs: Iterable[str]) -> int:
    if isinstance(outputs, str):
        raise ValueError(f"outputs is the string {outputs!r}; a tuple of names is expected, e.g. ({outputs!r},)")
    if not isinstance(outputs, Iterable):
        raise TypeError(f"outputs is {outputs!r}; a tuple of names is expected")
    bits = 0
    for name in outputs:
        if name not in STATISTICS:
            raise ValueError(f"outputs has {name!r}; accepted: {', '.join(map(repr, STATISTICS))}")
        bits |= 1 << STATISTICS.index(name)
    return bits


def _weights(weights: Any) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.detach()
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"weights is {weights!r}; a sequence of numbers or a torch.Tensor is expected")
    return torch.tensor([number(f"weights[{k}]", w) for k, w in enumerate(weights)], dtype=torch.float64)


def _validating() -> bool:
    return validation() and not torch.compiler.is_compiling()


def _validate(rewards: Tensor, weights: Tensor | None, lengths: Tensor | None, nan: str) -> None:
    if not _validating():
        return
    _validate_finite("rewards", rewards, nan != "error", "every reward must be finite")
    if weights is not None and weights.is_cuda:
        _validate_finite("weights", weights, False, "every weight must be finite")
    if lengths is not None and bool((lengths < 0).any()):
        i = int((lengths < 0).nonzero()[0])
        raise ValueError(f"lengths[{i}] is {int(lengths[i])}; it must not be negative")


def _validate_finite(name: str, t: Tensor, nan_too: bool = False, accepted: str = "it must be finite") -> None:
    if not _validating():
        return
    bad = t.isinf() if nan_too else ~t.isfinite()
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        value = t[tuple(at)].item()
        raise ValueError(f"{name}[{', '.join(map(str, at))}] is {value}; {accepted}{' or NaN' if nan_too else ''}")


# ---- fake implementations --------------------------------------------------------------------------------------------


def _check_rows(rewards: Tensor, **rows: Tensor | None) -> None:
    same_device("rewards", rewards, **rows)
    for name, t in rows.items():
        torch._check(
            t is None or (t.dim() == 1 and t.shape[0] == rewards.shape[0]),
            lambda name=name: f"{name} must be [{rewards.shape[0]}], a row for each of rewards",
        )


@torch.library.register_fake("prefkern::group_advantages")
def _fake_group_advantages(
    rewards: Tensor, group: Tensor, weights: Tensor | None, lengths: Tensor | None, *options: float
) -> Tensor:
    torch._check(rewards.dim() in (1, 2), lambda: f"rewards has shape {list(rewards.shape)}; expected [B] or [B, K]")
    _check_rows(rewards, group=group, lengths=lengths)
    return rewards.new_empty(rewards.shape[:1], dtype=accumulator(rewards))


@torch.library.register_fake("prefkern::group_advantages_stats")
def _fake_group_advantages_stats(
    rewards: Tensor, group: Tensor, weights: Any, lengths: Any, *options: Any
) -> tuple[Tensor, ...]:
    advantages = _fake_group_advantages(rewards, group, weights, lengths)
    combine, outputs = options[4], options[-1]
    shape = rewards.shape if combine else rewards.shape[:1]
    dtypes = (advantages.dtype, advantages.dtype, torch.int64, advantages.dtype, advantages.dtype)
    return advantages, *(rewards.new_empty(shape if outputs >> i & 1 else (0,), dtype=t) for i, t in enumerate(dtypes))


@torch.library.register_fake("prefkern::batch_moments")
def _fake_batch_moments(values: Tensor, weights: Tensor | None) -> Tensor:
    same_device("values", values, weights=weights)
    return values.new_empty((3,), dtype=torch.float64)


@torch.library.register_fake("prefkern::merge_moments")
def _fake_merge_moments(moments: Tensor) -> Tensor:
    return moments.new_empty((3,))


@torch.library.register_fake("prefkern::batch_normalize")
def _fake_batch_normalize(values: Tensor, moments: Tensor, mask: Tensor | None, mode: int, eps: float) -> Tensor:
    same_device("values", values, moments=moments, mask=mask)
    return torch.empty_like(values, dtype=accumulator(values), memory_format=torch.contiguous_format)


@torch.library.register_fake("prefkern::question_weights")
def _fake_question_weights(
    rewards: Tensor, group: Tensor, lengths: Tensor | None, main_rewards: Tensor | None, *options: float
) -> tuple[Tensor, ...]:
    _check_rows(rewards, group=group, lengths=lengths, main_rewards=main_rewards)
    weights = rewards.new_empty(rewards.shape, dtype=accumulator(rewards))
    return weights, rewards.new_empty(rewards.shape, dtype=torch.bool), weights.new_empty(())


@torch.library.register_fake("prefkern::pair_masked_advantages")
def _fake_pair_masked_advantages(rewards: Tensor, scores: Tensor, group: Tensor, *options: float) -> tuple[Tensor, ...]:
    _check_rows(rewards, scores=scores, group=group)
    dtypes = (accumulator(rewards), torch.bool, torch.int64)
    return tuple(rewards.new_empty(rewards.shape, dtype=dtype) for dtype in dtypes)
