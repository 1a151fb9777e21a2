"""Data, bigram, settings, checkpoints and the training command."""

import errno
import json
import math
import os
import resource
import signal

import pytest
import safetensors.torch
import torch

from fastlm.cli import main
from fastlm.errors import UserError
from fastlm.training.bigram import bigram_bits, fit_bigram
from fastlm.training.checkpoint import FILE_NAME, Checkpoint, write_atomically
from fastlm.training.curve import Curve, plot_curve, read_curve
from fastlm.training.data import (
    SEPARATOR,
    Windows,
    evaluation_windows,
    is_held_out,
    load_corpus,
)
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer, evaluate, model_state

CPU = torch.device("cpu")
TINY = {"dim": 16, "layers": 1, "heads": 2, "context": 16, "batch_size": 4, "warmup": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of text files, of which some are held out."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(45):
        lines = (f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(20))
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


def train(text, out, *options: str, steps=6) -> int:
    sizes = [w for k, v in TINY.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    resumes = "--resume" in options
    periods = ["--eval-every", "3", "--save-every", "3", "--eval-bytes", "256"]
    return main(
        ["train", "--out", str(out), *periods]
        + ([] if resumes else ["--data", str(text), "--steps", str(steps), "--dropout", "0.1"])
        + ([] if resumes else sizes)
        + list(options)
    )  # fmt: skip


def bytes_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


# Data


def test_split_is_stable():
    """The split is a function of the name alone: new versions must not move files across."""
    held_out = [i for i in range(40) if is_held_out(f"package/module_{i}.py")]
    assert held_out == [8, 21, 28, 29, 36, 37, 39]


def test_split_does_not_depend_on_the_other_files(text, tmp_path):
    whole = load_corpus([text])
    assert (whole.train_files, whole.held_out_files) == (41, 4)  # 20, 26, 40 and 41
    for i in (1, 2, 3, 20, 40):
        (tmp_path / f"module_{i}.py").write_bytes((text / f"module_{i}.py").read_bytes())
    few = load_corpus([tmp_path])
    assert (few.train_files, few.held_out_files) == (3, 2)
    assert bytes(few.held_out.tolist()) == b"".join(
        (text / f"module_{i}.py").read_bytes() + bytes([SEPARATOR]) for i in (20, 40)
    )


def test_corpus_takes_text_alone(tmp_path):
    (tmp_path / "text.txt").write_text("grüße\n" * 50)
    (tmp_path / "latin1.txt").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"abc\0def")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    corpus = load_corpus([tmp_path])
    assert (corpus.train_files, corpus.held_out_files, corpus.skipped_files) == (1, 0, 3)
    stream = torch.cat([corpus.train, corpus.held_out])
    assert bytes(stream.tolist()).decode() == "grüße\n" * 50 + "\0"
    assert len(corpus.held_out) == len(stream) // 10


def test_default_corpus_is_the_standard_library():
    corpus = load_corpus()
    assert corpus.train_files > 100 and corpus.held_out_files > 10
    assert 0.03 < len(corpus.held_out) / len(corpus.train) < 0.3
    assert corpus.fingerprint == load_corpus().fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing", "no such file or folder: {path}/missing"),
        (lambda path: path, "no readable text in {path}"),
        (lambda path: _binary(path), "no readable text in {path}/binary"),
    ],
)
def test_path_without_text_ends_with_one_line(make, message, tmp_path, capsys):
    code = main(["train", "--data", str(make(tmp_path)), "--out", str(tmp_path / "run")])
    assert code == 2
    line = f"fastlm train: error: {message.format(path=tmp_path)}\n"
    assert capsys.readouterr().err == line


def _binary(path):
    (path / "binary").write_bytes(bytes(range(256)))
    return path / "binary"


def test_windows_visit_everything_once_an_epoch():
    stream = torch.arange(200, dtype=torch.uint8)
    windows = Windows(stream, 16, seed=3)
    firsts = []
    for _ in range(windows.per_epoch):
        ids, targets = windows.next(1)
        assert torch.equal(ids[0, 1:], targets[0, :-1])
        assert torch.equal(ids[0], torch.arange(ids[0, 0].item(), ids[0, 0].item() + 16))
        firsts.append(ids[0, 0].item())
    assert sorted(firsts) == [min(firsts) + 16 * i for i in range(windows.per_epoch)]
    assert firsts != sorted(firsts)


def test_windows_continue_from_a_position():
    stream = torch.arange(200, dtype=torch.uint8)
    whole = Windows(stream, 16, seed=3).next(40)[0]  # more than three epochs
    windows = Windows(stream, 16, seed=3)
    parts = [windows.next(7)[0], windows.next(6)[0]]
    parts.append(Windows(stream, 16, seed=3, position=13).next(27)[0])
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(Windows(stream, 16, seed=4).next(40)[0], whole)


