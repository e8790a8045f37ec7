"""The executor that runs CUDA kernels on the CPU: every seeded mistake is caught, and nothing else.

The programs simt_tests_{build} (tests/simt/main.cpp) are built with
-DMEGALODON_SIMT="plain;asan;race".
"""

import subprocess
from pathlib import Path

import pytest
from backend import SIMT_BUILD

IN_ORDER = ("forward", "reverse", "lockstep")
RANDOM = tuple(f"random:{seed}" for seed in range(1, 41))
BUILDS = ("plain", "asan", "race")

# What at least one schedule of this build says of the mistake; "" where the build cannot see it.
SEEDED = {
    ("row_sum", "missing_mask"): ("wrong", "heap-buffer-overflow", "RACE: "),
    ("row_sum", "shared_out_of_bounds"): (
        "wrong",
        "index 4 out of bounds",
        "shared memory that nobody has written",
    ),
    ("row_sum", "missing_barrier"): ("wrong", "wrong", "shared memory that nobody has written"),
    ("row_sum", "divergent_barrier"): ("divergent barrier: this thread is at ",) * 3,
    ("row_sum", "divergent_shuffle"): ("shuffle: lane 0 reads lane 16",) * 3,
    ("row_sum", "overlapping_outputs"): ("wrong", "wrong", "RACE: write of global memory"),
    ("row_sum", "mismatched_operations"): ("divergent warp operation: lane ",) * 3,
    ("row_sum", "global_out_of_bounds"): (
        "wrong",
        "heap-buffer-overflow",
        "RACE: write of global memory",
    ),
    ("scan", "missing_release"): ("", "", "RACE: read of global memory"),
    ("scan", "block_order"): ("LIVELOCK",) * 3,
    ("scan", "missing_barrier"): ("wrong", "wrong", "shared memory that nobody has written"),
    ("pipeline", "missing_async_wait"): ("before it has waited for its asynchronous copies",) * 3,
    ("pipeline", "short_async_wait"): ("wrong",) * 3,
    ("pipeline", "missing_barrier"): ("wrong", "wrong", "RACE: "),
    ("reverse", "missing_sync_warp"): ("wrong", "wrong", "shared memory that nobody has written"),
    ("last_block", "missing_fence"): ("", "", "RACE: read of global memory"),
    ("matrix_product", "swapped_fragments"): ("wrong",) * 3,
    ("matrix_product", "divergent_matrix"): ("needs all 32 lanes",) * 3,
    ("matrix_product", "missing_sync_warp"): (
        "wrong",
        "wrong",
        "shared memory that nobody has written",
    ),
    ("warpgroup_product", "missing_proxy_fence"): ("", "", "not made visible by fence_async_proxy"),
    ("warpgroup_product", "missing_barrier"): (
        "wrong",
        "wrong",
        "shared memory that nobody has written",
    ),
    ("warpgroup_product", "mismatched_operations"): ("have different operands",) * 3,
    ("warpgroup_product", "missing_wgmma_fence"): ("no wgmma_fence between",) * 3,
    ("warpgroup_product", "missing_wgmma_wait"): ("has waited for its matrix products",) * 3,
    ("warpgroup_product", "early_sums"): ("wrong",) * 3,
    ("warpgroup_product", "overwritten_operand"): ("wrong", "wrong", "wgmma reads what thread"),
    ("chained_products", "swapped_fragments"): ("wrong",) * 3,
    ("chained_products", "missing_wgmma_fence"): ("no wgmma_fence between its operand's",) * 3,
    ("chained_products", "overwritten_operand"): ("wrong",) * 3,
    ("chained_products", "old_sums"): ("wrong",) * 3,
    ("tensor_tiles", "missing_full_wait"): (
        "an arrival at a barrier whose phase",
        "an arrival at a barrier whose phase",
        "shared memory that nobody has written",
    ),
    ("tensor_tiles", "missing_free_wait"): ("an arrival at a barrier whose phase",) * 3,
    ("tensor_tiles", "early_release"): ("", "", "RACE: tensor copy of shared memory"),
    ("tensor_tiles", "missing_cluster_sync"): ("block 1 of the cluster, which may not have begun",)
    * 3,
    ("tensor_tiles", "missing_barrier_fence"): ("before its initialisation is visible",) * 3,
    ("tensor_tiles", "early_exit"): ("of the cluster, which has exited",) * 3,
    ("tensor_tiles", "few_bytes"): ("more bytes have come to a barrier than were expected",) * 3,
    ("tensor_tiles", "many_bytes"): ("LIVELOCK",) * 3,
    ("tensor_tiles", "many_arrivals"): ("LIVELOCK",) * 3,
    ("tensor_tiles", "unwaited_copy"): ("before its tensor copies have come",) * 3,
    ("several_readers", "early_release"): ("", "", "RACE: write of shared memory"),
    ("several_readers", "early_last_release"): ("", "", "RACE: write of shared memory"),
    ("several_readers", "missing_sync_warp"): ("", "", "RACE: write of shared memory"),
    ("mixed_readers", "early_release"): ("", "", "RACE: write of shared memory"),
    ("waits", "deadlock"): ("DEADLOCK",) * 3,
    ("waits", "wrong_mask"): ("the calling lane 16 is not in the mask 0000ffff",) * 3,
}
KERNELS = (
    "row_sum",
    "scan",
    "pipeline",
    "reverse",
    "last_block",
    "load_matrices",
    "matrix_product",
    "warpgroup_product",
    "chained_products",
    "tensor_tiles",
    "several_readers",
    "mixed_readers",
    "waits",
)


