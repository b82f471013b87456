"""preference_loss and unpaired_loss against their float64 definitions and worked numbers, and everything they must refuse."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from preference_helpers import INF, KINDS, NAN, SCORES, run, sample_pairs
from prefkern import label_posterior, preference_loss, reference, unpaired_loss

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPS = torch.ops.prefkern
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
each_score = pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
UNPAIRED = {
    "kto": {"kl": 0.4, "undesirable_weight": 1.33}, "bco": {"kind": "bco", "offset": 0.2}, "apo_zero": {"kind": "apo_zero"},
    "squared": {"kind": "squared", "offset": -0.3, "factor": 2.0}, "averaged": {"average": "logp", "beta": 1.0},
}  # fmt: skip


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


PAIRS = {
    "chosen_logp": f64(-10, -8), "rejected_logp": f64(-12, -7),
    "ref_chosen_logp": f64(-11, -7.5), "ref_rejected_logp": f64(-11.5, -8),
}  # fmt: skip
LENGTHS = {"chosen_lengths": torch.tensor([4, 2]), "rejected_lengths": torch.tensor([3, 5])}
RATIOS = {"chosen_logp": f64(1, -0.5), "rejected_logp": f64(-0.5, 1)}
SECOND_TIES = torch.tensor([False, True])
MEANS = {"chosen_logp": f64(-0.3, -1.2), "rejected_logp": f64(-0.9, -2.5)}

# ------------------------------------------------------------------------------------------------------- worked numbers

WORKED = [
    (PAIRS, {}, [0.6209570478, 0.7709570478], [-0.0462570155, -0.0537429845]),
    (PAIRS, {"label_smoothing": 0.1}, [0.6359570478, 0.7559570478], [-0.0362570155, -0.0437429845]),
    (PAIRS, {"kind": "robust", "label_smoothing": 0.1}, [0.6022070478, 0.7897070478], [-0.0587570155, -0.0662429845]),
    (PAIRS, {"kind": "hinge"}, [0.85, 1.15], [-0.1, -0.1]),
    (PAIRS, {"kind": "ipo", "average": "score", **LENGTHS}, [21.0069444444, 29.7025], [-2.2916666667, -5.45]),
    (PAIRS, {"kind": "ipo"}, [12.25, 42.25], [-7, -13]),
    (PAIRS, {"kind": "exo_pair", "label_smoothing": 1e-3}, [2.5055165555, 3.0225540819], [-0.1679722526, -0.1754302228]),
    (PAIRS, {"kind": "nca_pair"}, [1.3508248141, 1.4248878021], [-0.0212531219, -0.0268746095]),
    (PAIRS, {"kind": "bco_pair", "offset": 0.07}, [1.3132057779, 1.4632057779], [-0.0492500562, -0.0529964052]),
    (PAIRS, {"kind": "sppo_hard"}, [36.25, 66.25], [-8, -11]),
    (PAIRS, {"kind": "apo_zero"}, [0.9625234160, 1.0374765840], [-0.0249376040, -0.0249843815]),
    (PAIRS, {"kind": "apo_down"}, [0.9875493421, 1.0249324489], [7.7703352e-05, 1.2448084e-04]),
    (PAIRS, {"kind": "discopop"}, [0.8493375793, 0.7894947401], [-0.0625203020, -0.0213872248]),
    (PAIRS, {"average": "score", **LENGTHS}, [0.6725308454, 0.7159002842], [-0.0122396210, -0.0255624051]),
    (PAIRS, {"kind": "dpop", "penalty": 5}, [0.6209570478, 0.9130152524], None),
    (PAIRS, {"offset": f64(-0.02, 0.06)}, [0.6117553389, 0.8036495810], None),  # R-DPO, 0.02 a token
    (PAIRS, {"offset": 0.4}, [0.8259394199, 1.0054924815], None),
    (PAIRS, {"score": "forward_kl"}, [0.6311543836, 0.7592385665], [2 * -0.0086087957, 2 * -0.0438541178]),
    (PAIRS, {"score": "js_divergence"}, [0.6606521625, 0.7267336922], None),
    (PAIRS, {"score": "alpha_divergence", "alpha": 0.3}, [0.6254376939, 0.7657763679], None),
    (PAIRS, {"score": "alpha_divergence", "alpha": 0.7}, [0.6294248733, 0.7612080512], None),
    (PAIRS, {"scale": 2.0, "offset": f64(0.7, -0.7)}, [0.9130152524, 0.5130152524], [2 * -0.0598687660, 2 * -0.0401312340]),
    (MEANS, {"score": "log_odds", "beta": 1.0}, [0.214864962, 0.188533549], None),  # ORPO's term, before its beta 0.1
    (MEANS, {"kind": "asft", "score": "log_odds", "beta": 1.0}, [1.1218354429, 2.4856504837], [-2, -2]),
    (MEANS, {"kind": "asft", "score": "log_odds", "beta": 0.1, "factor": 0.5}, [0.9582158433, 1.8579058147], None),
    (MEANS, {"beta": 2.0, "offset": 1.0}, [0.5981388694, 0.1839007409], None),
    (MEANS, {"beta": 2.0, "offset": 0.5, "score": "alpha_divergence", "alpha": 0.25}, [0.3424542127, 0.0257327402], None),
    (RATIOS, {"beta": 1.0, "kind": "squared", "offset": 1.0}, [0.25, 6.25], None),
    (RATIOS, {"beta": 1.0, "kind": "exponential"}, [0.2231301601, 4.4816890703], None),
    (RATIOS, {"beta": 1.0, "kind": "truncated_quadratic"}, [0, 6.25], None),
    (RATIOS, {"beta": 1.0, "kind": "savage"}, [0.0332790717, 0.6684280241], None),
    (RATIOS, {"beta": 0.5, "kind": "cal_dpo"}, [0.4514132780, 7.9514132780], None),
    (RATIOS, {"beta": 0.5, "score": "chi"}, [0.1521462509, 1.9580218353], None),
    (RATIOS, {"beta": 1.0, "kind": "rao_kupper", "nu": 3.0, "tie": SECOND_TIES}, [0.5124585780, 1.1033700232], None),
    (RATIOS, {"beta": 1.0, "kind": "davidson", "nu": 1.0, "tie": SECOND_TIES}, [0.7737420122, 0.8305948317], None),
    (RATIOS, {"beta": 1.0, "kind": "focal", "gamma": 0.05}, [0.1993950918, 1.5626585692], None),
    (RATIOS, {"beta": 1.0, "rejected_beta": 0.75}, [0.2254126516, 1.5019290813], None),
    (RATIOS, {"scale": 2 * f64(0.8, 0.6) - 1, "beta": 1.0}, [0.3411538747, 0.8543552445], None),
    (MEANS, {"kind": "linear", "score": "exp", "beta": 1.0}, [-0.3342485609, -0.2191092133], None),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "options", "losses", "chosen_grad"), WORKED)
def test_worked_numbers(pairs, options, losses, chosen_grad):
    out, grads = run(preference_loss, pairs, reduction="none", **options)
    close(out.loss.detach(), f64(*losses), 5e-9)
    if chosen_grad is not None:
        close(grads[0], f64(*chosen_grad), 1e-9)


def test_worked_unpaired_numbers():
    x, good = f64(1, -0.5, 2), torch.tensor([True, False, False])
    out = unpaired_loss(x, None, good, kl=0.4, undesirable_weight=1.33, reduction="none")
    close(out.loss, f64(0.4850044984, 0.6350951830, 0.7180867965))
    # NPO of beta 1/2, and SimNPO of beta 2 and gamma 0.1 on mean log-probs: undesirable responses alone.
    bad = torch.zeros(2, dtype=torch.bool)
    npo = unpaired_loss(f64(-0.5, 1), None, bad, kind="bco", beta=0.5, factor=4.0, reduction="none")
    close(npo.loss, f64(2.3037576795, 3.8963079367))
    simnpo = unpaired_loss(f64(-0.9, -2.5), None, bad, kind="bco", beta=2.0, factor=1.0, offset=-0.1, reduction="none")
    close(simnpo.loss, f64(0.1677860294, 0.0074189941))


def test_reductions_divide_as_they_say():
    pairs, weight = sample_pairs(5), f64(1, 2, 0, 0.5, 3)
    mask = torch.tensor([True, True, True, False, True])
    each = preference_loss(**pairs, weight=weight, mask=mask, reduction="none").loss
    assert each[2] == 0 and each[3] == 0
    for options, divisor in (
        ({}, 4), ({"reduction": "weighted_mean"}, 6), ({"reduction": "sum"}, 1), ({"norm": 8.0}, 8),
        ({"norm": torch.tensor(2.5)}, 2.5),
    ):  # fmt: skip
        close(preference_loss(**pairs, weight=weight, mask=mask, **options).loss, each.sum() / divisor, 1e-12)
    assert preference_loss(**pairs, norm=0.0).loss == 0


# ------------------------------------------------------------------------------------------------ against the definition


@each_kind
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("average", [None, "logp", "score"])
def test_kinds(device, options, dtype, average):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    size = 37
    pairs = {name: t.to(dtype).to(device) for name, t in sample_pairs(size).items()}
    mask = (torch.arange(size) % 5 != 3).to(device)
    for t in pairs.values():
        t[~mask] = NAN
    options = {**options, "mask": mask, "weight": torch.rand(size, device=device), "reduction": "weighted_mean"}
    if average == "score" and options.get("kind") == "asft":
        pytest.skip("refused")
    if average:
        lengths = {f"{side}_lengths": torch.randint(1, 9, (size,), device=device) for side in ("chosen", "rejected")}
        options |= {"average": average, **lengths}
    if options.get("kind") in ("rao_kupper", "davidson"):
        options["tie"] = (torch.arange(size) % 3 == 0).to(device)
    check(preference_loss, reference.preference_loss, pairs, dtype, options)


@each_score
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["sigmoid", "nca_pair", "squared_targets"])
def test_scores(device, options, dtype, kind):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    pairs = {name: t.to(dtype).to(device) for name, t in sample_pairs(45).items()}
    check(preference_loss, reference.preference_loss, pairs, dtype, {**options, "kind": kind, "rejected_beta": 0.2})


@pytest.mark.parametrize("options", UNPAIRED.values(), ids=UNPAIRED)
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_single_responses(device, options, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    size = 41
    logp = sample_pairs(size)
    rows = {"logp": logp["chosen_logp"].to(dtype).to(device), "ref_logp": logp["ref_chosen_logp"].to(dtype).to(device)}
    mask = torch.arange(size, device=device) % 7 != 2
    rows["logp"][~mask] = NAN
    options = {
        **options,
        "desirable": torch.rand(size, device=device) < 0.4,
        "mask": mask,
        "weight": torch.rand(size, device=device),
    }
    if "average" in options:
        options["lengths"] = torch.randint(1, 9, (size,), device=device)
    check(unpaired_loss, reference.unpaired_loss, rows, dtype, options)


def check(function, definition, inputs, dtype, options):
    """Losses, gradients and metrics, each pair's and the mean's."""
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == F32 else {"rtol": 1e-11, "atol": 1e-12}
    precise = {name: t.double() for name, t in inputs.items()}
    for reduction in {"none", options.get("reduction", "mean")}:
        given = {**options, "reduction": reduction}
        out, grads = run(function, inputs, 1.7, **given)
        expected, expected_grads = run(definition, precise, 1.7, **given)
        assert out.loss.dtype == dtype and out.loss.shape == expected.loss.shape
        assert_close(out.loss.double(), expected.loss, **tolerance)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert_close(grad.double(), wanted, **tolerance)
            if "mask" in options:
                assert (grad[~options["mask"]] == 0).all()
        assert list(out.metrics) == list(expected.metrics)
        for name, value in out.metrics.items():
            assert value.dim() == 0 and not value.requires_grad
            assert_close(value.double(), expected.metrics[name].double(), msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@each_kind
def test_gradcheck(options):
    pairs = sample_pairs(5)

    def loss(chosen, rejected):
        both = {**pairs, "chosen_logp": chosen, "rejected_logp": rejected}
        return preference_loss(**both, reduction="none", **options).loss

    if options.get("clip"):
        options = {**options, "clip": 0.02}
    assert torch.autograd.gradcheck(loss, [pairs[f"{side}_logp"].requires_grad_() for side in ("chosen", "rejected")])


@each_score
def test_gradcheck_of_scores(options):
    chosen, rejected = (sample_pairs(5)[f"{side}_logp"].requires_grad_() for side in ("chosen", "rejected"))
    assert torch.autograd.gradcheck(
        lambda a, b: preference_loss(a, b, kind="nca_pair", reduction="none", **options).loss, (chosen, rejected)
    )


@pytest.mark.parametrize("options", UNPAIRED.values(), ids=UNPAIRED)
def test_gradcheck_of_single_responses(options):
    logp, good = sample_pairs(5)["chosen_logp"].requires_grad_(), torch.tensor([1, 0, 1, 1, 0]).bool()
    lengths = {"lengths": torch.tensor([1, 2, 3, 4, 5])} if "average" in options else {}
    assert torch.autograd.gradcheck(lambda x: unpaired_loss(x, None, good, reduction="none", **lengths, **options).loss, logp)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_low_precision_is_computed_in_float32(device, dtype):
    pairs = {name: t.to(device, dtype) for name, t in sample_pairs(33).items()}
    out, grads = run(preference_loss, pairs)
    expected, expected_grads = run(preference_loss, {name: t.float() for name, t in pairs.items()})
    assert out.loss.dtype == F32 and torch.equal(out.loss, expected.loss)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype and torch.equal(grad, wanted.to(dtype))


def test_types_may_differ(device):
    chosen, rejected = torch.randn(9, device=device), torch.randn(9, device=device)
    expected = preference_loss(chosen, rejected.bfloat16().float()).loss
    assert torch.equal(preference_loss(chosen, rejected.bfloat16()).loss, expected)
    if device == "cpu":
        assert preference_loss(chosen.double(), rejected).loss.dtype == F64


# --------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("far", [1e4, -1e4, 90.0, -90.0])
def test_far_margins_stay_finite(device, dtype, far):
    """At |x| = 1e4 every loss that is not itself exponential has a value and a gradient, and they are those of its limit."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    zero = torch.zeros(1, dtype=dtype, device=device)
    pairs = {"chosen_logp": zero + far, "rejected_logp": zero}
    for name, options in {**KINDS, **SCORES}.items():
        if name in ("exponential", "asft", "log_odds", "capped odds"):
            continue
        cap = {"exp_cap": 20.0} if options.get("score") in ("chi", "exp", "forward_kl", "alpha_divergence") else {}
        out, grads = run(preference_loss, pairs, **{**options, **cap, "beta": 1.0})
        assert out.loss.isfinite() and all(g.isfinite().all() for g in grads), (name, out.loss, grads)
    out, grads = run(preference_loss, pairs, beta=1.0)
    assert out.loss.item() == (0 if far > 90 else pytest.approx(max(0.0, -far), abs=1e-30))
    assert grads[0].item() == pytest.approx(0 if far > 0 else -1, abs=1e-30) and grads[1].item() == -grads[0].item()


