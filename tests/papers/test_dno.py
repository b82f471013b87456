"""DNO against its worked numbers, its definition, what its target promises, its invariants and its edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, dno, load_pair_recipe

F64 = torch.float64


def vector(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-12) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


REF = {"ref_logp": vector(-10, -8), "pair_ref_logp": vector(-9, -11)}
DELTAS = {"logp": vector(0.5, -1), "pair_logp": vector(-0.2, 0.3)}
PAIRS = {name: value + REF["ref_" + name if name == "logp" else "pair_ref_logp"] for name, value in DELTAS.items()} | REF
RATES = {"winrate": vector(0.7, 0.4), "pair_winrate": vector(0.2, 0.9)}
NAMES = ("logp", "pair_logp", "ref_logp", "pair_ref_logp")


def run(inputs, **options):
    """Loss, metrics, gradients of logp and pair_logp."""
    inputs = {**inputs}
    for name in ("logp", "pair_logp"):
        inputs[name] = inputs[name].clone().requires_grad_()
    loss, metrics = dno.dno_loss(**inputs, **options)
    gradients = torch.autograd.grad(loss.sum(), [inputs["logp"], inputs["pair_logp"]])
    return loss.detach(), metrics, *gradients


def hard(inputs, **options):
    """The same of DNO-Prct, whose chosen response is the first."""
    logp, pair = (inputs[name].clone().requires_grad_() for name in ("logp", "pair_logp"))
    loss, metrics = dno.dno_prct_loss(logp, pair, inputs["ref_logp"], inputs["pair_ref_logp"], **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss.sum(), [logp, pair])


def random_pairs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps = dict(zip(NAMES, -3 * torch.rand(4, n, dtype=F64, generator=generator), strict=True))
    rates = torch.rand(2, n, dtype=F64, generator=generator)
    return logps | {"winrate": rates[0], "pair_winrate": rates[1]}


# ---- worked numbers


def test_worked_pairs() -> None:
    loss, metrics, gradient, other = run(PAIRS | RATES, eta=0.5)
    close(loss, 0.66548908, atol=5e-9)
    close(gradient, [-0.008960438071, -0.008637782868])
    close(other, [0.008960438071, 0.008637782868])
    close(metrics["chosen_reward"], 0.5 * (0.5 - 1) / 2)
    close(metrics["rejected_reward"], 0.5 * (-0.2 + 0.3) / 2)
    close(metrics["accuracy"], 0.5)
    assert metrics["pairs"] == 2
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_worked_hard_labels() -> None:
    loss, _, gradient, other = hard(PAIRS, eta=0.5)
    close(loss, 0.8017187456, atol=5e-11)
    close(gradient, [-0.1033456053, -0.1642526157], atol=5e-11)
    close(other, -gradient)


def test_worked_target() -> None:
    preference = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.6], [0.7, 0.4, 0.5]], dtype=F64)
    logp = vector(0.5, 0.3, 0.2).log()
    winrate, target = dno.dno_target(logp, preference, eta=0.2)
    close(winrate, [0.55, 0.37, 0.57])
    close(target, [-0.5223648875, -1.933190511, -1.338655619], atol=5e-10)
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    _, _, gradient, other = run({
        "logp": target[i], "pair_logp": target[j], "ref_logp": logp[i], "pair_ref_logp": logp[j],
        "winrate": winrate[i], "pair_winrate": winrate[j],
    }, eta=0.2, reduction="sum")  # fmt: skip
    close(gradient, torch.zeros(9), atol=1e-15)
    close(other, torch.zeros(9), atol=1e-15)


# ---- definition and invariants


@given(n=st.integers(1, 6), seed=st.integers(0, 1000), eta=st.sampled_from([0.05, 0.1, 1.0]), scale=st.sampled_from([1.0, 7.0]))
def test_it_is_its_definition(n, seed, eta, scale) -> None:
    pairs = random_pairs(n, seed)
    x, y = (pairs[name].clone().requires_grad_() for name in ("logp", "pair_logp"))
    d = scale * eta * ((x - pairs["ref_logp"]) - (y - pairs["pair_ref_logp"]))
    z = torch.sigmoid(scale * (pairs["winrate"] - pairs["pair_winrate"]))
    expected = (-z * F.logsigmoid(d) - (1 - z) * F.logsigmoid(-d)).mean()
    loss, _, gradient, other = run(pairs, eta=eta, reward_scale=scale)
    close(loss, expected.detach())
    for ours, theirs in zip((gradient, other), torch.autograd.grad(expected, (x, y)), strict=True):
        close(ours, theirs)
    close(gradient, scale * eta * (torch.sigmoid(d) - z).detach() / n)
    entropy = -(z * z.log() + (1 - z) * (1 - z).log()).mean()
    assert loss >= entropy - 1e-12


@given(n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_order_within_a_pair_does_not_matter(n, seed) -> None:
    pairs = random_pairs(n, seed)
    swap = {name: name.removeprefix("pair_") if name.startswith("pair_") else "pair_" + name for name in pairs}
    loss, _, gradient, other = run(pairs)
    swapped, _, theirs, mine = run({swap[name]: value for name, value in pairs.items()})
    close(swapped, loss)
    close(mine, gradient)
    close(theirs, other)


@given(n=st.integers(2, 8), seed=st.integers(0, 1000), eta=st.sampled_from([0.05, 0.2, 1.0]))
def test_the_target_beats_what_it_started_from(n, seed, eta) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(n, n, dtype=F64, generator=generator).triu(1)
    preference = a + (1 - a).T.tril(-1) + 0.5 * torch.eye(n, dtype=F64)
    logp = torch.log_softmax(torch.randn(n, dtype=F64, generator=generator), 0)
    _, target = dno.dno_target(logp, preference, eta=eta)
    close(target.exp().sum(), 1.0)
    kl = (target.exp() * (target - logp)).sum()
    assert target.exp() @ preference @ logp.exp() >= 0.5 + eta * kl - 1e-12
    assert kl > 0


def test_large_scales_give_hard_labels() -> None:
    # z is 1 for the first pair and 0 for the second, whose order turns.
    loss = run(PAIRS | RATES, eta=0.5 / 1000, reward_scale=1000.0)[0]
    turned = {name: torch.where(torch.tensor([True, False]), PAIRS[name], PAIRS[other]) for name, other in (
        ("logp", "pair_logp"), ("pair_logp", "logp"), ("ref_logp", "pair_ref_logp"), ("pair_ref_logp", "ref_logp"),
    )}  # fmt: skip
    close(loss, hard(turned, eta=0.5)[0])


def test_reward_scale_leaves_the_optimum_where_it_is() -> None:
    target = {
        "logp": PAIRS["ref_logp"] + RATES["winrate"] / 0.2,
        "pair_logp": PAIRS["pair_ref_logp"] + RATES["pair_winrate"] / 0.2,
    }
    for scale in (0.5, 1.0, 10.0):
        gradient = run(PAIRS | target | RATES, eta=0.2, reward_scale=scale)[2]
        close(gradient, [0, 0], atol=1e-14)


def test_equal_win_rates_pull_together() -> None:
    _, _, gradient, other = run(PAIRS | {"winrate": vector(0.3, 0.3), "pair_winrate": vector(0.3, 0.3)}, eta=0.5)
    close(gradient, 0.25 * (torch.sigmoid(vector(0.35, -0.65)) - 0.5))
    assert gradient[0] > 0 > gradient[1]
    close(other, -gradient)


def test_hard_labels_are_dpo_with_that_reference() -> None:
    d = 0.1 * (DELTAS["logp"] - DELTAS["pair_logp"])
    close(hard(PAIRS)[0], -F.logsigmoid(d).mean())


# ---- edge cases


def test_far_apart_is_finite() -> None:
    far = PAIRS | {"logp": vector(-1e5, 1e5)}
    loss, _, gradient, _ = run(far | RATES)
    z = torch.sigmoid(vector(0.5, -0.5))
    close(loss, (z[0] * 1e4 + (1 - z[1]) * 1e4) / 2, atol=1.0)
    close(gradient, 0.1 * vector(-z[0], 1 - z[1]) / 2)
    assert hard(far)[0].isfinite()


def test_reductions_and_masks() -> None:
    each, _, gradient, _ = run(PAIRS | RATES, eta=0.5, reduction="none")
    close(each.mean(), 0.66548908, atol=5e-9)
    close(gradient / 2, [-0.008960438071, -0.008637782868])
    close(run(PAIRS | RATES, eta=0.5, reduction="sum")[0], each.sum())
    broken = {name: value.clone() for name, value in (PAIRS | RATES).items()}
    for value in broken.values():
        value[1] = math.nan
    first = torch.tensor([True, False])
    loss, metrics, gradient, _ = run(broken, eta=0.5, mask=first)
    close(loss, each[0])
    assert metrics["pairs"] == 1 and gradient[1] == 0
    loss, metrics, gradient, _ = hard(broken, eta=0.5, mask=first)
    close(loss, -F.logsigmoid(vector(0.35))[0])
    assert metrics["pairs"] == 1 and gradient[1] == 0


@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_pairs_is_zero(rows) -> None:
    inputs = {name: value[:rows] for name, value in (PAIRS | RATES).items()}
    nothing = torch.zeros(rows, dtype=torch.bool)
    for loss, _, *gradients in (run(inputs, mask=nothing), hard(inputs, mask=nothing)):
        assert loss == 0 and all(g.shape == (rows,) and not g.any() for g in gradients)


def test_constants_get_no_gradient() -> None:
    inputs = {name: value.clone().requires_grad_() for name, value in (PAIRS | RATES).items()}
    loss = dno.dno_loss(**inputs).loss
    grads = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True), strict=True))
    assert sorted(name for name, g in grads.items() if g is not None and g.any()) == ["logp", "pair_logp"]
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    assert not any(t.requires_grad for t in dno.dno_target(logits, torch.full((3, 3), 0.5, dtype=F64)))


def test_targets_come_in_batches() -> None:
    logp = torch.randn(2, 3, 4, dtype=F64)
    preference = torch.full((4, 4), 0.5, dtype=F64)
    preference[0, 1], preference[1, 0] = 0.8, 0.2
    winrate, target = dno.dno_target(logp, preference, eta=0.3)
    for a in range(2):
        for b in range(3):
            for ours, alone in zip((winrate, target), dno.dno_target(logp[a, b], preference, eta=0.3), strict=True):
                close(ours[a, b], alone)


def test_the_recipe_composes_it() -> None:
    logp, ref = -torch.rand(2, 4, 3, dtype=F64)
    logp.requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    pairs = Pairs(logp, mask, ref, extra=RATES)
    delta = ((logp - ref) * mask).sum(1)
    d = delta[:2] - delta[2:]
    as_run = load_pair_recipe("dno:eta=0.3").loss(pairs).loss
    close(as_run.detach(), -F.logsigmoid(0.3 * d).mean().detach())
    slope = -0.3 * torch.sigmoid(-0.3 * d) / 2
    close(torch.autograd.grad(as_run, logp)[0], (torch.cat([slope, -slope])[:, None] * mask).detach())
    z = torch.sigmoid(4 * (RATES["winrate"] - RATES["pair_winrate"]))
    soft = load_pair_recipe("dno:soft=True,reward_scale=4.0").loss(pairs).loss
    close(soft.detach(), (-z * F.logsigmoid(0.4 * d) - (1 - z) * F.logsigmoid(-0.4 * d)).mean().detach())
    with pytest.raises(ValueError, match=r"pairs.extra\['winrate'\] is None"):
        load_pair_recipe("dno:soft=True").loss(Pairs(logp, mask, ref))


def test_float32() -> None:
    loss, _, gradient, _ = run({name: value.float() for name, value in (PAIRS | RATES).items()}, eta=0.5)
    assert loss.dtype == gradient.dtype == torch.float32
    assert_close(loss.double(), torch.tensor(0.66548908, dtype=F64), rtol=1e-6, atol=0)
    # Log-probs that bfloat16 holds exactly; win rates keep their digits, whatever their dtype.
    exact = dict(zip(NAMES, (vector(x, y) for x, y in ((-9.5, -9), (-9.25, -10.75), (-10, -8), (-9, -11))), strict=True))
    loss, _, gradient, _ = run({name: value.bfloat16() for name, value in exact.items()} | RATES, eta=0.5)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert_close(loss.double(), run(exact | RATES, eta=0.5)[0], rtol=1e-6, atol=0)


def test_it_compiles_without_a_break() -> None:
    def loss(logp):
        return dno.dno_loss(**{**PAIRS, **RATES, "logp": logp}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = PAIRS["logp"].clone().requires_grad_()
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, "eta is 0.0; it must be positive"),
        ({"eta": math.nan}, "eta is nan; it must be positive"),
        ({"reward_scale": -1.0}, "reward_scale is -1.0; it must be positive"),
        ({"winrate": vector(0.7, 1.1)}, r"winrate\[1\] is 1.1; a win rate in \[0, 1\] is expected"),
        ({"pair_winrate": vector(math.nan, 0.4)}, r"pair_winrate\[0\] is nan; a win rate in \[0, 1\] is expected"),
        ({"winrate": vector(0.7)}, r"winrate has shape \[1\]; \[2\] is expected"),
        ({"pair_ref_logp": vector(-1)}, r"pair_ref_logp has shape \[1\]; \[2\] is expected"),
        ({"reduction": "average"}, "reduction is 'average'; accepted: "),
    ],
)
def test_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        dno.dno_loss(**{**PAIRS, **RATES, **changes})


def test_hard_labels_refuse() -> None:
    with pytest.raises(ValueError, match="eta is 0; it must be positive"):
        hard(PAIRS, eta=0)


def test_targets_refuse() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.0; it must be positive"):
        dno.dno_target(torch.zeros(3), torch.full((3, 3), 0.5), eta=0.0)
    with pytest.raises(ValueError, match=r"preference has shape \[2, 3\]; \[..., 3, 3\] is expected"):
        dno.dno_target(torch.zeros(3), torch.full((2, 3), 0.5))
