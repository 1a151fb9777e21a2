"""benchmarks/tuning: sweeps on small shapes in the interpreter, and what becomes of their picks."""

import itertools
import json
import sys
import threading
from argparse import Namespace
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benching import CPU, SCRIPTS, load, small_shapes  # noqa: F401

import fastlm.bench.case
from fastlm import shapes
from fastlm.kernels import configs, ffn_matmul, linear_loss, norm, norm_bwd

PARTS = ["up", "gated_up", "down", "gated_down"]
F16 = torch.float16


@pytest.fixture
def tuning(monkeypatch):
    """benchmarks/tune.py with its package; the interpreter takes one launch at once."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    tune = load("tune")
    import tuning.common

    monkeypatch.setattr(tuning.common.os, "cpu_count", lambda: 1)
    monkeypatch.setattr("fastlm.bench.timing._MAX_SAMPLES", 2)
    return tune


def times(monkeypatch, of):
    """Times that the test decides, in place of those of the clock."""
    import tuning.common

    def fake(calls, config, *_):
        for call in calls:
            call.run(config)
        return tuple(of(config) for _ in calls)

    monkeypatch.setattr(tuning.common, "_times", fake)


@pytest.mark.parametrize("part", PARTS)
def test_ffn_product_is_picked(part, tuning, monkeypatch, capsys):
    ffn, picks = sys.modules["tuning.ffn"], sys.modules["tuning.common"].Picks()
    good = configs.EpilogueConfig(16, 16, 16, 4, 1)
    wrong = configs.EpilogueConfig(16, 24, 16, 4, 1)  # no power of two
    monkeypatch.setattr(ffn, "matmul_candidates", lambda *_: [good, wrong])
    times(monkeypatch, lambda config: 1.0 if config == good else 2.0)
    args = Namespace(part=[part], dim=[8], tokens=[20])
    chosen = ffn.tune_products(args, CPU, F16, picks, tuning.Budget(600))
    assert chosen == {part: good}
    (pick,) = picks.picks
    assert (pick.table, pick.path) == ("_EPILOGUE", ["cpu", part])
    assert configs.EpilogueConfig(*pick.value) == good
    out = capsys.readouterr()
    assert out.err.count("left out") == 1 and "0.500  1.0000 ms" in out.out
    assert ffn_matmul.epilogue_config is configs.epilogue_config


def check_sees_each_result(call, config, name, monkeypatch):
    """`call.check` passes what is right, and none of its results 1 % off."""
    call.check(config)
    right = call.run(config)
    for i in range(len(right)):
        wrong = [t * 1.01 if i == j else t for j, t in enumerate(right)]
        monkeypatch.setattr(call, "run", lambda config, wrong=wrong: wrong)
        with pytest.raises(AssertionError, match=f"{name} {i}: error"):
            call.check(config)


def test_ffn_product_is_checked(tuning, monkeypatch):
    ffn = sys.modules["tuning.ffn"]
    for part in PARTS:
        call, config = ffn.FfnCall(part, 20, 8, CPU, F16), None
        check_sees_each_result(call, config, part, monkeypatch)


def test_ffn_draws_what_it_multiplies(tuning, monkeypatch):
    ffn, drawn = sys.modules["tuning.ffn"], []
    randn = ffn.randn
    monkeypatch.setattr(ffn, "randn", lambda *s, **kw: drawn.append(s) or randn(*s, **kw))
    x, hidden, up, down, bias = (20, 8), (20, 32), (32, 8), (8, 32), (32,)
    gated_hidden, gated_up, gated_down = (20, 256), (256, 8), (8, 256)
    for part, shapes_of in (
        ("up", {x, up, bias}), ("down", {x, bias, down, hidden}),
        ("gated_up", {x, gated_up}), ("gated_down", {x, gated_down, gated_hidden}),
    ):  # fmt: skip
        ffn.FfnCall(part, 20, 8, CPU, F16).check(None)
        assert set(drawn) == shapes_of
        assert len(drawn) == len(shapes_of) + part.startswith("gated")
        drawn.clear()


@pytest.mark.parametrize("name", ["ffn", "norm", "linear_loss"])
def test_inputs_are_drawn_on_the_device(name, tuning):
    assert sys.modules[f"tuning.{name}"].randn is fastlm.bench.case.randn


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("part", PARTS)
def test_ffn_tries_a_few_dozen_configurations(part, name, tuning):
    candidates = list(sys.modules["tuning.ffn"].matmul_candidates(part, name))
    assert len(set(candidates)) == len(candidates) == 30
    assert all(c.tma == (name == "sm_90") for c in candidates)


@pytest.mark.parametrize("wins, rows", [
    ((8, 16, 32), [[24, 0, 32, "epilogue"]]), ((8, 32), [[24, 0, 8, "epilogue"]]), ((32,), []),
])  # fmt: skip
def test_ffn_ways_hold_up_to_the_widest_that_gains(wins, rows, tuning, monkeypatch):
    ffn, picks = sys.modules["tuning.ffn"], sys.modules["tuning.common"].Picks()
    timed = lambda op, tokens, dim, *_: (1.0, 0.5 if op == "ffn" and dim in wins else 1.0)
    monkeypatch.setattr(ffn, "time_ways", timed)
    args = Namespace(dim=[16, 32, 8], tokens=[24])
    ffn.tune_ways(args, CPU, F16, picks, tuning.Budget(600))
    assert [(p.table, p.path, p.value) for p in picks.picks] == [
        ("_FFN_WAYS", [["cpu", "ffn", True]], rows)
    ] * bool(rows)
    monkeypatch.setattr(configs, "_FFN_WAYS", {("cpu", "ffn", True): tuple(map(tuple, rows))})
    assert configs.ffn_way("cpu", "ffn", True, 24, 8, 32) == ("epilogue" if rows else "cublas")


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_ffn_ways_are_timed_with_the_kernels_that_calls_run(op, cuda, tuning, monkeypatch):
    ffn, asked = sys.modules["tuning.ffn"], []

    def by(way, *args, impl, **options):
        asked.append((way, impl))
        raise NotImplementedError("not run")

    def make(original, *args):
        case = original(*args)
        case.providers.update({"fastlm-cuda": None} if cuda else {})
        return case

    for name in ("ffn_case", "gated_case"):
        monkeypatch.setattr(ffn, name, partial(make, getattr(ffn, name)))
    for name in ("ffn_by", "gated_ffn_by"):
        monkeypatch.setattr(ffn, name, by)
    assert ffn.time_ways(op, 8, 8, CPU, F16) == (float("inf"), float("inf"))
    assert dict(asked) == {
        "epilogue": "triton", "cublas": "cuda" if cuda and op == "ffn" else "triton",
    }  # fmt: skip


def test_ffn_ways_that_fail_are_no_pick(tuning, monkeypatch):
    ffn, picks = sys.modules["tuning.ffn"], sys.modules["tuning.common"].Picks()
    args = Namespace(dim=[8], tokens=[24])
    for times_ms in ((float("inf"), float("inf")), (float("inf"), 1.0), (1.0, float("inf"))):
        monkeypatch.setattr(ffn, "time_ways", lambda *_, times_ms=times_ms: times_ms)
        ffn.tune_ways(args, CPU, F16, picks, tuning.Budget(600))
    assert picks.picks == []


def test_ffn_ways_of_many_tokens_are_not_those_of_few(tuning, monkeypatch):
    ffn, picks = sys.modules["tuning.ffn"], sys.modules["tuning.common"].Picks()
    wins = {(24, 8), (6, 8), (6, 16), (6, 32)}
    timed = lambda op, tokens, dim, *_: (1.0, 0.5 if op == "ffn" and (tokens, dim) in wins else 1.0)
    monkeypatch.setattr(ffn, "time_ways", timed)
    args = Namespace(dim=[8, 16, 32], tokens=[6, 24, 3])
    ffn.tune_ways(args, CPU, F16, picks, tuning.Budget(600))
    (pick,) = picks.picks
    rows = tuple(map(tuple, pick.value))
    monkeypatch.setattr(configs, "_FFN_WAYS", {("cpu", "ffn", True): rows})
    for tokens, dim in itertools.product((3, 6, 24), (8, 16, 32)):
        way = configs.ffn_way("cpu", "ffn", True, tokens, dim, 4 * dim)
        assert way == ("epilogue" if (tokens, dim) in wins else "cublas")
    assert rows[-1] == (6, 0, 32, "epilogue")


@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_ffn_ways_are_timed(op, tuning, monkeypatch):
    ffn = sys.modules["tuning.ffn"]
    monkeypatch.setattr(ffn, "hidden_dim", lambda dim, gated: 2 * dim)
    library, own = ffn.time_ways(op, 8, 8, CPU, F16)
    assert 0 < library < float("inf") and 0 < own < float("inf")


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_norm_is_picked(which, tuning, monkeypatch, tmp_path):
    module, common = sys.modules["tuning.norm"], sys.modules["tuning.common"]
    picks = common.Picks(tmp_path / "picks.json")
    monkeypatch.setattr(module, "PASSES", (which,))
    good = configs.NormConfig(4, 64, 4, 1, 2)
    monkeypatch.setattr(module, "candidates", lambda *_: [good, replace(good, block_m=3)])
    times(monkeypatch, lambda config: 1.0 if config == good else 2.0)
    module.tune(Namespace(cols=None), CPU, F16, picks, tuning.Budget(600))
    (pick,) = json.loads(picks.file.read_text())
    assert (pick["table"], pick["path"]) == ("_NORM", [["cpu", which, 2, 64]])
    assert configs.NormConfig(*pick["value"]) == good
    assert norm.norm_config is norm_bwd.norm_config is configs.norm_config
    monkeypatch.setattr(configs, "_NORM", {("cpu", which, 2, 64): tuple(pick["value"])})
    assert configs.norm_config.__wrapped__(which, 48, 2, True, True, CPU) == good


def test_norm_that_is_not_faster_is_no_pick(tuning, monkeypatch):
    module, picks = sys.modules["tuning.norm"], sys.modules["tuning.common"].Picks()
    monkeypatch.setattr(module, "candidates", lambda *_: [configs.NormConfig(4, 64, 4)])
    times(monkeypatch, lambda config: 1.0)
    module.tune(Namespace(cols=[48]), CPU, F16, picks, tuning.Budget(600))
    assert picks.picks == []


def test_norm_is_checked(tuning, monkeypatch):
    module = sys.modules["tuning.norm"]
    for which in module.PASSES:
        call = module.NormCall(which, shapes.NormShape(6, 40), CPU, F16)
        check_sees_each_result(call, None, which, monkeypatch)


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_norm_candidates(which, tuning):
    """Of every width some, none twice, of at most 1,024 threads; a tile has several rows only where
    it has them whole."""
    for s in shapes.NORM_LARGE.values():
        found = list(sys.modules["tuning.norm"].candidates(which, s.cols, 2))
        assert 8 <= len(found) <= 60 and len(set(found)) == len(found)
        assert all(c.num_warps in (1, 2, 4, 8, 16, 32) for c in found)
        assert all(c.block_m == 1 or c.block_n >= s.cols for c in found)


@pytest.mark.parametrize("which", ["logits", "dx", "dweight"])
def test_product_of_the_linear_loss_is_picked(which, tuning, monkeypatch):
    module, picks = sys.modules["tuning.linear_loss"], sys.modules["tuning.common"].Picks()
    monkeypatch.setattr(module, "PRODUCTS", (which,))
    good = configs.MatmulConfig(32, 32, 16, 4, 1, 1, True)
    monkeypatch.setattr(module, "candidates", lambda *_: [good])
    times(monkeypatch, lambda config: 1.0 if config == good else 2.0)
    module.tune(Namespace(shape=["small"]), CPU, F16, picks, tuning.Budget(600))
    (pick,) = picks.picks
    assert (pick.table, pick.path) == ("_MATMUL", [["cpu", "half"], which])
    assert configs.MatmulConfig(*pick.value) == good


def test_product_of_the_linear_loss_is_checked(tuning, monkeypatch):
    module = sys.modules["tuning.linear_loss"]
    for which in module.PRODUCTS:
        call = module.ProductCall(which, shapes.LossShape(40, 50, 24), CPU, F16)
        config = configs.matmul_config(which, CPU, F16)
        call.check(config)
        right = call.run(config)
        monkeypatch.setattr(call, "run", lambda config, wrong=right * 1.02: wrong)
        with pytest.raises(AssertionError, match=f"{which}: error"):
            call.check(config)
        assert call.library().shape == right.shape[-2:]


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
def test_linear_loss_tries_some_configurations(name, tuning):
    found = list(sys.modules["tuning.linear_loss"].candidates("dx", name))
    assert len(set(found)) == len(found) > 10
    assert all(c.tma == (name in configs.TMA) for c in found)


class Tried:
    """A call that only tells what it was asked for. `takes`: what a launch adds to the clock."""

    name = "tried"

    def __init__(self, clock=None, takes=0.0, fails=()):
        self.clock, self.takes, self.fails = clock, takes, fails
        self.ran, self.finished, self.threads = [], [], set()

    def run(self, config):
        self.ran.append(config)
        self.threads.add(threading.get_ident())
        if self.clock is not None:
            self.clock.append(self.clock[-1] + self.takes)

    def finish(self, config):
        self.finished.append(config)
        if config in self.fails:
            raise RuntimeError("no room for dropout")

    def check(self, config):
        pass


@pytest.fixture
def clock(tuning, monkeypatch):
    """The time of budgets: the last of these."""
    import tuning.common

    times = [0.0]
    fake = SimpleNamespace(monotonic=lambda: times[-1])
    monkeypatch.setattr(tuning.common, "time", fake)
    return times


def test_what_the_first_call_compiled_is_tried_by_all(tuning, clock, monkeypatch, capsys):
    common, calls = sys.modules["tuning.common"], [Tried(clock, 1.0), Tried()]
    monkeypatch.setattr(common, "_times", lambda calls, config, *_: (1.0, ord(config)))
    found = common.fastest(calls, "a", "bcd", CPU, tuning.Budget(4))  # two seconds to compile
    assert [result.config for result in found] == ["a", "b"]
    assert [call.ran for call in calls] == [["a", "b"], ["a", "b"]]
    assert capsys.readouterr().err.count(": no time left to compile") == 2


def test_what_is_left_out_at_the_end_is_told(tuning, clock, monkeypatch, capsys):
    """The fastest is finished whatever the time, others while there is some."""
    common, call = sys.modules["tuning.common"], Tried(fails="b")

    def timed(calls, config, *_):
        clock.append(clock[-1] + 1)
        return (float("bca".index(config)),)

    monkeypatch.setattr(common, "_times", timed)
    found = common.fastest([call], "a", "bc", CPU, tuning.Budget(3))
    assert call.finished == ["b"] and [result.config for result in found] == ["a"]
    said = capsys.readouterr().err
    assert "left out: b: no room for dropout" in said
    assert "left out: c: no time left to compile" in said
    call.finished.clear()
    assert common.fastest([call], "a", "bc", CPU, tuning.Budget(60))[0].config == "c"
    assert call.finished == ["b", "c", "a"]


def test_products_launch_nothing_to_finish(tuning, monkeypatch):
    """Kernels that are loaded already, from threads that have no part in it."""
    ffn, loss = sys.modules["tuning.ffn"], sys.modules["tuning.linear_loss"]
    calls = [ffn.FfnCall(part, 20, 8, CPU, F16) for part in PARTS]
    calls += [loss.ProductCall("dx", shapes.LossShape(40, 50, 24), CPU, F16)]
    for call in calls:
        call.expected = call.x = None  # nothing can be launched without
        assert call.finish(None) is None


def test_the_configuration_in_use_is_launched_before_any_thread_starts(tuning, monkeypatch):
    """What candidates share is compiled once, and each thread has the device's context."""
    common, call, entered = sys.modules["tuning.common"], Tried(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: entered.append(threading.get_ident())
    )
    run, here = call.run, threading.get_ident()
    orders = []
    monkeypatch.setattr(
        call, "run", lambda config: (orders.append((config, list(entered))), run(config))
    )
    device = torch.device("cuda", 1)
    assert common._launched([call], "run", ["a", "b", "c"], device, tuning.Budget(60)) == {}
    assert orders[0] == ("a", []) and sorted(call.ran) == ["a", "b", "c"]
    assert call.threads == {here, *entered} and here not in entered


