"""EGPO against its worked numbers, its definition, what its losses promise as steps, its invariants and its edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.optim import ExtragradientStep
from prefkern.papers import Pairs, egpo, load_pair_recipe

F64 = torch.float64


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-9) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


P = tensor([0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5])
THETA, REF = tensor(0.2, -0.1, 0.4), tensor(0, 0.3, -0.3)
HALF = tensor(0.1950209673, -0.09668729484, 0.4016663276)  # SGD at 0.02
FULL = tensor(0.1950302788, -0.09649716791, 0.4014668891)
ETA = 4 * 0.02 / (3 * 0.1)


def random_game(n, seed=0):
    """Logits, reference logits and a preference matrix."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(n, n, dtype=F64, generator=generator)
    logits, ref = torch.randn(2, n, dtype=F64, generator=generator)
    return logits, ref, torch.where(torch.ones(n, n).tril(-1).bool(), 1 - a.T, a).fill_diagonal_(0.5)


def with_gradient(loss, logits, *rest, **options):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *rest, **options)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def nash(ref, preference, beta):
    """The regularised Nash policy, by the full steps themselves, far past convergence."""
    logits = ref
    for _ in range(400):
        _, logits = egpo.egpo_tabular_step(logits, ref, preference, beta=beta, eta=0.5 / beta)
    return logits


# ---- worked numbers


def test_worked_uniform_loss() -> None:
    loss, gradient = with_gradient(egpo.online_ipo_uniform, THETA, REF, P, beta=0.1)
    close(loss, 0.03613259042, atol=5e-12)
    close(gradient, [0.2489516358, -0.1656352578, -0.08331637804], atol=1e-10)


def test_worked_on_policy_loss() -> None:
    loss, gradient = with_gradient(egpo.online_ipo_on_policy, THETA, REF, P, beta=0.1)
    close(loss, 5.673803717)
    close(gradient, [0.2437561205, -0.1304716116, -0.1132845088], atol=1e-10)


def test_worked_gap() -> None:
    close(egpo.dual_gap(THETA, REF, P, beta=0.1), 0.001673304411, atol=5e-13)


def test_worked_step_by_sgd_and_as_a_map() -> None:
    _, gradient = with_gradient(egpo.online_ipo_uniform, THETA, REF, P, beta=0.1)
    half = THETA - 0.02 * gradient
    close(half, HALF, atol=1e-10)
    _, gradient = with_gradient(egpo.online_ipo_uniform, THETA, REF, P, beta=0.1, opponent=half)
    close(THETA - 0.02 * gradient, FULL, atol=1e-10)
    for logits, expected in zip(egpo.egpo_tabular_step(THETA, REF, P, beta=0.1, eta=ETA), (HALF, FULL), strict=True):
        assert_close(torch.log_softmax(logits, -1), torch.log_softmax(expected, -1), rtol=0, atol=1e-9)


def test_the_step_of_an_optimiser_is_the_map() -> None:
    """Three iterations of SGD with ExtragradientStep, each loss against the policy that would have sampled."""
    theta = THETA.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.02)
    ahead = ExtragradientStep(optimizer)
    table = THETA
    for _ in range(3):
        optimizer.zero_grad()
        egpo.online_ipo_uniform(theta, REF, P, beta=0.1).backward()
        ahead.extrapolate()
        opponent = theta.detach().clone()
        ahead.restore()
        optimizer.zero_grad()
        egpo.online_ipo_uniform(theta, REF, P, beta=0.1, opponent=opponent).backward()
        ahead.step()
        _, table = egpo.egpo_tabular_step(table, REF, P, beta=0.1, eta=ETA)
        assert_close(torch.log_softmax(theta.detach(), -1), torch.log_softmax(table, -1), rtol=0, atol=1e-12)


# ---- definitions


