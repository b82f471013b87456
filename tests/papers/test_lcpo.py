"""LCPO / RE-PO: worked numbers of every base loss, its identities, reliabilities, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import AnnotatorReliability
from prefkern.papers import lcpo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-9) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


LOGPS = {
    "chosen_logp": vector(-10, -8), "rejected_logp": vector(-12, -7), "ref_chosen_logp": vector(-11, -7.5),
    "ref_rejected_logp": vector(-11.5, -8),
}  # fmt: skip
FREE = {name: LOGPS[name] for name in ("chosen_logp", "rejected_logp")}
LENGTHS = {"chosen_lengths": torch.tensor([5, 4]), "rejected_lengths": torch.tensor([6, 3])}
CASES = {
    "dpo": {**LOGPS, "beta": 0.1},
    "ipo": {**LOGPS, "beta": 0.4},
    "simpo": {**FREE, **LENGTHS, "beta": 2.5, "gamma": 0.8},
    "cpo": {**FREE, "beta": 0.1},
}


def run(kind, **options):
    """Loss, metrics, gradients of chosen and rejected."""
    options = {**CASES[kind], **options}
    for name in FREE:
        options[name] = options[name].clone().requires_grad_()
    loss, metrics = lcpo.lcpo_loss(kind, **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss, [options[name] for name in FREE])


def margin(kind, **options):
    return lcpo.lcpo_margin(kind, **{**CASES[kind], **options})


# ---- worked numbers


@pytest.mark.parametrize(
    ("kind", "p", "w", "loss", "chosen", "rejected", "eta"),
    [
        ("dpo", [0.5374298453, 0.4625701547], [0.9127133692, 0.8856668772], 0.6939285609, [-0.0187641762, -0.0211548361], None,
         0.8999190123),
        ("ipo", None, [0.9999385500, 0.0049531040], (0.0010138068 + 0.0377012113) / 2, [-0.0012283215, -0.0110008133], None,
         0.8602445827),
        ("simpo", [0.5, 0.7567774523], [0.9, 0.9655209845], 0.5054850515, [-0.1379948962, -0.0866476919],
         [0.1149957469, 0.1155302559], None),
        ("cpo", [0.9002495109, 0.2497398944], [0.9878382667, 0.7497397139], 0.6219440717, [-0.0481738157, -0.2749999007], None,
         None),
    ],
)  # fmt: skip
def test_worked_numbers(kind, p, w, loss, chosen, rejected, eta) -> None:
    d = margin(kind)
    if p is not None:
        close(torch.sigmoid(d), p)
    found_w = lcpo.label_posterior(d, 0.9)
    close(found_w, w)
    reliability = AnnotatorReliability(1)
    found, metrics, found_chosen, found_rejected = run(kind, eta=reliability)
    close(found, loss)
    close(found_chosen, chosen)
    close(found_rejected, [-g for g in chosen] if rejected is None else rejected)
    close(metrics["posterior"], sum(w) / 2)
    close(reliability.update(), [eta if eta is not None else 0.9 + 0.1 * (sum(w) / 2 - 0.9)])


def test_worked_loss_of_each_ipo_pair() -> None:
    for row, expected in enumerate((0.0010138068, 0.0377012113)):
        one = {name: t[row : row + 1] for name, t in LOGPS.items()}
        close(run("ipo", **one)[0], expected)


def base_loss(kind, chosen, rejected, options):
    """L(chosen over rejected) of each pair, from the papers; with the references and lengths of each side."""
    beta = options["beta"]
    (logp_w, ref_w, n_w), (logp_l, ref_l, n_l) = chosen, rejected
    D = (logp_w - ref_w) - (logp_l - ref_l)
    match kind:
        case "dpo":
            return F.softplus(-beta * D)
        case "ipo":
            return (D - 1 / (2 * beta)) ** 2
        case "simpo":
            return F.softplus(options["gamma"] - beta * (logp_w / n_w - logp_l / n_l))
        case _:
            return F.softplus(-beta * (logp_w - logp_l)) - logp_w


def sides(options):
    zero = torch.zeros(2, dtype=F64)
    return [
        (options[f"{s}_logp"], options.get(f"ref_{s}_logp", zero), options.get(f"{s}_lengths", zero))
        for s in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("kind", lcpo.BASES)
def test_the_margin_is_the_difference_of_base_losses(kind) -> None:
    options = CASES[kind]
    chosen, rejected = sides(options)
    close(margin(kind), base_loss(kind, rejected, chosen, options) - base_loss(kind, chosen, rejected, options), 1e-12)


@pytest.mark.parametrize("kind", lcpo.BASES)
def test_the_weighted_variant(kind) -> None:
    w = lcpo.label_posterior(margin(kind), 0.9)
    options = {**CASES[kind]}
    for name in FREE:
        options[name] = options[name].clone().requires_grad_()
    chosen, rejected = sides(options)
    per_pair = w * base_loss(kind, chosen, rejected, options) + (1 - w) * base_loss(kind, rejected, chosen, options)
    gradients = torch.autograd.grad(per_pair.mean(), [options[name] for name in FREE])
    loss, _, *found = run(kind, variant="weighted")
    close(loss, per_pair.mean().detach(), 1e-12)
    for gradient, expected in zip(found, gradients, strict=True):
        close(gradient, expected, 1e-12)


def test_for_dpo_both_variants_are_the_same() -> None:
    one, other = run("dpo"), run("dpo", variant="weighted")
    assert one[0] == other[0] and one[2].equal(other[2])
    assert run("ipo")[0] != run("ipo", variant="weighted")[0]


# ---- identities


@given(st.floats(-30, 30), st.floats(0.01, 0.99))
def test_a_step_is_one_of_the_marginal_likelihood(d, eta) -> None:
    x = vector(d).requires_grad_()
    w = lcpo.label_posterior(x, eta)
    p = torch.sigmoid(x)
    (expected,) = torch.autograd.grad(-(eta * p + (1 - eta) * (1 - p)).log().sum(), x)
    (found,) = torch.autograd.grad(-(w * F.logsigmoid(x) + (1 - w) * F.logsigmoid(-x)).sum(), x)
    close(found, expected, 1e-12)
    close(found, (p - w).detach(), 1e-12)
    assert found <= 0 if eta > 0.5 else found >= -1e-15
    assert lcpo.label_posterior(x, min(eta + 0.005, 1)) >= w and lcpo.label_posterior(x + 0.1, eta) >= w


def test_reliabilities_at_the_ends() -> None:
    assert not run("dpo", eta=0.5)[2].abs().max() > 1e-16  # nothing is learned
    certain = run("dpo", eta=1.0)
    close(certain[0], F.softplus(-margin("dpo")).mean(), 1e-6)
    close(lcpo.label_posterior(vector(0), 0.7), [0.7], 1e-15)  # a tie: p is a half
    d = vector(-800, 800, -1e5)
    w = lcpo.label_posterior(d, 0.9)
    assert w.isfinite().all() and w.tolist() == [pytest.approx(0, abs=1e-300), 1, 0]
    assert torch.equal(lcpo.label_posterior(vector(3), 0.0), lcpo.label_posterior(vector(3), 1e-6))
    assert lcpo.label_posterior(vector(3).float(), 0.9).dtype == torch.float32


def test_the_posterior_is_a_constant() -> None:
    x = margin("dpo", chosen_logp=LOGPS["chosen_logp"].clone().requires_grad_())
    assert x.requires_grad and not lcpo.label_posterior(x, torch.tensor(0.9, requires_grad=True)).requires_grad


# ---- annotators


def test_each_label_is_believed_as_its_annotator_is() -> None:
    eta, annotator = vector(0.9, 0.5, 0.6), torch.tensor([2, 0])
    w = lcpo.label_posterior(margin("dpo"), eta, annotator)
    for i, k in enumerate(annotator):
        close(w[i], torch.sigmoid(margin("dpo")[i] + torch.logit(eta[k])), 1e-15)
    close(run("dpo", eta=eta, annotator=annotator)[1]["posterior"], w.mean(), 1e-15)


def test_reliabilities_hear_of_micro_batches_and_not_of_evaluation() -> None:
    reliability = AnnotatorReliability(2)
    annotator = torch.tensor([0, 1])
    w = lcpo.label_posterior(margin("dpo"), 0.9)
    for row in range(2):
        run("dpo", eta=reliability, annotator=annotator[row : row + 1], **{n: t[row : row + 1] for n, t in LOGPS.items()})
    assert lcpo.lcpo_loss("dpo", **CASES["dpo"], eta=reliability, annotator=annotator).metrics["pairs"] == 2  # no gradient
    close(reliability.update(), 0.9 * 0.9 + 0.1 * w, 1e-15)


def test_nan_is_found_before_reliabilities_move() -> None:
    reliability = AnnotatorReliability(1)
    with pytest.raises(ValueError, match=r"d\[1\] is nan; the margin of every pair must be a number"):
        run("dpo", eta=reliability, chosen_logp=vector(-10, math.nan))
    assert reliability.update().tolist() == [0.9]


def test_it_learns_who_is_reliable_and_undoes_the_shrinkage() -> None:
    """8 items with true scores, two annotators who mislabel 10% and 40% of Bradley-Terry comparisons; a table as policy."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.linspace(-2, 2, 8, dtype=F64)
    rows = 6000
    i, j = torch.randint(8, (2, rows), generator=generator)
    annotator = torch.randint(2, (rows,), generator=generator)
    better = torch.rand(rows, dtype=F64, generator=generator) < torch.sigmoid(scores[i] - scores[j])
    right = torch.rand(rows, dtype=F64, generator=generator) < vector(0.9, 0.6)[annotator]
    chosen, rejected = torch.where(better == right, i, j), torch.where(better == right, j, i)

    def fit(reliability, eta):
        table = torch.zeros(8, dtype=F64, requires_grad=True)
        optimizer = torch.optim.Adam([table], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            lcpo.lcpo_loss("dpo", table[chosen], table[rejected], beta=1.0, eta=eta, annotator=annotator).loss.backward()
            optimizer.step()
            if reliability is not None:
                reliability.update()
        fitted = table.detach() - table.detach().mean()
        return float(fitted @ scores / (scores @ scores))  # slope on the truth

    reliability = AnnotatorReliability(2)
    slope = fit(reliability, reliability)
    plain = fit(None, vector(1.0, 1.0))
    assert_close(reliability.eta, vector(0.9, 0.6), rtol=0, atol=0.1)
    assert reliability.eta[0] > reliability.eta[1] + 0.2
    assert plain < 0.6 and slope > 1.5 * plain


# ---- metrics, precision, refusals


def test_metrics() -> None:
    for kind in lcpo.BASES:
        _, metrics, *_ = run(kind)
        assert set(metrics) == {"chosen_reward", "rejected_reward", "reward_margin", "accuracy", "pairs", "posterior"}
        assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    close(run("dpo")[1]["chosen_reward"], 0.1 * (1 - 0.5) / 2, 1e-12)
    close(run("simpo")[1]["chosen_reward"], 2.5 * (-2 - 2) / 2, 1e-12)
    assert run("dpo")[1]["accuracy"] == 0.5


@pytest.mark.parametrize("kind", lcpo.BASES)
@pytest.mark.parametrize("variant", lcpo.VARIANTS)
def test_low_precision_and_no_pairs(kind, variant) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        single = {n: t.to(dtype) if t.is_floating_point() else t for n, t in CASES[kind].items() if isinstance(t, torch.Tensor)}
        loss, *_ = run(kind, variant=variant, **single)
        assert loss.dtype == torch.float32
        assert_close(loss.double(), run(kind, variant=variant)[0], rtol=1e-5, atol=1e-6)  # these logps are exact in bfloat16
    empty = {n: t[:0] for n, t in CASES[kind].items() if isinstance(t, torch.Tensor)}
    loss, metrics, chosen, _ = run(kind, variant=variant, **empty)
    assert loss == 0 and metrics["posterior"] == 0 and not len(chosen)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("dpo", {"variant": "weights"}, ValueError, "variant is 'weights'; accepted: 'log_p', 'weighted'"),
        ("dpo", {"beta": 0}, ValueError, "beta is 0; it must be positive"),
        ("dpo", {"ref_chosen_logp": None}, ValueError, "one of ref_chosen_logp and ref_rejected_logp is None"),
        ("dpo", {"gamma": 0.5}, ValueError, "gamma is given but kind is 'dpo'; it means something for 'simpo'"),
        ("simpo", {"gamma": None}, ValueError, "gamma is None; kind 'simpo' needs it"),
        ("simpo", {"rejected_lengths": torch.tensor([0, 3])}, ValueError, r"rejected_lengths\[0\] is 0; every response"),
        ("cpo", {n: LOGPS[n] for n in ("ref_chosen_logp", "ref_rejected_logp")}, ValueError, "'cpo', which has no reference"),
        ("dpo", {"eta": 1.5}, ValueError, r"reliability\[0\] is 1.5; it must be between 0 and 1"),
        ("dpo", {"eta": vector(0.9, 0.8)}, ValueError, "annotator is None; the ids of 2 annotators are expected"),
        ("dpo", {"annotator": torch.tensor([0, 1])}, ValueError, r"annotator\[1\] is 1; ids are 0 to 0"),
        ("dpo", {"annotator": torch.tensor([0])}, ValueError, r"annotator has shape \[1\]; margin has shape \[2\]"),
        ("dpo", {"annotator": vector(0, 0)}, TypeError, "annotator has dtype Double; accepted: int64, int32"),
    ],
)  # fmt: skip
def test_refused(kind, changes, error, message) -> None:
    with pytest.raises(error, match=message):
        lcpo.lcpo_loss(kind, **{**CASES[kind], **changes})


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'kto'; accepted: 'dpo', 'ipo', 'simpo', 'cpo'"):
        lcpo.lcpo_loss("kto", **CASES["dpo"])


def test_on_a_gpu_an_unknown_annotator_is_nan(device) -> None:
    d, annotator = margin("dpo").float().to(device), torch.tensor([0, 5], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"annotator\[1\] is 5"):
            lcpo.label_posterior(d, 0.9, annotator)
    else:
        assert lcpo.label_posterior(d, 0.9, annotator).isnan().tolist() == [False, True]


def test_it_compiles_without_a_break() -> None:
    def loss(chosen):
        return lcpo.lcpo_loss("dpo", **{**CASES["dpo"], "chosen_logp": chosen}, eta=vector(0.9)).loss

    chosen = LOGPS["chosen_logp"].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(chosen).detach(), loss(chosen).detach(), 1e-14)
