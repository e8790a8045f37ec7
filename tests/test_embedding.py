"""The kernels without torch: from a C program through find_package, and on NumPy arrays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from build_tree import build_tree, library, missing

import megalodon_ops

FOLDER = Path(__file__).parent / "embedding"
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(FOLDER))
from without_torch import CHECKS  # noqa: E402


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def cmake_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CMake package of the installed wheel, or one installed from the build tree."""
    if (library().parent / "include").is_dir():
        return Path(megalodon_ops.cmake_dir())
    with pytest.raises(FileNotFoundError, match="`pip install` the package"):
        megalodon_ops.cmake_dir()
    tree = build_tree()
    if tree is None:
        missing("neither an installed package nor a build tree")
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", tree, "--component", "c", "--prefix", prefix)
    (package,) = prefix.glob("**/share/cmake/megalodon_ops")
    return package


def test_c_program(cmake_package: Path, tmp_path: Path) -> None:
    """A C99 program finds the package, links, runs, and its numbers and messages are right."""
    run("cmake", "-S", FOLDER, "-B", tmp_path, f"-Dmegalodon_ops_DIR={cmake_package}")
    run("cmake", "--build", tmp_path)
    output = run(tmp_path / "embedding")
    assert output == f"megalodon_ops {megalodon_ops.__version__}, {best_isa()}: ok\n"


def best_isa() -> str:
    code = "from megalodon_ops import _C; print(_C.isa())"
    return run(sys.executable, "-c", code, MEGALODON_TORCH="0", MEGALODON_ISA="auto").strip()


def test_c_package_is_relocatable(cmake_package: Path) -> None:
    for file in cmake_package.glob("*.cmake"):
        assert str(ROOT) not in file.read_text()


def test_header_is_installed(cmake_package: Path) -> None:
    header = cmake_package.parents[2] / "include" / "megalodon.h"
    assert header.read_text() == (ROOT / "cpp" / "megalodon.h").read_text()


@pytest.mark.parametrize("torch", ["switched_off", "not_installed"])
@pytest.mark.parametrize("check", CHECKS)
def test_numpy(check: str, torch: str) -> None:
    environment = {"MEGALODON_TORCH": "0"} if torch == "switched_off" else {"BLOCK_TORCH": "1"}
    run(sys.executable, FOLDER / "without_torch.py", check, **environment)


def test_isa_by_environment() -> None:
    code = "import megalodon_ops; print(megalodon_ops._C.isa())"
    output = run(sys.executable, "-c", code, MEGALODON_TORCH="0", MEGALODON_ISA="portable")
    assert output == "portable\n"
