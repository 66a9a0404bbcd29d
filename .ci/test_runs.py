"""Hard cases of runs: kills, signals, disks, settings of another run, teachers and their cache."""
import contextlib
import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import probe
import train
from probe import load_data, load_teacher, save_encoder
from seed import SEED, Encoder, InputError, Supervised
from test_seed import (ARCH, HERE, TINY, assert_same_run, draw_all_shapes, last_checkpoint,
                       log_rows, make_cfg, refusal, run, same, spy, with_statistics)

SHORT = "--method supervised --subset 48"           # six steps, a row and a save after 3 and 6
LOCK = """import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(float(sys.argv[2]))"""


class PowerCut(BaseException):
    """What kills a run in these tests."""


def at_call(patch, owner, name, call, action):
    """Call action() before the n-th call of owner.name."""
    calls = itertools.count(1)
    function = getattr(owner, name)

    def counted(*args, **options):
        if next(calls) == call:
            action()
        return function(*args, **options)

    patch.setattr(owner, name, counted)


def cut_at(owner, name, call, flags):
    """Kill a run before the n-th call of a function."""
    def cut():
        raise PowerCut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        at_call(patch, owner, name, call, cut)
        run(flags)


def handlers():
    return [signal.getsignal(number) for number in probe.STOP_SIGNALS]


def settings_of(folder):
    return json.loads(Path(folder, "args.json").read_text())