def test_windows_of_too_little_text():
    with pytest.raises(UserError, match="too little text: 20 bytes to train on"):
        Windows(torch.zeros(20, dtype=torch.uint8), 16, seed=0)


def test_evaluation_windows_predict_every_byte_once():
    stream = torch.arange(161, dtype=torch.uint8)
    ids, targets = evaluation_windows(stream, 16, None)
    assert targets.flatten().tolist() == list(range(1, 161))
    ids, targets = evaluation_windows(stream, 16, 64)
    assert targets.shape == (4, 16) and ids[:, 0].tolist() == [0, 32, 80, 112]
    assert evaluation_windows(stream[:9], 16, None)[0].shape == (1, 8)
    with pytest.raises(UserError, match="too little text to evaluate on: 1 bytes held out"):
        evaluation_windows(stream[:1], 16, None)


# The yardstick


def test_bigram_is_a_distribution_and_learns():
    stream = bytes_of("abacabadabacabae" * 20)
    log2p = fit_bigram(stream)
    torch.testing.assert_close(log2p.exp2().sum(-1), torch.ones(256, dtype=torch.float64))
    assert torch.isfinite(log2p).all()  # no byte is impossible, whatever was seen
    assert log2p[ord("b"), ord("a")] > math.log2(0.99)  # "b" is always followed by "a"
    assert log2p[ord("z"), ord("a")] > log2p[ord("z"), ord("q")]  # unseen context: lower order
    ids, targets = stream[:-1].long(), stream[1:].long()
    assert bigram_bits(log2p, ids, targets) < 1.5


def test_bigram_by_hand():
    """Of "aab": c(a,a) = c(a,b) = 1, no pair was seen twice, so the discount is 1/2."""
    p = fit_bigram(bytes_of("aab")).exp2()
    lower_a = (1 - 0.5) / 2 + 0.5 * 2 / 2 / 256
    assert p[ord("a"), ord("a")].item() == pytest.approx((1 - 0.5) / 2 + 0.5 * 2 / 2 * lower_a)
    assert p[ord("z"), ord("z")].item() == pytest.approx(0.5 * 2 / 2 / 256)


# Settings and the step


def test_learning_rate_warms_up_and_decays():
    settings = Settings(lr=1.0, warmup=10, steps=110)
    rates = [settings.lr_at(step) for step in range(120)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55)
    assert rates[110:] == [pytest.approx(0.1)] * 10
    assert rates[10:111] == sorted(rates[10:111], reverse=True)
    assert Settings(warmup=0, lr=1.0).lr_at(0) == 1.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dim": 10, "heads": 4}, "--dim must be a multiple of heads, 4, got 10"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, got 1.0"),
        ({"lr": float("nan")}, "--lr must be above 0 and finite, got nan"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0 and finite, got -0.1"),
        ({"autocast": "fp8"}, "--autocast must be none or bf16, got fp8"),
    ],
)
def test_settings_refuse(option, message):
    with pytest.raises(UserError) as error:
        Settings(**option)
    assert str(error.value) == message


def test_accumulation_equals_the_larger_batch(text):
    """In fp64, where only the order of sums differs."""
    corpus = load_corpus([text])
    trainers = [
        Trainer(Settings(**{**TINY, **option}), corpus, [], CPU)
        for option in ({"batch_size": 8}, {"batch_size": 2, "accumulate": 4})
    ]
    for trainer in trainers:
        trainer.model.double()
    for _ in range(3):
        large, small = (trainer.step() for trainer in trainers)
        torch.testing.assert_close(small.loss, large.loss)
        torch.testing.assert_close(small.grad_norm, large.grad_norm)
    states = [model_state(trainer.model) for trainer in trainers]
    torch.testing.assert_close(states[0], states[1])
    assert trainers[0].windows.position == trainers[1].windows.position == 24


def test_only_matrices_decay(text):
    trainer = Trainer(Settings(**TINY), load_corpus([text]), [], CPU)
    decayed, kept = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and {p.dim() for p in decayed["params"]} == {2}
    assert kept["weight_decay"] == 0.0 and {p.dim() for p in kept["params"]} == {1}
    in_groups = len(decayed["params"]) + len(kept["params"])
    assert in_groups == len(list(trainer.model.parameters()))


def test_gradients_are_clipped(text):
    corpus = load_corpus([text])
    trainer = Trainer(Settings(**{**TINY, "clip": 1e-3}), corpus, [], CPU)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item()
        )
    )
    assert trainer.step().grad_norm > 1e-2
    assert seen[0] <= 1e-3


