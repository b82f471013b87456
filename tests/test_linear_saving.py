"""linear_logprobs with logits or row gradients saved for its backward: the gradients of recomputing, for the work and the bytes
that plan_backward announces."""

import math
import time

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import linear_logprobs, plan_backward

OPS = torch.ops.prefkern
ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
SOURCES = ("logp", "entropy", "lse")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
ROWS, VOCAB, WIDTH = 23, 301, 32
SAVED = {"logits": "linear_logprobs_kept_backward", "u": "linear_logprobs_u_backward"}


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(params=["logits", "u"])
def save(request, device):
    if request.param == "u" and device == "cuda":
        pytest.skip("u is saved on the CPU only")
    return request.param


def make(device="cpu", dtype=F32, rows=ROWS, vocab=VOCAB, width=WIDTH):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[1::5] = -100
    return hidden.to(device), weight.to(device), targets.to(device)


def kept_tokens(targets, vocab=VOCAB):
    """Some tokens of every row; two rows do not keep their target."""
    generator = torch.Generator().manual_seed(3)
    rows = [sorted({int(t), *torch.randint(0, vocab, (40,), generator=generator).tolist()} - {-100}) for t in targets]
    for row in (0, 5):
        rows[row] = sorted(set(rows[row]) - {int(targets[row])})
    offsets = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
    return offsets.to(targets.device), torch.tensor([i for r in rows for i in r], device=targets.device)


OPTIONS = {
    "plain": lambda t: {},
    "bias": lambda t: {"bias": torch.randn(VOCAB, device=t.device)},
    "row temperature": lambda t: {"temperature": torch.rand(ROWS, device=t.device) + 0.5},
    "everything": lambda t: {
        "bias": torch.randn(VOCAB, device=t.device), "temperature": torch.rand(ROWS, device=t.device) + 0.5, "softcap": 4.0,
        "logit_scale": 1.7,
    },
    "keep": lambda t: {"keep": kept_tokens(t)},
    "keep and softcap": lambda t: {"keep": kept_tokens(t), "softcap": 3.0, "bias": torch.randn(VOCAB, device=t.device)},
}  # fmt: skip


def upstream_of(targets, sources=SOURCES, zeros=0.3):
    """Gradients from above; a part of the rows has none."""
    n = len(targets)
    idle = torch.rand(n) < zeros
    return {name: torch.randn(n, dtype=F64).masked_fill(idle, 0).to(targets.device) for name in sources}


def gradients(tensors, targets, upstream, trained=(0,), outputs=None, **options):
    leaves = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    outputs = [name for name in upstream if name != "logp"] if outputs is None else outputs
    out = linear_logprobs(leaves[0], leaves[1], targets, outputs=outputs, **options)
    fields = [getattr(out, name) for name in upstream]
    grads = [g.to(field.dtype) for g, field in zip(upstream.values(), fields, strict=True)]
    return out, torch.autograd.grad(fields, [leaves[i] for i in trained], grads)