def files_of(folder):
    """Return the contents of a folder's files, except its lock."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".lock"}


@pytest.fixture
def other_teacher(tmp_path):
    """A file like `teacher_file`, with other weights."""
    torch.manual_seed(7)
    encoder = with_statistics(Encoder(ARCH, 32, image_size=32))
    save_encoder(tmp_path / "other.pt", encoder, "another", False)
    return "other.pt"


# -------------------------------------------------------------------------------- kills and signals
@pytest.mark.parametrize("owner, name, call", [
    *[(os, "replace", i) for i in (1, 2, 3, 4, 5, 6)], (torch, "save", 2), (torch, "save", 4),
    (Supervised, "after_step", 2), (Supervised, "after_step", 5), (train.Run, "write_row", 2)])
def test_a_run_that_is_killed_at_any_moment_resumes(quick, owner, name, call):
    """If a kill left files that do not fit together, the run would be refused. (A run writes
    args.json and views.png, then encoder.pt and last.pt twice.)"""
    run(SHORT, "whole")
    cut_at(owner, name, call, SHORT)
    Path("run/last.pt.99.tmp").touch()                          # what a real kill leaves
    run(SHORT)
    assert_same_run("whole", "run")
    assert files_of("run")["encoder.pt"] == files_of("whole")["encoder.pt"]
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("owner, name, call, number, step", [
    (SEED, "after_step", 2, signal.SIGTERM, 2), (SEED, "after_step", 4, signal.SIGHUP, 4),
    (SEED, "after_step", 6, signal.SIGINT, 6), (train.Run, "save", 2, signal.SIGUSR1, 6)])
def test_a_signal_ends_a_run_after_its_step_is_saved(quick, capfd, teacher_file, owner, name, call,
                                                     number, step):
    """A run whose time slot is shorter than an epoch would never get beyond its first epoch."""
    flags = f"--subset 48 --teacher {teacher_file}"

    def interrupt():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)                            # `timeout` sends it twice

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        at_call(patch, owner, name, call, interrupt)
        run(flags)
    assert ended.value.code == 128 + number
    assert f"{signal.Signals(number).name}: finishing" in capfd.readouterr().out
    assert last_checkpoint("run")["step"] == step
    run(flags)
    run(flags, "whole")
    assert_same_run("whole", "run")


def test_outside_the_loop_signals_have_their_usual_effect(quick, monkeypatch):
    """If the handlers were installed for the whole program, Ctrl-C would have no effect while a
    data set is read or the table is made."""
    usual = handlers()
    seen = {}
    for owner, name in ((train, "load_data"), (train.Run, "open"), (Supervised, "loss"),
                        (train.Run, "save"), (train, "print_table")):
        at_call(monkeypatch, owner, name, 1,
                lambda name=name: seen.update({name: handlers() == usual}))
    run(SHORT)
    assert seen == dict(load_data=True, open=True, loss=False, save=False, print_table=True)
    monkeypatch.setattr(Supervised, "loss", None)
    with pytest.raises(TypeError):
        run(SHORT, "failed")
    assert handlers() == usual


def test_ignored_signals_stay_ignored_and_a_thread_sets_no_handler(quick, monkeypatch):
    """If handlers were always installed, `nohup` would not protect a run, and a notebook's thread
    would get an error."""
    at_call(monkeypatch, Supervised, "after_step", 2, partial(os.kill, os.getpid(), signal.SIGHUP))
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(SHORT)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)
    thread = threading.Thread(target=run, args=(SHORT, "thread"))
    thread.start()
    thread.join()
    assert_same_run("run", "thread")


@pytest.mark.parametrize("make", [os.pipe, os.openpty])
def test_a_reader_that_has_gone_does_not_end_a_run(quick, make):
    """If print() failed, the run would end without saving: Ctrl-C ends `| tee log` first."""
    reader, writer = make()
    os.close(reader)
    with open(writer, "w") as file, contextlib.redirect_stdout(file):
        run(SHORT)
    assert last_checkpoint("run")["step"] == 6


# --------------------------------------------------------------------------------------- the folder
@pytest.mark.parametrize("minutes, steps", [(0, [1, 2, 3, 4, 5, 6]), (1, [2, 3, 5, 6])])
def test_a_run_is_saved_every_few_minutes(quick, monkeypatch, minutes, steps):
    """If a run were saved only after an epoch, a kill would cost hours on ImageNet."""
    now = itertools.count(0, 31)                                # seconds from one look to the next
    saved = spy(monkeypatch, train.Run, "save")
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now))
    run(f"{SHORT} --save-minutes {minutes}")
    assert [args[1] for args, _ in saved] == steps


@pytest.mark.parametrize("minutes", [0, 9])
def test_seconds_are_those_of_training_alone(quick, monkeypatch, minutes):
    """If evaluation and saving counted as training, the table's seconds would depend on
    --eval-every."""
    now = itertools.count()                                     # each look at the clock: a second

    def slow(*args):
        return 1.0 * next(itertools.islice(now, 10_000, None))

    monkeypatch.setattr(train.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(train.Run, "evaluate", slow)
    at_call(monkeypatch, train, "save_file", 1, slow)
    run(f"{SHORT} --eval-every 1 --save-minutes {minutes}")
    assert 6 * 2 <= last_checkpoint("run")["seconds"] < 100, "each batch takes two looks or more"
    assert all(float(row["accuracy"]) > 10_000 for row in log_rows("run"))


def test_rows_after_the_checkpoint_come_again(quick):
    """If later rows were kept, they would appear twice in the log, or an incomplete row would spoil
    the next one."""
    flags = f"{SHORT} --subset 240 --epochs 1"                  # 15 steps, a row after 10 and 15
    run(flags, "whole")
    cut_at(train.Run, "save", 1, flags)                         # without a checkpoint: all rows
    run(f"{flags} --max-steps 5")
    cut_at(Supervised, "after_step", 8, flags)
    with open("run/log.csv", "a") as file:
        file.write("13,2.2,0.1,3.0,0.")
    run(flags)
    assert [row["step"] for row in log_rows("run")] == ["5", "10", "15"]
    assert log_rows("run")[1:] == log_rows("whole")


@pytest.mark.parametrize("end", [0, -5])
def test_a_lost_or_torn_log_does_not_spoil_the_next_rows(quick, end):
    """If the log's end is lost in a power cut, or a user empties it, the next rows must still be
    rows."""
    run(f"{SHORT} --max-steps 3")
    Path("run/log.csv").write_text(Path("run/log.csv").read_text()[:end])
    run(SHORT)
    assert [row["step"] for row in log_rows("run")] == ["6"]


@pytest.mark.parametrize("damage, words", [
    (partial(os.truncate, length=0), "cannot read run/last.pt"),
    (partial(os.truncate, length=5000), "cannot read run/last.pt"),
    (partial(torch.save, {"weights": 1}), "run/last.pt"), (os.remove, "run has no last.pt")])
def test_an_unusable_checkpoint_is_an_error_that_says_what_to_do(quick, damage, words):
    """If a damaged last.pt were ignored, a run would start again and overwrite a good
    encoder.pt."""
    run(SHORT)
    damage("run/last.pt")
    before = files_of("run")
    error = refusal(run, SHORT)
    assert words in error and "use another --out (--init" in error
    assert files_of("run") == before


@pytest.mark.parametrize("flags, words", [
    ("--lr 0.3", "lr was 0.4, is 0.3"), ("--epochs 3", "epochs was 2, is 3"),
    ("--seed 1", "seed was 0, is 1"), ("--subset 47", "data_fingerprint was "),
    ("--label-fraction 0.5", "label_fraction was 1.0, is 0.5"),
    ("--teacher other.pt", "teacher_fingerprint was"), ("--init other.pt", "init_fingerprint was"),
    ("--teacher-mean 0 0 0", "teacher_mean was None, is [0.0, 0.0, 0.0]")])
def test_other_settings_are_another_run(quick, teacher_file, other_teacher, flags, words):
    """If other settings could resume a run, half of the student would belong to another
    experiment."""
    start = f"--subset 48 --max-steps 3 --teacher {teacher_file} --init {teacher_file}"
    run(start)
    before = files_of("run")
    error = refusal(run, f"{start} {flags}")
    assert words in error and "use another --out (--init" in error
    assert files_of("run") == before


@pytest.mark.parametrize("name, words", [
    ("log.csv", "a log.csv but no args.json"), ("encoder.pt", "encoder.pt but no args.json"),
    ("args.json", "its args.json is damaged")])
def test_a_folder_of_other_files_is_left_alone(quick, name, words):
    """If any folder were accepted, `--out .` would empty a user's log.csv, or delete temporary
    files of other programs."""
    Path(name).write_text("of a user")
    Path("notes.tmp").write_text("of a user")
    assert words in refusal(run, f"--teacher-arch {ARCH}", out=".")
    assert sorted(os.listdir()) == sorted([name, "notes.tmp"]), "and no teacher is trained first"
    os.remove(name)
    run(f"{SHORT} --max-steps 1", ".")
    assert Path("notes.tmp").exists()


@pytest.mark.parametrize("cache", ["cache", "run"])
def test_two_runs_in_one_folder_do_not_mix(quick, monkeypatch, teacher_file, cache):
    """If a folder were not locked, the logs of two runs would mix. (Closing any file object on the
    lock file releases the lock.)"""
    flags = f"--subset 48 --teacher {teacher_file} --teacher-cache {cache}"
    lock = [sys.executable, "-c", LOCK, "run/.lock"]
    tried = []
    at_call(monkeypatch, SEED, "after_step", 2,
            lambda: tried.append(subprocess.run([*lock, "0"], stderr=subprocess.DEVNULL)))
    run(f"{flags} --max-steps 3")
    assert tried[0].returncode != 0, "locked during the run"
    before = files_of("run")
    with subprocess.Popen([*lock, "9"], stdout=subprocess.PIPE) as rival:
        assert rival.stdout.readline() == b"locked\n"
        assert " is using run; wait for it" in refusal(run, flags)
        assert files_of("run") == before
        rival.kill()
    run(flags)                                                  # as soon as the other has ended


def test_a_path_may_begin_with_a_tilde(quick, monkeypatch, teacher_file):
    """If ~ were not expanded, a folder named ~ would be made: shells leave --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(quick / "home"))
    Path("home").mkdir()
    Path("home/t.pt").write_bytes(Path(teacher_file).read_bytes())
    run("--max-steps 1 --teacher=~/t.pt --init=~/t.pt --teacher-cache=~/cache --data=~/d", "~/x")
    assert os.listdir() == ["home"]
    assert sorted(os.listdir("home")) == ["cache", "t.pt", "x"]


