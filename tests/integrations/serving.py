"""Empty stand-ins for what verl's trainer imports for its inference servers, where it is not installed. Nothing starts one."""

import importlib.util
import sys
from types import ModuleType
from typing import ClassVar
from unittest.mock import MagicMock


class Absent(ModuleType):
    """A module whose every name is there, and does nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


_absent = [name for name in ("cachetools", "uvicorn", "fastapi", "transfer_queue") if importlib.util.find_spec(name) is None]
for _name in _absent:
    sys.modules[_name] = Absent(_name)


def remove() -> None:
    """Once verl is imported: others ask whether these are installed."""
    for name in _absent:
        sys.modules.pop(name, None)
