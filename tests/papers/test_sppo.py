"""SPPO against its worked numbers, its definitions, its invariants and its edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe, sppo

F64 = torch.float64
SCORES = torch.tensor([[1.2, -0.3, 0.4, 2.0, -1.0]], dtype=F64)
WINS = [0.6435647974, 0.3547096970, 0.4896757589, 0.7766888064, 0.2353609403]


def vector(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-12) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(r_w=(3.0,), r_l=(-2.0,), scores=SCORES, wins=None, **options):
    """Loss, metrics, gradients of both log-probs, of pairs with these log-ratios."""
    pairs = sppo.sppo_select(scores)
    if wins is None:
        wins = {name: getattr(pairs, name) for name in ("chosen_win", "rejected_win", "pair_win")}
    chosen, rejected = (torch.tensor(r, dtype=F64) - base for r, base in ((r_w, 50), (r_l, 70)))
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    refs = torch.full_like(chosen, -50).detach(), torch.full_like(chosen, -70).detach()
    loss, metrics = sppo.sppo_loss(chosen, rejected, *refs, **wins, **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss.sum(), (chosen, rejected))


# ---- worked numbers


def test_worked_selection() -> None:
    close(sppo.win_probability(SCORES), [WINS], atol=5e-11)
    pairs = sppo.sppo_select(SCORES)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.keep.tolist()) == ([3], [4], [True])
    close(pairs.chosen_win, [WINS[3]], atol=5e-11)
    close(pairs.rejected_win, [WINS[4]], atol=5e-11)
    close(pairs.pair_win, [0.9525741268], atol=5e-11)


@pytest.mark.parametrize(
    ("mode", "loss", "chosen", "rejected"),
    [
        ("sppo", 71942.4192144581, -273.6888064138, 262.6390596859),
        ("single", 202566.9696349757, -449.5741268224, 450.5741268224),
        ("hard", 495013.0, -994.0, 996.0),
    ],
)
def test_worked_pairs(mode, loss, chosen, rejected) -> None:
    value, metrics, *gradients = run(mode=mode, eta=1000.0)
    assert_close(value, vector(loss)[0], rtol=1e-14, atol=0)
    assert_close(gradients, [vector(chosen), vector(rejected)], rtol=1e-12, atol=0)
    assert metrics["pairs"] == 1 and metrics["accuracy"] == 1
    unit = 1000 if mode == "hard" else 1
    close(metrics["chosen_reward"] * unit, 3.0)
    close(metrics["reward_margin"] * unit, 5.0)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_the_default_is_the_release() -> None:
    assert run()[0] == run(mode="sppo", eta=1000.0)[0]


def test_worked_all_responses() -> None:
    r = vector(1, 0.5, -0.2, 2, -1)[None].requires_grad_()
    targets = vector(1.4356479741, -1.4529030304, -0.1032424111, 2.7668880641, -2.6463905969)[None]
    loss, metrics = sppo.sppo_all_loss(r, torch.zeros_like(r), SCORES, eta=10.0)
    close(loss, 1.4623401469, atol=5e-11)
    (gradient,) = torch.autograd.grad(loss, r)
    close(gradient, 2 / 5 * (r.detach() - targets), atol=5e-11)
    close(metrics["log_ratio"], 0.46)
    close(metrics["target"], 0.0)  # win probabilities of a group have a mean of 1/2
    close(metrics["error"], (r.detach() - targets).abs().mean(), atol=5e-11)
    each = sppo.sppo_all_loss(r, torch.zeros_like(r), SCORES, eta=10.0, reduction="none").loss
    close(each.detach(), (r.detach() - targets).square(), atol=5e-10)
    close(sppo.sppo_all_loss(r, torch.zeros_like(r), SCORES, eta=10.0, reduction="sum").loss, each.sum())


# ---- definitions and invariants


@given(b=st.integers(1, 3), k=st.integers(2, 6), seed=st.integers(0, 1000), include_self=st.booleans())
def test_win_probabilities(b, k, seed, include_self) -> None:
    scores = 3 * torch.randn(b, k, dtype=F64, generator=torch.Generator().manual_seed(seed))
    win = sppo.win_probability(scores, include_self=include_self)
    for row, p in zip(scores, win, strict=True):
        for i in range(k):
            others = [torch.sigmoid(row[i] - row[j]) for j in range(k) if j != i]
            close(p[i], (sum(others) + 0.5) / k if include_self else sum(others) / (k - 1))
    close(win.mean(-1), torch.full((b,), 0.5))
    close(sppo.win_probability(scores + 17, include_self=include_self), win, atol=1e-10)
    close((sppo.win_probability(scores) - 0.5) * k / (k - 1), sppo.win_probability(scores, include_self=False) - 0.5)
    pairs = sppo.sppo_select(scores, include_self=include_self)
    rows = torch.arange(b)
    assert torch.equal(scores[rows, pairs.chosen], scores.max(-1).values)
    assert torch.equal(scores[rows, pairs.rejected], scores.min(-1).values)
    close(pairs.chosen_win, win.max(-1).values)
    close(pairs.rejected_win, win.min(-1).values)
    close(pairs.pair_win, torch.sigmoid(scores.max(-1).values - scores.min(-1).values))


@given(n=st.integers(1, 5), seed=st.integers(0, 1000), eta=st.sampled_from([0.5, 10.0, 1000.0]))
def test_pair_losses_are_their_definitions(n, seed, eta) -> None:
    generator = torch.Generator().manual_seed(seed)
    r_w, r_l = torch.randn(2, n, dtype=F64, generator=generator)
    wins = dict(zip(("chosen_win", "rejected_win", "pair_win"), torch.rand(3, n, dtype=F64, generator=generator), strict=True))
    a, b, c = (eta * (p - 0.5) for p in wins.values())
    expected = {
        "sppo": (((r_w - a) ** 2 + (r_l - b) ** 2) / 2, (r_w - a, r_l - b)),
        "single": (((r_w - c) ** 2 + (r_l + c) ** 2) / 2, (r_w - c, r_l + c)),
        "hard": ((r_w - eta / 2) ** 2 + (r_l + eta / 2) ** 2, (2 * (r_w - eta / 2), 2 * (r_l + eta / 2))),
    }
    for mode, (each, gradients) in expected.items():
        loss, _, *ours = run(r_w.tolist(), r_l.tolist(), wins=wins, mode=mode, eta=eta)
        assert_close(loss, each.mean(), rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(ours, gradients, strict=True):
            assert_close(mine, theirs / n, rtol=1e-10, atol=1e-10)
    certain = {"pair_win": torch.ones(n, dtype=F64)}
    single = run(r_w.tolist(), r_l.tolist(), wins=certain, mode="single", eta=eta)[0]
    assert_close(run(r_w.tolist(), r_l.tolist(), wins={}, mode="hard", eta=eta)[0], 2 * single, rtol=1e-10, atol=1e-10)


def test_the_best_table_is_normalised_only_by_luck() -> None:
    # Without log Z the loss is 0 at pi_t exp(eta (p - 1/2)), whose sum is not 1; the best normalised table is elsewhere.
    ref = vector(0.5, 0.3, 0.2).log()[None]
    win = vector(0.55, 0.37, 0.57)[None]
    best = ref + 4 * (win - 0.5)
    assert sppo.sppo_all_loss(best, ref, win=win, eta=4.0).loss < 1e-28
    assert abs(best.exp().sum() - 1) > 0.05
    normalised = torch.log_softmax(best, -1).requires_grad_()
    loss = sppo.sppo_all_loss(normalised, ref, win=win, eta=4.0).loss
    log_z = torch.logsumexp(best, -1)
    close(loss.detach(), log_z.square()[0])


def test_centred_rewards() -> None:
    rewards = vector(1, 0, 2, -1, 0.5, 0.3).view(2, 3)
    r = torch.randn(2, 3, dtype=F64, requires_grad=True)
    target = rewards - rewards.exp().mean().log()  # over the batch, not over each prompt
    loss, metrics = sppo.sppo_all_loss(r, torch.zeros_like(r), rewards, target="centered_reward")
    close(loss.detach(), (r - target).square().mean().detach())
    close(metrics["target"], target.mean())
    close(torch.autograd.grad(loss, r)[0], 2 / 6 * (r - target).detach())
    moved = sppo.sppo_all_loss(r, torch.zeros_like(r), rewards + 9, target="centered_reward").loss
    close(moved.detach(), loss.detach())
    scaled = sppo.sppo_all_loss(r, torch.zeros_like(r), rewards, target="centered_reward", eta=2.5).loss
    close(scaled.detach(), (r - 2.5 * target).square().mean().detach())


def test_given_win_probabilities() -> None:
    r, ref = torch.randn(2, 1, 5, dtype=F64)
    ours = sppo.sppo_all_loss(r, ref, win=sppo.win_probability(SCORES), eta=10.0).loss
    close(ours, sppo.sppo_all_loss(r, ref, SCORES, eta=10.0).loss)
    apart = sppo.sppo_all_loss(r, ref, SCORES, eta=10.0, include_self=False).loss
    close(apart, sppo.sppo_all_loss(r, ref, win=sppo.win_probability(SCORES, include_self=False), eta=10.0).loss)
    assert sppo.sppo_all_loss(r, ref, SCORES).loss == sppo.sppo_all_loss(r, ref, SCORES, eta=1000.0).loss


# ---- edge cases


def test_equal_scores_are_no_pair() -> None:
    scores = torch.cat([torch.full((1, 5), 0.7, dtype=F64), SCORES])
    pairs = sppo.sppo_select(scores)
    assert pairs.chosen.tolist() == [0, 3] and pairs.rejected.tolist() == [0, 4] and pairs.keep.tolist() == [False, True]
    assert [float(p[0]) for p in (pairs.chosen_win, pairs.rejected_win, pairs.pair_win)] == [0.5, 0.5, 0.5]
    assert sppo.sppo_select(scores, drop_ties=False).keep.tolist() == [True, True]
    loss, metrics, gradient, _ = run((8.0, 3.0), (8.0, -2.0), scores, mask=pairs.keep)
    assert_close(loss, vector(71942.4192144581)[0], rtol=1e-14, atol=0)
    assert metrics["pairs"] == 1 and gradient[0] == 0
    close(run((8.0, 3.0), (8.0, -2.0), scores)[0], (64 + 71942.4192144581) / 2, atol=1e-8)


def test_ties_take_the_first() -> None:
    pairs = sppo.sppo_select(vector(1, 3, 0, 3, 0)[None])
    assert (pairs.chosen.item(), pairs.rejected.item()) == (1, 2)


def test_one_response() -> None:
    one = vector(2.0)[None]
    with pytest.warns(UserWarning, match="one response per prompt"):
        assert sppo.win_probability(one).tolist() == [[0.5]]
    with pytest.warns(UserWarning, match="one response per prompt"):
        assert sppo.win_probability(one, include_self=False).tolist() == [[0.5]]
    with pytest.warns(UserWarning, match="one response per prompt"):
        assert sppo.sppo_select(one).keep.tolist() == [False]
    with pytest.warns(UserWarning, match="one response per prompt"):
        loss = sppo.sppo_all_loss(vector(-3)[None], vector(-5)[None], one).loss
    close(loss, 4.0)  # towards the policy that sampled


@given(gap=st.floats(1e-3, 50))
def test_of_two_the_better_wins_at_most_three_quarters(gap) -> None:
    pairs = sppo.sppo_select(vector(0, gap)[None])
    assert 0.5 < pairs.chosen_win <= 0.75
    close(pairs.chosen_win + pairs.rejected_win, [1.0])


def test_saturated_scores() -> None:
    for scores in (vector(1e6, 0, -1e6)[None], vector(math.inf, 0, -math.inf)[None]):
        close(sppo.win_probability(scores), [[2.5 / 3, 0.5, 0.5 / 3]])
        assert sppo.sppo_select(scores).pair_win == 1
    close(sppo.win_probability(vector(math.inf, math.inf)[None]), [[0.5, 0.5]])
    assert run(wins={"chosen_win": vector(1), "rejected_win": vector(0)})[0] == (497**2 + 498**2) / 2


def test_reductions_and_masks() -> None:
    wins = {"chosen_win": vector(0.7, 0.6), "rejected_win": vector(0.2, 0.4)}
    each, _, gradient, _ = run((3.0, 1.0), (-2.0, 0.0), wins=wins, eta=10.0, reduction="none")
    close(each, [(1 + 1) / 2, (0 + 1) / 2])
    close(gradient, [1, 0])
    close(run((3.0, 1.0), (-2.0, 0.0), wins=wins, eta=10.0, reduction="sum")[0], 1.5)
    broken = {"chosen_win": vector(math.nan, 0.6), "rejected_win": vector(7, 0.4)}
    keep = torch.tensor([False, True])
    loss, metrics, gradient, _ = run((math.nan, 1.0), (-2.0, 0.0), wins=broken, eta=10.0, mask=keep)
    close(loss, 0.5)
    assert metrics["pairs"] == 1
    close(gradient, [0, 0])


@pytest.mark.parametrize("mode", sppo.MODES)
def test_constants_get_no_gradient(mode) -> None:
    inputs = torch.rand(7, 2, dtype=F64).requires_grad_().unbind(0)
    grads = torch.autograd.grad(sppo.sppo_loss(*inputs, mode=mode).loss, inputs, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in grads] == [True, True] + [False] * 5
    logp, ref, scores = torch.rand(3, 2, 4, dtype=F64).requires_grad_().unbind(0)
    grads = torch.autograd.grad(sppo.sppo_all_loss(logp, ref, scores).loss, (logp, ref, scores), allow_unused=True)
    assert grads[0].any() and grads[1:] == (None, None)
    assert not sppo.win_probability(scores).requires_grad


def test_the_recipe_composes_it() -> None:
    logp, ref = -torch.rand(2, 4, 3, dtype=F64)
    logp.requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    wins = {"chosen_win": vector(0.7, 0.6), "rejected_win": vector(0.2, 0.4), "pair_win": vector(0.9, 0.8)}
    r = ((logp - ref) * mask).sum(1)
    target = 10 * (torch.cat([wins["chosen_win"], wins["rejected_win"]]) - 0.5)
    loss = load_pair_recipe("sppo:eta=10.0").loss(Pairs(logp, mask, ref, extra=wins)).loss
    close(loss.detach(), (r - target).square().sum().detach() / 4)
    close(torch.autograd.grad(loss, logp)[0], ((r - target)[:, None] * mask).detach() / 2)
    target = 10 * (torch.cat([wins["pair_win"], 1 - wins["pair_win"]]) - 0.5)
    keep = torch.tensor([False, True])
    single = load_pair_recipe("sppo:eta=10.0,mode=single").loss(Pairs(logp, mask, ref, extra={**wins, "keep": keep})).loss
    close(single.detach(), (r - target).square()[[1, 3]].sum().detach() / 2)
    hard = load_pair_recipe("sppo", mode="hard").loss(Pairs(logp, mask, ref)).loss
    assert_close(hard.detach(), ((r[:2] - 500) ** 2 + (r[2:] + 500) ** 2).mean().detach(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="chosen_win is None; mode 'sppo' needs it"):
        load_pair_recipe("sppo").loss(Pairs(logp, mask, ref))


def test_dtypes() -> None:
    pairs = sppo.sppo_select(SCORES)
    logps = [vector(x).float() for x in (-47, -72, -50, -70)]
    loss = sppo.sppo_loss(*logps, pairs.chosen_win, pairs.rejected_win).loss
    assert loss.dtype == torch.float32  # float64 win probabilities promote nothing
    assert_close(loss.double(), vector(71942.4192144581)[0], rtol=1e-6, atol=0)
    assert sppo.sppo_all_loss(torch.zeros(1, 5), torch.zeros(1, 5), SCORES).loss.dtype == torch.float32
    half = [x.bfloat16() for x in logps]  # these four are exact there; the targets are not
    assert_close(sppo.sppo_loss(*half, pairs.chosen_win, pairs.rejected_win).loss, loss, rtol=1e-6, atol=0)
    r, exact = torch.tensor([[1, 0.5, -0.25, 2, -1]]).bfloat16().requires_grad_(), SCORES.float()
    coarse = sppo.sppo_all_loss(r, torch.zeros_like(r), exact, eta=10.0).loss
    assert coarse.dtype == torch.float32 and torch.autograd.grad(coarse, r)[0].dtype == torch.bfloat16
    assert_close(coarse.detach(), sppo.sppo_all_loss(r.detach().float(), torch.zeros(1, 5), exact, eta=10.0).loss)
    assert sppo.win_probability(SCORES.bfloat16()).dtype == torch.float32
    close(sppo.win_probability(torch.tensor([[1, 0]])).double(), sppo.win_probability(vector(1, 0)[None]), atol=1e-7)


def test_it_compiles_without_a_break() -> None:
    def loss(logp):
        pairs = sppo.sppo_select(SCORES)
        pair = sppo.sppo_loss(
            logp[:, 0], logp[:, 1], logp[:, 2].detach(), logp[:, 3].detach(), pairs.chosen_win, pairs.rejected_win
        )
        return pair.loss + sppo.sppo_all_loss(logp, torch.zeros_like(logp), SCORES).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = torch.randn(1, 5, dtype=F64, requires_grad=True)
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=1e-9)


# ---- refusals

LOGPS = {name: vector(-1, -2) for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")}
HALF = vector(0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "simple"}, "mode is 'simple'; accepted: 'sppo', 'single', 'hard'"),
        ({}, "chosen_win is None; mode 'sppo' needs it"),
        ({"chosen_win": HALF}, "rejected_win is None; mode 'sppo' needs it"),
        ({"mode": "single", "chosen_win": HALF}, "pair_win is None; mode 'single' needs it"),
        ({"mode": "single", "pair_win": vector(0.5, 1.5)}, r"pair_win\[1\] is 1.5; a probability in \[0, 1\] is expected"),
        ({"mode": "single", "pair_win": vector(0.5, math.nan)}, r"pair_win\[1\] is nan; a probability"),
        ({"mode": "single", "pair_win": vector(0.5)}, r"pair_win has shape \[1\]; \[2\] is expected"),
        ({"mode": "hard", "eta": 0.0}, "eta is 0.0; it must be positive and finite"),
        ({"mode": "hard", "eta": math.inf}, "eta is inf; it must be positive and finite"),
        ({"mode": "hard", "eta": math.nan}, "eta is nan; it must be positive and finite"),
        ({"mode": "hard", "reduction": "average"}, "reduction is 'average'; accepted: "),
        ({"mode": "hard", "rejected_logp": vector(-1)}, "rejected_logp has shape"),
    ],
)
def test_pairs_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        sppo.sppo_loss(**{**LOGPS, **changes})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (vector(1, math.nan)[None], r"scores\[0, 1\] is nan; a number is expected"),
        (torch.zeros(2, 0), r"scores has shape \[2, 0\]; \[..., K\] with K of at least 1 is expected"),
        (torch.tensor(1.0), r"scores has shape \[\]; \[..., K\] with K"),
        (torch.zeros(5), r"scores has shape \[5\]; \[B, K\] is expected"),
    ],
)
def test_scores_refused(scores, message) -> None:
    with pytest.raises(ValueError, match=message):
        sppo.sppo_select(scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of scores and win is expected"),
        ({"scores": SCORES, "win": SCORES}, "exactly one of scores and win is expected"),
        ({"win": SCORES / 4 + 0.5, "target": "centered_reward"}, 'scores is None; target "centered_reward" needs them'),
        ({"scores": SCORES[:, :4]}, r"scores has shape \[1, 4\]; \[1, 5\] is expected"),
        ({"win": SCORES}, r"win\[0\] is \[1.2, "),
        ({"scores": SCORES * math.inf, "target": "centered_reward"}, "scores has an entry that is not finite"),
        ({"scores": SCORES, "target": "raw"}, "target is 'raw'; accepted: 'win_probability', 'centered_reward'"),
        ({"scores": SCORES, "reduction": "average"}, "reduction is 'average'; accepted: "),
        ({"scores": SCORES, "eta": -1.0}, "eta is -1.0; it must be positive and finite"),
    ],
)
def test_all_responses_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sppo.sppo_all_loss(torch.zeros(1, 5), torch.zeros(1, 5), **options)


def test_select_with_enough_responses_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sppo.sppo_select(SCORES)
