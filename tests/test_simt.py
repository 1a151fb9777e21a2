"""The host build of the CUDA C++ kernels: that it catches what is wrong, and only that."""

import ctypes
import json
import re
import subprocess
import sys

import pytest
import simt_build
import torch

pytestmark = pytest.mark.interpreter

CONTROLS = simt_build.SIMT / "controls.cu"
TILES = 5


@pytest.fixture(scope="module")
def controls():
    library = ctypes.CDLL(str(simt_build.build((CONTROLS,))))
    library.simt_failure.restype = ctypes.c_char_p
    return library


def run(library, name, x, out, n, copies="late", schedule="lockstep", seed=0) -> str | None:
    """The failure of a launch, or None."""
    library.simt_configure(
        simt_build.COPIES.index(copies), simt_build.SCHEDULES.index(schedule), seed
    )
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
    status = getattr(library, f"control_{name}")(*pointers, n)
    return library.simt_failure().decode() if status else None


def pipeline(library, name, *mode):
    """(failure, whether the result is right) of the double-buffered sum."""
    x, out = torch.randn(TILES, 256), torch.full((256,), float("nan"))
    failure = run(library, name, x, out, TILES, *mode)
    return failure, torch.allclose(out, x.sum(0).flip(0), atol=1e-5)


def pairs(library, name, *mode):
    x, out = torch.randn(64), torch.full((64,), float("nan"))
    failure = run(library, name, x, out, 64, *mode)
    return failure, torch.equal(out, x + x.view(32, 2).flip(1).reshape(64))


@pytest.mark.parametrize("mode", simt_build.MODES, ids="-".join)
def test_kernels_without_bugs_pass(controls, mode):
    assert pipeline(controls, "pipeline", *mode) == (None, True)
    assert pairs(controls, "pairs", *mode) == (None, True)
    assert pairs(controls, "warps", *mode) == (None, True)
    assert pairs(controls, "barriers", *mode) == (None, True)


@pytest.mark.parametrize(
    "bug", ["kMissingWait", "kMissingBarrierAfterWait", "kMissingBarrierBeforeReuse"]
)
def test_races_give_wrong_results_in_some_mode(controls, bug):
    right = {mode: pipeline(controls, bug, *mode)[1] for mode in simt_build.MODES}
    assert not all(right.values()), right
    if bug == "kMissingWait":
        assert not any(right[m] for m in simt_build.MODES if m[0] == "late"), right


def test_both_copy_modes_are_needed(controls):
    """A missing barrier before reuse shows only where copies land early and a warp runs ahead."""
    bug = "kMissingBarrierBeforeReuse"
    wrong = {m for m in simt_build.MODES if not pipeline(controls, bug, *m)[1]}
    assert ("early", "first") in wrong or ("early", "last") in wrong
    assert ("late", "lockstep") not in wrong


def test_a_warp_is_not_in_step(controls):
    """Lanes that do not wait for each other run in any order."""
    right = [pairs(controls, "kMissingWarpBarrier", *mode)[1] for mode in simt_build.MODES]
    assert not any(right)


_ENDED = (
    "a thread ended while others wait at a barrier of the block"
    "|some threads of the block do not reach the barrier that others wait at"
)
_NOT_REACHED = "some lanes of the warp do not reach the collective that others wait at"
MISUSES = {  # each with what is said; who comes first depends on the mode
    "kSkippedBarrier": _ENDED,
    "kExitBeforeBarrier": _ENDED,
    "kTooFewThreads": _ENDED,
    "kHalfWarpBarrier": "a barrier of parts of warps, or that there is not",
    "kTwoBarriers": "lanes of a warp meet at different places, two calls of sync_block",
    "kDifferentShuffles": "lanes of a warp meet at different places, two calls of shuffle",
    "kDifferentCollectives": "lanes of a warp meet at different places, "
    "(shuffle and sync_warp|sync_warp and shuffle)",
    "kExitBeforeShuffle": _NOT_REACHED,
    "kHalfWarpShuffle": _NOT_REACHED,
    "kMisalignedCopy": "asynchronous copy from an address that is not aligned to its size",
    "kMisalignedLoad": "16-byte load from an address that is not aligned to 16 bytes",
    "kMisalignedStore": "16-byte store to an address that is not aligned to 16 bytes",
    "kMisalignedMatrix": "ldmatrix of a row that is not aligned to 16 bytes",
    "kCopyOutOfBounds": "asynchronous copy to what is not the block's shared memory",
    "kMatrixOutOfBounds": "ldmatrix of a row that is not in the block's shared memory",
    "kCopyNotWaitedFor": "a thread ended with asynchronous copies that it did not wait for",
}


