"""TRPA against its worked numbers, its definition, its invariants and its edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, load_recipe, take_rows, trpa

F64 = torch.float64
NAN = math.nan
LOGP = torch.tensor([[-1, -2, -0.5], [-0.3, -0.3, 0], [-2, -1, -1], [-0.1, -0.2, -0.4]], dtype=F64)
REF = torch.tensor([[-1.2, -2.1, -0.9], [-0.2, -0.5, 0], [-1.5, -1, -1], [-0.4, -0.4, -0.4]], dtype=F64)
OLD = LOGP + torch.tensor([[0.1, -0.1, 0], [0.2, 0, 0], [0, 0, 0.3], [-0.2, 0, 0]], dtype=F64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
ONE = torch.zeros(4, dtype=torch.int64)
LEVELS = torch.tensor([1, 2, 4, 2])


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(logp=LOGP, ref=REF, old=OLD, mask=MASK, group=ONE, levels=LEVELS, **options):
    logp = logp.clone().requires_grad_()
    loss, metrics = trpa.trpa_loss(logp, ref, old, mask, group, levels, **options)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), metrics, gradient


def definition(
    logp, ref, old, mask, group, levels, beta=0.1, anisotropy=2.5, tr_coef=1e-3, sqrt_kl=False, kl_clamp=10.0, length_norm=True,
    per_response=False,
):  # fmt: skip
    """The equations, pair by pair."""
    h = torch.where(mask, logp - ref, 0.0).sum(1) / (mask.sum(1) if length_norm else 1)
    kappa = [beta * (anisotropy if level == 1 else 1) for level in levels.tolist()]
    pairs = []
    for i in range(len(h)):
        for j in range(len(h)):
            if group[i] == group[j] and levels[i] < levels[j]:
                pairs.append(kappa[i] * h[i] - kappa[j if per_response else i] * h[j])
    pair_loss = F.softplus(-torch.stack(pairs)).mean()
    x = torch.where(mask, old - logp, 0.0)
    kl = (x.exp() - x - 1).clamp(-kl_clamp, kl_clamp)[mask].mean()
    return pair_loss + tr_coef * ((kl + 0.25).sqrt() if sqrt_kl else kl)


def test_worked_numbers() -> None:
    loss, metrics, gradient = run()
    close(prefkern.sequence_mean(LOGP, MASK, minus=REF), [0.2333333333, 0.05, -0.1666666667, 0.1666666667])
    assert metrics["n_pairs"] == 5
    close(metrics["pair_loss"], 0.6717460460)
    margins = torch.tensor([0.0458333333, 0.1, 0.0166666667, 0.0216666667, 0.0333333333], dtype=F64)
    close(metrics["pair_loss"], F.softplus(-margins).mean())
    close(metrics["kl"], 0.0090909686)
    close(loss, 0.6717551369)
    expected = [
        [-0.0243328596, -0.0243146474, -0.0243232986], [0.0072476288, 0.0072677564, 0],
        [0.0144920201, 0.0144920201, 0.0144602148], [0.0050025866, 0.0049861076, 0.0049861076],
    ]  # fmt: skip
    close(gradient, expected)
    close(run(sqrt_kl=True, tr_coef=0.1)[0], 0.7226470252)


def test_worked_fallback() -> None:
    loss, metrics, gradient = run(group=torch.tensor([0, 0, 1, 1]), levels=torch.tensor([1, 1, 3, 3]))
    close(loss, 0.6612493704)
    close(gradient[:, 0], [-0.0368370522, -0.0609579530, 0.0382024597, 0.0451473526])
    assert metrics["n_pairs"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7, "anisotropy": 1.5, "tr_coef": 0.3},
        {"sqrt_kl": True, "tr_coef": 0.3},
        {"length_norm": False},
        {"per_response": True, "beta": 0.5},
        {"kl_clamp": 0.02, "tr_coef": 1.0},
    ],
)
def test_ragged_groups_are_those_of_the_definition(options) -> None:
    group = torch.tensor([4, -1, 4, 4, 9, -1, 4, 2, 2])
    levels = torch.tensor([2, 1, 1, 4, 1, 3, 2, 2, 2])
    logp, ref = (-torch.rand(9, 5, dtype=F64) for _ in range(2))
    old = logp + 0.3 * torch.randn(9, 5, dtype=F64)
    mask = torch.arange(5) < torch.randint(1, 6, (9, 1))
    loss, metrics, gradient = run(logp, ref, old, mask, group, levels, **options)
    x = logp.clone().requires_grad_()
    expected = definition(x, ref, old, mask, group, levels, **options)
    assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-10, atol=1e-15)
    assert metrics["n_pairs"] == 6

    lengths = mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed, _, packed_gradient = run(logp[mask], ref[mask], old[mask], None, group, levels, cu_seqlens=cu_seqlens, **options)
    assert_close(packed, loss, rtol=1e-12, atol=0)
    assert_close(packed_gradient, gradient[mask], rtol=1e-10, atol=1e-15)


def test_where_the_clamp_binds_the_kl_has_no_gradient() -> None:
    old = LOGP.clone()
    old[0, 0] += 4  # k3 = 49.6
    old[1, 0] += 1
    _, metrics, gradient = run(old=old, levels=torch.ones(4, dtype=torch.int64), no_pairs="zero", tr_coef=1.0)
    close(metrics["kl"], (10 + math.e - 2) / 11)
    expected = torch.zeros(4, 3, dtype=F64)
    expected[1, 0] = (1 - math.e) / 11
    close(gradient, expected)


def test_the_root_scales_the_gradient_of_the_trust_region() -> None:
    same = {"levels": torch.ones(4, dtype=torch.int64), "no_pairs": "zero", "tr_coef": 1.0}
    _, metrics, plain = run(**same)
    _, _, rooted = run(sqrt_kl=True, **same)
    assert_close(rooted, plain / (2 * (metrics["kl"] + 0.25).sqrt()))
    close(run(old=LOGP, sqrt_kl=True, **same)[0], 0.5)


def test_only_the_order_of_levels_matters_but_level_one_is_special() -> None:
    loss = run(levels=torch.tensor([2, 3, 9, 3]))[0]
    assert torch.equal(loss, run(levels=torch.tensor([5, 40, 70, 40]))[0])
    assert loss != run()[0]


def test_two_responses_are_length_normalised_dpo() -> None:
    group, levels = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, 3, 2])
    x = LOGP.clone().requires_grad_()
    h = torch.where(MASK, x - REF, 0.0).sum(1) / MASK.sum(1)
    dpo = -F.logsigmoid(0.1 * torch.stack([h[0] - h[1], h[3] - h[2]])).mean()
    loss, _, gradient = run(group=group, levels=levels, tr_coef=0.0)
    close(loss, dpo.detach())
    close(gradient, torch.autograd.grad(dpo, x)[0])


@given(levels=st.lists(st.integers(1, 4), min_size=2, max_size=7))
def test_pairs_pull_the_best_up_and_the_worst_down(levels) -> None:
    n = len(levels)
    logp, ref = (-torch.rand(n, 3, dtype=F64) for _ in range(2))
    mask, group, level = torch.ones(n, 3, dtype=torch.bool), torch.zeros(n, dtype=torch.int64), torch.tensor(levels)
    _, metrics, gradient = run(logp, ref, logp, mask, group, level, no_pairs="zero", tr_coef=0.0)
    total = gradient.sum(1)  # in h: every row has three tokens
    close(total.sum(), 0.0, atol=1e-14)
    if metrics["n_pairs"] > 0:
        assert (total[level == level.min()] < 0).all() and (total[level == level.max()] > 0).all()
    else:
        assert not gradient.any()


def test_a_middle_level_may_go_either_way() -> None:
    assert run()[2][1, 0] > 0  # row 1 wins a pair and loses one


def test_groups_without_pairs() -> None:
    zero = {"no_pairs": "zero", "tr_coef": 0.0}
    for group, levels in ((torch.arange(4), LEVELS), (ONE, torch.full((4,), 2))):
        loss, metrics, gradient = run(group=group, levels=levels, **zero)
        assert loss == 0 and metrics["n_pairs"] == 0 and not gradient.any()
    group = torch.tensor([0, 1, 0, 2])  # two of them alone
    loss, metrics, gradient = run(group=group, tr_coef=0.0)
    assert metrics["n_pairs"] == 1 and not gradient[[1, 3]].any()
    close(loss, math.log1p(math.exp(-0.1)))


def test_large_margins_stay_finite() -> None:
    logp = torch.tensor([[-2000.0], [0.0]])
    zeros = torch.zeros(2, 1)
    mask, group = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    loss, _, gradient = run(logp, zeros, logp, mask, group, torch.tensor([1, 2]))
    assert_close(loss, torch.tensor(500.0))
    assert_close(gradient, torch.tensor([[-0.25], [0.25]]))


def test_nan_is_ignored_outside_the_mask_and_kept_inside() -> None:
    logp, ref, old = LOGP.clone(), REF.clone(), OLD.clone()
    logp[1, 2] = ref[1, 2] = old[1, 2] = NAN
    assert_close(run(logp, ref, old)[::2], run()[::2], rtol=0, atol=0)
    logp[2, 0] = NAN
    assert run(logp)[0].isnan()


def test_levels_of_a_logic_puzzle() -> None:
    well_formed, answered, correct = torch.tensor(
        [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool
    ).unbind(1)
    assert trpa.logic_levels(well_formed, answered, correct).tolist() == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask": MASK & torch.tensor([[True], [True], [False], [True]])},
            r"lengths\[2\] is 0.*; every completion needs a token",
        ),
        ({"levels": torch.tensor([1, 0, 2, 3])}, "levels"),
        ({"levels": LEVELS[:2]}, r"levels has shape \[2\]; \[4\] is expected"),
        ({"no_pairs": "skip"}, "no_pairs is 'skip'; accepted: 'fallback', 'zero'"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_what_is_not_looked_at_comes_out_nan(monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    assert run(mask=MASK & torch.tensor([[True], [True], [False], [True]]))[0].isnan()


def test_the_recipe_composes_it() -> None:
    group = torch.tensor([0, 1, 0, 1])
    rollout = Rollout(torch.zeros(4), group, MASK, OLD, REF, extra={"levels": LEVELS})
    recipe = load_recipe("trpa:beta=0.5,sqrt_kl=True")
    assert recipe.whole_groups
    batch = recipe.prepare(rollout)
    logp = LOGP.clone().requires_grad_()
    loss, metrics = recipe.loss(logp, batch)
    assert torch.equal(loss, run(group=group, beta=0.5, sqrt_kl=True)[0])
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    rows = torch.tensor([1, 3])
    part = recipe.loss(logp[rows], take_rows(batch, rows)).loss
    assert part != loss and part.isfinite()
    on_policy = recipe.loss(logp, recipe.prepare(Rollout(torch.zeros(4), group, MASK, None, REF, extra={"levels": LEVELS})))
    assert on_policy.metrics["kl"] == 0
    entropy = torch.arange(12, dtype=F64).view(4, 3)
    assert recipe.loss(logp, batch, entropy=entropy).metrics["entropy"] == (66 - 5) / 11
    with pytest.raises(ValueError, match=r"recipe 'trpa' needs rollout\.extra\['levels'\]"):
        recipe.prepare(Rollout(torch.zeros(4), group, MASK, OLD, REF))
    with pytest.raises(ValueError, match=r"recipe 'trpa' needs rollout\.ref_logp"):
        recipe.prepare(Rollout(torch.zeros(4), group, MASK, OLD, extra={"levels": LEVELS}))
    with pytest.raises(ValueError, match="token_weight"):
        recipe.prepare(Rollout(torch.zeros(4), group, MASK, OLD, REF, token_weight=torch.ones(4), extra={"levels": LEVELS}))


def test_it_compiles_without_a_break() -> None:
    def loss(logp):
        return trpa.trpa_loss(logp, REF, OLD, MASK, ONE, LEVELS).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = LOGP.clone().requires_grad_()
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=0)