def test_evaluation_draws_no_random_number(text):
    corpus = load_corpus([text])
    trainer = Trainer(Settings(**{**TINY, "dropout": 0.5}), corpus, [], CPU)
    windows = evaluation_windows(corpus.held_out, 16, 512)
    before = torch.get_rng_state()
    bits = [evaluate(trainer.model, *windows, trainer.settings, batch=b) for b in (32, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    assert bits[0] == pytest.approx(bits[1]) and 7 < bits[0] < 9  # untrained: about 8
    assert trainer.model.training


# The command


def test_train_beats_the_bigram_and_names_its_files(text, tmp_path, capsys):
    """A regular text and a tiny model; the defaults on the standard library are the demo's."""
    code = train(text, tmp_path, "--lr", "0.01", "--context", "32", "--dropout", "0", steps=150)
    out = capsys.readouterr().out
    assert code == 0
    assert "bits per byte, below the byte bigram's" in out
    for name in (FILE_NAME, "loss.csv", "loss.png"):
        assert str(tmp_path / name) in out and (tmp_path / name).stat().st_size > 0
    rows = read_curve(tmp_path / "loss.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 151))
    assert all((row["held_out_bits_per_byte"] != "") == (int(row["step"]) % 3 == 0) for row in rows)
    losses = [float(row["train_bits_per_byte"]) for row in rows]
    assert losses[0] > 6 and losses[-1] < 3


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert train(text, out) == 0
    return out


def same_run(a, b) -> bool:
    return all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in (FILE_NAME, "loss.csv")
    )


@pytest.mark.parametrize("stop_at", [3, 4])
def test_ctrl_c_saves_and_resumes_to_the_same_losses(
    stop_at, text, uninterrupted, tmp_path, monkeypatch, capsys
):
    step = Trainer.step

    def interrupted(self):
        if self.step_count + 1 == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train(text, tmp_path) == 130
    assert f"stopped at step {stop_at} of 6; go on with: fastlm train --resume" in (
        capsys.readouterr().out
    )
    assert Checkpoint.load(tmp_path).step == stop_at
    assert not same_run(tmp_path, uninterrupted)
    assert train(text, tmp_path, "--resume") == 0
    assert same_run(tmp_path, uninterrupted)


def test_killed_run_resumes_from_the_last_checkpoint(
    text, uninterrupted, tmp_path, monkeypatch, capsys
):
    """Steps past the checkpoint, and their rows in the CSV, are made again."""
    step = Trainer.step

    def killed(self):
        if self.step_count == 5:
            raise KeyboardInterrupt  # what a second Ctrl-C raises: nothing is saved
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        assert train(text, tmp_path) == 130
    assert Checkpoint.load(tmp_path).step == 3
    with open(tmp_path / "loss.csv", "a") as file:
        file.write("4,256,0.001,1,5,\n5,320,0.0")  # the last row was cut off
    assert train(text, tmp_path, "--resume") == 0
    assert same_run(tmp_path, uninterrupted)


def test_finished_run_resumes_to_itself(text, uninterrupted, capsys):
    before = (uninterrupted / FILE_NAME).read_bytes()
    assert train(text, uninterrupted, "--resume") == 0
    assert (uninterrupted / FILE_NAME).read_bytes() == before


def test_resume_takes_the_same_settings_and_text(text, uninterrupted, tmp_path, capsys):
    assert train(text, uninterrupted, "--resume", "--dim", "16", "--dropout", "0.1") == 0
    capsys.readouterr()
    assert train(text, uninterrupted, "--resume", "--dim", "32") == 2
    assert capsys.readouterr().err == (
        "fastlm train: error: --dim is 16 in the checkpoint and cannot become 32;"
        " leave it out, or start a new run in another --out\n"
    )
    (tmp_path / "other.txt").write_text("other text\n" * 100)
    assert train(text, uninterrupted, "--resume", "--data", str(tmp_path)) == 2
    assert "the text has changed since the checkpoint was saved" in capsys.readouterr().err


def test_new_run_does_not_replace_a_checkpoint(text, tmp_path, capsys):
    assert train(text, tmp_path, steps=1) == 0
    before = (tmp_path / FILE_NAME).read_bytes()
    assert train(text, tmp_path, steps=2) == 2
    assert f"{tmp_path} holds a checkpoint already" in capsys.readouterr().err
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert train(text, tmp_path, "--overwrite", steps=2) == 0
    assert Checkpoint.load(tmp_path).step == 2


def test_bf16_autocast_trains(text, tmp_path, capsys):
    assert train(text, tmp_path, "--autocast", "bf16", steps=3) == 0
    saved = Checkpoint.load(tmp_path)
    assert saved.settings.autocast == "bf16"
    assert {tensor.dtype for tensor in saved.model.values()} == {torch.float32}


# Checkpoints


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_last_checkpoint_whole(call, text, tmp_path, monkeypatch, capsys):
    assert train(text, tmp_path, steps=3) == 0
    before = (tmp_path / FILE_NAME).read_bytes()
    capsys.readouterr()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint_module = "fastlm.training.checkpoint"
    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(f"{checkpoint_module}.open", full_file, raising=False)
        else:
            real = getattr(os, call)
            patch.setattr(
                f"{checkpoint_module}.os.{call}",
                # The CSV is rewritten first, and fits.
                lambda *a: real(*a) if _is_csv(a) else full(),
            )
        assert train(text, tmp_path, "--resume", "--steps", "6") == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        f"fastlm train: error: cannot write {tmp_path / FILE_NAME}: No space left on device;"
        " the one saved before is whole"
    )
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE_NAME, "loss.csv", "loss.png"]
    assert train(text, tmp_path, "--resume", "--steps", "6") == 0