COMMAND = """import probe, train
draw = probe.draw_shapes
probe.draw_shapes = lambda n, split: draw(n // 20, split)
train.print_table = print
probe.run_command(train.main)"""
DISKS = """mount -t tmpfs -o size=2m tmpfs disk || exit 99
"$@" --out disk/run; echo $? >> codes; ls -a disk/run >> names
mount -o remount,size=50m disk
"$@" --out disk/run; echo $? >> codes
mount -o remount,ro disk
"$@" --out disk/other; echo $? >> codes"""


def test_a_full_or_read_only_disk_is_one_line_and_the_run_resumes(quick):
    """If a full disk left half of a last.pt, the same command would be refused when there is space
    again."""
    Path("disk").mkdir()
    flags = [*TINY, *SHORT.split(), *f"--arch {ARCH} --dim 8 --hidden-dim 0".split()]
    words = ["unshare", "-rm", "bash", "-c", DISKS, "-", sys.executable, "-c", COMMAND, *flags]
    found = subprocess.run(words, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(HERE)})
    if found.returncode == 99 or "unshare" in found.stderr:
        pytest.skip("no mounts here")
    full, *others = found.stderr.splitlines()
    assert re.fullmatch(r"error: cannot write disk/run/last.pt: .*; [\d,]+ bytes are free", full)
    assert ".tmp" not in Path("names").read_text()
    assert others[1:] == [] and "cannot make the folder disk/other" in others[0]
    assert Path("codes").read_text().split() == ["1", "0", "2"]


