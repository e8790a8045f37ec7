"""What `megalodon info` prints: versions, the build, the threads, and the table of ops."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from rich.console import Console
from rich.table import Table

PACKAGES = ("megalodon-ops", "torch", "numpy", "safetensors", "typer", "rich", "matplotlib")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def build_facts() -> dict[str, str]:
    """The instruction set in use and whether CUDA kernels were built, as the kernels say."""
    try:
        from megalodon_ops import _C
    except ImportError as error:
        return {"kernels": f"not built ({error})"}
    facts = {"instruction set": "isa", "CUDA kernels": "cuda_built"}
    return {
        label: str(getattr(_C, name)()) if hasattr(_C, name) else "not reported"
        for label, name in facts.items()
    }


def op_rows() -> list[tuple[str, str]]:
    """(name, first line of the docstring) of every registered op."""
    try:
        from megalodon_ops import registry
    except ImportError:
        return []
    return [(op.name, (op.doc or "").strip().split("\n")[0]) for op in registry]


def show(console: Console) -> None:
    """Print everything."""
    import torch

    facts = {package: _version(package) for package in PACKAGES}
    facts["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    facts |= build_facts()
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors (torch's pool)"
    facts["CUDA in torch"] = str(torch.version.cuda or "no")
    for label, value in facts.items():
        console.print(f"{label:16} {value}", highlight=False, markup=False, soft_wrap=True)
    rows = op_rows()
    if not rows:
        console.print("no ops are registered")
        return
    table = Table("op", "computes", title="torch.ops.megalodon", title_justify="left")
    for name, line in rows:
        table.add_row(name, line)
    console.print(table)
