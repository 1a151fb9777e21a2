"""Attention's benchmark: its cases, what they count, its peers, the sweep of its configurations."""

import itertools
import sys
from argparse import Namespace
from dataclasses import astuple, replace
from functools import partial

import pytest
import torch
from benching import CPU, SCRIPTS, load, run_quickly, small_shapes  # noqa: F401

from fastlm import shapes
from fastlm.bench import results, timing
from fastlm.bench.attention import VARIANTS, attention_case, attention_grid, visible_pairs
from fastlm.bench.case import Work
from fastlm.bench.check import Oracle
from fastlm.kernels import attention_configs, configs
from fastlm.testing import assert_close

GRID = [*VARIANTS, "weights", "weights_causal", "decode", "decode_ragged"]


@pytest.mark.parametrize("variant", GRID)
def test_every_variant_of_attention_passes_and_is_timed(variant):
    (case,) = (make() for name, make in attention_grid(CPU, torch.float32)
               if name == f"small/{variant}")  # fmt: skip
    rows, failed = run_quickly(case, directions=["forward", "backward"])
    assert failed == {}
    assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
    forward_only = variant.startswith(("decode", "weights"))
    assert len(rows) == (2 if forward_only else 4)
    assert all(row.of_bound <= 1 for row in rows)
    learned = {"bias", "table", "alibi_slopes", "sinks"} & set(case.tensors) - case.frozen
    assert learned <= set(Oracle(case).judge(case.providers["fastlm-torch"]).errors)


def test_grid_of_a_gpu_is_flash_attentions(monkeypatch):
    """Names alone: nothing of a GPU's size is made."""
    names = [name for name, _ in attention_grid(torch.device("cuda"), torch.bfloat16)]
    assert len(set(names)) == len(names)
    for variant in ("full", "causal", "dropout", "window_causal", "packed", "t5"):
        assert {name for name in names if name.endswith(f"/{variant}")} == {
            f"headdim_{headdim}_seqlen_{seqlen}/{variant}"
            for headdim in (64, 128, 256)
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
        }
    assert {name.split("/")[1] for name in names} == set(GRID)
    assert "headdim_64_seqlen_16384/bias" not in names  # 17 GB, and as much for its gradient


@pytest.mark.parametrize("name", ["bias", "table", "alibi_slopes", "sinks"])
def test_wrong_gradient_of_a_bias_is_told(name):
    variant = {"bias": "bias_causal", "table": "t5", "alibi_slopes": "alibi_window_gqa",
               "sinks": "softcap_sinks_padding_causal"}[name]  # fmt: skip
    case = attention_case("a", shapes.ATTENTION_CPU["small"], variant, CPU, torch.float32)
    right = case.providers["fastlm-torch"]

    def wrong(**tensors):
        x = tensors[name]
        return right(**tensors | {name: x * 1.01 - x.detach() * 0.01})

    verdict = Oracle(case).judge(wrong)
    assert [n for n, e in verdict.errors.items() if e.ratio > 1] == [name]


def test_dropout_is_checked_with_the_references_mask_for_fastlm_alone():
    """torch draws a mask of its own: it is checked without dropout, and timed with it."""
    case = attention_case("a", shapes.ATTENTION_CPU["small"], "dropout", CPU, torch.float32)
    right = case.providers["fastlm-torch"]
    another_mask = lambda seed, **x: right(seed=seed + 1, **x)
    case = replace(case, providers={**case.providers, "fastlm-other": another_mask})
    case.undropped.providers["fastlm-other"] = case.undropped.providers["fastlm-torch"]
    rows, failed = run_quickly(case, directions=["forward"])
    assert {row.provider for row in rows} == {"torch", "fastlm-torch"}
    assert list(failed) == ["fastlm-other"]
    q, k, v = (case.tensors[name] for name in "qkv")
    assert not torch.equal(case.dense.sdpa(q, k, v), case.dense.sdpa(q, k, v))
    assert torch.equal(case.undropped.dense.sdpa(q, k, v), case.undropped.dense.sdpa(q, k, v))


