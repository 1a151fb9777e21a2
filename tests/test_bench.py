"""The benchmark harness: what it refuses to time, what it counts, what it writes."""

import math
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benching import CPU, SCRIPTS, load, run_quickly, small_shapes  # noqa: F401

from fastlm.bench import machine, results, summary, timing
from fastlm.bench.case import Work
from fastlm.bench.cases import CASES
from fastlm.bench.run import directions_of
from fastlm.cli import main
from fastlm.errors import UserError


def norm_case():
    return next(CASES["norm"](CPU, torch.float32, True))


# The check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [op for op in CASES if op != "embedding"])
def test_every_case_passes_and_is_timed(op, dtype):
    cases = list(CASES[op](CPU, dtype, False))
    assert len({case.shape for case in cases}) == len(cases)
    for case in cases:
        rows, failed = run_quickly(case)
        assert failed == {}
        if case.function == "products":  # the bound of a head's loss, which is nobody's function
            assert {row.provider for row in rows} == {"torch"}
            continue
        assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
        assert {row.direction for row in rows} == {"forward", "forward+backward"}
        assert all(row.p20_ms <= row.median_ms <= row.p80_ms for row in rows)
        assert all(row.speedup == 1.0 for row in rows if row.provider == "torch")
        assert {"fastlm-triton", "fastlm-cuda"} <= set(case.unavailable)


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("op", list(CASES))
def test_cuda_kernels_pass_the_check_or_are_named_absent(op, impl):
    """In the host build, of small shapes, every case whose operator has a kernel."""
    for case in CASES[op](CPU, torch.bfloat16, False):
        if case.function == "products":
            continue
        reason = case.unavailable[f"fastlm-{impl}"]
        if reason.startswith("fastlm has no cuda kernel for"):
            continue
        assert reason == "its kernels run on a GPU, the inputs are on cpu"
        call = case.providers["fastlm-torch"]
        call = partial(call.func, *call.args, impl=impl)
        rows, failed = run_quickly(replace(case, providers={f"fastlm-{impl}": call}))
        if failed:  # an option that the kernel does not have
            assert "impl='cuda'" in failed[f"fastlm-{impl}"]
        else:
            assert {row.provider for row in rows} == {f"fastlm-{impl}"}


def test_embedding_case_passes():
    rows, failed = run_quickly(next(CASES["embedding"](CPU, torch.float32, False)))
    assert failed == {} and len(rows) == 4


def wrong_output(x, weight, bias):
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps=1e-3)


