"""importance_weights and off_policy_mask: worked numbers, the float64 definition, what must not leak, errors."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from policy_helpers import BF16, F32, F64, INF, NAN, boundaries, close, f64, names, only_cuda, widened
from prefkern import importance_weights, off_policy_mask, reference

OPS = torch.ops.prefkern
LEVELS = ("token", "sequence", "geometric")

both = pytest.mark.parametrize("library", [prefkern, reference], ids=["op", "definition"])

# Log-ratios [ln 2, -ln 2, ln 4] and [-ln 4, 0, outside]: products 4 and 1/4, geometric means 4^(1/3) and 1/2.
U = f64([math.log(2), -math.log(2), math.log(4)], [-math.log(4), 0, NAN])
ROLLOUT = f64([-1, -2, -3], [-0.5, -1, -0.2])
MASK = ~U.isnan()
OLD = U + ROLLOUT


@both
@pytest.mark.parametrize(("options", "expected"), [
    ({}, [[2, 0.5, 2], [0.25, 1, 0]]),
    ({"clip_max": 3.0}, [[2, 0.5, 3], [0.25, 1, 0]]),
    ({"clip_min": 0.5, "clip_max": None}, [[2, 0.5, 4], [0.5, 1, 0]]),
    ({"mode": "mask", "clip_min": 0.3, "clip_max": 2.5}, [[2, 0.5, 0], [0, 1, 0]]),
    ({"mode": "mask", "clip_max": 4.5, "clip_min": 0.25 - 1e-9}, [[2, 0.5, 4], [0.25, 1, 0]]),
    ({"level": "sequence"}, [[2] * 3, [0.25, 0.25, 0]]),
    ({"level": "sequence", "mode": "mask", "clip_max": 3.0, "log_clamp": None}, [[0] * 3, [0.25, 0.25, 0]]),
    ({"level": "geometric"}, [[4 ** (1 / 3)] * 3, [0.5, 0.5, 0]]),
    ({"log_clamp": math.log(1.5), "clip_max": None}, [[1.5, 1 / 1.5, 1.5], [1 / 1.5, 1, 0]]),
    ({"level": "sequence", "log_clamp": math.log(3), "clip_max": None}, [[3] * 3, [1 / 3, 1 / 3, 0]]),
    ({"normalize": True}, [[x / 1.15 for x in (2, 0.5, 2)], [0.25 / 1.15, 1 / 1.15, 0]]),
    ({"normalize": True, "level": "sequence"}, [[2 / 1.125] * 3, [0.25 / 1.125, 0.25 / 1.125, 0]]),
    ({"normalize": True, "mode": "mask", "clip_min": 10.0, "clip_max": None}, [[0] * 3] * 2),  # nothing left: no division
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_weights(library, options, expected, packed):
    expected = torch.tensor(expected, dtype=F64)
    if packed:
        weights = library.importance_weights(OLD[MASK], ROLLOUT[MASK], cu_seqlens=boundaries([3, 2]), **options)
        return close(weights, expected[MASK])
    return close(library.importance_weights(OLD, ROLLOUT, MASK, **options), expected)


@both
def test_which_sequences_to_keep(library):
    """Means of rollout - old: -ln 4 / 3 and ln 2."""
    for a, threshold, expected in (
        ([-1, -1], 0.69, [True, False]), ([-1, -1], 0.7, [True, True]), ([1, 0], -5.0, [True, True]),
        ([-1, -1], -0.5, [False, False]),
    ):  # fmt: skip
        advantages = torch.tensor(a, dtype=F64)
        assert library.off_policy_mask(advantages, OLD, ROLLOUT, MASK, threshold=threshold).tolist() == expected
        packed = library.off_policy_mask(
            advantages, OLD[MASK], ROLLOUT[MASK], threshold=threshold, cu_seqlens=boundaries([3, 2])
        )
        assert packed.tolist() == expected


@both
def test_a_token_that_was_not_scored_is_no_evidence(library):
    old, rollout = f64([-1, -1]), f64([NAN, -0.5])
    assert library.off_policy_mask(f64(-1), old, rollout, threshold=0.24).tolist() == [False]  # 0.5 over two tokens
    assert library.off_policy_mask(f64(-1), old, rollout, threshold=0.26).tolist() == [True]


def sample(shape, dtype, device, spread=0.5):
    old = -2 * torch.rand(shape, dtype=F64)
    return [t.to(dtype).to(device) for t in (old, old + spread * torch.randn(shape, dtype=F64))]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["padded", "masked", "packed", "packed and masked"])
def test_against_the_definition(device, dtype, level, layout):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    for shape, mode, normalize, clip in itertools.product(
        ((5, 37), (3, 5003)), ("truncate", "mask"), (False, True), (None, 0.6)
    ):
        old, rollout = sample(shape, dtype, device, 0.5 if level != "sequence" else 0.02)
        mask = torch.rand(shape, device=device) < 0.7 if "masked" in layout else None
        if mask is not None:
            mask[1] = False
        options = {"level": level, "mode": mode, "normalize": normalize, "clip_min": clip, "clip_max": 1.5, "log_clamp": 0.9}
        if "packed" in layout:
            n = old.numel()
            old, rollout = old.view(-1), rollout.view(-1)
            mask = None if mask is None else mask.view(-1)
            options["cu_seqlens"] = boundaries([n // 3 + 2, 0, n // 4, n - n // 3 - 2 - n // 4], device)
        weights = importance_weights(old, rollout, mask, **options)
        assert weights.dtype == (F64 if dtype == F64 else F32) and weights.shape == old.shape
        expected = reference.importance_weights(
            *(widened(x) for x in (old, rollout, mask)), **{name: widened(value) for name, value in options.items()}
        )
        tolerance = 1e-12 if dtype == F64 else 3e-6
        distance = (weights.cpu().double() - expected).abs()
        # In float32 a weight at the very edge of "mask" falls on either side.
        edge = (distance > tolerance).double().mean().item()
        assert edge == 0 or (dtype != F64 and mode == "mask" and edge < 2e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_changes_nothing(device, level):
    old, rollout = sample((4, 50), F32, device, 0.1)
    mask = torch.rand(4, 50, device=device) < 0.6
    mask[2] = False
    a = -torch.ones(4, device=device)
    for normalize in (False, True):
        expected = importance_weights(old, rollout, mask, level=level, normalize=normalize)
        for poison in (NAN, INF, -INF):
            one, other = (torch.where(mask, t, poison) for t in (old, rollout))
            weights = importance_weights(one, other, mask, level=level, normalize=normalize)
            assert torch.equal(weights, expected)
            assert weights[~mask].eq(0).all()
            keep = off_policy_mask(a, one, other, mask, threshold=0.01)
            assert torch.equal(keep, off_policy_mask(a, old, rollout, mask, threshold=0.01))


@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_visible(device, level):
    old, rollout = sample((3, 20), F32, device, 0.1)
    rollout[1, 7] = NAN
    weights = importance_weights(old, rollout, level=level)
    expected = torch.zeros(3, 20, dtype=torch.bool, device=device)
    expected[1, 7 if level == "token" else slice(None)] = True
    assert torch.equal(weights.isnan(), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_nothing_to_weigh(device, level, shape):
    old = torch.full(shape, NAN, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    assert importance_weights(old, old, mask, level=level, normalize=True).eq(0).all()
    assert off_policy_mask(-torch.ones(shape[0], device=device), old, old, mask, threshold=0.0).all()


def test_a_weight_that_overflows_is_clipped():
    old = torch.tensor([[500.0, -500.0]])
    assert importance_weights(old, torch.zeros(1, 2), log_clamp=None).tolist() == [[2, 0]]
    assert importance_weights(old, torch.zeros(1, 2), log_clamp=None, clip_max=None).tolist() == [[INF, 0]]


def test_same_bits_on_any_number_of_threads(threads):
    old, rollout = sample((37, 3001), F32, "cpu")
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append([importance_weights(old, rollout, level=level, normalize=True) for level in LEVELS])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_are_constants(device):
    old, rollout = (t.requires_grad_() for t in sample((2, 5), F32, device))
    assert not importance_weights(old, rollout).requires_grad
    assert not off_policy_mask(torch.ones(2, device=device), old, rollout, threshold=0.0).requires_grad
    new, _ = sample((2, 5), F32, device)
    out = prefkern.policy_loss(
        new.requires_grad_(), old, torch.ones(2, device=device), token_weight=importance_weights(old, rollout)
    )
    out.loss.backward()
    assert old.grad is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_opcheck(device, packed, level):
    old, rollout = sample((12,) if packed else (3, 4), F32, device)
    mask = torch.rand(old.shape, device=device) < 0.7
    ends = boundaries([5, 0, 7], device) if packed else None
    opcheck(OPS.importance_weights.default, (old, rollout, mask, ends, level, 0, 0.1, 2.0, 20.0, True))
    opcheck(OPS.off_policy_mask.default, (-torch.ones(3, device=device), old, rollout, mask, ends, 0.1))


def test_one_graph_for_any_shape(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(old, rollout, mask, advantages):
        weights = importance_weights(old, rollout, mask, level="sequence", normalize=True)
        return weights * 2, off_policy_mask(advantages, old, rollout, mask, threshold=0.1)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 5), (4, 9), (6, 13)):
        old, rollout = sample(shape, F32, device, 0.1)
        arguments = (old, rollout, torch.rand(shape, device=device) < 0.7, torch.randn(shape[0], device=device))
        for a, b in zip(run(*arguments), compiled(*arguments), strict=True):
            assert_close(a, b, rtol=0, atol=0)
    assert counter.frame_count <= 2


Z, A = torch.zeros(2, 3), torch.zeros(2)
BAD = {
    "old_logp list": (dict(old_logp=[0.0]), TypeError, r"old_logp is a list"),
    "old_logp 1-d": (dict(old_logp=torch.zeros(6)), ValueError, r"old_logp has shape \[6\]; expected \[B, T\]"),
    "old_logp int": (dict(old_logp=Z.int()), TypeError, r"old_logp has dtype Int"),
    "rollout_logp shape": (dict(rollout_logp=A), ValueError, r"rollout_logp has shape \[2\]; old_logp has shape \[2, 3\]"),
    "rollout_logp none": (dict(rollout_logp=None), TypeError, r"rollout_logp is a NoneType"),
    "rollout_logp device": (dict(rollout_logp=Z.to("meta")), ValueError, r"rollout_logp is on meta but old_logp is on cpu"),
    "mask float": (dict(mask=Z), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask list": (dict(mask=[True]), TypeError, r"mask is a list"),
    "cu_seqlens": (dict(cu_seqlens=boundaries([6])), ValueError, r"old_logp has shape \[2, 3\]; with cu_seqlens \[N\]"),
    "level": (dict(level="batch"), ValueError, r"level is 'batch'; accepted: 'token', 'sequence', 'geometric'"),
    "mode": (dict(mode="clip"), ValueError, r"mode is 'clip'; accepted: 'truncate', 'mask'"),
    "clip_min": (dict(clip_min=3.0), ValueError, r"clip_min is 3 and clip_max is 2; the first must not be larger"),
    "clip_min string": (dict(clip_min="0"), TypeError, r"clip_min is '0'; a number or None"),
    "clip_max": (dict(clip_max=0.0), ValueError, r"clip_max is 0; it must be positive, or None"),
    "clip_max nan": (dict(clip_max=NAN), ValueError, r"clip_max is nan"),
    "log_clamp": (dict(log_clamp=-1.0), ValueError, r"log_clamp is -1; it must be positive, or None"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    with pytest.raises(error, match=message):
        importance_weights(**{"old_logp": Z, "rollout_logp": Z, **wrong})
    if not {"level", "mode", "clip_min", "clip_max", "log_clamp"} & set(wrong):
        with pytest.raises(error, match=message):
            off_policy_mask(A, **{"old_logp": Z, "rollout_logp": Z, **wrong}, threshold=0.0)


@pytest.mark.parametrize(("advantages", "threshold", "error", "message"), [
    (torch.zeros(3), 0.0, ValueError, r"advantages has shape \[3\]; expected \[2\]"),
    (A.long(), 0.0, TypeError, r"advantages has dtype Long"),
    (1.0, 0.0, TypeError, r"advantages is a float"),
    (A, NAN, ValueError, r"threshold is nan; it must be a number"),
    (A, "0", TypeError, r"threshold is '0'"),
])  # fmt: skip
def test_errors_of_off_policy_mask(advantages, threshold, error, message):
    with pytest.raises(error, match=message):
        off_policy_mask(advantages, Z, Z, threshold=threshold)


@pytest.mark.parametrize(("position", "value"), [(4, 3), (5, 2)])
def test_the_op_itself_refuses_unknown_options(position, value):
    arguments = [Z, Z, None, None, 0, 0, 0.0, 2.0, 20.0, False]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=r"(level|mode) is"):
        OPS.importance_weights(*arguments)


@only_cuda
@pytest.mark.parametrize("ends", [[0, 4, 9], [1, 4, 8], [0, 5, 4, 8], [0, 4, 7]])
def test_a_wrong_layout(device, validation, ends):
    logp, cu_seqlens = torch.zeros(8, device=device), torch.tensor(ends, dtype=torch.int32, device=device)
    assert importance_weights(logp, logp, cu_seqlens=cu_seqlens, level="sequence").isnan().all()
    advantages = torch.ones(len(ends) - 1, device=device)
    assert not off_policy_mask(advantages, logp, logp, cu_seqlens=cu_seqlens, threshold=0.0).any()
    validation(True)
    with pytest.raises(ValueError, match=r"cu_seqlens is \["):
        importance_weights(logp, logp, cu_seqlens=cu_seqlens)