def test_uniform_loss_is_the_mean_over_pairs() -> None:
    logits, ref, preference = random_game(6)
    mu = torch.randn(6, dtype=F64)
    x = logits.clone().requires_grad_()
    h = torch.log_softmax(x, -1) - torch.log_softmax(ref, -1)
    wins = preference @ torch.softmax(mu, -1)
    pairs = [(h[i] - h[j] - (wins[i] - wins[j]) / 0.3) ** 2 for i in range(6) for j in range(6)]
    expected = sum(pairs) / 36
    loss, gradient = with_gradient(egpo.online_ipo_uniform, logits, ref, preference, beta=0.3, opponent=mu)
    close(loss, expected.detach(), atol=1e-12)
    close(gradient, torch.autograd.grad(expected, x)[0], atol=1e-12)
    d = (h - wins / 0.3).detach()
    close(gradient, 4 / 6 * (d - d.mean()), atol=1e-12)


def test_on_policy_loss_holds_its_weights_constant() -> None:
    logits, ref, preference = random_game(5)
    pi = torch.softmax(logits, -1)
    x = logits.clone().requires_grad_()
    h = torch.log_softmax(x, -1) - torch.log_softmax(ref, -1)
    expected = sum(pi[i] * pi[j] * (h[i] - h[j] - (preference[i, j] - 0.5) / 0.3) ** 2 for i in range(5) for j in range(5))
    loss, gradient = with_gradient(egpo.online_ipo_on_policy, logits, ref, preference, beta=0.3)
    close(loss, expected.detach(), atol=1e-12)
    close(gradient, torch.autograd.grad(expected, x)[0], atol=1e-12)


def test_gap_is_what_both_players_can_gain() -> None:
    logits, ref, preference = random_game(4)
    beta, pi, log_ref = 0.2, torch.softmax(logits, -1), torch.log_softmax(ref, -1)

    def kl(p):
        return (p * (p.log() - log_ref)).sum()

    def value(p, q):
        return p @ preference @ q - beta * kl(p) + beta * kl(q)

    best = egpo.best_response(logits, ref, preference, beta=beta).exp()
    close(best.sum(), 1.0, atol=1e-14)
    close(egpo.dual_gap(logits, ref, preference, beta=beta), value(best, pi) - value(pi, best), atol=1e-13)
    for other in torch.softmax(torch.randn(200, 4, dtype=F64), -1):
        assert value(best, pi) >= value(other, pi) - 1e-14
        assert value(pi, best) <= value(pi, other) + 1e-14


@given(seed=st.integers(0, 1000), n=st.integers(2, 7), beta=st.sampled_from([0.05, 0.1, 1.0]))
def test_invariants(seed, n, beta) -> None:
    logits, ref, preference = random_game(n, seed)
    shifted = logits + 3.5
    for loss in (egpo.online_ipo_uniform, egpo.online_ipo_on_policy):
        value, gradient = with_gradient(loss, logits, ref, preference, beta=beta)
        moved, same = with_gradient(loss, shifted, ref - 2, preference, beta=beta)
        assert_close(moved, value, rtol=1e-9, atol=1e-10)
        assert_close(same, gradient, rtol=0, atol=1e-8)
        close(gradient.sum(), 0.0, atol=1e-8)
    gap = egpo.dual_gap(logits, ref, preference, beta=beta)
    assert gap >= 0
    assert_close(egpo.dual_gap(shifted, ref, preference, beta=beta), gap, rtol=1e-9, atol=1e-12)
    # Renaming the responses renames the steps.
    order = torch.randperm(n)
    steps = egpo.egpo_tabular_step(logits, ref, preference, beta=beta, eta=0.5)
    renamed = egpo.egpo_tabular_step(logits[order], ref[order], preference[order][:, order], beta=beta, eta=0.5)
    for a, b in zip(steps, renamed, strict=True):
        assert_close(a[order], b, rtol=1e-12, atol=1e-12)