def test_oracle_compares_a_part_of_the_call():
    """For long sequences gold covers some heads alone; an error in them is seen."""
    shape = shapes.AttentionShape(2, 8, 8, 4, 2, 16)
    for variant in ("full", "causal", "padding", "bias", "t5", "packed"):
        case = attention_case("part", shape, variant, CPU, torch.float32)
        whole = replace(case, parts={})
        verdicts = [Oracle(c).judge(case.providers["torch"]) for c in (case, whole)]
        whole_numbers = {n for n, x in case.tensors.items() if not x.is_floating_point()}
        assert all(verdict.passes(None) for verdict in verdicts)
        assert verdicts[0].errors["q"].error <= verdicts[1].errors["q"].error
        # Of the bias gradient, the part is exact although it is a sum over the batch.
        assert set(verdicts[0].errors) == {"out", *(set(case.tensors) - whole_numbers)}


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


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(6, 6), (4, 9), (9, 4), (1, 7)])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("window", [None, (2, 1), (3, 0)])
def test_visible_pairs_are_those_of_the_reference(seqlen_q, seqlen_k, causal, window):
    """But where FlashAttention's formula for causal counts half of a square, and its diagonal."""
    from fastlm.reference.attention_mask import allowed_pairs, key_distances

    if causal and window is not None:
        window = (window[0], 0)
    pairs = visible_pairs(seqlen_q, seqlen_k, causal, window)
    distance = key_distances(seqlen_q, seqlen_k, causal, None, None, CPU)
    allowed = allowed_pairs(
        seqlen_q, seqlen_k, distance, causal, window, None, None, None, None, CPU
    )
    counted = seqlen_q * seqlen_k if allowed is None else allowed.sum().item()
    if causal is True and window is None and seqlen_q <= seqlen_k:
        assert pairs == seqlen_q * (2 * seqlen_k - seqlen_q) / 2 == counted - seqlen_q / 2
    elif causal is not True or window is not None:
        assert pairs == counted


def test_work_of_options_counts_what_is_visible():
    shape = shapes.AttentionShape(2, 64, 64, 4, 2, 16)
    packed = attention_case("a", shape, "packed", CPU, torch.float32)
    lengths = packed.tensors["cu_seqlens_q"].diff().tolist()
    assert sum(lengths) == 128 and max(lengths) <= 64 and len(set(lengths)) > 1
    assert packed.work.forward == 4 * 4 * 16 * sum(n * n for n in lengths)
    plain = attention_case("a", shape, "full", CPU, torch.float32).work
    for variant, fraction in (("bias", 1.0), ("dropout", 1.0), ("t5_causal", 0.5)):
        work = attention_case("a", shape, variant, CPU, torch.float32).work
        assert work.forward == fraction * plain.forward and work.backward == 2.5 * work.forward
    window = attention_case("a", shape, "window_causal", CPU, torch.float32)
    assert window.options["window"] == (16, 0)
    assert window.work.forward == 4 * 2 * 4 * 16 * (64 * 17 - 16 * 17 / 2)


def test_work_of_decoding_is_one_read_of_the_filled_cache():
    work = {name: make().work for name, make in attention_grid(CPU, torch.bfloat16)
            if "decode" in name}  # fmt: skip
    row = 2 * 2 * 16 * 2  # of keys and values: heads, head dim, bytes
    assert work["small/decode"] == Work("GB/s", 2 * 24 * row, 0.0)
    assert work["small/decode_ragged"] == Work("GB/s", (6 + 24) * row, 0.0)


def test_attention_script_measures_without_a_gpu(monkeypatch, tmp_path, capsys):
    """End to end, every kind of row; what cannot run here is refused by name, with the reason."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(timing, "_MIN_SAMPLES", 2)
    csv = tmp_path / "attention.csv"
    providers = ["fastlm-torch", "torch-eager", "torch-efficient", "flex", "flash-attn-2"]
    arguments = ["attention.py", "--csv", str(csv), "--provider", *providers]
    monkeypatch.setattr(sys, "argv", arguments)
    script = load("attention")
    grid = script.attention_grid
    assert script.main("attention", script.__doc__, script.PEERS, grid, seconds=0.0) == 0
    table = results.read_csv(csv)
    assert {row["shape"].split()[0] for row in table} == {f"small/{name}" for name in GRID}
    assert {row["provider"] for row in table} == {"torch", "fastlm-torch", "torch-eager"}
    assert {row["unit"] for row in table if "decode" in row["shape"]} == {"GB/s"}
    assert len(table) == 3 * (3 * len(VARIANTS) + 4)
    captured = capsys.readouterr()
    assert "  flex refused: differentiates on a GPU alone\n" in captured.out
    assert "  flex refused: has no dropout_p with this call\n" in captured.out
    assert "  torch-efficient refused: cannot: No viable backend" in captured.out
    assert "  torch-efficient refused: has no sinks, softcap with this call\n" in captured.out
    assert "fastlm-torch  vs torch-eager" in captured.out
    assert " of the time of causal" in captured.out
    assert captured.err.count("not installed: flash-attn-2") == 1

    monkeypatch.setattr(sys, "argv", [*arguments, "--shape", "/window", "causal"])
    script.main("attention", script.__doc__, script.PEERS, grid, seconds=0.0)
    more = results.read_csv(csv)[len(table) :]
    assert {row["shape"].split()[0] for row in more} == {"small/window_causal"}


@pytest.mark.parametrize("variant", [name for name in GRID if "weights" not in name])
@pytest.mark.parametrize("seqlen_q", [12, 20])
def test_flex_peer_is_right(variant, seqlen_q, monkeypatch):
    """Not compiled, forward: what of it runs on a CPU. A wrong peer would be refused on a GPU."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(
        shapes, "ATTENTION_CPU", {"small": shapes.AttentionShape(2, seqlen_q, 20, 4, 2, 16)}
    )
    script = load("attention")
    case = dict(attention_grid(CPU, torch.float32))[f"small/{variant}"]()
    case = case.undropped or case
    gold = case.reference(**case.part_of_inputs(torch.float64)).detach()
    same = case.reference(**case.part_of_inputs(None)).detach()
    out = case.cut("out", script.flex(case)(**case.tensors))
    assert_close("out", out, same, gold)


