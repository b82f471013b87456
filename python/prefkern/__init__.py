"""Fused CUDA and CPU kernels for preference optimisation and RL post-training, as PyTorch ops with autograd."""

import torch as _torch  # noqa: F401  (its libraries must be loaded before _C)

from ._C import build_info, capabilities
from .ops import *  # noqa: F403
from .ops import __all__ as _ops

__version__ = build_info()["version"]
__all__ = [*_ops, "build_info", "capabilities"]  # noqa: PLE0604
