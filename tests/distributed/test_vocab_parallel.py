"""linear_logprobs of a vocabulary that several processes hold, against the same call of one process."""

import functools
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

import prefkern
from prefkern import linear_logprobs, reference
from prefkern.distributed import VocabShard, vocab_parallel, vocab_shard
from ranks import rank_outcomes, run_ranks

ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
SOURCES = ("logp", "entropy", "lse")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ROWS, VOCAB, WIDTH = 13, 301, 32
CUTS = {2: (0, 190, VOCAB), 4: (0, 64, 64, 65, VOCAB)}  # ragged; of four ranks one has no rows and one has a single row

OPTIONS = {
    "plain": lambda: {},
    "bias": lambda: {"bias": torch.randn(VOCAB)},
    "temperature": lambda: {"temperature": torch.rand(ROWS) + 0.5},
    "softcap": lambda: {"softcap": 2.0},
    "everything": lambda: {
        "bias": torch.randn(VOCAB),
        "temperature": torch.rand(ROWS) + 0.5,
        "softcap": 4.0,
        "logit_scale": 1.7,
    },
}
CASES = [
    (dtype, options, chunk_bytes)
    for dtype in (F64, F32, BF16, F16)
    for options in OPTIONS
    for chunk_bytes in ((None, 3000) if options == "everything" else (None,))
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{str(c[0])[6:]} {c[1]}" + " in chunks" * bool(c[2]))
each_size = pytest.mark.parametrize("size", [2, 4])


def make(dtype=F32, ignored=True):
    """Logits of standard deviation 3; every third row is ignored, every second target best, and one is the last token."""
    hidden, weight = torch.randn(ROWS, WIDTH).to(dtype), (torch.randn(VOCAB, WIDTH) * 3 / WIDTH**0.5).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,))
    targets[::2] = (hidden.double() @ weight.double().mT).argmax(-1)[::2]
    targets[3] = VOCAB - 1
    if ignored:
        targets[1::3] = -100
    return hidden, weight, targets


@functools.cache
def inputs(case):
    dtype, options, chunk_bytes = case
    torch.manual_seed(1)
    hidden, weight, targets = make(dtype)
    options = OPTIONS[options]()
    bias = options.pop("bias", None)
    upstream = {name: torch.randn(ROWS, dtype=F64) for name in SOURCES}
    return (hidden, weight, targets, bias, upstream), {**options, "chunk_bytes": chunk_bytes}


def leaf(t):
    return None if t is None else t.detach().clone().requires_grad_()


def run(function, tensors, options):
    """Outputs and gradients: a list each, the gradients of (hidden, weight, bias)."""
    hidden, weight, targets, bias, upstream = tensors
    leaves = [leaf(hidden), leaf(weight), leaf(bias)]
    out = function(leaves[0], leaves[1], targets, bias=leaves[2], outputs=ALL, **options)
    fields = [getattr(out, name) for name in upstream]
    grads = [g.to(f.dtype) for f, g in zip(fields, upstream.values(), strict=True)]
    some = [t for t in leaves if t is not None]
    return [t.detach() for t in out], list(torch.autograd.grad(fields, some, grads, allow_unused=True))


def part(rank, size, t):
    cuts = CUTS[size]
    return None if t is None else t[cuts[rank] : cuts[rank + 1]]


def on_rank(rank, cases, size):
    group = dist.group.WORLD
    results = []
    for (hidden, weight, targets, bias, upstream), options in cases:
        tensors = (hidden, part(rank, size, weight), targets, part(rank, size, bias), upstream)
        results.append(run(functools.partial(linear_logprobs, group=group), tensors, options))
    return results


@functools.cache
def outcomes(size):
    """Of every case, by rank."""
    by_rank = run_ranks(on_rank, size, [inputs(case) for case in CASES], size)
    return {case: [results[i] for results in by_rank] for i, case in enumerate(CASES)}


@functools.cache
def exact(case):
    (hidden, weight, targets, bias, upstream), options = inputs(case)
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items() if k != "chunk_bytes"}
    return run(reference.linear_logprobs, (wide[0], wide[1], targets, wide[2], upstream), options)


def distance(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# --------------------------------------------------------------------------------------------------------------- values


@each_size
@each_case
def test_values(size, case):
    expected, _ = exact(case)
    for actual, _ in outcomes(size)[case]:
        for name, a, e in zip(("logp", *ALL), actual, expected, strict=True):
            assert a.dtype == (torch.bool if name == "is_top1" else F64 if case[0] == F64 else F32)
            torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=1e-12 if case[0] == F64 else 1e-5, msg=name)
    assert 0 < expected[5].sum() < ROWS


