"""What one rank does with its shard of a head. In a module of its own: a rank imports it, and no trainer."""

import torch.distributed as dist
from torch import Tensor

from prefkern.integrations._heads import linear_cross_entropy


def sharded_head(rank: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Log-probs, entropies, the gradient of hidden as a sequence-parallel gather sums it up, and that of the shard."""
    hidden.requires_grad_()
    shard = weight.chunk(dist.get_world_size())[rank].clone().requires_grad_()
    logp, entropy = linear_cross_entropy(hidden, shard, labels, 0.7, "none", dist.group.WORLD)
    (logp.sum() + 0.1 * entropy.sum()).backward()
    total = hidden.grad.clone()
    dist.all_reduce(total)
    return logp.detach(), entropy.detach(), total, shard.grad
