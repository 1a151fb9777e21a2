"""Everything that needs a GPU, in one command: `make gpu-check`.

    make gpu-check PYTHON=python3
    python benchmarks/gpu_check.py --only wrappers memcheck    # some steps alone
    python benchmarks/gpu_check.py --only tune                 # a step that runs by its name alone
    python benchmarks/gpu_check.py --only conformance gpu -k rotary --limit 300
    python benchmarks/gpu_check.py --only bench-norm --shape llama_8b --seconds 0.1

In this order, and on to the next step where one fails:
  1. build: the CUDA C++ library for this checkout, where it is not built yet;
  2. wrappers: what csrc/arch wraps, on the device against its host body;
  3. conformance: the operators' small cases, each kernel against the oracle, on the device;
  4. gpu: the tests that need a GPU, with real sizes (pytest -m gpu);
  5. memcheck, racecheck: the smallest case of each kernel under compute-sanitizer,
     CUDA C++ (-cuda) and Triton (-triton);
  6. benchmarks: every operator against torch and the peers that are installed, each provider
     checked before it is timed;
  7. tune, where `--only` names it: launch configurations and the ways of the feed-forward, seven
     minutes; picks.json is what `benchmarks/tune.py apply` puts into the tables.
A whole run takes hours, of which `--limit` is the most that one step may: after that it is
interrupted, and ten seconds later killed. `-k` is for the steps that are pytest, `--shape` for
bench-<operator>, `--seconds` for those (of each provider and pass) and tune (of all).
Writes results.json (device, driver, versions, commit, steps), log.txt and bench.csv, to all of
which is added while steps run. Where pytest-xdist is installed, tests run side by side, as many as
there are cores: most of their time is compiling.
Exit code: 0, 1 (a step failed, or its tool is missing), 2 (something is missing, and nothing ran).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("attention", "norm", "ffn", "loss", "rotary", "embedding")
BUILD = [sys.executable, str(ROOT / "csrc" / "build.py")]  # into this checkout's fastlm/
SANITIZERS = ("memcheck", "racecheck")
LIMIT_S = 3600.0  # of a step: one that hangs ends at last
GRACE_S = 10.0  # for a step that is over its limit, to say how far it came
MOST_WORKERS = 16  # each takes some memory of the GPU
MOST_WORKERS_OF_LARGE = 2  # tests of real sizes take tens of GB
FAMILIES = ("norm", "attention", "ffn", "loss", "rotary", "embedding", "dropout")


@dataclass
class Step:
    name: str
    command: list[str]
    status: str = "not run"  # then passed, failed, stopped (at its limit) or missing
    seconds: float = 0.0
    summary: str = ""  # the last line it printed
    optional: bool = False  # runs where it is asked for by name


def missing() -> list[str]:
    """What stands in the way, each with what to do about it."""
    problems = [
        f"{name} is not installed for {sys.executable}: {remedy}"
        for name, remedy in (
            ("torch", "install it for this machine's driver (https://pytorch.org)"),
            ("triton", "pip install triton"),
            ("pytest", "pip install pytest"),
            ("fastlm", f"FASTLM_BUILD_CUDA=0 pip install --no-build-isolation --no-deps -e {ROOT}"),
        )
        if importlib.util.find_spec(name) is None
    ]
    if importlib.util.find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            problems.append(
                "no GPU that torch can use: "
                + (f"torch is built for {built}, and finds none" if built else
                   "torch is built for the CPU alone; install a CUDA or ROCm build")
            )  # fmt: skip
    return problems


def side_by_side(most: int) -> list[str]:
    """pytest's options for as many tests at a time as there are cores, if it has xdist."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(os.cpu_count() or 1, most)), "--dist", "worksteal"]


def steps(
    out: Path,
    quick: bool,
    seconds: float | None = None,
    shape: Sequence[str] = (),
    keyword: str | None = None,
) -> list[Step]:
    """The steps; `--smallest` is this script's own mode for compute-sanitizer.

    Args:
        seconds, shape, keyword: options of the same names of the benchmarks, and pytest's -k.
    """
    python = [sys.executable, "-P"]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-k", keyword] if keyword else []
    timed = ["--seconds", str(seconds)] if seconds is not None else []
    table = ["--csv", str(out / "bench.csv")]
    many, few = side_by_side(MOST_WORKERS), side_by_side(MOST_WORKERS_OF_LARGE)
    families = sorted(
        str(file) for name in FAMILIES for file in (ROOT / "tests").glob(f"test_{name}*.py")
    )
    sanitizer = _sanitizer()
    if quick:
        benchmarks = [Step("bench", [*python, "-m", "fastlm", "bench", "--quick", *table])]
    else:
        asked = [*table, *timed, *(["--shape", *shape] if shape else [])]
        script = lambda op: [sys.executable, str(ROOT / "benchmarks" / f"{op}.py")]
        benchmarks = [Step(f"bench-{op}", [*script(op), *asked]) for op in BENCHMARKS]
    wrappers = str(ROOT / "tests" / "test_cuda_conformance.py")
    return [
        Step("build", BUILD),
        Step("wrappers", [*pytest, wrappers]),
        Step("conformance", [*pytest, *many, "-m", "not gpu", *families]),
        Step("gpu", [*pytest, *few, "-m", "gpu", "--ignore", wrappers]),
        *(
            Step(f"{tool}-{impl}", [sanitizer, "--tool", tool, "--error-exitcode", "1",
                                    *python, __file__, "--smallest", impl])
            for tool in SANITIZERS
            for impl in SMALLEST
        ),
        *benchmarks,
        Step("tune", [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "all",
                      *timed, "--json", str(out / "picks.json")], optional=True),
    ]  # fmt: skip


