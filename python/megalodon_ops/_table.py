"""The op table of the README: ``python -m megalodon_ops._table README.md`` renews it."""

from __future__ import annotations

import sys
from pathlib import Path

from megalodon_ops import registry

_BEGIN = "<!-- ops: generated from the registry by `make docs` -->\n"
_END = "<!-- /ops -->"


def op_table() -> str:
    """One line per op: name, what it computes, whether it is differentiable."""
    lines = ["| op | equation | in | out |", "|---|---|---|---|"]
    for op in registry:
        inputs = ", ".join(
            argument.name + ("?" if argument.type.endswith("?") else "")
            for argument in op.arguments
        )
        name = f"`{op.name}`" + ("" if op.backward_schema else " (inference)")
        lines.append(f"| {name} | `{op.equation}` | {inputs} | {', '.join(op.returns)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """``text`` with a fresh table between its markers."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return before + _BEGIN + op_table() + _END + after


def main() -> None:
    """Rewrites the table in the files named on the command line."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_table(path.read_text()))


if __name__ == "__main__":
    main()