def test_what_is_not_finite_ends_the_run_before_it_is_saved(quick, monkeypatch):
    """If a diverged run were saved, it would overwrite the last good checkpoint."""
    def broken(self, labels):
        nn.init.constant_(next(self.encoder.parameters()), math.inf)

    run(f"{SHORT} --max-steps 3")
    before = files_of("run")
    for name, replaced, steps, words in (
            ("loss", lambda self, x, y: x.mean() * math.nan, 6, "the loss is not finite"),
            ("after_step", broken, 4, "a weight is not finite")):
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as caught:
            patch.setattr(Supervised, name, replaced)
            run(f"{SHORT} --max-steps {steps}")
        assert str(caught.value).startswith(words)
        assert {**files_of("run"), "log.csv": before["log.csv"]} == before
    assert "with --precision fp32, the same command resumes from the last" in str(caught.value)
    run(f"{SHORT} --precision fp32")
    assert last_checkpoint("run")["step"] == 6


def test_float16_scales_the_loss_and_a_resumed_run_keeps_the_scale(quick, monkeypatch):
    """If the loss were not scaled, small gradients would be 0 in float16. If the scale were not
    saved, a resumed run would differ."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=4.0, growth_interval=3))
    flags = f"{SHORT} --precision fp16"
    run(flags, "whole")
    run(f"{flags} --max-steps 4")
    run(flags)
    assert last_checkpoint("run")["scaler"] == last_checkpoint("whole")["scaler"]
    assert last_checkpoint("run")["scaler"]["scale"] == 16.0, "4, doubled after each third step"
    for steps, precision in ((2, "fp16"), (4, "bf16"), (6, "fp16")):
        run(f"{SHORT} --max-steps {steps} --precision {precision}", "moved")
    assert last_checkpoint("moved")["step"] == 6


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_dtypes_reach_the_networks(quick, monkeypatch, teacher_file, precision, dtype):
    """If autocast missed a network, bf16 would be reported but not used. If it reached the loss,
    the loss would be rounded to steps of 0.03."""
    features = spy(monkeypatch, Encoder, "features")
    losses = spy(monkeypatch, SEED, "loss")
    run(f"--teacher {teacher_file} --max-steps 1 --precision {precision}")
    assert [z.dtype for _, z in features[:2]] == [dtype, dtype], "of teacher and student"
    [((_, z_s, z_t), loss)] = losses
    assert z_s.dtype == z_t.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("method, count", [("seed --teacher FILE", 2), ("moco", 2),
                                           ("supervised", 1), ("linear --init FILE", 1)])
def test_compiled_networks_are_used(quick, monkeypatch, teacher_file, method, count):
    """If the loop called another function than the compiled one, --compile would change nothing."""
    called = []

    def forward(network, *args):
        called.append(id(network))
        return network._call_impl(*args)

    monkeypatch.setattr(nn.Module, "compile",                   # the real one takes a minute
                        lambda m: setattr(m, "_compiled_call_impl", partial(forward, m)))
    flags = f"--max-steps 1 --method {method.replace('FILE', teacher_file)}"
    run(flags, "plain")
    assert not called
    run(f"{flags} --compile")
    assert len(set(called)) == count


@pytest.mark.parametrize("flags", ["--teacher-arch resnet18 --teacher-cache cache",
                                   "--method supervised --compare"])
def test_a_profile_times_each_part_and_leaves_no_run_behind(quick, capsys, monkeypatch, flags):
    """If a part were not wrapped, it would be missing. If files stayed, the next run would find
    them."""
    monkeypatch.setattr(train.Run, "evaluate", None)            # no part of a step
    run(f"{flags} --profile --arch resnet18 --subset 20 --batch-size 4 --epochs 1 --eval-every 1")
    out = capsys.readouterr().out
    ms = dict(re.findall(r"^(\w+) +([\d.]+) ms per step$", out, re.M))
    assert set(ms) == {"reading", "augmentation", "targets", "forward", "loss"}
    assert float(ms["forward"]) > float(ms["loss"]) > 0
    [trace] = os.listdir()
    assert f"wrote {trace}" in out


def test_a_student_may_start_from_weights(quick, teacher_file, other_teacher):
    """If --init did not pass on `used_labels`, weights made with labels would be called label-free.
    (--arch names the network of torchvision's file.)"""
    start = load_teacher(other_teacher, mean=(0.5, 0.5, 0.5), std=np.ones(3))
    for dim in (32, 8):
        args = train.parse_args(["--arch", ARCH, "--dim", str(dim)])
        encoder = train.new_encoder(train.make_config(args, "seed"), start)
        assert same(encoder.backbone.state_dict(), start.backbone.state_dict())
        head = same(encoder.head.state_dict(), start.head.state_dict())
        assert head == (dim == 32), "the head, too, if it has the same layers"
        assert torch.equal(encoder.mean, start.mean) and torch.equal(encoder.std, start.std)
    torch.save(torchvision.models.get_model(ARCH).state_dict(), "torchvision.pth")
    flags = f"--teacher {teacher_file} --init torchvision.pth --max-steps 1"
    assert "torchvision.pth" in refusal(run, f"{flags} --arch resnet18")
    run(flags)
    found = load_teacher("run/encoder.pt")
    assert found.used_labels is None, "unknown, like that of its start"
    assert f"started from: {ARCH}, weights under ''" in found.provenance
    train.main([*TINY, *f"--method moco --init {teacher_file} --max-steps 1 --out moco".split()])
    assert load_teacher("moco/encoder.pt").arch == ARCH, "the file names its network"


def test_a_secret_in_a_url_is_not_written(quick, monkeypatch, capsys, teacher_file):
    """Whoever shares a run's folder or its output would share the key to a bucket."""
    monkeypatch.setattr(probe, "download", lambda url: teacher_file)
    run("--teacher https://a.b/t.pt?secret --init https://a.b/t.pt?secret --dim 32 --max-steps 1")
    assert settings_of("run")["teacher"] == "https://a.b/t.pt"
    assert not [name for name, content in files_of("run").items() if b"secret" in content]
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["linear", "finetune"])
def test_a_classifier_resumes_and_is_logged(quick, teacher_file, capsys, method):
    """If the probe could not resume, a hundred epochs on ImageNet would be lost. If it moved the
    encoder, it would train what it should judge."""
    flags = f"--method {method} --init {teacher_file} --eval-every 1"
    run(flags, "whole")
    result = json.loads(Path("whole/results.json").read_text())
    cut_at(train.Classifier, "after_step", 8, flags)
    run(flags)
    assert_same_run("whole", "run")
    rows = log_rows("run")
    assert [row["accuracy"] != "" for row in rows] == [True, False, True]
    assert float(rows[-1]["accuracy"]) == pytest.approx(result["accuracy"], rel=1e-4)
    before = load_teacher(teacher_file).backbone.state_dict()
    made = load_teacher("run/encoder.pt")
    assert made.used_labels is (method == "finetune")
    trained = last_checkpoint("run")["method"]
    for name, value in made.backbone.state_dict().items():
        moved = not torch.equal(before[name], value)
        assert moved == (method == "finetune"), "weights, and statistics of batch norm"
        assert moved == (not torch.equal(before[name], trained[f"encoder.backbone.{name}"]))
    refusal(run, f"{flags} --compare", out="compared")          # its accuracy would be the rival's
    for lr, is_far in ((1e3, True), (0.3, False)) if method == "linear" else ():
        capsys.readouterr()
        run(f"{flags} --lr {lr} --weight-decay 0 --epochs 12", str(lr))
        note = "note: its last loss is above chance level"
        assert (note in capsys.readouterr().out) == is_far


