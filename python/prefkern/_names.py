"""Names that users type: an unknown one is met with the nearest known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest_hint(name: str, accepted: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the accepted name that is nearest to ``name``, or nothing if none is near."""
    near = difflib.get_close_matches(name.lower(), list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def choice(name: str, value: Any, accepted: Sequence[Any]) -> int:
    """The place of ``value``, given as argument ``name``, among those accepted; or a ValueError that lists them."""
    if value in accepted:
        return accepted.index(value)
    hint = nearest_hint(value, filter(None, accepted)) if isinstance(value, str) else ""
    raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}{hint}")