def _sanitizer() -> str:
    """compute-sanitizer of the path or of a toolkit that is not on it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("compute-sanitizer", path=f"{home}/bin") for home in homes if home]
    on_path = shutil.which("compute-sanitizer")
    return next((place for place in (on_path, *places) if place), "compute-sanitizer")


def run(step: Step, log: Path, limit: float = LIMIT_S) -> None:
    """Runs a step, showing what it prints and adding it to the log."""
    # The sanitizer sees every allocation only where torch does not pool them.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if step.name.startswith(SANITIZERS):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("a", buffering=1) as file:  # a line at a time: whatever ends us, it is there

        def tell(line: str) -> None:
            print(line, end="", flush=True)
            file.write(line)
            step.summary = line.strip() or step.summary

        tell(f"== {step.name}: {' '.join(step.command)}\n")
        if shutil.which(step.command[0]) is None:
            step.status, step.summary = "missing", f"{step.command[0]} is not installed"
            return
        start = time.monotonic()
        code = watched(step.command, environment, limit, tell)
    step.seconds = round(time.monotonic() - start, 1)
    step.status = "stopped" if code is None else "failed" if code else "passed"
    if code is None:
        step.summary = f"over its limit of {limit:g} s; {step.summary}"


def watched(
    command: list[str], environment: dict[str, str], limit: float, tell: Callable[[str], None]
) -> int | None:
    """Runs a command in a process group of its own; its exit code, or None if it took too long.
    What it starts ends with it, and with this process."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), _end(process)))
    timer.start()
    try:
        for line in process.stdout:
            tell(line)
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        timer.cancel()
    return None if late.is_set() else code


