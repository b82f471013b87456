"""One module per paper, named by the paper: a citation, its equations, how sure they are, and a thin composition of ops.

A module offers the paper's functions, `about`, and where the paper is an objective that a trainer can be set to, `recipe`.

    prefkern.papers.ngrpo.ngrpo_advantages(rewards, group)
    prefkern.papers.load_recipe("ngrpo", r_max=2.0)          # or "ngrpo:r_max=2.0", for a configuration file
"""

from . import dr_grpo, gdpo, grpo, gtpo, ngrpo
from ._about import EVIDENCE, About
from ._recipe import Batch, Recipe, Rollout, take_rows
from ._registry import NAMES, about, load_recipe, module, recipes

__all__ = [
    "EVIDENCE",
    "NAMES",
    "About",
    "Batch",
    "Recipe",
    "Rollout",
    "about",
    "dr_grpo",
    "gdpo",
    "grpo",
    "gtpo",
    "load_recipe",
    "module",
    "ngrpo",
    "recipes",
    "take_rows",
]
