"""How much the responses to a prompt differ, and sets of candidates unlike each other, against the definitions, and everything
that must be refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from prefkern import distinct_n, edit_distance, greedy_select, reference, self_bleu
from prefkern.reference.diversity import levenshtein

OPS = torch.ops.prefkern
only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
F64 = torch.float64
S = [[1, 2, 3, 4, 5], [1, 2, 3, 9, 5], [7, 8, 2, 3]]


def ends(counts, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def packed(prompts, dtype=torch.int64):
    """Prompts as lists of responses, which are lists of tokens."""
    responses = [response for prompt in prompts for response in prompt]
    ids = torch.tensor([token for response in responses for token in response], dtype=dtype)
    return ids, {"cu_seqlens": ends(map(len, responses)), "cu_prompts": ends(map(len, prompts))}


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True)


# ---- responses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_worked(dtype):
    ids, where = packed([S], dtype)
    for cu in (where, {"cu_seqlens": where["cu_seqlens"]}):  # without prompts: one
        close(self_bleu(ids, **cu), torch.tensor([0.3932133441], dtype=F64), 5e-11)
        assert distinct_n(ids, **cu).tolist() == [0.875]
        assert edit_distance(ids, **cu).tolist() == [3.0]
        close(edit_distance(ids, normalize=True, **cu), torch.tensor([0.6], dtype=F64))
    padded = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 0, 9, 5, 0], [7, 8, 2, 3, 0, 0, 0]], dtype=dtype)
    close(self_bleu(padded, padded > 0), torch.tensor([0.3932133441], dtype=F64), 5e-11)
    assert distinct_n(padded, padded > 0).tolist() == [0.875]
    assert edit_distance(padded, padded > 0).tolist() == [3.0]
    assert self_bleu(padded).item() != self_bleu(padded, padded > 0).item()  # without a mask padding is text


def test_by_hand():
    """Of [1, 1, 1, 2] against [1, 1], [1, 2] and [3]: three of the ones are matched twice, the pairs 11 and 12 once each."""
    ids, where = packed([[[1, 1, 1, 2], [1, 1], [1, 2], [3]]])
    of_first = (3 / 4 * 2 / 3) ** 0.5
    others = [math.exp(1 - 2 / 2), math.exp(1 - 2 / 2), 0.0]
    close(self_bleu(ids, weights=(0.5, 0.5), **where), torch.tensor([(of_first + sum(others)) / 4], dtype=F64))


def test_the_nearest_length_and_of_two_the_shorter():
    """Six tokens beside four and eight of the same: no penalty. Beside eight alone: exp(1 - 8 / 6)."""
    short = math.exp(1 - 8 / 6)
    for others, penalty in (([4, 8], 1.0), ([8], short), ([6, 8], 1.0), ([5, 9], 1.0), ([3, 8], short)):
        prompt = [[1] * 6, *([1] * n for n in others)]
        ids, where = packed([prompt])
        expected = reference.self_bleu(ids, weights=(1.0,), **where)
        close(self_bleu(ids, weights=(1.0,), **where), expected)
        alone = reference.diversity.sentence_bleu(prompt[1:], prompt[0], (1.0,), 0.1)
        assert alone == pytest.approx(penalty * min(6, max(others)) / 6)


responses = st.lists(st.integers(0, 3), max_size=9)
prompts = st.lists(st.lists(responses, max_size=5), max_size=4)


@given(prompts, st.sampled_from([(1 / 3, 1 / 3, 1 / 3), (0.5, 0.5), (1.0,), (0.0, 1.0), (0.25, 0.25, 0.25, 0.25)]),
       st.sampled_from([0.1, 0.0, 1.0]))  # fmt: skip
def test_self_bleu_is_nltks(prompts, weights, smoothing):
    ids, where = packed(prompts)
    options = {"weights": weights, "smoothing": smoothing}
    out = self_bleu(ids, **options, **where)
    close(out, reference.self_bleu(ids, **options, **where))
    assert [math.isnan(x) for x in out.tolist()] == [len(prompt) < 2 for prompt in prompts]


@given(prompts, st.integers(1, 4))
def test_distinct_n_is_a_set_over_a_list(prompts, n):
    ids, where = packed(prompts)
    assert torch.equal(distinct_n(ids, n=n, **where), reference.distinct_n(ids, n=n, **where))


@given(prompts, st.booleans())
def test_edit_distance_is_levenshteins(prompts, normalize):
    ids, where = packed(prompts)
    close(edit_distance(ids, normalize=normalize, **where), reference.edit_distance(ids, normalize=normalize, **where))


@given(st.lists(st.integers(0, 4), max_size=150), st.lists(st.integers(0, 4), max_size=150))
def test_bands_of_64_rows_join(a, b):
    ids, where = packed([[a, b]])
    assert edit_distance(ids, **where).item() == levenshtein(a, b)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 128, 129, 200])
def test_distances_that_are_known(m):
    """A block of n others in front, behind, or in the middle: n edits; nothing in common: the longer length."""
    a, extra = list(range(m)), [-1, -2, -3]
    cases = [(extra + a, 3), (a + extra, 3), (a[: m // 2] + extra + a[m // 2 :], 3), ([x + 1000 for x in a], m)]
    cases += [([], m), (a[::-1], m - m % 2), (a[1:] + a[:1], 2 if m > 2 else levenshtein(a, a[1:] + a[:1]))]
    for b, expected in cases:
        assert edit_distance(packed([[a, b]])[0], **packed([[a, b]])[1]).item() == expected, b[:5]


def test_tokens_are_told_apart_by_all_their_bits():
    """Ids that differ in the upper half alone, and sums that would collide."""
    wide = [0, 1 << 32, -1, -(1 << 63), (1 << 63) - 1, 1 << 31, (1 << 31) + (1 << 32), 5, -5]
    numbers = {token: i for i, token in enumerate(wide)}
    generator = torch.Generator().manual_seed(3)
    rows = [[wide[i] for i in torch.randint(len(wide), (60,), generator=generator).tolist()] for _ in range(4)]
    small = [[numbers[token] for token in row] for row in rows]
    for op in (self_bleu, distinct_n, edit_distance):
        assert torch.equal(op(*[packed([rows])[0]], **packed([rows])[1]), op(packed([small])[0], **packed([small])[1]))
    close(self_bleu(packed([rows])[0], **packed([rows])[1]), reference.self_bleu(packed([small])[0], **packed([small])[1]))


def test_a_large_vocabulary_and_long_responses():
    """Tables grow and are used again for the next prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = [700, 3, 0, 250, 1, 900, 64, 64]
    ids = torch.randint(0, 60, (sum(lengths),), generator=generator) * 7919
    where = {"cu_seqlens": ends(lengths), "cu_prompts": ends([2, 3, 3])}
    close(self_bleu(ids, **where), reference.self_bleu(ids, **where))
    assert torch.equal(distinct_n(ids, n=2, **where), reference.distinct_n(ids, n=2, **where))
    close(edit_distance(ids, **where), reference.edit_distance(ids, **where))


