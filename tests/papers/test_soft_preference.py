"""Soft preference learning against its definition and its identities."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import CHOSEN, F64, REFS, REJECTED, assert_layouts_agree, close, gradients, sums
from prefkern.papers import load_pair_recipe
from prefkern.papers.cpo import cpo_loss
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.soft_preference import soft_preference_loss


def run(**options):
    out, x, y = gradients(lambda x, y: soft_preference_loss(x, y, *REFS, **{"reduction": "none", **options}), CHOSEN, REJECTED)
    return out.loss.detach(), out.metrics, x, y


def test_definition() -> None:
    loss, metrics, chosen, rejected = run(alpha=0.3, beta=0.1)
    z = 0.3 * (CHOSEN - REJECTED) - 0.1 * (REFS[0] - REFS[1])
    close(z, [0.55, -0.35])
    close(loss, -logsigmoid(z))
    close(chosen, -0.3 * torch.sigmoid(-z))
    close(rejected, -chosen)
    close(metrics["chosen_reward"], (0.3 * CHOSEN - 0.1 * REFS[0]).mean())
    smoothed = -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z)
    close(run(alpha=0.3, beta=0.1, label_smoothing=0.1)[0], smoothed)


def test_identities() -> None:
    close(run(alpha=0.2, beta=0.2)[0], dpo_loss(CHOSEN, REJECTED, *REFS, beta=0.2, reduction="none").loss)
    close(run()[0], dpo_loss(CHOSEN, REJECTED, *REFS, reduction="none").loss)
    close(run(alpha=0.2, beta=0.0)[0], cpo_loss(CHOSEN, REJECTED, beta=0.2, cpo_alpha=0, reduction="none").loss)


def test_the_optimum_is_what_the_objective_says() -> None:
    """At pi ~ ref^(beta / alpha) e^(r / alpha) the margin is the reward's: the gradient of the soft-labelled loss is 0."""
    reward, ref = torch.randn(6, dtype=F64), torch.randn(6, dtype=F64).log_softmax(0)
    policy = (0.1 / 0.3 * ref + reward / 0.3).log_softmax(0)
    chosen, rejected = policy[:3], policy[3:]
    wrong = torch.sigmoid(-(reward[:3] - reward[3:]))
    _, x, y = gradients(
        lambda x, y: soft_preference_loss(x, y, ref[:3], ref[3:], alpha=0.3, beta=0.1, label_smoothing=wrong), chosen, rejected
    )
    close(x, torch.zeros(3))
    close(y, torch.zeros(3))


def test_recipe() -> None:
    def expected(logp, ref):
        return soft_preference_loss(*sums(logp), *sums(ref), alpha=0.3, beta=0.2).loss

    assert_layouts_agree(load_pair_recipe("soft_preference:alpha=0.3,beta=0.2"), expected)


def test_refusals() -> None:
    for alpha in (0.0, -0.1):
        with pytest.raises(ValueError, match=f"alpha is {alpha}; it must be positive"):
            run(alpha=alpha)
    with pytest.raises(ValueError, match=r"ref_rejected_logp is None; without a reference this is `prefkern\.papers\.cpo`"):
        soft_preference_loss(CHOSEN, REJECTED, REFS[0], None)
