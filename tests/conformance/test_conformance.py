"""The matrix instructions' registers: the host code that stands for them in the executor is what
the PTX ISA says, and a GPU's are compared with the same vectors (``gpu_check.py``, conformance).
"""

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from backend import ROOT, SIMT_BUILD
from conformance import make_vectors
from conformance.check import VECTORS, all_vectors, by_program, check, mistakes
from conformance.wgmma import INSTANCES

BUILDS = ("plain", "asan", "race")
ARCHITECTURES = ("80", "90a")


def test_the_committed_vectors_are_those_of_the_fragment_tables() -> None:
    assert VECTORS.read_text() == make_vectors.text(), (
        "run python tests/conformance/make_vectors.py"
    )


def wrappers_of(header: str) -> set[str]:
    """The functions with a matrix instruction in them."""
    code = (ROOT / "cuda/core" / header).read_text()
    pieces = re.split(r"^(?=(?:template <[^>]*>\n)?DEVICE \w+ \w+\()", code, flags=re.MULTILINE)
    instruction = r'"(mma\.sync|ldmatrix\.sync|cp\.async\.bulk)|MEGALODON_WGMMA_\w+, 128'
    return {re.search(r"DEVICE \w+ (\w+)", p)[1] for p in pieces if re.search(instruction, p)}


def test_every_wrapper_has_vectors() -> None:
    """Each function with a matrix instruction, for each value of its template arguments."""
    names = list(all_vectors())
    wrappers = wrappers_of("mma.cuh") | wrappers_of("wgmma.cuh") | wrappers_of("bulk.cuh")
    assert wrappers == {name.split("<")[0] for name in names}
    assert wrappers == {"load_matrices", "mma", "wgmma", "tensor_copy"}
    code = (ROOT / "cuda/core/mma.cuh").read_text()
    instructions = re.findall(r'"(mma\.sync|ldmatrix\.sync)[\w.]*', code)
    assert len(instructions) == len(json.loads(VECTORS.read_text()))
    assert len([n for n in names if n.startswith("wgmma")]) == 2 * len(INSTANCES)


@pytest.mark.parametrize("build", BUILDS)
def test_the_executors_instructions(build: str) -> None:
    program = SIMT_BUILD / f"simt_conformance_{build}"
    if not program.is_file():
        pytest.skip(f"{program} is not built (make test-simt)")
    found = check(by_program(program))
    assert not any(found.values())
    assert set(found) == set(all_vectors())


def answer(wrapper: str) -> list[list[int]]:
    """The right output registers, by case and lane one after the other."""
    cases = json.loads(VECTORS.read_text())[wrapper]["cases"]
    return [[int(word, 16) for lane in case["out"] for word in lane.split()] for case in cases]


def packed(cases: list[list[int]]) -> bytes:
    return b"".join(struct.pack(f"{len(words)}I", *words) for words in cases)


def test_a_wrong_register_is_named() -> None:
    vectors = json.loads(VECTORS.read_text())
    cases = answer("mma<bf16>")
    assert not mistakes(lambda *_: packed(cases), "mma<bf16>", vectors["mma<bf16>"])
    first = cases[0]
    first[3 * 4 + 1], first[7 * 4 + 2] = first[7 * 4 + 2], first[3 * 4 + 1]
    found = mistakes(lambda *_: packed(cases), "mma<bf16>", vectors["mma<bf16>"])
    assert len(found) == 2
    assert found[0] == (
        "mma<bf16>, case 'a, depths 0 to 7': lane 3, c[1]: wanted 41000000, got 43170000; "
        "that is the lower half of a[1] of lane 7"
    )
    assert "lane 7, c[2]: wanted 43170000, got 41000000" in found[1]


def test_a_wrong_row_is_named() -> None:
    vectors = json.loads(VECTORS.read_text())["load_matrices<true>"]
    cases = answer("load_matrices<true>")
    plain = answer("load_matrices<false>")
    found = mistakes(lambda *_: packed([plain[0], cases[1]]), "load_matrices<true>", vectors)
    assert found[0].startswith(
        "load_matrices<true>, case 'rows in order': lane 0, taken[0]: wanted"
    )
    assert found[0].endswith("; that is memory[0] of lane 0")
    assert found[-1].endswith("more")


def test_too_short_an_answer_and_a_program_that_fails() -> None:
    vectors = json.loads(VECTORS.read_text())["mma<f16>"]
    assert mistakes(lambda *_: b"1234", "mma<f16>", vectors) == [
        f"mma<f16>: 4 bytes, wanted {4 * 5 * 32 * 4}"
    ]
    with pytest.raises(RuntimeError, match="false mma<f16>: status 1"):
        mistakes(by_program(Path("/bin/false")), "mma<f16>", vectors)


@pytest.fixture(scope="module")
def gpu_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As gpu_check builds it, for the architectures that are released."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    folder = tmp_path_factory.mktemp("conformance")
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-DMEGALODON_WITH_CUDA",
        f"-I{ROOT}/cpp",
        f"-I{ROOT}/cuda",
    ]
    command.append('-DMEGALODON_CUDA_ARCHITECTURES="80 90a"')
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    source, hopper = ROOT / "tests/conformance", folder / "wgmma.o"
    subprocess.run(
        [*command, code[-1], "-c", f"{source}/program_wgmma.cu", "-o", hopper], check=True
    )
    program = folder / "program"
    files = [f"{source}/program.cu", f"{ROOT}/cuda/core/device.cu", hopper]
    subprocess.run([*command, *code, *files, "-o", program], check=True)
    return program


def said(program: Path, wrapper: str, given: bytes = b"") -> str:
    done = subprocess.run([str(program), wrapper], input=given, capture_output=True, check=False)
    assert done.returncode == 1
    return done.stderr.decode()


@pytest.mark.parametrize("error", [209, 98, 222])  # no kernel image, invalid function, newer PTX
def test_a_gpu_without_kernels_is_told_what_to_do(gpu_program: Path, error: int) -> None:
    text = said(gpu_program, f"error:{error}")
    assert "this build has kernels for the architectures 80 90a: rebuild with" in text
    assert "-DCMAKE_CUDA_ARCHITECTURES set to yours (8.0 or later), or update the driver" in text


def test_other_errors_are_cudas_alone(gpu_program: Path) -> None:
    assert said(gpu_program, "error:700") == (
        "conformance: CUDA: an illegal memory access was encountered\n"
    )


def test_the_program_without_a_gpu_or_with_one(gpu_program: Path) -> None:
    """Without a driver an error, not a crash; with a GPU the vectors."""
    import torch

    if torch.cuda.is_available():
        assert not any(check(by_program(gpu_program)).values())
    else:
        assert "conformance: CUDA: " in said(
            gpu_program, "mma<bf16>", packed(answer("mma<bf16>")) * 5
        )
