"""The CUDA kernels of csrc/advantages, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import (
    GUARD,
    INF,
    NAN,
    close,
    guards_hold,
    launches,
    pointer,
    same_bits,
    same_bits_in_every_order,
    tensor_like,
)

STATS = ("mean", "std", "count")
ALL_STATS = (*STATS, "min", "max")
FIELDS = {"count": "sizes"}


def placed(group: Tensor, by_order: bool) -> tuple[Tensor, Tensor | None]:
    """Group ids as the kernels take them: as they are, or sorted, with the row of each."""
    return torch.sort(group, stable=True) if by_order else (group, None)


def group_advantages(simt, rewards, group, *, order=None, outputs=STATS, **options):
    """Outputs by name. With `order`, `group` is sorted and `order` says where its ids come from."""
    rows, table = len(rewards), rewards.dim() == 2
    combine_first = options.pop("combine", "sum_then_normalize") == "sum_then_normalize"
    args, keep = simt.GroupArgs(), []
    shape = rewards if table and not combine_first else torch.empty(rows)
    out = {"advantages": tensor_like(torch.empty(rows), fill=NAN)}
    for name in outputs:
        out[name] = tensor_like(shape, fill=-1, dtype=torch.int64) if name == "count" else tensor_like(shape, fill=NAN)
    args.rule.estimator = getattr(simt.AdvantageEstimator, options.pop("estimator", "grpo"))
    args.rule.singleton = getattr(simt.SingletonRule, options.pop("singleton", "zero"))
    for name in ("eps", "ddof", "virtual_value", "virtual_count"):
        if name in options:
            setattr(args.rule, name, options.pop(name))
    args.nan = getattr(simt.NanRule, options.pop("nan", "error"))
    args.batch = getattr(simt.BatchRule, options.pop("batch", "none"))
    args.batch_eps = options.pop("batch_eps", args.rule.eps)
    if (weights := options.pop("weights", None)) is not None:
        if isinstance(weights, Tensor):
            args.weighted, args.device_weight = True, pointer(weights)
        else:
            args.set_weights(list(weights))
    lengths = options.pop("lengths", None)
    assert not options
    keep += [torch.full((rows,), GUARD, dtype=torch.float64), lengths]
    args.count, args.columns, args.combine_first = rows, rewards.shape[1] if table else 1, combine_first
    args.rewards, args.group, args.order, args.lengths = map(pointer, (rewards, group, order, lengths))
    args.values = pointer(keep[0])
    for name, tensor in out.items():
        setattr(args, FIELDS.get(name, name), pointer(tensor))
    simt.cuda_group_advantages(args)
    if "count" in out:
        out["count"] = out["count"].int()
    return out


def sample_groups(size: int, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """Rewards, and ids of groups of all sizes, among them one of equal rewards and, if there is room, groups of one."""
    rewards = torch.randn(size) if columns is None else torch.randn(size, columns)
    group = torch.randint(-3, max(1, size // 9), (size,)) * 2**33
    rewards[group == group[0]] = 0.1
    group[1:4] = torch.arange(3)[: max(0, size - 1)] + 1
    return rewards, group


def check(out, expected, atol=1e-7, rtol=5e-7):
    for name, values in out.items():
        close(values, getattr(expected, name), atol=atol, rtol=rtol)


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("singleton", ["zero", "reward"])
@pytest.mark.parametrize("size", [1, 2, 8, 33, 500])
def test_group_advantages(simt, by_order, estimator, singleton, size):
    rewards, group = sample_groups(size)
    ids, order = placed(group, by_order)
    options = {"estimator": estimator, "singleton": singleton, "eps": 0.01}
    out = same_bits_in_every_order(simt, lambda: group_advantages(simt, rewards, ids, order=order, **options))
    check(out, reference.group_advantages(rewards.double(), group, outputs=STATS, **options))
    if singleton == "zero":
        assert not out["advantages"][group == group[0]].any()
    alone = group_advantages(simt, rewards, ids, order=order, outputs=(), **options)
    assert same_bits(alone["advantages"], out["advantages"])


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "opo", "mad", "pass_at_k", "pass_at_k_no_std"])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_tables_of_rewards(simt, by_order, estimator, combine):
    for size, ddof, singleton in ((1, 1, "reward"), (8, 0, "zero"), (130, 1, "reward")):
        rewards, group = sample_groups(size, 3)
        rewards = (rewards * 4).round() / 4  # ties
        lengths, weights = torch.randint(1, 9, (size,)), [1.0, 0.5, -2.0]
        ids, order = placed(group, by_order)
        options = dict(
            estimator=estimator, combine=combine, ddof=ddof, singleton=singleton, eps=0.01, lengths=lengths, outputs=ALL_STATS,
        )  # fmt: skip
        out = same_bits_in_every_order(
            simt, lambda i=ids, o=order, r=rewards, n=options, w=weights: group_advantages(simt, r, i, order=o, weights=w, **n)
        )
        check(out, reference.group_advantages(rewards.double(), group, weights=weights, **options), 2e-7)
        on_device = torch.tensor(weights, dtype=torch.float64)
        assert same_bits(out, group_advantages(simt, rewards, ids, order=order, weights=on_device, **options))


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("rule", ["zero", "ignore"])
@pytest.mark.parametrize("batch", ["none", "std", "seq", "token", "nonzero"])
def test_nan_and_the_batch(simt, by_order, rule, batch):
    for combine in ("sum_then_normalize", "normalize_then_sum")[: 1 if batch in ("std", "nonzero") else 2]:
        rewards, group = sample_groups(140, 3)
        rewards[torch.rand(140, 3) < 0.2] = NAN
        rewards[::9] = NAN
        rewards[group == group[5], 1] = NAN
        ids, order = placed(group, by_order)
        options = dict(combine=combine, nan=rule, batch=batch, eps=0.01, lengths=torch.arange(140) % 7, outputs=ALL_STATS)
        own = {**options, "estimator": "dr_grpo" if batch == "std" else "grpo"}  # what the op passes on
        out = same_bits_in_every_order(
            simt, lambda i=ids, o=order, r=rewards, n=own: group_advantages(simt, r, i, order=o, **n)
        )
        batch_eps = {"none": None, "nonzero": None}.get(batch, 0.01)
        check(out, reference.group_advantages(rewards.double(), group, batch_eps=batch_eps, **options), 1e-6, 1e-6)
        if rule == "ignore":
            assert not out["advantages"][rewards.isnan().all(1)].any()


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("singleton", ["zero", "reward", "calibrate"])
def test_virtual_samples(simt, by_order, singleton):
    rewards, group = sample_groups(90)
    ids, order = placed(group, by_order)
    options = dict(singleton=singleton, virtual_value=2.0, virtual_count=3)
    out = group_advantages(simt, rewards, ids, order=order, **options)
    check(out, reference.group_advantages(rewards.double(), group, outputs=STATS, **options))


@pytest.mark.parametrize("batch", ["std", "seq", "token", "nonzero"])
def test_a_batch_larger_than_its_block(simt, batch):
    rewards, group = torch.randint(0, 3, (1500,)).float(), torch.arange(1500) // 5
    ids, order = placed(group, True)
    estimator = "dr_grpo" if batch == "std" else "grpo"
    lengths = torch.randint(0, 9, (1500,))
    out = group_advantages(simt, rewards, ids, order=order, estimator=estimator, batch=batch, lengths=lengths, outputs=())
    batch_eps = {"nonzero": None}.get(batch, 1e-6)
    check(out, reference.group_advantages(rewards.double(), group, batch=batch, lengths=lengths, batch_eps=batch_eps), 1e-6)


def test_group_advantages_of_ids_at_an_odd_address(simt):
    rewards, group = sample_groups(101)
    moved = torch.cat([group[:1], group])[1:]
    assert moved.data_ptr() % 16 == 8
    for name, values in group_advantages(simt, rewards, group).items():
        close(group_advantages(simt, rewards, moved)[name], values, atol=1e-7)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
def test_group_advantages_of_a_reward_that_is_not_finite(simt, bad, by_order):
    rewards, group = torch.randn(40), torch.arange(40) % 5
    ids, order = placed(group, by_order)
    clean = group_advantages(simt, rewards, ids, order=order)
    rewards[13] = bad
    out = group_advantages(simt, rewards, ids, order=order)
    for name in ("advantages", "mean", "std"):
        assert torch.equal(out[name].isnan(), group == 3)
        assert same_bits(out[name][group != 3], clean[name][group != 3])


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("estimator", ["grpo", "opo", "mad", "pass_at_k", "pass_at_k_no_std"])
def test_no_estimator_hides_a_reward_that_is_not_finite(simt, by_order, estimator):
    for bad, rule in ((INF, "error"), (NAN, "error"), (-INF, "ignore"), (INF, "zero")):
        rewards, group = torch.randn(40, 2), torch.arange(40) % 5
        ids, order = placed(group, by_order)
        rewards[group == 3, 1] = bad  # all of them: no spread to give it away
        options = dict(estimator=estimator, nan=rule, lengths=torch.ones(40, dtype=torch.int64), outputs=())
        for combine in ("sum_then_normalize", "normalize_then_sum"):
            out = group_advantages(simt, rewards, ids, order=order, combine=combine, **options)["advantages"]
            assert torch.equal(out.isnan(), group == 3)
            batch = group_advantages(simt, rewards, ids, order=order, combine=combine, batch="seq", **options)["advantages"]
            assert batch.isnan().all()


def test_lengths_that_cannot_be(simt):
    rewards, group, lengths = torch.randn(9), torch.arange(9) // 3, torch.ones(9, dtype=torch.int64)
    lengths[4] = -1
    lengths[6:] = 0
    out = group_advantages(simt, rewards, group, estimator="opo", lengths=lengths)["advantages"]
    assert out.isnan().tolist() == [False] * 3 + [True] * 6
    for n in (lengths, torch.zeros(9, dtype=torch.int64), torch.eye(9, dtype=torch.int64)[0]):
        assert group_advantages(simt, rewards, group, batch="token", lengths=n)["advantages"].isnan().all()


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
def test_one_launch_or_two_with_a_batch_stage(simt, by_order):
    rewards, group = sample_groups(60, columns=2)
    ids, order = torch.sort(group, stable=True) if by_order else (group, None)
    lengths = torch.ones(60, dtype=torch.int64)

    def count(**options):
        return launches(simt, lambda: group_advantages(simt, rewards, ids, order=order, **options))

    for estimator in ("grpo", "dr_grpo", "rloo", "mad", "pass_at_k"):
        assert count(estimator=estimator) == count(estimator=estimator, combine="normalize_then_sum") == 1
    for batch in ("std", "seq", "token", "nonzero"):
        assert count(batch=batch, lengths=lengths) == 2


def test_no_rows_launch_nothing(simt):
    simt.cuda_group_advantages(simt.GroupArgs())
    simt.cuda_batch_normalize(simt.BatchNormalizeArgs())
    simt.cuda_masked_pairs(simt.MaskedPairArgs())


# -------------------------------------------------------------------------------------------------------------- batches


def moments(simt, values, *, mask=None, weights=None):
    parts = -(-len(values) // simt.MOMENTS_PART)
    memory, out = torch.full((3 * parts + 3,), GUARD, dtype=torch.float64), torch.full((3,), NAN, dtype=torch.float64)
    args = simt.MomentsArgs()
    args.count, args.values, args.mask, args.weights = len(values), pointer(values), pointer(mask), pointer(weights)
    args.parts, args.moments = pointer(memory), pointer(out)
    simt.cuda_batch_moments(args)
    assert (memory[3 * parts :] == GUARD).all()
    return out


def bits(t):
    return t.view(torch.int32)


@pytest.mark.parametrize("size", [0, 1, 5, 300, 16_384, 40_000])
def test_moments(simt, size):
    values, mask = torch.randn(size) + 1000, torch.rand(size) < 0.6
    weights = torch.rand(size) * mask
    hidden = values.masked_fill(~mask, NAN)
    for options in ({}, {"mask": mask}, {"weights": weights}):
        seen = hidden if options else values
        compute = lambda v=seen, o=options: bits(moments(simt, v, **o))  # noqa: E731
        out = (same_bits_in_every_order(simt, compute) if size < 1000 else compute()).view(torch.float64)
        close(out, reference.batch_moments(seen.double(), *options.values()), atol=1e-9, rtol=1e-12)


def test_moments_with_a_negative_weight(simt):
    assert moments(simt, torch.randn(10), weights=torch.arange(10.0) - 1).isnan().any()


def test_merged_moments(simt):
    parts = torch.stack([reference.batch_moments(torch.randn(n, dtype=torch.float64) * n) for n in (5, 1, 40, 0, 9)] * 60)
    args, out = simt.MergeArgs(), torch.full((3,), NAN, dtype=torch.float64)
    args.count, args.parts, args.moments = len(parts), pointer(parts), pointer(out)
    simt.cuda_merge_moments(args)
    close(out, reference.merge_moments(parts), atol=0, rtol=1e-12)


@pytest.mark.parametrize("mode", ["seq", "token"])
def test_normalized(simt, mode):
    values, mask = torch.randn(300) * 3 + 5, torch.rand(300) < 0.5
    hidden = values.masked_fill(~mask, NAN)
    for n, seen, keep in ((300, values, None), (300, hidden, mask), (1, values, mask)):
        three = reference.batch_moments(values[:n].double())
        args, out = simt.BatchNormalizeArgs(), tensor_like(values)
        args.count, args.values, args.mask, args.moments = 300, pointer(seen), pointer(keep), pointer(three)
        args.mode, args.eps, args.out = getattr(simt.MomentsMode, mode), 1e-4, pointer(out)
        simt.cuda_batch_normalize(args)
        assert guards_hold(out)
        if n == 1 and mode == "token":
            assert torch.equal(out.isnan(), mask)
        else:
            close(out, reference.batch_normalize(seen.double(), three, mode=mode, eps=1e-4, mask=keep), atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ questions


def question_weights(simt, rewards, group, *, order=None, main=None, lengths=None, **options):
    size = len(rewards)
    out = {"weights": tensor_like(rewards, fill=NAN), "scale": torch.full((1,), NAN)}
    out["valid"] = tensor_like(rewards, fill=7, dtype=torch.uint8)
    scratch = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.uint8)
    args = simt.QuestionArgs()
    args.count = size
    args.rewards, args.main = pointer(rewards), pointer(rewards if main is None else main)
    args.group, args.order, args.lengths = map(pointer, (group, order, lengths))
    args.difficulty, args.first = map(pointer, scratch)
    for name, value in {**out, **options}.items():
        setattr(args, name, pointer(value) if isinstance(value, Tensor) else value)
    simt.cuda_question_weights(args)
    return out


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("zero_as_easy", [False, True])
@pytest.mark.parametrize("size", [0, 1, 8, 300])
def test_question_weights(simt, by_order, zero_as_easy, size):
    group = torch.randint(-3, max(1, size // 5), (size,)) * 2**33
    rewards, main = torch.randint(0, 3, (size,)).float(), torch.randint(0, 2, (size,)).float()
    main[group == 0] = 0
    lengths = torch.randint(1, 9, (size,))
    ids, order = placed(group, by_order)
    for extra in ({}, {"main": main}, {"lengths": lengths}):
        out = same_bits_in_every_order(
            simt,
            lambda e=extra: question_weights(simt, rewards, ids, order=order, temperature=0.5, zero_as_easy=zero_as_easy, **e),
        )
        main_rewards = extra.get("main")
        expected = reference.question_weights(
            rewards.double(), group, main_rewards=None if main_rewards is None else main_rewards.double(), temperature=0.5,
            lengths=extra.get("lengths"), zero_accuracy_as_easy=zero_as_easy,
        )  # fmt: skip
        close(out["weights"], expected.weights, atol=1e-7)
        close(out["scale"][0], expected.scale, atol=1e-7)
        assert torch.equal(out["valid"].bool(), expected.valid)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
def test_questions_with_a_reward_that_is_not_finite(simt, bad, by_order):
    rewards, group = torch.randint(0, 2, (40,)).float(), torch.arange(40) % 5
    ids, order = placed(group, by_order)
    main, lengths = rewards.clone(), torch.ones(40, dtype=torch.int64)
    for target in (rewards, main):
        before = target[13].item()
        target[13] = bad
        out = question_weights(simt, rewards, ids, order=order, main=main, lengths=lengths)
        assert out["scale"].isnan().all()
        assert out["weights"].isnan().any()
        target[13] = before
    lengths[3] = -1
    assert question_weights(simt, rewards, ids, order=order, lengths=lengths)["scale"].isnan().all()


# ---------------------------------------------------------------------------------------------------------------- pairs


def masked_pairs(simt, rewards, scores, group, *, order=None, **options):
    out = {"advantages": tensor_like(rewards, fill=NAN), "kept": tensor_like(rewards, fill=7, dtype=torch.uint8)}
    out["masked"] = tensor_like(rewards, fill=-1, dtype=torch.int64)
    args, values = simt.MaskedPairArgs(), torch.empty(len(rewards), dtype=torch.float64)
    args.count = len(rewards)
    args.rewards, args.scores, args.group, args.order, args.values = map(pointer, (rewards, scores, group, order, values))
    args.mode = getattr(simt.PairMode, options.pop("mode", "gap"))
    for name, value in {**out, **options}.items():
        setattr(args, name, pointer(value) if isinstance(value, Tensor) else value)
    simt.cuda_masked_pairs(args)
    return {**out, "masked": out["masked"].int()}


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("mode", ["gap", "abs"])
@pytest.mark.parametrize("level", ["pair", "sequence"])
@pytest.mark.parametrize("sigma", ["all", "kept"])
def test_masked_pairs(simt, by_order, mode, level, sigma):
    for size, renormalise, ddof in ((1, False, 1), (9, True, 0), (200, False, 1), (200, True, 1)):
        group = torch.randint(-3, max(1, size // 9), (size,)) * 2**33
        rewards, scores = torch.randint(0, 3, (size,)).float(), torch.rand(size)
        ids, order = placed(group, by_order)
        out = same_bits_in_every_order(
            simt,
            lambda r=rewards, q=scores, i=ids, o=order, n=renormalise, f=ddof: masked_pairs(
                simt, r, q, i, order=o, mode=mode, tau=0.4, eps=0.01, ddof=f, whole_samples=level == "sequence",
                sigma_of_kept=sigma == "kept", renormalise=n,
            ),
        )  # fmt: skip
        expected = reference.pair_masked_advantages(
            rewards.double(), scores.double(), group, mode=mode, level=level, sigma=sigma, tau=0.4, eps=0.01, ddof=ddof,
            renormalise=renormalise,
        )  # fmt: skip
        close(out["advantages"], expected.advantages, atol=1e-7)
        assert torch.equal(out["kept"].bool(), expected.kept)
        assert torch.equal(out["masked"].long(), expected.masked_pairs)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
def test_pairs_with_a_number_that_is_not_finite(simt, bad, by_order):
    rewards, scores, group = torch.randint(0, 2, (40,)).float(), torch.rand(40), torch.arange(40) % 5
    rewards[3], rewards[8] = 0, 1
    ids, order = placed(group, by_order)
    for target in (rewards, scores):
        before = target[13].item()
        target[13] = bad
        for options in ({}, {"whole_samples": True}, {"sigma_of_kept": True}):
            out = masked_pairs(simt, rewards, scores, ids, order=order, **options)
            assert torch.equal(out["advantages"].isnan(), group == 3)
        target[13] = before