def test_infinite_log_probs():
    """The chosen response impossible: infinite loss, finite gradient. The rejected one: 0. Both: undefined."""
    pairs = {"chosen_logp": f64(-INF, -1, -INF), "rejected_logp": f64(-1, -INF, -INF)}
    out, grads = run(preference_loss, pairs, reduction="none", beta=1.0)
    assert out.loss[0] == INF and out.loss[1] == 0 and out.loss[2].isnan()
    assert grads[0][:2].tolist() == [-1, 0]
    assert preference_loss(**pairs, weight=f64(0, 1, 0), reduction="sum").loss == 0


def test_log_odds_near_certainty():
    """log(1 - e^a) keeps its digits where e^a is 1 but for rounding, and at 0 ASFT's gradient has its limit."""
    for dtype, tolerance in ((F64, 1e-13), (F32, 3e-7)):
        a = torch.tensor([-1e-12, -1e-6, -1e-3, -0.3, -0.7, -5.0, -50.0], dtype=dtype)
        odds = preference_loss(
            a, torch.full_like(a, -math.log(2)), kind="linear", score="log_odds", beta=1.0, reduction="none"
        ).loss
        exact = torch.stack([x - torch.log(-torch.expm1(x)) for x in a.double()])
        assert_close(-odds.double(), exact, rtol=tolerance, atol=tolerance)
    capped = {"kind": "asft", "score": "log_odds", "beta": 1.0, "max_p": 0.5}
    _, grads = run(preference_loss, {"chosen_logp": f64(0), "rejected_logp": f64(-1)}, **capped)
    close(grads[0], f64(-1 - 1 / (1 + 1 / 0.5)))  # log-odds log 2 and slope 1: -1 - sigmoid(-log 2)
    for beta, expected in ((1.0, -2.0), (2.0, -1.0)):
        _, grads = run(
            preference_loss, {"chosen_logp": f64(0), "rejected_logp": f64(-1)}, kind="asft", score="log_odds", beta=beta
        )
        assert grads[0].tolist() == [expected]


