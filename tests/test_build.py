"""The build keeps its promises: no wide code leaks, one name in every list, clean exports."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from build_tree import ROOT, build_tree, library, missing

from megalodon_ops import _C, registry

OPS_LIST = re.search(r"set\(all_ops\s+([\w\s]+?)\s*\)", (ROOT / "CMakeLists.txt").read_text())
assert OPS_LIST is not None
OPS = OPS_LIST.group(1).split()


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, demangled name) of what the file defines."""
    nm = shutil.which("nm")
    if nm is None:
        missing("nm (binutils) is not installed")
    output = subprocess.run(
        [nm, "--demangle", "--defined-only", *options, str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [(kind, name) for _, kind, name in (line.split(" ", 2) for line in output.splitlines())]


def leaks(defined: list[tuple[str, str]], isa: str) -> list[str]:
    """The symbols that the linker could take for another instruction set's: it keeps one of several
    weak definitions, and keeps the wide one for all if that comes first.
    """
    return [
        name
        for kind, name in defined
        if kind in "WVu" and f"{isa}::" not in name and not name.startswith("DW.ref.")
    ]


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_wide_code_stays_in_its_namespace(isa: str) -> None:
    tree = build_tree()
    objects = list(tree.glob(f"CMakeFiles/ops_{isa}.dir/**/*.o")) if tree is not None else []
    if not objects:
        missing("no build tree with object files (cmake --preset dev, or make setup)")
    for path in objects:
        defined = symbols(path)
        assert any(f"cpu::{isa}::" in name for _, name in defined), path.name
        assert not leaks(defined, isa), f"{path.name}: {leaks(defined, isa)}"
        assert not [n for k, n in defined if k == "T" and f"::{isa}::" not in n], path.name


def test_a_leak_is_found(tmp_path: Path) -> None:
    """The lint above sees an inline function outside the namespace."""
    source = tmp_path / "leak.cpp"
    source.write_text("inline int leak(int a) { return a; } int (*p)(int) = leak;")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        missing("no C++ compiler")
    subprocess.run([compiler, "-c", str(source), "-o", str(tmp_path / "leak.o")], check=True)
    assert leaks(symbols(tmp_path / "leak.o"), "avx2") == ["leak(int)"]


def test_library_exports_only_the_c_interface() -> None:
    exported = {name for kind, name in symbols(library(), "--dynamic") if kind in "TDB"}
    declared = set(re.findall(r"\b(megalodon_\w+)\(", (ROOT / "cpp/megalodon.h").read_text()))
    assert exported == declared


def test_nothing_links_torch() -> None:
    for path in (library(), Path(_C.__file__)):
        needed = subprocess.run(
            ["ldd", str(path)], capture_output=True, text=True, check=True
        ).stdout
        assert "torch" not in needed
        assert "c10" not in needed


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


def test_version_is_one() -> None:
    (version,) = re.findall(r"project\(\w+ VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert _C.version() == version