def wrong_gradient(x, weight, bias):
    """Right output; the gradient of the bias is doubled."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias * 2 - bias.detach())


def not_a_number(x, weight, bias):
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias) * math.nan


def not_here(x, weight, bias):
    raise NotImplementedError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("provider", "why"),
    [
        (wrong_output, "of the bound"),
        (wrong_gradient, "of the bound"),
        (not_a_number, "of the bound"),
        (not_here, "cannot: no kernel"),
    ],
)
def test_wrong_provider_is_told_and_not_timed(provider, why):
    """A negative control of the check before every time."""
    case = norm_case()
    rows, failed = run_quickly(replace(case, providers={**case.providers, "wrong": provider}))
    assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
    assert list(failed) == ["wrong"] and why in failed["wrong"]


def test_torch_is_timed_whatever_its_error_and_others_no_worse():
    case = norm_case()
    torch_fn = case.providers["torch"]

    def sloppy(**tensors):
        return torch_fn(**tensors) * (1 + 1e-4)

    def sloppier(**tensors):
        return torch_fn(**tensors) * (1 + 2e-4)

    case = replace(case, providers={"same": sloppy, "worse": sloppier, "torch": sloppy})
    rows, failed = run_quickly(case, directions=["forward"])
    assert [row.provider for row in rows] == ["torch", "same"]
    assert all(row.of_bound > 1 for row in rows)
    assert list(failed) == ["worse"]
    assert results.table(rows).count("!") == 2


def test_provider_that_runs_out_of_memory_ends_no_other():
    case = norm_case()

    def greedy(x, weight, bias):
        raise torch.OutOfMemoryError("tried to allocate too much")

    calls = []

    def tired(x, weight, bias):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no more")
        return case.providers["torch"](x, weight, bias)

    case = replace(case, providers={**case.providers, "greedy": greedy, "tired": tired})
    rows, failed = run_quickly(case, directions=["forward"])
    assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
    assert failed == {
        "greedy": "out of memory: tried to allocate too much",
        "tired": "forward: out of memory: no more",
    }


def test_what_breaks_while_it_is_timed_is_told_and_ends_no_other():
    case = norm_case()
    calls = []

    def tired(x, weight, bias):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no more")
        return case.providers["torch"](x, weight, bias)

    case = replace(case, providers={**case.providers, "tired": tired})
    rows, failed = run_quickly(case, directions=["forward"])
    assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
    assert failed == {"tired": "forward: out of memory: no more"}


# What is counted


def test_work_of_norm_is_in_bytes():
    work = {case.shape.split()[0]: case.work for case in CASES["norm"](CPU, torch.bfloat16, False)}
    n = 16 * 48 * 2
    assert work["small/layer_norm"] == Work("GB/s", 2 * n, 3 * n)
    assert work["small/add_layer_norm"] == Work("GB/s", 3 * n, 3 * n)


def test_backward_of_a_loss_is_not_timed_by_itself():
    assert "backward" not in directions_of("loss", quick=False)
    assert directions_of("norm", quick=False)[-1] == "backward"


def test_backward_alone_is_timed():
    rows, _ = run_quickly(norm_case(), directions=["backward"])
    assert [row.direction for row in rows] == ["backward"] * 2


def test_times_are_taken_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = timing.measure(calls, CPU, seconds=0.0)
    assert set(times) == {"a", "b"}
    runs = "".join(order).replace("aa", "a").replace("bb", "b")
    while "aa" in runs or "bb" in runs:
        runs = runs.replace("aa", "a").replace("bb", "b")
    assert runs.count("ab") >= 5


def test_host_time_of_a_slow_call_takes_few_calls(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    for seconds, count in ((0.001, 30), (0.02, 6), (1.0, 3)):
        calls.clear()
        call = lambda seconds=seconds: (now.append(now.pop() + seconds), calls.append(1))
        assert timing._host_time(call) == pytest.approx(seconds * 1e3)
        assert len(calls) == count


def test_driver_is_asked_once(monkeypatch):
    asked = []

    def run(*command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.1\n")

    monkeypatch.setattr(machine.subprocess, "run", run)
    machine._driver.cache_clear()
    assert machine._driver() == machine._driver() == "580.1" and len(asked) == 1
    machine._driver.cache_clear()


def test_machine_is_described():
    described = machine.describe(CPU)
    assert described.torch == torch.__version__ and described.device.endswith(" x 1")
    assert machine.commit().startswith("v") or len(machine.commit().rstrip("+")) == 12


# What is written


@pytest.fixture
def rows():
    return run_quickly(norm_case(), directions=["forward"])[0]


def test_csv_round_trip(rows, tmp_path):
    path = tmp_path / "rows.csv"
    results.append_csv(path, rows[:1])
    results.append_csv(path, rows[1:])
    table = results.read_csv(path)
    assert [row["provider"] for row in table] == ["torch", "fastlm-torch"]
    assert table[0]["pass"] == "forward" and float(table[0]["median_ms"]) > 0
    assert set(table[0]) >= {
        "op", "shape", "dtype", "pass", "provider", "median_ms", "p20_ms", "p80_ms", "host_ms",
        "graph", "rate", "unit", "of_ceiling", "peak_mb", "max_error", "device", "driver", "torch",
        "triton", "commit",
    }  # fmt: skip


def test_csv_is_not_appended_to_another_table(rows, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a table that fastlm bench wrote"):
        results.append_csv(path, rows)
    assert path.read_text() == "a,b\n1,2\n"


def test_table_prints_the_error_beside_the_time(rows):
    header, _, ours = results.table(rows).splitlines()[1:]
    assert header.split() == [
        "provider", "ms", "p20-p80", "host", "vs", "torch", "GB/s", "of", "ceiling", "max", "error",
        "of", "bound", "MB",
    ]  # fmt: skip
    cells = ours.split()
    assert cells[0] == "fastlm-torch" and cells[4].endswith("x") and float(cells[8]) <= 1
    assert cells[3] == "-"  # a CPU is its own host


def test_table_stars_a_host_time_that_is_part_of_the_gpus(rows):
    on_gpu = [replace(rows[0], host_ms=0.25, graph=graph) for graph in (True, False)]
    _, first, second = results.table(on_gpu).splitlines()[1:]
    assert first.split()[3] == "0.250" and second.split()[3] == "0.250*"


def test_summary_is_of_ratios(rows):
    """Geometric mean and worst cell against each peer; each option against none."""
    rate = {"full": 8.0, "window": 2.0}
    make = lambda shape, variant, provider, ms: replace(
        rows[0], op="attention", shape=f"{shape}/{variant} 1x2x4/2x8", provider=provider,
        median_ms=ms, rate=rate[variant] / ms, unit="TFLOP/s",
    )  # fmt: skip
    table = [
        make("a", "full", "torch", 4.0), make("a", "full", "fastlm-triton", 2.0),
        make("b", "full", "torch", 8.0), make("b", "full", "fastlm-triton", 1.0),
        make("b", "full", "flex", 3.0), make("b", "full", "fastlm-torch", 9.0),
        make("a", "window", "fastlm-triton", 1.0), make("c", "window", "fastlm-triton", 1.0),
        make("c", "window", "fastlm-cuda", 0.5),
    ]  # fmt: skip
    lines = [line.split() for line in summary.against_peers(table)]
    assert [line[:9] for line in lines] == [
        ["full", "forward", "fastlm-triton", "vs", "torch", "4.00x", "worst", "2.00x", "at"],
        ["full", "forward", "fastlm-triton", "vs", "flex", "3.00x", "worst", "3.00x", "at"],
    ]
    assert [" ".join(line[9:]) for line in lines] == ["a float32 (2 of 2)", "b float32 (1 of 2)"]
    (line,) = summary.between_kernels(table)
    assert line.split()[:5] == "window forward fastlm-cuda vs fastlm-triton".split()
    assert line.split()[5:] == "2.00x worst 2.00x at c float32 (1 of 2)".split()
    (line,) = summary.against_plain(table)  # nothing plain was timed at c
    assert line.split() == (
        "window forward fastlm-triton 0.50 of the time of full 2.00 an operation a float32".split()
    )


def test_bench_command(tmp_path, capsys):
    csv, png = tmp_path / "sub" / "rows.csv", tmp_path / "sub" / "rows.png"
    code = main(["bench", "--quick", "--op", "norm", "ffn", "--csv", str(csv), "--plot", str(png)])
    out = capsys.readouterr().out
    assert code == 0
    assert "not timed: fastlm-triton: its kernels run on a GPU, the inputs are on cpu" in out
    assert len(results.read_csv(csv)) == 3 * 2 * 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_bench_command_fails_with_a_wrong_kernel(monkeypatch, capsys):
    case = norm_case()

    def cases(device, dtype, quick):
        yield replace(case, providers={**case.providers, "fastlm-torch": wrong_output})

    monkeypatch.setitem(CASES, "norm", cases)
    assert main(["bench", "--quick", "--op", "norm"]) == 1
    captured = capsys.readouterr()
    assert "fastlm-torch" not in captured.out
    assert captured.err.startswith("FAILED  norm small/layer_norm 16x48 fastlm-torch: error ")


def report_rows(rows, tmp_path, *files):
    """What benchmarks/report.py reads where each file holds the rows with these changes."""
    report = load("report")
    report.RESULTS = tmp_path
    for i, changes in enumerate(files):
        results.append_csv(
            tmp_path / f"{i}.csv", [replace(row, **c) for c in changes for row in rows]
        )
    return report


@pytest.mark.parametrize("apart", [False, True])
def test_report_refuses_rows_of_two_devices(apart, rows, tmp_path, capsys, monkeypatch):
    of = [{"device": "NVIDIA H200"}, {"device": "NVIDIA H100", "shape": "other/layer_norm 8x8"}]
    report = report_rows(rows, tmp_path, *([[c] for c in of] if apart else [of]))
    names = "0.csv, 1.csv" if apart else "0.csv"
    told = (
        f"{names}: the rows of norm, forward, must be of one device, got NVIDIA H200, NVIDIA H100"
    )
    with pytest.raises(UserError, match=f"^{told}$"):
        report.table(report.rows())
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.main() == 1 and capsys.readouterr().err == f"report: {told}\n"


def test_report_takes_devices_of_different_passes(rows, tmp_path):
    report = report_rows(
        rows, tmp_path, [{"device": "a"}, {"device": "b", "direction": "backward"}]
    )
    assert len(report.table(report.rows()).splitlines()) == 4


def test_report_divides_times_of_one_run(rows, tmp_path):
    """The newest of a case and pass; another case may be of another commit."""
    torch_row, ours = (replace(row, median_ms=1.0) for row in rows)
    peer = replace(torch_row, provider="peer", commit="old")
    old = [replace(row, commit="old", median_ms=8.0) for row in (torch_row, ours)]
    other = [replace(row, shape="b/layer_norm 1x1") for row in old]
    new = [replace(torch_row, commit="new", median_ms=4.0), replace(ours, commit="new")]
    report = report_rows([*old, peer, *other, *new], tmp_path, [{}])
    (line,) = report.table(report.rows()).splitlines()[2:]
    assert "| 2.00 (1.00) | – |" in line


# The scripts


@pytest.mark.parametrize("op", list(CASES))
def test_scripts_name_peers_that_are_installed(op, monkeypatch):
    """Every script imports, and its peers say that they are missing or make a function."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, shared = load(op), load("_bench")
    for case in CASES[op](CPU, torch.float32, True):
        missing = set()
        more = shared.with_peers(case, script.PEERS, None, missing)
        named = {*more.providers, *more.unavailable, *(text.split(" (")[0] for text in missing)}
        assert set(script.PEERS) <= named and all(more.unavailable.values())
        assert "torch.compile" in more.providers or op == "attention"
        assert set(case.providers) <= named
        assert all(callable(fn) for fn in more.providers.values())
        only = shared.with_peers(case, script.PEERS, ["fastlm-torch"], missing)
        assert set(only.providers) == {"torch", "fastlm-torch"}


