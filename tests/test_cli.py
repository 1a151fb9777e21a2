"""The `fastlm` command: help, errors, doctor, eval, generate, demo."""

import base64
import contextlib
import inspect
import io
import re
import subprocess
import sys

import cuda_gate
import pytest
import torch

import fastlm
from fastlm import cuda_library
from fastlm.cli import COMMANDS, UserError, main
from fastlm.cli import demo as demo_module
from fastlm.cli import doctor as doctor_module
from fastlm.cli._progress import Progress
from fastlm.cli._report import render
from fastlm.cli._samples import sample_calls
from fastlm.cli.generate import continue_bytes
from fastlm.models import DecoderLM, TransformerConfig
from fastlm.training.data import SEPARATOR

CPU = torch.device("cpu")


# Parsing and errors


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    out = capsys.readouterr().out
    module = sys.modules[f"fastlm.cli.{command.replace('-', '_')}"]
    assert exit.value.code == 0
    assert out.startswith(f"usage: fastlm {command}")
    assert module.__doc__.strip() in out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command}" in out for command in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fastlm {fastlm.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train", "--stesp", "3"],
        ["bench", "--op", "nrom"],
        ["train", "--steps", "x"],
    ],
)
def test_bad_usage_ends_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.startswith("fastlm") and ": error: " in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("two\nlines"), "fastlm doctor: error: two lines\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            "fastlm doctor: error: No such file or directory: x\n",
        ),
        (OSError(28, "No space left on device"), "fastlm doctor: error: No space left on device\n"),
    ],
)
def test_users_errors_end_with_one_line(error, line, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(doctor_module, "run", run)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == line


def test_a_bug_is_not_hidden(monkeypatch):
    def run(args):
        raise AssertionError("bug")

    monkeypatch.setattr(doctor_module, "run", run)
    with pytest.raises(AssertionError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "--device gpu: "), ("meta", "--device must be cpu or cuda, got meta")],
)
def test_device_that_does_not_exist(device, message, capsys):
    assert main(["doctor", "--device", device]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastlm doctor: error: {message}") and err.count("\n") == 1


def test_output_that_nobody_reads_is_no_error():
    """As in `fastlm doctor | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fastlm", "doctor"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


# doctor


def test_sample_calls_cover_every_operator():
    assert sorted(sample_calls(CPU)) == sorted(doctor_module.operators())
    for name, make in sample_calls(CPU).items():
        args, kwargs = make()
        out = getattr(fastlm, name)(*args, **kwargs)
        assert torch.isfinite(out).all(), name


def test_doctor_says_how_to_build_the_cuda_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "_loaded", {})
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "libfastlm_cuda.so")
    command = "(from a checkout: FASTLM_BUILD_CUDA=1 pip install --no-deps .)"
    assert dict(doctor_module.machine())["cuda library"] == f"not built {command}"
    cuda_library._loaded.clear()
    cuda_library.PATH.write_text("not a library")
    says = dict(doctor_module.machine())["cuda library"]
    assert says.startswith("does not load: ") and says.endswith(command)


@pytest.mark.parametrize("version", ["11.8", "12.3", "12.4", "13.5", "14.0"])
def test_doctor_says_which_nvcc_is_not_supported(version, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    builder = cuda_gate.builder()
    takes = builder.OLDEST_CUDA <= tuple(map(int, version.split("."))) < builder.FIRST_UNKNOWN_CUDA
    install = doctor_module._INSTALL_NVCC
    refusal = f", not supported: the CUDA C++ kernels are built by 12.4 to 13 ({install})"
    expected = f"{version} at {nvcc}{'' if takes else refusal}"
    assert dict(doctor_module.machine())["nvcc"] == expected
    assert builder.INSTALL_NVCC.startswith("install the CUDA toolkit, 12.4 to 13")
    assert install in builder.INSTALL_NVCC


@pytest.mark.parametrize("where", ["CUDA_HOME", "CUDA_PATH", "PATH", "site-packages", None])
def test_doctor_finds_the_nvcc_of_a_build(where, monkeypatch, tmp_path):
    builder = cuda_gate.builder()
    for name in ("CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    nvcc = tmp_path / ("nvidia/cu13" if where == "site-packages" else "") / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 13.0")
    nvcc.chmod(0o755)
    usual = builder.Path("/usr/local/cuda/bin/nvcc").exists()  # of this machine
    if where == "site-packages":
        monkeypatch.setattr(doctor_module.sysconfig, "get_path", lambda name: str(tmp_path))
    elif where is not None:
        monkeypatch.setenv(where, str(nvcc.parent if where == "PATH" else tmp_path))
    said = dict(doctor_module.machine())["nvcc"]
    if where is None and not usual:
        assert said.endswith(f"or {doctor_module._INSTALL_NVCC}")
    elif usual and where in (None, "site-packages"):
        assert said.endswith("/usr/local/cuda/bin/nvcc")
    else:
        assert said == f"13.0 at {nvcc}"
    with contextlib.suppress(builder.BuildError):
        assert said.endswith(str(builder._find_nvcc(builder.os.environ)))


def test_doctor_says_why_for_every_operator(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "triton", "nvcc", "gpu"):
        assert re.search(rf"^{name}\s+\S", out, re.MULTILINE), name
    for name, chosen, notes in doctor_module.backends(CPU):
        assert re.search(rf"^  {name}\s+{chosen}$", out, re.MULTILINE)
        assert chosen == "torch" and len(notes) == 2
        assert all(len(note.split(": ", 1)[1]) > 10 for note in notes)


# generate


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DecoderLM(TransformerConfig(embed_dim=16, num_heads=2, num_layers=1, max_seqlen=16))


def test_generation_goes_past_the_context(model):
    seen = []
    original = model.hidden
    model.hidden = lambda ids, cache=None: seen.append(ids.shape[1]) or original(ids, cache=cache)
    try:
        out = list(continue_bytes(model, b"0123456789" * 3, 50, {"seed": 1}))
    finally:
        del model.hidden
    assert 1 <= len(out) <= 50 and SEPARATOR not in out
    assert seen[0] == 8  # the second half of the context
    assert max(seen) <= 16


def test_generation_ends_with_the_file(model):
    wanted = iter([ord("a"), ord("b"), SEPARATOR, ord("c")])
    original = model.head
    model.head = lambda x: torch.nn.functional.one_hot(torch.tensor([next(wanted)]), 256).float()
    try:
        assert list(continue_bytes(model, b"x", 50, {"greedy": True})) == [ord("a"), ord("b")]
    finally:
        model.head = original


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A checkpoint of two tiny steps."""
    folder = tmp_path_factory.mktemp("cli")
    for i in range(41):
        (folder / f"module_{i}.py").write_text(f"value = {i}\n" * 30)
    out = folder / "run"
    code = main(
        ["train", "--data", str(folder), "--out", str(out), "--steps", "2", "--dim", "16",
         "--layers", "1", "--heads", "2", "--context", "16", "--eval-bytes", "64"]
    )  # fmt: skip
    assert code == 0
    return out


def test_generate_command(run_folder, capsys):
    arguments = ["generate", str(run_folder), "--prompt", "value", "--bytes", "30"]
    outs = []
    for more in ([], [], ["--seed", "1"], ["--greedy"], ["--top-k", "5", "--top-p", "0.9"]):
        assert main([*arguments, *more]) == 0
        outs.append(capsys.readouterr().out)
    assert all(out.startswith("value") and out.endswith("\n") for out in outs)
    assert outs[0] == outs[1] != outs[2]


def test_generate_writes_what_the_terminal_can_show(run_folder, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["generate", str(run_folder), "--prompt", "grüße", "--bytes", "40"]) == 0
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"gr??e")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--temperature", "0"], "--temperature must be above 0 and finite, got 0.0"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_generate_refuses(option, message, run_folder, capsys):
    assert main(["generate", str(run_folder), *option]) == 2
    assert capsys.readouterr().err == f"fastlm generate: error: {message}\n"