def test_few_labels_shrink_the_batch(quick, monkeypatch):
    """If the batch did not shrink to the labeled images, 1% of CIFAR-10's labels (500) would be
    refused."""
    seen = spy(monkeypatch, train, "fit_to_data")
    run("--method finetune --label-fraction 0.02 --batch-size 64 --subset 250")
    [((_, data), _)] = seen
    assert torch.bincount(data.train.labels).tolist() == [1] * 20
    assert settings_of("run")["batch_size"] == 20


@pytest.mark.parametrize("flags, count, scale", [
    ("swav.pth", 6, [0.14, 1.0]), ("swav.pth --small-crops 0", 0, [0.14, 1.0]),
    ("swav.pth --small-crops 2", 2, [0.14, 1.0]), ("swav.pth --image-size 64", 0, [0.4, 1.0]),
    ("FILE", 0, [0.4, 1.0])])
def test_a_swav_teacher_brings_its_crops(quick, capsys, teacher_file, flags, count, scale):
    """If a SwAV teacher did not change the views, the paper's best results would be out of reach:
    crops of 0.14 to 1 of an image, and six small ones."""
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.projection_head = nn.Linear(512, 16)
    network.prototypes = nn.Linear(16, 30, bias=False)
    torch.save(with_statistics(network).state_dict(), "swav.pth")
    flags = ("--batch-size 4 --max-steps 1 --image-size 72 --small-size 40 --teacher "
             + flags.replace("FILE", teacher_file))
    run(flags)
    settings = settings_of("run")
    assert (settings["small_crops"], settings["crop_scale"]) == (count, scale)
    assert ("small_queue.features" in last_checkpoint("run")["method"]) == (count > 0)
    run(flags)                                                  # the same command again
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("flags, arch, size, words", [
    ("", ARCH, 48, "not at 48"), ("", "mobilenet_v3_small", 48, "not at 48"),
    ("--small-crops 1", ARCH, 24, "not at 24"), ("--dim 8", "", 0, "embeddings have 32 dimensions"),
    ("--small-crops 1", "mobilenet_v3_small", 24, "not at 24")])
