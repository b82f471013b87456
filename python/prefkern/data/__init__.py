"""What is done with preference data on the host before a loss sees it: pairs from ratings, curricula, reference log-probs.

Nothing here needs a GPU or a gradient. What the methods leave out is counted, and the counts come with the result.
"""

from .curriculum import Curriculum, CurriculumPair
from .pairs import (
    GapSplit,
    Indices,
    RankedPair,
    dno_pairs,
    mix_pair,
    ranked_pairs,
    replay,
    self_rm_pair,
    split_by_reward_gap,
    winrates,
)
from .reference import CorruptedCacheError, ReferenceCache, data_fingerprint, model_fingerprint, refresh_reference
from .steps import first_error_step
from .turns import ACTIONS, ecpo_satisfaction, ecpo_select

__all__ = [
    "ACTIONS",
    "CorruptedCacheError",
    "Curriculum",
    "CurriculumPair",
    "GapSplit",
    "Indices",
    "RankedPair",
    "ReferenceCache",
    "data_fingerprint",
    "dno_pairs",
    "ecpo_satisfaction",
    "ecpo_select",
    "first_error_step",
    "mix_pair",
    "model_fingerprint",
    "ranked_pairs",
    "refresh_reference",
    "replay",
    "self_rm_pair",
    "split_by_reward_gap",
    "winrates",
]
