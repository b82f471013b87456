"""Writes the tables of documents from the results they name, and draws their figures.

    python benchmarks/tables.py                        # docs/performance.md, from the results it names
    python benchmarks/tables.py --cpu epyc-zen3        # from now on benchmarks/results/cpu-epyc-zen3-*.json
    python benchmarks/tables.py --check FILE.md ...    # says which documents differ from their results, writes nothing

What stands between the marks of python/prefkern/bench/tables.py is replaced. Exit status of --check: 1 if a document differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefkern.bench import curves, report
from prefkern.bench.tables import fill, images, rename

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / "docs/performance.md"])
    parser.add_argument("--cpu", metavar="NAME", help="take the tables of CPUs from benchmarks/results/cpu-NAME-*.json")
    parser.add_argument("--gpu", metavar="NAME", help="take the tables of GPUs from benchmarks/results/gpu-NAME-*.json")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    differing = []
    for document in options.documents:
        text = before = document.read_text()
        for kind in ("cpu", "gpu"):
            if name := getattr(options, kind):
                text = rename(text, kind, name)
        text = fill(text, ROOT)
        if text != before:
            differing.append(str(document))
        if options.check:
            continue
        document.write_text(text)
        for image, source in images(text).items():
            if (ROOT / source).exists():
                data = report.load(ROOT / source)
                (curves if data.get("suite") == "scaling" else report).plot(data, document.parent / image)
    for document in differing:
        print(f"{document}: {'differs from its results' if options.check else 'written'}")
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
