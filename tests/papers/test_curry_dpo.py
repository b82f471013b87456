"""Curry-DPO: its worked loss, and stages that are wired as the paper says."""

import math

import torch
from torch import nn
from torch.testing import assert_close

from prefkern.data import Curriculum, ReferenceCache, ranked_pairs, refresh_reference
from prefkern.papers import curry_dpo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def test_worked_loss() -> None:
    logps = [vector(-20, -8), vector(-22, -7), vector(-21, -8.5), vector(-21, -7.5)]
    for logp in logps:
        logp.requires_grad_()
    loss, metrics = curry_dpo.curry_dpo_loss(*logps, beta=0.1)
    assert_close(loss.detach(), vector(0.645643025)[0], rtol=0, atol=1e-9)
    loss.backward()
    assert_close(logps[0].grad, vector(-0.02250830013, -0.025), rtol=0, atol=1e-11)
    assert_close(logps[1].grad, -logps[0].grad, rtol=0, atol=0)
    assert logps[2].grad is None and logps[3].grad is None  # the reference is a constant
    assert metrics["pairs"] == 2


def test_the_parts_are_those_of_the_data_package() -> None:
    assert curry_dpo.Curriculum is Curriculum and curry_dpo.ranked_pairs is ranked_pairs


def test_stages_begin_at_log_two_with_the_reference_of_the_stage_before(tmp_path) -> None:
    """A bandit of 4 responses to 6 prompts, trained through three stages; log-probs of the reference come from the cache."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, 5, dtype=F64, generator=generator)
    ratings = features @ vector(1, -1, 0.5, 0, 0)
    curriculum = Curriculum([ranked_pairs(r) for r in ratings])
    policy = nn.Linear(5, 1, bias=False, dtype=F64)
    cache = ReferenceCache(tmp_path)
    optimizer = torch.optim.SGD(policy.parameters(), lr=2.0)

    def logps(model, batch):
        all_of = torch.log_softmax(model(features)[..., 0], -1)
        return {"chosen": all_of[batch[:, 0], batch[:, 1]], "rejected": all_of[batch[:, 0], batch[:, 2]]}

    @torch.no_grad()
    def utility():
        return float((torch.softmax(policy(features)[..., 0], -1) * ratings).sum(-1).mean())

    start, references = utility(), []
    for stage in range(3):
        batch = torch.tensor([pair[:3] for pair in curriculum.stage(stage, seed=stage)])
        assert len(batch) == 6  # every prompt is in every stage
        assert curriculum.reference_of(stage) == (stage - 1 if stage else None)  # the policy as it is now
        (reference,) = refresh_reference(policy, [batch], logps, cache)
        references.append(reference["chosen"])
        for step in range(20):
            now = logps(policy, batch)
            loss = curry_dpo.curry_dpo_loss(now["chosen"], now["rejected"], reference["chosen"], reference["rejected"]).loss
            if step == 0:
                assert_close(loss.detach(), torch.tensor(math.log(2), dtype=F64), rtol=0, atol=1e-15)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < math.log(2) - 1e-3
    assert len(list(tmp_path.iterdir())) == 3 and not references[0].equal(references[1])
    assert utility() > start + 0.05
