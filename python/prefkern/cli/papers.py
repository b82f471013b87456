"""`prefkern papers`: what is implemented, how sure its formulas are, and how a trainer is set to it."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prefkern.papers.dpo_survey import Covered


def papers(
    name: Annotated[str | None, typer.Argument(help="Show one paper: its equations, its evidence, its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as Markdown.")] = False,
    survey: Annotated[bool, typer.Option("--survey", help="Show the methods of the DPO survey, and which are here.")] = False,
) -> None:
    """List the papers: method, what it changes, evidence, link, and whether it is a recipe for a trainer."""
    from prefkern.papers import NAMES, module

    if survey:
        if name is not None:
            raise typer.BadParameter("--survey shows all methods; a name is not expected with it", param_hint="NAME")
        show_survey(as_json, as_markdown)
        return
    if name is not None:
        try:
            module(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="NAME") from None
    entries = [collect(paper) for paper in (NAMES if name is None else (name,))]
    if as_json:
        typer.echo(json.dumps(entries if name is None else entries[0], indent=1))
    elif as_markdown:
        typer.echo(markdown_table(entries))
    elif name is not None:
        print_one(entries[0])
    else:
        print_all(entries)


def collect(name: str) -> dict[str, Any]:
    """What there is to say about a paper, JSON-ready."""
    from prefkern.papers import PairRecipe, module

    paper = module(name)
    recipe = getattr(paper, "recipe", None)
    return {
        "slug": name,
        **asdict(paper.about),
        "link": paper.about.link,
        "evidence_text": paper.about.evidence_text,
        "recipe": None if recipe is None else recipe.options(),
        "needs": [] if recipe is None else [*recipe.needs, *(["entropy"] if getattr(recipe, "needs_entropy", False) else [])],
        "takes": "" if recipe is None else "pairs" if isinstance(recipe, PairRecipe) else "rollouts",
        "whole_groups": getattr(recipe, "whole_groups", False),
        "on_policy": getattr(recipe, "on_policy", False),
    }


def recipe_needs(entry: dict[str, Any]) -> str:
    """What a recipe has to be given besides mask and, for rollouts, group."""
    if entry["recipe"] is None:
        return "no recipe"
    if entry["takes"] == "pairs":
        return "pairs" + "".join(f", {need}" for need in entry["needs"])
    return ", ".join(entry["needs"]) or "rewards"


def markdown_table(entries: list[dict[str, Any]]) -> str:
    """What docs/papers.md shows."""
    lines = ["| name | method | changes | evidence | recipe needs |", "|" + " --- |" * 5]
    for entry in entries:
        evidence = entry["evidence"] + (f" ({entry['note']})" if entry["note"] else "")
        method = f"[{entry['name']}]({entry['link']})"
        lines.append(f"| `{entry['slug']}` | {method} | {entry['family']} | {evidence} | {recipe_needs(entry)} |")
    return "\n".join(lines)


def print_all(entries: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from prefkern.cli.console import make_console
    from prefkern.papers import EVIDENCE

    table = Table(title=f"{len(entries)} papers and baselines", title_justify="left")
    for column in ("name", "method", "changes", "evidence", "recipe needs", "link"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "evidence"))
    for entry in entries:
        row = (entry["slug"], entry["name"], entry["family"], entry["evidence"], recipe_needs(entry), entry["link"])
        table.add_row(*row)
    console = make_console()
    console.print(table)
    for word, meaning in EVIDENCE.items():
        console.print(f"[bold]{word}[/]: {meaning}", highlight=False)
    console.print("prefkern papers NAME shows equations and options.", highlight=False)


def print_one(entry: dict[str, Any]) -> None:
    from prefkern.cli.console import make_console
    from prefkern.papers import module

    console = make_console()
    console.print(inspect.getdoc(module(entry["slug"])), markup=False, highlight=False)
    console.print(f"\nEvidence: {entry['evidence_text']}\nLink: {entry['link']}", markup=False, highlight=False)
    if entry["recipe"] is None:
        console.print("No recipe: see its functions.", highlight=False)
        return
    console.print(f'\nRecipe "{entry["slug"]}" for {entry["takes"]}, options and defaults:', markup=False, highlight=False)
    for option, value in entry["recipe"].items():
        console.print(f"  {option} = {value!r}", markup=False, highlight=False)
    if entry["needs"]:
        besides = "the pairs' log-probs and mask" if entry["takes"] == "pairs" else "rewards, group and mask"
        console.print(f"It needs {', '.join(entry['needs'])} besides {besides}.", highlight=False)
    if entry["whole_groups"]:
        console.print("Its minibatches must hold whole groups.", highlight=False)
    if entry["on_policy"]:
        console.print("It knows no ratio to an older policy: one optimiser step per rollout.", highlight=False)


def show_survey(as_json: bool, as_markdown: bool) -> None:
    """The coverage table of `prefkern.papers.dpo_survey`."""
    from prefkern.papers.dpo_survey import coverage

    rows = coverage()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    elif as_markdown:
        typer.echo(survey_markdown(rows))
    else:
        print_survey(rows)


def survey_markdown(rows: tuple[Covered, ...]) -> str:
    lines = ["| branch | method | loss | source | cover | status | where |", "|" + " --- |" * 7]
    for row in rows:
        formula, where = (f"`{text}`" if text else "" for text in (row.formula, row.where and f"prefkern.{row.where}"))
        lines.append(f"| {row.branch} | {row.name} | {formula} | {row.source} | {row.cover} | {row.status} | {where} |")
    return "\n".join(lines)


def print_survey(rows: tuple[Covered, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    from prefkern.cli.console import make_console
    from prefkern.papers._survey_rows import COVERS, NOTATION, SOURCES
    from prefkern.papers.dpo_survey import STATUSES

    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    listed = ", ".join(f"{count} {status}" for status, count in counts.items())
    table = Table(title=f"{len(rows)} methods of the DPO survey: {listed}", title_justify="left")
    for column in ("branch", "method", "loss", "source", "cover", "status", "where"):
        table.add_column(column, overflow="fold", no_wrap=column in ("source", "cover", "status"))
    for row in rows:
        cells = (row.branch, row.name, row.formula, row.source, row.cover, row.status, row.where or "")
        table.add_row(*map(Text, cells))  # brackets in a formula are no markup
    console = make_console()
    console.print(table)
    console.print(NOTATION, markup=False, highlight=False)
    for title, words in (("source", SOURCES), ("cover", COVERS), ("status", STATUSES)):
        for word, meaning in words.items():
            console.print(f"[bold]{title} {word}[/]: {meaning}", highlight=False)