def test_alike_and_unlike():
    ids, where = packed([[[1, 2, 3]] * 3, [[1, 2], [3, 4], [5, 6]], [[], []], [[4]], []])
    assert self_bleu(ids, **where).tolist()[:3] == [pytest.approx(1, abs=1e-15), 0, 0]
    assert edit_distance(ids, **where).tolist()[:3] == [0, 2, 0]
    assert distinct_n(ids, n=1, **where).tolist() == [1 / 3, 1, 0, 1, 0]
    assert all(op(ids, **where)[3:].isnan().all() for op in (self_bleu, edit_distance))
    none = {"cu_seqlens": ends([]), "cu_prompts": ends([])}
    assert all(op(ids[:0], **none).shape == (0,) for op in (self_bleu, distinct_n, edit_distance))


@pytest.mark.parametrize("op", [self_bleu, distinct_n, edit_distance])
def test_the_order_of_responses_does_not_matter(op):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 5, (n,), generator=generator).tolist() for n in (20, 7, 31, 12)]
    out = torch.cat([op(packed([list(order)])[0], **packed([list(order)])[1]) for order in itertools.permutations(rows)])
    close(out, out[:1].expand(len(out)), 1e-14)


@pytest.mark.parametrize("op", [self_bleu, distinct_n, edit_distance])
def test_any_number_of_threads(op, threads):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 40, (60 * 400,), generator=generator)
    where = {"cu_seqlens": ends([400] * 60), "cu_prompts": ends([3, 0, 1, 6] * 6)}
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(op(ids, **where))
    assert all(torch.equal(r.nan_to_num(-1), results[0].nan_to_num(-1)) for r in results)