def test_clamped_counts_pairs():
    x = {"chosen_logp": f64(-3, -1, 2), "rejected_logp": f64(0, 0, -5)}
    out, grads = run(preference_loss, x, score="forward_kl", exp_cap=2.0, reduction="none")
    assert out.metrics["clamped"] == 2
    assert grads[0].tolist()[0] == 0 and grads[1].tolist()[2] == 0 and grads[0][1] != 0
    both = {"chosen_logp": f64(-9), "rejected_logp": f64(-8)}
    out, grads = run(preference_loss, both, score="alpha_divergence", alpha=1.0, exp_cap=2.0)
    close(out.loss.detach(), math.log(2)), close(torch.cat(grads), f64(0, 0))


def test_no_pairs(device):
    empty = torch.empty(0, device=device)
    out, grads = run(preference_loss, {"chosen_logp": empty, "rejected_logp": empty})
    assert out.loss == 0 and all(v == 0 for v in out.metrics.values()) and grads[0].shape == (0,)
    none = torch.zeros(3, dtype=torch.bool, device=device)
    out, grads = run(
        preference_loss,
        {"chosen_logp": torch.full((3,), NAN, device=device), "rejected_logp": torch.ones(3, device=device)},
        mask=none,
    )
    assert out.loss == 0 and all(v == 0 for v in out.metrics.values()) and (torch.cat(grads) == 0).all()