def test_at_the_nash_policy_loss_gap_and_steps_vanish() -> None:
    _, ref, preference = random_game(6, seed=3)
    best = nash(ref, preference, beta=0.1)
    loss, gradient = with_gradient(egpo.online_ipo_uniform, best, ref, preference, beta=0.1)
    close(loss, 0.0, atol=1e-20)
    close(gradient, torch.zeros(6), atol=1e-12)
    assert 0 <= egpo.dual_gap(best, ref, preference, beta=0.1) < 1e-24
    for logits in egpo.egpo_tabular_step(best, ref, preference, beta=0.1, eta=1.0):
        close(logits, best, atol=1e-12)


def test_nothing_to_prefer_leaves_the_reference() -> None:
    half = torch.full((4, 4), 0.5, dtype=F64)
    ref = torch.randn(4, dtype=F64)
    for loss in (egpo.online_ipo_uniform, egpo.online_ipo_on_policy):
        value, gradient = with_gradient(loss, ref, ref, half, beta=0.1)
        close(value, 0.0, atol=1e-28)
        close(gradient, torch.zeros(4), atol=1e-14)
    close(egpo.dual_gap(ref, ref, half, beta=0.1), 0.0, atol=1e-30)


def test_one_response() -> None:
    one = torch.full((1, 1), 0.5, dtype=F64)
    for loss in (egpo.online_ipo_uniform, egpo.online_ipo_on_policy):
        value, gradient = with_gradient(loss, tensor(0.7), tensor(-1), one, beta=0.1)
        assert value == 0 and gradient.tolist() == [0]
    assert egpo.dual_gap(tensor(0.7), tensor(-1), one, beta=0.1) == 0


def test_games_come_in_batches_with_a_step_size_each() -> None:
    games = [random_game(5, seed) for seed in range(3)]
    logits, ref, preference = map(torch.stack, zip(*games, strict=True))
    eta = tensor(0.5, 1, 2)
    half, full = egpo.egpo_tabular_step(logits, ref, preference, beta=0.1, eta=eta)
    gaps, responses = (f(logits, ref, preference, beta=0.1) for f in (egpo.dual_gap, egpo.best_response))
    losses = [f(logits, ref, preference, beta=0.1) for f in (egpo.online_ipo_uniform, egpo.online_ipo_on_policy)]
    for i, game in enumerate(games):
        for ours, alone in zip((half, full), egpo.egpo_tabular_step(*game, beta=0.1, eta=eta[i].item()), strict=True):
            close(ours[i], alone, atol=1e-13)
        close(gaps[i], egpo.dual_gap(*game, beta=0.1), atol=1e-13)
        close(responses[i], egpo.best_response(*game, beta=0.1), atol=1e-13)
        close(losses[0][i], egpo.online_ipo_uniform(*game, beta=0.1), atol=1e-11)
        close(losses[1][i], egpo.online_ipo_on_policy(*game, beta=0.1), atol=1e-11)


def test_a_full_step_is_the_best_response() -> None:
    logits, ref, preference = random_game(4)
    half, full = egpo.egpo_tabular_step(logits, ref, preference, beta=0.1, eta=10.0)
    close(torch.log_softmax(half, -1), egpo.best_response(logits, ref, preference, beta=0.1), atol=1e-13)
    close(torch.log_softmax(full, -1), egpo.best_response(half, ref, preference, beta=0.1), atol=1e-13)


def test_opponent_and_reference_get_no_gradient() -> None:
    logits, ref, preference = (t.requires_grad_() for t in random_game(4))
    opponent = torch.randn(4, dtype=F64, requires_grad=True)
    loss = egpo.online_ipo_uniform(logits, ref, preference, opponent=opponent)
    loss = loss + egpo.online_ipo_on_policy(logits, ref, preference)
    grads = torch.autograd.grad(loss, (logits, ref, preference, opponent), allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1:] == (None, None, None)
    assert not any(t.requires_grad for t in egpo.egpo_tabular_step(logits, ref, preference, beta=0.1, eta=1.0))


