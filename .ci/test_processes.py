"""Real processes: killed, signaled, left alone, and several that train together."""
import contextlib
import errno
import itertools
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import probe
import train
from test_seed import (ARCH, HERE, assert_same_run, last_checkpoint, log_rows, make_cfg, refusal,
                       run, write_images)

TRAIN = [sys.executable, HERE / "train.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_RANKS = [*TORCHRUN, "--standalone", "--nproc_per_node=2", HERE / "train.py"]
ALL = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
PORTS = itertools.count(20000 + os.getpid() % 10000)
STARTED = []
SHORT_RUN = (f"--arch {ARCH} --dataset folder --data images --image-size 32 --batch-size 8 "
             "--epochs 6 --queue-size 64 --eval-every 3 --device cpu --out run").split()


def gray_images(root, count=40):
    """Write images in two class folders."""
    write_images(root, {f"{'ab'[i % 2]}/{i:03d}.png": 3 * i for i in range(count)})


def obey_hangup():
    """Let a program receive SIGHUP even if these tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(*words, cwd, **variables):
    """Start a command as a user does, but on one thread. Return its Popen."""
    STARTED.append(subprocess.Popen([str(word) for word in words], cwd=cwd, text=True,
                                    preexec_fn=obey_hangup,
                                    env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return STARTED[-1]


def command(*words, cwd):
    """Run a command to its end, which must be a good one. Return what it printed."""
    process = start(*words, cwd=cwd)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def wait_for_rows(folder, count, process):
    """Wait until the log of a run has this many rows below its header."""
    path = Path(folder, "log.csv")
    while not path.exists() or len(path.read_text().splitlines()) <= count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def start_run(folder, launcher, flags, rows):
    """Start a short run on images in a folder, and wait for these rows of its log."""
    gray_images(folder / "images", 80)
    process = start(*launcher, *SHORT_RUN, *flags.split(), cwd=folder)
    wait_for_rows(folder / "run", rows, process)
    return process


def family(process):
    """Return the ids of a process and of its descendants, parents first."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [[int(word) for word in line.split()] for line in listed.splitlines()[1:]]
    found = [process.pid]
    for pid in found:                                           # grows meanwhile
        found += [child for child, parent in pairs if parent == pid]
    return found


def signal_all(process, number):
    """Send a signal to a process and its descendants, workers first. Return what it printed."""
    for pid in family(process)[::-1]:
        with contextlib.suppress(ProcessLookupError):           # it has just ended
            os.kill(pid, number)
    return process.communicate(timeout=60)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """End the processes of a test that failed."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            signal_all(process, signal.SIGKILL)


@pytest.mark.parametrize("launcher, rows, flags", [
    (TRAIN, 5, "--method supervised --image-size 72 --workers 2"),
    (TRAIN, 3, "--teacher teacher.pt --small-crops 1 --teacher-cache cache"),
    (TWO_RANKS, 1, "--method moco"),
    (TWO_RANKS, 3, "--teacher teacher.pt --image-size 72 --workers 1 --teacher-cache cache")])
def test_a_run_that_is_killed_is_the_run_that_never_stopped(tmp_path, teacher_file, launcher, rows,
                                                            flags):
    """If a kill changed the numbers, nobody could tell what a run on a shared machine computed."""
    gray_images(tmp_path / "images")
    shutil.copy(teacher_file, tmp_path / "teacher.pt")
    words = [*launcher, *SHORT_RUN, "--save-minutes", "0.02", *flags.split()]
    command(*words, "--out", "whole", cwd=tmp_path)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    process = start(*words, cwd=tmp_path)
    wait_for_rows(tmp_path / "run", rows, process)
    signal_all(process, signal.SIGKILL)
    command(*words, cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.tmp"))


def test_a_signal_to_all_processes_does_not_cost_the_last_minutes(tmp_path):
    """Slurm signals the workers as well. If they obeyed, the run could not finish its step, and
    what it computed since the last save would be lost."""
    flags = "--method supervised --image-size 72 --workers 2 --batch-size 2"
    process = start_run(tmp_path, TRAIN, flags, 1)
    out, error = signal_all(process, signal.SIGTERM)
    assert (process.returncode, error) == (128 + signal.SIGTERM, "")
    assert out.count("stopped by SIGTERM; the same command resumes from here") == 1
    assert 10 <= last_checkpoint(tmp_path / "run")["step"] < 35, "before the end of an epoch"


@pytest.mark.parametrize("launcher", [TRAIN, ["nohup", *TRAIN]])
def test_a_closed_terminal_saves_and_ends_a_run_unless_nohup_protects_it(tmp_path, launcher):
    """Whoever closes a laptop would lose what was computed since the last save, or lose a run that
    was started with nohup."""
    process = start_run(tmp_path, launcher, "--method supervised --batch-size 2 --epochs 3", 1)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=100)
    ended = [process.returncode, out.count("stopped by SIGHUP")]
    assert ended == ([128 + signal.SIGHUP, 1] if launcher == TRAIN else [0, 0])
    assert (last_checkpoint(tmp_path / "run")["step"] < 35) == (launcher == TRAIN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_torchrun_or_to_one_process_saves_and_ends_them_all(tmp_path, number):
    """A time limit would cost what was computed since the last save, or some processes would wait
    for one that has ended."""
    process = start_run(tmp_path, TWO_RANKS, "--method moco --batch-size 4", 2)
    target = family(process)[2 if number == signal.SIGUSR1 else 0]      # torchrun ignores SIGUSR1
    os.kill(target, number)
    out, _ = process.communicate(timeout=60)
    stopped = f"stopped by {signal.Signals(number).name}; the same command resumes from here"
    assert out.count(stopped) == 1
    step = last_checkpoint(tmp_path / "run")["step"]
    assert f"{step}" == log_rows(tmp_path / "run")[-1]["step"]
    assert 17 <= step < 100


def test_a_process_that_dies_ends_the_others_and_leaves_a_checkpoint(tmp_path):
    """If the others did not notice, seven GPUs would wait for the eighth for hours."""
    process = start_run(tmp_path, TWO_RANKS, "--method moco", 3)
    os.kill(family(process)[2], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode and error.count("error: another process of this run has ended") == 1
    assert last_checkpoint(tmp_path / "run")["step"] >= 9


def run_on_two_nodes(folder, flags, stop=False):
    """Run `train.py FLAGS` on two nodes, FOLDER/first and FOLDER/second, with one process each;
    with `stop`, shut the second one down. Return exit codes, and what each node printed."""
    port = str(next(PORTS))
    agents = []
    for rank, name in enumerate(("first", "second")):
        nodes = f"--nnodes=2 --node_rank={rank} --master_addr=127.0.0.1 --master_port={port}"
        words = [*TORCHRUN, *nodes.split(), HERE / "train.py", *flags]
        agents.append(start(*words, cwd=folder / name))
    if stop:
        wait_for_rows(folder / "first/run", 2, agents[0])
        agents[1].terminate()
    outputs = [agent.communicate(timeout=200) for agent in agents]
    return [agent.returncode for agent in agents], *outputs


def test_two_nodes_are_one_run(tmp_path):
    """If the nodes did not agree, each would train its own teacher, or write over the other's
    files."""
    flags = [*SHORT_RUN, *f"--teacher-arch {ARCH} --teacher-method moco --teacher-epochs 1".split()]
    for name in ("one", "first", "second"):
        gray_images(tmp_path / name / "images")
    (tmp_path / "second/run").touch()                           # only the first node needs a folder
    printed = command(*TWO_RANKS, *flags, cwd=tmp_path / "one")
    for line in ("stage 1: ", "stage 2: ", "; 2 process(es) on cpu", "wrote run/"):
        assert printed.count(line) == 1, "only the main process prints"
    _, first, _ = run_on_two_nodes(tmp_path, flags, stop=True)
    assert "stopped by SIGTERM; the same command resumes" in first[0]
    codes, first, second = run_on_two_nodes(tmp_path, flags)
    assert codes == [0, 0], first + second
    assert "resuming at step" in first[0]
    assert second[0] == "" and set(os.listdir(tmp_path / "second")) == {"images", "run"}
    assert_same_run(tmp_path / "one/run", tmp_path / "first/run")
    write_images(tmp_path / "second", {"images/a/000.png": 255})
    _, _, second = run_on_two_nodes(tmp_path, flags)
    assert "differ from those on the first node" in second[1]


@pytest.mark.parametrize("launcher, number", [
    (TRAIN, signal.SIGTERM), (TRAIN, signal.SIGHUP), (TRAIN, signal.SIGINT),
    (["nohup", *TRAIN], signal.SIGHUP)])
def test_a_run_that_waits_for_others_can_be_ended(tmp_path, launcher, number):
    """If a process never comes, the others wait for hours. If they only noted signals meanwhile,
    neither `timeout` nor Slurm could end them."""
    port = str(next(PORTS))
    process = start(*launcher, "--device", "cpu", cwd=tmp_path, **{**ALL, "MASTER_PORT": port})
    error = 1
    while error and process.poll() is None:                     # while it waits, it listens there
        with socket.socket() as client:
            error = client.connect_ex(("127.0.0.1", int(port)))
    process.send_signal(number)
    time.sleep(1)
    assert (process.poll() is None) == (launcher != TRAIN)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == -(number if launcher == TRAIN else signal.SIGTERM)


@pytest.mark.parametrize("names, device, words", [
    (["RANK"], "cpu", "RANK"), (["WORLD_SIZE"], "cpu", "WORLD_SIZE"),
    (["RANK", "WORLD_SIZE"], "cpu", "RANK and WORLD_SIZE"), ([*ALL][:3], "cpu", "MASTER_ADDR"),
    ([*ALL][:4], "cpu", "MASTER_PORT"), (ALL, "mps", "several processes need NVIDIA GPUs"),
    (ALL, "cuda", "there are only 0 GPUs"), ([*ALL, "RANK=2"], "cpu", "'RANK': '2'"),
    ([*ALL, "WORLD_SIZE=two"], "cpu", "'two'"), ([*ALL, "MASTER_PORT=-1"], "cpu", "cannot be")])
def test_processes_that_cannot_be_are_refused(monkeypatch, names, device, words):
    """With a RANK that a platform or an old shell left, a run would print and save nothing. With a
    WORLD_SIZE, it would wait for hours for processes that do not exist."""
    for name, _, value in [name.partition("=") for name in names]:
        monkeypatch.setenv(name, value or ALL[name])
    monkeypatch.setattr(train, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert words in refusal(train.init_distributed, device)


def test_a_rank_of_another_launcher_does_not_silence_the_probe(quick, monkeypatch, capsys):
    """probe.py is always a single process. With a RANK in the shell, it would print no accuracy."""
    monkeypatch.setenv("RANK", "1")
    probe.main([f"random:{ARCH}", "--subset", "40", "--device", "cpu"])
    assert "kNN" in capsys.readouterr().out


def test_a_batch_is_shared_evenly_or_refused(quick, monkeypatch):
    """If a batch were not a multiple of the processes, they would train on different numbers of
    images."""
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (0, 2))
    for size in ("129", "2"):
        line = refusal(train.fit_to_data, make_cfg("--batch-size", size), probe.load_data("shapes"))
        assert f"--batch-size {size} must be a multiple of the 2 processes" in line
    train.fit_to_data(make_cfg("--batch-size", "4"), probe.load_data("shapes"))


def run_as_command(name, *words):
    """Run a file as `python FILE WORDS` does, in this process. Return the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(HERE / name), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("rank, words, waits", [
    ("0", "train.py --lr -1", []), ("1", "train.py --lr -1", [5]), ("0", "probe.py x.pt", [])])
def test_bad_input_is_one_line_from_one_process(monkeypatch, capsys, rank, words, waits):
    """A script would not notice the error, or eight processes would print it eight times. When the
    main process has failed, torchrun ends the others before they print."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for name, value in {**ALL, "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    assert run_as_command(*words.split()) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert slept == waits


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "\ninterrupted"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "error: out of"),
    (RuntimeError("Connection closed by peer [127.0.0.1]:1"), 1, "error: another process of this"),
    (RuntimeError("Timed out waiting 1800000ms for recv operation"), 1, "error: another process"),
    (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error."), 1,
     "error: a DataLoader worker was killed; if shared memory (/dev/shm) is small"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nmat1 and mat2"), None, "")])
def test_a_run_that_cannot_go_on_says_why_in_one_line(monkeypatch, capsys, error, code, words):
    """A user would have to look for the reason in a traceback. But a bug needs its traceback: a
    line about memory would hide where it happened."""
    def fail(*args):
        raise error

    monkeypatch.setattr(probe, "load_data", fail)
    if code is None:
        with pytest.raises(RuntimeError, match="mat1"):
            run_as_command("train.py", "--device", "cpu")
        return
    assert run_as_command("train.py", "--device", "cpu") == code
    printed = capsys.readouterr().err
    assert printed.startswith(words) and "\n" not in printed.strip()


@pytest.mark.parametrize("error, words", [
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    (MemoryError(), "out of memory")])
def test_a_workers_error_is_one_line(quick, monkeypatch, capsys, error, words):
    """PyTorch puts the worker's traceback in front of what was wrong."""
    gray_images("images")
    open_image = probe.open_image

    def fail_in_worker(path):
        if torch.utils.data.get_worker_info():
            raise error
        return open_image(path)

    monkeypatch.setattr(probe, "open_image", fail_in_worker)
    flags = "--method supervised --dataset folder --data images --image-size 72 --workers 1"
    with pytest.raises(SystemExit) as ended:
        probe.run_command(lambda: run(f"{flags} --subset 32"))
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert printed.startswith("error: ") and words in printed and printed.count("\n") == 1


def test_a_run_whose_images_disappear_ends(tmp_path):
    """If the run waited for its workers, which ignore signals, it would wait forever."""
    flags = "--method supervised --image-size 72 --workers 2 --epochs 1000"
    process = start_run(tmp_path, TRAIN, flags, 3)
    shutil.rmtree(tmp_path / "images")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: ") and "cannot be read" in error and error.count("\n") == 1
