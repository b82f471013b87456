"""The CPU's own matrix product by its argument struct, and the forward of a head over it. tests/test_package.py runs this once
per instruction set."""

import itertools
import json

import pytest
import torch

import prefkern
from prefkern import _C, reference

TYPES = {"float32": _C.DType.float32, "bfloat16": _C.DType.bfloat16, "float16": _C.DType.float16}
# Less than a tile, a tile and a bit, several blocks of rows, columns and depth.
SHAPES = [(1, 1, 1), (2, 3, 5), (6, 16, 8), (7, 17, 9), (14, 32, 16), (5, 1100, 3), (230, 40, 700), (97, 515, 257)]


def multiply(a, b, *, a_transposed=False, b_transposed=False, c=None, alpha=1.0, pairs=False):
    """a [m, k] and b [k, n] as they are after transposition; the struct gets them as `_transposed` says they lie."""
    (m, k), n = a.shape, b.shape[1]
    left, right = (t.T.contiguous() if swap else t.contiguous() for t, swap in ((a, a_transposed), (b, b_transposed)))
    out = torch.full((m, n + 3), 7.0)
    if c is not None:
        out[:, :n] = c
    g = _C.GemmArgs()
    g.m, g.n, g.k = m, n, k
    g.a, g.b, g.c = left.data_ptr(), right.data_ptr(), out.data_ptr()
    g.a_stride, g.b_stride, g.c_stride = left.shape[1], right.shape[1], n + 3
    g.a_transposed, g.b_transposed = a_transposed, b_transposed
    g.a_type, g.b_type = (TYPES[str(t.dtype)[6:]] for t in (a, b))
    g.accumulate, g.alpha, g.pairs = c is not None, alpha, pairs
    _C.cpu_multiply(g)
    assert out[:, n:].eq(7).all()  # nothing is written behind the rows
    return out[:, :n]


def factors(shape, a_type=torch.float32, b_type=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    m, n, k = shape
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    return a.to(a_type), b.to(b_type)


def bound(a, b):
    """What float accumulation may be off: an ulp or so for every few terms, of the sum of their sizes."""
    return a.double().abs() @ b.double().abs() * (2**-24 * (4 + a.shape[1] ** 0.5)) + 1e-30


@pytest.mark.parametrize("layout", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product(shape, layout):
    a, b = factors(shape)
    c = multiply(a, b, a_transposed=layout[0], b_transposed=layout[1])
    assert ((c - a.double() @ b.double()).abs() <= bound(a, b)).all()


@pytest.mark.parametrize("types", list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)), ids=str)
def test_narrow_factors_are_widened_exactly(types):
    """The bits are those of the same numbers given as float32, whatever the layout."""
    a, b = factors((97, 70, 257), *types)
    wide = multiply(a.float(), b.float())
    for layout in itertools.product([False, True], repeat=2):
        assert torch.equal(multiply(a, b, a_transposed=layout[0], b_transposed=layout[1]), wide)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_scaled_and_added(shape):
    a, b = factors(shape)
    c = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(1))
    out = multiply(a, b, c=c, alpha=-1.5)
    assert ((out - (c.double() - 1.5 * (a.double() @ b.double()))).abs() <= 1.5 * bound(a, b) + c.abs() * 2**-22).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_of_bfloat16(shape):
    """The products are exact in float, only the order of the additions differs; an odd last element has no partner."""
    a, b = factors(shape, torch.bfloat16, torch.bfloat16)
    c = multiply(a, b, b_transposed=True, pairs=True)
    assert ((c - a.double() @ b.double()).abs() <= bound(a, b)).all()


def test_not_a_number_stays_where_it_belongs():
    a, b = factors((20, 40, 30))
    a[3, 5], b[7, 11] = torch.nan, torch.inf
    c = multiply(a, b)
    bad = torch.zeros(20, 40, dtype=torch.bool)
    bad[3] = bad[:, 11] = True
    assert torch.equal(~c.isfinite(), bad)


def test_an_element_has_the_same_bits_however_the_product_is_cut():
    a, b = factors((230, 1300, 700))
    whole = multiply(a, b)
    assert torch.equal(multiply(a[100:113], b[:, 1020:1051]), whole[100:113, 1020:1051])
    assert torch.equal(multiply(a[:, :], b[:, 640:641]), whole[:, 640:641])


# ---- the forward of a head -------------------------------------------------------------------------------------------

own = pytest.mark.skipif(prefkern.capabilities()["cpu_gemm"] != "own", reason="the products here are a library's")
OUTPUTS = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")


