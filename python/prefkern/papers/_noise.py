"""What papers on diffusion models share: the schedule of Stable Diffusion, and levels of it on the host."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_linear_abar(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """The cumulative alphas of Stable Diffusion's schedule, float64 [steps]: square roots of the betas are evenly spaced."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)


def host_levels(name: str, t: Tensor | int, rows: int, low: int, high: int) -> Tensor:
    """t as int64 [rows] on the CPU, of which each must be within low and high. Waits for the device where t is on one."""
    if not isinstance(t, Tensor):
        t = torch.tensor(t)
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {str(t.dtype)[6:]}; integers are expected")
    if t.shape not in ((), (1,), (rows,)):
        raise ValueError(f"{name} has shape {list(t.shape)}; [{rows}] is expected, or one element")
    levels = t.detach().to("cpu", torch.int64).expand(rows)
    if not bool(((levels >= low) & (levels <= high)).all()):
        i = int((~((levels >= low) & (levels <= high))).nonzero()[0, 0])
        raise ValueError(f"{name}[{i}] is {int(levels[i])}; accepted: {low} to {high}")
    return levels
