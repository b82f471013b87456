"""Where tables are printed."""

from rich.console import Console


def make_console() -> Console:
    """A terminal as wide as it is; a file or a pipe, which has no width, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=150)
