"""TRL: its trainers with prefkern's head, and with prefkern's recipes.

    prefkern.integrations.trl.patch()                                      # the trainers' own losses, with prefkern's head
    PrefkernGRPOTrainer(recipe="gtpo", model=..., reward_funcs=..., ...)   # any recipe for rollouts
    PrefkernDPOTrainer(recipe="simpo:beta=2.5", model=..., ...)            # any recipe for pairs

Both are independent of each other. Hooks are private names of TRL's: versions other than those that were tested are refused.
"""

from __future__ import annotations

from typing import Any

from .._version import check_version
from ._patch import SUPPORTED, Patch, patch, unpatch

__all__ = ["SUPPORTED", "Patch", "PrefkernDPOTrainer", "PrefkernGRPOTrainer", "patch", "unpatch"]

_TRAINERS = {"PrefkernGRPOTrainer": "_grpo", "PrefkernDPOTrainer": "_dpo"}


def __getattr__(name: str) -> Any:
    """The trainers, imported when asked for: they take TRL's trainers with them, which `patch` does not need."""
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    check_version("trl", *SUPPORTED)
    return getattr(import_module(f"{__name__}.{_TRAINERS[name]}"), name)
