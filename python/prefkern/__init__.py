"""Fused CUDA and CPU kernels for preference optimisation and RL post-training, as PyTorch ops with autograd."""

import importlib as _importlib
import os as _os
from types import ModuleType as _ModuleType

import torch as _torch  # noqa: F401  (its libraries must be loaded before _C)

from ._C import build_info, capabilities
from .ops import *  # noqa: F403
from .ops import __all__ as _ops
from .optim import ExtragradientStep
from .reliability import AnnotatorReliability

_wanted = _os.environ.get("PREFKERN_CPU_ISA")
if _wanted and _wanted not in capabilities()["cpu_isas"]:
    raise ValueError(f"PREFKERN_CPU_ISA is {_wanted!r}; accepted: {', '.join(capabilities()['cpu_isas'])}")
for _name, _paths in (
    ("PREFKERN_CPU_GEMM", ("own", "library")),
    ("PREFKERN_CUDA_FORWARD", ("auto", "stage1", "stage2")),
    ("PREFKERN_CUDA_BACKWARD", ("auto", "dense", "compact")),
):
    _wanted = _os.environ.get(_name)
    if _wanted and _wanted not in _paths:
        raise ValueError(f"{_name} is {_wanted!r}; accepted: {', '.join(_paths)}")

_LAZY = ("data", "diagnostics", "distributed", "mcts", "papers", "reference")

__version__ = build_info()["version"]
__all__ = [*_ops, "AnnotatorReliability", "ExtragradientStep", "build_info", "capabilities"]  # noqa: PLE0604


def __getattr__(name: str) -> _ModuleType:
    """Parts of the package that are loaded when they are first asked for."""
    if name in _LAZY:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
