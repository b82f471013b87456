"""TDPO against worked numbers, its divergence and its identities."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import CHOSEN, F64, MASK, REFS, REJECTED, assert_layouts_agree, close, sums
from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.tdpo import position_kl, tdpo_loss

SIDES = torch.tensor([[1.0], [-0.5], [0.3], [0.9]], dtype=F64)  # x_w, x_l, K_w, K_l


def run(*sides, **options):
    def loss(x_w, x_l, k_w, k_l):
        return tdpo_loss(x_w, x_l, chosen_kl=k_w, rejected_kl=k_l, **options)

    leaves = [t.clone().requires_grad_() for t in (sides or SIDES)]
    out = loss(*leaves)
    return out, torch.autograd.grad(out.loss, leaves, allow_unused=True)


def test_worked_numbers() -> None:
    one, slopes = run(version=1)
    close(one.loss.detach(), 0.6491593390)
    pull = 0.1 * math.expm1(-0.6491593390)
    for slope, expected in zip(slopes, (pull, -pull, pull, -pull), strict=True):
        close(slope, [expected], atol=1e-9)
    two, slopes = run()
    close(two.loss.detach(), 0.6349461016)
    pull = 0.1 * math.expm1(-0.6349461016)
    assert slopes[2] is None  # sg K_w
    for slope, expected in zip((slopes[0], slopes[1], slopes[3]), (pull, -pull, -0.5 * pull), strict=True):
        close(slope, [expected], atol=1e-9)


def test_metrics() -> None:
    out, _ = run(version=1)
    close(out.metrics["chosen_reward"], 0.1 * 1.3)
    close(out.metrics["rejected_reward"], 0.1 * 0.4)
    close(out.metrics["chosen_kl"], 0.3)
    close(out.metrics["rejected_kl"], 0.9)
    close(run()[0].metrics["chosen_reward"], 0.1 * 1.15)


def test_identities() -> None:
    zeros, ones = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    plain = dpo_loss(CHOSEN, REJECTED, *REFS).loss
    for options in ({"version": 1}, {}):
        close(tdpo_loss(CHOSEN, REJECTED, *REFS, chosen_kl=zeros, rejected_kl=zeros, **options).loss, plain)
        close(tdpo_loss(CHOSEN, REJECTED, *REFS, chosen_kl=ones, rejected_kl=ones, **options).loss, plain)
    close(tdpo_loss(CHOSEN, REJECTED, *REFS, chosen_kl=zeros, rejected_kl=ones, alpha=0.0).loss, plain)
    options = {"chosen_kl": zeros, "rejected_kl": ones}
    close(tdpo_loss(CHOSEN, REJECTED, **options, alpha=1.0).loss, tdpo_loss(CHOSEN, REJECTED, **options, version=1).loss)


def test_the_divergence() -> None:
    logits, ref = torch.randn(3, 4, 7, dtype=F64), torch.randn(3, 4, 7, dtype=F64)
    p, q = ref.softmax(-1), logits.softmax(-1)
    got = position_kl(logits, ref)
    close(got, (p * (p / q).log()).sum(-1))
    assert got.shape == (3, 4) and (got > 0).all()
    assert not position_kl(ref, ref).any()
    x, r = logits.clone().requires_grad_(), ref.clone().requires_grad_()
    slope, reference = torch.autograd.grad(position_kl(x, r).sum(), (x, r), allow_unused=True)
    assert reference is None
    close(slope, q - p)
    assert position_kl(logits.bfloat16(), ref.bfloat16()).dtype == torch.float32


def test_what_the_reference_rules_out_adds_nothing() -> None:
    ref = torch.tensor([[0.0, 0.0, -math.inf]], dtype=F64)
    policy = torch.tensor([[0.0, 1.0, -math.inf]], dtype=F64)
    close(position_kl(policy, ref), position_kl(policy[:, :2], ref[:, :2]))
    assert position_kl(policy, torch.zeros(1, 3, dtype=F64)) == math.inf


@pytest.mark.parametrize("options", [{}, {"version": 1}])
def test_recipe(options) -> None:
    kl = torch.rand(6, 5, dtype=F64)

    def expected(logp, ref):
        chosen_kl, rejected_kl = sums(kl)
        return tdpo_loss(*sums(logp - ref), chosen_kl=chosen_kl, rejected_kl=rejected_kl, **options).loss

    assert_layouts_agree(load_pair_recipe("tdpo", **options), expected, per_token={"position_kl": kl})


def test_the_recipes_divergence_has_a_gradient() -> None:
    kl = torch.rand(6, 5, dtype=F64, requires_grad=True)
    logp, ref = -torch.rand(6, 5, dtype=F64), -torch.rand(6, 5, dtype=F64)
    loss = load_pair_recipe("tdpo").loss(Pairs(logp, MASK, ref, extra={"position_kl": kl})).loss
    (slope,) = torch.autograd.grad(loss, kl)
    x_w, x_l = sums(logp - ref)
    k_w, k_l = sums(kl.detach())
    pull = 0.1 * 0.5 * torch.sigmoid(-0.1 * (x_w - x_l - 0.5 * (k_l - k_w))) / 3
    close(slope[:3], torch.zeros(3, 5))
    close(slope[3:], pull[:, None] * MASK[3:])
    close(loss.detach(), -logsigmoid(0.1 * (x_w - x_l - 0.5 * (k_l - k_w))).mean())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="version is 3; accepted: 1, 2"):
        run(version=3)
    with pytest.raises(ValueError, match=r"rejected_kl has shape \[2\]; \[1\] is expected"):
        run(*SIDES[:3], torch.zeros(2, dtype=F64))
    with pytest.raises(ValueError, match=r"ref_logits has shape \[2, 3\]; \[2, 4\] is expected, like logits"):
        position_kl(torch.zeros(2, 4), torch.zeros(2, 3))
