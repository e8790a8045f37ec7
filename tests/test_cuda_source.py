"""The rules of CUDA source that let one file run on a GPU and in the executor; the compiler's
resource report.
"""

import re
import shutil
from pathlib import Path

import pytest
from backend import ROOT
from build_tree import build_tree, missing

KERNEL_FILES = sorted([*ROOT.glob("cuda/ops/*.cu*"), *ROOT.glob("cuda/core/*.cuh")])
# The headers that stand between kernels and the machine.
WRAPPERS = [
    ROOT / "cuda/core" / name for name in ("portable.cuh", "mma.cuh", "wgmma.cuh", "bulk.cuh")
]
OP_FILES = sorted(ROOT.glob("cuda/ops/*.cu"))

# What a kernel must not say, and what to say instead.
FORBIDDEN = {
    r"#include\s*<(cuda|cub|cute|cutlass|cooperative)": '#include "core/portable.cuh"',
    r"<<<|>>>": "launch(config, kernel, args...)",
    r"\basm\b": "a wrapper in core/portable.cuh, mma.cuh, wgmma.cuh or bulk.cuh with a host branch",
    r"\b__shared__\b": "SHARED or DYNAMIC_SHARED",
    r"\b__CUDA_ARCH__\b|\b__CUDACC__\b|\bMEGALODON_NVCC\b": "a template parameter",
    r"\bvolatile\b": "load_acquire",
    r"\b__(sync|shfl|ballot|any|all|threadfence|activemask|match)\w*": "core/portable.cuh",
    r"\batomic[A-Z]\w*": "atomic_add",
    r"\bcuda(Malloc|Free|Memcpy|Memset|\w*Synchronize|LaunchKernel)\w*": "a workspace, a stream",
    r"\bgetenv\b|\bprintf\b": "arguments",
    r"\bnew\b|\bmalloc\b": "a workspace",
}
ARCHITECTURES = {"80", "90a"}
PARAGRAPHS = ("Computes", "Layout", "Mapping", "Traffic", "Numerics", "Limits")


def code_of(path: Path) -> str:
    """The file without its comments, each line in its place."""
    return re.sub(r"//[^\n]*", "", path.read_text())


def violations(code: str) -> list[str]:
    return [
        f"line {number}: {match.group()}: use {instead}"
        for number, line in enumerate(code.splitlines(), 1)
        for pattern, instead in FORBIDDEN.items()
        if (match := re.search(pattern, line))
    ]


@pytest.mark.parametrize(
    "path", [f for f in KERNEL_FILES if f not in WRAPPERS], ids=lambda path: path.name
)
def test_kernels_keep_to_the_portable_subset(path: Path) -> None:
    assert not violations(code_of(path))


@pytest.mark.parametrize(
    "line",
    [
        "#include <cuda_runtime.h>",
        "kernel<<<grid, block>>>(x);",
        'asm volatile("bar.sync 0;");',
        "__shared__ float row[32];",
        "#if __CUDA_ARCH__ >= 900",
        "__syncthreads();",
        "x = __shfl_down_sync(mask, x, 1);",
        "atomicAdd(&sum, value);",
        "while (*(volatile int*)flag == 0) {}",
        "cudaDeviceSynchronize();",
    ],
)
def test_the_lint_sees(line: str) -> None:
    assert violations(line)


@pytest.mark.parametrize("path", WRAPPERS, ids=lambda path: path.name)
def test_inline_ptx_has_a_host_branch(path: Path) -> None:
    """Every asm stands between #if MEGALODON_NVCC and its #else."""
    branch = []
    for line in code_of(path).splitlines():
        if re.match(r"#if", line):
            branch.append(line == "#if MEGALODON_NVCC")
        elif re.match(r"#else", line):
            branch[-1] = False
        elif re.match(r"#endif", line):
            branch.pop()
        elif re.search(r"\basm\b", line):
            assert branch
            assert branch[-1], line


@pytest.mark.parametrize("path", OP_FILES, ids=lambda path: path.stem)
def test_a_kernel_file_opens_with_the_six_paragraphs(path: Path) -> None:
    head = path.read_text().split("#include")[0]
    found = re.findall(r"^// (\w+)  ", head, re.MULTILINE)
    assert [word for word in found if word in PARAGRAPHS] == list(PARAGRAPHS)
    assert re.search(rf"ops/{path.stem}\.(h|cuh)\b", path.read_text())


def with_headers(path: Path) -> set[Path]:
    """The file and all of this repository that it includes."""
    found, new = set(), {path}
    while new:
        found |= new
        names = {
            n for f in new for n in re.findall(r'^#include "(.+)"', f.read_text(), re.MULTILINE)
        }
        new = {
            p for n in names for p in (ROOT / "cpp" / n, ROOT / "cuda" / n) if p.exists()
        } - found
    return found


def report_of(path: Path) -> str:
    """What the compiler said of the kernels when the library was built (cuda/keep_report.sh)."""
    tree = build_tree()
    name = f"CMakeFiles/ops_*.dir/{path.relative_to(ROOT)}.o.report"
    reports = [] if tree is None else list(tree.glob(name))
    if not reports:
        missing(f"the build has left no report on {path.name} (make setup, with nvcc)")
    (report,) = reports
    if report.stat().st_mtime < max(file.stat().st_mtime for file in with_headers(path)):
        missing(f"{path.name} has changed since the library was built (make setup)")
    return report.read_text()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("path", OP_FILES, ids=lambda path: path.stem)
def test_no_kernel_spills_or_has_a_stack_frame(path: Path) -> None:
    """As the compiler reports, for every architecture the file is for. A kernel may have a stack
    frame where its file says why: "// Stack frame of my_kernel: ...".
    """
    report = report_of(path)
    architectures = {"90a"} if path.stem.endswith("_wgmma") else ARCHITECTURES
    built = {a for a in ARCHITECTURES if f"for 'sm_{a}'" in report}
    if built != architectures:
        missing(f"{path.name} was built for {built or 'nothing'}, not for all of {architectures}")
    excused = re.findall(r"^// Stack frame of (\w+): \S", path.read_text(), re.MULTILINE)
    frames = re.findall(
        r"properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores", report
    )
    assert frames
    # Of wgmma and setmaxnreg: what the compiler could not do as it is written.
    assert not re.findall(r"\(C75\d\d\).*", report)
    for kernel, frame, spills in frames:
        assert spills == "0", f"{kernel} spills {spills} bytes"
        assert frame == "0" or any(name in kernel for name in excused), f"{kernel}: frame {frame}"
