"""What objects with a `state_dict` share: a state that says what it is of, and is looked at before anything is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def save_state(owner: object, version: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A state of plain values and copies of tensors, with the class and version that wrote it."""
    held = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in fields.items()}
    return {"class": type(owner).__name__, "version": version, **held}


def checked_state(owner: object, version: int, state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a state that :func:`save_state` made for such an object: those of ``like``, with its types, and for tensors
    its shapes and dtypes, as copies on its devices.

    Raises:
        ValueError: naming the field, what it holds and what is expected. The object has not changed then.
        TypeError: state is no mapping.
    """
    name = type(owner).__name__
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}; a dict from {name}.state_dict() is expected")
    if state.get("class") != name or state.get("version") != version:
        found = f"{state.get('class')!r}, version {state.get('version')!r}"
        raise ValueError(f"state is of {found}; one of {name!r}, version {version}, is expected")
    missing, unknown = sorted(like.keys() - state.keys()), sorted(state.keys() - like.keys() - {"class", "version"})
    if missing or unknown:
        raise ValueError(f"state of {name}: missing {missing}, unknown {unknown}; expected are {sorted(like)}")
    return {field: _checked(f"state[{field!r}]", state[field], expected) for field, expected in like.items()}


def _checked(name: str, value: Any, like: Any) -> Any:
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {got}; {like.dtype} {list(like.shape)} is expected")
        return value.detach().to(like.device, copy=True)
    if isinstance(like, bool) or not isinstance(like, (int, float)):
        accepted: tuple[type, ...] = (type(like),)
    else:
        accepted = (int,) if isinstance(like, int) else (int, float)
    if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(like, bool)):
        raise ValueError(f"{name} is a {type(value).__name__}; a {type(like).__name__} is expected")
    return value


def generator(seed: int, *keys: int) -> torch.Generator:
    """A CPU generator for one draw: equal seed and keys give equal draws, whatever was drawn before."""
    mixed = seed & 0xFFFFFFFFFFFFFFFF
    for key in keys:  # splitmix64 over the keys: neighbours get unrelated streams
        mixed = (mixed + 0x9E3779B97F4A7C15 * (2 * key + 1)) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed >> 1)
