"""The benchmark harness: what it refuses to time, what it counts, what it writes."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm import shapes
from fastlm.bench import machine, results, timing
from fastlm.bench.cases import CASES, Work, attention_case
from fastlm.bench.check import Oracle
from fastlm.bench.run import directions_of, run_case
from fastlm.cli import main
from fastlm.errors import UserError

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small shapes in place of those for the CPU, and ceilings that cost nothing."""
    tables = {
        "NORM_CPU": {"small": shapes.NormShape(16, 48)},
        "FFN_CPU": {"small": shapes.FfnShape(8, 16, 32)},
        "LOSS_CPU": {"small": shapes.LossShape(12, 40, 16)},
        "ATTENTION_CPU": {"small": shapes.AttentionShape(2, 12, 20, 4, 2, 16)},
    }
    for name, table in tables.items():
        monkeypatch.setattr(shapes, name, table)
    monkeypatch.setattr("fastlm.bench.run.ceilings", lambda *_: machine.Ceilings(1.0, 100.0))
    monkeypatch.setattr(timing, "_MAX_SAMPLES", 5)


def norm_case():
    return next(CASES["norm"](CPU, torch.float32, True))


def run_quickly(case, **options):
    failed = {}
    rows = run_case(
        case, seconds=0.0, failed=lambda provider, why: failed.update({provider: why}), **options
    )
    return rows, failed


# The check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [op for op in CASES if op != "embedding"])
def test_every_case_passes_and_is_timed(op, dtype):
    cases = list(CASES[op](CPU, dtype, False))
    assert len({case.shape for case in cases}) == len(cases)
    for case in cases:
        rows, failed = run_quickly(case)
        assert failed == {}
        assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
        assert {row.direction for row in rows} == {"forward", "forward+backward"}
        assert all(row.p20_ms <= row.median_ms <= row.p80_ms for row in rows)
        assert all(row.speedup == 1.0 for row in rows if row.provider == "torch")
        assert "fastlm-triton" in case.unavailable


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


def test_oracle_compares_a_part_of_the_call():
    """For long sequences gold covers some heads alone; an error in them is seen."""
    shape = shapes.AttentionShape(2, 8, 8, 4, 2, 16)
    for variant in ("full", "causal", "padding", "bias"):
        case = attention_case("part", shape, variant, CPU, torch.float32)
        whole = replace(case, parts={})
        verdicts = [Oracle(c).judge(case.providers["torch"]) for c in (case, whole)]
        assert all(verdict.passes(None) for verdict in verdicts)
        assert verdicts[0].errors["q"].error <= verdicts[1].errors["q"].error
        # Of the bias gradient, the part is exact although it is a sum over the batch.
        assert set(verdicts[0].errors) == {"out", *(set(case.tensors) - {"seqlens_k"})}


# What is counted


def test_work_of_attention_is_flash_attentions():
    shape = shapes.AttentionShape(2, 8, 8, 4, 2, 16)
    flops = 4 * 2 * 4 * 8 * 8 * 16
    case = attention_case("a", shape, "full", CPU, torch.float32)
    assert case.work == Work("TFLOP/s", flops, 2.5 * flops)
    assert case.work.of("forward+backward") == 3.5 * flops
    assert attention_case("a", shape, "causal", CPU, torch.float32).work.forward == flops / 2
    padded = attention_case("a", shape, "padding", CPU, torch.float32)
    assert padded.tensors["seqlens_k"].tolist() == [2, 8]
    assert padded.work.forward == flops * 5 / 8


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
        "op", "shape", "dtype", "pass", "provider", "median_ms", "p20_ms", "p80_ms", "rate", "unit",
        "of_ceiling", "max_error", "device", "driver", "torch", "triton", "commit",
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
        "provider", "ms", "p20-p80", "vs", "torch", "GB/s", "of", "ceiling", "max", "error", "of",
        "bound",
    ]  # fmt: skip
    cells = ours.split()
    assert cells[0] == "fastlm-torch" and cells[3].endswith("x") and float(cells[7]) <= 1


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


# The scripts


@pytest.mark.parametrize("op", list(CASES))
def test_scripts_name_peers_that_are_installed(op, monkeypatch):
    """Every script imports, and its peers say that they are missing or make a function."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, shared = load(op), load("_bench")
    for case in CASES[op](CPU, torch.float32, True):
        missing = set()
        more = shared.with_peers(case, script.PEERS, None, missing)
        named = set(more.providers) | {text.split(" (")[0] for text in missing}
        assert "torch.compile" in more.providers
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
    assert len(results.read_csv(csv)) == 3 * 3 * 2


def test_tune_prints_what_is_fastest_and_restores(monkeypatch):
    """The sweep itself, on the interpreter: candidates reach the launcher and are checked."""
    import fastlm
    from fastlm.kernels import norm

    monkeypatch.syspath_prepend(str(SCRIPTS))
    tune = load("tune")
    monkeypatch.setattr(timing, "_MAX_SAMPLES", 2)
    case = norm_case()
    case.providers["fastlm-triton"] = lambda **x: fastlm.layer_norm(**x, impl="triton")
    del case.providers["fastlm-torch"]
    original, seen = norm.row_config, []

    def choose(original, config):
        return lambda cols: seen.append(config) or config

    candidates = [tune.RowConfig(8, 64, 4), tune.RowConfig(4, 64, 4)]
    best = tune.sweep(case, "forward", "norm", "row_config", choose, candidates)
    assert {result.config for result in best} == set(candidates) == set(seen)
    assert [r.median_ms for r in best] == sorted(r.median_ms for r in best)
    assert norm.row_config is original
    assert all(c.block_m * c.block_n <= 16384 for c in tune.row_candidates(4096))
    assert len(list(tune.attention_candidates())) > 50


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
