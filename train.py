"""Train a small network by SEED; or by MoCo-v2 or with labels, to compare.

    python train.py --arch mobilenet_v3_large                        # built-in shapes, any laptop
    torchrun train.py --dataset cifar10 --arch mobilenet_v3_large    # makes a MoCo-v2 teacher first
    torchrun --nproc_per_node=8 train.py --dataset imagenet --data /imagenet \\
        --arch mobilenet_v3_large --teacher moco_v2_800ep_pretrain.pth.tar      # eight GPUs

A run leaves a folder: encoder.pt (what you take away), last.pt (the same command again resumes from
it) and previous.pt (the one before), log.csv, args.json, results.json, views.png, neighbors.png.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import record_function

from probe import (DATASETS, SMALL, STOP_SIGNALS, Parser, average_batch_norm, batches,
                   check_ranges, default_workers, distribute, evaluate, from_main_process,
                   init_distributed, is_main_process, label_use, load_data_on_all,
                   load_teacher_on_all, main_process_first, make_folder, print0, print_table,
                   refuse_among_data, run_command, save_json, save_views)
from seed import (SEED, Encoder, FeatureQueue, InputError, MoCo, Supervised, describe,
                  rank_and_world_size, read_checkpoint, replace_file, save_encoder, save_file)

METHOD_NAMES = dict(seed="SEED", moco="MoCo-v2", supervised="supervision")
CHECKPOINTS = ("last.pt", "previous.pt")
LOG_EVERY = 10                  # steps from one row of log.csv to the next
KNN_LIMIT = 10_000              # images of a split that kNN looks at during training

# ------------------------------------------------------------------------------- recipes and flags
# PAPER holds for images above 64 px (ImageNet, folders); RECIPES change it for a data set,
# METHOD_CHANGES for a method on it; flags override all. `lr` is for a batch of 256.
PAPER = dict(
    image_size=224, small_images=False, crop_scale=(0.2, 1.0), blur=True, dim=128, hidden_dim=None,
    epochs=200, warmup_epochs=5, batch_size=256, lr=0.03, weight_decay=1e-4, queue_size=65536,
    tau_s=0.2, tau_t=0.01, key_momentum=0.999, eval_every=10, teacher_arch="resnet50",
    teacher_method="moco", teacher_epochs=200, view_epochs=None, symmetric=False, small_crops=0,
    small_size=96, small_scale=(0.05, 0.14))
SWAV = dict(crop_scale=(0.14, 1.0), small_crops=6)      # with such a teacher, above 64 px
TO_64_PX = dict(
    image_size=32, blur=False, epochs=20, warmup_epochs=1, batch_size=128, lr=0.1, queue_size=2048,
    eval_every=5, teacher_arch="resnet18", teacher_epochs=12,
    small_size=24, small_scale=(0.2, 0.5))              # at 16 px all crops are alike to a teacher
RECIPES = {
    "shapes": dict(TO_64_PX, crop_scale=(0.4, 1.0), batch_size=64, epochs=6, teacher_epochs=5,
                   teacher_method="supervised"),                # smaller crops hide the outline
    "cifar": dict(TO_64_PX, small_images=True, epochs=200, warmup_epochs=5, batch_size=256,
                  queue_size=4096, eval_every=20, teacher_epochs=200),
    "folder, to 64 px": TO_64_PX,
    "imagenet, folder": {},
}
METHOD_CHANGES = {
    ("shapes", "seed"): dict(lr=0.4, tau_t=0.05),
    ("shapes", "moco"): dict(lr=0.06, queue_size=256, key_momentum=0.99),
    ("cifar", "seed"): dict(lr=0.2),
    ("cifar", "moco"): dict(lr=0.03, weight_decay=5e-4, key_momentum=0.99, tau_s=0.1),
    ("cifar", "supervised"): dict(weight_decay=5e-4),
    ("folder, to 64 px", "seed"): dict(tau_t=0.05),
    ("folder, to 64 px", "moco"): dict(lr=0.06, key_momentum=0.99),
}
NOT_INHERITED = ("lr", "weight_decay", "queue_size", "tau_s", "tau_t", "dim", "hidden_dim",
                 "view_epochs", "symmetric", "small_crops", "small_size")    # of --method alone
MAY_CHANGE_ON_RESUME = ("workers", "device", "data", "out", "teacher", "eval_every", "max_steps",
                        "compare", "compile", "teacher_cache", "profile", "precision",
                        "save_minutes")


def recipe_of(dataset, image_size):
    """The name of the recipe for a data set."""
    if dataset == "shapes":
        return "shapes"
    if dataset.startswith("cifar"):
        return "cifar"
    if dataset == "folder" and image_size and image_size <= SMALL:
        return "folder, to 64 px"
    return "imagenet, folder"


def defaults(recipe, method):
    """The settings of a method on a data set, before any flag."""
    return {**PAPER, **RECIPES[recipe], **METHOD_CHANGES.get((recipe, method), {})}


def parse_args(argv=None):
    """The flags as given; None where the recipe decides."""
    parser = Parser(description=__doc__, epilog=recipe_table())
    add_experiment_flags(parser)
    add_run_flags(parser)
    return parser.parse_args(argv)


def add_experiment_flags(parser):
    """Networks, teacher and data."""
    flag = parser.add_argument_group("what to train").add_argument
    flag("--method", choices=tuple(METHOD_NAMES), default="seed",
         help="seed distils; moco is the baseline and makes teachers; supervised uses the labels")
    flag("--arch", default="mobilenet_v3_large", help="a torchvision classification network")
    flag("--dim", type=int, help="width of the embedding; a student takes its teacher's")
    flag("--hidden-dim", type=int, help="hidden width of the head; 0: none; default: the features'")
    flag("--small-images", action=argparse.BooleanOptionalAction,
         help="full resolution in the first layers, for 32-64 px: better and far slower; use a GPU")
    flag("--init", metavar="FILE", help="weights to start from, such as an encoder.pt")
    flag = parser.add_argument_group("the teacher").add_argument
    flag("--teacher", metavar="PATH_OR_URL", help="a checkpoint, or hub:REPO:ENTRY of torch.hub, "
         "which runs its code; without one, a teacher is trained first")
    flag("--teacher-arch", help="its network, where the file does not say; or the one to train")
    flag("--teacher-method", choices=("moco", "supervised"), help="how to train it")
    flag("--teacher-epochs", type=int, help="how long; a better teacher makes a better student")
    flag("--teacher-cache", metavar="DIR", help="keep its embeddings, for the next student")
    flag("--view-epochs", type=int, metavar="E", help="repeat the views of E epochs: a small cache")
    flag = parser.add_argument_group("the data").add_argument
    flag("--dataset", choices=DATASETS, default="shapes", help="shapes: drawn; folder: any images")
    flag("--data", default="data", metavar="DIR", help="where the images are; CIFAR is downloaded")
    flag("--image-size", type=int, help=f"side of a view; up to {SMALL} px, data stay in memory")
    flag("--small-crops", type=int, metavar="N", help="also N views of small parts; the paper: 6")
    flag("--small-size", type=int, help="their side")
    flag("--symmetric", action=argparse.BooleanOptionalAction,
         help="two views: the student's of one learns from the teacher's of the other")
    flag("--subset", type=int, metavar="N", help="train on N images, chosen by the seed")
    flag("--workers", type=int, help="processes that read from disk; raise it if the run waits")


def add_run_flags(parser):
    """How to train, and how to run."""
    flag = parser.add_argument_group("the optimization").add_argument
    flag("--epochs", type=int, help="passes over the data; small networks gain from more")
    flag("--max-steps", type=int, help="end each stage after so many; the schedule stays the same")
    flag("--batch-size", type=int, help="images a step, over all processes")
    flag("--lr", type=float, help="learning rate for a batch of 256; scaled by batch/256")
    flag("--weight-decay", type=float, help="on all weights, as in the authors' code")
    flag("--warmup-epochs", type=float, help="of linear warm-up; raise it if the loss explodes")
    flag("--queue-size", type=int, metavar="K", help="about 5%% of the data does; at most all")
    flag("--tau-s", type=float, help="the student's temperature, and MoCo's")
    flag("--tau-t", type=float, help="the teacher's; higher: neighbors count more")
    flag("--seed", type=int, default=0, help="of weights, views, order and subset")
    flag = parser.add_argument_group("the run").add_argument
    flag("--out", metavar="DIR", help="its folder; default: runs/DATASET-METHOD-ARCH")
    flag("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
         help="of the networks; auto: bf16 or fp16 on CUDA, else fp32 (a teacher may be bf16)")
    flag("--compile", action="store_true", help="torch.compile the networks; pays in long runs")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--save-minutes", type=float, default=10.0, metavar="M", help="from one save to the next; "
         "and at the end of each epoch, and at SIGTERM, SIGINT, SIGUSR1")
    flag("--eval-every", type=int, help="epochs from one kNN evaluation to the next; 0: none")
    flag("--compare", action="store_true", help="also train it by MoCo-v2 and with labels")
    flag("--profile", action="store_true", help="only time some steps, in parts")


def recipe_table():
    """The defaults that depend on the data set, as text."""
    lines = ["defaults by data set, for --method seed:",
             f"  {'':16s}" + "".join(f"{name:>18s}" for name in RECIPES)]
    for key in PAPER:
        values = [str(defaults(recipe, "seed")[key]) for recipe in RECIPES]
        lines.append(f"  {key:16s}" + "".join(f"{value:>18s}" for value in values))
    return "\n".join(lines)


def make_config(args, method, **changes):
    """All settings of one stage: the defaults, the flags, `changes`."""
    given = {key: value for key, value in vars(args).items()
             if value is not None and (method == args.method or key not in NOT_INHERITED)}
    recipe = recipe_of(args.dataset, args.image_size)           # below, the later ones win
    cfg = argparse.Namespace(**{**vars(args), **defaults(recipe, method), **given,
                                "method": method, **changes})
    check_ranges(cfg)
    if args.method != "seed":
        names = ("teacher", "teacher_cache", "small_crops", "symmetric")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if given:
            raise InputError(f"only for --method seed: {', '.join(given)}")
    cfg.warmup_epochs = min(cfg.warmup_epochs, cfg.epochs / 2)
    cfg.out = cfg.out or f"runs/{cfg.dataset}-{cfg.method}-{cfg.arch}"
    if cfg.workers is None:
        cfg.workers = default_workers()
    return cfg


# ---------------------------------------------------------------------------------------- the loop
def new_encoder(cfg):
    """The network as it starts."""
    torch.manual_seed(cfg.seed)
    encoder = Encoder(cfg.arch, cfg.dim, cfg.hidden_dim, cfg.small_images, cfg.image_size)
    for size, _ in reversed(view_plan(cfg)):                    # the large one is remembered
        encoder.check_image_size(size)
    if cfg.init:
        encoder.start_from(load_teacher_on_all(cfg.init, cfg.arch))
        torch.manual_seed(cfg.seed)         # reading has drawn numbers, on the first process alone
    return encoder


def view_plan(cfg):
    """Side and crop scale of each view of an image."""
    large = 2 if cfg.method == "moco" or cfg.symmetric else 1
    small = [(cfg.small_size, cfg.small_scale)] * cfg.small_crops
    return [(cfg.image_size, cfg.crop_scale)] * large + small


def build(cfg, data, device, teacher=None):
    """The network to train, and the method around it, on the device; the same on every process."""
    encoder = new_encoder(cfg)
    if cfg.method == "seed":
        method = SEED(encoder, teacher, cfg.queue_size, cfg.tau_s, cfg.tau_t, cfg.symmetric,
                      cfg.small_crops)
    elif cfg.method == "moco":
        per_process = cfg.batch_size // rank_and_world_size()[1]
        bn_splits = max(1, min(8, per_process // 32))           # parts of about 32 images
        method = MoCo(encoder, cfg.queue_size, cfg.key_momentum, cfg.tau_s, bn_splits)
    else:
        method = Supervised(encoder, len(data.classes))
    return encoder, method.to(device, memory_format=torch.channels_last).train()


def compile_and_distribute(method, cfg):
    """The method as the loop calls it: compiled if asked for, gradients averaged over processes."""
    for network in method.children():
        if cfg.compile and not isinstance(network, FeatureQueue):
            network.compile()
    return distribute(method)


def network_dtype(cfg, device, frozen=False):
    """The dtype that networks compute in. On a CPU with bf16 units (AMX) a frozen network is twice
    as fast in bf16, unless its images are tiny; a network in training is slower."""
    if cfg.precision != "auto":
        return dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[cfg.precision]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    has_units = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    large = cfg.image_size > 32 or cfg.small_images
    return torch.bfloat16 if frozen and has_units and large else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def lr_at(step, cfg, steps_per_epoch):
    """Learning rate: linear warm-up, then half a cosine down to 0; scaled with the batch size."""
    warmup = cfg.warmup_epochs * steps_per_epoch
    total = cfg.epochs * steps_per_epoch
    peak = cfg.lr * cfg.batch_size / 256
    if step < warmup:
        return peak * min(1, (step + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def train(cfg, data, device, teacher=None):
    """Train one network by `cfg.method`, from where its folder was left; returns the seconds."""
    encoder, method = build(cfg, data, device, teacher)
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
    dtype = network_dtype(cfg, device)
    target_dtype = network_dtype(cfg, device, frozen=cfg.method == "seed")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    folder = RunFolder(cfg, data, encoder, method, optimizer, scaler, teacher)
    first_step, seconds = folder.open()
    steps_per_epoch = len(data.train) // cfg.batch_size
    last_step = min(cfg.epochs * steps_per_epoch, cfg.max_steps or math.inf)
    if first_step >= last_step:
        print0(f"finished before, after {first_step} steps; delete {cfg.out} to train anew")
        return seconds
    cache = TeacherCache(cfg, data, method, target_dtype) if teacher and cfg.teacher_cache else None
    model = compile_and_distribute(method, cfg)
    clock = Clock(seconds)
    steps = range(first_step, last_step)                        # of all epochs that are left
    STOP.in_loop = True
    for step, batch in zip(steps, batches(data.train, cfg, device, view_plan(cfg), steps)):
        lr = lr_at(step, cfg, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seed_step(cfg, step)
        with record_function("teacher"), autocast(device, target_dtype):
            targets = cache.targets(batch) if cache else method.targets(batch.views, batch.labels)
        with record_function("student"), autocast(device, dtype):
            outputs = model(batch.views)
        with record_function("loss"):
            loss = method.loss(outputs, targets)
        with record_function("backward"):
            optimizer.zero_grad()
            scaler.scale(loss).backward()
        with record_function("update"):
            scaler.step(optimizer)
            scaler.update()

        clock.count(batch)
        steps_done = step + 1
        ends_epoch = steps_done % steps_per_epoch == 0 or steps_done == last_step
        should_log = ends_epoch or steps_done % LOG_EVERY == 0
        stop = STOP.was_asked(device, should_log)               # the same on every process
        if should_log or stop:                                  # with the queue that the loss saw
            row = dict(step=steps_done, epoch=steps_done / steps_per_epoch, lr=lr)
            row.update(mean_of_ranks({"loss": loss, **method.diagnostics(outputs, targets)}))
            folder.check(row)
        method.after_step(targets)                              # only now the queue moves on
        if (should_log or stop) and is_main_process():
            row.update(clock.lap(cfg.batch_size))
            row["knn"] = knn_if_due(row["epoch"], encoder, data, cfg, device)
            if should_log:
                folder.write_row(row, last_step)
            if ends_epoch or stop or folder.save_is_due():
                folder.save(steps_done, row["epoch"], clock.seconds)
            clock.start()
        if stop:
            STOP.end()
    STOP.leave_loop()
    return clock.seconds


def seed_step(cfg, step):
    """Seed what a step draws (dropout, MoCo's shuffle), so that a resumed run draws the same."""
    rank, world_size = rank_and_world_size()
    torch.manual_seed(((cfg.seed * 2**32 + step) * world_size + rank) % 2**63)


def knn_if_due(epoch, encoder, data, cfg, device):
    """kNN accuracy in percent after each --eval-every epochs; else None."""
    if not data.has_labels or not cfg.eval_every or epoch % cfg.eval_every:
        return None
    encoder = average_batch_norm(encoder, data.train, cfg.workers)
    scores, _ = evaluate(encoder, data, device, cfg.workers, KNN_LIMIT, linear=False)
    return scores["knn"]


def mean_of_ranks(values):
    """A dict of scalar tensors -> of floats, averaged over processes; waits for the device."""
    means = torch.stack([value.detach().float() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return dict(zip(values, means.tolist()))


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end the command with exit code 128 + their number; in
    the loop of `train` when the step is finished and saved."""
    number = 0
    in_loop = False

    def receive(self, number, frame):
        """The signal handler."""
        self.number = number
        if not self.in_loop:
            self.end()
        text = f"\n{signal.Signals(number).name}: finishing the step, then saving\n"
        if is_main_process():
            with contextlib.suppress(OSError):      # no print(): the signal may interrupt one
                os.write(1, text.encode())

    def was_asked(self, device, should_log):
        """Whether any process got a signal. Several agree on it only where they log, and so wait
        for each other anyway; a single one looks in each step."""
        number = self.number                                    # a handler may set it meanwhile
        if dist.is_initialized():
            if not should_log:
                return False
            shared = torch.tensor(number, device=device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            number = int(shared)
        self.number = number or self.number
        return number > 0

    def leave_loop(self):
        self.in_loop = False
        if self.number:                                         # it came after the last look
            self.end()

    def end(self):
        if dist.is_initialized() and self.in_loop:
            dist.barrier()                                      # the main process has to save
        print0(f"ended by {signal.Signals(self.number).name}; the same command goes on from the "
               "last checkpoint")
        sys.exit(128 + self.number)


STOP = StopSignal()


class Clock:
    """The seconds that training took so far, without evaluating and saving; and its speed."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.start()

    def start(self):
        self.started = time.perf_counter()
        self.steps = 0
        self.waited = 0.0

    def count(self, batch):
        self.steps += 1
        self.waited += batch.wait

    def lap(self, batch_size):
        """Speed since the start, and the share of time in which the next batch was not there."""
        took = time.perf_counter() - self.started
        self.seconds += took
        return dict(waiting=self.waited / took, images_per_s=self.steps * batch_size / took)


# ------------------------------------------------------------------------------ what stays on disk
def run_identity(cfg, data):
    """What makes a run this run and no other: its settings and data."""
    settings = {key: value for key, value in vars(cfg).items() if key not in MAY_CHANGE_ON_RESUME}
    if not cfg.small_crops:
        del settings["small_size"], settings["small_scale"]
    return {**settings, "data_fingerprint": data.fingerprint}


def differences(saved, current):
    """Where the dict `saved` differs from `current`, in words; "" if nowhere."""
    keys = [key for key in current if saved.get(key) != current[key]]
    return "; ".join(f"{key} was {saved.get(key)}, is {current[key]}" for key in keys)


def fingerprint(module):
    """A hash of all weights and buffers."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def read_last(out, identity):
    """The content of OUT/last.pt; if that is broken, of OUT/previous.pt, the one before; None in a
    new folder. InputError if it is of another run."""
    broken = ""
    for name in CHECKPOINTS:
        path = Path(out, name)
        if not path.exists():
            continue
        try:
            saved = read_checkpoint(path)
            break
        except InputError as e:
            broken = broken or f"{e}; "
    else:
        if broken or Path(out, "encoder.pt").exists():
            raise InputError(f"{broken}{out} has no checkpoint to resume from; name another --out "
                             f"(--init {out}/encoder.pt starts from its weights), or delete it")
        if Path(out, "log.csv").exists() and not Path(out, "args.json").exists():
            raise InputError(f"{out} has a log.csv that is of no run; name another --out")
        return None
    if not isinstance(saved.get("identity"), dict):             # also the first version's
        raise InputError(f"{path} is not a run's checkpoint; name another --out, or delete it")
    other = differences(saved["identity"], identity)
    if other:
        hint = ""
        if "epochs" in [key for key in identity if saved["identity"].get(key) != identity[key]]:
            hint = f" (that run's learning rate is down; --init {out}/encoder.pt starts from it)"
        raise InputError(f"{out} holds a run with other settings ({other}); name another --out"
                         f"{hint}")
    return dict(saved, file=name, note=f"{broken}resuming at step {saved['step']}, from {name}")


def provenance_of(out):
    """How encoder.pt in the folder says that it was made; None if it is missing or damaged."""
    try:
        return read_checkpoint(Path(out, "encoder.pt")).get("provenance")
    except InputError:
        return None


def has_checkpoint(out):
    """Whether a run has been saved in a folder."""
    return any(Path(out, name).exists() for name in CHECKPOINTS)


def lock_folder(out, wait=False):
    """An open file that keeps other runs out of the folder; InputError, unless it shall wait, if
    one is at work there. (No lock on Windows, nor where the disk knows none.)"""
    make_folder(out)
    file = open(out / ".lock", "a+")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(f"{file.read() or 'another process'} is at work in {out}; wait for it, or "
                         "name another --out") from None
    except (ImportError, OSError):
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def cut_log(path, step):
    """Keep the rows of a log up to a step; a later one may be torn, and is computed again."""
    rows = re.findall(r"(?m)^((step|\d+),.*\n)", path.read_text(errors="replace"))
    kept = [row for row, first in rows if first == "step" or int(first) <= step]
    with replace_file(path) as file:
        file.write("".join(kept).encode())


class RunFolder:
    """What a run leaves: args.json, views.png, log.csv, last.pt and previous.pt, to resume, and
    encoder.pt."""

    def __init__(self, cfg, data, encoder, method, optimizer, scaler, teacher=None):
        self.cfg = cfg
        self.data = data
        self.encoder = encoder
        self.teacher = teacher
        self.parts = dict(method=method, optimizer=optimizer, scaler=scaler)
        self.identity = run_identity(cfg, data)
        self.identity["teacher"] = fingerprint(teacher) if teacher else None
        self.printed = 0.0
        self.saved = time.monotonic()

    def open(self):
        """Load the last checkpoint, or make the folder: (steps done, seconds spent)."""
        saved = from_main_process(self.prepare)
        if saved is None:
            return 0, 0.0
        print0(saved["note"])
        weights = self.parts["method"].state_dict()             # and the teacher's
        weights.update(saved["method"])
        self.parts["method"].load_state_dict(weights)
        self.parts["optimizer"].load_state_dict(saved["optimizer"])
        if saved["scaler"]:                                     # empty but for fp16
            self.parts["scaler"].load_state_dict(saved["scaler"])
        if is_main_process() and provenance_of(self.cfg.out) != saved["provenance"]:
            self.save_encoder(saved["provenance"], saved["used_labels"])    # killed before it was
        return saved["step"], saved["seconds"]

    def prepare(self):
        """Lock the folder and make it ready; its checkpoint, or None."""
        out = Path(self.cfg.out)
        self.lock = lock_folder(out)
        saved = read_last(out, self.identity)
        if (out / "args.json").exists():
            for leftover in out.glob("*.tmp"):                  # of a run that was killed
                leftover.unlink()
        if saved is None:
            save_json(out / "args.json", vars(self.cfg))
            (out / "log.csv").write_text("")
            save_views(out / "views.png", self.data, self.cfg.crop_scale, self.cfg.blur,
                       self.cfg.seed)
            return None
        if saved["file"] == "previous.pt":                      # the later one is broken
            os.replace(out / "previous.pt", out / "last.pt")
        if (out / "log.csv").exists():
            cut_log(out / "log.csv", saved["step"])
        return saved

    def check(self, row):
        """FloatingPointError if the run has diverged; before anything of it is saved."""
        if not all(math.isfinite(value) for value in row.values()):
            self.stop_diverged(f"the loss is not finite at step {row['step']}, learning rate "
                               f"{row['lr']:.3g}")

    def stop_diverged(self, what):
        raise FloatingPointError(
            f"{what}; {self.cfg.out}/last.pt, if there is one, is the last good checkpoint: with "
            "--precision fp32 the same command goes on from it; a lower --lr or more "
            "--warmup-epochs are another run: name another --out, or delete the folder")

    def save_is_due(self):
        return time.monotonic() - self.saved >= 60 * self.cfg.save_minutes

    def write_row(self, row, last_step):
        """Append a row to log.csv; print it every ten seconds, and with each kNN evaluation."""
        path = Path(self.cfg.out, "log.csv")
        texts = {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()}
        try:
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if path.stat().st_size == 0:
                    writer.writeheader()
                writer.writerow(texts)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise OSError(f"cannot write {path}: {e}") from None
        is_due = row["knn"] is not None or row["step"] == last_step
        if not is_due and time.perf_counter() - self.printed < 10:
            return
        self.printed = time.perf_counter()
        large = row["loss"] - row.get("small_loss", 0)
        small = f" + {row['small_loss']:.3f}" if "small_loss" in row else ""
        left = int((last_step - row["step"]) * self.cfg.batch_size / row["images_per_s"])
        copy = f" (a copy: {row['loss_of_a_copy']:.3f})" if "loss_of_a_copy" in row else ""
        knn = f"  kNN {row['knn']:.1f}%" if row["knn"] is not None else ""
        print0(f"{row['step'] / last_step:4.0%}  epoch {row['epoch']:.1f}/{self.cfg.epochs}  "
               f"loss {large:.3f}{copy}{small}  lr {row['lr']:.3g}  "
               f"{row['images_per_s']:.0f} images/s  waiting {row['waiting']:.0%}  "
               f"ETA {left // 60}:{left % 60:02d}{knn}")

    def save(self, steps_done, epochs, seconds):
        """Write last.pt, of which the one before becomes previous.pt; and encoder.pt."""
        provenance = f"{METHOD_NAMES[self.cfg.method]}, {epochs:.4g} epochs on {self.data.name}"
        labels = [self.cfg.method == "supervised", self.encoder.used_labels]    # at the start
        if self.cfg.init:
            provenance += f", started from: {self.encoder.provenance}"
        if self.teacher:
            provenance += f", teacher: {self.teacher.provenance}"
            labels.append(self.teacher.used_labels)
        used_labels = next(x for x in (True, None, False) if x in labels)
        state = describe(self.encoder, provenance, used_labels)
        state.update({name: part.state_dict() for name, part in self.parts.items()})
        state["method"] = {name: value for name, value in state["method"].items()
                           if not name.startswith("teacher.")}  # frozen: its fingerprint will do
        state.update(step=steps_done, seconds=seconds, identity=self.identity)
        if not all(value.isfinite().all() for value in state["method"].values()):
            self.stop_diverged(f"a weight is not finite after step {steps_done}")
        out = Path(self.cfg.out)
        save_file(out / "new.pt", state)
        if (out / "last.pt").exists():
            os.replace(out / "last.pt", out / "previous.pt")
        os.replace(out / "new.pt", out / "last.pt")
        self.save_encoder(provenance, used_labels)
        self.saved = time.monotonic()

    def save_encoder(self, provenance, used_labels):
        """Write encoder.pt, with batch-norm statistics averaged anew; training keeps its own."""
        encoder = average_batch_norm(self.encoder, self.data.train, self.cfg.workers)
        save_encoder(Path(self.cfg.out, "encoder.pt"), encoder, provenance, used_labels)


class TeacherCache:
    """The teacher's embeddings of views, kept in DIR/z.float32 [E, N, V, D] for the next student: a
    view depends on (seed, epoch, image) alone. A row whose norm is not 1 was never written, or half
    written at a kill: it is computed. DIR/fingerprint.pt tells whose embeddings these are."""

    def __init__(self, cfg, data, method, dtype):
        self.method = method
        path = Path(cfg.teacher_cache)
        keys = ("dataset", "data_fingerprint", "seed", "subset", "blur")
        current = {key: value for key, value in run_identity(cfg, data).items() if key in keys}
        current.update(teacher=fingerprint(method.teacher), precision=str(dtype),
                       views=view_plan(cfg))
        epochs = min(cfg.view_epochs or cfg.epochs, cfg.epochs)
        shape = (epochs, len(data.train), method.views_per_image, method.teacher.dim)
        with main_process_first(), lock_folder(path, wait=True):
            if not (path / "z.float32").exists():
                save_file(path / "fingerprint.pt", current)
            other = differences(read_checkpoint(path / "fingerprint.pt"), current)
            if other:
                raise InputError(f"--teacher-cache {path} holds other embeddings ({other}); name "
                                 "another folder")
            reserve(path / "z.float32", 4 * math.prod(shape))
            self.rows = np.memmap(path / "z.float32", np.float32, "r+", shape=shape)

    def targets(self, batch):
        """As `SEED.targets`, for a Batch; from the disk if all of them are there."""
        kept = torch.from_numpy(self.rows[batch.epoch, batch.samples])     # [B, V, D]
        if ((kept.norm(dim=2) - 1).abs() < 1e-4).all():
            kept = kept.transpose(0, 1).flatten(0, 1)           # [V*B, D]
            return kept.to(batch.views[0].device, non_blocking=True)
        z_t = self.method.targets(batch.views)                  # [V*B, D]
        by_image = z_t.unflatten(0, (len(batch.views), -1)).transpose(0, 1)
        self.rows[batch.epoch, batch.samples] = by_image.cpu().numpy()
        return z_t


def reserve(path, size):
    """Make a file `size` bytes long on the disk: to write into a map of a file for which there is
    no room would kill the process. (On Linux; elsewhere the file grows as it is written.)"""
    path.touch()
    with open(path, "r+b") as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if hasattr(os, "posix_fallocate") and size > before:
                os.posix_fallocate(file.fileno(), before, size - before)
        except OSError as e:
            file.truncate(before)
            raise InputError(f"--teacher-cache needs {size:,} bytes in {path} ({e}); name another "
                             "folder, or lower --view-epochs") from None


# ------------------------------------------------------------------------------------------ stages
def fit_to_data(cfg, data):
    """Refuse what cannot work before anything is trained; shorten a queue that is too long."""
    world_size = rank_and_world_size()[1]
    num_images = len(data.train)
    if cfg.batch_size > num_images:
        raise InputError(f"--batch-size {cfg.batch_size}: there are {num_images:,} training images")
    if cfg.batch_size % world_size or cfg.batch_size < 2 * world_size:
        raise InputError(f"--batch-size {cfg.batch_size} must be a multiple of the {world_size} "
                         "processes, with 2 images each at least")
    if cfg.method == "supervised" and not data.classes:
        raise InputError(f"training with labels needs them, and {cfg.data} has none; use class "
                         "folders, or moco as --method or --teacher-method")
    if cfg.queue_size > num_images and cfg.method != "supervised" and not cfg.profile:
        print0(f"note: the queue of {cfg.queue_size:,} is cut to the {num_images:,} images")
        cfg.queue_size = num_images
    refuse_among_data(cfg.out, cfg.dataset, cfg.data)
    identity = run_identity(cfg, data)
    for name in ("dim", *SWAV):                                 # not known before the teacher is
        del identity[name]
    if not cfg.profile:
        from_main_process(read_last, cfg.out, identity)         # is the folder another run's?


def get_teacher(args, cfg, data, device):
    """The teacher and its seconds: from a file; or trained now, and kept for the next student."""
    path = args.teacher
    seconds = None
    if not path and args.profile:                               # any weights take the same time
        teacher = Encoder(cfg.teacher_arch, cfg.dim, None, cfg.small_images, cfg.image_size)
        cfg.teacher_cache = None                                # its embeddings are of no use
    else:
        if not path:
            path, seconds = train_teacher(args, cfg, data, device)
        teacher = load_teacher_on_all(path, args.teacher_arch)
        if teacher.multi_crop and cfg.image_size > SMALL:
            vars(cfg).update(SWAV)
            if args.small_crops is not None:
                cfg.small_crops = args.small_crops
            print0(f"a teacher of SwAV's kind: crop scale {cfg.crop_scale}, as in its training, "
                   f"and {cfg.small_crops} small crops (--small-crops)")
        if cfg.small_crops:
            teacher.check_image_size(cfg.small_size)
        teacher.check_image_size(cfg.image_size)
    if args.dim and args.dim != teacher.dim:
        raise InputError(f"--dim {args.dim}: the teacher's embeddings have {teacher.dim} numbers, "
                         "and so must the student's; leave --dim out")
    return teacher.to(device, memory_format=torch.channels_last), seconds


def train_teacher(args, cfg, data, device):
    """Stage 1: a teacher, kept in a folder named after all that makes it; its file and seconds."""
    if cfg.dataset == "imagenet":
        raise InputError("no --teacher: use a published one, such as MoCo-v2's (README has the "
                         "address), or train one for days, by --method moco --arch resnet50")
    teacher_cfg = make_config(args, cfg.teacher_method, arch=cfg.teacher_arch, dim=cfg.dim,
                              epochs=cfg.teacher_epochs, init=None)
    identity = json.dumps([run_identity(teacher_cfg, data), cfg.max_steps], sort_keys=True)
    name = f"{cfg.dataset}-{cfg.teacher_method}-{cfg.teacher_arch}"
    teacher_cfg.out = f"runs/teachers/{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    fit_to_data(teacher_cfg, data)
    started = [from_main_process(has_checkpoint, out) for out in (cfg.out, teacher_cfg.out)]
    if started == [True, False]:
        raise InputError(f"{cfg.out} holds a student of another teacher than these settings would "
                         "train; name that one with --teacher, or another --out")
    print0(f"\nstage 1: no --teacher given, so a {cfg.teacher_arch} is trained on the same images, "
           f"{label_use(cfg.teacher_method == 'supervised')}; kept in {teacher_cfg.out}")
    print_settings(teacher_cfg, data)
    seconds = train(teacher_cfg, data, device)
    return f"{teacher_cfg.out}/encoder.pt", seconds


def print_settings(cfg, data):
    """Print the settings of a stage, and the loss of chance."""
    settings = {key: value for key, value in sorted(vars(cfg).items()) if value is not None}
    for key in ("method", "arch", "out", "compare", "profile", "data", "dataset"):
        settings.pop(key, None)                                 # said elsewhere
    text = " ".join(f"{key}={value}" for key, value in settings.items())
    print0(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  "))
    entries = len(data.classes) if cfg.method == "supervised" else cfg.queue_size + 1
    small = ", and as much of the small crops" if cfg.small_crops else ""
    print0(f"  chance among {entries:,} entries: a loss of {math.log(entries):.2f}{small}")


def profile(cfg, data, device, teacher):
    """Time some real steps by torch.profiler, in a folder that is thrown away; leave the trace."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")             # its log lines say nothing here
    profiler = torch.profiler.profile()
    with tempfile.TemporaryDirectory() as folder, profiler:
        settings = {**vars(cfg), "out": folder, "max_steps": 24, "eval_every": 0}
        train(argparse.Namespace(**settings), data, device, teacher)
    networks = ("teacher", "student", "backward", "update")
    stages = ("reading", "augmentation", "loss", *networks)
    events = [e for e in profiler.events() if e.name in stages and e.device_type == DeviceType.CPU]
    starts = [event.time_range.start for event in events if event.name == "reading"]
    if len(starts) < 2:
        raise InputError("--profile: the run has one step, which cannot be timed; raise --epochs")
    ms = {"whole step": np.median(np.diff(sorted(starts))) / 1e3}
    for stage in stages:
        times = [max(e.cpu_time_total, e.device_time_total) for e in events if e.name == stage]
        ms[stage] = np.median(times) / 1e3
    ms["networks"] = sum(ms[stage] for stage in networks)
    print0(f"\n{'':14s}ms a step   share  images/s")
    for name, value in ms.items():
        speed = cfg.batch_size / value * 1e3
        print0(f"{name:14s}{value:9.2f}{value / ms['whole step']:8.0%}{speed:10.0f}")
    if device.type == "cuda":
        print0(f"peak memory on the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if is_main_process():
        trace = f"trace-{cfg.dataset}-{cfg.method}-{cfg.arch}.json"
        profiler.export_chrome_trace(trace)
        print(f"wrote {trace}; open it in chrome://tracing or ui.perfetto.dev")


def main(argv=None):
    torch.set_flush_denormal(True)          # p_t has numbers below 1e-38, where CPUs are very slow
    for number in STOP_SIGNALS:
        signal.signal(number, STOP.receive)
    args = parse_args(argv)
    cfg = make_config(args, args.method)
    device = init_distributed(args.device)
    data = load_data_on_all(cfg.dataset, cfg.data, cfg.image_size, cfg.subset, cfg.seed)
    print0(f"{data}; {rank_and_world_size()[1]} process(es) on {device.type}, networks in "
           f"{network_dtype(cfg, device)}, frozen: {network_dtype(cfg, device, frozen=True)}")
    untrained = new_encoder(cfg)            # a network that cannot be used fails early
    state = "as it starts" if cfg.init else "untrained"
    rows = [dict(name=f"{cfg.arch}, {state}", encoder=untrained, seconds=None)]
    students = [cfg]
    if args.compare:
        rivals = ["moco", "supervised"] if data.classes else ["moco"]
        students += [make_config(args, rival, out=f"{cfg.out}/{rival}") for rival in rivals
                     if rival != cfg.method]
    for student in students:
        fit_to_data(student, data)

    teacher = None
    if cfg.method == "seed":
        teacher, seconds = get_teacher(args, cfg, data, device)
        cfg.dim = teacher.dim
        print0(f"\nteacher: {teacher.provenance}, {label_use(teacher.used_labels)}")
        rows.append(dict(name=f"{teacher.arch}, the teacher", encoder=teacher, seconds=seconds))
    if args.profile:
        print_settings(cfg, data)
        return profile(cfg, data, device, teacher)
    for student in students:
        name = f"{student.arch} by {METHOD_NAMES[student.method]}"
        print0(f"\n{'stage 2: ' if student.method == 'seed' else ''}{name}, in {student.out}")
        print_settings(student, data)
        seconds = train(student, data, device, teacher if student.method == "seed" else None)
        rows.append(dict(name=name, encoder=f"{student.out}/encoder.pt", seconds=seconds))
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_main_process():
        if not cfg.init:                    # as the other rows, statistics of its own
            rows[0]["encoder"] = average_batch_norm(untrained.to(device), data.train, cfg.workers)
        print_table(rows, data, device, cfg.workers, cfg.out)


if __name__ == "__main__":
    run_command(main)