def full_file(path, *args, **kwargs):
    """As on a disk that fills up while the checkpoint is written: some bytes arrive."""
    file = open(path, *args, **kwargs)  # noqa: SIM115
    if FILE_NAME in str(path):
        write = file.write

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                write(data[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()
    return file


def _is_csv(args) -> bool:
    target = args[0] if isinstance(args[0], os.PathLike) else f"/proc/self/fd/{args[0]}"
    name = os.path.realpath(target)
    return "loss.csv" in name or os.path.isdir(name)


def test_short_write_leaves_the_file_whole(tmp_path):
    """A real one: the kernel cuts the write at the limit."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        with pytest.raises(
            UserError, match="cannot write .*: File too large; the one saved before"
        ):
            write_atomically(path, bytes(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_that_is_interrupted_leaves_no_rubbish(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_round_trip(text, tmp_path):
    corpus = load_corpus([text])
    trainer = Trainer(Settings(**TINY), corpus, [str(text)], CPU)
    trainer.step()
    saved = trainer.checkpoint()
    saved.save(tmp_path / FILE_NAME)
    loaded = Checkpoint.load(tmp_path)
    for part in ("settings", "step", "position", "data", "fingerprint"):
        assert getattr(loaded, part) == getattr(saved, part)
    for part in ("model", "optimizer", "rng"):
        torch.testing.assert_close(getattr(loaded, part), getattr(saved, part), rtol=0, atol=0)
    # The head is tied: the embedding is stored once, and nothing else repeats it.
    assert len({t.data_ptr() for t in saved.model.values()}) == len(saved.model)


WIDER = {**Settings(**TINY).to_dict(), "dim": 32, "steps": 6}


def _foreign(path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)


def _text(path):
    path.write_text("not a checkpoint")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edited(path, **changes):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    run = json.loads(metadata["fastlm"])
    run.update(changes)
    metadata["fastlm"] = json.dumps({k: v for k, v in run.items() if v is not None})
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no checkpoint at {path}"),
        (_text, "cannot read {path}: not a safetensors file"),
        (_cut, "cannot read {path}: not a safetensors file"),
        (_foreign, "{path} is not a checkpoint that fastlm train wrote"),
        (lambda p: _edited(p, step=None), "{path} is a damaged checkpoint"),
        (lambda p: _edited(p, step="x"), "{path} is a damaged checkpoint"),
        (lambda p: _edited(p, format="2"), "{path} is a damaged checkpoint: its format is not"),
        (lambda p: _edited(p, settings={"dim": 1}), "{path} is a damaged checkpoint"),
        (lambda p: _edited(p, settings=WIDER), "the checkpoint's token_weight does not fit: "),
    ],
)
@pytest.mark.parametrize("command", ["eval", "generate", "train"])
def test_foreign_checkpoint_ends_with_one_line(
    command, spoil, message, uninterrupted, tmp_path, capsys
):
    path = tmp_path / FILE_NAME
    path.write_bytes((uninterrupted / FILE_NAME).read_bytes())
    spoil(path)
    arguments = ["train", "--resume", "--out"] if command == "train" else [command]
    assert main([*arguments, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastlm {command}: error: {message.format(path=path)}")
    assert err.count("\n") == 1


# The loss curve


def test_curve_keeps_rows_up_to_a_step(tmp_path):
    path = tmp_path / "loss.csv"
    curve = Curve(path)
    curve.extend({"step": i, "bytes": 64 * i, "lr": 0.1 / 3} for i in range(1, 6))
    curve.close()
    again = Curve(path, last_step=3)
    again.close()
    assert [row["step"] for row in read_curve(path)] == ["1", "2", "3"]
    assert read_curve(path)[0]["lr"] == "0.03333333333"
    assert plot_curve(again.rows, 3.5, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_curve_does_not_overwrite_another_table(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a loss curve of fastlm train"):
        Curve(path)
    assert path.read_text() == "a,b\n1,2\n"