def test_nothing_is_made_when_the_time_is_over(tuning, monkeypatch, capsys):
    ffn, norm, loss = (sys.modules[f"tuning.{name}"] for name in ("ffn", "norm", "linear_loss"))
    for module, name in ((ffn, "FfnCall"), (norm, "NormCall"), (loss, "ProductCall")):
        made = lambda *_, name=name: pytest.fail(f"{name} was made")
        monkeypatch.setattr(getattr(module, name), "__init__", made)
    args = Namespace(cols=None, shape=None, part=["up"], dim=[8], tokens=[24])
    picks = sys.modules["tuning.common"].Picks()
    for module in (ffn, norm, loss):
        module.tune(args, CPU, F16, picks, tuning.Budget(0))
    said = capsys.readouterr().out
    for what in ("ffn up", "ffn of 24x8", "norm, fwd, up to 64 columns", "linear loss, dweight"):
        assert f"no time left for {what}\n" in said
    assert picks.picks == []


def test_all_sweeps_share_the_time(tuning, monkeypatch, capsys):
    """One that fails leaves its time to the others."""
    seen = {}

    def run(name, args, device, dtype, picks, budget):
        seen[name] = budget.left
        if name == "norm":
            raise RuntimeError("no such thing")

    for name, (_, share) in tuning.SWEEPS.items():
        monkeypatch.setitem(tuning.SWEEPS, name, (partial(run, name), share))
    assert tuning.tune_picks(Namespace(kind="all", json=None, seconds=100.0), CPU, F16) == 1
    assert "norm ended early" in capsys.readouterr().err
    first, second, third = seen.values()
    assert [first, third] == pytest.approx([35, 100], abs=1) and first < second < third
    assert tuning.tune_picks(Namespace(kind="ffn", json=None, seconds=100.0), CPU, F16) == 0
    assert seen["ffn"] == pytest.approx(100, abs=1)


