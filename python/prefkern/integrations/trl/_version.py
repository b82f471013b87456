"""Which releases of TRL the hooks were tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("1.16.0", "1.17.0")
"""From the first, and below the second."""


def check_version() -> None:
    """RuntimeError, which says the range and what is installed, for a TRL outside it; ImportError if there is none."""
    from packaging.version import Version

    first, beyond = SUPPORTED
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"trl is not installed; trl>={first},<{beyond} is expected") from None
    if not Version(first) <= Version(Version(found).base_version) < Version(beyond):
        raise RuntimeError(
            f"trl is {found}; supported: >={first},<{beyond}. The hooks are private names of TRL's, which move between releases"
        )
