"""The kernels as prefkern._C offers them: argument structs filled with addresses, from NumPy arrays or torch tensors.
tests/test_package.py runs this file once per instruction set."""

import numpy as np
import pytest
import torch

from prefkern import _C, reference

ROWS, VOCAB = 6, 2500
TYPES = {
    "float32": (_C.DType.float32, torch.float32),
    "bfloat16": (_C.DType.bfloat16, torch.bfloat16),
    "float16": (_C.DType.float16, torch.float16),
    "float64": (_C.DType.float64, torch.float64),
}
FIELDS = ("logp", "out_entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
UPSTREAM = ("g_logp", "g_entropy", "g_lse")
TRANSFORMS = [{}, {"scale": 0.5, "temperature": 0.7}, {"softcap": 4.0, "scale": 1.5}]
ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def structs(name):
    suffix = "64" if name == "float64" else ""
    return (
        getattr(_C, "FoldArgs" + suffix),
        getattr(_C, "GradArgs" + suffix),
        getattr(_C, "cpu_fold_logits" + suffix),
        getattr(_C, "cpu_grad_logits" + suffix),
    )


def set_block(block, name, rows, cols, targets, vocab=None, first_col=0, **transform):
    block.dtype, block.rows, block.cols = TYPES[name][0], rows, cols
    block.vocab, block.first_col, block.targets = vocab or cols, first_col, address(targets)
    for key, value in transform.items():
        setattr(block.transform, key, value)


def set_map(row_map, outer, inner=1, inner_stride=0):
    row_map.inner, row_map.outer_stride, row_map.inner_stride = inner, outer, inner_stride


def fold(name, logits, targets, **transform):
    """All outputs of whole rows, as a dict of NumPy arrays or torch tensors, whichever the logits are."""
    args_type, _, launch, _ = structs(name)
    rows, cols = logits.shape
    real = np.float64 if name == "float64" else np.float32
    out = {field: np.full(rows, 77, np.bool_ if field == "is_top1" else real) for field in FIELDS}
    out |= {"row_max": np.empty(rows, real), "row_log2_sum": np.empty(rows, real)}
    if not isinstance(logits, np.ndarray):
        out = {field: torch.from_numpy(array) for field, array in out.items()}
    a = args_type()
    set_block(a.block, name, rows, cols, targets, **transform)
    set_map(a.logits_map, cols)
    a.logits = address(logits)
    a.entropy = a.extra = True
    for field, array in out.items():
        setattr(a, field, address(array))
    launch(a)
    return out


def inputs(name="float32"):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(ROWS, VOCAB)) * 3).to(TYPES[name][1])
    targets = torch.from_numpy(rng.integers(0, VOCAB, ROWS))
    targets[0], targets[3] = logits[0].argmax(), -100
    return logits, targets