def test_a_small_gap_has_its_digits() -> None:
    _, ref, preference = random_game(5, seed=1)
    best = nash(ref, preference, beta=0.5)
    step = torch.randn(5, dtype=F64)
    gaps = [egpo.dual_gap(best + size * step, ref, preference, beta=0.5).item() for size in (1e-3, 1e-5, 1e-7)]
    assert gaps[1] / gaps[0] == pytest.approx(1e-4, rel=1e-2)
    assert gaps[2] / gaps[1] == pytest.approx(1e-4, rel=1e-2)


def test_a_policy_far_from_its_best_response_has_a_finite_gap() -> None:
    _, ref, preference = random_game(5)
    pure = tensor(0, -2000, 0, -900, -3)
    log_pi = torch.log_softmax(pure, -1)
    expected = 0.2 * (log_pi.exp() * (log_pi - egpo.best_response(pure, ref, preference, beta=0.1))).sum()
    close(egpo.dual_gap(pure, ref, preference, beta=0.1), expected, atol=1e-13)
    assert torch.autograd.grad(egpo.dual_gap(pure.requires_grad_(), ref, preference, beta=0.1), pure)[0].isfinite().all()


# ---- the loss of sampled responses

PAIRS = {
    "logp": tensor(-10, -4), "pair_logp": tensor(-12, -3), "ref_logp": tensor(-11, -4.5), "pair_ref_logp": tensor(-11.5, -2),
    "preference": tensor(0.8, 0.35), "pair_preference": tensor(0.3, 0.6),
}  # fmt: skip
LENGTHS = {"lengths": torch.tensor([5, 2]), "pair_lengths": torch.tensor([6, 3])}
SWAPPED = {
    "logp": "pair_logp", "ref_logp": "pair_ref_logp", "preference": "pair_preference", "lengths": "pair_lengths",
}  # fmt: skip
SWAPPED |= {b: a for a, b in SWAPPED.items()}


def run(inputs=PAIRS, **changes):
    """Loss, metrics, gradients of logp and pair_logp."""
    inputs = {**inputs, **changes}
    for name in ("logp", "pair_logp"):
        inputs[name] = inputs[name].clone().requires_grad_()
    loss, metrics = egpo.online_ipo_loss(**inputs)
    gradients = torch.autograd.grad(loss.sum(), [inputs["logp"], inputs["pair_logp"]])
    return loss.detach(), metrics, *gradients


def test_worked_pairs() -> None:
    loss, metrics, gradient, other = run()
    close(loss, 14.125)
    close(gradient, [-3.5, 4])
    close(other, [3.5, -4])
    close(metrics["chosen_reward"], 0.75)
    close(metrics["rejected_reward"], -0.75)
    close(metrics["reward_margin"], 1.5)
    assert metrics["pairs"] == 2
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_worked_pairs_by_length() -> None:
    loss, _, gradient, other = run(**LENGTHS)
    close(loss, 15.87694444, atol=5e-9)
    errors = tensor(1 / 5 + 0.5 / 6 - 5, 0.5 / 2 + 1 / 3 + 2.5)
    close(gradient, errors / tensor(5, 2), atol=1e-12)
    close(other, -errors / tensor(6, 3), atol=1e-12)


@pytest.mark.parametrize("more", [{}, LENGTHS])
def test_swapping_the_pair_changes_nothing(more) -> None:
    inputs = {**PAIRS, **more}
    loss, _, gradient, other = run(inputs)
    swapped, _, theirs, mine = run({SWAPPED[name]: value for name, value in inputs.items()})
    close(swapped, loss, atol=1e-12)
    close(mine, gradient, atol=1e-12)
    close(theirs, other, atol=1e-12)


def test_the_pair_against_itself_and_equal_preferences() -> None:
    same = {name: PAIRS[name] for name in ("logp", "ref_logp", "preference")}
    loss, _, gradient, other = run({**same, **{SWAPPED[name]: value for name, value in same.items()}})
    assert loss == 0 and not gradient.any() and not other.any()
    drho = tensor(1.5, 1.5)
    close(run(preference=tensor(0.4, 0.4), pair_preference=tensor(0.4, 0.4))[0], drho.square().mean())