@pytest.mark.parametrize("mode", simt_build.MODES, ids="-".join)
@pytest.mark.parametrize("bug", MISUSES)
def test_misuse_fails_the_launch_in_every_mode(controls, bug, mode):
    failure, _ = pairs(controls, bug, *mode)
    assert failure is not None
    assert re.match(rf"({MISUSES[bug]}) \(block 0,0,0, thread \d+\)", failure), failure
    assert pairs(controls, "pairs", *mode) == (None, True), "a failure leaves no trace"


def test_a_deadlock_says_who_is_where(controls):
    failure, _ = pairs(controls, "kHalfWarpShuffle")
    assert failure.endswith(
        "; from thread 0: shuffle, from 16: ended, from 32: shuffle, from 48: ended"
    )


def test_blocks_have_no_order(controls):
    expected = torch.arange(1.0, 9.0)
    right = []
    for schedule in simt_build.SCHEDULES:
        out = torch.zeros(8)
        assert run(controls, "kBlocksInOrder", out, out, 8, "late", schedule) is None
        right.append(torch.equal(out, expected))
    assert not all(right)


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "message"),
    [
        ((1, 1), 1025, 0, "invalid launch configuration"),
        ((0, 1), 32, 0, "invalid launch configuration"),
        ((1, 65536), 32, 0, "invalid launch configuration"),
        ((1, 1), 32, 228 * 1024, "more shared memory than a block can have"),
    ],
)
def test_launches_that_a_gpu_refuses(controls, grid, threads, shared, message):
    assert controls.control_configuration(*grid, threads, shared) != 0
    assert controls.simt_failure().decode() == message


# What only the sanitizers see, with how they name it.
SANITIZED = {
    "kOutOfBounds": "heap-buffer-overflow",
    "kOutOfBoundsShared": "heap-buffer-overflow",
    "kInt32Overflow": "signed integer overflow",
}
SCRIPT = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
out = (ctypes.c_float * 64)()
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
x = ctypes.c_void_p(malloc(256))
for name in sys.argv[3:]:
    status = getattr(library, "control_" + name)(x, out, int(sys.argv[2]))
sys.exit(status)
"""


def _sanitized(n: int, *names: str) -> subprocess.CompletedProcess:
    """Runs kernels of controls.cu one after the other, on malloc's memory."""
    library = simt_build.build((CONTROLS,), sanitized=True)
    command = [sys.executable, "-P", "-c", SCRIPT, str(library), str(n), *names]
    environment = simt_build.sanitized_environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("bug", SANITIZED)
def test_sanitizers_catch(bug):
    result = _sanitized(3 if bug == "kInt32Overflow" else 64, bug)
    assert result.returncode != 0 and SANITIZED[bug] in result.stderr, result.stderr[-3000:]
    assert "controls.cu" in result.stderr, "the report names the kernel's line"


def test_sanitizers_pass_what_is_right():
    """After a failed launch too: fibers that nobody resumes leave red zones on their stacks."""
    result = _sanitized(64, "pairs", *MISUSES, "pairs", "warps")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.long
def test_every_kernel_under_the_sanitizers(tmp_path):
    """A selection of the operators' tests that meets each kernel, in the sanitized build."""
    simt_build.build(sanitized=True)
    report = tmp_path / "report.json"
    tests = (simt_build.ROOT / "tests").glob("test_*.py")
    files = sorted(str(file) for file in tests if "mark.sanitized" in file.read_text())
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "sanitized", *files]
    environment = {**simt_build.sanitized_environment(), "FASTLM_SIMT_REPORT": str(report)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    launched = set(json.loads(report.read_text()))
    assert launched == simt_build.kernel_names()