def test_nan_shows(device):
    pairs = {"chosen_logp": torch.tensor([-1.0, NAN, -2], device=device), "rejected_logp": torch.zeros(3, device=device)}
    for name, options in KINDS.items():
        out, _ = run(preference_loss, pairs, reduction="none", **options)
        assert out.loss.isnan().tolist() == [False, True, False] or name == "asft", name
        assert preference_loss(**pairs, **options).loss.isnan(), name


# ------------------------------------------------------------------------------------------------------------- properties


@given(st.integers(1, 40), st.floats(0.01, 5), st.floats(0, 1))
def test_properties(size, beta, e):
    """Swapping sides trades smoothing for its complement; squared_targets of targets 1/(2 beta) is sppo_hard; permuting pairs
    permutes gradients; robust without smoothing is DPO; the alpha divergence is a path from DPO to the forward KL."""
    pairs = sample_pairs(size)
    swapped = {
        name: pairs[name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")] for name in pairs
    }
    out, grads = run(preference_loss, pairs, beta=beta, label_smoothing=e)
    other, other_grads = run(preference_loss, swapped, beta=beta, label_smoothing=1 - e)
    close(out.loss.detach(), other.loss.detach(), 1e-12), close(grads[0], other_grads[1], 1e-12)
    close(out.metrics["reward_margin"], -other.metrics["reward_margin"], 1e-12)
    half = 0.5 / beta
    targets = {"kind": "squared_targets", "chosen_target": half, "rejected_target": -half, "beta": 1.0}
    assert_close(preference_loss(**pairs, beta=beta, kind="sppo_hard").loss, preference_loss(**pairs, **targets).loss)
    order = torch.randperm(size)
    _, permuted = run(preference_loss, {name: t[order] for name, t in pairs.items()}, beta=beta, label_smoothing=e)
    close(permuted[0], grads[0][order], 1e-15)
    close(preference_loss(**pairs, kind="robust").loss, preference_loss(**pairs).loss, 1e-12)

    def divergence(**options):
        return preference_loss(**pairs, beta=beta, **options).loss

    close(divergence(score="alpha_divergence", alpha=1.0), divergence(score="forward_kl"), 1e-12)
    close(divergence(score="alpha_divergence", alpha=0.0), divergence(), 1e-12)
    assert abs(divergence(score="alpha_divergence", alpha=1e-5) - divergence()) < 1e-4
    assert divergence(kind="hinge") >= 0


def test_ties_and_wins_have_all_the_probability():
    pairs = sample_pairs(9)
    swapped = {
        name: pairs[name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")] for name in pairs
    }
    for kind, nu in (("rao_kupper", 1.7), ("davidson", 0.4)):
        losses = [
            preference_loss(**p, kind=kind, nu=nu, beta=1.0, tie=torch.full((9,), tie), reduction="none").loss
            for p, tie in ((pairs, False), (swapped, False), (pairs, True))
        ]
        close(sum((-loss).exp() for loss in losses), torch.ones(9, dtype=F64), 1e-12)


def test_numbers_and_tensors_mean_the_same(device):
    pairs = {name: t.float().to(device) for name, t in sample_pairs(7).items()}
    for name, value, options in (
        ("scale", 1.7, {}), ("offset", 0.3, {}), ("label_smoothing", 0.2, {}),
        ("chosen_target", 0.4, {"kind": "squared_targets"}),
        ("rejected_target", -0.4, {"kind": "cal_dpo"}), ("label_smoothing", 0.2, {"kind": "robust"}),
        ("offset", 0.3, {"kind": "ipo"}), ("norm", 5.0, {}),
    ):  # fmt: skip
        expected = preference_loss(**pairs, **{name: value}, **options)
        for tensor in (torch.tensor(value), torch.full((7,), value)):
            if name == "norm" and tensor.dim():
                continue
            out = preference_loss(**pairs, **{name: tensor.to(device)}, **options)
            assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)


# -------------------------------------------------------------------------------------------------------- as a torch op


def op_args(device="cpu", with_grad=True, **given):
    tensors = dict.fromkeys(
        ("ref_chosen", "ref_rejected", "desirable", "chosen_lengths", "rejected_lengths", "scale", "offset", "smoothing",
         "chosen_target", "rejected_target", "weight", "tie", "mask", "norm_tensor")
    ) | given  # fmt: skip
    first, second = torch.rand(2, 6, device=device).unbind()
    numbers = (0.1, 0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 80.0, INF, 1.0, INF, 1.0, 1.0, 1.0, -1.0)
    rejected = None if given.get("desirable") is not None else second.clone().requires_grad_()
    return (first.clone().requires_grad_(), rejected, *tensors.values(), 0, 0, 0, 0, *numbers, with_grad)


def test_opcheck(device):
    with_weights = {
        "ref_chosen": torch.rand(6, device=device),
        "weight": torch.rand(6, device=device),
        "offset": torch.tensor(0.2, device=device),
    }
    opcheck(OPS.preference_loss.default, op_args(device, **with_weights))
    opcheck(OPS.preference_loss.default, op_args(device, desirable=torch.rand(6, device=device) < 0.5))
    with torch.no_grad():
        opcheck(OPS.preference_loss_fwd.default, op_args(device, with_grad=False))
    for upstream in (torch.ones((), device=device), torch.ones(6, device=device)):
        opcheck(
            OPS.preference_loss_backward.default, (upstream, torch.rand(2, 6, device=device), torch.ones((), device=device))
        )


def test_compiles_whole_with_any_number_of_pairs(device):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(chosen, rejected, offset):
        out = preference_loss(chosen * 2, rejected, kind="apo_down", offset=offset)
        single = unpaired_loss(chosen, None, rejected > 0.5, kl=0.1)
        return out.loss + single.loss + out.metrics["reward_margin"]

    for size in (4, 7, 64):
        a, b = torch.rand(size, device=device, requires_grad=True), torch.rand(size, device=device, requires_grad=True)
        offset = torch.tensor(0.3, device=device)
        grads = torch.autograd.grad(step(a, b, offset), (a, b))
        a2, b2 = a.detach().requires_grad_(), b.detach().requires_grad_()
        out = preference_loss(a2 * 2, b2, kind="apo_down", offset=offset)
        expected = out.loss + unpaired_loss(a2, None, b2 > 0.5, kl=0.1).loss + out.metrics["reward_margin"]
        assert_close(step(a, b, offset), expected)
        for grad, wanted in zip(grads, torch.autograd.grad(expected, (a2, b2)), strict=True):
            assert_close(grad, wanted)
    assert counter.frame_count <= 2


def test_only_what_is_asked_for(device, op_log):
    pairs = {name: t.float().to(device) for name, t in sample_pairs(6).items()}
    preference_loss(**pairs)
    with torch.no_grad():
        preference_loss(**{**pairs, "chosen_logp": pairs["chosen_logp"].clone().requires_grad_()})
    assert [args[-1] for name, args in op_log.calls] == [False, False]
    out, _ = run(preference_loss, pairs, weight=torch.ones(6, device=device, requires_grad=True))
    assert op_log.calls[-1][0].startswith("preference_loss_backward") and not any(v.requires_grad for v in out.metrics.values())
    refs = {name: t.clone().requires_grad_(True) for name, t in pairs.items()}
    preference_loss(**refs).loss.backward()
    assert refs["ref_chosen_logp"].grad is None and refs["chosen_logp"].grad is not None


def test_gradients_are_written_over_what_was_saved_unless_the_graph_is_kept(device, op_log):
    chosen, rejected = (torch.randn(9, device=device, requires_grad=True) for _ in range(2))
    loss = preference_loss(chosen, rejected, beta=1.0).loss
    first = torch.autograd.grad(2 * loss, (chosen, rejected), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (chosen, rejected), retain_graph=True)
    last = torch.autograd.grad(2 * loss, (chosen, rejected))
    assert all(map(torch.equal, first, again)) and all(map(torch.equal, first, last))
    backward = "preference_loss_backward"
    assert [name for name in op_log.names() if name.startswith(backward)] == [backward, backward, f"{backward}_"]
    unnormalised, inverse, g = torch.randn(2, 9, device=device), torch.tensor(0.5, device=device), torch.rand(9, device=device)
    expected = OPS.preference_loss_backward(g, unnormalised, inverse)
    OPS.preference_loss_backward_(g, unnormalised, inverse)
    assert torch.equal(unnormalised, expected)
    with pytest.raises(RuntimeError, match="unnormalised is not contiguous"):
        OPS.preference_loss_backward_(g, torch.randn(9, 2, device=device).T, inverse)


def test_one_side_may_be_a_constant(device):
    chosen, rejected = torch.randn(5, device=device, requires_grad=True), torch.randn(5, device=device)
    preference_loss(chosen, rejected).loss.backward()
    assert chosen.grad is not None and rejected.grad is None


def test_a_second_differentiation_is_refused():
    chosen, rejected = torch.randn(5, requires_grad=True), torch.randn(5)
    (grad,) = torch.autograd.grad(preference_loss(chosen, rejected).loss, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="preference_loss_backward cannot be differentiated twice"):
        grad.sum().backward()


def test_equal_bits_for_any_number_of_threads(threads):
    pairs = {name: t.float() for name, t in sample_pairs(30_000).items()}
    results = []
    for count in (1, 2, 5, 1):
        threads(count)
        results.append(run(preference_loss, pairs, kind="nca_pair"))
    for out, grads in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss) and all(map(torch.equal, grads, results[0][1]))
        assert all(torch.equal(v, results[0][0].metrics[name]) for name, v in out.metrics.items())