def test_without_a_third_response_the_pair_is_compared_directly() -> None:
    close(run(pair_preference=None)[0], run(pair_preference=tensor(0.5, 0.5))[0])


def test_constants_get_no_gradient() -> None:
    inputs = {name: value.clone().requires_grad_() for name, value in PAIRS.items()}
    loss = egpo.online_ipo_loss(**inputs).loss
    grads = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True), strict=True))
    assert [name for name, g in grads.items() if g is not None and g.any()] == ["logp", "pair_logp"]


def test_reductions_and_masks() -> None:
    each, _, gradient, _ = run(reduction="none")
    close(each, [12.25, 16])
    close(gradient, [-7, 8])
    close(run(reduction="sum")[0], 28.25)
    loss, metrics, gradient, _ = run(logp=tensor(math.nan, -4), preference=tensor(5, 0.35), mask=torch.tensor([False, True]))
    close(loss, 16.0)
    assert metrics["pairs"] == 1 and gradient.tolist() == [0, 8]


def test_a_preference_that_is_none_makes_its_pair_nan_where_it_may_not_be_looked_at(monkeypatch) -> None:
    monkeypatch.setattr(egpo, "check_values", lambda *_: None)
    seen = []
    monkeypatch.setattr(egpo, "preference_loss", lambda *_, offset, **__: seen.append(offset))
    egpo.online_ipo_loss(**{**PAIRS, "preference": tensor(1.5, 0.35), "pair_preference": tensor(0.3, math.nan)})
    assert seen[0].isnan().tolist() == [True, True]


def test_all_pairs_of_a_table_give_the_exact_losses() -> None:
    logits, ref, preference = random_game(4)
    log_ref, beta = torch.log_softmax(ref, -1), 0.2
    i, j = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    wins = preference @ torch.softmax(logits, -1)

    def sampled(x, pref_i, pref_j):
        logp = torch.log_softmax(x, -1)
        return egpo.online_ipo_loss(logp[i], logp[j], log_ref[i], log_ref[j], pref_i, pref_j, beta=beta, reduction="none").loss

    uniform = with_gradient(lambda x: sampled(x, wins[i], wins[j]).mean(), logits)
    assert_close(uniform, with_gradient(egpo.online_ipo_uniform, logits, ref, preference, beta=beta), rtol=1e-11, atol=1e-11)
    pi = torch.softmax(logits, -1)
    drawn = with_gradient(lambda x: (pi[i] * pi[j] * sampled(x, preference[i, j], None)).sum(), logits)
    assert_close(drawn, with_gradient(egpo.online_ipo_on_policy, logits, ref, preference, beta=beta), rtol=1e-11, atol=1e-11)


def test_the_recipe_composes_it() -> None:
    logp, ref = -torch.rand(2, 4, 3, dtype=F64)
    logp.requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    preference, other = tensor(0.8, 0.4), tensor(0.1, 0.6)
    pairs = Pairs(logp, mask, ref, extra={"preference": preference, "pair_preference": other})
    h = ((logp - ref) * mask).sum(1)
    error = h[:2] - h[2:] - (preference - other) / 0.2
    loss = load_pair_recipe("egpo:beta=0.2").loss(pairs).loss
    close(loss.detach(), error.square().mean().detach(), atol=1e-12)
    close(torch.autograd.grad(loss, logp)[0], (torch.cat([error, -error])[:, None] * mask).detach(), atol=1e-12)
    h = h / mask.sum(1)
    error = h[:2] - h[2:] - (preference - 0.5) / 0.1
    direct = load_pair_recipe("egpo", normalize=True).loss(Pairs(logp, mask, ref, extra={"preference": preference})).loss
    close(direct.detach(), error.square().mean().detach(), atol=1e-12)
    with pytest.raises(ValueError, match=r"recipe 'egpo' needs pairs.extra\['preference'\]"):
        load_pair_recipe("egpo").loss(Pairs(logp, mask, ref))


