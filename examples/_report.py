"""What the experiments beside this file share: tables, their arguments for output, and how a result is shown and saved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # not every experiment has a picture
    from matplotlib.figure import Figure


@dataclass
class Rows:
    """A table whose cells are text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> Table:
        table = Table(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass
class Result:
    """What an experiment leaves behind: tables for readers, a picture, and its numbers for tests."""

    tables: Sequence[Rows]
    figure: Figure | None
    numbers: dict[str, Any] = field(default_factory=dict)


def add_outputs(parser: argparse.ArgumentParser, picture: str | None) -> None:
    """--json, --markdown, and --out where there is a picture, called `picture` if nobody says otherwise."""
    if picture is not None:
        parser.add_argument("--out", type=Path, metavar="PNG", help=f"the picture (default {picture})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")


def check_outputs(parser: argparse.ArgumentParser, arguments: argparse.Namespace, picture: str | None) -> None:
    """Fills in the picture's name, and refuses files in folders that do not exist before hours have gone into a run."""
    arguments.out = Path(picture) if picture is not None and arguments.out is None else getattr(arguments, "out", None)
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument {option}: there is no directory {path.parent}")


@contextmanager
def one_thread() -> Iterator[None]:
    """For small tensors, which are not worth sharing out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show(result: Result, arguments: argparse.Namespace) -> None:
    """Prints the tables, and saves the picture and the numbers where the arguments say."""
    console = Console()
    for table in result.tables:
        if arguments.markdown:
            print(f"{table.title}:\n\n{table.markdown()}\n")
        else:
            console.print(table.rich())
    if result.figure is not None:
        result.figure.savefig(arguments.out, dpi=80, format="png")
        console.print(f"picture: {arguments.out}", highlight=False, soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result.numbers, indent=1) + "\n")
        console.print(f"numbers: {arguments.json}", highlight=False, soft_wrap=True)