def test_concatenated_and_strided(device):
    both = torch.randn(12, device=device)
    expected = preference_loss(both[:6].clone(), both[6:].clone()).loss
    assert torch.equal(preference_loss(*both.chunk(2)).loss, expected)
    wide = torch.stack([both, both], 1)
    assert torch.equal(preference_loss(wide[:6, 0], wide[6:, 1]).loss, expected)


# ---------------------------------------------------------------------------------------------------------------- refused

ROW = torch.zeros(3)
REFUSED = [
    ({"kind": "sigmoidal"}, ValueError, r"kind is 'sigmoidal'; accepted: .*; did you mean 'sigmoid'\?"),
    ({"kind": "sigmoid_norm"}, ValueError, "that is kind 'sigmoid' with average='score', or prefkern.papers.ln_dpo"),
    ({"kind": "kto_pair"}, ValueError, "that is prefkern.unpaired_loss, or prefkern.papers.kto"),
    ({"score": "forward"}, ValueError, r"score is 'forward'; .* did you mean 'forward_kl'\?"),
    ({"average": "tokens"}, ValueError, "average is 'tokens'; accepted: None, 'logp', 'score'"),
    ({"reduction": "men"}, ValueError, r"reduction is 'men'; .* did you mean 'mean'\?"),
    ({"chosen_logp": [1.0]}, TypeError, "chosen_logp is a list; a torch.Tensor is expected"),
    ({"rejected_logp": None}, TypeError, "rejected_logp is a NoneType; a torch.Tensor is expected"),
    ({"ref_chosen_logp": 0.0}, TypeError, "ref_chosen_logp is a float; a torch.Tensor is expected"),
    ({"chosen_logp": torch.zeros(3, dtype=torch.int64)}, TypeError, "chosen_logp has dtype"),
    ({"rejected_logp": torch.zeros(3, dtype=torch.int64)}, TypeError, "rejected_logp has dtype"),
    ({"chosen_logp": torch.zeros(3, 2)}, ValueError, r"chosen_logp has shape \[3, 2\]; expected \[P\]"),
    ({"rejected_logp": torch.zeros(2)}, ValueError, r"rejected_logp has shape \[2\]; chosen_logp has shape \[3\]"),
    ({"ref_rejected_logp": torch.zeros(4)}, ValueError, r"ref_rejected_logp has shape \[4\]"),
    ({"beta": 0.0}, ValueError, "beta is 0; it must be finite and positive"),
    ({"beta": -1.0, "kind": "ipo"}, ValueError, "beta is -1.0; it must be finite and positive"),
    ({"beta": "0.1"}, TypeError, "beta is '0.1'; a number is expected"),
    ({"rejected_beta": 0.0}, ValueError, "rejected_beta is 0"),
    ({"rejected_beta": 0.2, "kind": "ipo"}, ValueError, "rejected_beta is 0.2; kind 'ipo' has one beta"),
    ({"alpha": 3.0, "score": "alpha_divergence", "exp_cap": 0.0}, ValueError, "exp_cap is 0"),
    ({"alpha": NAN, "score": "alpha_divergence"}, ValueError, "alpha is nan"),
    ({"max_p": 0.9}, ValueError, "max_p is 0.9 but score is not 'log_odds'"),
    ({"max_p": 1.5, "score": "log_odds"}, ValueError, "max_p is 1.5; it must be between 0 and 1"),
    ({"average": "logp"}, ValueError, "chosen_lengths is None; average needs it"),
    ({"chosen_lengths": ROW + 1}, ValueError, "chosen_lengths is given but average is None"),
    (
        {"average": "logp", "chosen_lengths": torch.tensor([1, 0, 2]), "rejected_lengths": ROW + 1},
        ValueError,
        r"chosen_lengths\[1\] is 0; a response needs at least one token",
    ),
    (
        {"average": "score", "chosen_lengths": ROW + 1, "rejected_lengths": torch.tensor([1, 1, -2])},
        ValueError,
        r"rejected_lengths\[2\] is -2; a response needs at least one token",
    ),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; it must be between 0 and 1"),
    (
        {"label_smoothing": torch.tensor([0.1, -0.2, 0.0])},
        ValueError,
        r"label_smoothing\[1\] is -0.2; it must be between 0 and 1",
    ),
    (
        {"label_smoothing": 0.1, "kind": "hinge"},
        ValueError,
        "label_smoothing is 0.1 but kind is 'hinge'; it means something for 'sigmoid'",
    ),
    ({"label_smoothing": 0.5, "kind": "robust"}, ValueError, "label_smoothing is 0.5; it must be at least 0 and below 1/2"),
    ({"kind": "exo_pair"}, ValueError, "label_smoothing is 0; it must be between 0 and 1, both excluded"),
    (
        {"label_smoothing": torch.tensor([0.1, 1.0, 0.2]), "kind": "exo_pair"},
        ValueError,
        r"label_smoothing\[1\] is 1; .* both excluded",
    ),
    ({"offset": 0.1, "kind": "nca_pair"}, ValueError, "offset is 0.1 but kind is 'nca_pair'"),
    ({"offset": NAN}, ValueError, "offset is nan; it must be finite"),
    ({"offset": torch.tensor([0.0, INF, 0.0])}, ValueError, r"offset\[1\] is inf; it must be finite"),
    ({"offset": torch.zeros(2)}, ValueError, r"offset has shape \[2\]; expected \[3\] \(one per pair\) or one element"),
    ({"scale": torch.tensor(NAN)}, ValueError, r"scale\[0\] is nan"),
    ({"chosen_target": 1.0}, ValueError, "chosen_target is 1.0 but kind is 'sigmoid'"),
    ({"factor": 2.0}, ValueError, "factor is 2.0 but kind is 'sigmoid'"),
    ({"weight": torch.tensor([1.0, -1.0, 1.0])}, ValueError, r"weight\[1\] is -1; it must be finite and not negative"),
    ({"weight": torch.ones(2)}, ValueError, r"weight has shape \[2\]"),
    ({"mask": torch.ones(3)}, TypeError, "mask has dtype Float; accepted: bool"),
    ({"mask": torch.ones(2).bool()}, ValueError, r"mask has shape \[2\]"),
    ({"tie": torch.ones(3).bool()}, ValueError, "tie is given; only kinds 'rao_kupper' and 'davidson' know ties"),
    ({"kind": "rao_kupper"}, ValueError, "nu is None; kind 'rao_kupper' needs a number"),
    ({"kind": "rao_kupper", "nu": 1.0}, ValueError, "nu is 1; for kind 'rao_kupper' it must be finite and greater than 1"),
    ({"kind": "davidson", "nu": 0.0}, ValueError, "nu is 0; it must be finite and positive"),
    ({"nu": 2.0}, ValueError, "nu is 2.0 but kind is 'sigmoid'; it means something for 'rao_kupper', 'davidson'"),
    ({"kind": "discopop", "tau": 0.0}, ValueError, "tau is 0; it must be finite and positive"),
    ({"kind": "dpop", "penalty": -1.0}, ValueError, "penalty is -1; it must be finite and not negative"),
    ({"kind": "focal", "gamma": -1.0}, ValueError, "gamma is -1; it must be finite and not negative"),
    ({"clip": 0.0}, ValueError, "clip is 0; it must be positive, or None"),
    ({"norm": -1.0}, ValueError, "norm is -1.0; it must be finite and not negative, or None"),
    ({"norm": torch.tensor(NAN)}, ValueError, r"norm\[0\] is nan"),
    ({"norm": torch.ones(3)}, ValueError, r"norm has shape \[3\]; expected one element"),
    ({"kind": "asft", "average": "score"}, ValueError, "average is 'score' but kind is 'asft'"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        preference_loss(**{"chosen_logp": ROW.clone(), "rejected_logp": ROW.clone(), **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "npo"}, ValueError, "kind is 'npo'; accepted: 'kto', 'bco', 'squared', 'apo_zero'"),
        ({"desirable": ROW}, TypeError, "desirable has dtype Float; accepted: bool"),
        ({"desirable": torch.ones(2).bool()}, ValueError, r"desirable has shape \[2\]; logp has shape \[3\]"),
        ({"ref_logp": torch.ones(2)}, ValueError, r"ref_logp has shape \[2\]; logp has shape \[3\]"),
        ({"kl": 0.1, "kind": "bco"}, ValueError, "kl is 0.1 but kind is 'bco'; it means something for 'kto'"),
        ({"kl": 0.1, "offset": 0.2}, ValueError, "offset and kl are given"),
        ({"kind": "apo_zero", "offset": 0.1}, ValueError, "offset is 0.1 but kind is 'apo_zero'"),
        ({"desirable_weight": -1.0}, ValueError, "desirable_weight is -1; it must be finite and not negative"),
        ({"average": "logp"}, ValueError, "lengths is None; average needs it"),
        ({"average": "logp", "lengths": torch.tensor([1, 1, 0])}, ValueError, r"^lengths\[2\] is 0"),
        ({"beta": INF}, ValueError, "beta is inf"),
    ],
)
def test_refused_of_single_responses(options, error, message):
    with pytest.raises(error, match=message):
        unpaired_loss(**{"logp": ROW.clone(), "ref_logp": None, "desirable": torch.ones(3).bool(), **options})


