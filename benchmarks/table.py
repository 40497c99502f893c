"""Result files -> Markdown: the tables in results/*.md and those between markers in READMEs.

python -m benchmarks.table            # write
python -m benchmarks.table --check    # fail if a shown table is not what the result files say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from msa2conv.adapters.base import NO_ATTENTION
from msa2conv.files import write_text

from .common import RESULTS

ROOT = Path(__file__).parent.parent
SHOWN = tuple(
    ROOT / name
    for name in ("README.md", "examples/fashion/README.md", "docs/levers.md", "docs/speed.md", "docs/costs.md")
)  # files with marked tables
LISTED = ("claims", "coverage", "libraries")  # in docs/BACKBONES.md
_MARKED = re.compile(r"(<!-- table: (\w+)(?: without ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def render(name: str, without: tuple[str, ...] = ()) -> str:
    """The rows of results/<name>.json as a Markdown table, with the note and how to repeat it below."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    rows = result["rows"]
    nested = {key for row in rows for key, value in row.items() if isinstance(value, (dict, list))}
    columns = [key for key in rows[0] if key not in nested and key not in without]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return "\n".join(
        [*lines, "", f"{result['note']} `{result['command']}`; seed {result['seed']}; {result['device']}; {versions}."]
    )


def filled(text: str) -> str:
    """A document with every marked table rendered anew."""

    def fill(match: re.Match[str]) -> str:
        without = tuple(part.strip() for part in (match[3] or "").split(",") if part.strip())
        return f"{match[1]}{render(match[2], without)}\n{match[4]}"

    return _MARKED.sub(fill, text)


def backbones() -> str:
    """docs/BACKBONES.md: one conversion a module, then what is found in every model."""
    claims: dict[str, Any] = json.loads((RESULTS / "claims.json").read_text())
    rows = sorted(claims["rows"], key=lambda row: (row["module"], row["model"]))
    seen = [row for row in rows if row["attentions"] or row["refused"] or row["reason"] != NO_ATTENTION]
    claimed = [row for row in seen if row["attentions"]]
    narrowed = [row for row in seen if row["ffns"] and not row["attentions"]]
    tried = json.loads((RESULTS / "coverage.json").read_text())["rows"]
    works = [row for row in tried if row["verdict"] == "works"]
    missing = sorted({row["module"] for row in seen} - {row["module"] for row in tried})
    lines = [
        "# Backbones",
        "",
        f"timm {claims['versions']['timm']} has {len(seen)} models with attention in "
        f"{len({row['module'] for row in seen})} modules. {len(claimed)} of them are claimed: at least one of their "
        f"attentions can be turned into a convolution; {len(narrowed)} more can only lose hidden units. The "
        f"smallest model of {len(tried)} modules was converted: "
        f"{len(works)} work, the others say why not. "
        f"{'Not converted yet: ' + ', '.join(missing) + '.' if missing else ''}",
        "",
        "Written by `python -m benchmarks.table` from what `python -m benchmarks.coverage` measures.",
        "",
        "## One conversion a module",
        "",
        render("coverage"),
        "",
        *_other_libraries(),
        "## Every timm model",
        "",
        "Attentions and FFNs that are claimed, and what is left as it is.",
        "",
        "| module | model | attentions | FFNs | left as they are |",
        "|---|---|---|---|---|",
    ]
    for row in seen:
        left = "; ".join(f"{times} {what}" for what, times in row["refused"].items()) or row["reason"]
        lines.append(f"| {row['module']} | {row['model']} | {row['attentions']} | {row['ffns']} | {left} |")
    return "\n".join(lines) + "\n"


def _other_libraries() -> list[str]:
    if not (RESULTS / "libraries.json").is_file():
        return []
    rows = json.loads((RESULTS / "libraries.json").read_text())["rows"]
    works = [row for row in rows if row["verdict"] == "works"]
    tried = [row for row in rows if row["verdict"] != "claimed"]
    return [
        "## transformers and torchvision",
        "",
        f"One conversion a family, of a small configuration: {len(works)} of {len(tried)} work, the others say why. "
        "Of torchvision's larger models the claims are shown.",
        "",
        render("libraries"),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wanted = {path: filled(path.read_text()) for path in SHOWN}
    wanted |= {
        path.with_suffix(".md"): f"# {path.stem}\n\n{render(path.stem)}\n"
        for path in RESULTS.glob("*.json")
        if path.stem not in LISTED
    }
    if (RESULTS / "claims.json").is_file() and (RESULTS / "coverage.json").is_file():
        wanted[ROOT / "docs" / "BACKBONES.md"] = backbones()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if args.check and stale:
        sys.exit(f"stale tables: {', '.join(path.name for path in stale)}; run python -m benchmarks.table")
    for path in stale:
        write_text(path, wanted[path])


if __name__ == "__main__":
    main()