# eval


def test_eval_command(run_folder, capsys):
    assert main(["eval", str(run_folder), "--bytes", "0"]) == 0
    out = capsys.readouterr().out
    bits, perplexity = map(float, re.search(r"^model +(\S+) +(\S+)$", out, re.MULTILINE).groups())
    assert 0 < bits < 9 and perplexity == pytest.approx(2**bits, rel=1e-3)
    assert "byte bigram" in out and "checkpoint of step 2" in out


def test_eval_of_other_text(run_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("value = 1\n" * 20)
    assert main(["eval", str(run_folder), "--data", str(tmp_path), "--bytes", "0"]) == 0
    assert "192 bytes predicted" in capsys.readouterr().out  # 201 with the end, in windows of 16
    assert main(["eval", str(run_folder), "--data", str(tmp_path / "none")]) == 2


# Progress


def test_progress_prints_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("fastlm.cli._progress._SECONDS_BETWEEN_LINES", 0.0)
    with Progress("step", 4, done=2) as progress:
        progress.update(3, "a note")
        progress.log("a line")
        progress.update(4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 3/4  a note  0:0") and lines[1] == "a line"
    assert lines[2].startswith("step 4/4") and lines[2].endswith("0:00 left")


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("step", 4) as progress:
        progress.update(3, "a note")
        progress.log("a line")
    text = terminal.getvalue()
    assert "3/4" in text and "a note" in text and "a line" in text


# demo


def fake_step(outcomes):
    """Stands for `run_step`: writes the files that the command would write."""

    def run(arguments, folder):
        name = arguments[0]
        files = {"train": ("checkpoint", "loss curve", "loss plot"),
                 "bench": ("benchmark table", "benchmark plot")}.get(name, ())  # fmt: skip
        for file in files:
            path = folder / demo_module.FILES[file]
            path.parent.mkdir(exist_ok=True)
            path.write_text("")
        if name == "bench":
            from fastlm.bench.results import append_csv

            append_csv(folder / demo_module.FILES["benchmark table"], [])
        return demo_module.Step(arguments, f"output of <{name}>", outcomes.get(name, 0), 1.0)

    return run


def test_demo_runs_every_command_and_names_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "run_step", fake_step({}))
    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    ran = re.findall(r"^=== \d/6  fastlm (\S+)", out, re.MULTILINE)
    assert ran == [name for name in COMMANDS if name != "demo" and name != "bench"] + ["bench"]
    for file in (*demo_module.FILES.values(), demo_module.REPORT):
        assert str(tmp_path / file) in out and (tmp_path / file).exists()
    page = (tmp_path / demo_module.REPORT).read_text()
    assert all(f"output of &lt;{name}&gt;" in page for name in ran)


def test_demo_goes_on_where_a_step_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "run_step", fake_step({"train": 2, "swap-check": 1}))
    assert main(["demo", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("left out: there is no checkpoint") == 2
    assert captured.err == (
        "fastlm demo: these did not succeed: train, eval, generate, swap-check\n"
    )
    assert "exit code 1" in (tmp_path / demo_module.REPORT).read_text()


def test_demo_commands_are_commands():
    for arguments in demo_module.commands(steps=7):
        assert arguments[0] in COMMANDS
    assert ("--steps", "7") == demo_module.commands(steps=7)[1][-2:]


def test_demo_step_is_a_process_of_its_own(tmp_path, capfdbinary):
    """It runs in the folder, its output is shown and kept, its exit code is known."""
    step = demo_module.run_step(("eval", "no-such-run"), tmp_path)
    assert (step.code, step.output) == (2, "")
    assert b"error: no checkpoint at no-such-run\n" in capfdbinary.readouterr().err


def test_report_needs_no_other_file(tmp_path):
    png = tmp_path / "loss.png"
    png.write_bytes(b"\x89PNG data")
    page = render([("train", "train --out train", "a < b", "ok")], {"loss plot": png}, 61.0)
    assert base64.b64encode(b"\x89PNG data").decode() in page
    assert "a &lt; b" in page and "61 seconds" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("<pre>") == page.count("</pre>") == 1


def test_commands_follow_the_same_form():
    for command in COMMANDS:
        module = sys.modules.get(f"fastlm.cli.{command.replace('-', '_')}")
        if module is not None:
            assert list(inspect.signature(module.add_arguments).parameters) == ["parser"]
            assert list(inspect.signature(module.run).parameters) == ["args"]