def test_networks_that_do_not_fit_are_refused_before_training(quick, monkeypatch, teacher_file,
                                                              flags, arch, size, words):
    """If sizes were not checked first, a vision transformer for 224 px would fail days after its
    teacher began."""
    def refuse(self, image_size):
        if self.arch == arch and image_size == size:
            raise InputError(f"not at {size} px")
        return 1024

    monkeypatch.setattr(Encoder, "check_image_size", refuse)
    flags += f" --arch mobilenet_v3_small --teacher {teacher_file} --image-size 48 --compare"
    assert words in refusal(run, flags)
    assert os.listdir() == []


def test_networks_are_evaluated_as_they_are_used(quick, monkeypatch, teacher_file):
    """If rows of the table were evaluated differently, they could not be compared: untrained batch
    norm, another image size."""
    tables = spy(monkeypatch, train, "print_table")
    flags = f"--dim 32 --teacher {teacher_file} --max-steps 1"
    run(flags)
    run(f"{flags} --init {teacher_file} --image-size 40", "other")
    [[untrained, teacher, _], [start, enlarged, _]] = [args[0] for args, _ in tables]
    torch.manual_seed(0)
    expected = probe.average_batch_norm(Encoder(ARCH, 32, image_size=32),
                                        load_data("shapes", subset=96).train).state_dict()
    for name, value in untrained["encoder"].state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-4)
    for row in (teacher, start, enlarged):
        assert same(row["encoder"].state_dict(), load_teacher(teacher_file).state_dict())
    assert start["encoder"].image_size == enlarged["encoder"].image_size == 40
    other_stem = f"{flags} --init {teacher_file} --small-images"
    assert "needs --no-small-images" in refusal(run, other_stem, "third")


def test_compare_trains_the_same_network_by_the_other_methods(quick, monkeypatch, teacher_file):
    """If baselines got the student's settings or its start, the comparison would be unfair."""
    tables = spy(monkeypatch, train, "print_table")
    flags = (f"--teacher {teacher_file} --init {teacher_file} --dim 32 --lr 0.7 --max-steps 1 "
             "--teacher-cache cache --compare")
    Path("run/moco").mkdir(parents=True)
    Path("run/moco/encoder.pt").touch()
    assert "run/moco has a encoder.pt" in refusal(run, flags)
    assert os.listdir("run") == ["moco"], "before the student is trained"
    Path("run/moco/encoder.pt").unlink()
    run(flags)
    names = ["as it starts", "the teacher", "by SEED", "by MoCo-v2", "by supervision"]
    assert [row["name"].removeprefix(ARCH).lstrip(", ") for row in tables[0][0][0]] == names
    assert settings_of("run")["lr"] == 0.7
    for method, lr in (("moco", 0.06), ("supervised", 0.1)):
        settings = settings_of(f"run/{method}")
        assert (settings["method"], settings["arch"], settings["lr"]) == (method, ARCH, lr)
        provenance = load_teacher(f"run/{method}/encoder.pt").provenance
        assert "started from" not in provenance, "--init is in NOT_INHERITED"