def test_opcheck_of_responses():
    ids, where = packed([S, S[:2]])
    cu = where["cu_seqlens"], where["cu_prompts"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    opcheck(OPS.self_bleu.default, (ids, None, *cu, torch.ones(2, dtype=F64), 0.1), test_utils=WITHOUT_GRADIENTS)
    opcheck(OPS.distinct_n.default, (ids, mask, *cu, 2), test_utils=WITHOUT_GRADIENTS)
    opcheck(OPS.edit_distance.default, (ids.view(3, 8), None, None, None, True), test_utils=WITHOUT_GRADIENTS)


WITHOUT_GRADIENTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def both(ids, cu_seqlens, cu_prompts):
        where = {"cu_seqlens": cu_seqlens, "cu_prompts": cu_prompts}
        return 1 - self_bleu(ids, **where) + edit_distance(ids, **where)

    run = torch.compile(both, fullgraph=True, backend=counter)
    for counts in ((2, 3), (2, 4, 2), (3, 3, 3, 4)):
        ids = torch.randint(0, 4, (7 * sum(counts),))
        arguments = ids, ends([7] * sum(counts)), ends(counts)
        assert torch.equal(run(*arguments), both(*arguments))
    assert counter.frame_count <= 2


IDS, CU, PROMPTS = torch.arange(6), ends([2, 1, 3]), ends([1, 2])
ERRORS = {
    "list": (self_bleu, dict(ids=[[1]]), TypeError, r"ids is a list; a torch\.Tensor"),
    "float": (self_bleu, dict(ids=IDS.float()), TypeError, r"ids has dtype Float; accepted: int64, int32"),
    "3-d": (distinct_n, dict(ids=IDS.view(1, 2, 3), cu_seqlens=None), ValueError, r"ids has shape \[1, 2, 3\]"),
    "padded cu": (distinct_n, dict(ids=IDS.view(2, 3)), ValueError, r"ids has shape \[2, 3\]; with cu_seqlens \[N\]"),
    "mask": (edit_distance, dict(mask=IDS), TypeError, r"mask has dtype Long; accepted: bool"),
    "mask shape": (edit_distance, dict(mask=IDS[:2] > 0), ValueError, r"mask has shape \[2\]; ids has shape \[6\]"),
    "cu end": (self_bleu, dict(cu_seqlens=ends([2, 1, 2])), ValueError, r"cu_seqlens ends at 5; ids has 6 tokens"),
    "cu list": (self_bleu, dict(cu_seqlens=[0, 6]), TypeError, r"cu_seqlens is a list"),
    "prompts end": (self_bleu, dict(cu_prompts=ends([1, 1])), ValueError, r"cu_prompts ends at 2; ids has 3 responses"),
    "prompts begin": (self_bleu, dict(cu_prompts=PROMPTS + 1), ValueError, r"cu_prompts\[0\] is 1; it must be 0"),
    "prompts fall": (
        distinct_n, dict(cu_prompts=torch.tensor([0, 2, 1, 3]).int()), ValueError, r"cu_prompts\[2\] is 1 after 2"
    ),
    "prompts int64": (self_bleu, dict(cu_prompts=PROMPTS.long()), TypeError, r"cu_prompts has dtype Long; accepted: int32"),
    "prompts 2-d": (self_bleu, dict(cu_prompts=PROMPTS[None]), ValueError, r"cu_prompts has shape \[1, 3\]; expected \[P"),
    "prompts list": (edit_distance, dict(cu_prompts=[0, 3]), TypeError, r"cu_prompts is a list"),
    "weights": (self_bleu, dict(weights=()), ValueError, r"weights has shape \[0\]"),
    "weight nan": (self_bleu, dict(weights=(0.5, math.nan)), ValueError, r"weights\[1\] is nan; it must be finite"),
    "weight negative": (self_bleu, dict(weights=(-0.5,)), ValueError, r"weights\[0\] is -0.5; it must be finite and not neg"),
    "weight text": (self_bleu, dict(weights="abc"), TypeError, r"weights is a str; a sequence of numbers"),
    "weight entry": (self_bleu, dict(weights=("a",)), TypeError, r"weights is 'a'; a number is expected"),
    "smoothing": (self_bleu, dict(smoothing=-0.1), ValueError, r"smoothing is -0.1; it must be finite and not negative"),
    "smoothing nan": (self_bleu, dict(smoothing=math.nan), ValueError, r"smoothing is nan"),
    "n": (distinct_n, dict(n=0), ValueError, r"n is 0; it must be positive"),
    "n float": (distinct_n, dict(n=1.5), TypeError, r"n is 1.5; an integer"),
}  # fmt: skip


@pytest.mark.parametrize(("op", "wrong", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_of_responses(op, wrong, error, message):
    with pytest.raises(error, match=message):
        op(**{"ids": IDS, "cu_seqlens": CU, "cu_prompts": PROMPTS, **wrong})


@only_cuda
def test_responses_are_counted_on_the_cpu(device):
    with pytest.raises(ValueError, match=r"ids is on cuda:0; n-grams and edits are counted on the CPU"):
        self_bleu(IDS.to(device).view(2, 3))


# ---- sets ------------------------------------------------------------------------------------------------------------

E = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [-1, 0.1], [0.6, -0.8]])
SOFT = torch.tensor([1, 0, 1, 0, 1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sets_worked(device, dtype):
    arguments = E.to(device, dtype), SOFT.to(device), torch.tensor([0], device=device), (2, 2)
    assert greedy_select(*arguments).tolist() == [[0, 4, 1, 5]]
    assert greedy_select(*arguments, reduce="max").tolist() == [[0, 4, 5, 3]]
    out = greedy_select(*arguments, size=6)
    assert out.tolist() == [[0, 4, 1, 5, -1, -1]] and out.dtype == torch.int64
    if device == "cpu" and dtype == torch.float32:
        assert greedy_select(E.double(), *arguments[1:]).tolist() == [[0, 4, 1, 5]]


def instance(q, k, d, c, seed=0, dtype=F64):
    """Embeddings, types, seeds and quotas that can be met."""
    g = torch.Generator().manual_seed(seed)
    emb = torch.randn(q, k, d, dtype=F64, generator=g).to(dtype)
    types = torch.randint(c, (q, k), generator=g)
    seeds = torch.randint(k, (q,), generator=g)
    there = torch.stack([(types == t).sum(1) for t in range(c)], 1)
    quotas = (torch.rand(q, c, generator=g) * (there + 1)).long().minimum(there)
    of_seed = types.gather(1, seeds[:, None])
    quotas.scatter_(1, of_seed, quotas.gather(1, of_seed).clamp_min(1))
    return emb, types, seeds, quotas


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize(("q", "k", "d", "c"), [(1, 1, 1, 1), (3, 9, 2, 2), (4, 40, 5, 3), (2, 70, 33, 1), (5, 33, 64, 7)])
def test_sets_are_those_of_the_definition(device, reduce, q, k, d, c):
    arguments = instance(q, k, d, c, seed=k)
    expected = reference.greedy_select(*arguments, reduce=reduce)
    if device == "cpu":
        assert torch.equal(greedy_select(*arguments, reduce=reduce), expected)
    emb, *rest = (t.to(device) for t in arguments)
    out = greedy_select(emb.float(), *rest, reduce=reduce, size=expected.shape[1])
    assert torch.equal(out.cpu(), expected)


@given(st.integers(0, 10_000), st.sampled_from(["min", "max"]))
def test_sets_have_what_was_asked_for(seed, reduce):
    emb, types, seeds, quotas = instance(3, 12, 3, 3, seed)
    out = greedy_select(emb, types, seeds, quotas, reduce=reduce)
    scale = torch.rand(3, 12, 1, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 9 + 0.1
    assert torch.equal(greedy_select(emb * scale, types, seeds, quotas, reduce=reduce), out)
    for q, row in enumerate(out):
        chosen = row[row >= 0]
        assert chosen[0] == seeds[q] and len(chosen.unique()) == len(chosen) and (row[len(chosen) :] == -1).all()
        assert types[q][chosen].bincount(minlength=3).tolist() == quotas[q].tolist()


@given(st.integers(0, 10_000))
def test_farthest_points_are_half_as_far_apart_as_can_be(seed):
    emb = torch.nn.functional.normalize(torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)), dim=1)
    apart = torch.cdist(emb, emb)

    def least(chosen):
        return min(float(apart[i, j]) for i, j in itertools.combinations(chosen, 2))

    best = max(least(chosen) for chosen in itertools.combinations(range(8), 4))
    out = greedy_select(emb, torch.zeros(8).long(), torch.tensor([0]), (4,), reduce="max")
    assert least(out[0].tolist()) >= best / 2 - 1e-12


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_of_equal_candidates_the_first(device, reduce, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a type of the CPU")
    emb = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))[[0, 1, 2, 3] * 4].to(device, dtype)
    types = torch.zeros(16, dtype=torch.int64, device=device)
    out = greedy_select(emb, types, torch.tensor([5], device=device), (16,), reduce=reduce)[0].tolist()
    for copies in (out[1:], [x for x in out if x % 4 == 1 and x != 5]):
        for residue in range(4):
            mine = [x for x in copies if x % 4 == residue]
            assert mine == sorted(mine)


def test_narrow_types_are_widened(device):
    emb, types, seeds, quotas = (t.to(device) for t in instance(3, 50, 70, 2))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = emb.to(dtype)
        out = greedy_select(narrow, types, seeds, quotas, size=60)
        assert torch.equal(out, greedy_select(narrow.float(), types, seeds, quotas, size=60))


def test_what_all_seeds_share(device):
    emb, types, seeds, quotas = (t.to(device) for t in instance(4, 30, 8, 2, dtype=torch.float32))
    seeds = torch.arange(4, device=device)
    types[:] = types[0]
    types[0, :4] = torch.arange(4, device=device) % 2
    types[:] = types[0]
    quotas = [6, 5]
    shared = greedy_select(emb[0], types[0], seeds, quotas)
    assert shared.shape == (4, 11)
    each = torch.tensor([quotas] * 4, device=device)
    assert torch.equal(greedy_select(emb[:1].expand(4, 30, 8), types, seeds, each, size=11), shared)
    for q in range(4):
        assert torch.equal(greedy_select(emb[0], types[0].int(), seeds[q : q + 1].int(), quotas)[0], shared[q])
    assert greedy_select(emb[0], types[0], seeds[:0], quotas).shape == (0, 11)


@pytest.mark.parametrize("q", [1, 5])
def test_sets_with_any_number_of_threads(threads, q):
    """Few seeds: candidates are shared out; many: seeds."""
    emb, types, seeds, quotas = instance(q, 900, 120, 2, dtype=torch.float32)
    quotas = quotas.clamp_max(6)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(greedy_select(emb, types, seeds, quotas, size=12))
    assert all(torch.equal(r, results[0]) for r in results)


def test_no_matrix_of_cosines(device, allocations):
    emb, types = torch.randn(2000, 4, device=device), torch.zeros(2000, dtype=torch.int64, device=device)
    seeds = torch.tensor([3, 5], device=device)
    greedy_select(emb, types, seeds, (9,))
    assert allocations(lambda: greedy_select(emb, types, seeds, (9,))).peak < 3.5 * 4 * 2000 + 4096


def test_no_gradient_and_no_trace(device):
    emb = torch.randn(5, 3, device=device, requires_grad=True)
    types = torch.zeros(5, dtype=torch.int64, device=device)
    assert not greedy_select(emb, types, types[:1], (3,)).requires_grad
    opcheck(OPS.greedy_select.default, (emb.detach(), types, types[:2], types[:1] + 3, 4, True), test_utils=WITHOUT_GRADIENTS)


def test_sets_in_one_graph(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda *a: greedy_select(*a, size=8, reduce="max") + 1, fullgraph=True, backend=counter)
    for q, k in ((2, 9), (3, 14), (4, 21)):
        emb, types, seeds, quotas = (t.to(device) for t in instance(q, k, 6, 2, dtype=torch.float32))
        quotas = quotas.clamp_max(4)
        assert torch.equal(run(emb, types, seeds, quotas), greedy_select(emb, types, seeds, quotas, size=8, reduce="max") + 1)
    assert counter.frame_count <= 2


ZERO, NAN, HUGE = E.clone(), E.clone(), E.clone()
ZERO[3], NAN[2, 1], HUGE[1] = 0, math.nan, 1e38
SET_ERRORS = {
    "list": (dict(emb=[[1.0]]), TypeError, r"emb is a list; a torch\.Tensor"),
    "int": (dict(emb=SOFT[:, None]), TypeError, r"emb has dtype Long on cpu; accepted: float32"),
    "1-d": (dict(emb=E[0]), ValueError, r"emb has shape \[2\]; expected \[K, d\], or \[Q, K, d\]"),
    "rows": (dict(emb=E.expand(3, 6, 2)), ValueError, r"emb has shape \[3, 6, 2\]; seeds has 1, so \[1, K, d\]"),
    "nothing": (dict(emb=E[:0]), ValueError, r"emb has shape \[0, 2\]; candidates"),
    "no width": (dict(emb=E[:, :0]), ValueError, r"emb has shape \[6, 0\]"),
    "type float": (dict(type_id=E[:, 0]), TypeError, r"type_id has dtype Float; accepted: int64, int32"),
    "type shape": (dict(type_id=SOFT[:5]), ValueError, r"type_id has shape \[5\]; \[6\], or \[1, 6\], is expected"),
    "type range": (dict(type_id=SOFT + 1), ValueError, r"type_id of candidate 0 of seed 0 is 2; quotas has 2 types, so 0 to 1"),
    "type negative": (dict(type_id=SOFT - 1), ValueError, r"type_id of candidate 1 of seed 0 is -1"),
    "seed float": (dict(seeds=E[0]), TypeError, r"seeds has dtype Float"),
    "seed shape": (dict(seeds=SOFT[None]), ValueError, r"seeds has shape \[1, 6\]; expected \[Q\]"),
    "seed range": (dict(seeds=torch.tensor([6])), ValueError, r"seeds\[0\] is 6; accepted: 0 to 5"),
    "seed negative": (dict(seeds=torch.tensor([-1])), ValueError, r"seeds\[0\] is -1; accepted: 0 to 5"),
    "too few": (dict(quotas=(2, 4)), ValueError, r"quotas of seed 0 asks for 4 candidates of type 1; there are 3"),
    "negative": (dict(quotas=(-1, 2)), ValueError, r"quotas of seed 0 is -1 for type 0; it must not be negative"),
    "no room for the seed": (dict(quotas=(2, 0)), ValueError, r"quotas of seed 0 is 0 for type 1, which the seed is of"),
    "no types": (dict(quotas=()), ValueError, r"quotas has shape \[0\]; expected \[C\], or \[Q, C\]"),
    "many types": (dict(quotas=[1] * 257), ValueError, r"quotas has shape \[257\]; .* of 1 to 256 types"),
    "quota shape": (dict(quotas=torch.ones(2, 2).long()), ValueError, r"quotas has shape \[2, 2\]; \[2\], or \[1, 2\]"),
    "quota float": (dict(quotas=torch.ones(2)), TypeError, r"quotas has dtype Float"),
    "quota entry": (dict(quotas=(1.5, 1)), TypeError, r"quotas is 1.5; an integer"),
    "quota number": (dict(quotas=3), TypeError, r"quotas is a int; a sequence of integers or an integer tensor"),
    "size": (dict(size=3), ValueError, r"size is 3; quotas of seed 0 ask for 4"),
    "size negative": (dict(size=-1), ValueError, r"size is -1; it must not be negative"),
    "size float": (dict(size=4.0), TypeError, r"size is 4.0; an integer"),
    "reduce": (dict(reduce="mean"), ValueError, r"reduce is 'mean'; accepted: 'min', 'max'"),
    "zero": (dict(emb=ZERO), ValueError, r"emb\[3\] has no cosine: its norm is not in"),
    "zero of many": (dict(emb=ZERO[None]), ValueError, r"emb\[0, 3\] has no cosine"),
    "nan": (dict(emb=NAN), ValueError, r"emb\[2\] has no cosine"),
    "huge": (dict(emb=HUGE), ValueError, r"emb\[1\] has no cosine"),
    "device": (dict(seeds=torch.zeros(1, dtype=torch.int64, device="meta")), ValueError, r"seeds is on meta but emb is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), SET_ERRORS.values(), ids=SET_ERRORS)
def test_errors_of_sets(wrong, error, message):
    with pytest.raises(error, match=message):
        greedy_select(**{"emb": E, "type_id": SOFT, "seeds": torch.tensor([0]), "quotas": (2, 2), **wrong})


@only_cuda
def test_sets_that_cannot_be_are_minus_one(device, validation):
    emb, soft, seeds = E.to(device), SOFT.to(device), torch.tensor([0, 1, 9], device=device)
    quotas = torch.tensor([[2, 2], [4, 1], [1, 1]], device=device)
    assert greedy_select(emb, soft, seeds, quotas, size=5).tolist() == [[0, 4, 1, 5, -1], [-1] * 5, [-1] * 5]
    assert greedy_select(ZERO.to(device), soft, seeds[:1], (2, 2)).tolist() == [[-1] * 4]
    with pytest.raises(ValueError, match=r"size is None; with quotas on CUDA it must be given"):
        greedy_select(emb, soft, seeds, quotas)
    validation(True)
    with pytest.raises(ValueError, match=r"quotas of seed 1 asks for 4 candidates of type 0; there are 3"):
        greedy_select(emb, soft, seeds, quotas, size=5)
