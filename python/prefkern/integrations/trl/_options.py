"""Options of TRL's configurations that a recipe has in their place."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from ...papers import PairRecipe, Recipe


def refuse_options(args: Any, names: tuple[str, ...], recipe: Recipe | PairRecipe) -> None:
    """ValueError for the first of these options whose value is not its default."""
    for field in fields(args):
        if field.name not in names:
            continue
        factory: Any = field.default_factory
        default = factory() if field.default is MISSING else field.default
        value = getattr(args, field.name)
        if value != default:
            listed = ", ".join(f"{key}={v!r}" for key, v in recipe.options().items()) or "none"
            raise ValueError(
                f"{type(args).__name__} has {field.name}={value!r}, which recipe {recipe.name!r} decides; {default!r} is "
                f"expected, and options of the recipe: {listed}"
            )


def default_config(config: Any, model: Any, method: str) -> Any:
    """What TRL takes for no configuration: its defaults, and a folder named by the model."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return config(f"{name.split('/')[-1]}-{method}")
