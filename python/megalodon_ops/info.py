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
    from megalodon_ops import _C

    cuda = _C.cuda_version()
    return {
        "kernels": _C.version(),
        "instruction set": _C.isa(),
        "CUDA kernels": f"built with CUDA {cuda}" if cuda else "not built",
    }


def op_rows() -> list[tuple[str, str, str]]:
    """(name, what it computes, passes) of every registered op."""
    from megalodon_ops import registry

    return [
        (op.name, op.summary, "forward, backward" if op.backward_schema else "forward")
        for op in registry
    ]


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
    table = Table("op", "computes", "passes", title="torch.ops.megalodon", title_justify="left")
    for row in op_rows():
        table.add_row(*row)
    console.print(table)