def tolerance(name):
    return 1e-12 if name == "float64" else 1e-5


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_fold_of_torch_tensors(name, transform):
    logits, targets = inputs(name)
    out = fold(name, logits, targets, **transform)
    exact = reference.logits_logprobs(
        logits.double(), targets, outputs=ALL, temperature=transform.get("temperature", 1.0),
        softcap=transform.get("softcap"), logit_scale=transform.get("scale", 1.0),
    )  # fmt: skip
    for field, expected in zip(FIELDS, exact, strict=True):
        torch.testing.assert_close(out[field].to(expected.dtype), expected, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_fold_of_numpy_arrays(name):
    """Written out in NumPy alone."""
    tensor, targets = inputs(name)
    logits, targets = tensor.numpy(), targets.numpy()
    out = fold(name, logits, targets)
    z = logits.astype(np.float64)
    top = z.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[:, 0]
    p = np.exp(z - lse[:, None])
    counts = targets != -100
    expected = {
        "logp": z[np.arange(ROWS), np.maximum(targets, 0)] - lse,
        "out_entropy": -(p * np.log(p)).sum(-1),
        "lse": lse,
        "sum_sq_probs": (p * p).sum(-1),
        "mean_logit": z.mean(-1),
    }
    for field, value in expected.items():
        np.testing.assert_allclose(out[field], np.where(counts, value, 0), rtol=0, atol=tolerance(name))
    assert out["is_top1"].tolist() == [bool(c) and t == r.argmax() for c, t, r in zip(counts, targets, z, strict=True)]
    np.testing.assert_allclose(out["row_max"][counts], top[counts, 0], rtol=0, atol=0)
    np.testing.assert_allclose(
        (out["row_log2_sum"] * np.log(2) + out["row_max"])[counts], lse[counts], rtol=0, atol=tolerance(name)
    )


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 1000, 2499])
def test_blocks_of_the_vocabulary_equal_the_whole(name, width):
    """The running state carries a row from one block of columns to the next."""
    args_type, _, launch, _ = structs(name)
    logits, targets = inputs(name)
    if width == 1:
        logits = logits[:, :90].contiguous()
        targets = torch.where(targets < 0, targets, targets % 90)
    vocab = logits.shape[1]
    whole = fold(name, logits, targets)
    real = torch.float64 if name == "float64" else torch.float32
    state = torch.full((7, ROWS + 3), torch.nan, dtype=real)
    out = {field: torch.full((ROWS,), 7, dtype=t.dtype) for field, t in whole.items()}
    for first in range(0, vocab, width):
        cols = min(width, vocab - first)
        a = args_type()
        set_block(a.block, name, ROWS, cols, targets, vocab, first)
        set_map(a.logits_map, vocab)
        a.logits = address(logits) + first * logits.element_size()
        a.entropy = a.extra = True
        a.first, a.last = first == 0, first + cols == vocab
        a.state, a.state_stride = address(state), ROWS + 3
        for field, tensor in out.items():
            setattr(a, field, address(tensor))
        launch(a)
    for field, expected in whole.items():
        counts = targets != -100 if field.startswith("row_") else slice(None)
        torch.testing.assert_close(out[field][counts], expected[counts], rtol=0, atol=tolerance(name), msg=field)
    assert state[:, ROWS:].isnan().all()  # beyond the rows nothing is written


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("cuts", [(), (1, 1000), (7, 64, 64)])
def test_ranges_folded_apart_and_joined_equal_the_whole(name, cuts):
    args_type, _, launch, _ = structs(name)
    suffix = "64" if name == "float64" else ""
    logits, targets = inputs(name)
    whole = fold(name, logits, targets)
    states = torch.full((len(cuts) + 1, 7, ROWS), torch.nan, dtype=logits.dtype)
    states[:, 1:5] = 0
    states[:, [0, 6]] = -torch.inf  # of no columns
    for state, first, last in zip(states, (0, *cuts), (*cuts, VOCAB), strict=True):
        if first == last:
            continue
        a = args_type()
        set_block(a.block, name, ROWS, last - first, targets, VOCAB, first)
        set_map(a.logits_map, VOCAB)
        a.logits = address(logits) + first * logits.element_size()
        a.entropy, a.extra, a.first, a.last = True, True, True, False
        a.state, a.state_stride = address(state), ROWS
        launch(a)
    merge = getattr(_C, "ShardMergeArgs" + suffix)()
    merge.shards, merge.shard_stride = len(states), states.stride(0)
    set_block(merge.rows.block, name, ROWS, VOCAB, targets)
    merge.rows.state, merge.rows.state_stride = address(states), ROWS
    out = {field: torch.full((ROWS,), 7, dtype=t.dtype) for field, t in whole.items()}
    for field, tensor in out.items():
        setattr(merge.rows, field, address(tensor))
    getattr(_C, "cpu_merge_shards" + suffix)(merge)
    for field, expected in whole.items():
        counts = targets != -100 if field.startswith("row_") else slice(None)
        torch.testing.assert_close(out[field][counts], expected[counts], rtol=0, atol=tolerance(name), msg=field)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_row_temperature_and_bias(name):
    logits, targets = inputs(name)
    temperature, bias = torch.rand(ROWS).to(logits.dtype) + 0.5, torch.randn(VOCAB).to(logits.dtype)
    out = fold(name, logits, targets, row_temperature=address(temperature), bias=address(bias))
    exact = reference.logits_logprobs(logits.double() + bias.double(), targets, temperature=temperature.double(), outputs=ALL)
    for field, expected in zip(FIELDS, exact, strict=True):
        torch.testing.assert_close(out[field].to(expected.dtype), expected, rtol=0, atol=tolerance(name))