def head(rows, width, vocab, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = (torch.randn(rows, width, generator=generator) * 2).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def error(found, exact):
    return (found.double() - exact).abs().max().item()


@own
@pytest.mark.parametrize("outputs", [(), ("entropy",), OUTPUTS], ids=len)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.5}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 1), (9, 20, 511), (600, 12, 530), (1100, 16, 9000)], ids=str)
def test_the_forward_of_a_head(shape, options, outputs):
    """Vocabularies of one span, of several with a short last one; more rows than are held at a time."""
    hidden, weight, targets = head(*shape)
    bias = torch.linspace(-1, 1, shape[2]) if "softcap" in options else None
    found = prefkern.linear_logprobs(hidden, weight, targets, bias=bias, outputs=outputs, **options)
    exact = reference.linear_logprobs(
        hidden.double(), weight.double(), targets, bias=None if bias is None else bias.double(), outputs=OUTPUTS, **options
    )
    for name in ("logp", *outputs):
        if name == "is_top1":
            assert torch.equal(found.is_top1, exact.is_top1)
        else:
            assert error(getattr(found, name), getattr(exact, name)) < 1e-5, name


@own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_forward_of_a_narrow_head(dtype):
    hidden, weight, targets = head(70, 33, 1200, dtype)
    found = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, outputs=("entropy",))
    assert error(found.logp, exact.logp) < 1e-5
    assert error(found.entropy, exact.entropy) < 1e-5


@own
def test_infinite_logits_in_the_forward_of_a_head():
    """-inf in part of the vocabulary, in all of a span, in all of a row; NaN and inf make their rows NaN and no others."""
    rows, vocab = 6, 3000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    logits[0, 1::2] = -torch.inf
    logits[1, 512:1024] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 700] = torch.nan
    logits[4, 2999] = torch.inf
    # As a bias: 0 times infinity would be NaN.
    hidden = torch.zeros(rows, 4)
    targets = torch.zeros(rows, dtype=torch.int64)
    weight = torch.zeros(vocab, 4)
    for row in range(rows):
        found = prefkern.linear_logprobs(hidden[row : row + 1], weight, targets[:1], bias=logits[row], outputs=("entropy",))
        exact = reference.logits_logprobs(logits[row : row + 1].double(), targets[:1], outputs=("entropy",))
        torch.testing.assert_close(found.logp.double(), exact.logp, rtol=0, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=0, atol=1e-5, equal_nan=True)


@own
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_row_of_hidden_stays_alone(bad):
    """Without a bias rows are folded lane by lane."""
    hidden, weight, targets = head(40, 16, 2100)
    targets.clamp_(min=0)
    clean = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
    hidden[7, 3] = bad
    found = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
    others = torch.arange(40) != 7
    assert found.logp[7].isnan()
    assert torch.equal(found.logp[others], clean.logp[others])
    assert torch.equal(found.entropy[others], clean.entropy[others])


@own
def test_large_logits_in_the_forward_of_a_head():
    """A maximum that rises from slice to slice, and logits far apart."""
    hidden, weight, targets = head(20, 8, 4000)
    weight *= torch.linspace(0, 60, 4000).unsqueeze(1)
    targets.clamp_(min=0)
    found = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
    z = hidden @ weight.T
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, outputs=("entropy",))
    assert error(found.logp, exact.logp) < 2**-22 * z.abs().max()
    assert error(found.entropy, exact.entropy) < 2**-20 * z.abs().max()


THREADS = """
import hashlib, json, sys, torch, prefkern
torch.set_num_threads(int(sys.argv[1]))
g = torch.Generator().manual_seed(0)
results = []
for rows, vocab in ((1, 5000), (300, 2000), (1500, 9000)):
    h, w = torch.randn(rows, 24, generator=g), torch.randn(vocab, 24, generator=g)
    y = torch.randint(0, vocab, (rows,), generator=g)
    h.requires_grad_(), w.requires_grad_()
    out = prefkern.linear_logprobs(h, w, y, outputs=("entropy",))
    (out.logp.sum() + out.entropy.sum()).backward()
    results += [hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in (out.logp, out.entropy, h.grad, w.grad)]
print(json.dumps(results))
"""


@own
def test_bits_do_not_depend_on_threads(run_python):
    one, two, five = (json.loads(run_python(THREADS, n).splitlines()[-1]) for n in (1, 2, 5))
    assert one == two == five


@own
def test_forward_and_backward_see_the_same_logits():
    """A vocabulary of one has a probability of exactly 1 only if both compute the same logit."""
    hidden, weight, _ = head(30, 300, 1)
    hidden.requires_grad_()
    prefkern.linear_logprobs(hidden, weight, torch.zeros(30, dtype=torch.int64)).logp.sum().backward()
    assert hidden.grad.eq(0).all()


def test_the_products_can_be_left_to_the_library(run_python):
    script = "import prefkern; print(prefkern.capabilities()['cpu_gemm'])"
    for wanted in ("own", "library"):
        assert run_python(script, PREFKERN_CPU_GEMM=wanted).split()[-1] == wanted
    with pytest.raises(Exception, match="PREFKERN_CPU_GEMM is 'fast'; accepted: own, library"):
        run_python(script, PREFKERN_CPU_GEMM="fast")