def test_nested_tensors_of_torch_take_packed_sequences(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    shape = shapes.AttentionShape(3, 16, 16, 4, 4, 16)
    case = attention_case("a", shape, "packed", CPU, torch.float32)
    verdict = Oracle(case).judge(load("attention")._nested(case))
    assert verdict.passes(None)


@pytest.mark.parametrize("kind", ["fwd", "dq", "dkv", "decode"])
def test_tune_sweeps_attention(kind, monkeypatch):
    """Each part's candidates reach its launcher, and no other part's."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    tune = load("tune")
    monkeypatch.setattr(timing, "_MAX_SAMPLES", 2)
    seen = set()
    options = attention_configs.AttentionConfig.options
    monkeypatch.setattr(
        attention_configs.AttentionConfig, "options", lambda self: seen.add(self) or options(self)
    )
    for name in ("attention_case", "decode_case"):
        monkeypatch.setattr(tune, name, partial(interpreted, getattr(tune, name)))
    wanted = [tune.AttentionConfig(16, 16, 4, 1), tune.AttentionConfig(32, 32, 4, 1)]
    monkeypatch.setattr(tune, "attention_candidates", lambda tma: wanted)
    monkeypatch.setattr(tune, "decode_candidates", lambda: [(32, 2, 1, 1), (32, 2, 1, 3)])
    args = Namespace(part=[kind], headdim=[512], seqlen=20, batch=1, variant="causal", group=2)
    if kind == "decode":
        lines = tune.tune_decode(args, CPU, torch.float32)
        assert {(c.block_n, c.num_warps) for c in seen} == {(32, 2)}
        assert sorted("(32, 2, 1, 3)" in line for line in lines) == [False, True]
    else:
        lines = tune.tune_attention(args, CPU, torch.float32)
        assert set(wanted) <= seen
        assert all(line.startswith(f"_ATTENTION_CPU['{kind}']: (") for line in lines)
    assert len(lines) == 2


@pytest.mark.parametrize("burden", [0, 3, 9])
@pytest.mark.parametrize("headdim", [20, 32, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_configurations_are_found_at_the_place_that_is_named(headdim, target, burden, monkeypatch):
    monkeypatch.setattr(configs, "target", lambda device: target)
    for part, dtype in itertools.product(("fwd", "dq", "dkv"), (torch.bfloat16, torch.float32)):
        call = (part, CPU, headdim, dtype, 8, burden)
        place, row = attention_configs.attention_row(*call)
        place, *halved = place.split(", halved")
        assert halved or eval(place, vars(attention_configs).copy()) == row
        tma = target == "sm_90" and dtype != torch.float32
        assert astuple(attention_configs.attention_config(*call)) == (*row, tma)


def interpreted(make, *call):
    """A case whose one provider is the Triton kernels, in the interpreter. The first head alone is
    compared, and so is enough."""
    name, s, *rest = call
    case = make(name, replace(s, batch=1, nheads=1, nheads_k=1), *rest)
    triton = partial(case.providers["fastlm-torch"].func, *case.providers["fastlm-torch"].args,
                     impl="triton")  # fmt: skip
    return replace(case, providers={"fastlm-triton": triton})