def test_only_the_outputs_that_have_an_address_are_written():
    logits, targets = inputs()
    whole = fold("float32", logits, targets)
    logp = torch.empty(ROWS)
    a = _C.FoldArgs()
    set_block(a.block, "float32", ROWS, VOCAB, targets)
    set_map(a.logits_map, VOCAB)
    a.logits, a.logp = address(logits), address(logp)
    assert (a.lse, a.out_entropy, a.is_top1) == (0, 0, 0)
    _C.cpu_fold_logits(a)
    assert torch.equal(logp, whole["logp"])


def grad(name, logits, targets, stats, upstream, into=None, **transform):
    _, args_type, _, launch = structs(name)
    rows, cols = logits.shape
    into = np.empty_like(logits) if into is None and isinstance(logits, np.ndarray) else into
    into = torch.empty_like(logits) if into is None else into
    a = args_type()
    set_block(a.block, name, rows, cols, targets, **transform)
    set_map(a.logits_map, cols)
    set_map(a.grad_map, cols)
    a.grad_dtype = TYPES[name][0]
    a.logits, a.grad = address(logits), address(into)
    a.row_max, a.row_log2_sum, a.entropy = (address(stats[k]) for k in ("row_max", "row_log2_sum", "out_entropy"))
    for field, array in upstream.items():
        setattr(a, field, address(array))
    launch(a)
    return into


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("which", [*([g] for g in UPSTREAM), UPSTREAM], ids="+".join)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradients(name, which, transform):
    logits, targets = inputs(name)
    stats = fold(name, logits, targets, **transform)
    real = stats["logp"].dtype
    upstream = {field: torch.randn(ROWS, dtype=real) for field in which}
    ours = grad(name, logits, targets, stats, upstream, **transform)
    x = logits.double().requires_grad_()
    out = reference.logits_logprobs(
        x, targets, outputs=ALL, temperature=transform.get("temperature", 1.0),
        softcap=transform.get("softcap"), logit_scale=transform.get("scale", 1.0),
    )  # fmt: skip
    total = sum((upstream[field].double() * getattr(out, field[2:])).sum() for field in which)
    (expected,) = torch.autograd.grad(total, x)
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < {"float64": 1e-12, "float32": 1e-6, "bfloat16": 3e-3, "float16": 4e-4}[name]
    assert ours[3].eq(0).all()  # the ignored row
    inplace = logits.clone()
    grad(name, inplace, targets, stats, upstream, into=inplace, **transform)
    assert torch.equal(inplace, ours)


