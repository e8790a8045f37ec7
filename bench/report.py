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
*A/A*: ours against ours, the noise of a ratio. On a GPU: replays of graphs between events, over
inputs that are not in the cache (`bench/gpu.py`); the floor of `fma` is then a bfloat16 GEMM.
"""

MODEL_TITLE = (
    "The model of `make demo` (3.4M parameters, B = 1, all cores; `bench/bench_model.py`): training"
    " steps of L tokens beside the linear layers alone, forward and backward; decoding at a"
    " position beside a copy of as many bytes as the weights have; packed training, documents of 64"
    " to 1023 tokens, beside training on the same tokens as one document. *Bytes kept*: per token"
    " and layer, from forward to backward."
)
COLUMNS = (
    "| op | shape | dtype | threads | pass | ours ms | floor | % of floor | best peer | ratio | A/A"
    " | error |"
)
RULE = "|---|---|---|--:|---|--:|---|--:|---|--:|--:|--:|"
ALL_OPS = [op.name for op in registry]
CUDA_OPS = [op for op in ALL_OPS if (ROOT / "cuda" / "ops" / f"{op}.cu").exists()]


def _row(row: dict[str, Any]) -> str:
    ratio = "" if row["peer_ratio"] is None else f"{row['peer_ratio']:.1f}"
    cells = (
        f"`{row['op']}`",
        row["shape"],
        row["dtype"],
        str(row["threads"]),
        row["direction"],
        f"{row['ours_ms']:.3g}"
        + (
            f" ({row['ours_p10_ms']:.3g}-{row['ours_p90_ms']:.3g})"
            if row.get("ours_p10_ms")
            else ""
        ),
        row["floor"],
        f"{100 * row['floor_ratio']:.0f}",
        row["peer"],
        ratio,
        f"{row['noise']:.2f}",
        f"{row['error']:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def _not_yet(op: str) -> str:
    return f"| `{op}` | not yet measured | | | | | | | | | | |"


MODEL_COLUMNS = "| | dtype | at | us/token | tokens/s | % of floor | bytes kept | error |"


def _model(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the whole model."""
    if not rows:
        return []
    lines = ["", MODEL_TITLE, "", MODEL_COLUMNS, "|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in sorted(rows, key=lambda r: (r["what"] != "training", r["dtype"], r["at"])):
        kept = "" if row["kept_bytes"] is None else f"{row['kept_bytes']:.0f}"
        lines.append(
            f"| {row['what']} | {row['dtype']} | {row['at']} | {row['us_per_token']:.0f} | "
            f"{1e6 / row['us_per_token']:.0f} | {100 * row['floor_ratio']:.0f} | {kept} | "
            f"{row['error']:.1e} |"
        )
    return lines


def _section(document: dict[str, Any]) -> str:
    threads = sorted({row["threads"] for row in document["rows"]})
    on_gpu = any(row.get("device_type") == "cuda" for row in document["rows"])
    measured = {row["op"] for row in document["rows"]}
    missing = [op for op in (CUDA_OPS if on_gpu else ALL_OPS) if op not in measured]
    ceilings = document.get("ceilings", {})
    every = document["rows"] + document.get("model", [])
    runs = sorted({f"{r['date']} (commit {r['commit']}, torch {r['torch']})" for r in every})
    lines = [
        f"## {document['device']}",
        "",
        f"{', '.join(runs)}; "
        f"threads: {', '.join(map(str, threads))} of {document['cores']} cores."
        + "".join(f" {name}: {value}." for name, value in ceilings.items()),
        "",
        COLUMNS,
        RULE,
        *map(_row, document["rows"]),
        *map(_not_yet, missing),
        *_model(document.get("model", [])),
    ]
    return "\n".join(lines) + "\n"


def report() -> str:
    """The whole document."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    benches = [document for document in documents if "rows" in document]
    gpus = [d for d in benches if any(r.get("device_type") == "cuda" for r in d["rows"])]
    sections = [HEAD, *map(_section, benches)]
    if not gpus:
        lines = ["## CUDA", "", "No kernel has run on a GPU yet.", "", COLUMNS, RULE]
        lines += map(_not_yet, CUDA_OPS)
        rest = ", ".join(f"`{op}`" for op in ALL_OPS if op not in CUDA_OPS)
        if rest:
            lines += ["", f"Without a CUDA kernel: {rest}."]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    TARGET.write_text(report())