def test_nothing_is_picked_beside_a_configuration_that_fails(tuning, monkeypatch, capsys):
    module, picks = sys.modules["tuning.norm"], sys.modules["tuning.common"].Picks()
    monkeypatch.setattr(module, "PASSES", ("fwd",))
    monkeypatch.setattr(module, "candidates", lambda *_: [configs.NormConfig(4, 64, 4)])
    monkeypatch.setattr(module, "norm_config", lambda *_: configs.NormConfig(3, 64, 4))
    module.tune(Namespace(cols=None), CPU, F16, picks, tuning.Budget(600))
    assert picks.picks == [] and "what is in use does not pass" in capsys.readouterr().out


TABLES = """\
# Not timed.
_NORM: dict[tuple[str, int], tuple[int, ...]] = {}
_MATMUL = {
    ("sm_90", "half"): {
        "logits": (1, 2, 3),
        # NVIDIA H200, 2026-01-02: 5 TFLOP/s
        "dx": (
            1,
            2,
        ),
    },
}
AFTER = 1
"""


def test_picks_are_applied(tuning, tmp_path):
    """Entries are replaced or added where they belong, each under its note, and nothing else."""
    note = "NVIDIA H200, 2026-03-04: 6 TFLOP/s"
    made = [
        ("_NORM", [["sm_90", 64]], [4, 64]), ("_NORM", [["sm_90", 128]], [2, True]),
        ("_NORM", [["sm_90", 64]], [8, 64]),
        ("_MATMUL", [["sm_90", "half"], "dx"], [7, 8]),
        ("_MATMUL", [["sm_90", "half"], "logits"], [9]),
        ("_MATMUL", [["sm_100", "half"], "dx"], [["a", 1], [2]]),
    ]  # fmt: skip
    file = tmp_path / "tables.py"
    file.write_text(TABLES)
    picks = [dict(file="tables.py", table=t, path=p, value=v, note=note) for t, p, v in made]
    (tmp_path / "picks.json").write_text(json.dumps(picks))
    done = tuning.apply(tmp_path / "picks.json", tmp_path)
    assert len(done) == len(made) and done[0] == "tables.py: _NORM[('sm_90', 64)] = (4, 64)"
    text, tables = file.read_text(), {}
    exec(text, tables)
    assert tables["_NORM"] == {("sm_90", 128): (2, True), ("sm_90", 64): (8, 64)}
    assert tables["_MATMUL"] == {
        ("sm_100", "half"): {"dx": (("a", 1), (2,))},
        ("sm_90", "half"): {"logits": (9,), "dx": (7, 8)},
    }
    assert tables["AFTER"] == 1 and text.startswith("# Not timed.\n") and "2026-01-02" not in text
    assert text.count(f"# {note}\n") == 5


