"""LD-DPO against its definition in tokens and its identities."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import CU_SEQLENS, F64, MASK, assert_layouts_agree, close, gradients, sums, tokens
from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.ld_dpo import ld_dpo_loss, ld_token_weights, token_places

SHARED = torch.tensor([1, 2, 3])  # of lengths 5 and 1, 2 and 4, 3 and 5


def by_hand(logp, ref, alpha, beta=0.1):
    place = torch.arange(1, 6)
    weights = torch.where(place > SHARED.repeat(2)[:, None], torch.tensor(alpha, dtype=F64), 1.0)
    chosen, rejected = sums((logp - ref) * weights)
    return -logsigmoid(beta * (chosen - rejected))


def test_worked_numbers() -> None:
    """Two tokens against three, of log-ratios 1, 2 and 1, -1, 4: the last one beyond both."""
    ratios = torch.tensor([[1.0, 2.0, 9.0], [1.0, -1.0, 4.0]], dtype=F64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for alpha, z in ((0.0, 0.3), (0.5, 0.1), (1.0, -0.1)):
        out, slope = gradients(lambda x, alpha=alpha: ld_dpo_loss(x, None, mask, alpha=alpha), ratios)
        close(out.loss.detach(), -logsigmoid(torch.tensor(z, dtype=F64)))
        pull = -0.1 * torch.sigmoid(torch.tensor(-z, dtype=F64))
        close(slope, pull * torch.tensor([[1, 1, 0], [-1, -1, -alpha]], dtype=F64))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_policy_and_reference_alike(alpha) -> None:
    logp, ref = tokens()
    out, slope = gradients(lambda x: ld_dpo_loss(x, ref, MASK, alpha=alpha, reduction="none"), logp)
    close(out.loss.detach(), by_hand(logp, ref, alpha))
    x = logp.clone().requires_grad_()
    close(slope, torch.autograd.grad(by_hand(x, ref, alpha).sum(), x)[0])


def test_identities() -> None:
    logp, ref = tokens()
    plain = dpo_loss(*sums(logp - ref), label_smoothing=0.1).loss
    close(ld_dpo_loss(logp, ref, MASK, alpha=1.0, label_smoothing=0.1).loss, plain)
    everything = dpo_loss(*(logp - ref).sum(1).chunk(2)).loss
    close(ld_dpo_loss(logp, ref, alpha=0.3).loss, everything)  # equal lengths: no token is beyond


def test_only_tokens_that_count_are_counted() -> None:
    mask = torch.tensor([[False, True, False, True, True], [True, False, True, False, False]])
    pairs = Pairs(torch.zeros(2, 5, dtype=F64), mask)
    assert token_places(pairs.logp, mask).tolist() == [[0, 1, 1, 2, 3], [1, 1, 2, 2, 2]]
    assert ld_token_weights(pairs, 0.25)[mask].tolist() == [1, 1, 0.25, 1, 1]
    assert token_places(pairs.logp).tolist() == [[1, 2, 3, 4, 5]] * 2


def test_places_in_packed_rows() -> None:
    logp = torch.zeros(7)
    cu_seqlens = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert token_places(logp, None, cu_seqlens).tolist() == [1, 2, 3, 1, 1, 2, 3]
    assert token_places(logp, mask, cu_seqlens).tolist() == [1, 1, 2, 1, 0, 1, 2]
    padded = token_places(MASK.double(), MASK)[MASK]
    assert torch.equal(padded, token_places(torch.zeros(20), None, CU_SEQLENS))


def test_recipe() -> None:
    recipe = load_pair_recipe("ld_dpo:alpha=0.3,beta=0.2")
    assert_layouts_agree(recipe, lambda logp, ref: by_hand(logp, ref, 0.3, 0.2).mean())
    assert load_pair_recipe("ld_dpo").alpha == 0.5


def test_refusals() -> None:
    logp, ref = tokens()
    for alpha in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"alpha is {alpha}; it must be between 0 and 1"):
            ld_dpo_loss(logp, ref, MASK, alpha=alpha)
    with pytest.raises(ValueError, match=r"lengths\[5\] is 0\.0; a response needs at least one token that counts"):
        ld_dpo_loss(logp, ref, MASK & (torch.arange(6) < 5)[:, None])
