"""What needs more than a group: batch moments and whitening, question weights, masked pairs; values, invariants, refusals."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

from prefkern import (
    batch_moments,
    batch_normalize,
    group_advantages,
    merge_moments,
    pair_masked_advantages,
    question_weights,
    reference,
    whiten,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
every_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)


def skip_float64_on(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


def accumulator(dtype):
    return F64 if dtype == F64 else F32


# -------------------------------------------------------------------------------------------------------------- moments


@every_dtype
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (40_000,)])
def test_moments(device, dtype, shape):
    skip_float64_on(device, dtype)
    values, mask = (torch.randn(shape) + 100).to(dtype), torch.rand(shape) < 0.7
    weights = (torch.rand(shape) * mask).to(dtype)
    for w in (None, mask, weights):
        seen = values if w is None else values.masked_fill(~mask, NAN)
        out = batch_moments(seen.to(device), None if w is None else w.to(device))
        assert (out.dtype, out.shape) == (F64, (3,))
        assert_close(out.cpu(), reference.batch_moments(seen, w), rtol=1e-11, atol=1e-11)


def test_moments_by_hand(device):
    values = torch.tensor([[1.0, 2.0], [6.0, NAN]], device=device)
    assert batch_moments(values, ~values.isnan()).tolist() == [3, 3, 14]
    weights = torch.tensor([[2.0, 0.0], [1.0, 0.0]], device=device)
    assert_close(batch_moments(values, weights).cpu(), torch.tensor([3, 8 / 3, 50 / 3], dtype=F64), rtol=1e-15, atol=0)
    assert batch_moments(values, torch.zeros_like(weights)).tolist() == [0, 0, 0]


def test_moments_of_strided_values(device):
    values, mask = torch.randn(6, 10, device=device), torch.rand(6, 10, device=device) < 0.5
    assert torch.equal(batch_moments(values.T, mask.T), batch_moments(values.T.contiguous(), mask.T.contiguous()))
    three = batch_moments(values)
    for v, m in ((values.T, mask.T), (values[:, ::2], mask[:, ::2])):
        assert torch.equal(whiten(v, m, moments=three), whiten(v.contiguous(), m.contiguous(), moments=three))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_merged_moments_are_those_of_the_whole(sizes):
    parts = [torch.randn(n, dtype=F64) * (k + 1) + k for k, n in enumerate(sizes)]
    merged = merge_moments(torch.stack([batch_moments(part) for part in parts]))
    assert_close(merged, batch_moments(torch.cat(parts)), rtol=1e-12, atol=1e-12)
    assert_close(merged, reference.merge_moments(torch.stack([batch_moments(p) for p in parts])), rtol=1e-12, atol=1e-12)


def test_ranks_that_gather_moments_whiten_as_one(device):
    """Two phases: every rank its moments, then all of them merged."""
    values, mask = torch.randn(8, 50, device=device), torch.rand(8, 50, device=device) < 0.8
    gathered = torch.stack([batch_moments(values[r::2], mask[r::2]) for r in range(2)])
    whole = whiten(values, mask)
    for r in range(2):
        out = whiten(values[r::2], mask[r::2], moments=merge_moments(gathered))
        assert_close(out, whole[r::2], rtol=1e-6, atol=1e-7)


def test_moments_have_the_same_bits_on_any_number_of_threads(threads):
    values, mask = torch.randn(300_001), torch.rand(300_001) < 0.5
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append((batch_moments(values, mask), whiten(values, mask)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


# ---------------------------------------------------------------------------------------------------------- normalising


@every_dtype
@pytest.mark.parametrize("mode", ["seq", "token"])
def test_normalized(device, dtype, mode):
    skip_float64_on(device, dtype)
    values, mask = (torch.randn(9, 31) * 3 + 1).to(dtype), torch.rand(9, 31) < 0.6
    hidden = values.masked_fill(~mask, INF)
    for eps, keep in itertools.product((0.0, 1e-8, 0.5), (None, mask)):
        seen = values if keep is None else hidden
        three = reference.batch_moments(seen, keep)
        on_device = None if keep is None else keep.to(device)
        out = batch_normalize(seen.to(device), three.to(device), mode=mode, eps=eps, mask=on_device)
        assert out.dtype == accumulator(dtype)
        expected = reference.batch_normalize(seen.double(), three, mode=mode, eps=eps, mask=keep)
        assert_close(out.cpu().double(), expected, rtol=2e-7, atol=1e-7)
        if mode == "token":
            assert torch.equal(whiten(seen.to(device), on_device, eps=eps, moments=three.to(device)), out)


def test_whitened_values_have_mean_0_and_variance_1(device):
    values, mask = torch.randn(20, 30, device=device) * 7 - 3, torch.rand(20, 30, device=device) < 0.5
    out = whiten(values, mask)
    assert abs(out[mask].mean()) < 1e-6
    assert abs(out[mask].var() - 1) < 1e-5
    assert out[~mask].eq(0).all()
    assert_close(out.cpu(), reference.whiten(values.cpu().double(), mask.cpu()).float(), rtol=1e-6, atol=1e-7)


def test_equal_values_become_zero(device):
    values = torch.full((5,), 0.1, device=device)
    three = batch_moments(values)
    assert batch_normalize(values, three, mode="seq", eps=0.0).eq(0).all()
    assert whiten(values).abs().max() < 1e-5  # the mean of the tokens has n + 1e-8 in it
    assert batch_normalize(values, batch_moments(values[:1]), mode="seq", eps=0.0).eq(0).all()


def test_moments_and_values_are_constants():
    values = torch.randn(10, requires_grad=True)
    assert not batch_moments(values).requires_grad
    assert not whiten(values).requires_grad


# ------------------------------------------------------------------------------------------------------------ questions


@every_dtype
@pytest.mark.parametrize("size", [0, 1, 8, 300, 5000])
def test_question_weights(device, dtype, size):
    skip_float64_on(device, dtype)
    group = torch.randint(-3, max(1, size // 6), (size,)) * 2**33
    rewards, main = torch.randint(0, 3, (size,)).to(dtype) / 2, torch.randint(0, 2, (size,)).to(dtype)
    main[group == 0] = 0
    lengths = torch.randint(1, 90, (size,))
    for given_main, n, easy in ((None, lengths, True), (main, None, True), (main, lengths.int(), False)):
        options = dict(temperature=0.7, tol=1e-3, zero_accuracy_as_easy=easy)
        moved = {k: None if t is None else t.to(device) for k, t in (("main_rewards", given_main), ("lengths", n))}
        out = question_weights(rewards.to(device), group.to(device), **moved, **options)
        expected = reference.question_weights(
            rewards.double(), group, main_rewards=None if given_main is None else given_main.double(), lengths=n, **options
        )
        assert [t.dtype for t in out] == [accumulator(dtype), torch.bool, accumulator(dtype)]
        assert_close(out.weights.cpu().double(), expected.weights, rtol=1.2e-7, atol=1e-12)
        assert_close(out.scale.cpu().double(), expected.scale, rtol=1.2e-7, atol=0)
        assert torch.equal(out.valid.cpu(), expected.valid)


def test_weights_of_questions_add_up_to_their_number(device):
    rewards, group = torch.randint(0, 2, (200,), device=device).float(), torch.arange(200, device=device) // 5
    out = question_weights(rewards, group)
    first = torch.arange(200, device=device) % 5 == 0
    assert_close(out.weights[first & out.valid].sum(), (first & out.valid).sum().float(), rtol=1e-6, atol=0)
    assert out.weights[~out.valid].eq(1).all()
    flat = question_weights(rewards, group, temperature=1e9).weights
    assert_close(flat, torch.ones_like(flat), rtol=1e-6, atol=0)


def test_no_valid_question(device):
    rewards, group = torch.tensor([0.1, 0.1, 0.7], device=device), torch.tensor([0, 0, 1], device=device)
    out = question_weights(rewards, group, lengths=torch.zeros(3, dtype=torch.int64, device=device))
    assert out.weights.tolist() == [1, 1, 1]
    assert not out.valid.any()
    assert out.scale == 1
    one = question_weights(torch.tensor([1.0, 0.0, 0.7], device=device), group)
    assert one.weights.tolist() == [1, 1, 1]
    assert one.valid.tolist() == [True, True, False]


# ---------------------------------------------------------------------------------------------------------------- pairs


@every_dtype
@pytest.mark.parametrize("size", [0, 1, 9, 300, 4200])
def test_masked_pairs(device, dtype, size):
    skip_float64_on(device, dtype)
    group = torch.randint(-3, max(1, size // 9), (size,)) * 2**33
    rewards, scores = torch.randint(0, 3, (size,)).to(dtype), torch.rand(size).to(dtype)
    choices = itertools.product(("gap", "abs"), ("pair", "sequence"), ("all", "kept"), (False, True))
    for mode, level, sigma, renormalise in choices if size <= 300 else list(choices)[::5]:
        options = dict(mode=mode, level=level, sigma=sigma, renormalise=renormalise, tau=0.4, eps=1e-3, ddof=int(size != 9))
        out = pair_masked_advantages(rewards.to(device), scores.to(device), group.to(device), **options)
        expected = reference.pair_masked_advantages(rewards.double(), scores.double(), group, **options)
        assert [t.dtype for t in out] == [accumulator(dtype), torch.bool, torch.int64]
        assert_close(out.advantages.cpu().double(), expected.advantages, rtol=1.2e-7, atol=1e-12)
        assert torch.equal(out.kept.cpu(), expected.kept)
        assert torch.equal(out.masked_pairs.cpu(), expected.masked_pairs)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 2)), min_size=1, max_size=30), st.sampled_from(["pair", "sequence"]))
def test_without_a_mask_it_is_grpo(rows, level):
    rewards, group = torch.tensor([r for r, _ in rows], dtype=F64), torch.tensor([g for _, g in rows])
    out = pair_masked_advantages(rewards, torch.rand(len(rows), dtype=F64), group, tau=-INF, level=level)
    assert_close(out.advantages, group_advantages(rewards, group).advantages, rtol=1e-9, atol=1e-12)
    assert out.masked_pairs.eq(0).all()


def test_without_a_mask_it_is_grpo_to_the_last_digits():
    """1e-15, for rewards of which means are exact."""
    rewards, group = torch.randint(0, 2, (400,)).double(), torch.arange(400) // 8
    out = pair_masked_advantages(rewards, torch.rand(400, dtype=F64), group, tau=-INF).advantages
    assert_close(out, group_advantages(rewards, group).advantages, rtol=1e-15, atol=1e-15)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(0, 2)), min_size=1, max_size=30), st.floats(0, 1))
def test_invariants_of_masked_pairs(rows, tau):
    rewards, scores = torch.tensor([float(r) for r, _, _ in rows], dtype=F64), torch.tensor([q for _, q, _ in rows], dtype=F64)
    group = torch.tensor([g for _, _, g in rows])
    out, grpo = pair_masked_advantages(rewards, scores, group, tau=tau), group_advantages(rewards, group).advantages
    for g in group.unique():
        assert abs(out.advantages[group == g].sum()) < 1e-12
    assert (out.advantages.abs() <= grpo.abs() + 1e-12).all()  # two-valued rewards
    assert ((out.advantages == 0) | (out.advantages.sign() == grpo.sign())).all()
    assert torch.equal(out.advantages != 0, out.kept)


def test_everything_masked_and_groups_of_one(device):
    rewards, group = torch.tensor([1.0, 0.0, 5.0, 1.0], device=device), torch.tensor([0, 0, 1, 1], device=device)
    scores = torch.full((4,), 0.5, device=device)
    for level in ("pair", "sequence"):
        out = pair_masked_advantages(rewards, scores, group, level=level, sigma="kept", renormalise=True)
        assert out.advantages.tolist() == [0] * 4
        assert out.masked_pairs.tolist() == [1] * 4
        assert not out.kept.any()
        alone = pair_masked_advantages(rewards, scores, torch.arange(4, device=device), level=level)
        assert alone.advantages.tolist() == [0] * 4
        assert alone.masked_pairs.tolist() == [0] * 4
        constant = pair_masked_advantages(torch.full_like(rewards, 0.1), scores, group, level=level, eps=0.0)
        assert constant.advantages.tolist() == [0] * 4


def test_renormalised_is_what_is_left(device):
    """Of five samples, one is masked out; the one without a partner is not."""
    rewards, scores = torch.tensor([0.0, 0, 0, 1, 7], device=device), torch.tensor([0.2, 0.9, 0.1, 1, 0], device=device)
    group = torch.tensor([0, 0, 0, 0, 1], device=device)
    plain, scaled = (pair_masked_advantages(rewards, scores, group, tau=0.2, renormalise=on) for on in (False, True))
    assert_close(scaled.advantages, plain.advantages * 5 / 4, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
def test_opcheck(device, dtype):
    skip_float64_on(device, dtype)
    r, q = torch.randint(0, 3, (10,), device=device).to(dtype), torch.rand(10, device=device).to(dtype)
    group, n = torch.randint(0, 3, (10,), device=device), torch.randint(1, 5, (10,), device=device)
    three = batch_moments(r)
    for weights in (None, q, q < 0.5):
        opcheck(OPS.batch_moments.default, (q, weights))
    opcheck(OPS.merge_moments.default, (torch.stack([three, three]),))
    for mask, mode in ((None, 0), (q < 0.5, 1)):
        opcheck(OPS.batch_normalize.default, (q, three, mask, mode, 1e-8))
        opcheck(OPS.batch_normalize.default, (q.view(2, 5).T, three, None if mask is None else mask.view(2, 5).T, mode, 1e-8))
    for lengths, main in ((None, None), (n, q)):
        opcheck(OPS.question_weights.default, (r, group, lengths, main, 2.0, 1e-8, True))
    opcheck(OPS.pair_masked_advantages.default, (r, q, group, 0.1, 1, 1, 1e-6, 1, 1, True))


def test_one_graph_for_any_number_of_samples(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def plain(rewards, scores, group, lengths):
        weights = question_weights(rewards, group, lengths=lengths, temperature=1.0)
        pairs = pair_masked_advantages(rewards, scores, group)
        merged = merge_moments(torch.stack([batch_moments(scores), batch_moments(rewards)]))
        return whiten(pairs.advantages * weights.weights, moments=merged) + whiten(scores, scores > 0.1) * weights.scale

    run = torch.compile(plain, fullgraph=True, dynamic=True, backend=counter)
    for size in (6, 11, 30, 31):
        arguments = (
            torch.randint(0, 2, (size,), device=device).float(), torch.rand(size, device=device) + 0.2,
            torch.randint(0, 4, (size,), device=device), torch.randint(1, 4, (size,), device=device),
        )  # fmt: skip
        assert torch.equal(run(*arguments), plain(*arguments))
    assert counter.frame_count <= 2


# --------------------------------------------------------------------------------------------------------------- errors

R, G, N = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.int64)
M = torch.tensor([4.0, 0.0, 1.0], dtype=F64)
HOLE = torch.tensor([0.0, NAN, 1.0, 1.0])
BAD = {
    batch_moments: {
        "values list": (dict(values=[1.0]), TypeError, r"values is a list; a torch\.Tensor"),
        "values int": (dict(values=N), TypeError, r"values has dtype Long.*float32"),
        "weights list": (dict(weights=[1.0]), TypeError, r"weights is a list"),
        "weights shape": (dict(weights=R[:3]), ValueError, r"weights has shape \[3\]; values has shape \[4\]"),
        "weights int": (dict(weights=N), TypeError, r"weights has dtype Long"),
        "weights device": (dict(weights=R.to("meta")), ValueError, r"weights is on meta but values is on cpu"),
        "weights negative": (dict(weights=-R), ValueError, r"weights holds -1 at element 0; .*not negative"),
        "weights nan": (dict(weights=HOLE), ValueError, r"weights holds nan at element 1"),
    },
    merge_moments: {
        "list": (dict(moments=[1.0]), TypeError, r"moments is a list"),
        "dtype": (dict(moments=torch.zeros(2, 3)), TypeError, r"moments has dtype Float; accepted: float64"),
        "shape": (dict(moments=M), ValueError, r"moments has shape \[3\]; expected \[R, 3\]"),
    },
    batch_normalize: {
        "values list": (dict(values=[1.0]), TypeError, r"values is a list"),
        "values int": (dict(values=N), TypeError, r"values has dtype Long"),
        "moments list": (dict(moments=[1.0]), TypeError, r"moments is a list"),
        "moments dtype": (dict(moments=M.float()), TypeError, r"moments has dtype Float; accepted: float64"),
        "moments shape": (dict(moments=M[:2]), ValueError, r"moments has shape \[2\]; expected \[3\]"),
        "moments device": (dict(moments=M.to("meta")), ValueError, r"moments is on meta but values is on cpu"),
        "mode": (dict(mode="batch"), ValueError, r"mode is 'batch'; accepted: 'seq', 'token'"),
        "eps": (dict(eps=-1.0), ValueError, r"eps is -1; it must be finite and not negative"),
        "eps string": (dict(eps="0"), TypeError, r"eps is '0'; a number"),
        "mask int": (dict(mask=N), TypeError, r"mask has dtype Long; accepted: bool"),
        "mask shape": (dict(mask=N[:3].bool()), ValueError, r"mask has shape \[3\]; values has shape \[4\]"),
        "one token": (dict(moments=M / 4, mode="token"), ValueError, r"moments has n = 1; .*at least 2 tokens"),
    },
    whiten: {
        "values list": (dict(values=[1.0]), TypeError, r"values is a list"),
        "mask list": (dict(mask=[True]), TypeError, r"mask is a list"),
        "mask float": (dict(mask=R), TypeError, r"mask has dtype torch.float32; accepted: bool"),
        "mask shape": (dict(mask=N[:3].bool()), ValueError, r"has shape \[3\]; values has shape \[4\]"),
        "one token": (dict(mask=R < 0.5), ValueError, r"moments has n = 1; mode 'token' needs at least 2 tokens"),
        "eps": (dict(eps=-1.0), ValueError, r"eps is -1"),
    },
    question_weights: {
        "rewards list": (dict(rewards=[1.0]), TypeError, r"rewards is a list"),
        "rewards int": (dict(rewards=N), TypeError, r"rewards has dtype Long"),
        "rewards 2-d": (dict(rewards=R[:, None]), ValueError, r"rewards has shape \[4, 1\]; expected \[B\]"),
        "rewards nan": (dict(rewards=HOLE), ValueError, r"rewards\[1\] is nan; it must be finite"),
        "group list": (dict(group=[0]), TypeError, r"group is a list"),
        "group length": (dict(group=G[:3]), ValueError, r"group has shape \[3\].*\[4\]"),
        "group float": (dict(group=R), TypeError, r"group has dtype Float"),
        "lengths list": (dict(lengths=[1]), TypeError, r"lengths is a list"),
        "lengths float": (dict(lengths=R), TypeError, r"lengths has dtype Float; accepted: int64, int32"),
        "lengths shape": (dict(lengths=N[:3]), ValueError, r"lengths has shape \[3\].*\[4\]"),
        "lengths negative": (dict(lengths=-N), ValueError, r"lengths\[0\] is -1; it must not be negative"),
        "no tokens": (dict(lengths=torch.tensor([0, 0, 1, 1])), ValueError, r"lengths of the valid questions add up to 0"),
        "main list": (dict(main_rewards=[1.0]), TypeError, r"main_rewards is a list"),
        "main shape": (dict(main_rewards=R[:3]), ValueError, r"main_rewards has shape \[3\]; rewards has shape \[4\]"),
        "main nan": (dict(main_rewards=HOLE), ValueError, r"main_rewards\[1\] is nan"),
        "main int": (dict(main_rewards=N), TypeError, r"main_rewards has dtype Long"),
        "temperature": (dict(temperature=0.0), ValueError, r"temperature is 0; it must be finite and positive"),
        "temperature string": (dict(temperature="2"), TypeError, r"temperature is '2'; a number"),
        "tol": (dict(tol=-1.0), ValueError, r"tol is -1; it must be finite and not negative"),
        "zero": (dict(zero_accuracy_as_easy=1), TypeError, r"zero_accuracy_as_easy is 1; True or False"),
    },
    pair_masked_advantages: {
        "rewards list": (dict(rewards=[1.0]), TypeError, r"rewards is a list"),
        "rewards 2-d": (dict(rewards=R[:, None]), ValueError, r"rewards has shape \[4, 1\]; expected \[B\]"),
        "rewards inf": (dict(rewards=R / 0), ValueError, r"rewards\[0\] is inf; it must be finite"),
        "scores list": (dict(scores=[1.0]), TypeError, r"scores is a list"),
        "scores int": (dict(scores=N), TypeError, r"scores has dtype Long"),
        "scores shape": (dict(scores=R[:3]), ValueError, r"scores has shape \[3\]; rewards has shape \[4\]"),
        "scores nan": (dict(scores=HOLE), ValueError, r"scores\[1\] is nan; it must be finite"),
        "scores device": (dict(scores=R.to("meta")), ValueError, r"scores is on meta but rewards is on cpu"),
        "group length": (dict(group=G[:3]), ValueError, r"group has shape \[3\].*\[4\]"),
        "tau nan": (dict(tau=NAN), ValueError, r"tau is nan; it must be a number"),
        "tau string": (dict(tau="0"), TypeError, r"tau is '0'; a number"),
        "mode": (dict(mode="near"), ValueError, r"mode is 'near'; accepted: 'gap', 'abs'"),
        "level": (dict(level="token"), ValueError, r"level is 'token'; accepted: 'pair', 'sequence'"),
        "eps": (dict(eps=-1.0), ValueError, r"eps is -1; it must be finite and not negative"),
        "ddof": (dict(ddof=2), ValueError, r"ddof is 2; accepted: 0, 1"),
        "ddof float": (dict(ddof=1.0), TypeError, r"ddof is 1.0; an integer"),
        "sigma": (dict(sigma="some"), ValueError, r"sigma is 'some'; accepted: 'all', 'kept'"),
        "renormalise": (dict(renormalise=1), TypeError, r"renormalise is 1; True or False"),
    },
}  # fmt: skip
RIGHT = {
    batch_moments: dict(values=R), merge_moments: dict(moments=M[None]), batch_normalize: dict(values=R, moments=M),
    whiten: dict(values=R), question_weights: dict(rewards=R, group=G),
    pair_masked_advantages: dict(rewards=R, scores=R, group=G),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "case"), [(f, c) for f, cases in BAD.items() for c in cases], ids=lambda v: getattr(v, "__name__", v)
)
def test_errors(function, case):
    wrong, error, message = BAD[function][case]
    with pytest.raises(error, match=message):
        function(**{**RIGHT[function], **wrong})


@pytest.mark.parametrize("function", RIGHT, ids=lambda f: f.__name__)
def test_what_is_not_wrong_is_accepted(function):
    function(**RIGHT[function])


@pytest.mark.parametrize(("position", "name"), [(4, "mode"), (5, "level"), (7, "ddof"), (8, "sigma")])
def test_the_op_itself_refuses_unknown_options(position, name):
    arguments = [R, R, G, 0.1, 0, 0, 1e-6, 1, 0, False]
    arguments[position] = 2
    with pytest.raises(RuntimeError, match=f"{name} is 2; accepted: 0, 1"):
        OPS.pair_masked_advantages(*arguments)
    with pytest.raises(RuntimeError, match="mode is 2; accepted: 0, 1"):
        OPS.batch_normalize(R, M, None, 2, 1e-8)


@only_cuda
def test_validation_on_cuda(device, validation):
    on = {name: t.to(device) for name, t in (("rewards", R), ("group", G), ("hole", HOLE), ("lengths", -N))}
    assert pair_masked_advantages(on["rewards"], on["hole"], on["group"]).advantages.isnan().any()
    assert question_weights(on["hole"], on["group"]).weights.isnan().any()
    assert batch_moments(on["rewards"], -on["rewards"]).isnan().any()
    validation(True)
    with pytest.raises(ValueError, match=r"scores\[1\] is nan"):
        pair_masked_advantages(on["rewards"], on["hole"], on["group"])
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        question_weights(on["hole"], on["group"])
    with pytest.raises(ValueError, match=r"lengths\[0\] is -1"):
        question_weights(on["rewards"], on["group"], lengths=on["lengths"])
    with pytest.raises(ValueError, match=r"weights holds a negative number"):
        batch_moments(on["rewards"], -on["rewards"])
    with pytest.raises(ValueError, match=r"needs at least 2 tokens"):
        whiten(on["rewards"], on["rewards"] < 0.5)
