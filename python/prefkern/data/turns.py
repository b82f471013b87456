r"""Turn-level pairs of a dialogue: what a user was dissatisfied with, against its rewrite (ECPO)."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence

from .pairs import Indices, floats

ACTIONS = ("Ask", "Recommend", "Response", "Search")
"""What an agent of ECPO may do; a turn reads ``Ask[...]``."""

_NAMES = "|".join(ACTIONS)
_FORMAT = re.compile(rf"^({_NAMES})\[[^\[\]]+\]$")
_BRACKETS = re.compile(rf"^({_NAMES})\[.+\]$", re.DOTALL)


def ecpo_satisfaction(flexibility: int, coherence: int, guidance: int) -> int:
    """A user's satisfaction with a turn, 0 to 5, from the points deducted: 0 to 2, 0 to 2, and 0 or 1."""
    for name, value, most in (("flexibility", flexibility, 2), ("coherence", coherence, 2), ("guidance", guidance, 1)):
        if value not in range(most + 1):
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(str, range(most + 1)))}")
    return 5 - flexibility - coherence - guidance


def ecpo_select(
    scores: Sequence[float | None],
    originals: Sequence[str],
    rewrites: Sequence[str | None],
    *,
    lam: float,
    min_score: float = 0,
    check_format: bool = True,
    same_action: bool = False,
    dialogue: Sequence[Hashable] | None = None,
) -> Indices:
    """The turns whose rewrite makes a pair: rewrite chosen, original rejected, the original history as prompt.

    Args:
        scores: the user's satisfaction with each turn; None or NaN if it could not be read.
        originals: what the agent did.
        rewrites: what it should have done; None if none came. Those of turns that were good enough are not looked at.
        lam: turns below this are rewritten. With integer scores up to 5, 5 is everything short of perfect.
        min_score: turns below this are left out. The authors' files begin at 1, which loses the worst turns; the method as
            described begins at 0.
        check_format: the rewrite must read like an action, such as ``Ask[...]``, without brackets inside.
        same_action: it must also be the same action as the original's; the prompt of the rewriter asks for that, the authors'
            code does not look.
        dialogue: which dialogue each turn is from, to count its pairs: those of one dialogue are correlated.

    Returns:
        Indices, ascending, a list whose `skipped` says how many turns were left out, by the first of these reasons: no_score,
        good_enough, below_min_score, no_rewrite, inner_brackets (an action, but with brackets inside, as in a title:
        good rewrites are lost here), bad_format, unchanged, other_action.
    """
    score = floats("scores", scores)
    for name, given in (("originals", originals), ("rewrites", rewrites), ("dialogue", dialogue)):
        if given is not None and len(given) != len(score):
            raise ValueError(f"{name} has {len(given)} entries; {len(score)} are expected, one per turn")
    skipped = dict.fromkeys(_reasons(0, "", None, lam, min_score, check_format, same_action), 0)
    selected = []
    for i, (value, original, rewrite) in enumerate(zip(score, originals, rewrites, strict=True)):
        reasons = _reasons(value, original, rewrite, lam, min_score, check_format, same_action)
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason is None:
            selected.append(i)
        else:
            skipped[reason] += 1
    per_dialogue = None
    if dialogue is not None:
        per_dialogue = dict.fromkeys(dialogue, 0)
        for i in selected:
            per_dialogue[dialogue[i]] += 1
    return Indices(selected, skipped=skipped, per_dialogue=per_dialogue)


def _reasons(
    score: float, original: str, rewrite: str | None, lam: float, min_score: float, check_format: bool, same_action: bool
) -> dict[str, bool]:
    """Why a turn is left out: the first that holds."""
    text = rewrite or ""
    formed = not check_format or bool(_FORMAT.match(text))
    return {
        "no_score": math.isnan(score),
        "good_enough": score >= lam,
        "below_min_score": score < min_score,
        "no_rewrite": rewrite is None,
        "inner_brackets": not formed and bool(_BRACKETS.match(text)),
        "bad_format": not formed,
        "unchanged": text == original,
        "other_action": same_action and _action(text) != _action(original),
    }


def _action(text: str) -> str:
    return text.partition("[")[0].strip()
