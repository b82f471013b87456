"""The parts of the study on multi-model preference data, and its toy: the diagnostic rises with the cue that DPO exploits."""

import torch
from torch.testing import assert_close

import prefkern
from prefkern import data, diagnostics
from prefkern.papers import more_is_less

F64 = torch.float64


def test_every_part_is_there() -> None:
    for name in more_is_less.__all__:
        if name != "about":
            part = getattr(more_is_less, name)
            assert part is getattr(data if hasattr(data, name) else diagnostics, name) and part.__doc__
    assert more_is_less.self_rm_pair([2, -1, 7, 3], [1, 1, 0, 1]) == (3, 1)


def trained(p: float, seed: int = 0) -> tuple[float, float]:
    """AUC of the probe, and how often a policy trained by DPO prefers better content when style says the opposite.

    Responses are (style, content); the label is content's, by equal margins, and style goes along with it with probability p.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = 1500
    content = torch.randn(rows, 2, dtype=F64, generator=generator).sort(1, descending=True).values  # chosen, rejected
    with_it = (torch.rand(rows, generator=generator) < p).double() * 2 - 1
    style = torch.stack([with_it, -with_it], 1)
    noise = torch.randn(rows, 2, 2, dtype=F64, generator=generator)
    features = torch.stack([style, content], -1) + 0.5 * noise
    auc = diagnostics.linear_separability(features[:, 0], features[:, 1])["auc"]
    policy = torch.zeros(2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([policy], lr=20.0)
    zero = torch.zeros(rows, dtype=F64)
    for _ in range(60):
        loss = prefkern.preference_loss(*(features @ policy).unbind(1), zero, zero, beta=0.1).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flipped = torch.stack([torch.stack([-torch.ones(rows), torch.ones(rows)], 1), content], -1) + 0.5 * noise
    scores = flipped @ policy.detach()
    return auc, float((scores[:, 0] > scores[:, 1]).double().mean())


def test_the_more_separable_the_pairs_the_worse_with_style_flipped() -> None:
    auc, accuracy = torch.tensor([trained(p) for p in (0.5, 0.7, 0.9, 1.0)], dtype=F64).unbind(1)
    assert (auc.diff() > 0.02).all() and (accuracy.diff() < -0.02).all()
    assert auc[-1] > 0.95 and accuracy[0] > 0.75 and accuracy[-1] < 0.5
    assert_close(auc[0], torch.tensor(0.83, dtype=F64), rtol=0, atol=0.1)
