"""WPO against worked numbers, its definition and its identities."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import CHOSEN, F64, MASK, REFS, REJECTED, assert_layouts_agree, close, gradients, sums
from prefkern import logits_logprobs
from prefkern.papers import load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.wpo import wpo_loss, wpo_weight

LOGITS = torch.tensor([[[1, 0, -1], [0, 2, 0]]], dtype=F64)
LABELS = torch.tensor([[0, 1]])
WEIGHTS = {"chosen_weight": torch.tensor([0.5, 1.5], dtype=F64), "rejected_weight": torch.tensor([0.8, 0.9], dtype=F64)}


def run(**options):
    options = {**WEIGHTS, "reduction": "none", **options}
    out, x, y = gradients(lambda x, y: wpo_loss(x, y, *REFS, **options), CHOSEN, REJECTED)
    return out.loss.detach(), out.metrics, x, y


def test_worked_weight() -> None:
    log_probs = LOGITS.log_softmax(-1)
    logp = log_probs.gather(-1, LABELS[..., None])[..., 0]
    close(wpo_weight(logp, log_probs.exp().square().sum(-1)), [1.2637979095])
    from_op = logits_logprobs(LOGITS, LABELS, outputs=("sum_sq_probs",))
    close(wpo_weight(from_op.logp, from_op.sum_sq_probs), [1.2637979095])
    # packed, beside a row that the mask leaves one token of
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    mask = torch.tensor([True, True, True, False])
    squares = log_probs.exp().square().sum(-1)[0].repeat(2)
    weights = wpo_weight(logp[0].repeat(2), squares, mask, cu_seqlens=cu_seqlens)
    close(weights, [1.2637979095, (logp[0, 0].exp() / squares[0]).item()])


def test_the_product_is_held_at_one_unless_told() -> None:
    plain = dpo_loss(CHOSEN, REJECTED, *REFS, reduction="none").loss
    loss, metrics, chosen, rejected = run()
    close(loss, plain * torch.tensor([0.4, 1.0], dtype=F64))
    close(metrics["weight"], 0.7)
    close(chosen, 0.1 * torch.tensor([0.4, 1.0], dtype=F64) * torch.expm1(-plain))
    close(rejected, -chosen)
    close(run(clamp=None)[0], plain * torch.tensor([0.4, 1.35], dtype=F64))
    close(run(clamp=0.3)[0], plain * 0.3)
    close(run(reduction="mean")[0], loss.mean())  # over pairs, not over weights
    z = 0.1 * (CHOSEN - REFS[0] - REJECTED + REFS[1])
    smoothed = -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z)
    close(run(label_smoothing=0.1)[0], smoothed * torch.tensor([0.4, 1.0], dtype=F64))


def test_identities() -> None:
    ones = torch.ones(2, dtype=F64)
    plain = dpo_loss(CHOSEN, REJECTED, *REFS, reduction="none").loss
    close(run(chosen_weight=ones, rejected_weight=ones)[0], plain)
    uniform = torch.full((2, 3), -math.log(7), dtype=F64)  # every token as likely as sum p^2
    close(wpo_weight(uniform, uniform.exp()), ones)
    assert wpo_weight(uniform, uniform.exp(), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [1, 1]


def test_weights_are_constants() -> None:
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    squares = torch.full((2, 3), 0.5, requires_grad=True)
    assert not wpo_weight(logp, squares).requires_grad
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    out = wpo_loss(CHOSEN.clone().requires_grad_(), REJECTED, chosen_weight=weight, rejected_weight=weight)
    assert torch.autograd.grad(out.loss, weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("clamp", [1.0, None])
def test_recipe(clamp) -> None:
    squares = 0.05 + 0.9 * torch.rand(6, 5, dtype=F64)

    def expected(logp, ref):
        with torch.no_grad():
            means = torch.cat(sums(logp - squares.log())) / MASK.sum(1)
        chosen, rejected = means.exp().chunk(2)
        ratios = sums(logp - ref)
        return wpo_loss(*ratios, chosen_weight=chosen, rejected_weight=rejected, clamp=clamp).loss

    assert_layouts_agree(load_pair_recipe("wpo", clamp=clamp), expected, per_token={"sum_sq_probs": squares})


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"sum_sq_probs has shape \[2, 2\]; \[2, 3\] is expected, like logp"):
        wpo_weight(torch.zeros(2, 3), torch.zeros(2, 2))
    for clamp in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"clamp is {clamp}; a positive number is expected, or None"):
            run(clamp=clamp)
    with pytest.raises(ValueError, match=r"chosen_weight has shape \[1\]; \[2\] is expected"):
        run(chosen_weight=torch.ones(1))
