"""Where a chain of steps goes wrong."""

from __future__ import annotations

from collections.abc import Sequence


def first_error_step(step_ok: Sequence[bool]) -> int | None:
    """The index, from 0, of the first step that is wrong; None if none is, or if there are no steps.

    It is also the number of correct steps in front of it: the prefix that Step-DPO's pair of a wrong and a right step shares.

    Args:
        step_ok: whether each step is right, in order; bools (a list, or a 1-d bool tensor or array).

    Raises:
        TypeError: for anything else, such as scores, which nobody has compared with a threshold.
    """
    flags = step_ok.tolist() if hasattr(step_ok, "tolist") else list(step_ok)
    for index, ok in enumerate(flags):
        if not isinstance(ok, bool):
            raise TypeError(f"step_ok[{index}] is {ok!r}; a bool is expected")
    return flags.index(False) if False in flags else None
