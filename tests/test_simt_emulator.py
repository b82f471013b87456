"""The emulator itself: what it must catch, what it must allow, and the kernels' tests under sanitizers."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import pytest

from simt.harness import ORDERS, set_order


def misuse(simt, name: str, threads: int = 64, *, blocks: int = 1) -> list[float]:
    out = (ctypes.c_float * 4096)()
    simt.run_misuse(name, blocks, threads, ctypes.addressof(out))
    return list(out)


@pytest.mark.parametrize(("right", "wrong"), [("neighbour", "missing_barrier"), ("neighbour_in_warp", "missing_warp_barrier")])
def test_a_missing_barrier_shows_in_some_order(simt, right, wrong):
    results = {right: [], wrong: []}
    for order in ORDERS:
        set_order(simt, *order)
        for name, found in results.items():
            found.append(misuse(simt, name, 32)[:32])
    expected = [(t + 1.0) % 32 for t in range(32)]
    assert all(found == expected for found in results[right])
    assert all(found != expected for found in results[wrong])  # shared memory starts out as NaN
    assert any(str(found) != str(results[wrong][0]) for found in results[wrong])


def test_counting_a_block_before_it_has_written_shows_in_some_order(simt):
    found = {"sum_by_the_last_block": [], "missing_barrier_before_the_count": []}
    for seed in range(10):
        set_order(simt, "random", seed)
        for name, sums in found.items():
            sums.append(misuse(simt, name, blocks=10)[0])
    right, wrong = found.values()
    assert set(right) == {640}
    assert min(wrong) < 640


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_barriers", r"__syncthreads\(\) at .*misuse.cpp:\d+ while other threads wait at .*misuse.cpp:\d+"),
        ("barrier_against_shuffle", "deadlock: 1 threads in __syncthreads.., 31 in a warp operation, 32 have exited"),
        ("overrun", "write outside a shared array of 256 bytes"),
        ("underrun", "write outside a shared array of 256 bytes"),
        ("too_much_shared", "shared arrays of 49156 bytes"),
        ("caller_not_in_mask", "the calling lane is not in its own mask"),
        ("lane_absent", "the mask has a lane that has exited|a lane in its mask has exited"),
        ("lane_leaves", "a lane in its mask has exited while others wait"),
        ("masks_differ", "lanes wait for one another with other masks or operations"),
        ("operations_differ", "lanes wait for one another with other masks or operations"),
        ("source_not_in_mask", "lane 0 reads lane 16, which is not in the mask"),
        ("misaligned_load", "misaligned load of 16 bytes"),
    ],
)
def test_misuse_is_an_error(simt, name, message):
    with pytest.raises(RuntimeError, match=message):
        misuse(simt, name)
    assert misuse(simt, "neighbour")[:3] == [1, 2, 3]  # and the next launch works


def test_launches_that_no_gpu_accepts(simt):
    for threads in (0, 1025):
        with pytest.raises(RuntimeError, match=f"launch with blocks of {threads}x1x1"):
            misuse(simt, "neighbour", threads)
    assert misuse(simt, "neighbour", 1024)[:1024] == [*range(1, 1024), 0]


def test_what_is_allowed(simt):
    assert misuse(simt, "barrier_after_exit")[:4] == [0, 1, 0, 1]
    misuse(simt, "write_last")
    assert all(map(math.isnan, misuse(simt, "read_unwritten")[:64]))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_warp_operations(simt, order):
    set_order(simt, *order)
    rows = [misuse(simt, "warp_operations")[k * 64 : k * 64 + 64] for k in range(13)]
    lanes = [*range(32)] * 2
    assert rows == [
        [5] * 64,
        [lane // 8 * 8 + 1 for lane in lanes],
        [lane ^ 3 for lane in lanes],
        [lane if lane ^ 9 > lane | 7 else lane ^ 9 for lane in lanes],
        [lane - 2 if lane >= 2 else lane for lane in lanes],
        [lane + 2 if lane % 16 < 14 else lane for lane in lanes],
        [1] * 64,
        [11] * 64,
        [80] * 64,
        [1] * 64,
        [0] * 64,
        [1] * 64,
        [0] * 64,
    ]
    assert misuse(simt, "halves")[:32] == [*range(16, 32)] + [sum(range(16))] * 16


# ----------------------------------------------------------------------------------------------------------- sanitizers

SANITIZED = "not 20001 and not 20008"


@pytest.mark.slow
@pytest.mark.skipif("PREFKERN_SIMT_MODULE" in os.environ, reason="runs inside of it")
@pytest.mark.parametrize("name", ["overrun", "underrun"])
def test_the_sanitizer_sees_the_kernels(sanitized, name):
    script = "import os, sys; from simt import build; build.load(os.environ['PREFKERN_SIMT_MODULE'])"
    done = sanitized("-c", f"{script}.run_misuse('{name}', 1, 64, 0)")
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "write_at" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif("PREFKERN_SIMT_MODULE" in os.environ, reason="runs inside of it")
def test_under_sanitizers(sanitized):
    here = Path(__file__)
    kernels = sorted(str(path) for path in here.parent.glob("test_simt_*.py") if path != here)
    options = ("-q", "-x", "--capture=no", "-p", "no:cacheprovider")  # a report goes to stderr, and the process ends
    done = sanitized("-m", "pytest", *options, "-k", SANITIZED, *kernels)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