def distance(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_near_outputs(a, b):
    """Those of another walk: equal up to rounding."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert_close(x, y, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- gradients

# Of logits kept in the inputs' type the gradient has the error of that type; float32 keeps them as they are.
TOLERANCE = {"u": {F64: 1e-13, F32: 1e-6, BF16: 4e-3, F16: 6e-4}, "logits": {F64: 1e-14, F32: 1e-6, BF16: 2e-2, F16: 3e-3}}


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 6000])
def test_gradients_of_a_frozen_head(device, save, dtype, options, chunk_bytes):
    """Of all outputs at once, against the backward that computes the logits again; the outputs are those of any forward."""
    hidden, weight, targets = make(device, dtype)
    options = OPTIONS[options](targets)
    upstream = upstream_of(targets)
    arguments = {"chunk_bytes": chunk_bytes, "outputs": ALL, **options}
    out, (got,) = gradients((hidden, weight), targets, upstream, save=save, **arguments)
    expected_out, (expected,) = gradients((hidden, weight), targets, upstream, save="recompute", **arguments)
    assert got.dtype == dtype
    assert distance(got, expected) < TOLERANCE[save][dtype]
    assert_near_outputs(out._replace(is_top1=None), expected_out._replace(is_top1=None))


@pytest.mark.parametrize("sources", [("logp",), ("logp", "entropy"), ("logp", "lse"), ("entropy",), ("lse",)], ids="+".join)
@pytest.mark.parametrize("chunk_bytes", [None, 6000])
def test_each_output(device, save, sources, chunk_bytes):
    hidden, weight, targets = make(device, F32)
    upstream = upstream_of(targets, sources)
    arguments = {"chunk_bytes": chunk_bytes, "softcap": 5.0}
    _, (got,) = gradients((hidden, weight), targets, upstream, save=save, **arguments)
    _, (expected,) = gradients((hidden, weight), targets, upstream, save="recompute", **arguments)
    assert distance(got, expected) < 4e-6  # an entropy's gradient cancels


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
@pytest.mark.parametrize("chunk_bytes", [None, 6000])
@pytest.mark.parametrize("options", ["plain", "everything", "keep"])
def test_gradients_from_kept_logits(device, dtype, chunk_bytes, options):
    """Of hidden, weight, bias and a low-rank update."""
    hidden, weight, targets = make(device, dtype)
    options = OPTIONS[options](targets)
    bias = options.pop("bias", torch.randn(VOCAB, device=device)).to(F64 if dtype == F64 else F32)
    a, b = torch.randn(4, WIDTH).to(device, dtype), (torch.randn(VOCAB, 4) / 8).to(device, dtype)
    upstream = upstream_of(targets)

    def run(save):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias, a, b)]
        out = linear_logprobs(
            leaves[0], leaves[1], targets, bias=leaves[2], lora=(leaves[3], leaves[4], 0.5), outputs=ALL, save=save,
            chunk_bytes=chunk_bytes, **options,
        )  # fmt: skip
        fields = [getattr(out, name) for name in upstream]
        return torch.autograd.grad(fields, leaves, [g.to(f.dtype) for g, f in zip(upstream.values(), fields, strict=True)])

    for got, expected in zip(run("logits"), run("recompute"), strict=True):
        assert got.dtype == expected.dtype
        assert distance(got, expected) < {F64: 1e-13, F32: 1e-6, BF16: 2e-2}[dtype]


@pytest.mark.parametrize("logits_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("chunk_bytes", [None, 6000])
def test_rounded_logits(device, save, logits_dtype, dtype, chunk_bytes):
    """They are kept as they are rounded: the gradient is that of computing them again."""
    hidden, weight, targets = make(device, dtype)
    upstream = upstream_of(targets)
    arguments = {"logits_dtype": logits_dtype, "chunk_bytes": chunk_bytes}
    _, (got,) = gradients((hidden, weight), targets, upstream, save=save, **arguments)
    _, (expected,) = gradients((hidden, weight), targets, upstream, save="recompute", **arguments)
    assert distance(got, expected) < (1e-6 if dtype == F32 else 4e-3)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=names)
def test_kept_logits_are_as_good_as_a_head_in_plain_pytorch(device, dtype):
    hidden, weight, targets = make(device, dtype, rows=64, vocab=2000, width=64)
    upstream = upstream_of(targets, ("logp",))
    _, got = gradients((hidden, weight), targets, upstream, (0, 1), save="logits")

    def plain(hidden, weight, g):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        logp = torch.log_softmax(leaves[0] @ leaves[1].mT, -1)
        chosen = logp.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.autograd.grad(chosen, leaves, torch.where(targets == -100, 0, g).to(chosen.dtype))

    exact = plain(hidden.double(), weight.double(), upstream["logp"])
    eager = plain(hidden, weight, upstream["logp"])
    for a, p, e in zip(got, eager, exact, strict=True):
        assert 0 < distance(a, e) < 2 * distance(p, e)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_gradcheck(save, options, chunk_bytes):
    torch.manual_seed(1)
    hidden, weight, targets = make("cpu", F64)
    made = {k: t.double() if isinstance(t, torch.Tensor) and k == "bias" else t for k, t in OPTIONS[options](targets).items()}
    rows = torch.arange(ROWS) % 5 != 0 if "keep" in made else torch.ones(ROWS, dtype=torch.bool)  # a logp of -inf has no slope

    def outputs(hidden):
        out = linear_logprobs(hidden, weight, targets, outputs=("entropy", "lse"), save=save, chunk_bytes=chunk_bytes, **made)
        return out.logp[rows], out.entropy, out.lse

    assert torch.autograd.gradcheck(outputs, hidden.requires_grad_(), fast_mode=True)


# ------------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("garbage", [NAN, INF])
def test_rows_that_are_not_looked_at(device, save, garbage):
    """Ignored rows, and those without an upstream gradient: their hidden state reaches nothing."""
    hidden, weight, targets = make(device)
    upstream = upstream_of(targets, zeros=0.5)
    idle = (targets == -100) | (sum(g != 0 for g in upstream.values()) == 0)
    _, (expected,) = gradients((hidden, weight), targets, upstream, save=save)
    hidden[idle] = garbage
    _, (got,) = gradients((hidden, weight), targets, upstream, save=save)
    assert torch.equal(got, expected)
    assert not got[idle].any() and got[~idle].all()


def test_a_row_of_nan_poisons_only_itself(device, save):
    hidden, weight, targets = make(device)
    upstream = upstream_of(targets, zeros=0)
    _, (expected,) = gradients((hidden, weight), targets, upstream, save=save)
    hidden[2] = NAN
    out, (got,) = gradients((hidden, weight), targets, upstream, save=save)
    others = torch.arange(ROWS, device=device) != 2
    assert out.logp[2].isnan() and got[2].isnan().all()
    assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_tokens_that_cannot_be_drawn(device, save, chunk_bytes):
    """Whole blocks of logits of -inf, first ones too: weights of 0, and no NaN of -inf minus -inf."""
    hidden, weight, targets = make(device)
    bias = torch.zeros(VOCAB, device=device)
    bias[:100] = -INF
    bias[200:250] = -INF
    targets = torch.where(targets == -100, targets, targets % 100 + 100)
    upstream = upstream_of(targets)
    arguments = {"bias": bias, "chunk_bytes": chunk_bytes}
    _, (got,) = gradients((hidden, weight), targets, upstream, save=save, **arguments)
    _, (expected,) = gradients((hidden, weight), targets, upstream, save="recompute", **arguments)
    assert got.isfinite().all()
    assert distance(got, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 2e-3)], ids=names)
def test_logits_that_rise_from_block_to_block(device, save, dtype, tolerance):
    """The maximum moves in every block, at last to 2400, where a float32 is spaced 2e-4."""
    hidden, weight, targets = make(device, dtype)
    hidden[:, 0] = 1.0
    weight[:, 0] = torch.arange(VOCAB, device=device) * 8.0
    upstream = upstream_of(targets)
    _, (got,) = gradients((hidden, weight), targets, upstream, save=save, chunk_bytes=2000)
    _, (expected,) = gradients((hidden, weight), targets, upstream, save="recompute", chunk_bytes=2000)
    assert distance(got, expected) < tolerance


@pytest.mark.parametrize("rows", ["none", "all ignored", "one"])
def test_few_rows(device, save, rows):
    hidden, weight, targets = make(device)
    if rows == "all ignored":
        targets[:] = -100
    else:
        hidden, targets = hidden[: rows == "one"], targets[: rows == "one"]
    upstream = upstream_of(targets, zeros=0)
    out, (got,) = gradients((hidden, weight), targets, upstream, save=save)
    expected_out, (expected,) = gradients((hidden, weight), targets, upstream, save="recompute")
    assert_near_outputs(out, expected_out)
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_any_shape_and_strides(device, save):
    hidden, weight, targets = make(device, rows=24)
    g = torch.randn(4, 6, device=device)
    wide = torch.randn(4, 6, 2 * WIDTH, device=device)
    wide[..., ::2] = hidden.view(4, 6, WIDTH)
    weight = torch.cat([weight, weight], 1)[:, :WIDTH]
    grads = []
    for how in (save, "recompute"):
        leaf = wide.clone().requires_grad_()
        linear_logprobs(leaf[..., ::2], weight, targets.view(4, 6), save=how).logp.backward(g)
        grads.append(leaf.grad)
    assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_equal_calls_give_equal_bits_and_a_backward_can_be_repeated(device, save):
    hidden, weight, targets = make(device, BF16)
    upstream = upstream_of(targets)
    runs = [gradients((hidden, weight), targets, upstream, save=save)[1][0] for _ in range(2)]
    assert torch.equal(*runs)
    leaf = hidden.clone().requires_grad_()
    logp = linear_logprobs(leaf, weight, targets, save=save).logp
    first, second = (torch.autograd.grad(logp.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_threads(threads, save):
    hidden, weight, targets = make("cpu", rows=300, vocab=3001, width=64)
    upstream = upstream_of(targets)
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(gradients((hidden, weight), targets, upstream, save=save)[1][0])
    assert torch.equal(runs[1], runs[2])
    assert distance(runs[1], runs[0]) < 2e-6


def test_autocast(device, save):
    hidden, weight, targets = make(device)
    with torch.autocast(device, dtype=BF16):
        _, (got,) = gradients((hidden, weight), targets, upstream_of(targets, ("logp",), 0), save=save)
    assert got.dtype == F32 and got.any()


# ------------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("lse",), ("mean_logit",)])
def test_the_default(device, op_log, trained, outputs):
    """u where it is one gradient of a frozen head; else nothing is saved."""
    hidden, weight, targets = make(device)
    gradients((hidden, weight), targets, upstream_of(targets, ("logp",)), trained, outputs=outputs)
    saves = trained == (0,) and not {"entropy", "lse"} & set(outputs) and device == "cpu"
    assert ("linear_logprobs_u_backward" in op_log.names()) == saves
    assert ("linear_logprobs_backward" in op_log.names()) == (not saves)


def test_a_named_choice_is_taken(device, save, op_log):
    hidden, weight, targets = make(device)
    gradients((hidden, weight), targets, upstream_of(targets), save=save)
    assert op_log.names() == ["linear_logprobs_saving_fwd", SAVED[save]]


@pytest.mark.parametrize(
    ("save_bytes", "op"),
    [
        (0, "linear_logprobs_backward"),
        (ROWS * VOCAB * 4 - 1, "linear_logprobs_backward"),
        (ROWS * VOCAB * 4, "linear_logprobs_kept_backward"),
    ],
)
def test_a_budget(device, op_log, save_bytes, op):
    hidden, weight, targets = make(device)
    gradients((hidden, weight), targets, upstream_of(targets), (0, 1), save_bytes=save_bytes)
    assert op_log.names()[-1] == op


def test_nothing_is_saved_without_gradients(device, save, op_log):
    hidden, weight, targets = make(device)
    with torch.no_grad():
        linear_logprobs(hidden.requires_grad_(), weight, targets, save=save)
    linear_logprobs(hidden.detach(), weight, targets, save=save)
    assert op_log.names() == ["linear_logprobs_fwd"] * 2


FULL = 2 * 1000 * 32000  # bytes of logits in bfloat16, for 1000 rows
U = 4 * 1000 * 64
PLANS = {
    "no budget": ({}, ("recompute", 1, 3, 0)),
    "room for the logits": ({"save_bytes": FULL}, ("logits", 1, 2, FULL)),
    "too little room": ({"save_bytes": FULL - 1}, ("recompute", 1, 3, 0)),
    "float32": ({"save_bytes": 2 * FULL, "dtype": F32}, ("logits", 1, 2, 2 * FULL)),
    "float32, too little room": ({"save_bytes": FULL, "dtype": F32}, ("recompute", 1, 3, 0)),
    "rounded logits": ({"save_bytes": FULL, "dtype": F32, "logits_dtype": "bfloat16"}, ("logits", 1, 2, FULL)),
    "frozen": ({"needs": ("hidden",)}, ("u", 2, 0, U)),
    "frozen, no room": ({"needs": ("hidden",), "save_bytes": 0}, ("recompute", 1, 2, 0)),
    "frozen, all the room": ({"needs": ("hidden",), "save_bytes": 1 << 40}, ("u", 2, 0, U)),
    "frozen, entropy": ({"needs": ("hidden",), "outputs": ("entropy",)}, ("recompute", 1, 2, 0)),
    "frozen, entropy, named": ({"needs": ("hidden",), "outputs": ("entropy",), "save": "u"}, ("u", 3, 0, 2 * U)),
    "frozen, entropy, room": (
        {"needs": ("hidden",), "outputs": ("entropy",), "save_bytes": 1 << 40}, ("logits", 1, 1, FULL)
    ),
    "frozen, lse, no budget": ({"needs": ("hidden",), "outputs": ("lse",)}, ("recompute", 1, 2, 0)),
    "frozen, lse": ({"needs": ("hidden",), "outputs": ("lse",), "save_bytes": 1 << 40}, ("u", 2, 0, 2 * U)),
    "frozen on CUDA": ({"needs": ("hidden",), "device": "cuda"}, ("recompute", 1, 2, 0)),
    "frozen with lora": ({"needs": ("hidden", "lora")}, ("recompute", 1, 2, 0)),
    "weight alone": ({"needs": ("weight",)}, ("recompute", 1, 2, 0)),
    "weight alone, room": ({"needs": ("weight",), "save_bytes": FULL}, ("logits", 1, 1, FULL)),
    "bias alone, room": ({"needs": ("bias",), "save_bytes": FULL}, ("logits", 1, 0, FULL)),
    "nothing": ({"needs": (), "save_bytes": FULL}, ("recompute", 1, 0, 0)),
    "named": ({"save": "logits"}, ("logits", 1, 2, FULL)),
    "recompute": ({"needs": ("hidden",), "save": "recompute"}, ("recompute", 1, 2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_plans(name):
    options, expected = PLANS[name]
    plan = plan_backward(1000, 64, 32000, **{"dtype": BF16, **options})
    assert plan[:4] == expected
    assert plan.products == expected[1] + expected[2]
    assert plan == plan_backward(1000, 64, 32000, **{"dtype": BF16, **options})


def test_the_workspace_of_a_plan():
    sizes = {b: prefkern.plan_chunks(1000, 64, 32000, dtype=BF16, backward=b).workspace_bytes for b in (False, True)}
    of = {s: plan_backward(1000, 64, 32000, dtype=BF16, needs=("hidden",), save=s).workspace_bytes for s in ("recompute", "u")}
    assert of == {"recompute": max(sizes.values()), "u": sizes[False]}
    assert plan_backward(1000, 64, 32000, dtype=BF16, save="logits").workspace_bytes == sizes[True]


def test_memory(device, save, allocations):
    """From forward to backward what the plan says, and in all no more than that with the workspace and the results."""
    rows, vocab, width = 256, 20_000, 32
    hidden, weight, targets = make(device, BF16, rows, vocab, width)
    targets.clamp_min_(0)
    hidden.requires_grad_()
    plan = plan_backward(rows, width, vocab, dtype=BF16, device=device, needs=("hidden",), save=save, chunk_bytes=1 << 20)

    def call():
        logp = linear_logprobs(hidden, weight, targets, save=save, chunk_bytes=1 << 20).logp
        return torch.autograd.grad(logp.sum(), hidden)

    call()  # what the GEMM library keeps for itself
    used = allocations(call)
    results = rows * width * 6
    assert used.peak <= plan.saved_bytes + plan.workspace_bytes + results + 256 * rows + 8192
    assert used.peak >= plan.saved_bytes
    assert plan.saved_bytes == (rows * vocab * 2 if save == "logits" else rows * width * 4)


def test_u_holds_neither_hidden_nor_weight():
    hidden, weight, targets = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_logprobs(hidden.requires_grad_(), weight, targets, save="u")
    assert [t.shape for t in saved] == [(1, ROWS, WIDTH)]


@pytest.mark.slow
def test_products_are_saved():
    """Of a frozen head: u takes about two thirds of the time of recomputing, kept logits too."""
    rows, vocab, width = 512, 16384, 512
    hidden, weight, targets = make(rows=rows, vocab=vocab, width=width)
    targets.clamp_min_(0)
    best = dict.fromkeys(("recompute", "u", "logits"), INF)
    for _ in range(5):
        for save in best:
            leaf = hidden.clone().requires_grad_()
            begin = time.process_time()
            linear_logprobs(leaf, weight, targets, save=save).logp.sum().backward()
            best[save] = min(best[save], time.process_time() - begin)
    assert best["u"] < 0.85 * best["recompute"]
    assert best["logits"] < 0.85 * best["recompute"]


# ------------------------------------------------------------------------------------------------------ ops and compilers


def op_arguments(device, dtype=F32, grad=False):
    hidden, weight, targets = make(device, dtype, rows=6, vocab=40, width=8)
    targets.clamp_min_(0)  # of ignored rows no logits are kept, and their place holds anything
    keep = (torch.arange(7, device=device) * 40, torch.arange(40, device=device).repeat(6))
    tensors = (hidden.requires_grad_(grad), weight, targets, torch.randn(40, device=device), None, None, None, *keep)
    return tensors, (0.7, 3.0, 1.3, -100, 1.0, 0)


@pytest.mark.parametrize("outputs", [32, 35])
def test_opcheck(device, save, outputs):
    number = {"logits": 1, "u": 2}[save]
    tensors, numbers = op_arguments(device)
    opcheck(OPS.linear_logprobs_saving_fwd.default, (*tensors, *numbers, outputs, 0, number))
    opcheck(OPS.linear_logprobs_saving.default, (*tensors, *numbers, outputs, 0, number))
    out = OPS.linear_logprobs_saving_fwd(*tensors, *numbers, outputs, 0, number)
    upstream = (torch.randn(6, device=device), None, None)
    if save == "u":
        opcheck(OPS.linear_logprobs_u_backward.default, (*upstream, out[7], outputs, 0))
    else:
        opcheck(OPS.linear_logprobs_kept_backward.default, (*upstream, *tensors, out[1], out[6], out[7], *numbers, 7, 0))


def test_opcheck_with_a_gradient(device, save):
    tensors, numbers = op_arguments(device, grad=True)
    opcheck(OPS.linear_logprobs_saving.default, (*tensors, *numbers, 35, 0, {"logits": 1, "u": 2}[save]))


@pytest.mark.parametrize(
    "arguments", [{}, {"save": "logits"}, {"save": "u", "outputs": ("entropy",)}, {"save_bytes": 1 << 30}], ids=str
)
def test_compiles_into_one_graph(device, arguments):
    if device == "cuda" and arguments.get("save") == "u":
        pytest.skip("u is saved on the CPU only")
    hidden, weight, targets = make(device)

    def loss(hidden, targets):
        out = linear_logprobs(hidden, weight, targets, **arguments)
        return out.logp.sum() + (0 if out.entropy is None else out.entropy.sum())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (ROWS, 7):
        grads = []
        for function in (loss, compiled):
            leaf = hidden[:n].detach().clone().requires_grad_()
            function(leaf, targets[:n]).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_differentiating_twice_is_an_error(device, save):
    hidden, weight, targets = make(device)
    hidden.requires_grad_()
    (g,) = torch.autograd.grad(linear_logprobs(hidden, weight, targets, save=save).logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        g.sum().backward()


# ---------------------------------------------------------------------------------------------------------------- refusals


def lora():
    return (torch.randn(2, WIDTH), torch.randn(VOCAB, 2), 1.0)


REFUSED = {
    "a name": ({"save": "logit"}, ValueError, r"save is 'logit'; accepted: 'auto', 'recompute', 'logits', 'u'.*'logits'"),
    "no name": ({"save": 2}, TypeError, "save is 2; 'auto' or one of"),
    "a budget below 0": ({"save_bytes": -1}, ValueError, "save_bytes is -1; it must not be negative"),
    "half a byte": ({"save_bytes": 0.5}, TypeError, "save_bytes is 0.5"),
    "a budget and a name": ({"save": "logits", "save_bytes": 5}, ValueError, "save_bytes is 5 but save is 'logits'"),
    "u with a weight": ({"save": "u"}, ValueError, "save is 'u', which serves .* but weight needs a gradient"),
    "a group": ({"save": "logits", "group": "world"}, ValueError, "save is 'logits' .* always recompute"),
    "a budget and a group": ({"save_bytes": 0, "group": "world"}, ValueError, "save_bytes is 0; ranges .* always recompute"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, error, message = REFUSED[name]
    hidden, weight, targets = make()
    with pytest.raises(error, match=message):
        linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, **options)


def test_u_is_refused_where_it_cannot_be():
    hidden, weight, targets = make()
    hidden.requires_grad_()
    with pytest.raises(ValueError, match="but the head has a lora; pass 'auto'"):
        linear_logprobs(hidden, weight, targets, save="u", lora=lora())
    with pytest.raises(ValueError, match="but bias needs a gradient"):
        linear_logprobs(hidden, weight, targets, save="u", bias=torch.zeros(VOCAB, requires_grad=True))
    with pytest.raises(ValueError, match="but it is saved on the CPU only"):
        plan_backward(5, 4, 3, needs=("hidden",), device="cuda", save="u")
    out = linear_logprobs(hidden, weight, targets, lora=lora())  # by default it is not saved there
    assert torch.autograd.grad(out.logp.sum(), hidden)[0].isfinite().all()


BAD_PLANS = {
    "needs of a name": ({"needs": "hidden"}, TypeError, "needs is 'hidden'; a tuple of names"),
    "needs": ({"needs": ("hiden",)}, ValueError, "needs has 'hiden'; accepted: 'hidden', .*'hidden'"),
    "outputs": ({"outputs": ("x",)}, ValueError, "outputs has 'x'"),
    "rows": ({"rows": -1}, ValueError, "rows is -1"),
    "device": ({"device": "tpu"}, ValueError, "device is 'tpu'"),
    "dtype": ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    "save": ({"save": "all"}, ValueError, "save is 'all'"),
    "logits_dtype": ({"logits_dtype": "int8"}, ValueError, "logits_dtype is 'int8'"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plans(name):
    options, error, message = BAD_PLANS[name]
    with pytest.raises(error, match=message):
        plan_backward(**{"rows": 5, "hidden": 4, "vocab": 3, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": 3}, "outputs lack the statistics"),
        ({"save": 3}, "save is 3; accepted"),
        ({"lora": True}, "without lora only"),
    ],
)
def test_the_op_refuses(change, message):
    tensors, numbers = op_arguments("cpu")
    if "lora" in change:
        tensors = (*tensors[:5], torch.randn(2, 8), torch.randn(40, 2), *tensors[7:])
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_logprobs_saving_fwd(*tensors, *numbers, change.get("outputs", 32), 0, change.get("save", 2))


def test_the_backward_ops_refuse():
    tensors, numbers = op_arguments("cpu")
    out = OPS.linear_logprobs_saving_fwd(*tensors, *numbers, 32, 0, 1)
    g = torch.randn(6)
    for logits, message in ((out[7][1:], r"logits has shape \[239\]; expected \[240\]"), (out[7].double(), "logits has dtype")):
        with pytest.raises(RuntimeError, match=message):
            OPS.linear_logprobs_kept_backward(g, None, None, *tensors, out[1], out[6], logits, *numbers, 1, 0)
    for u, dtype, message in (
        (torch.randn(2, 6, 8), 0, "gradients has shape"), (torch.randn(1, 6, 8), 3, "gradients has dtype"),
        (torch.randn(1, 5, 8), 0, "g_logp has shape"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            OPS.linear_logprobs_u_backward(g, None, None, u, 32, dtype)
