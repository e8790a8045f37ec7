"""docs/performance.md from bench/results/*.json: ``python bench/report.py`` renews it.

What has no result is listed too, as not yet measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalodon_ops import registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TARGET = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Generated from `bench/results/` by `make docs`; numbers come from `make bench ARGS='--save NAME'`.
Every row was verified against the float64 reference before it was timed, and timed in turns with
its floor and its peers (`bench/harness.py`). Read the ratios: milliseconds belong to one machine on
one day.

*% of floor*: the time of the floor over ours. The floor of `clone` is a copy of as many bytes as
the op has to move; of `fma` a multiplication of small matrices with as many FLOPs as the op has to
do, three times those of forward for forward+backward. *Ratio*: time of the best peer over ours.
*A/A*: ours against ours, the noise of a ratio.
"""

COLUMNS = (
    "| op | shape | dtype | pass | ours ms | floor | % of floor | best peer | ratio | A/A | error |"
)


def _row(row: dict[str, Any]) -> str:
    ratio = "" if row["peer_ratio"] is None else f"{row['peer_ratio']:.1f}"
    cells = (
        f"`{row['op']}`",
        row["shape"],
        row["dtype"],
        row["direction"],
        f"{row['ours_ms']:.3g}",
        row["floor"],
        f"{100 * row['floor_ratio']:.0f}",
        row["peer"],
        ratio,
        f"{row['noise']:.2f}",
        f"{row['error']:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def _section(document: dict[str, Any]) -> str:
    threads = sorted({row["threads"] for row in document["rows"]})
    missing = [op.name for op in registry if op.name not in {r["op"] for r in document["rows"]}]
    lines = [
        f"## {document['device']}",
        "",
        f"{document['date']}, commit {document['commit']}, torch {document['torch']}, "
        f"threads: {', '.join(map(str, threads))} of {document['cores']} cores.",
        "",
        COLUMNS,
        "|---|---|---|---|--:|---|--:|---|--:|--:|--:|",
        *map(_row, document["rows"]),
        *(f"| `{name}` | not yet measured | | | | | | | | | |" for name in missing),
    ]
    return "\n".join(lines) + "\n"


def report() -> str:
    """The whole document."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    benches = [document for document in documents if "rows" in document]
    gpus = [d for d in benches if any(r.get("device_type") == "cuda" for r in d["rows"])]
    sections = [HEAD, *map(_section, benches)]
    if not gpus:
        names = ", ".join(f"`{op.name}`" for op in registry)
        sections.append(f"## CUDA\n\nNot yet measured, none of {names}.\n")
    return "\n".join(sections)


if __name__ == "__main__":
    TARGET.write_text(report())