def test_a_negative_kl_counts_as_0():
    logp, good = f64(1, -2), torch.tensor([True, False])
    expected = unpaired_loss(logp, None, good).loss
    for kl in (-0.7, torch.tensor(-0.7), f64(-1, -2)):
        assert unpaired_loss(logp, None, good, kl=kl).loss == expected


def test_validation_finds_what_has_no_loss(device, validation):
    pairs = {"chosen_logp": torch.tensor([-1.0, NAN], device=device), "rejected_logp": torch.zeros(2, device=device)}
    preference_loss(**pairs)
    validation(True)
    with pytest.raises(ValueError, match=r"chosen_logp\[1\] is nan; a log-prob is expected"):
        preference_loss(**pairs)
    preference_loss(**pairs, mask=torch.tensor([True, False], device=device))
    lost = torch.tensor([-1.0, -INF], device=device)
    with pytest.raises(ValueError, match=r"chosen_logp\[1\] and rejected_logp\[1\] are -inf; their margin is undefined"):
        preference_loss(lost, lost.clone())
    with pytest.raises(ValueError, match=r"ref_logp\[1\] is nan"):
        unpaired_loss(lost, pairs["chosen_logp"], torch.ones(2, dtype=torch.bool, device=device))


def test_on_meta_the_devices_must_agree():
    with pytest.raises(ValueError, match="rejected_logp is on cpu but chosen_logp is on meta"):
        preference_loss(torch.zeros(3, device="meta"), torch.zeros(3))