def _end(process: subprocess.Popen) -> None:
    """Interrupts the group, on which pytest says what it has; kills what is left after a while."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def machine() -> dict[str, str]:
    import torch

    from fastlm.bench.machine import describe

    return {
        **asdict(describe(torch.device("cuda"))),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _calls(impl: str, device: str):
    """(a function that makes a tensor, one that makes a call and its backward pass)."""
    import torch

    def t(*shape, dtype=torch.float16):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def both(fn, *args, **options):
        out = fn(*args, impl=impl, **options)
        outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return t, both


def smallest(device: str = "cuda") -> None:
    """One small call of every Triton kernel, forward and backward; odd sizes meet every mask."""
    import torch

    import fastlm
    from fastlm.ops.ffn import ffn_by, gated_ffn_by

    t, both = _calls("triton", device)
    for cols in (33, 48, 8200, 8208, 16400):
        block = {"residual": t(3, cols), "dropout_p": 0.5, "seed": 1, "prenorm": True}
        both(fastlm.layer_norm, t(3, cols), t(cols), t(cols), **block)
        both(fastlm.rms_norm, t(3, cols), t(cols), casting="gemma")
    for headdim in (17, 64, 128):
        q, k, v = t(1, 19, 2, headdim), t(1, 70, 1, headdim), t(1, 70, 1, headdim)
        both(fastlm.attention, q, k, v, causal=True)
    options = {"sinks": t(2), "dropout_p": 0.5, "seed": 1, "window": (30, 20)}
    both(fastlm.attention, q, k, v, bias=t(2, 19, 70), alibi_slopes=t(2), **options)
    table = fastlm.RelativeBias(t(32, 2), bidirectional=True, max_distance=128)
    cu_q, cu_k = (torch.tensor(x, device=device) for x in ([0, 0, 19], [0, 5, 70]))
    packed = (q[0], k[0], v[0], cu_q.int(), cu_k.int(), 19, 65)
    both(fastlm.attention_varlen, *packed, bias=table, **options)
    both(fastlm.attention_weights, q, k, torch.ones(1, 2, 19, device=device), bias=table)
    with torch.no_grad():
        new = {"k_new": t(1, 2, 1, 128), "v_new": t(1, 2, 1, 128)}
        fastlm.attention_decode(
            q[:, :2], k, v, torch.tensor([60], device=device), impl="triton", **new
        )
    both(fastlm.bias_act, t(3, 33), t(33), activation="gelu", dropout_p=0.5, seed=1)
    both(fastlm.glu, t(3, 33), t(3, 33))
    both(fastlm.ffn, t(3, 32), t(65, 32), t(65), t(32, 65), t(32), dropout_p=0.5, seed=1)
    both(fastlm.gated_ffn, t(3, 32), t(65, 32), t(65, 32), t(32, 65))
    for hidden in (65, 136):  # through pointers, and through descriptors
        weights = t(hidden, 32), t(hidden), t(32, hidden), t(32)
        call = {"activation": "gelu", "dropout_p": 0.5, "seed": 1, "recompute": False}
        both(functools.partial(ffn_by, "epilogue"), t(3, 32), *weights, **call)
        weights = t(hidden, 32), t(hidden, 32), t(32, hidden)
        call = {"activation": "silu", "recompute": False}
        both(functools.partial(gated_ffn_by, "epilogue"), t(3, 32), *weights, **call)
    target = torch.tensor([0, -100, 300], device=device)
    both(fastlm.cross_entropy, t(3, 301), target, label_smoothing=0.1, z_loss=1e-4)
    ids = torch.randint(0, 2, (7, 33), device=device)
    for interleaved in (False, True):
        angles = t(40, 5), t(40, 5)
        options = {"positions": ids, "interleaved": interleaved}
        both(fastlm.rotary, t(7, 33, 3, 13), *angles, **options)
    for dim in (33, 8200):
        tables = {"position_weight": t(40, dim), "type_weight": t(2, dim), "type_ids": ids}
        norm = {"norm_weight": t(dim), "norm_bias": t(dim), "dropout_p": 0.5, "seed": 1}
        both(fastlm.embedding, ids[:, :3], t(5, dim), padding_idx=0,
             **{**tables, "type_ids": ids[0, :3]}, **norm)  # fmt: skip
    for dim in (33, 64):  # without and with the copy engine
        head = {"bias": t(301), "label_smoothing": 0.1}
        both(fastlm.linear_cross_entropy, t(3, dim), t(301, dim), target, **head)
    # More than one tile of kept rows, of which the kernels learn on the GPU.
    both(fastlm.linear_cross_entropy, t(140, 64), t(301, 64), target[:1].expand(140))
    transform = t(64, 33), t(64), t(64), t(64)
    both(fastlm.masked_lm_loss, t(3, 33), target, *transform, t(301, 64))


def smallest_cuda(device: str = "cuda") -> None:
    """The same for the CUDA C++ kernels."""
    import torch

    import fastlm

    t, both = _calls("cuda", device)
    for cols in (33, 64, 8200, 70000):
        block = {"residual": t(3, cols), "dropout_p": 0.5, "seed": 1, "prenorm": True}
        both(fastlm.layer_norm, t(3, cols), t(cols), t(cols), **block)
        both(fastlm.rms_norm, t(3, cols), t(cols), casting="gemma")
    for cols in (33, 64):
        both(fastlm.bias_act, t(3, cols), t(cols), activation="gelu", dropout_p=0.5, seed=1)
        both(fastlm.glu, t(3, cols), t(3, cols))
    for headdim in (32, 64, 96, 128, 256):
        q, k, v = t(1, 19, 2, headdim), t(1, 70, 1, headdim), t(1, 70, 1, headdim)
        both(fastlm.attention, q, k, v, causal=True)
        options = {"dropout_p": 0.5, "seed": 1, "window": (30, 20)}
        both(fastlm.attention, q, k, v, **options)
    cu_q, cu_k = (torch.tensor(x, device=device) for x in ([0, 0, 19], [0, 5, 70]))
    both(fastlm.attention_varlen, q[0], k[0], v[0], cu_q.int(), cu_k.int(), 19, 65, **options)


SMALLEST = {"cuda": smallest_cuda, "triton": smallest}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_check_out")
    parser.add_argument("--quick", action="store_true", help="one benchmark shape an operator")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="by their names")
    parser.add_argument("--smallest", choices=SMALLEST, help="only the calls of step 5")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds of a step; %(default)g"
    )
    parser.add_argument("--seconds", type=float, help="of a benchmark's provider, or of tune")
    parser.add_argument(
        "--shape", nargs="+", default=[], help="of benchmarks: names with all these"
    )
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="which tests, as pytest's")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    every = steps(options.out, options.quick, options.seconds, options.shape, options.keyword)
    chosen = [step for step in every if step.name in (options.only or ()) or
              (options.only is None and not step.optional)]  # fmt: skip
    if unknown := set(options.only or ()) - {step.name for step in every}:
        names = ", ".join(step.name for step in every)
        print(f"gpu-check: --only takes {names}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    problems = missing()
    for problem in problems:
        print(f"gpu-check: {problem}", file=sys.stderr)
    if problems:
        return 2
    if options.smallest:
        import torch

        SMALLEST[options.smallest]()
        torch.cuda.synchronize()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.txt"
    for file in (log, options.out / "bench.csv"):  # steps append
        file.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a step would outlive us
    results = {"machine": machine(), "steps": []}
    for step in chosen:
        run(step, log, options.limit)
        results["steps"].append(asdict(step))
        # After every step: an interrupted run keeps what it has.
        (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(*(f"{key:<12}{value}" for key, value in results["machine"].items()), sep="\n")
    for step in results["steps"]:
        print(f"{step['name']:<17}{step['status']:<8}{step['seconds']:>8.1f} s  {step['summary']}")
    print(f"results in {options.out}")
    return int(any(step["status"] != "passed" for step in results["steps"]))


if __name__ == "__main__":
    sys.exit(main())