def test_script_measures_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    csv = tmp_path / "norm.csv"
    monkeypatch.setattr(sys, "argv", ["norm.py", "--provider", "fastlm-torch", "--csv", str(csv)])
    monkeypatch.setattr("fastlm.bench.timing._MIN_SAMPLES", 2)
    script = load("norm")
    assert script.main("norm", script.__doc__, script.PEERS) == 0
    assert len(results.read_csv(csv)) == 4 * 3 * 2


@pytest.mark.parametrize("where", ["make", "peers", "next"])
def test_script_goes_on_after_a_case_that_breaks(where, monkeypatch, tmp_path, capsys):
    """For want of memory, say: the other cases are measured, and it exits with 1."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    shared, csv = load("_bench"), tmp_path / "norm.csv"
    monkeypatch.setattr(sys, "argv", ["norm.py", "--csv", str(csv)])

    def breaks(*_):
        raise torch.OutOfMemoryError("no memory\nfor this")

    def grid(device, dtype):
        yield "a", breaks if where == "make" else norm_case
        yield "b", norm_case
        if where == "next":
            breaks()

    if where == "peers":
        wants = iter((breaks, shared.with_peers))
        monkeypatch.setattr(shared, "with_peers", lambda *args: next(wants)(*args))
    assert shared.main("norm", "", {}, grid, seconds=0.0) == 1
    assert len(results.read_csv(csv)) == (2 if where == "next" else 1) * 3 * 2
    told = {"next": "making cases"}.get(where, "a")
    assert f"not measured: {told}: no memory\n" in capsys.readouterr().err


def test_script_refuses_another_table_before_it_measures(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    shared, csv = load("_bench"), tmp_path / "norm.csv"
    csv.write_text("a,b\n")
    monkeypatch.setattr(sys, "argv", ["norm.py", "--csv", str(csv)])
    grid = lambda *_: pytest.fail("a case was made")
    with pytest.raises(UserError, match="is not a table"):
        shared.main("norm", "", {}, grid)


def test_tune_prints_what_is_fastest_and_restores(monkeypatch):
    """The sweep itself, on the interpreter: candidates reach the launcher and are checked."""
    import fastlm
    from fastlm.kernels import configs, norm

    monkeypatch.syspath_prepend(str(SCRIPTS))
    tune = load("tune")
    monkeypatch.setattr(timing, "_MAX_SAMPLES", 2)
    case = norm_case()
    case.providers["fastlm-triton"] = lambda **x: fastlm.layer_norm(**x, impl="triton")
    del case.providers["fastlm-torch"]
    original, seen = norm.norm_config, []

    def choose(original, config):
        return lambda *call: seen.append(config) or config

    candidates = [configs.NormConfig(8, 64, 4), configs.NormConfig(4, 64, 4)]
    best = tune.sweep(case, "forward", "norm", "norm_config", choose, candidates)
    assert {result.config for result in best} == set(candidates) == set(seen)
    assert [r.median_ms for r in best] == sorted(r.median_ms for r in best)
    assert norm.norm_config is original
    assert all(c.block_m * c.block_n <= 16384 for c in tune.row_candidates(4096))
    assert len(list(tune.attention_candidates())) > 50
