"""Names that users type: an unknown one is met with the nearest known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_hint(name: str, accepted: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the accepted name that is nearest to ``name``, or nothing if none is near."""
    near = difflib.get_close_matches(name.lower(), list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