def test_exported():
    assert {"label_posterior", "preference_loss", "unpaired_loss"} <= set(prefkern.__all__)


# --------------------------------------------------------------------------------------------------------- label_posterior


def test_worked_posteriors():
    ratio = f64(1.5, -1.5)
    for margin, eta, expected in (
        (0.1 * ratio, 0.9, [0.9127133692, 0.8856668772]), (2 / 0.4 * ratio, 0.9, [0.9999385500, 0.0049531040]),
        (1.1 * f64(2, -1), 0.9, [0.9878382667, 0.7497397139]),
    ):  # fmt: skip
        close(label_posterior(margin, eta), f64(*expected))
    votes = torch.logit(f64(0.9, 0.8, 0.7, 0.2, 0.95, 0.1))
    for start in (0.05, 0.5, 0.99):
        eta = start
        for _ in range(400):
            eta = label_posterior(votes, eta).mean().item()
        assert eta == pytest.approx(0.7202198552, abs=1e-9)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
def test_posteriors(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    margin, eta = (torch.randn(50) * 5).to(device, dtype), torch.tensor([0.0, 0.3, 0.9, 1.0], device=device)
    who = torch.randint(0, 4, (50,), device=device)
    for ids in (who, who.int()):
        w = label_posterior(margin, eta, ids)
        assert w.dtype == (F64 if dtype == F64 else F32) and not w.requires_grad
        assert_close(w.double(), reference.label_posterior(margin.double(), eta.double(), who), rtol=1e-5, atol=1e-9)
    one = torch.tensor(0.3, device=device, dtype=F64 if dtype == F64 else F32)
    assert torch.equal(label_posterior(margin, 0.3), label_posterior(margin, one))


def test_posteriors_far_out(device):
    far = torch.tensor([1e4, -1e4, 0.0, NAN], device=device)
    assert label_posterior(far, 0.9).nan_to_num(7).tolist() == pytest.approx([1, 0, 0.9, 7])
    assert label_posterior(torch.empty(0, device=device), 0.9).shape == (0,)


def test_the_step_is_that_of_the_marginal_likelihood():
    """With w fresh, p - w is the gradient of -log(eta p + (1 - eta)(1 - p)) in d."""
    d, eta = (torch.randn(9, dtype=F64) * 3).requires_grad_(), 0.8
    p = torch.sigmoid(d)
    (expected,) = torch.autograd.grad(-torch.log(eta * p + (1 - eta) * (1 - p)).sum(), d)
    w = label_posterior(d, eta)
    pair = {"chosen_logp": d.detach(), "rejected_logp": torch.zeros(9, dtype=F64)}
    _, grads = run(preference_loss, pair, beta=1.0, label_smoothing=1 - w, reduction="sum")
    close(grads[0], expected, 1e-12)


def test_opcheck_and_compile_of_posteriors(device):
    margin, eta, who = (
        torch.randn(6, device=device),
        torch.rand(2, device=device),
        torch.tensor([0, 1, 0, 1, 1, 0], device=device),
    )
    opcheck(OPS.label_posterior.default, (margin, eta, who))
    compiled = torch.compile(label_posterior, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 6):
        assert torch.equal(compiled(margin[:size], eta, who[:size]), label_posterior(margin[:size], eta, who[:size]))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((ROW, 1.5), ValueError, r"reliability\[0\] is 1.5; it must be between 0 and 1"),
        ((ROW, torch.tensor([0.5, NAN]), torch.tensor([0, 1, 0])), ValueError, r"reliability\[1\] is nan"),
        ((ROW, torch.tensor([0.5, 0.6])), ValueError, "annotator is None; the ids of 2 annotators are expected"),
        ((ROW, torch.tensor([0.5, 0.6]), torch.tensor([0, 2, 0])), ValueError, r"annotator\[1\] is 2; ids are 0 to 1"),
        ((ROW, 0.9, torch.tensor([0, 0])), ValueError, r"annotator has shape \[2\]"),
        ((ROW, 0.9, ROW), TypeError, "annotator has dtype Float; accepted: int64, int32"),
        ((torch.zeros(2, 2), 0.9), ValueError, r"margin has shape \[2, 2\]; expected \[P\]"),
        ((0.3, 0.9), TypeError, "margin is a float; a torch.Tensor is expected"),
        ((ROW, "high"), TypeError, "reliability is 'high'; a number or a torch.Tensor is expected"),
    ],
)
def test_posteriors_refused(args, error, message):
    with pytest.raises(error, match=message):
        label_posterior(*args)


def test_every_name_that_is_elsewhere_is_there():
    """The modules and functions that a refused kind is pointed to exist, and none of them is a kind."""
    from prefkern import papers
    from prefkern.ops.preference import _ELSEWHERE, KINDS

    for name, place in _ELSEWHERE.items():
        assert name not in KINDS
        for paper in re.findall(r"prefkern\.papers\.(\w+)", place):
            assert paper in papers.NAMES
        for kind in re.findall(r"kind '(\w+)'", place):
            assert kind in KINDS
