"""All papers by name, and recipes from a string."""

from __future__ import annotations

import importlib
import pkgutil
import re
from ast import literal_eval
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .._names import choice, nearest_hint
from ._about import About
from ._pairs import PairRecipe
from ._recipe import Recipe

NAMES: tuple[str, ...] = tuple(
    sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))
)
"""The modules of this package, one per paper."""


def module(name: str) -> ModuleType:
    """The module of a paper. ValueError with the nearest name if there is none."""
    if name not in NAMES:
        raise ValueError(f"paper is {name!r}; accepted: {', '.join(NAMES)}{nearest_hint(name, NAMES)}")
    return importlib.import_module(f"{__package__}.{name}")


def about() -> dict[str, About]:
    """What is said about each paper, by the name of its module."""
    return {name: module(name).about for name in NAMES}


def recipes() -> dict[str, Recipe]:
    """Every recipe for rollouts with its default options, by name."""
    return {recipe.name: recipe for recipe in _all_recipes() if isinstance(recipe, Recipe)}


def pair_recipes() -> dict[str, PairRecipe]:
    """Every recipe for preference pairs with its default options, by name."""
    return {recipe.name: recipe for recipe in _all_recipes() if isinstance(recipe, PairRecipe)}


def _all_recipes() -> list[Any]:
    return [module(name).recipe for name in NAMES if hasattr(module(name), "recipe")]


def load_recipe(text: str, **options: Any) -> Recipe:
    """The recipe for rollouts that a string names, such as "ngrpo" or "ngrpo:r_max=2.0,n_virtual=2", with its options
    replaced.

    Values in the string are Python literals; what is none is taken as text. Keyword arguments go on top of those.
    Raises ValueError, with the nearest name there is, for a recipe or an option that does not exist.
    """
    return _load(text, options, recipes(), "load_pair_recipe" if text.partition(":")[0] in pair_recipes() else "")


def load_pair_recipe(text: str, **options: Any) -> PairRecipe:
    """The recipe for preference pairs that a string names, such as "dpo" or "simpo:beta=2.5": as :func:`load_recipe`."""
    return _load(text, options, pair_recipes(), "load_recipe" if text.partition(":")[0] in recipes() else "")


T = TypeVar("T", Recipe, PairRecipe)


def _load(text: str, options: dict[str, Any], known: dict[str, T], elsewhere: str) -> T:
    name, _, tail = text.partition(":")
    if name not in known:
        hint = f"; {elsewhere} has it" if elsewhere else nearest_hint(name, known)
        raise ValueError(f"recipe is {name!r}; accepted: {', '.join(known)}{hint}")
    recipe = known[name]
    given = _parse_options(tail, text) | options
    accepted = sorted(f.name for f in fields(recipe))
    for key in given:
        if key not in accepted:
            listed = ", ".join(accepted) or "none"
            raise ValueError(f"recipe {name!r} has no option {key!r}; accepted: {listed}{nearest_hint(key, accepted)}")
    types = get_type_hints(type(recipe))
    for key, value in given.items():
        _check_type(f"option {key!r} of recipe {name!r}", value, types[key])
    return replace(recipe, **given)


def _check_type(what: str, value: Any, hint: Any) -> None:
    """ValueError for text where a number is expected, and for a name that is not one of the accepted."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    if isinstance(value, str) and names:
        choice(what, value, names)
    if isinstance(value, str) and not names and str not in kinds:
        raise ValueError(
            f"{what} is {value!r}; accepted: {' or '.join(getattr(kind, '__name__', str(kind)) for kind in kinds)}"
        )


def _parse_options(options: str, text: str) -> dict[str, Any]:
    """'r_max=2.0,agg=token-sum' as a dict. Values are Python literals, or else text."""
    given: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", options) if options else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"recipe is {text!r}: {part!r} is no option=value")
        try:
            given[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    return given