def program(build: str) -> Path:
    path = SIMT_BUILD / f"simt_tests_{build}"
    if not path.is_file():
        pytest.skip(f"{path} is not built (make test-simt)")
    return path


def run(build: str, kernel: str, bug: str, *schedules: str) -> str:
    result = subprocess.run(
        [str(program(build)), kernel, bug, *schedules], capture_output=True, text=True, timeout=120
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_correct_kernel_is_passed_by_every_schedule(kernel: str, build: str) -> None:
    schedules = IN_ORDER + RANDOM
    assert run(build, kernel, "none", *schedules).split("\n") == ["correct"] * len(schedules) + [""]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("kernel", "bug"), SEEDED, ids=":".join)
def test_a_seeded_mistake_is_caught(kernel: str, bug: str, build: str) -> None:
    wanted = SEEDED[kernel, bug][BUILDS.index(build)]
    outcomes = [run(build, kernel, bug, schedule) for schedule in ("forward", "reverse")]
    if wanted:
        assert any(wanted in outcome for outcome in outcomes), outcomes
    else:
        assert outcomes == ["correct\n", "correct\n"]


RACES = [mistake for mistake, (plain, _, race) in SEEDED.items() if race != plain]


@pytest.mark.parametrize("schedule", IN_ORDER + RANDOM[:3])
@pytest.mark.parametrize(("kernel", "bug"), RACES, ids=":".join)
def test_a_race_is_reported_in_every_schedule(kernel: str, bug: str, schedule: str) -> None:
    """In whatever words; so that one pass of the race build over all kernels is enough."""
    assert run("race", kernel, bug, schedule).startswith("simt: ")


def test_a_report_names_kernel_block_thread_and_line() -> None:
    report = run("plain", "row_sum", "divergent_barrier", "forward")
    assert "kernels.cu:" in report
    assert "[kernel row_sum, block (0, 0, 0), thread (" in report


def test_asan_names_kernel_thread_and_line() -> None:
    report = run("asan", "row_sum", "missing_mask", "forward")
    assert "simt: error in kernel row_sum, block (8, 0, 0), thread (44, 0, 0)" in report
    assert "row_sum_kernel" in report


def test_a_wrong_schedule_is_refused() -> None:
    assert "must be forward, reverse, lockstep or random:SEED; got sideways" in run(
        "plain", "row_sum", "none", "sideways"
    )