def test_real_tables_take_picks(tuning, tmp_path):
    root = Path(configs.__file__).resolve().parent
    text = (root / "configs.py").read_text()
    edited = sys.modules["tuning.apply"].edited
    new = tuple(astuple(configs.NormConfig(4, 1024, 4, 2, 3)))
    for table, path, value in (
        ("_NORM", (("sm_90", "fwd", 2, 1024),), new),
        ("_FFN_WAYS", (("sm_90", "ffn", True),), ((16384, 0, 1024, "epilogue"),)),
        ("_EPILOGUE", ("sm_90", "up"), (128, 128, 64, 8, 3, 4, 1, 8, True)),
        ("_MATMUL", (("sm_90", "half"), "dweight"), (128, 256, 64, 8, 4, 1, True)),
    ):
        text = edited(text, table, path, value, "a device, 2026-03-04: a rate")
    found = {"__name__": "fastlm.kernels.configs"}
    exec(compile(text, "configs.py", "exec"), found)
    assert found["_NORM"][("sm_90", "fwd", 2, 1024)] == new
    assert found["_EPILOGUE"]["sm_90"]["up"][3] == 8
    assert found["_MATMUL"]["sm_90", "half"]["dweight"][5:] == (1, True)
    assert found["ffn_way"]("sm_90", "ffn", True, 16384, 768, 3072) == "epilogue"
    assert linear_loss.matmul_config is configs.matmul_config
