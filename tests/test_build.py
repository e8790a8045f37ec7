"""The build keeps its promises: no wide code leaks, one name in every list, clean exports."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_tree import ROOT, build_tree, library, linked_library, missing

from megalodon_ops import _C, registry

OPS_LIST = re.search(r"set\(all_ops\s+([\w\s]+?)\s*\)", (ROOT / "CMakeLists.txt").read_text())
assert OPS_LIST is not None
OPS = OPS_LIST.group(1).split()


CODE = "TtW"  # the types of symbols that are functions: global, local, weak
WIDE = ("avx2", "avx512", "avx512_bf16")


def tool(name: str, *arguments: str | Path) -> list[str]:
    """The lines that a tool of binutils prints."""
    if shutil.which(name) is None:
        missing(f"{name} (binutils) is not installed")
    command = [name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of what the file defines."""
    return [
        (kind, name)
        for _, kind, name in (
            line.split(" ", 2) for line in tool("nm", "--defined-only", *options, path)
        )
    ]


def objects(target: str) -> list[Path]:
    tree = build_tree()
    found = sorted(tree.glob(f"CMakeFiles/{target}.dir/**/*.o")) if tree is not None else []
    if not found:
        missing("no build tree with object files (cmake --preset dev, or make setup)")
    return found


@pytest.mark.parametrize("isa", WIDE)
def test_wide_code_stays_in_its_namespace(isa: str) -> None:
    """No strong symbol outside it; the weak ones are the next test's."""
    for path in objects(f"ops_{isa}"):
        names = [name for kind, name in symbols(path, "--demangle") if kind == "T"]
        assert names, path.name
        assert not [name for name in names if f"cpu::{isa}::" not in name], path.name


def instructions(path: Path) -> dict[str, set[str]]:
    """The mnemonics of every function of a linked file."""
    functions: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in tool("objdump", "--disassemble", "--no-show-raw-insn", path):
        if line.endswith(">:"):
            current = functions.setdefault(line.split("<", 1)[1][:-2], set())
        elif "\t" in line:
            current.add(line.split("\t")[1].split(" ")[0])
    return functions


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 has wide code")
def test_no_wide_instruction_where_any_cpu_runs() -> None:
    """An inline function that several compilations emit is kept once, from whichever object comes
    first: what the portable objects call must have been compiled for any CPU.
    """
    portable = {
        name
        for path in [*objects("ops_portable"), *objects("megalodon_ops")]
        for kind, name in symbols(path)
        if kind in CODE
    }
    # A static function has a copy in every object; each object calls its own.
    copies = {
        name
        for isa in WIDE
        for path in objects(f"ops_{isa}")
        for kind, name in symbols(path)
        if kind == "t"
    }
    functions = instructions(linked_library())
    wide = {
        name: sorted(mnemonic for mnemonic in functions[name] if mnemonic.startswith("v"))
        for name in portable - copies
        if name in functions
    }
    assert len(wide) > 100
    assert not {name: found for name, found in wide.items() if found}
    assert any("vfmadd231ps" in found for found in functions.values()), "no AVX in the library"


def test_library_exports_only_the_c_interface() -> None:
    exported = {name for kind, name in symbols(library(), "--dynamic") if kind in "TDB"}
    declared = set(re.findall(r"\b(megalodon_\w+)\(", (ROOT / "cpp/megalodon.h").read_text()))
    assert exported == declared


def test_nothing_links_torch() -> None:
    for path in (library(), Path(_C.__file__)):
        needed = [line.split()[1] for line in tool("objdump", "-p", path) if "NEEDED" in line]
        assert any(name.startswith("libstdc++") for name in needed), needed
        assert not [name for name in needed if name.startswith(("libtorch", "libc10"))], needed


def test_one_list_of_ops() -> None:
    """CMakeLists.txt, cpp/ops, the registry, the C interface and the binding name the same ops."""
    assert sorted(OPS) == OPS
    assert sorted(op.name for op in registry) == OPS
    for path in (ROOT / "cpp/ops").iterdir():
        room = [op for op in OPS if path.stem == op or path.stem.startswith(f"{op}_")]
        assert room, f"{path.name} is in no op's room: name it {{op}}.* or {{op}}_*.*"
    kernels = {name for name in dir(_C) if name.endswith(("_forward", "_backward"))}
    wanted = {f"{op.name}_forward" for op in registry}
    wanted |= {f"{op.name}_backward" for op in registry if op.backward_schema is not None}
    assert kernels == wanted


@pytest.mark.parametrize("op", OPS)
def test_every_wing_has_the_room(op: str) -> None:
    package = ROOT / "python/megalodon_ops"
    for path in (
        ROOT / f"cpp/ops/{op}.h",
        ROOT / f"cpp/ops/{op}.cpp",
        package / f"ops/{op}.py",
        package / f"reference/{op}.py",
        ROOT / f"tests/test_{op}.py",
        ROOT / f"bench/bench_{op}.py",
    ):
        assert path.exists(), f"{path.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("op", OPS)
def test_kernel_files_open_with_six_paragraphs(op: str) -> None:
    head = (ROOT / f"cpp/ops/{op}.cpp").read_text().split("#include", 1)[0]
    for paragraph in ("Computes", "Layout", "Mapping", "Traffic", "Numerics", "Limits"):
        assert f"// {paragraph}" in head, paragraph


LOADS = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.silu_mul_forward(np.zeros((2, 3), np.float32), None))
try:
    module.rms_norm_forward()
except NotImplementedError as error:
    print(error)
"""


@pytest.mark.skipif(bool(_C.cuda_version()), reason="needs objects without CUDA")
def test_a_build_of_one_op_loads(tmp_path: Path) -> None:
    """As -DMEGALODON_OPS=silu_mul makes it, linked from the objects of the whole build."""
    parts = [*objects("_C"), *objects("megalodon_ops")]
    for isa in ("portable", *WIDE):
        parts += [path for path in objects(f"ops_{isa}") if path.name == "silu_mul.cpp.o"]
    linked = tmp_path / "_C.so"
    subprocess.run(["g++", "-shared", "-pthread", "-o", linked, *parts], check=True)
    command = [sys.executable, "-c", LOADS, str(linked)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "[[0. 0. 0.]" in said
    assert "rms_norm_forward: not in this build" in said


def test_version_is_one() -> None:
    (version,) = re.findall(r"project\(\w+ VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert _C.version() == version