def test_float32() -> None:
    loss, metrics, gradient, _ = run({name: value.float() for name, value in PAIRS.items()})
    assert loss.dtype == gradient.dtype == metrics["reward_margin"].dtype == torch.float32
    assert_close(loss.double(), tensor(14.125)[0], rtol=1e-6, atol=0)
    # Log-probs that bfloat16 holds exactly; preferences keep their digits, whatever their dtype.
    coarse = {name: value.bfloat16() if "logp" in name else value for name, value in PAIRS.items()}
    loss, _, gradient, _ = run(coarse)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert_close(loss.double(), tensor(14.125)[0], rtol=1e-6, atol=0)


def test_it_compiles_without_a_break() -> None:
    def loss(logp):
        return egpo.online_ipo_loss(**{**PAIRS, "logp": logp}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = PAIRS["logp"].clone().requires_grad_()
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=0)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"beta": math.nan}, "beta is nan; it must be positive"),
        ({"preference": tensor(0.8, 1.2)}, r"preference\[1\] is 1.2; a probability in \[0, 1\] is expected"),
        ({"preference": tensor(0.8, math.nan)}, r"preference\[1\] is nan; a probability in \[0, 1\] is expected"),
        ({"pair_preference": tensor(-0.1, 0.2)}, r"pair_preference\[0\] is -0.1; a probability in \[0, 1\] is expected"),
        ({"preference": tensor(0.8)}, r"preference has shape \[1\]; \[2\] is expected"),
        ({"pair_logp": tensor(-1)}, r"pair_logp has shape \[1\]; \[2\] is expected"),
        ({"lengths": torch.tensor([5, 2])}, "pair_lengths is None; both lengths are expected, or neither"),
        ({"pair_lengths": torch.tensor([5, 2])}, "lengths is None; both lengths are expected, or neither"),
        (LENGTHS | {"lengths": torch.tensor([5, 0])}, r"lengths\[1\] is 0; every response needs a token"),
        (LENGTHS | {"pair_lengths": torch.tensor([0, 3])}, r"pair_lengths\[0\] is 0; every response needs a token"),
        ({"reduction": "average"}, "reduction is 'average'; accepted: "),
    ],
)
def test_pairs_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        egpo.online_ipo_loss(**{**PAIRS, **changes})


@pytest.mark.parametrize("function", [egpo.best_response, egpo.dual_gap, egpo.online_ipo_uniform, egpo.online_ipo_on_policy])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"ref_logits": tensor(0, 0)}, r"ref_logits \[2\], preference \[3, 3\]; \[..., n\]"),
        ({"preference": P[:2]}, r"preference \[2, 3\]; \[..., n\]"),
        ({"preference": P * 1.2}, r"preference has an entry outside \[0, 1\]"),
        ({"preference": P * math.nan}, r"preference has an entry outside \[0, 1\]"),
        ({"preference": P.tril() + 0.1 * P.triu(1)}, "preference plus its transpose is not 1 everywhere"),
    ],
)
def test_games_refused(function, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{"logits": THETA, "ref_logits": REF, "preference": P, "beta": 0.1, **changes})


@pytest.mark.parametrize("eta", [0.0, -1.0, math.nan, tensor(1, 0)])
def test_step_sizes_refused(eta) -> None:
    with pytest.raises(ValueError, match=r"eta is .*; eta \* beta must be positive"):
        egpo.egpo_tabular_step(THETA, REF, P, beta=0.1, eta=eta)


def test_a_step_beyond_its_target_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"eta \* beta is 1.1; above 1 a step goes beyond its target"):
        egpo.egpo_tabular_step(THETA, REF, P, beta=0.1, eta=11.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        egpo.egpo_tabular_step(THETA, REF, P, beta=0.1, eta=10.0)