@each_size
@each_case
def test_gradients(size, case):
    (hidden, weight, _, bias, _), _ = inputs(case)
    _, (e_hidden, *e_own) = exact(case)
    bound = {F64: 1e-12, F32: 2e-6, BF16: 4e-3, F16: 6e-4}
    by_rank = [gradients for _, gradients in outcomes(size)[case]]
    for rank, (d_hidden, *d_own) in enumerate(by_rank):
        assert d_hidden.dtype == hidden.dtype
        assert distance(d_hidden, e_hidden) < bound[case[0]]
        for t, d in zip((weight, bias), d_own, strict=False):
            assert d.dtype == t.dtype
            assert d.shape == part(rank, size, t).shape
    for i, (t, e) in enumerate(zip((weight, bias), e_own, strict=False), start=1):
        # The bias is float32 whatever the hidden states are.
        assert distance(torch.cat([gradients[i] for gradients in by_rank]), e) < max(bound[case[0]], bound[t.dtype])


@each_size
@each_case
def test_all_ranks_have_the_same_bits(size, case):
    (first, (d_first, *_)), *others = outcomes(size)[case]
    for other, (d_other, *_) in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert torch.equal(d_first, d_other)


@each_size
@pytest.mark.parametrize("case", [c for c in CASES if c[0] == F64 and not c[2]], ids=lambda c: c[1])
def test_one_process_gives_the_same(size, case):
    tensors, options = inputs(case)
    values, gradients = run(linear_logprobs, tensors, options)
    for rank, (actual, (d_hidden, *d_own)) in enumerate(outcomes(size)[case]):
        for a, e in zip(actual, values, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
        torch.testing.assert_close(d_hidden, gradients[0], rtol=0, atol=1e-12)
        for d, e in zip(d_own, gradients[1:], strict=True):
            torch.testing.assert_close(d, part(rank, size, e), rtol=0, atol=1e-12)


def ties_on_rank(rank, hidden, weight, targets, cuts):
    mine = weight[cuts[rank] : cuts[rank + 1]]
    out = linear_logprobs(hidden, mine, targets, group=dist.group.WORLD, outputs=["is_top1"], chunk_bytes=2000)
    return out.is_top1


def test_the_first_maximum_wins_ties_on_all_ranks():
    """Small integers: the logits are exact and tie all over the vocabulary."""
    hidden, weight = torch.randint(-2, 3, (64, 3)).float(), torch.randint(-2, 3, (200, 3)).float()
    z = hidden @ weight.mT
    best = z == z.max(-1, keepdim=True).values
    first, last = best.int().argmax(-1), 199 - best.int().flip(-1).argmax(-1)
    cuts = [0, 20, 90, 140, 200]
    rank_of = torch.bucketize(torch.stack([first, last]), torch.tensor(cuts), right=True)
    assert (rank_of[0] != rank_of[1]).sum() > 20  # ties that only the join sees
    for targets in (first, last):
        for is_top1 in run_ranks(ties_on_rank, 4, hidden, weight, targets, cuts):
            assert torch.equal(is_top1, targets == first)


def gradcheck_on_rank(rank, hidden, weight, targets, temperature):
    mine = weight[: 2 if rank == 0 else None][2 * rank :]

    def function(hidden):
        out = linear_logprobs(
            hidden, mine, targets, group=dist.group.WORLD, outputs=("entropy", "lse"), temperature=temperature, softcap=3.0
        )
        return out.logp, out.entropy, out.lse

    return torch.autograd.gradcheck(function, leaf(hidden), atol=1e-7, rtol=1e-5)


def test_gradcheck():
    """All ranks move the same element of hidden at the same time."""
    hidden, weight, temperature = torch.randn(4, 3, dtype=F64), torch.randn(5, 3, dtype=F64), torch.rand(4, dtype=F64) + 0.5
    assert run_ranks(gradcheck_on_rank, 2, hidden, weight, torch.tensor([0, 2, -100, 4]), temperature) == [True, True]


# ------------------------------------------------------------------------------------------------------------- messages


class Messages:
    """What a rank sends while inside: ("gather" or "reduce", dtype, elements)."""

    def __enter__(self):
        self.sent, self.before = [], (dist.all_gather, dist.all_reduce)

        def gather(out, message, **options):
            self.sent.append(("gather", message.dtype, message.numel()))
            return self.before[0](out, message, **options)

        def reduce(message, **options):
            self.sent.append(("reduce", message.dtype, message.numel()))
            return self.before[1](message, **options)

        dist.all_gather, dist.all_reduce = gather, reduce
        return self.sent

    def __exit__(self, *_):
        dist.all_gather, dist.all_reduce = self.before


def messages_on_rank(rank, dtype):
    torch.manual_seed(1)
    hidden, weight, targets = make(dtype)
    group = dist.group.WORLD
    mine = part(rank, 2, weight)
    shard = vocab_shard(mine, group, vocab=VOCAB)
    seen = {"shard": tuple(shard)}
    where = {"group": group, "vocab_offset": shard.offset, "vocab": shard.vocab}
    with Messages() as seen["forward"], torch.no_grad():
        given = linear_logprobs(hidden, mine, targets, **where).logp
    with Messages() as seen["gathered"]:
        gathered = linear_logprobs(hidden, mine, targets, group=group).logp
    seen["equal"] = torch.equal(given, gathered)
    h, w = leaf(hidden), leaf(mine)
    with Messages() as seen["training"]:
        linear_logprobs(h, w, targets, **where, outputs=ALL).logp.sum().backward()
    with Messages() as seen["frozen hidden"]:
        linear_logprobs(hidden, w, targets, **where).logp.sum().backward()
    with Messages() as seen["no rows"]:
        out = linear_logprobs(h[:0], w, targets[:0], **where)
        out.logp.sum().backward()
    return seen


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_messages(dtype):
    """One all-gather in the forward, one all-reduce, in float32, in the backward; a second all-gather where sizes are asked."""
    acc = F64 if dtype == F64 else F32
    state, sizes = ("gather", acc, 7 * ROWS + 7), ("gather", torch.int64, 7)
    for rank, seen in enumerate(run_ranks(messages_on_rank, 2, dtype)):
        assert seen["shard"] == (CUTS[2][rank], VOCAB)
        assert seen["forward"] == [state]
        assert seen["gathered"] == [sizes, state]
        assert seen["equal"]
        assert seen["training"] == [state, ("reduce", acc, ROWS * WIDTH)]
        assert seen["frozen hidden"] == [state]
        assert seen["no rows"] == [("gather", acc, 7)]


class Nothing(torch.autograd.Function):
    """Passes its input on and gives it no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


def uneven_backward_on_rank(rank):
    torch.manual_seed(1)
    hidden, weight, targets = make(F64)
    group = dist.group.WORLD
    h, w = leaf(hidden), leaf(part(rank, 2, weight))
    logp = linear_logprobs(h, w, targets, group=group).logp
    (logp if rank == 0 else Nothing.apply(logp)).sum().backward()  # nothing comes to rank 1
    none = h.grad, w.grad
    logp = linear_logprobs(h, w, targets, group=group).logp
    # Rank 1 asks for its weight's gradient only.
    return none, torch.autograd.grad(logp.sum(), (h, w) if rank == 0 else (w,))


def test_ranks_agree_on_messages_whatever_their_backward_needs():
    torch.manual_seed(1)
    hidden, weight, targets = make(F64)
    h, w = leaf(hidden), leaf(weight)
    linear_logprobs(h, w, targets).logp.sum().backward()
    (none0, only0), (none1, only1) = run_ranks(uneven_backward_on_rank, 2)
    torch.testing.assert_close(none0[1], part(0, 2, w.grad), rtol=0, atol=1e-12)
    assert none1[1] is None
    assert torch.equal(none0[0], none1[0])  # the share of rank 0
    assert 0 < distance(none0[0], h.grad) < 1
    torch.testing.assert_close(only0[0], h.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(only1[0], part(1, 2, w.grad), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- under torch


def modes_on_rank(rank):
    torch.manual_seed(1)
    hidden, weight, targets = make()
    group = dist.group.WORLD
    mine, found = part(rank, 2, weight), {}
    h, w = leaf(hidden), leaf(mine)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = linear_logprobs(h, w, targets, group=group, outputs=ALL)
        found[mode.__name__] = (out.logp.clone(), out.logp.requires_grad or out.logp.grad_fn is not None)
    with torch.autocast("cpu", BF16):
        out = linear_logprobs(h, w, targets, group=group, outputs=ALL)
    narrow = linear_logprobs(hidden.bfloat16(), mine.bfloat16(), targets, group=group, outputs=ALL)
    found["autocast"] = all(torch.equal(a.detach(), b) for a, b in zip(out, narrow, strict=True))
    found["dtypes"] = [g.dtype for g in torch.autograd.grad(out.logp.sum(), (h, w))]
    deep = linear_logprobs(hidden[:12].view(3, 4, WIDTH), mine, targets[:12].view(3, 4), group=group, outputs=ALL)
    flat = linear_logprobs(hidden[:12], mine, targets[:12], group=group, outputs=ALL)
    found["shape"] = all(torch.equal(a, b.view(3, 4)) for a, b in zip(deep, flat, strict=True))
    (gradient,) = torch.autograd.grad(linear_logprobs(h, w, targets, group=group).logp.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    logp = linear_logprobs(h, w, targets, group=group).logp
    again = [torch.autograd.grad(logp.sum(), h, retain_graph=True)[0] for _ in range(2)]
    found["repeated"] = torch.equal(*again)
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_logprobs(h, w, targets, group=group).logp, h, w, use_reentrant=False
    )
    found["checkpointed"] = torch.equal(torch.autograd.grad(checkpointed.sum(), h)[0], again[0])
    alone = dist.new_group([0]), dist.new_group([1])
    found["alone"] = linear_logprobs(hidden, weight, targets, group=alone[rank], vocab_offset=0, vocab=VOCAB, outputs=ALL)
    assert vocab_shard(weight, alone[rank]) == (0, VOCAB)
    with pytest.raises(ValueError, match="vocab is 302; group has one process, whose weight has 301 rows"):
        linear_logprobs(hidden, weight, targets, group=alone[rank], vocab=VOCAB + 1)
    with pytest.raises(ValueError, match=r"\[301\] rows.*vocab is 302"):
        vocab_shard(weight, alone[rank], vocab=VOCAB + 1)
    with pytest.raises(ValueError, match="does not belong to"):
        linear_logprobs(hidden, weight, targets, group=alone[1 - rank])
    return found


def test_modes_of_torch():
    torch.manual_seed(1)
    hidden, weight, targets = make()
    expected = linear_logprobs(hidden, weight, targets, outputs=ALL)
    for found in run_ranks(modes_on_rank, 2):
        for mode in ("no_grad", "inference_mode"):
            logp, graph = found[mode]
            assert not graph
            torch.testing.assert_close(logp, expected.logp, rtol=0, atol=1e-5)
        assert found["autocast"]
        assert found["dtypes"] == [F32, F32]
        assert found["shape"]
        assert found["repeated"]
        assert found["checkpointed"]
        for a, e in zip(found["alone"], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- refusals

H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 6])
SHARE = {0: {"weight": W}, 1: {"weight": W[:2]}}  # V = 7
GIVEN = {0: {"vocab_offset": 0, "vocab": 7}, 1: {"vocab_offset": 5, "vocab": 7}}
DISAGREE = (ValueError, "the ranks of group disagree")
OTHER = (RuntimeError, "rank 1 of group refuses its arguments")

BAD = {
    # name: (what rank 1 changes, what both change, errors by rank, where: ranges are gathered, given, or both)
    "another N": ({"hidden": H[:2], "targets": T[:2]}, {}, (DISAGREE, DISAGREE), "gathered"),
    "another dtype": ({"hidden": H.double(), "weight": W[:2].double()}, {}, (DISAGREE, DISAGREE), "gathered"),
    "another half": ({"hidden": H.half(), "weight": W[:2].half()}, {}, (DISAGREE, DISAGREE), "both"),
    "another width": ({"hidden": H[:, :3], "weight": W[:2, :3]}, {}, (DISAGREE, DISAGREE), "both"),
    "other outputs": ({"outputs": ["entropy"]}, {}, (DISAGREE, DISAGREE), "both"),
    "another temperature": ({"temperature": 0.5}, {}, (DISAGREE, DISAGREE), "both"),
    "another row's temperature": ({"temperature": torch.tensor([1.0, 1.0, 2.0])}, {}, (DISAGREE, DISAGREE), "both"),
    "other targets": ({"targets": T.flip(0)}, {}, (DISAGREE, DISAGREE), "both"),
    "hidden trained on one": ({"hidden": H.clone().requires_grad_()}, {}, (DISAGREE, DISAGREE), "both"),
    "a refusal": ({"softcap": -1.0}, {}, (OTHER, (ValueError, "softcap is -1.0")), "both"),
    "tokens kept": ({"keep": (T, T)}, {}, (OTHER, (ValueError, "keep is given together with group")), "both"),
    "an update": ({"lora": (H, H, 1.0)}, {}, (OTHER, (ValueError, "lora is given together with group")), "both"),
    "rounding": ({"logits_dtype": "bfloat16"}, {}, (OTHER, (ValueError, "logits_dtype is given together with group")), "both"),
    "targets of another type": ({"targets": T.float()}, {}, (OTHER, (TypeError, "targets has dtype Float")), "both"),
    "no tensor": ({"weight": None}, {}, (OTHER, (TypeError, "weight is a NoneType")), "both"),
    "the weight's width": ({"weight": W[:2, :3]}, {}, (OTHER, (ValueError, r"weight has shape \[2, 3\].*\[V_r, 4\]")), "both"),
    "the weight's dtype": ({"weight": W[:2].half()}, {}, (OTHER, (TypeError, "hidden has dtype.*float32.*float16")), "both"),
    "a bias of V": ({"bias": torch.zeros(7)}, {}, (OTHER, (ValueError, r"bias has shape \[7\]; expected \[2\]")), "both"),
    "a target beyond": ({}, {"targets": T + 1}, ((ValueError, r"targets\[2\] is 7; accepted: 0 to 6"),) * 2, "both"),
    "a wrong V": ({}, {"vocab": 8}, ((ValueError, r"\[5, 2\] rows.*7 in all; vocab is 8"),) * 2, "gathered"),
    "no rows": ({"weight": W[:0]}, {"weight": W[:0]}, ((ValueError, "weight has no rows on any rank"),) * 2, "gathered"),
    "a gap": ({"weight": W[:1]}, {}, ((ValueError, r"ranges \[0, 5\), \[5, 6\).*to vocab = 7"),) * 2, "given"),
    "an overlap": ({"weight": W[:3], "vocab_offset": 4}, {}, ((ValueError, r"ranges \[0, 5\), \[4, 7\)"),) * 2, "given"),
    "beyond V": ({"weight": W[:3]}, {}, (OTHER, (ValueError, "weight has 3 rows from token 5 on.*has 7")), "given"),
}  # fmt: skip


def refusals_on_rank(rank, ranges):
    group, found = dist.group.WORLD, {}
    base = {"hidden": H, "targets": T, "group": group, **SHARE[rank], **(GIVEN[rank] if ranges == "given" else {})}
    for name, (change, both, _, where) in BAD.items():
        if where not in ("both", ranges):
            continue
        try:
            linear_logprobs(**{**base, **both, **(change if rank == 1 else {})})
            found[name] = None
        except Exception as error:
            found[name] = (type(error), str(error))
        assert linear_logprobs(**base).logp.shape == (3,)  # the group still works
    return found


@pytest.mark.parametrize("ranges", ["gathered", "given"])
def test_refusals_are_raised_on_every_rank(ranges):
    expected = {name for name, (*_, where) in BAD.items() if where in ("both", ranges)}
    for rank, found in enumerate(run_ranks(refusals_on_rank, 2, ranges)):
        assert set(found) == expected
        for name, raised in found.items():
            error, message = BAD[name][2][rank]
            assert raised is not None, name
            assert raised[0] is error, (name, raised)
            assert re.search(message, raised[1]), (name, raised)


def raises_before_the_call(rank):
    if rank == 1:
        raise ValueError("no luck")
    linear_logprobs(H, W, T.clamp(max=4), group=dist.group.WORLD)


def raises_between(rank):
    h = H.clone().requires_grad_()
    logp = linear_logprobs(h, SHARE[rank]["weight"], T, group=dist.group.WORLD).logp
    if rank == 1:
        raise ValueError("no luck")
    logp.sum().backward()


@pytest.mark.parametrize("function", [raises_before_the_call, raises_between])
def test_a_rank_that_raises_does_not_hang_the_others(function):
    (good0, first), (good1, second) = rank_outcomes(function, 2, timeout=60)
    assert not good1
    assert "ValueError: no luck" in second
    assert not good0
    assert "Traceback" in first
    assert "no answer" not in first


def without_looking_on_rank(rank):
    """As on CUDA without validation: nobody reads what the others say of themselves."""
    vocab_parallel.looks = lambda _: False
    base = {"hidden": torch.ones(3, 4), "targets": T, "group": dist.group.WORLD, "outputs": ALL, **SHARE[rank], **GIVEN[rank]}
    found = {"agreed": linear_logprobs(**base)}
    for name in ("other outputs", "another temperature", "a refusal", "a bias of V"):
        change = BAD[name][0] if rank == 1 else {}
        try:
            found[name] = linear_logprobs(**{**base, **change})
        except (ValueError, TypeError) as error:
            found[name] = str(error)
    return found


def test_where_nobody_looks_disagreement_is_nan():
    good, bad = run_ranks(without_looking_on_rank, 2)
    expected = linear_logprobs(torch.ones(3, 4), torch.zeros(7, 4), T, outputs=ALL)
    for found in (good, bad):
        for a, e in zip(found["agreed"], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-6)
    for name in ("other outputs", "another temperature"):
        for found in (good, bad):
            assert all(t.isnan().all() for t in found[name][:5] if t is not None), name
            assert found[name].is_top1 is None or not found[name].is_top1.any()
    for name, message in (("a refusal", "softcap is -1.0"), ("a bias of V", r"bias has shape [7]")):
        assert all(t.isnan().all() for t in good[name][:5])
        assert message in bad[name]


def validated_on_rank(rank):
    prefkern.set_validation(True)
    base = {"hidden": H, "targets": T, "group": dist.group.WORLD, **SHARE[rank], **GIVEN[rank]}
    with Messages() as sent:
        linear_logprobs(**base)
    raised = []
    for name in ("another N", "another dtype", "no rows", "a gap"):  # all but the last have messages of two lengths
        change, both, _, _ = BAD[name]
        with pytest.raises((ValueError, RuntimeError)) as caught:
            linear_logprobs(**{**base, **both, **(change if rank == 1 else {})})
        raised.append(str(caught.value))
    return sent, raised


def test_validation_looks_before_the_state_is_sent():
    for sent, raised in run_ranks(validated_on_rank, 2):
        assert sent == [("gather", torch.int64, 7), ("gather", F32, 7 * 3 + 7)]
        assert ["disagree" in message for message in raised] == [True, True, False, False]
        assert "weight has [0, 0] rows on the ranks of group" in raised[2]
        assert "weight has [5, 1] rows on the ranks of group" in raised[3]


def one_stays_away(rank):
    group = dist.new_group(timeout=timedelta(seconds=4))
    dist.barrier()
    start = time.monotonic()
    if rank == 1:
        time.sleep(9)
        return None
    with pytest.raises(RuntimeError):
        linear_logprobs(H, W, T, group=group)
    return time.monotonic() - start


@pytest.mark.slow
def test_the_timeout_of_the_group_ends_the_wait_for_a_rank_that_does_not_come():
    waited, _ = run_ranks(one_stays_away, 2)
    assert 3 < waited < 8.5


def test_what_is_wrong_without_a_group():
    """Told before anything is sent."""
    with pytest.raises(ValueError, match="vocab_offset is 0 and vocab is 5 but group is None"):
        linear_logprobs(H, W, T, vocab_offset=0, vocab=5)
    with pytest.raises(ValueError, match="group is 'world' but torch"):
        linear_logprobs(H, W, T, group="world")
    with pytest.raises(TypeError, match="group is 3; 'world', a process group"):
        linear_logprobs(H, W, T, group=3)
    with pytest.raises(ValueError, match="does not belong to"):
        linear_logprobs(H, W, T, group=dist.GroupMember.NON_GROUP_MEMBER)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"vocab_offset": 0}, ValueError, "vocab_offset is 0 but vocab is None"),
        ({"vocab_offset": -1, "vocab": 5}, ValueError, "vocab_offset is -1"),
        ({"vocab": 0}, ValueError, "vocab is 0"),
        ({"vocab": 5.0}, TypeError, "vocab is 5.0; an integer"),
        ({"vocab_offset": "0", "vocab": 5}, TypeError, "vocab_offset is '0'; an integer"),
    ],
)
def test_ranges_that_are_no_ranges(given, error, message):
    with pytest.raises(error, match=message):
        vocab_parallel._given(given.get("vocab_offset"), given.get("vocab"))


def test_the_public_names():
    assert prefkern.distributed.vocab_shard is vocab_shard
    assert VocabShard(3, 7)._asdict() == {"offset": 3, "vocab": 7}