@pytest.mark.parametrize("flags, count", [
    ("--tau-t 0.1 --lr 0.1 --epochs 3 --queue-size 32 --view-epochs 1 --small-crops 1", 1),
    ("--workers 1 --save-minutes 1 --compare --init a/encoder.pt --teacher-cache cache", 1),
    ("--teacher-method moco", 2), ("--seed 1", 2), ("--max-steps 1", 2), ("--dim 16", 2)])
def test_a_teacher_is_trained_once_and_kept_under_what_made_it(quick, flags, count):
    """If the folder's name did not depend on all settings, a teacher of another recipe or seed
    would be used."""
    run(f"--teacher-arch {ARCH} --max-steps 2", "a")
    student = load_teacher("a/encoder.pt")
    expected = f"SEED, 0.3333 epochs on shapes, teacher: {ARCH}, supervision, 0.3333 epochs on sh"
    assert student.used_labels is True and expected in student.provenance
    run(f"--teacher-arch {ARCH} --max-steps 2 {flags}", "b")
    assert len(list(Path("runs/teachers").iterdir())) == count
    assert load_teacher("b/encoder.pt").used_labels is ("moco" not in flags)


def test_a_finished_run_keeps_its_encoder_to_the_last_bit(quick, capsys):
    """If a finished run wrote encoder.pt again, it might be another teacher, and its students could
    not resume."""
    run(SHORT)
    before = files_of("run")
    time = Path("run/encoder.pt").stat().st_mtime_ns
    run(SHORT)
    run(f"{SHORT} --max-steps 2")
    assert "finished before, at step 6" in capsys.readouterr().out
    assert files_of("run") == before
    assert Path("run/encoder.pt").stat().st_mtime_ns == time
    os.remove("run/encoder.pt")
    run(SHORT)                                                  # only now it is made again
    assert files_of("run")["encoder.pt"] == before["encoder.pt"]


# -------------------------------------------------------------------------------- the teacher cache
@pytest.fixture
def cached(quick, teacher_file):
    """The flags of a student with a teacher cache, six steps."""
    return f"--subset 48 --queue-size 40 --teacher {teacher_file} --teacher-cache cache"


@pytest.mark.parametrize("more", ["", "--small-crops 1"])
def test_kept_embeddings_are_the_teachers(monkeypatch, teacher_file, cached, more):
    """If a row that a kill cut short were used, a second student would learn from another
    teacher."""
    run(f"--subset 48 --queue-size 40 --teacher {teacher_file} {more}", "without")
    asked = spy(monkeypatch, SEED, "targets")
    cut_at(SEED, "after_step", 5, f"{cached} {more}")
    run(f"{cached} {more}")
    assert len(asked) == 6, "the targets of the steps that are done again were kept"
    run(f"{cached} {more}", "second")
    assert len(asked) == 6, "none with a full cache"
    rows = np.memmap("cache/z.float32", np.float32, "r+", shape=(2, 48, 2 if more else 1, 32))
    whole = np.array(rows)
    rows[1, 7, -1, 16:] = 0                                     # a kill tears one row,
    rows[0, 3] = np.nan                                         # a bad disk another
    run(f"{cached} {more}", "torn")
    assert np.array_equal(np.array(rows), whole)
    for out in ("run", "second", "torn"):
        assert_same_run("without", out)


def test_a_cache_grows_and_repeats(monkeypatch, cached):
    """If rows were stored by another index, more epochs would compute them again, and --view-epochs
    would not limit the disk space."""
    asked = spy(monkeypatch, SEED, "targets")
    for out, more, calls, epochs in (("once", "--view-epochs 1", 3, 1), ("twice", "", 6, 2),
                                     ("again", "--view-epochs 1 --tau-t 0.2", 6, 2),
                                     ("longer", "--epochs 3 --lr 0.1", 9, 3)):
        run(f"{cached} {more}", out)
        assert len(asked) == calls, out
        assert os.path.getsize("cache/z.float32") == epochs * 4 * 48 * 32
    assert "view_epochs was 1, is None" in refusal(run, cached, "once")


