"""The pairwise losses that are one kind of `preference_loss`: rDPO, SLiC, IPO, EXO, NCA, APO, DiscoPOP, LN-DPO, and RPO.

BCO, AOT and ASFT have more to them and files of their own."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.apo_anchored import apo_loss, apo_zero_unpaired_loss
from prefkern.papers.bco import bco_pair_loss
from prefkern.papers.discopop import discopop_loss
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.exo import exo_loss
from prefkern.papers.ipo import ipo_loss
from prefkern.papers.ln_dpo import ln_dpo_loss
from prefkern.papers.nca import nca_loss
from prefkern.papers.robust_dpo import robust_dpo_loss
from prefkern.papers.rpo import rpo_loss
from prefkern.papers.slic import hinge_loss, slic_loss

F64 = torch.float64
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = torch.tensor([[-10, -8], [-12, -7], [-11, -7.5], [-11.5, -8]], dtype=F64)
REFS = (REF_CHOSEN, REF_REJECTED)
LENGTHS = {"chosen_lengths": torch.tensor([4, 2]), "rejected_lengths": torch.tensor([3, 5])}
apo_down_loss = partial(apo_loss, anchor="down")
sum_ipo_loss = partial(ipo_loss, length_average=None)
mean_ipo_loss = partial(ipo_loss, **LENGTHS)
length_norm_loss = partial(ln_dpo_loss, **LENGTHS)

# Losses and slopes in chosen_logp per pair.
WORKED = {
    "robust": (robust_dpo_loss, [0.6022070478, 0.7897070478], [-0.0587570155, -0.0662429845]),
    "hinge": (hinge_loss, [0.85, 1.15], [-0.1, -0.1]),
    "ipo, means": (mean_ipo_loss, [21.0069444444, 29.7025], [-2.2916666667, -5.45]),
    "ipo, sums": (sum_ipo_loss, [12.25, 42.25], [-7, -13]),
    "exo": (exo_loss, [2.5055165555, 3.0225540819], [-0.1679722526, -0.1754302228]),
    "nca": (nca_loss, [1.3508248141, 1.4248878021], [-0.0212531219, -0.0268746095]),
    "apo_zero": (apo_loss, [0.9625234160, 1.0374765840], [-0.0249376040, -0.0249843815]),
    "apo_down": (apo_down_loss, [0.9875493421, 1.0249324489], [7.7703352e-05, 1.2448084e-04]),
    "discopop": (discopop_loss, [0.8493375793, 0.7894947401], [-0.0625203020, -0.0213872248]),
    "ln_dpo": (length_norm_loss, [0.6725308454, 0.7159002842], [-0.0122396210, -0.0255624051]),
}


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(loss, chosen=CHOSEN, rejected=REJECTED, refs=REFS, **options):
    """Loss, metrics, and the gradients of its sum."""
    x, y = (torch.as_tensor(t, dtype=F64).clone().requires_grad_() for t in (chosen, rejected))
    out = loss(x, y, *refs, **options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss.sum(), (x, y))


@pytest.mark.parametrize("name", WORKED)
def test_worked_numbers(name) -> None:
    loss, losses, slopes = WORKED[name]
    each = run(loss, reduction="none")
    close(each[0], losses)
    close(each[2], slopes)
    mean = run(loss)
    close(mean[0], sum(losses) / 2)
    close(mean[2], torch.tensor(slopes, dtype=F64) / 2)
    assert mean[1]["pairs"] == 2
    close(mean[1]["reward_margin"], mean[1]["chosen_reward"] - mean[1]["rejected_reward"], atol=1e-16)


@pytest.mark.parametrize("name", WORKED)
def test_gradients_are_those_of_differences_and_the_reference_has_none(name) -> None:
    loss = WORKED[name][0]
    x, y = (torch.randn(2, dtype=F64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, *REFS, reduction="none", beta=0.7).loss, (x, y))
    refs = [r.clone().requires_grad_() for r in REFS]
    assert torch.autograd.grad(loss(x, y, *refs).loss, refs, allow_unused=True) == (None, None)
    assert torch.equal(loss(x, y, *refs).loss, loss(x - REF_CHOSEN, y - REF_REJECTED).loss)


def softplus_pair(z, smoothing=0.0):
    return (1 - smoothing) * F.softplus(-z) + smoothing * F.softplus(z)


X_W, X_L = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED
ONE = {"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(2)}
each = {"reduction": "none"}
IDENTITIES = {
    "rDPO without noise is DPO": (
        lambda: robust_dpo_loss(CHOSEN, REJECTED, *REFS, label_smoothing=0.0, **each).loss,
        lambda: dpo_loss(CHOSEN, REJECTED, *REFS, **each).loss,
    ),
    "rDPO over both labels is DPO": (
        lambda: 0.8 * robust_dpo_loss(X_W, X_L, label_smoothing=0.2, **each).loss
        + 0.2 * robust_dpo_loss(X_L, X_W, label_smoothing=0.2, **each).loss,
        lambda: dpo_loss(X_W, X_L, **each).loss,
    ),
    "SLiC without likelihood is the hinge of beta 1": (
        lambda: slic_loss(CHOSEN, REJECTED, delta=3.0, nll_weight=0.0).loss,
        lambda: F.relu(3 - (CHOSEN - REJECTED)).mean(),
    ),
    "IPO of one token is IPO of sums": (
        lambda: ipo_loss(CHOSEN, REJECTED, *REFS, **ONE, **each).loss,
        lambda: sum_ipo_loss(CHOSEN, REJECTED, *REFS, **each).loss,
    ),
    "LN-DPO of one token is DPO": (
        lambda: ln_dpo_loss(CHOSEN, REJECTED, *REFS, **ONE, **each).loss,
        lambda: dpo_loss(CHOSEN, REJECTED, *REFS, **each).loss,
    ),
    "EXO is the KL to the label": (
        lambda: exo_loss(X_W, X_L, beta=1.0, label_smoothing=0.3, **each).loss,
        lambda: sum(
            q * (q / p).log() for q, p in ((torch.sigmoid(X_W - X_L), 0.7), (torch.sigmoid(X_L - X_W), 0.3))
        ),
    ),
    "NCA is BCO and half of what noise costs": (
        lambda: nca_loss(X_W, X_L, beta=1.0, **each).loss,
        lambda: bco_pair_loss(X_W, X_L, beta=1.0, **each).loss + (F.softplus(X_W) - F.softplus(X_L)) / 2,
    ),
    "APO's halves are the unpaired loss": (
        lambda: apo_loss(CHOSEN, REJECTED, *REFS).loss / 2,
        lambda: apo_zero_unpaired_loss(
            torch.cat([CHOSEN, REJECTED]), torch.cat(REFS), torch.tensor([True, True, False, False])
        ).loss,
    ),
    "DiscoPOP of a large tau is half and half": (
        lambda: discopop_loss(X_W, X_L, beta=1.0, tau=1e12, **each).loss,
        lambda: (F.softplus(X_L - X_W) + (X_L - X_W).exp()) / 2,
    ),
    "DiscoPOP of a small tau is logistic below 0 and exponential above": (
        lambda: discopop_loss(X_W, X_L, beta=1.0, tau=1e-3, **each).loss,
        lambda: torch.where(X_W > X_L, (X_L - X_W).exp(), F.softplus(X_L - X_W)),
    ),
    "RPO without likelihood is DPO": (
        lambda: rpo_loss(CHOSEN, REJECTED, *REFS, nll_weight=0.0, label_smoothing=0.1).loss,
        lambda: dpo_loss(CHOSEN, REJECTED, *REFS, label_smoothing=0.1).loss,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name) -> None:
    left, right = IDENTITIES[name]
    close(left(), right(), atol=1e-11)


# ---- single ones


def test_robust_may_be_negative_and_takes_weights() -> None:
    x, y = torch.tensor([9.0, 0.0], dtype=F64), torch.zeros(2, dtype=F64)
    loss, _, chosen, _ = run(robust_dpo_loss, x, y, (), beta=1.0, label_smoothing=0.4, reduction="none")
    close(loss, [math.log1p(math.exp(-9)) - 0.4 / 0.2 * 9, math.log(2)])
    close(chosen, [-torch.sigmoid(-x[0]) - 2, -2.5])
    close(run(robust_dpo_loss, weight=torch.tensor([0.0, 2.0], dtype=F64))[0], 0.7897070478)


def test_a_hinge_asks_for_delta_and_no_more() -> None:
    x = torch.tensor([2.0, 2.5, 1.0, 0.0], dtype=F64)
    loss, _, chosen, rejected = run(hinge_loss, x, torch.zeros(4), (), beta=1.0, delta=2.0, reduction="none")
    close(loss, [0, 0, 1, 2])
    close(chosen, [0, 0, -1, -1])
    close(rejected, [0, 0, 1, 1])
    per_pair = run(hinge_loss, x, torch.zeros(4), (), beta=1.0, delta=torch.arange(4.0), reduction="none")
    close(per_pair[0], [0, 0, 1, 3])


@pytest.mark.parametrize(("reduction", "likelihood"), [("sum", 9.0), ("token", 3.0), ("response", (10 / 4 + 8 / 2) / 2)])
def test_slic_and_rpo_add_the_likelihood(reduction, likelihood) -> None:
    lengths = LENGTHS["chosen_lengths"]
    hinge, dpo = hinge_loss(CHOSEN, REJECTED, beta=1.0), dpo_loss(CHOSEN, REJECTED, beta=0.2)
    for loss, base in ((slic_loss, hinge), (partial(rpo_loss, beta=0.2), dpo)):
        got = run(loss, refs=(), chosen_lengths=lengths, nll_weight=0.5, nll_reduction=reduction)
        close(got[0], base.loss + 0.5 * likelihood)
        close(got[1]["nll"], likelihood)
        plain = run(loss, refs=(), chosen_lengths=lengths, nll_weight=0.0)
        slope = {"sum": torch.ones(2) / 2, "token": torch.ones(2) / 6, "response": 1 / lengths / 2}[reduction].to(F64)
        close(got[2] - plain[2], -0.5 * slope, atol=1e-7)
        close(got[3], plain[3], atol=0)
    assert "nll" not in plain[1]


def test_ipo_stops_at_its_margin() -> None:
    x = torch.tensor([1.25], dtype=F64)
    loss, metrics, chosen, _ = run(ipo_loss, x, torch.zeros(1), (), beta=0.4, length_average=None)
    close(loss, 0, atol=1e-16)
    close(chosen, [0], atol=1e-15)
    close(metrics["reward_margin"], 0.5, atol=1e-15)


@pytest.mark.parametrize("smoothing", [1e-3, 0.3])
def test_exo_is_least_at_the_label_and_flat_far_away(smoothing) -> None:
    best = math.log((1 - smoothing) / smoothing)
    x = torch.tensor([best, 1e4, -1e4], dtype=F64)
    loss, _, chosen, _ = run(exo_loss, x, torch.zeros(3), (), beta=1.0, label_smoothing=smoothing, reduction="none")
    close(loss, [0, -math.log1p(-smoothing), -math.log(smoothing)], atol=1e-14)
    close(chosen, [0, 0, 0], atol=1e-14)


def test_nca_draws_the_chosen_to_log_2() -> None:
    x = torch.tensor([math.log(2)], dtype=F64)
    _, _, chosen, rejected = run(nca_loss, x, torch.zeros(1), (), beta=1.0)
    close(chosen, [0], atol=1e-15)
    close(rejected, [0.25], atol=1e-15)


def test_apo_moves_each_side_as_it_says() -> None:
    x, y = torch.randn(2, 50, dtype=F64)
    _, _, chosen, rejected = run(apo_loss, x, y, ())
    assert (chosen < 0).all() and (rejected > 0).all()
    _, _, chosen, rejected = run(apo_down_loss, x, x, (), beta=1.0)  # at no margin
    close(chosen, (torch.sigmoid(x) * torch.sigmoid(-x) - 0.25) / 50, atol=1e-15)
    assert (rejected > 0).all() and (chosen + rejected > 0).all()  # down with both together


def test_unpaired_apo_takes_any_numbers() -> None:
    logp, desirable = torch.tensor([1.0, -1.0, 2.0], dtype=F64).requires_grad_(), torch.tensor([True, False, False])
    out = apo_zero_unpaired_loss(logp, None, desirable, beta=1.0)
    s = torch.sigmoid(logp.detach())
    close(out.loss.detach(), (1 - s[0] + s[1] + s[2]) / 3)
    close(torch.autograd.grad(out.loss, logp)[0], torch.tensor([-1, 1, 1]) * s * (1 - s) / 3)
    only = apo_zero_unpaired_loss(logp, None, torch.ones(3, dtype=torch.bool), beta=1.0)
    close(only.loss.detach(), (1 - s).mean())


def test_discopop_has_a_dent_and_does_not_overflow() -> None:
    z = torch.tensor([-0.4, -0.12, 0.0], dtype=F64)
    losses = run(discopop_loss, z, torch.zeros(3), (), beta=1.0, reduction="none")[0]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    far = torch.tensor([-1000.0, -90.0, 1000.0], requires_grad=True)
    loss = discopop_loss(far, torch.zeros(3), beta=1.0, reduction="none").loss
    assert_close(loss.detach(), torch.tensor([1000.0, 90.0, 0.0]))
    assert_close(torch.autograd.grad(loss.sum(), far)[0], torch.tensor([-1.0, -1.0, 0.0]))


# ---- recipes and refusals


LOGP = (torch.cat([CHOSEN, REJECTED])[:, None] / torch.tensor([4, 2, 3, 5])[:, None]).expand(4, 5)
REF = (torch.cat(REFS)[:, None] / torch.tensor([4, 2, 3, 5])[:, None]).expand(4, 5)
MASK = torch.arange(5) < torch.tensor([[4], [2], [3], [5]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("robust_dpo:label_smoothing=0.2,beta=0.3", lambda: robust_dpo_loss(X_W, X_L, label_smoothing=0.2, beta=0.3)),
        ("slic:beta=0.3,delta=2.0", lambda: hinge_loss(X_W, X_L, beta=0.3, delta=2.0)),
        (
            "slic:reference_free=True,delta=4.0,nll_weight=0.3,nll_reduction=token",
            lambda: slic_loss(CHOSEN, REJECTED, torch.tensor([4, 2]), delta=4.0, nll_weight=0.3, nll_reduction="token"),
        ),
        ("ipo:beta=0.3", lambda: mean_ipo_loss(X_W, X_L, beta=0.3)),
        ("ipo:beta=0.3,length_average=None", lambda: sum_ipo_loss(X_W, X_L, beta=0.3)),
        ("exo:label_smoothing=0.2,beta=0.3", lambda: exo_loss(X_W, X_L, label_smoothing=0.2, beta=0.3)),
        ("nca:beta=0.3", lambda: nca_loss(X_W, X_L, beta=0.3)),
        ("apo_anchored:beta=0.3", lambda: apo_loss(X_W, X_L, beta=0.3)),
        ("apo_anchored:anchor=down", lambda: apo_down_loss(X_W, X_L)),
        ("discopop:tau=0.5,beta=0.3", lambda: discopop_loss(X_W, X_L, tau=0.5, beta=0.3)),
        ("ln_dpo:beta=3.0", lambda: length_norm_loss(X_W, X_L, beta=3.0)),
        (
            "rpo:beta=0.3,label_smoothing=0.2,nll_weight=0.7,nll_reduction=response",
            lambda: rpo_loss(
                CHOSEN, REJECTED, *REFS, chosen_lengths=torch.tensor([4, 2]), beta=0.3, label_smoothing=0.2, nll_weight=0.7,
                nll_reduction="response",
            ),
        ),
    ],
)  # fmt: skip
def test_recipes_are_the_losses_of_the_sums(text, expected) -> None:
    got, wanted = load_pair_recipe(text).loss(Pairs(LOGP, MASK, REF)), expected()
    close(got.loss, wanted.loss, atol=1e-13)
    assert set(got.metrics) == set(wanted.metrics)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: robust_dpo_loss(CHOSEN, REJECTED, label_smoothing=0.5),
            "label_smoothing is 0.5; it must be at least 0 and below 1/2",
        ),
        (
            lambda: exo_loss(CHOSEN, REJECTED, label_smoothing=0.0),
            "label_smoothing is 0; it must be between 0 and 1, both excluded",
        ),
        (lambda: hinge_loss(CHOSEN, REJECTED, delta=math.inf), "offset is inf; it must be finite"),
        (lambda: ipo_loss(CHOSEN, REJECTED), "chosen_lengths is None; average needs it"),
        (
            lambda: ipo_loss(CHOSEN, REJECTED, length_average="token", **LENGTHS),
            "length_average is 'token'; accepted: 'response', None",
        ),
        (lambda: sum_ipo_loss(CHOSEN, REJECTED, **LENGTHS), "chosen_lengths is given but average is None"),
        (lambda: ipo_loss(CHOSEN, REJECTED, beta=0.0, **LENGTHS), "beta is 0.0; it must be finite and positive"),
        (
            lambda: ln_dpo_loss(CHOSEN, REJECTED, chosen_lengths=torch.tensor([4, 0]), rejected_lengths=torch.tensor([1, 1])),
            "chosen_lengths[1] is 0; a response needs at least one token",
        ),
        (
            lambda: ipo_loss(CHOSEN, REJECTED, chosen_lengths=torch.tensor([4, 1]), rejected_lengths=torch.tensor([0, 1])),
            "rejected_lengths[0] is 0; a response needs at least one token",
        ),
        (lambda: apo_loss(CHOSEN, REJECTED, anchor="up"), "anchor is 'up'; accepted: 'zero', 'down'"),
        (lambda: discopop_loss(CHOSEN, REJECTED, tau=0.0), "tau is 0; it must be finite and positive"),
        (lambda: rpo_loss(CHOSEN, REJECTED), "chosen_lengths is None; nll_reduction 'token' needs them"),
        (
            lambda: rpo_loss(CHOSEN, REJECTED, chosen_lengths=torch.tensor([4, 0])),
            "chosen_lengths[1] is 0; a response needs at least one token",
        ),
        (lambda: slic_loss(CHOSEN, REJECTED, nll_reduction="mean"), "chosen_lengths is None; nll_reduction 'mean' needs them"),
        (lambda: nca_loss(CHOSEN, REJECTED[:1]), "rejected_logp has shape [1]; chosen_logp has shape [2], so the same"),
        (lambda: load_pair_recipe("slic").loss(Pairs(LOGP, MASK)), "pairs.ref_logp is None; a torch.Tensor is expected"),
        (
            lambda: load_pair_recipe("rpo").loss(Pairs(LOGP, MASK & (MASK.sum(1, keepdim=True) > 2), REF)),
            "lengths[1] is 0.0; a response needs at least one token",
        ),
    ],
)  # fmt: skip
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_options_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"label_smoothing is tensor\(.*; a number is expected"):
        robust_dpo_loss(CHOSEN, REJECTED, label_smoothing=torch.tensor([0.1, 0.2]))
    with pytest.raises(TypeError, match=r"delta is None; a number or a torch\.Tensor is expected"):
        hinge_loss(CHOSEN, REJECTED, delta=None)