def test_gradient_of_numpy_arrays():
    tensor, targets = inputs()
    logits, targets = tensor.numpy(), targets.numpy()
    stats = fold("float32", logits, targets)
    ours = grad("float32", logits, targets, stats, {"g_logp": np.ones(ROWS, np.float32)})
    p = np.exp(logits.astype(np.float64) - stats["lse"][:, None])
    expected = (np.arange(VOCAB) == targets[:, None]) - p
    np.testing.assert_allclose(ours, np.where((targets != -100)[:, None], expected, 0), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(ours.astype(np.float64).sum(-1), 0, atol=1e-5)  # a shift of a row changes nothing


@pytest.mark.parametrize("name", TYPES)
def test_rows_anywhere_in_memory(name):
    """Row r at (r // inner) * outer_stride + (r % inner) * inner_stride: a slice of [B, T, V], a transposed batch."""
    args_type, grad_type, launch, launch_grad = structs(name)
    logits, targets = inputs(name)
    stats = fold(name, logits, targets)
    ones = torch.ones_like(stats["logp"])
    d_whole = grad(name, logits, targets, stats, {"g_logp": ones})
    for outer, inner_stride in ((4 * VOCAB, VOCAB), (VOCAB, 2 * VOCAB)):  # [2, 3 of 4, V] and [3, 2, V] transposed
        memory = torch.full((8 * VOCAB,), torch.nan, dtype=logits.dtype)
        strided = memory.as_strided((2, 3, VOCAB), (outer, inner_stride, 1))
        strided.copy_(logits.view(2, 3, VOCAB))
        logp, a = torch.empty_like(stats["logp"]), args_type()
        set_block(a.block, name, ROWS, VOCAB, targets)
        set_map(a.logits_map, outer, 3, inner_stride)
        a.logits, a.logp = address(memory), address(logp)
        launch(a)
        assert torch.equal(logp, stats["logp"])
        into, g = torch.full_like(memory, torch.nan), grad_type()
        set_block(g.block, name, ROWS, VOCAB, targets)
        set_map(g.logits_map, outer, 3, inner_stride)
        set_map(g.grad_map, outer, 3, inner_stride)
        g.logits, g.grad, g.grad_dtype, g.g_logp = address(memory), address(into), TYPES[name][0], address(ones)
        g.row_max, g.row_log2_sum = address(stats["row_max"]), address(stats["row_log2_sum"])
        launch_grad(g)
        assert torch.equal(into.as_strided((2, 3, VOCAB), (outer, inner_stride, 1)), d_whole.view(2, 3, VOCAB))
        assert into.isnan().sum() == 2 * VOCAB  # what lies between the rows is left alone


def test_another_ignore_index():
    logits, targets = inputs()
    a, logp = _C.FoldArgs(), torch.empty(ROWS)
    set_block(a.block, "float32", ROWS, VOCAB, torch.where(targets == -100, 5, targets))
    kept = torch.where(targets == -100, 5, targets)
    a.block.targets, a.block.ignore_index = address(kept), 5
    set_map(a.logits_map, VOCAB)
    a.logits, a.logp = address(logits), address(logp)
    _C.cpu_fold_logits(a)
    assert torch.equal(logp, fold("float32", logits, targets)["logp"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cols", [1, 15, 16, 1003])
def test_rounding_of_raw_pointers(dtype, biased, cols):
    logits = torch.randn(ROWS, cols) * torch.logspace(-12, 6, ROWS).unsqueeze(1)
    logits[0, 0], logits[1, 0], logits[2, 0] = float("nan"), float("inf"), -float("inf")
    bias = torch.randn(cols) if biased else None
    expected = (logits if bias is None else logits + bias).to(dtype).float()
    a = _C.RoundArgs()
    a.logits, a.rows, a.cols, a.bias = address(logits), ROWS, cols, 0 if bias is None else address(bias)
    a.to = TYPES[str(dtype).removeprefix("torch.")][0]
    _C.cpu_round_logits(a)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_kept_tokens_of_raw_pointers(name, ids_dtype, transform):
    """-inf for what is not kept, block by block, and what fold and grad make of it."""
    suffix, dtype = ("64", torch.float64) if name == "float64" else ("", torch.float32)
    logits, targets = torch.randn(ROWS, VOCAB, dtype=dtype) * 3, torch.randint(0, VOCAB, (ROWS,))
    chosen = torch.rand(ROWS, VOCAB) < torch.linspace(0, 1, ROWS).unsqueeze(1)
    chosen[torch.arange(ROWS), targets] = True
    targets[1] = -100
    chosen[1] = False
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
    ids = chosen.nonzero()[:, 1].to(ids_dtype)
    exact = logits.double().requires_grad_()
    options = {"softcap": None, **transform, "logit_scale": transform.get("scale", 1.0)}
    options.pop("scale", None)
    expected = reference.linear_logprobs(
        exact, torch.eye(VOCAB, dtype=torch.float64), targets, keep=(offsets, ids), outputs=ALL, **options
    )
    mean, parts = torch.full((ROWS,), 77, dtype=dtype), []
    for first, last in ((0, 1000), (1000, 1001), (1001, VOCAB)):
        part = logits[:, first:last].contiguous()
        k = getattr(_C, "KeepArgs" + suffix)()
        set_block(k.block, name, ROWS, last - first, targets, VOCAB, first, masked=True, **transform)
        k.kept.begin, k.kept.end = address(offsets), address(offsets[1:])
        k.kept.ids, k.kept.wide, k.kept.count = address(ids), ids_dtype == torch.int64, len(ids)
        k.logits, k.mean_logit = address(part), address(mean)
        getattr(_C, "cpu_keep_logits" + suffix)(k)
        parts.append(part)
    masked = torch.cat(parts, 1)
    counts = targets != -100
    assert torch.equal(masked[counts], logits.masked_fill(~chosen, -torch.inf)[counts])
    near = {"rtol": 1e-6, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(mean, expected.mean_logit.detach(), **near)
    out = fold(name, masked, targets, masked=True, **transform)
    for field in ("logp", "lse", "sum_sq_probs"):
        torch.testing.assert_close(out[field], getattr(expected, field).detach(), **near)
    torch.testing.assert_close(out["out_entropy"], expected.entropy.detach(), **near)

    (expected.logp.sum() + expected.entropy.sum() + expected.lse.sum()).backward()
    g = getattr(_C, "GradArgs" + suffix)()
    set_block(g.block, name, ROWS, VOCAB, targets, masked=True, **transform)
    set_map(g.logits_map, VOCAB)
    set_map(g.grad_map, VOCAB)
    ones = torch.ones(ROWS, dtype=dtype)
    g.logits = g.grad = address(masked)
    g.grad_dtype = TYPES[name][0]
    g.row_max, g.row_log2_sum, g.entropy = (address(out[f]) for f in ("row_max", "row_log2_sum", "out_entropy"))
    g.g_logp = g.g_entropy = g.g_lse = address(ones)
    getattr(_C, "cpu_grad_logits" + suffix)(g)
    torch.testing.assert_close(masked, exact.grad, rtol=2e-5, atol=1e-6, check_dtype=False)
    assert not masked[~chosen].any()


def test_structs_start_empty():
    a, g = _C.FoldArgs(), _C.GradArgs()
    assert (a.logits, a.state, a.logp, g.grad, g.g_logp, a.block.targets) == (0,) * 6
    assert (a.first, a.last, a.entropy, a.extra) == (True, True, False, False)
    assert (a.block.ignore_index, a.block.transform.temperature, a.block.transform.scale) == (-100, 1.0, 1.0)
    assert a.block.transform.softcap == 0
    a.logits = 2**47 + 16
    assert a.logits == 2**47 + 16
    _C.cpu_fold_logits(_C.FoldArgs())  # no rows, nothing to do


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("ids", ["ascending", "mixed"])
@pytest.mark.parametrize("size", [8, 4, 16, 5])
def test_group_advantages_of_raw_pointers(name, ids, size):
    """The walk over adjacent groups several at a time, the one over scattered ids, and the one for any rule."""
    suffix, real = ("64", torch.float64) if name == "float64" else ("", torch.float32)
    rows = 61 * size
    rewards, group = torch.randn(rows, dtype=real), torch.arange(rows) // size
    group = group if ids == "ascending" else group[torch.randperm(rows)]
    results = {}
    for estimator in ("grpo", "mad"):
        out = {field: torch.full((rows,), torch.nan, dtype=real) for field in ("advantages", "mean", "std")}
        sizes, a = torch.zeros(rows, dtype=torch.int64), getattr(_C, "GroupArgs" + suffix)()
        a.rule.estimator, a.count = getattr(_C.AdvantageEstimator, estimator), rows
        a.rewards, a.group, a.advantages = address(rewards), address(group), address(out["advantages"])
        fault = getattr(_C, "cpu_group_advantages" + suffix)(a)
        assert (fault.kind, fault.at) == (_C.GroupFaultKind.none, -1)
        alone = out["advantages"].clone()
        a.mean, a.std, a.sizes = address(out["mean"]), address(out["std"]), address(sizes)
        getattr(_C, "cpu_group_advantages" + suffix)(a)
        assert torch.equal(alone, out["advantages"])
        results[estimator] = reference.group_advantages(
            rewards.double(), group, estimator=estimator, outputs=("mean", "std", "count")
        )
        for field, tensor in out.items():
            torch.testing.assert_close(tensor.double(), getattr(results[estimator], field), rtol=2e-7, atol=tolerance(name))
        assert torch.equal(sizes, results[estimator].count)
    rewards[size + 1] = torch.inf
    assert getattr(_C, "cpu_group_advantages" + suffix)(a).at == size + 1


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_moments_of_raw_pointers(name):
    suffix, real = ("64", torch.float64) if name == "float64" else ("", torch.float32)
    values, three, out = torch.randn(20_000, dtype=real), torch.empty(3, dtype=torch.float64), torch.empty(20_000, dtype=real)
    mask = torch.rand(20_000) < 0.5
    hidden, weights = values.masked_fill(~mask, torch.nan), torch.rand(20_000, dtype=real) * mask
    a = getattr(_C, "MomentsArgs" + suffix)()
    a.count, a.moments = 20_000, address(three)
    for field, w in (("mask", mask), ("weights", weights), (None, None)):
        a.values = address(values if w is None else hidden)
        a.mask = a.weights = 0
        if field:
            setattr(a, field, address(w))
        getattr(_C, "cpu_batch_moments" + suffix)(a)
        exact = reference.batch_moments(values if w is None else hidden, w)
        torch.testing.assert_close(three, exact, rtol=1e-11, atol=1e-12)
    n = getattr(_C, "BatchNormalizeArgs" + suffix)()
    n.count, n.values, n.moments, n.out = 20_000, address(values), address(three), address(out)
    n.mode, n.eps = _C.MomentsMode.token, 1e-8
    getattr(_C, "cpu_batch_normalize" + suffix)(n)
    torch.testing.assert_close(out, reference.whiten(values), rtol=1e-6, atol=tolerance(name))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_questions_and_pairs_of_raw_pointers(name):
    suffix, real = ("64", torch.float64) if name == "float64" else ("", torch.float32)
    rewards, scores, group = torch.randint(0, 3, (90,)).to(real), torch.rand(90, dtype=real), torch.arange(90) % 11
    weights, scale, valid = torch.empty(90, dtype=real), torch.empty(1, dtype=real), torch.empty(90, dtype=torch.bool)
    q = getattr(_C, "QuestionArgs" + suffix)()
    q.count, q.rewards, q.main, q.group = 90, address(rewards), address(rewards), address(group)
    q.weights, q.scale, q.valid = address(weights), address(scale), address(valid)
    assert getattr(_C, "cpu_question_weights" + suffix)(q)
    expected = reference.question_weights(rewards.double(), group)
    torch.testing.assert_close(weights.double(), expected.weights, rtol=2e-7, atol=0)
    assert torch.equal(valid, expected.valid)
    out, values = torch.empty(90, dtype=real), torch.empty(90, dtype=torch.float64)
    kept, masked = torch.empty(90, dtype=torch.bool), torch.empty(90, dtype=torch.int64)
    p = getattr(_C, "MaskedPairArgs" + suffix)()
    p.count, p.rewards, p.scores, p.group, p.values = 90, address(rewards), address(scores), address(group), address(values)
    p.advantages, p.kept, p.masked, p.mode = address(out), address(kept), address(masked), _C.PairMode.abs
    getattr(_C, "cpu_masked_pairs" + suffix)(p)
    pairs = reference.pair_masked_advantages(rewards.double(), scores.double(), group, mode="abs")
    torch.testing.assert_close(out.double(), pairs.advantages, rtol=2e-7, atol=tolerance(name))
    assert torch.equal(masked, pairs.masked_pairs)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_cosines_add_up_in_one_order(name):
    """32 sums of rounded products, joined two by two: the same bits with every instruction set."""
    torch.manual_seed(0)
    emb = torch.randn(7, 77).to(TYPES[name][1])
    types, seed, quotas = (torch.tensor(x) for x in ([0] * 7, [3], [2]))
    norms, scores, chosen = torch.empty(7), torch.empty(7), torch.empty(2, dtype=torch.int64)
    a = _C.GreedyArgs()
    a.seeds, a.candidates, a.width, a.types, a.size, a.dtype = 1, 7, 77, 1, 2, TYPES[name][0]
    a.embeddings, a.type_id, a.seed, a.quotas = map(address, (emb, types, seed, quotas))
    a.inverse_norms, a.scores, a.chosen = map(address, (norms, scores, chosen))
    _C.cpu_greedy_norms(a)
    _C.cpu_greedy_select(a)
    x = emb.float().numpy()
    inverse = (1 / np.sqrt((x.astype(np.float64) ** 2).sum(1))).astype(np.float32)
    np.testing.assert_allclose(norms, inverse, rtol=1e-7)
    unit = x[3] * norms.numpy()[3]
    sums = np.zeros((7, 32), np.float32)
    for k in range(77):
        sums[:, k % 32] += x[:, k] * unit[k]
    for half in (16, 8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half : 2 * half]
    expected = sums[:, 0] * norms.numpy()
    expected[3] = 4  # taken
    assert scores.tolist() == expected.tolist()
    assert chosen.tolist() == [3, int(expected.argmin())]


def test_a_wrong_struct_is_a_type_error():
    with pytest.raises(TypeError, match="cpu_fold_logits"):
        _C.cpu_fold_logits(_C.GradArgs())
    with pytest.raises(TypeError, match="cpu_grad_logits64"):
        _C.cpu_grad_logits64(_C.GradArgs())


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none"])
def test_policy_loss_of_numpy_arrays(name, kind):
    """Weights per token, a bound per sequence, an anchor, k2."""
    suffix, real = ("64", np.float64) if name == "float64" else ("", np.float32)
    rng = np.random.default_rng(0)
    logp = -rng.random((3, 50)).astype(real)
    old, ref = ((logp + 0.3 * rng.normal(size=logp.shape)).astype(real) for _ in range(2))
    advantages, weights, high = rng.normal(size=3).astype(real), rng.random((3, 50)).astype(real), rng.random(3).astype(real)
    mask, anchor = rng.random((3, 50)) < 0.7, np.array([False, True, False])
    a = getattr(_C, "PolicyArgs" + suffix)()
    a.layout.sequences, a.layout.padded_length, a.layout.tokens = 3, 50, 150
    a.options.kind, a.options.agg, a.options.kl = getattr(_C.PolicyKind, kind), _C.Aggregation.trl_grpo, _C.KlKind.k2
    a.options.beta, a.options.dual_clip, a.options.anchor_gamma = 0.2, 1.5, 0.3
    grad, loss, inverse_norm, metrics = (np.empty(n, real) for n in (150, 1, 1, _C.POLICY_METRICS))
    arrays = {
        "logp": logp, "old_logp": old, "ref_logp": ref, "advantages": advantages, "weights": weights, "eps_high": high,
        "mask": mask, "grad": grad, "loss": loss, "inverse_norm": inverse_norm, "metrics": metrics,
    }  # fmt: skip
    if kind != "none":
        arrays["anchor"] = anchor
    for field, array in arrays.items():
        setattr(a, field, address(array))
    a.token_weights = True
    getattr(_C, "cpu_policy_loss" + suffix)(a)
    x = torch.from_numpy(logp).double().requires_grad_()
    clipped = kind in ("clip", "gspo", "gspo_token")
    expected = reference.policy_loss(
        x, *(torch.from_numpy(t).double() for t in (old, advantages)), torch.from_numpy(mask), kind=kind, agg="trl-grpo",
        kl="k2", beta=0.2, ref_logp=torch.from_numpy(ref).double(), dual_clip=1.5 if clipped else None, anchor_gamma=0.3,
        token_weight=torch.from_numpy(weights).double(), eps_high=torch.from_numpy(high).double(),
        anchor=torch.from_numpy(anchor) if kind != "none" else None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(expected.loss, x)
    np.testing.assert_allclose(loss[0], expected.loss.item(), rtol=tolerance(name), atol=tolerance(name))
    np.testing.assert_allclose(metrics, [m.item() for m in expected.metrics.values()], rtol=0, atol=tolerance(name))
    np.testing.assert_allclose(grad.reshape(3, 50) * inverse_norm, gradient.numpy(), rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_importance_weights_of_numpy_arrays(name):
    suffix, real = ("64", np.float64) if name == "float64" else ("", np.float32)
    rng = np.random.default_rng(0)
    old, rollout = (-rng.random((3, 50)).astype(real) for _ in range(2))
    mask, weights = rng.random((3, 50)) < 0.7, np.empty((3, 50), real)
    a = getattr(_C, "WeightArgs" + suffix)()
    a.layout.sequences, a.layout.padded_length, a.layout.tokens = 3, 50, 150
    a.old_logp, a.rollout_logp, a.mask, a.weights = map(address, (old, rollout, mask, weights))
    a.options.clip_max = 1.5
    getattr(_C, "cpu_importance_weights" + suffix)(a)
    expected = np.where(mask, np.minimum(np.exp(old.astype(np.float64) - rollout), 1.5), 0)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance(name))
    keep, advantages = np.full(3, 7, np.uint8), np.array([-1, -1, 1], real)
    o = getattr(_C, "OffPolicyArgs" + suffix)()
    o.layout, o.threshold = a.layout, 0.01
    o.advantages, o.logp, o.rollout_logp, o.mask, o.keep = map(address, (advantages, old, rollout, mask, keep))
    getattr(_C, "cpu_off_policy_mask" + suffix)(o)
    mean = ((rollout.astype(np.float64) - old) * mask).sum(1) / mask.sum(1)
    assert keep.tolist() == [int(a >= 0 or m <= 0.01) for a, m in zip(advantages, mean, strict=True)]


@pytest.mark.parametrize("name", TYPES)
def test_seeded_normal_of_raw_pointers(name):
    """A part that begins and ends within a vector's tile, in place; and the words."""
    suffix, real = ("64", torch.float64) if name == "float64" else ("", torch.float32)
    x, weights = torch.randn(1001).to(TYPES[name][1]), torch.randn(3, dtype=real)
    exact = reference.seeded_normal_combine(42, weights, scale=0.5, add_to=x, first_row=7, element_offset=4 * 2**32 - 333)
    a = getattr(_C, "NormalArgs" + suffix)()
    a.seed, a.first_row, a.rows, a.scale, a.first_element = 42, 7, 3, 0.5, 4 * 2**32 - 333
    a.count, a.dtype, a.weights, a.add_to, a.out = 1001, TYPES[name][0], address(weights), address(x), address(x)
    getattr(_C, "cpu_seeded_normal" + suffix)(a)
    step = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[name]
    torch.testing.assert_close(x.double(), exact, rtol=step, atol=1e-12 if name == "float64" else 3e-6)
    words = torch.zeros(50, 4, dtype=torch.int32)
    p = _C.PhiloxArgs()
    p.seed, p.row, p.first_block, p.blocks, p.words = 42, 2, 1, 50, address(words)
    _C.cpu_philox_words(p)
    blocks = torch.arange(1, 51)
    zero = torch.zeros_like(blocks)
    expected = torch.stack(reference.philox_words(42, blocks, zero, zero + 2, zero), 1)
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)
