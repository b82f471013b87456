"""DisCO against its worked numbers, its definition, its invariants and its edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Rollout, disco, load_recipe, take_rows
from ranks import run_ranks

F64 = torch.float64
NAN = math.nan
LOGP = torch.tensor([[0.5, 0.25], [0.2, 0.4], [0.1, 0.1], [0.8, 0.5]], dtype=F64).log()
OLD = LOGP + torch.tensor([[0.02, 0], [0, 0.02], [0.02, 0.02], [0, 0.04]], dtype=F64)
MASK = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]], dtype=torch.bool)
GROUP = torch.zeros(4, dtype=torch.int64)
REWARDS = torch.tensor([1.0, 0, 0, 0], dtype=F64)


def run(logp=LOGP, old=OLD, mask=MASK, group=GROUP, rewards=REWARDS, **options):
    """Loss, metrics, gradient."""
    logp = logp.clone().requires_grad_()
    loss, metrics = disco.disco_loss(logp, old, mask, group, rewards, **options)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), metrics, gradient


def definition(logp, old, mask, group, rewards, score, tau, beta, delta, kl, count_degenerate=True):
    """The equations, group by group."""
    d = torch.where(mask, logp - old, 0.0)
    n = mask.sum(1)
    token = torch.where(mask, logp if score == "logL" else d.exp(), 0.0)
    s = token.sum(1) / n.clamp_min(1)
    gain, valid, ids = 0.0, 0, group.unique()
    for g in ids:
        plus, minus = (s[(group == g) & (rewards == r) & (n > 0)] for r in (1, 0))
        if len(plus) and len(minus):
            valid += 1
            low = minus.mean() if tau is None else tau * (torch.logsumexp(minus / tau, 0) - math.log(len(minus)))
            gain = gain + plus.mean() - low
    questions = max(len(ids) if count_degenerate else valid, 1)
    k = (torch.where(mask, -d if kl == "k1" else d.exp() - 1 - d, 0.0)).sum() / mask.sum()
    return -gain / questions + beta / 2 * (k - delta).clamp_min(0) ** 2


@pytest.mark.parametrize(
    ("score", "tau", "loss", "printed", "row1", "row2", "row4"),
    [
        ("logL", None, -0.2008602446, -0.0988244283, [-2.5265306122] * 2, [-1.8598639456] * 2, [-1.8598639456] * 2),
        ("logL", 1, 0.0569081334, 2.2423738321, [-2.5265306122] * 2, [-1.8872401555] * 2, [-1.7150676823] * 2),
        (
            "Lratio", None, 0.0940821514, 0.1961179677, [-2.5166299489, -2.5265306122], [-1.8598639456, -1.8631641667],
            [-1.8598639456, -1.8663990391],
        ),
        (
            "Lratio", 1, 0.0940928431, 0.2125537246, [-2.5166299489, -2.5265306122], [-1.8587729902, -1.8620948137],
            [-1.8603931395, -1.8669074830],
        ),
    ],
)  # fmt: skip
def test_worked_numbers(score, tau, loss, printed, row1, row2, row4) -> None:
    value, metrics, gradient = run(score=score, tau=tau)
    assert_close(value, torch.tensor(loss, dtype=F64), rtol=0, atol=1e-10)
    assert_close(metrics["loss_reference"], torch.tensor(printed, dtype=F64), rtol=0, atol=1e-10)
    assert_close(metrics["kl"], torch.tensor(0.0142857143, dtype=F64), rtol=0, atol=1e-10)
    assert_close(gradient[[0, 1, 3]], torch.tensor([row1, row2, row4], dtype=F64), rtol=0, atol=1e-10)
    assert gradient[2, 1] == 0


def test_a_harder_negative_is_pushed_more() -> None:
    loss, _, gradient = run(tau=1, beta=0)
    assert_close(loss, torch.tensor(-0.0437091115, dtype=F64), rtol=0, atol=1e-10)
    expected = [[-0.5, -0.5], [0.1392904568] * 2, [0.0984932265, 0], [0.3114629300] * 2]
    assert_close(gradient, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("score", ["logL", "Lratio"])
@pytest.mark.parametrize("tau", [None, 0.3])
@pytest.mark.parametrize("kl", ["k1", "k3"])
@pytest.mark.parametrize("count_degenerate", [True, False])
def test_ragged_groups_are_those_of_the_definition(score, tau, kl, count_degenerate) -> None:
    group = torch.tensor([7, -2, 7, 3, -2, 7, 5, 3, 7, 9])  # 5 and 9 alone, 3 of one class
    rewards = torch.tensor([1.0, 1, 0, 0, 0, 0.5, 1, 0, 1, 0], dtype=F64)
    mask = torch.rand(10, 6) < 0.7
    mask[4] = False
    mask[1, 0] = True
    logp = -torch.rand(10, 6, dtype=F64)
    old = logp + 0.1 * torch.randn(10, 6, dtype=F64)
    options = {"score": score, "tau": tau, "kl": kl, "beta": 5.0, "delta": 1e-3, "count_degenerate": count_degenerate}
    loss, metrics, gradient = run(logp, old, mask, group, rewards, **options)
    x = logp.clone().requires_grad_()
    expected = definition(x, old, mask, group, rewards, **options)
    assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-10, atol=1e-14)
    assert metrics["n_valid"] == 1 and metrics["questions"] == 5  # row 4 has no tokens, so -2 is of one class

    lengths = mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed, _, packed_gradient = run(logp[mask], old[mask], None, group, rewards, cu_seqlens=cu_seqlens, **options)
    assert_close(packed, loss, rtol=1e-12, atol=1e-14)
    assert_close(packed_gradient, gradient[mask], rtol=1e-10, atol=1e-14)


def test_a_large_temperature_is_discob_and_a_small_one_takes_the_highest_negative() -> None:
    flat, _, gradient = run(tau=1e6)
    plain, _, expected = run(tau=None)
    assert_close((flat, gradient), (plain, expected), rtol=0, atol=1e-5)
    _, _, sharp = run(tau=1e-3, beta=0)
    assert_close(sharp, torch.tensor([[-0.5, -0.5], [0, 0], [0, 0], [0.5, 0.5]], dtype=F64), rtol=0, atol=1e-12)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), tau=st.sampled_from([None, 0.5])
)
def test_every_question_pulls_with_the_same_weight_whatever_its_pass_rate(sizes, tau) -> None:
    rewards = torch.tensor([r for right, wrong in sizes for r in [1.0] * right + [0.0] * wrong], dtype=F64)
    group = torch.tensor([g for g, (right, wrong) in enumerate(sizes) for _ in range(right + wrong)])
    logp = -torch.rand(len(group), 5, dtype=F64)
    mask = torch.arange(5) < torch.randint(1, 6, (len(group), 1))
    _, _, gradient = run(logp, logp, mask, group, rewards, tau=tau, beta=0)
    for g in range(len(sizes)):
        here = group == g
        assert_close(gradient[here & (rewards == 1)].sum(), torch.tensor(-1 / len(sizes), dtype=F64), rtol=1e-12, atol=0)
        assert_close(gradient[here].sum(), torch.zeros((), dtype=F64), rtol=0, atol=1e-14)


def test_on_policy_the_two_scores_have_one_gradient() -> None:
    _, _, ratio = run(old=LOGP, score="Lratio")
    _, _, logl = run(old=LOGP, score="logL")
    assert_close(ratio, logl, rtol=1e-12, atol=0)
    _, _, uniform = run(old=LOGP, score="Lratio", tau=0.1)
    assert_close(uniform, ratio, rtol=1e-12, atol=0)  # all ratio scores are 1
    _, _, softmax = run(old=LOGP, score="logL", tau=0.1)
    assert not torch.allclose(softmax, logl)


def test_a_question_of_one_class_counts_in_q_and_in_the_kl() -> None:
    logp, old = torch.cat([LOGP, LOGP[:2]]), torch.cat([OLD, OLD[:2]])
    mask, group = torch.cat([MASK, MASK[:2]]), torch.cat([GROUP, GROUP[:2] + 1])
    rewards = torch.cat([REWARDS, torch.ones(2, dtype=F64)])
    alone, _, _ = run(beta=0)
    halved, metrics, gradient = run(logp, old, mask, group, rewards, beta=0)
    assert_close(halved, alone / 2)
    assert metrics["questions"] == 2 and metrics["n_valid"] == 1 and not gradient[4:].any()
    dropped, _, _ = run(logp, old, mask, group, rewards, beta=0, count_degenerate=False)
    assert_close(dropped, alone)
    _, _, gradient = run(logp, old, mask, group, rewards)
    assert gradient[4:].all()


def test_without_a_valid_question_only_the_penalty_is_left() -> None:
    loss, metrics, gradient = run(rewards=torch.ones(4, dtype=F64))
    kl = (OLD - LOGP)[MASK].mean()
    assert_close(loss, 500 * (kl - 1e-4) ** 2)
    assert_close(gradient, torch.where(MASK, -1000 * (kl - 1e-4) / 7, 0.0))
    assert metrics["n_valid"] == 0
    loss, _, gradient = run(rewards=torch.ones(4, dtype=F64), delta=0.1)
    assert loss == 0 and not gradient.any()


def test_at_delta_the_penalty_has_no_gradient() -> None:
    kl = run()[1]["kl"].item()
    loss, _, gradient = run(delta=kl)
    free, _, expected = run(beta=0)
    assert torch.equal(loss, free) and torch.equal(gradient, expected)


def test_a_completion_without_tokens_is_in_no_class() -> None:
    mask = MASK.clone()
    mask[1] = False
    loss, metrics, gradient = run(mask=mask, tau=1)
    rows = [0, 2, 3]
    expected, _, others = run(LOGP[rows], OLD[rows], MASK[rows], GROUP[rows], REWARDS[rows], tau=1)
    assert_close(loss, expected)
    assert_close(gradient[rows], others)
    assert not gradient[1].any() and metrics["questions"] == 1


def test_nan_is_ignored_outside_the_mask_and_kept_inside() -> None:
    for bad in (NAN, math.inf, -math.inf):
        logp, old = LOGP.clone(), OLD.clone()
        logp[2, 1] = old[2, 1] = bad
        for options in ({}, {"score": "Lratio", "tau": 1.0, "kl": "k3"}):
            assert_close(run(logp, old, **options)[::2], run(**options)[::2], rtol=0, atol=0)
    logp = LOGP.clone()
    logp[1, 0] = NAN
    assert run(logp)[0].isnan()


def test_large_scores_over_tau_stay_finite_and_ties_share() -> None:
    loss, _, gradient = run(LOGP * 1e4, OLD * 1e4, tau=1e-3, beta=0)
    assert loss.isfinite() and gradient.isfinite().all()
    _, _, gradient = run(LOGP[[0, 1, 1, 1]], OLD, torch.ones_like(MASK), tau=0.2, beta=0)
    assert_close(gradient[1:], torch.full((3, 2), 1 / 6, dtype=F64), rtol=1e-12, atol=0)


def test_float32_keeps_a_small_kl() -> None:
    logp = -3 * torch.rand(8, 2000)
    old = logp + 0.01 * torch.randn(8, 2000)
    group, rewards, mask = torch.arange(8) // 4, torch.tensor([1.0, 0, 0, 1] * 2), torch.ones(8, 2000, dtype=torch.bool)
    for kl in ("k1", "k3"):
        loss, metrics, _ = run(logp, old, mask, group, rewards, kl=kl, score="Lratio", tau=1.0)
        _, exact, _ = run(logp.double(), old.double(), mask, group, rewards, kl=kl, score="Lratio", tau=1.0)
        assert loss.dtype == torch.float32
        assert_close(run(logp, old, mask, group, rewards.double(), kl=kl, score="Lratio", tau=1.0)[0], loss, rtol=0, atol=0)
        assert_close(metrics["kl"].double(), exact["kl"], rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau is 0.0; it must be positive"),
        ({"tau": -1.0}, "tau is -1.0"),
        ({"score": "logl"}, "score is 'logl'; accepted: 'logL', 'Lratio'"),
        ({"kl": "low_var_kl"}, "kl is 'low_var_kl'; accepted: 'k1', 'k3'"),
        ({"mask": torch.zeros_like(MASK)}, "empty mask"),
        ({"rewards": torch.tensor([1, 0, NAN, 0])}, r"rewards\[2\] is nan; every reward must be finite"),
        ({"rewards": REWARDS[:3]}, r"rewards has shape \[3\]; \[4\] is expected"),
        ({"rewards": REWARDS[:, None]}, r"rewards has shape \[4, 1\]"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_what_is_not_looked_at_comes_out_nan(monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    monkeypatch.setattr("prefkern.papers.disco.may_look", lambda t: False)
    assert run(mask=torch.zeros_like(MASK))[0].isnan()
    assert run(rewards=torch.tensor([1, 0, NAN, 0]))[0].isnan()


def test_the_recipe_composes_it() -> None:
    group = torch.tensor([3, 3, 4, 4, 4, 3])
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=F64)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3], [4], [1], [2]])
    old = -torch.rand(6, 4, dtype=F64)
    logp = (old + 0.1 * torch.randn(6, 4, dtype=F64)).requires_grad_()
    recipe = load_recipe("disco:score=Lratio,tau=1", delta=1e-3)
    assert recipe.whole_groups and load_recipe("disco").tau == 10 and load_recipe("disco:tau=None").tau is None
    batch = recipe.prepare(Rollout(rewards, group, mask, old))
    options = {"score": "Lratio", "tau": 1, "delta": 1e-3}
    loss, metrics = recipe.loss(logp, batch)
    assert torch.equal(loss, disco.disco_loss(logp, old, mask, group, rewards, **options).loss)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    rows = torch.tensor([2, 3, 4])
    part = recipe.loss(logp[rows], take_rows(batch, rows)).loss
    assert torch.equal(part, disco.disco_loss(logp[rows], old[rows], mask[rows], group[rows], rewards[rows], **options).loss)
    on_policy = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask))).metrics
    assert on_policy["kl"] == 0
    entropy = torch.full_like(logp, NAN).masked_fill(mask, 0.5).requires_grad_()
    assert recipe.loss(logp, batch, entropy=entropy).metrics["entropy"] == 0.5
    with pytest.raises(ValueError, match=r"rollout\.token_weight is given; recipe 'disco'"):
        recipe.prepare(Rollout(rewards, group, mask, old, token_weight=torch.ones(6)))


def test_it_compiles_without_a_break() -> None:
    def loss(logp):
        return disco.disco_loss(logp, OLD, MASK, GROUP, REWARDS, score="Lratio", tau=1.0, kl="k3").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = LOGP.clone().requires_grad_()
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=0)


def loss_of_a_share(rank: int, logp, old, mask, group, rewards) -> list[dict[str, torch.Tensor]]:
    rows = group // 2 == rank
    results = []
    for tau in (None, 0.5):
        own = logp[rows].requires_grad_()
        loss, metrics = disco.disco_loss(
            own, old[rows], mask[rows], group[rows], rewards[rows], tau=tau, process_group=torch.distributed.group.WORLD
        )
        loss.backward()
        results.append({"loss": loss.detach(), "metrics": metrics, "gradient": own.grad})
    return results


def test_ranks_together_are_the_whole_batch() -> None:
    group = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])  # rank 0 has 0 and 1, rank 1 has 2 and 3, which is of one class
    rewards = torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 1, 1], dtype=F64)
    mask = torch.arange(5) < torch.randint(1, 6, (9, 1))
    logp = -torch.rand(9, 5, dtype=F64)
    old = logp + 0.05 * torch.rand(9, 5, dtype=F64)
    ranks = run_ranks(loss_of_a_share, 2, logp, old, mask, group, rewards)
    for tau, *parts in zip((None, 0.5), *ranks, strict=True):
        loss, metrics, gradient = run(logp, old, mask, group, rewards, tau=tau)
        assert metrics["kl"] > 1e-3
        for part in parts:
            assert_close(part["loss"], loss, rtol=1e-12, atol=0)
            assert_close(part["metrics"], metrics, rtol=1e-12, atol=0)
        assert_close(torch.cat([part["gradient"] for part in parts]) / 2, gradient, rtol=1e-12, atol=1e-15)


def share_without_tokens(rank: int, logp, old, mask, group, rewards) -> tuple[torch.Tensor, torch.Tensor, str]:
    world = torch.distributed.group.WORLD
    rows = group // 2 == 0 if rank == 0 else torch.zeros_like(group, dtype=torch.bool)
    own = logp[rows].requires_grad_()
    loss = disco.disco_loss(own, old[rows], mask[rows], group[rows], rewards[rows], process_group=world).loss
    loss.backward()
    try:
        bad = rewards[rows].clone() if rank else rewards[rows].masked_fill(rewards[rows] == 1, NAN)
        disco.disco_loss(own, old[rows], mask[rows], group[rows], bad, process_group="world")
    except Exception as error:
        return loss.detach(), own.grad, f"{type(error).__name__}: {error}"
    raise AssertionError("it did not raise")


def test_a_rank_without_rows_and_one_that_refuses() -> None:
    group, rewards = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0, 0, 1], dtype=F64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    logp = -torch.rand(4, 5, dtype=F64)
    old = logp + 0.05 * torch.rand(4, 5, dtype=F64)
    loss, _, gradient = run(logp, old, mask, group, rewards)
    (first, grad, refused), (second, none, heard) = run_ranks(share_without_tokens, 2, logp, old, mask, group, rewards)
    assert torch.equal(first, second) and none.shape == (0, 5)
    assert_close(first, loss, rtol=1e-12, atol=0)
    assert_close(grad / 2, gradient, rtol=1e-12, atol=1e-15)
    assert refused == "ValueError: rewards[0] is nan; every reward must be finite"
    assert heard == "RuntimeError: disco_loss: rank 0 refuses its arguments; its own error says why"
