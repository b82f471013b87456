"""Enabled models in several processes: DDP, and FSDP whose head is a unit of its own."""

import pytest
import torch
from torch.testing import assert_close

from integrations.tiny_models import make_batch, make_model
from prefkern.integrations.transformers import enable, token_logprobs
from ranks import run_ranks


def batch_of(rank):
    return make_batch(rows=2, seed=rank, padded=False)


def expected():
    """What one process finds: the mean over the ranks' losses, and its gradients."""
    model = make_model("gemma2", tie_word_embeddings=False)
    losses = [model(**batch_of(rank)).loss for rank in range(2)]
    torch.stack(losses).mean().backward()
    return [loss.item() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def in_ddp(rank):
    model = make_model("gemma2", tie_word_embeddings=False)
    enable(model)
    trained = torch.nn.parallel.DistributedDataParallel(model)
    found = trained(**batch_of(rank))
    assert found.logits is None
    found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logp = token_logprobs(trained, **batch_of(rank)).logp
    (-logp.sum() / (logp != 0).sum()).backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-7)
    return found.loss.item(), grads


def in_fsdp(rank, head_alone, enable_first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model("gemma2", tie_word_embeddings=False)
    mesh = init_device_mesh("cpu", (2,))
    if enable_first:
        enable(model)
    if head_alone:
        fully_shard(model.lm_head, mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    enable(model)
    found = model(**batch_of(rank))
    assert found.logits is None
    found.loss.backward()
    logp = token_logprobs(model, **batch_of(rank)).logp
    assert_close(-logp.sum() / (logp != 0).sum(), found.loss, rtol=1e-5, atol=1e-6)
    return found.loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def compare(found) -> None:
    losses, grads = expected()
    for (loss, mine), own in zip(found, losses, strict=True):
        assert loss == pytest.approx(own, abs=2e-6)
        for name, grad in grads.items():
            assert_close(mine[name], grad, rtol=1e-4, atol=2e-6)


def test_ddp() -> None:
    compare(run_ranks(in_ddp, 2))


@pytest.mark.parametrize(("head_alone", "enable_first"), [(False, False), (True, False), (True, True)])
def test_fsdp(head_alone, enable_first) -> None:
    compare(run_ranks(in_fsdp, 2, head_alone, enable_first))
