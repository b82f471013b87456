"""Which releases of a trainer its hooks were tested with: many are private names, which move between releases."""

import importlib
import re


def check_version(package: str, low: tuple[int, ...], high: tuple[int, ...]) -> None:
    """ImportError unless the package is installed in a version from `low` to before `high`."""
    try:
        version = str(importlib.import_module(package).__version__)
    except ImportError as error:
        raise ImportError(f"{package} is not installed: {error}") from error
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if not low <= numbers < high:
        accepted = f"from {'.'.join(map(str, low))} to before {'.'.join(map(str, high))}"
        raise ImportError(f"{package} is {version}; prefkern's integration is tested with versions {accepted}")