@pytest.mark.parametrize("flags, words", [
    ("--seed 1", "seed was 0, is 1"), ("--subset 47", "data_fingerprint was "), ("", "cache"),
    ("--image-size 40", "views was"), ("--small-crops 1", "views was"),
    ("--precision bf16", "was torch.float32, is torch.bfloat16"), ("--teacher-mean 0 0 0", "was"),
    ("--teacher other.pt", "teacher_fingerprint was "), ("--label-fraction 0.5", "was")])
def test_a_cache_of_other_embeddings_is_refused(cached, other_teacher, flags, words):
    """If a cache did not know what it depends on, embeddings of other views, images or teachers
    would be used."""
    run(f"{cached} --max-steps 1")
    if not flags:                                               # of unknown origin
        Path("cache/fingerprint.json").write_text("")
    kept = files_of("cache")
    assert words in refusal(run, f"{cached} {flags}", "other")
    assert not Path("other/args.json").exists(), "the corrected command may use this folder"
    assert files_of("cache") == kept


def test_a_disk_that_the_cache_fills_ends_the_run_in_one_line(cached):
    """If a failed write were ignored, rows would be lost, and the user would not know which disk is
    full."""
    def fill(cache, batch):
        cache.file = open("/dev/full", "wb", buffering=0)
        return targets(cache, batch)

    targets = train.TeacherCache.targets
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
        patch.setattr(train.TeacherCache, "targets", fill)
        run(cached)
    run(cached)                                                 # there is space again
    assert "cache" in str(caught.value)


def test_students_share_a_cache_at_the_same_time(monkeypatch, cached):
    """If a second student changed the cache's size or fingerprint, the first one would fail or read
    other rows."""
    run(cached.replace("--teacher-cache cache", ""), "without")
    asked = spy(monkeypatch, SEED, "targets")
    at_call(monkeypatch, SEED, "after_step", 2, lambda: run(f"{cached} --epochs 3", "longer"))
    run(cached)                                                 # the other runs meanwhile
    assert len(asked) == 9, "each finds what the other has written"
    assert_same_run("without", "run")


def test_each_step_process_and_seed_draws_other_random_numbers(monkeypatch):
    """If dropout had the same mask in each step, it would remove the same features forever."""
    seeds = set()
    for number, step, rank in itertools.product((0, 1), (0, 1, 2), (0, 1)):
        monkeypatch.setattr(train, "rank_and_world_size", lambda: (rank, 2))
        train.seed_generators(make_cfg("--seed", str(number)), step)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 12
    train.seed_generators(make_cfg("--seed", str(2**32 - 1)), step=0)   # the largest one


def test_the_file_of_a_short_run_has_usable_features(quick):
    """If encoder.pt had the statistics of training, all features of a MobileNet would be nearly one
    point. kNN in float32 would still work, but bf16 or a classifier would not."""
    run("--method supervised --arch mobilenet_v3_small")
    spread = {}
    for name in ("last.pt", "encoder.pt"):
        x = F.normalize(load_teacher(f"run/{name}").features(draw_all_shapes(64, 1).pixels), dim=1)
        spread[name] = (x - x.mean(0)).norm(dim=1).mean()
    assert spread["last.pt"] < 1e-3, "else this test shows nothing"
    assert spread["encoder.pt"] > 0.5


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, (2, 1)])
def test_the_shortcut_for_small_maps_computes_the_same(stride, kernel, groups):
    """If the shortcut cut out the wrong part of a kernel, or took a map for which it is wrong, the
    network that is trained would not be the one that encoder.pt describes."""
    usual = nn.Conv2d(8, 8, kernel, stride, padding=kernel // 2, groups=groups)
    faster = copy.deepcopy(usual)
    train.speed_up_small_maps(faster)
    assert type(faster) is train.SmallMapConv2d
    for height, width in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (2, 5), (5, 2)]:
        results = []
        x = torch.randn(4, 8, height, width)
        for layer in (usual, faster):
            inputs = [x.clone().requires_grad_(), layer.weight, layer.bias]
            y = layer(inputs[0])
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        torch.testing.assert_close(*results)


def test_other_convolutions_stay_as_they_are():
    """If a dilated or even kernel, or another padding, took the shortcut, a teacher of torch.hub
    would compute nonsense."""
    others = nn.ModuleList([
        nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 4, padding=2), nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")])
    train.speed_up_small_maps(others)
    assert {type(layer) for layer in others} == {nn.Conv2d}
