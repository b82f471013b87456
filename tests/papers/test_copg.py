"""CoPG against its worked numbers, its definition, its invariants and its edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, copg, load_recipe, take_rows

F64 = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-12) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


PAIRS = {
    "logp": vector(-10, -12), "ref_logp": vector(-11, -11), "rewards": vector(1, 0.2), "pair_logp": vector(-9, -14),
    "pair_ref_logp": vector(-9.5, -12), "pair_rewards": vector(0.5, 0.9),
}  # fmt: skip
TRIPLE = {
    "logp": vector(-10, -12, -9), "ref_logp": vector(-11, -11, -9.5), "rewards": vector(1, 0.2, 0.5),
    "group": torch.zeros(3, dtype=torch.int64),
}  # fmt: skip


def run(inputs, **changes):
    """Loss, metrics, gradients of logp and pair_logp."""
    inputs = {**inputs, **changes}
    given = [name for name in ("logp", "pair_logp") if inputs.get(name) is not None]
    for name in given:
        inputs[name] = inputs[name].clone().requires_grad_()
    loss, metrics = copg.copg_loss(**inputs)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in given])
    return loss.detach(), metrics, *gradients


def group_definition(rho, rewards, group, beta, scale, drop_singletons=False):
    """The equations, pair by pair, nothing detached."""
    total, questions = 0.0, 0
    for g in group.unique():
        x, r = rho[group == g], rewards[group == g]
        k = len(x)
        questions += k > 1 or not drop_singletons
        for i in range(k):
            for j in range(i):
                dr, drho = r[i] - r[j], x[i] - x[j]
                if scale == "squared":
                    total = total + (dr - beta * drho) ** 2 / (k - 1)
                else:
                    total = total - (dr - beta / 2 * drho) * drho * (1 / (k - 1) if scale == "rloo" else 2 / (k * (k - 1)))
    return total / max(questions, 1)


def test_worked_pairs() -> None:
    loss, metrics, gradient, other = run(PAIRS)
    close(loss, 0.25625)
    close(gradient, [-0.225, 0.4])
    close(other, [0.225, -0.4])
    close(metrics["max_residual"], 0.8)
    close(metrics["log_ratio"], (1 - 1 + 0.5 - 2) / 4)
    assert metrics["groups"] == 2


def test_worked_group() -> None:
    loss, metrics, gradient = run(TRIPLE)
    close(loss, -0.9875)
    close(gradient, [-0.525, 0.375, 0.15])
    close(metrics["max_residual"], 0.6)


def test_worked_optimum_has_no_gradient_and_is_reached_whatever_sampled() -> None:
    rewards, ref = vector(2.5, 2, 1), torch.full((3,), -math.log(3), dtype=F64)
    best = torch.log_softmax(ref + rewards / 0.5, 0)
    close(best.exp(), [0.7053845127, 0.2594964603, 0.0351190270], atol=1e-10)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    for repeat in ([1] * 9, [1, 5, 2, 9, 1, 3, 1, 1, 7]):  # how often each pair was sampled
        i, j = torch.tensor([pair for pair, n in zip(pairs, repeat, strict=True) for _ in range(n)]).unbind(1)

        def loss_of(logp, i=i, j=j):
            halves = {"pair_logp": logp[j], "pair_ref_logp": ref[j], "pair_rewards": rewards[j]}
            return copg.copg_loss(logp[i], ref[i], rewards[i], beta=0.5, **halves).loss

        at_best = best.clone().requires_grad_()
        assert torch.autograd.grad(loss_of(at_best), at_best)[0].abs().max() < 1e-14
        logits = torch.zeros(3, dtype=F64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0)

        def closure(optimizer=optimizer, logits=logits, loss_of=loss_of):
            optimizer.zero_grad()
            loss = loss_of(torch.log_softmax(logits, 0))
            loss.backward()
            return loss

        optimizer.step(closure)
        close(torch.softmax(logits.detach(), 0), best.exp(), atol=1e-6)


@pytest.mark.parametrize("scale", ["rloo", "mean", "squared"])
@pytest.mark.parametrize("drop_singletons", [False, True])
def test_groups_are_those_of_the_definition(scale, drop_singletons) -> None:
    group = torch.tensor([3, -1, 3, 8, 3, -1, 5, 5, 5, 5])
    rewards, rho = torch.randn(10, dtype=F64), torch.randn(10, dtype=F64)
    options = {"beta": 0.3, "scale": scale, "drop_singletons": drop_singletons}
    loss, metrics, gradient = run(
        {"logp": rho, "ref_logp": torch.zeros_like(rho), "rewards": rewards, "group": group}, **options
    )
    x = rho.clone().requires_grad_()
    expected = group_definition(x, rewards, group, **options)
    assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-12, atol=1e-14)
    assert gradient[3] == 0 and metrics["groups"] == (3 if drop_singletons else 4)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), scale=st.sampled_from(["rloo", "mean", "squared"]))
def test_gradients_of_a_group_cancel_and_a_baseline_changes_nothing(sizes, scale) -> None:
    group = torch.tensor([g for g, k in enumerate(sizes) for _ in range(k)])
    rewards, rho = torch.randn(len(group), dtype=F64), torch.randn(len(group), dtype=F64)
    inputs = {"logp": rho, "ref_logp": torch.zeros_like(rho), "rewards": rewards, "group": group, "scale": scale}
    loss, _, gradient = run(inputs)
    for g in range(len(sizes)):
        close(gradient[group == g].sum(), 0.0)
    moved, _, same = run(inputs, rewards=rewards + 10 * group)
    assert_close((moved, same), (loss, gradient), rtol=0, atol=1e-10)


def test_it_is_least_squares_up_to_a_constant() -> None:
    beta = 0.1
    drho, dr = vector(0.5, 1), vector(0.5, -0.7)
    squares = ((beta * drho - dr).square() / (2 * beta) - dr.square() / (2 * beta)).mean()
    close(run(PAIRS)[0], squares)
    at_zero = run(PAIRS, rewards=PAIRS["pair_rewards"] + beta * drho)
    close(at_zero[2], [0, 0])


def test_with_differences_of_one_half_it_is_ipo() -> None:
    beta, x = 0.2, vector(0.3, -1.0, 2.5).requires_grad_()
    ipo = (beta / 2 * (x - 1 / (2 * beta)) ** 2).mean()
    half, zero = torch.full((3,), 0.25, dtype=F64), torch.zeros(3, dtype=F64)
    pairs = {"ref_logp": zero, "rewards": half, "pair_logp": zero, "pair_ref_logp": zero, "pair_rewards": -half}
    _, _, gradient, _ = run({"logp": x.detach(), **pairs}, beta=beta)
    close(gradient, torch.autograd.grad(ipo, x)[0])


def test_two_of_a_group_are_a_pair_and_rloo() -> None:
    rewards, zeros = vector(1, 0, 0.3, 0.9), torch.zeros(4, dtype=F64)
    group = torch.tensor([0, 0, 1, 1])
    loss, _, gradient = run({"logp": zeros, "ref_logp": zeros, "rewards": rewards, "group": group})
    close(gradient, -prefkern.group_advantages(rewards, group, estimator="rloo").advantages / 2)
    inputs = {"logp": vector(0.4, -1, 2, 0.5), "ref_logp": zeros, "rewards": rewards, "group": group}
    grouped = {scale: run(inputs, scale=scale) for scale in ("rloo", "mean", "squared")}
    halves = {name: inputs[name][1::2] for name in ("logp", "ref_logp", "rewards")}
    pairs = {**{name: inputs[name][::2] for name in halves}, **{f"pair_{name}": half for name, half in halves.items()}}
    loss, _, first, second = run(pairs)
    for scale in ("rloo", "mean"):
        close(grouped[scale][0], loss)
        close(grouped[scale][2], torch.stack([first, second], 1).reshape(4))
    close(grouped["squared"][2], 0.2 * grouped["rloo"][2])


def test_on_policy_pairs_expect_twice_the_gradient_of_the_objective() -> None:
    logits, ref, rewards = vector(0.2, -0.5, 1.0).requires_grad_(), vector(-0.7, -1.5, -1.3).log_softmax(0), vector(2.5, 2, 1)
    logp = torch.log_softmax(logits, 0)
    objective = (logp.exp() * (rewards - 0.4 * (logp - ref))).sum()
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    total = torch.zeros(3, dtype=F64)
    for i in range(3):
        for j in range(3):
            half = {"pair_logp": logp[[j]], "pair_ref_logp": ref[[j]], "pair_rewards": rewards[[j]]}
            loss = copg.copg_loss(logp[[i]], ref[[i]], rewards[[i]], beta=0.4, **half).loss
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            total -= (logp[i] + logp[j]).detach().exp() * gradient
    close(total, 2 * expected)


def test_equal_rewards_pull_the_ratios_together() -> None:
    _, _, gradient, other = run(PAIRS, rewards=vector(3, 3), pair_rewards=vector(3, 3))
    close(gradient, [0.1 * 0.5 / 2, 0.1 * 1 / 2])
    close(other, -gradient)


def test_beta_zero_is_allowed_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="beta is 0"):
        loss, _, gradient, _ = run(PAIRS, beta=0.0)
    close(loss, -(0.5 * 0.5 - 0.7 * 1) / 2)
    close(gradient, [-0.25, 0.35])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(PAIRS)


def test_clip_margin_bounds_the_gradient_not_the_value() -> None:
    loss, _, gradient, other = run(PAIRS, clip_margin=0.5)
    close(loss, 0.25625)
    close(gradient, [-0.225, 0.25])
    close(other, -gradient)
    loss, _, gradient = run(TRIPLE, clip_margin=0.3)
    close(loss, -0.9875)
    close(gradient, [-0.3, 0.3, 0.15])


@pytest.mark.parametrize("inputs", [PAIRS, TRIPLE], ids=["pairs", "group"])
def test_losses_have_the_dtype_of_the_log_probs(inputs) -> None:
    single = {name: inputs[name].float() for name in ("logp", "pair_logp") if name in inputs}
    loss = copg.copg_loss(**{**inputs, **single}).loss
    assert loss.dtype == torch.float32
    assert_close(loss.double(), copg.copg_loss(**inputs).loss, rtol=1e-6, atol=0)


def test_no_pairs() -> None:
    empty = {name: value[:0] for name, value in PAIRS.items()}
    loss, metrics, gradient, _ = run(empty)
    assert loss == 0 and metrics["max_residual"] == 0 and not len(gradient)


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        (PAIRS, {"beta": -0.1}, "beta is -0.1; it must not be negative"),
        (TRIPLE, {"scale": "sum"}, "scale is 'sum'; accepted: 'rloo', 'mean', 'squared'"),
        (TRIPLE, {"group": None}, "group is None"),
        (TRIPLE, {"rewards": vector(1, math.nan, 0)}, r"rewards\[1\] is nan; every reward must be finite"),
        (PAIRS, {"pair_rewards": vector(1, math.inf)}, r"pair_rewards\[1\] is inf"),
        (PAIRS, {"pair_rewards": None}, "pair_rewards is None; pairs need"),
        (PAIRS, {"group": torch.tensor([4, 5]), "pair_group": torch.tensor([4, 6])}, r"pair_group\[1\] is 6; both halves"),
        (PAIRS, {"pair_logp": vector(1)}, r"pair_logp has shape \[1\]; \[2\] is expected"),
        (PAIRS, {"clip_margin": 0.0}, "clip_margin is 0.0; it must be positive"),
    ],
)
def test_refused(inputs, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        copg.copg_loss(**{**inputs, **changes})


def test_pairs_with_ids_that_agree() -> None:
    ids = torch.tensor([4, 5])
    close(run(PAIRS, group=ids, pair_group=ids)[0], 0.25625)


def test_the_recipe_composes_it() -> None:
    group = torch.tensor([1, 2, 1, 2, 2])
    mask = torch.arange(4) < torch.tensor([[4], [2], [3], [0], [1]])
    rewards = torch.randn(5, dtype=F64)
    logp, ref = (-torch.rand(5, 4, dtype=F64).where(mask, math.nan) for _ in range(2))
    logp.requires_grad_()
    recipe = load_recipe("copg:beta=0.3,scale=mean")
    assert recipe.whole_groups
    batch = recipe.prepare(Rollout(rewards, group, mask, ref_logp=ref))
    loss, metrics = recipe.loss(logp, batch)
    rho = torch.where(mask, logp - ref, 0.0).sum(1)  # of an empty response 0
    expected = group_definition(rho, rewards, group, 0.3, "mean")
    assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.isfinite().all() and not gradient[~mask].any()
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert recipe.loss(logp, batch, entropy=torch.full_like(logp, 0.5)).metrics["entropy"] == 0.5
    rows = torch.tensor([0, 2])
    part = recipe.loss(logp[rows], take_rows(batch, rows)).loss
    assert_close(part, group_definition(rho[rows], rewards[rows], group[rows], 0.3, "mean"))
    with pytest.raises(ValueError, match=r"recipe 'copg' needs rollout\.ref_logp"):
        recipe.prepare(Rollout(rewards, group, mask))
    with pytest.raises(ValueError, match="token_weight"):
        recipe.prepare(Rollout(rewards, group, mask, ref_logp=ref, token_weight=torch.ones(5)))


def test_long_sequences_lose_few_digits() -> None:
    ref = -5 * torch.rand(2, 20000)
    logp = ref + 1e-3 * torch.randn(2, 20000)
    recipe, rewards = load_recipe("copg"), torch.tensor([1.0, 0])
    mask, group = torch.ones(2, 20000, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    loss = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask, ref_logp=ref))).loss
    exact = recipe.loss(logp.double(), recipe.prepare(Rollout(rewards.double(), group, mask, ref_logp=ref.double()))).loss
    assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [PAIRS, TRIPLE], ids=["pairs", "group"])
def test_it_compiles_without_a_break(inputs) -> None:
    def loss(logp):
        return copg.copg_loss(**{**inputs, "logp": logp}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = inputs["logp"].clone().requires_grad_()
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=0)
