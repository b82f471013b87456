"""One module per paper, named by the paper: a citation, its equations, how sure they are, and a thin composition of ops.

A module offers the paper's functions, `about`, and where the paper is an objective that a trainer can be set to, `recipe`.

    prefkern.papers.ngrpo.ngrpo_advantages(rewards, group)
    prefkern.papers.load_recipe("ngrpo", r_max=2.0)          # or "ngrpo:r_max=2.0", for a configuration file
"""

from . import (
    cgpo,
    cispo,
    copg,
    dagrpo,
    dapo,
    dgpo,
    disco,
    dr_grpo,
    etr,
    gcpo,
    gdpo,
    gigpo,
    gmpo,
    gpg,
    grpo,
    gspo,
    gtpo,
    mo_grpo,
    ngrpo,
    opo,
    otc,
    ppo,
    reg_grpo,
    reinforce_pp,
    rloo,
    sapo,
    tppo,
    trpa,
)
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
    "cgpo",
    "cispo",
    "copg",
    "dagrpo",
    "dapo",
    "dgpo",
    "disco",
    "dr_grpo",
    "etr",
    "gcpo",
    "gdpo",
    "gigpo",
    "gmpo",
    "gpg",
    "grpo",
    "gspo",
    "gtpo",
    "load_recipe",
    "mo_grpo",
    "module",
    "ngrpo",
    "opo",
    "otc",
    "ppo",
    "recipes",
    "reg_grpo",
    "reinforce_pp",
    "rloo",
    "sapo",
    "take_rows",
    "tppo",
    "trpa",
]
