"""Train a small network by SEED; or by MoCo-v2 or with labels, to compare.

    torchrun train.py --arch mobilenet_v3_large                      # built-in shapes, no network, a laptop will do
    python train.py --arch mobilenet_v3_large                        # the same without torchrun
    torchrun train.py --dataset cifar10 --arch mobilenet_v3_large    # one GPU; makes a MoCo-v2 teacher first
    torchrun --nproc_per_node=8 train.py --dataset imagenet --data /imagenet --arch mobilenet_v3_large \\
        --teacher moco_v2_800ep_pretrain.pth.tar                     # eight GPUs, the paper's setting

A run leaves a folder: encoder.pt (what you take away), last.pt (the same command again resumes from it), log.csv,
args.json, results.json, views.png, neighbours.png.  Batch sizes are global: the same command sees the same batches on
any number of processes.

Read on: recipes and flags; the process group; batches; the loop (`Trainer.step`, `train`); what is kept on disk
(`TeacherCache`, `RunFolder`); the benchmark; the stages (`main`).
"""
import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from probe import (DATASETS, SMALL, Crops, Parser, evaluate, load_data, pick_device, report, save_neighbours, save_views,
                   with_labels)
from seed import (SEED, Encoder, InputError, MoCo, Supervised, augment, info_nce, load_teacher, read_checkpoint,
                  save_encoder, seed_loss, to_device, uniforms)

PUBLISHED = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"
NAMES = dict(seed="SEED", moco="MoCo-v2", supervised="supervision")
LOG_EVERY = 10                                  # steps between two rows of log.csv
KNN_SUBSET, EVAL_SUBSET = 10_000, 50_000        # pictures of a split used for kNN on the way, and for the table

# ---------------------------------------------------------------------------------------- recipes and flags
# What suits a data set, then what a method changes in it; most entries have a flag, which overrides them.  ImageNet's are
# the paper's.  `lr` is the rate at batch 256 and grows with the batch.  tau_s is MoCo's temperature too.
PAPER = dict(image_size=224, small_images=False, crop_scale=(0.2, 1.0), blur=True, dim=128, hidden_dim=None,
             epochs=200, warmup_epochs=5, batch_size=256, lr=0.03, weight_decay=1e-4,
             queue_size=65536, tau_s=0.2, tau_t=0.01, key_momentum=0.999, eval_every=10,
             teacher_arch="resnet50", teacher_method="moco", teacher_epochs=200, view_epochs=None)
TINY = PAPER | dict(image_size=32, blur=False, epochs=20, warmup_epochs=1, batch_size=128, queue_size=2048,
                    eval_every=5, teacher_arch="resnet18", teacher_epochs=12)
RECIPES = {
    "imagenet": dict(common=PAPER),                                             # and folders of more than 64 px
    "shapes": dict(common=TINY | dict(epochs=14, teacher_epochs=8, teacher_method="supervised"),
                   seed=dict(lr=0.4, tau_t=0.05), moco=dict(lr=0.06, queue_size=256, key_momentum=0.99),
                   supervised=dict(lr=0.1)),
    "folder": dict(common=TINY, seed=dict(lr=0.1, tau_t=0.05), moco=dict(lr=0.06, key_momentum=0.99),
                   supervised=dict(lr=0.1)),
    "cifar": dict(common=TINY | dict(small_images=True, epochs=200, warmup_epochs=5, batch_size=256, queue_size=4096,
                                     eval_every=20, teacher_epochs=200),
                  seed=dict(lr=0.2), moco=dict(lr=0.03, weight_decay=5e-4, key_momentum=0.99, tau_s=0.1),
                  supervised=dict(lr=0.1, weight_decay=5e-4)),
}
# Flags that hold for --method alone, not for its teacher and rivals; and flags that may change before a run resumes.
OF_THE_METHOD = ("lr", "weight_decay", "queue_size", "tau_s", "tau_t", "dim", "hidden_dim", "view_epochs")
MAY_CHANGE = ("workers", "device", "data", "out", "teacher", "eval_every", "max_steps", "compare", "compile",
              "teacher_cache", "benchmark")


def parse_flags(argv=None):
    """The flags as given; None where the recipe decides."""
    parser = Parser(description=__doc__, epilog="Where no default is shown, the data set's recipe decides.")
    flag = parser.add_argument_group("what to train").add_argument
    flag("--method", choices=tuple(NAMES), default="seed",
         help="seed distils; moco is the baseline and makes teachers without labels; supervised is the upper bound")
    flag("--arch", default="mobilenet_v3_large", help="a torchvision classification network")
    flag("--dim", type=int, help="width of the embedding; a student takes its teacher's")
    flag("--hidden-dim", type=int, help="hidden width of the projection head; 0: no hidden layer; as wide as the features "
         "if not given; 2048 did better for ResNet-18 on ImageNet")
    flag("--small-images", action=argparse.BooleanOptionalAction,
         help="keep the stem's resolution, for 32-64 px: much better and much slower, so give it a GPU")

    flag = parser.add_argument_group("the teacher").add_argument
    flag("--teacher", metavar="PATH_OR_URL", help="a checkpoint; without it one is trained first, on the same data")
    flag("--teacher-arch", help="its network where the file does not say; or the network to train")
    flag("--teacher-method", choices=("moco", "supervised"), help="how to train it; supervised looks at labels")
    flag("--teacher-epochs", type=int, help="how long to train it; a better teacher makes a better student")
    flag("--teacher-cache", metavar="DIR", help="keep the teacher's embeddings of all views there, for the next student "
         "(SEED alone); on ImageNet 0.66 GB an epoch of views")
    flag("--view-epochs", type=int, metavar="E", help="views of E epochs, over and over: a small cache, less variety")

    flag = parser.add_argument_group("the data").add_argument
    flag("--dataset", choices=DATASETS, default="shapes", help="shapes is drawn in code; folder: any pictures")
    flag("--data", default="data", metavar="DIR", help="where the pictures are; CIFAR is downloaded there")
    flag("--image-size", type=int, help=f"side of a view in pixels; up to {SMALL} the data set is kept in memory")
    flag("--subset", type=int, metavar="N", help="train on N pictures, chosen by the seed")
    flag("--workers", type=int, help="processes that read pictures from disk; raise it if the run waits for data")

    flag = parser.add_argument_group("the optimisation").add_argument
    flag("--epochs", type=int, help="passes over the data; small networks gain from more")
    flag("--max-steps", type=int, help="stop each stage after so many steps; the schedule stays that of the whole run")
    flag("--batch-size", type=int, help="pictures a step, over all processes")
    flag("--lr", type=float, help="learning rate at batch 256; scaled by batch/256")
    flag("--weight-decay", type=float, help="on everything, as in the paper")
    flag("--warmup-epochs", type=float, help="epochs of linear warm-up; raise it if the loss explodes early")
    flag("--queue-size", type=int, metavar="K", help="entries to rank; about 5%% of the data does; capped at its size")
    flag("--tau-s", type=float, help="the student's temperature, and MoCo's")
    flag("--tau-t", type=float, help="the teacher's; lower: more like contrastive learning; higher: neighbours count")
    flag("--seed", type=int, default=0, help="of weights, views, order and subset")

    flag = parser.add_argument_group("the run").add_argument
    flag("--out", metavar="DIR", help="the run's folder; runs/DATASET-METHOD-ARCH if not given")
    flag("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
         help="of the networks; auto: bf16 on a GPU that has it, else fp16; on a CPU fp32, but bf16 for the teacher of "
         "pictures above 32 px where there are matrix units for it; the loss is float32 always")
    flag("--compile", action="store_true", help="torch.compile the networks; pays off in long runs")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--eval-every", type=int, help="epochs between two looks at kNN; 0: none")
    flag("--benchmark", action="store_true", help="train nothing: measure where a step's time goes, and print "
         "a table; without --teacher a random one is timed")
    flag("--compare", action="store_true", help="also train the same student by MoCo-v2 and with labels, for the table")
    return parser.parse_args(argv)


def resolve(args, method, **changes):
    """All settings of one stage: the data set's recipe, the method's entries, the flags, the stage's own changes."""
    name = "cifar" if args.dataset.startswith("cifar") else args.dataset
    if name == "folder" and (args.image_size or 224) > SMALL:
        name = "imagenet"
    recipe = RECIPES[name]["common"] | RECIPES[name].get(method, {})
    flags = {key: value for key, value in vars(args).items() if method == args.method or key not in OF_THE_METHOD}
    given = {key: value for key, value in flags.items() if value is not None}
    s = SimpleNamespace(**(flags | recipe | given | dict(method=method) | changes))
    for key in ("epochs", "teacher_epochs", "batch_size", "image_size", "queue_size", "dim", "subset", "max_steps",
                "view_epochs", "lr", "tau_s", "tau_t"):
        if getattr(s, key) is not None and not 0 < getattr(s, key) < math.inf:
            raise InputError(f"--{key.replace('_', '-')} must be above 0, got {getattr(s, key)}")
    for key in ("weight_decay", "warmup_epochs", "hidden_dim", "workers", "eval_every", "seed"):
        if getattr(s, key) is not None and not 0 <= getattr(s, key) < math.inf:
            raise InputError(f"--{key.replace('_', '-')} must not be negative, got {getattr(s, key)}")
    if args.teacher_cache and args.method != "seed":
        raise InputError("--teacher-cache is for --method seed; the others have no teacher")
    s.warmup_epochs = min(s.warmup_epochs, s.epochs / 2)
    s.out = s.out or f"runs/{s.dataset}-{s.method}-{s.arch}"
    if s.workers is None:
        s.workers = min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return s


def identity(s, data):
    """What makes a run this run and no other: its settings and a hash of its data; plain values, as JSON keeps them."""
    return json.loads(json.dumps({k: v for k, v in vars(s).items() if k not in MAY_CHANGE} | {"pictures": data.key}))


# ---------------------------------------------------------------------------------------- the process group
def join_team(device):
    """This process's rank, the number of ranks, and its device; torchrun says so in the environment."""
    env = lambda name, default: int(os.environ.get(name, default))
    rank, ranks, local = env("RANK", 0), env("WORLD_SIZE", 1), env("LOCAL_RANK", 0)
    device, gpus = pick_device(device), torch.cuda.device_count()
    if ranks != env("LOCAL_WORLD_SIZE", 1):
        raise InputError("several machines are not supported; start torchrun on one, with --nproc_per_node")
    if ranks > 1 and device.type == "mps":
        raise InputError("several processes need GPUs of NVIDIA's or --device cpu")
    if device.type == "cuda":
        if ranks > gpus:
            raise InputError(f"{ranks} processes but {gpus} GPUs; lower --nproc_per_node")
        if ranks == 1 and gpus > 1:
            print(f"note: {gpus - 1} GPUs stand idle; torchrun --nproc_per_node={gpus} {shlex.join(sys.argv)}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True                                   # try out which convolution is fastest
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2),
                                device_id=device if device.type == "cuda" else None)
    return SimpleNamespace(rank=rank, ranks=ranks, device=device)


def is_first():
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(*words):
    """Print, once and not from every rank."""
    if is_first():
        print(*words, flush=True)


@contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others do: what it downloads or writes, they find."""
    if dist.is_initialized() and not is_first():
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and is_first():
            dist.barrier()


def autocast_dtype(s, device, frozen=False):
    """The dtype networks compute in.  On a CPU with matrix units for bf16 a frozen network, which only goes forward, is
    about twice as fast in it, unless its layers are as small as 32 px make them; small networks in training are slower."""
    if s.precision != "auto":
        return dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[s.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    units = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if frozen and units and (s.image_size > 32 or s.small_images) else torch.float32


# --------------------------------------------------------------------------------------------- the batches
def plan(n, s, team, steps):
    """(view epoch, this rank's picture numbers) for each step.  An epoch's order follows from (seed, epoch); of each
    global batch rank r of R takes every R-th picture from r on, so any number of ranks sees the same batches.  With
    --view-epochs E the views of epoch e are those of e mod E; the order is always e's own."""
    per_epoch, ordered = n // s.batch_size, None
    for step in steps:
        epoch, k = divmod(step, per_epoch)
        if ordered != epoch:
            order, ordered = np.random.default_rng((s.seed, epoch)).permutation(n), epoch
        mine = order[k * s.batch_size:(k + 1) * s.batch_size][team.rank::team.ranks]
        yield epoch % s.view_epochs if s.view_epochs else epoch, mine


def read(train, s, team, count, steps):
    """For each step: view epoch, picture numbers int64 [B], and for each of `count` views what it is made from, uint8
    [B, 3, H, W] on the device; decoded pictures lie there, and a batch is an index.  From disk, workers send crops."""
    planned = plan(len(train), s, team, steps)
    if train.pixels is not None:
        pixels = train.pixels.to(team.device)
        for epoch, index in planned:
            yield epoch, index, [pixels[to_device(torch.from_numpy(index), team.device)]] * count
    else:
        asked = ([(epoch, int(i)) for i in index] for epoch, index in planned)
        loader = DataLoader(Crops(train.files, s.image_size, count, s.seed, s.crop_scale), batch_sampler=asked,
                            num_workers=s.workers, pin_memory=team.device.type == "cuda")
        for crops, epoch, index in loader:
            yield int(epoch[0]), index.numpy(), to_device(crops, team.device).unbind(1)


def make_views(train, s, epoch, index, sources):
    """A list of float [B, 3, S, S] out of what `read` gives: all that follows the crop happens on the device."""
    scale = s.crop_scale if train.pixels is not None else None                  # crops from disk are cut out already
    views = [augment(source, uniforms(s.seed, epoch, index, view), s.image_size, scale, s.blur)
             for view, source in enumerate(sources)]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def batches(train, s, team, count, steps):
    """For each step, on the device: `count` views, a list of float [B, 3, S, S]; labels, int64 [B] or None; and which
    views they are: view epoch and picture numbers."""
    for epoch, index, sources in read(train, s, team, count, steps):
        labels = None if train.labels is None else to_device(train.labels[index], team.device)
        yield make_views(train, s, epoch, index, sources), labels, (epoch, index)


# ------------------------------------------------------------------------------------------------ the loop
def build(s, data, teacher, team):
    """The method with its networks, on the device; every rank builds the same weights."""
    torch.manual_seed(s.seed)
    encoder = Encoder(s.arch, s.dim, s.hidden_dim, s.small_images, s.image_size)
    if s.method == "seed":
        method = SEED(encoder, teacher, s.queue_size, s.tau_s, s.tau_t)
    elif s.method == "moco":
        parts = max(1, min(8, s.batch_size // team.ranks // 32))                # batch norm over about 32, as on 8 GPUs
        method = MoCo(encoder, s.queue_size, s.key_momentum, s.tau_s, parts)
    else:
        method = Supervised(encoder, len(data.classes))
    return method.to(team.device, memory_format=torch.channels_last).train()


def lr_at(step, s, per_epoch):
    """Learning rate: linear warm-up, then half a cosine down to 0; scaled with the batch."""
    warmup, total = s.warmup_epochs * per_epoch, s.epochs * per_epoch
    peak = s.lr * s.batch_size / 256
    if step < warmup:
        return peak * min(1, (step + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Trainer:
    """A method in training: its networks, its optimiser, and the step that moves them."""

    def __init__(self, s, data, team, teacher=None):
        self.s, self.team, self.per_epoch = s, team, len(data.train) // s.batch_size
        self.teacher, self.cache = teacher, None
        self.method = self.model = build(s, data, teacher, team)
        self.dtype, self.teacher_dtype = (autocast_dtype(s, team.device, frozen) for frozen in (False, True))
        learning = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, s.lr, momentum=0.9, weight_decay=s.weight_decay)
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=self.dtype == torch.float16)

    def start(self):
        """Compile and distribute, once the weights are in place."""
        if self.s.compile:
            for name in ("encoder", "teacher", "key_encoder"):
                if hasattr(self.method, name):
                    getattr(self.method, name).compile()
        if self.team.ranks > 1:
            self.model = DistributedDataParallel(self.method, broadcast_buffers=False)

    def autocast(self, dtype):
        """The block in which networks compute in `dtype`."""
        return torch.autocast(self.team.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def ask_teacher(self, view, which):
        """The teacher's embeddings of view [B, 3, S, S], float32 [B, D]: kept ones if there is a cache."""
        with self.autocast(self.teacher_dtype):
            return self.cache(view, *which) if self.cache else self.teacher(view)

    def update(self, loss):
        """Backward, and move the weights."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def step(self, number, views, labels, which):
        """One training step: views, a list of [B, 3, S, S]; labels [B]; which views they are, for the cache."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(number, self.s, self.per_epoch)
        step_seed = (self.s.seed * 2**32 + number) * self.team.ranks + self.team.rank   # for dropout and MoCo's shuffle
        torch.manual_seed(step_seed % 2**63)
        answers = dict(teacher_z=self.ask_teacher(views[0], which)) if self.teacher else {}
        with self.autocast(self.dtype):
            loss, stats = self.model(views, labels, **answers)
        self.update(loss)
        self.method.finish_step()                                               # now the queue may move
        return loss, stats, group["lr"]


def train(s, data, team, teacher=None):
    """Train one network by `s.method`; resumes where its folder was left.  Returns the seconds of training so far."""
    trainer = Trainer(s, data, team, teacher)
    total = min(s.epochs * trainer.per_epoch, s.max_steps or math.inf)
    folder = RunFolder(s, data, trainer)
    start, seconds = folder.resume()
    if start >= total:
        say(f"finished before, after {start} steps: {folder.path}/encoder.pt; delete that folder to train anew")
        return seconds
    trainer.start()
    if teacher and s.teacher_cache:
        trainer.cache = TeacherCache(s.teacher_cache, s, data, teacher, trainer.teacher_dtype)
        trainer.cache.ask_for_room()
    progress, encoder = Progress(s, folder.path, start, total, trainer.per_epoch, seconds), trainer.method.encoder
    stream = batches(data.train, s, team, trainer.method.views_needed, range(start, total))
    for step in range(start + 1, total + 1):
        loss, stats, lr = trainer.step(step - 1, *progress.wait_for(stream))
        progress.add(loss, stats)                                               # waits for nothing
        epoch, rest = divmod(step, trainer.per_epoch)
        save = not rest or step == total
        if save or step % LOG_EVERY == 0:
            row = progress.stop_clock(step, lr)
            if is_first():
                look = data.judged and s.eval_every and not rest and epoch % s.eval_every == 0
                scores = evaluate(encoder, data, team.device, s.workers, KNN_SUBSET, linear=False)[0] if look else {}
                progress.write_row(**row, knn=scores.get("knn"))
                if save:
                    folder.save(step, progress.seconds)
            progress.start_clock()
    return progress.seconds


class TeacherCache:
    """The teacher's place taken by its answers: what it said of a view once, it would say again.

    A view is a pure function of (seed, epoch, index), so its embedding can be kept, and the next student, temperature or
    queue length does without the teacher.  DIR/z.float32 is a memory-mapped array, float32 [E, N, D]; a row whose norm
    is not 1 (not yet written, or torn by a kill) has its batch computed again.  DIR/fingerprint.json says whose answers
    to what they are.  What a fingerprint cannot know (changed code, or pictures changed under their old names) shows in
    the first batch that is kept as a whole, for which the teacher is asked all the same.

    Raises: InputError if DIR holds other answers, or if the disk has no room.
    """

    def __init__(self, path, s, data, teacher, dtype):
        self.path, self.teacher, self.trusted = Path(path), teacher, False
        names = ("dataset", "pictures", "seed", "subset", "image_size", "crop_scale", "blur")
        here = {name: value for name, value in identity(s, data).items() if name in names}
        here |= dict(teacher=fingerprint(teacher), dim=teacher.dim, precision=str(dtype))
        self.shape = (min(s.view_epochs or s.epochs, s.epochs), len(data.train), teacher.dim)       # [E, N, D]
        note, self.file = self.path / "fingerprint.json", self.path / "z.float32"
        with rank_zero_first():
            self.path.mkdir(parents=True, exist_ok=True)
            if not note.exists() and not self.file.exists():
                (self.path / "fingerprint.tmp").write_text(json.dumps(here, indent=1) + "\n")
                os.replace(self.path / "fingerprint.tmp", note)
            there = json.loads(note.read_text()) if note.exists() else {}
            if other := differences(there, here):
                raise InputError(f"--teacher-cache {self.path} holds other answers ({other}); name another folder")
            self.file.touch()
            self.rows = np.memmap(self.file, np.float32, "r+", shape=self.shape)    # a shorter file grows; new rows are 0

    def ask_for_room(self):
        """Say how large the file will be, and refuse if the disk is too small (a full one would kill the run)."""
        size, taken = 4 * math.prod(self.shape), getattr(self.file.stat(), "st_blocks", 0) * 512
        free = shutil.disk_usage(self.path).free + taken
        if size > free:
            raise InputError(f"--teacher-cache {self.path} would take {size / 1e9:.2f} GB and has room for "
                             f"{free / 1e9:.2f}; lower --view-epochs")
        say(f"  teacher cache: {' x '.join(map(str, self.shape))} float32, {size / 1e9:.2f} GB in the end, in {self.path}")

    @torch.no_grad()
    def __call__(self, view, epoch, index):
        """The teacher's embeddings, float32 [B, D], of `view` [B, 3, S, S]: pictures `index` [B] in view epoch `epoch`."""
        kept = torch.from_numpy(self.rows[epoch, index])                        # [B, D], a copy
        whole = bool(((kept.norm(dim=1) - 1).abs() < 1e-4).all())
        if whole and self.trusted:
            return to_device(kept, view.device)
        z = self.teacher(view)                                                  # [B, D]
        if whole and not (kept * z.cpu()).sum(1).min() > 0.99:
            raise InputError(f"--teacher-cache {self.path}: the teacher answers differently now (other pictures or code?); "
                             "delete that folder")
        self.rows[epoch, index] = z.cpu().numpy()
        self.trusted = self.trusted or whole
        return z


class RunFolder:
    """What training leaves on disk: args.json, views.png, last.pt (to resume), encoder.pt (to take away)."""

    def __init__(self, s, data, trainer):
        self.path, self.s, self.data = Path(s.out), s, data
        self.method, self.optimizer, self.scaler = trainer.method, trainer.optimizer, trainer.scaler
        self.teacher = trainer.teacher
        self.identity = identity(s, data) | dict(teacher=self.teacher and fingerprint(self.teacher))

    def resume(self):
        """(steps done, seconds spent); (0, 0) in a new folder."""
        state = read_run(self.path, self.identity)
        if state is None:
            if is_first():
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / "args.json").write_text(json.dumps(vars(self.s), indent=1) + "\n")
                save_views(self.path / "views.png", self.data, self.s.crop_scale, self.s.blur, self.s.seed)
            return 0, 0.0
        frozen = {key: value for key, value in self.method.state_dict().items() if key.startswith("teacher.")}
        self.method.load_state_dict(frozen | state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                                                     # empty but for fp16
            self.scaler.load_state_dict(state["scaler"])
        return state["step"], state["seconds"]

    def save(self, step, seconds):
        """Write encoder.pt, then last.pt, each aside and renamed: a kill at any moment leaves whole files, and a run
        that calls itself finished has its encoder.  The frozen teacher is not saved; its fingerprint is."""
        made = f"{NAMES[self.s.method]}, {step // (len(self.data.train) // self.s.batch_size)} epochs on {self.data.name}"
        made += f", teacher: {self.teacher.made}" if self.teacher else ""
        save_encoder(self.path / "encoder.pt", self.method.encoder, made,
                     self.teacher.labels_seen if self.teacher else self.s.method == "supervised")
        weights = {key: value for key, value in self.method.state_dict().items() if not key.startswith("teacher.")}
        state = dict(method=weights, optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                     step=step, seconds=seconds, identity=json.dumps(self.identity))
        torch.save(state, self.path / "last.pt.tmp")
        os.replace(self.path / "last.pt.tmp", self.path / "last.pt")


def read_run(path, here):
    """The checkpoint in folder `path`, None if there is none yet; InputError if it is of another run than `here`, the
    identity of this one (or a part of it)."""
    if not (path / "last.pt").exists():
        if (path / "encoder.pt").exists():
            raise InputError(f"{path} holds an encoder.pt but no last.pt to resume from; delete it or name another --out")
        return None
    state = read_checkpoint(path / "last.pt")
    if "identity" not in state:
        raise InputError(f"{path / 'last.pt'} is not a run's checkpoint; name another --out, or delete it")
    there = json.loads(state["identity"])
    if other := differences(there, here):
        raise InputError(f"{path} holds a run with other settings ({other}); use those or another --out")
    return state


def differences(there, here):
    """Where dict `there` says otherwise than dict `here`, in words; "" if nowhere."""
    other = [key for key in here if there.get(key) != here[key]]
    return "; ".join(f"{key} {there.get(key)} there, {here[key]} here" for key in other)


def fingerprint(module):
    """A hash of all weights and buffers."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


class Progress:
    """What a run says: rows of log.csv (means over the steps since the last row) and a line on the screen."""

    def __init__(self, s, path, start, total, per_epoch, seconds):
        self.s, self.total, self.per_epoch, self.seconds = s, total, per_epoch, seconds
        self.path, self.printed, self.log, self.kept = path / "log.csv", 0.0, None, []
        if start:                                                               # rows after the checkpoint come again
            say(f"resuming at step {start} of {total}")
            if self.path.exists():
                with open(self.path, newline="") as file:
                    self.kept = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        self.start_clock()

    def start_clock(self):
        """From here on time counts as training."""
        self.sums, self.count, self.waited, self.clock = {}, 0, 0.0, time.perf_counter()

    def wait_for(self, stream):
        """The next batch; counts the time that it was waited for."""
        before = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - before
        return batch

    def add(self, loss, stats):
        """Count one step in; waits for nothing."""
        for name, value in (dict(loss=loss.detach()) | stats).items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def stop_clock(self, step, lr):
        """A row of the log: means over the steps since the last one and over the ranks; waits for the device."""
        sums = torch.stack(list(self.sums.values())).float() / self.count
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        means = dict(zip(self.sums, sums.tolist()))
        if not math.isfinite(means["loss"]):
            raise InputError(f"the loss of {self.s.arch} is not finite at step {step}; lower --lr, raise --warmup-epochs, "
                             "or take --precision fp32")
        took = time.perf_counter() - self.clock
        self.seconds += took
        return dict(step=step, epoch=step / self.per_epoch, **means, lr=lr, waiting=self.waited / took,
                    images_per_s=self.count * self.s.batch_size / took)

    def write_row(self, **row):
        """Append a row to log.csv, and print it."""
        if self.log is None:
            file = open(self.path, "w", newline="", buffering=1)                # a line at a time: nothing is lost
            self.log = csv.DictWriter(file, row)
            self.log.writeheader()
            self.log.writerows(self.kept)
        self.log.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self.print_line(**row)

    def print_line(self, step, epoch, loss, lr, images_per_s, waiting, knn, kl=None, **others):
        """One line: rewritten in place on a terminal; in a pipe a new one every ten seconds and at each look at kNN."""
        left = (self.total - step) * self.s.batch_size / images_per_s
        kl = "" if kl is None else f"  KL {kl:.3f}"
        knn = "" if knn is None else f"  kNN {knn:.1f}%"
        text = (f"{step / self.total:4.0%}  epoch {epoch:.1f}/{self.s.epochs}  loss {loss:.3f}{kl}  lr {lr:.3g}  "
                f"{images_per_s:.0f} images/s  waiting {waiting:.0%}  ETA {int(left) // 60}:{int(left) % 60:02d}{knn}")
        keep = knn or step == self.total
        if sys.stdout.isatty():                                                 # where a wrapped line cannot be rewritten
            text = text if keep else text[:shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{text}", end="\n" if keep else "", flush=True)
        elif keep or time.perf_counter() - self.printed > 10:
            print(text, flush=True)
            self.printed = time.perf_counter()


# ------------------------------------------------------------------------------------------- the benchmark
def timed(work, device, calls):
    """Seconds that a call of `work` takes, over some calls in a row; a GPU is asked for its own clock."""
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    if device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - start) / calls


def parts_of_a_step(trainer, data):
    """What a step consists of, by name: functions that do one part, again and again, on one batch."""
    s, team, method = trainer.s, trainer.team, trainer.method
    epoch, index, sources = next(read(data.train, s, team, method.views_needed, [0]))
    views = make_views(data.train, s, epoch, index, sources)
    with torch.no_grad(), trainer.autocast(trainer.dtype):
        key = method.encoder(views[0])                                          # [B, D], any unit rows

    def forward_alone(network, dtype):
        with torch.no_grad(), trainer.autocast(dtype):
            network(views[-1])

    def student():
        with trainer.autocast(trainer.dtype):
            loss = (method.encoder(views[0]) * key).sum()                       # any gradient
        trainer.update(loss)

    def loss_and_queue():
        z, queue = key.clone().requires_grad_(), method.queue.features
        seed = s.method == "seed"
        loss = seed_loss(z, key, queue, s.tau_s, s.tau_t, {}) if seed else info_nce(z, key, queue, s.tau_s, {})
        loss.backward()
        method.latest = key
        method.finish_step()

    parts = {"augmentation": lambda: make_views(data.train, s, epoch, index, sources)}
    if s.method == "seed":
        parts |= {"teacher": lambda: forward_alone(method.teacher, trainer.teacher_dtype)}
    if s.method == "moco":
        parts |= {"key encoder": lambda: forward_alone(method.key_encoder, trainer.dtype)}
    parts |= {"student: forward, backward, update": student}
    return parts | ({} if s.method == "supervised" else {"loss and queue": loss_and_queue})


def benchmark(s, data, team, teacher=None, repeats=7):
    """Print where a step's time goes: its parts alone, then whole steps on fresh batches; medians."""
    s = SimpleNamespace(**vars(s) | dict(view_epochs=1))
    trainer, device = Trainer(s, data, team, teacher), team.device
    trainer.start()
    end, views_needed = s.epochs * trainer.per_epoch, trainer.method.views_needed       # where the schedule's rate is 0
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0                                                       # so nothing moves
    from_disk, calls = data.train.pixels is None, 10 if device.type == "cuda" else 1
    if not from_disk:
        data.train.pixels = data.train.pixels.to(device)                        # once, and not once a stream
    ahead = max(calls, 2 * s.workers) if from_disk else calls                   # batches that may be ready beforehand
    steps = [step % trainer.per_epoch for step in range((repeats + 1) * ahead)]

    def whole_steps(cache):
        for batch in batches(data.train, s, team, views_needed, steps):
            trainer.cache = cache
            yield trainer.step(end, *batch)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        reading = {"reading": read(data.train, s, team, views_needed, steps)}
        whole = {"whole step": whole_steps(None)}
        if teacher:
            cache = TeacherCache(folder, s, data, teacher, trainer.teacher_dtype)
            for epoch, index in plan(len(data.train), s, team, steps):
                cache.rows[epoch, index] = teacher.dim**-0.5                    # answers as good as any, for the clock
            cache.trusted = True
            whole["whole step, teacher cached"] = whole_steps(cache)
        streams, parts = reading | whole, parts_of_a_step(trainer, data)
        times = {name: [] for name in [*reading, *parts, *whole]}
        # In turns, so that all see the same weather; but workers would read on while others are timed, so they go alone.
        for names in [[*parts], *([name] for name in streams)] if from_disk else [[*times]]:
            for name in names * (repeats + 1):
                work, n = (partial(next, streams[name]), ahead) if name in streams else (parts[name], calls)
                times[name].append(timed(work, device, n))
            for name in streams.keys() & names:
                streams[name].close()
    print_table({name: statistics.median(values[1:]) for name, values in times.items()}, s.batch_size)
    if device.type == "cuda":
        say(f"peak memory on the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def print_table(t, batch_size):
    """Print the benchmark's table; t: seconds a step, by part."""
    say(f"\n{'':36s}ms a step  images/s")
    for name, seconds in t.items():
        say(f"{name:36s}{1e3 * seconds:9.2f}{batch_size / seconds:10.0f}")
    student = t["student: forward, backward, update"]
    networks = student + t.get("teacher", t.get("key encoder", 0))
    for name, floor in (("whole step", networks), ("whole step, teacher cached", student)):
        if name in t:
            say(f"{name}: its networks alone take {1e3 * floor:.2f} ms, {floor / t[name]:.2f} of it")
    if "whole step, teacher cached" in t:
        factor = t["whole step"] / t["whole step, teacher cached"]
        say(f"a second student of this teacher trains {factor:.2f} times as fast")


# ---------------------------------------------------------------------------------------------- the stages
def check(s, data, team):
    """Refuse what cannot work before anything is trained; cap a queue that is too long."""
    if s.batch_size > len(data.train):
        raise InputError(f"--batch-size {s.batch_size} is larger than the {len(data.train):,} training pictures")
    if s.batch_size % team.ranks or s.batch_size < 2 * team.ranks:
        raise InputError(f"--batch-size {s.batch_size} must be a multiple of the {team.ranks} processes, "
                         "with 2 pictures each at least")
    if s.method == "supervised" and not data.classes:
        raise InputError(f"training with labels needs them, and {s.data} has none; use class folders, or "
                         "--teacher-method moco")
    if s.queue_size > len(data.train) and not s.benchmark:
        if s.method != "supervised":
            say(f"note: the queue of {s.queue_size:,} is capped at the {len(data.train):,} training pictures")
        s.queue_size = len(data.train)
    here = identity(s, data)
    here.pop("dim")                                                             # which a student takes from its teacher
    if not s.benchmark:
        read_run(Path(s.out), here)                                             # is the folder another run's?


def get_teacher(args, s, data, team):
    """The frozen teacher, from a file or trained here first and kept for the next student; and its seconds."""
    path, seconds = args.teacher, None
    if not path and args.benchmark:                                             # any weights take the same time
        teacher = Encoder(s.teacher_arch, s.dim, None, s.small_images, s.image_size).eval().requires_grad_(False)
        teacher.made, teacher.labels_seen = f"{s.teacher_arch}, random weights", False
        return teacher.to(team.device, memory_format=torch.channels_last), None
    if not path and s.dataset == "imagenet":
        raise InputError(f"no --teacher: use a published one, --teacher {PUBLISHED}, or train one for some days: "
                         "torchrun --nproc_per_node=8 train.py --method moco --arch resnet50 --dataset imagenet "
                         f"--data {s.data}")
    if not path:
        t = resolve(args, s.teacher_method, arch=s.teacher_arch, epochs=s.teacher_epochs, hidden_dim=None, dim=s.dim)
        what_makes_it = json.dumps(identity(t, data) | dict(max_steps=t.max_steps), sort_keys=True)
        t.out = f"runs/teachers/{t.dataset}-{t.method}-{t.arch}-{hashlib.sha256(what_makes_it.encode()).hexdigest()[:8]}"
        check(t, data, team)
        if (Path(s.out) / "last.pt").exists() and not (Path(t.out) / "last.pt").exists():
            raise InputError(f"{s.out} holds a student of another teacher than the one these settings would train; "
                             "name that one with --teacher, or another --out")
        say(f"\nstage 1: no --teacher given, so a {t.arch} is trained on the same pictures, "
            f"{with_labels(t.method == 'supervised')}; kept in {t.out}")
        announce(t, data)
        seconds, path = train(t, data, team), f"{t.out}/encoder.pt"
    with rank_zero_first():
        teacher = load_teacher(path, args.teacher_arch)
    teacher.try_size(s.image_size)
    return teacher.to(team.device, memory_format=torch.channels_last), seconds


def announce(s, data):
    """Print the resolved settings of a stage, and what its figures mean."""
    idle = dict(seed=("key_momentum",), moco=("tau_t",), supervised=("queue_size", "tau_s", "tau_t", "key_momentum"))
    hidden = ("method", "arch", "out", "compare", "benchmark", "data", "dataset", *idle[s.method])
    words = [f"{key}={value}" for key, value in sorted(vars(s).items())
             if value is not None and key not in hidden and not key.startswith("teacher")]
    say(textwrap.fill(" ".join(words), 116, initial_indent="  ", subsequent_indent="  "))
    choices = len(data.classes) if s.method == "supervised" else s.queue_size + 1
    part = f"; kNN on the way looks at {KNN_SUBSET:,} pictures" if len(data.train) > KNN_SUBSET else ""
    say(f"  a guess among {choices:,} costs a loss of {math.log(choices):.2f}{part}")


def table(rows, data, s, team):
    """Judge every row's encoder, print the table and keep it as results.json."""
    part = [f"{min(len(split), EVAL_SUBSET):,}" for split in (data.train, data.test)]
    rest = f" of {len(data.train):,}; probe.py takes all" if len(data.train) > EVAL_SUBSET else ""
    say(f"\njudging by {part[0]} training and {part[1]} test pictures{rest}")
    width, out, results = max(len(row["name"]) for row in rows), Path(s.out), []
    say(f"{'':{width}s}     kNN  linear  seconds  labels seen")
    for row in rows:
        encoder = row.pop("encoder")
        encoder = load_teacher(encoder) if isinstance(encoder, Path) else encoder
        encoder = encoder.to(team.device, memory_format=torch.channels_last)
        scores, material = evaluate(encoder, data, team.device, s.workers, EVAL_SUBSET)
        knn, linear = ("-" if value is None else f"{value:.1f}%" for value in (scores["knn"], scores["linear"]))
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else "-"
        say(f"{row['name']:{width}s}  {knn:>6s}  {linear:>6s}  {seconds:>7s}  {row['labels']}")
        results.append(row | scores)
        if row["name"].endswith(f"by {NAMES[s.method]}"):
            save_neighbours(out / "neighbours.png", *material, data.image_size)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    say(f"wrote {out}/: encoder.pt, log.csv, results.json, views.png, neighbours.png")


def main(argv=None):
    torch.set_flush_denormal(True)              # far from a neighbour p_t is below 1e-38, where CPUs count very slowly
    args = parse_flags(argv)
    s = resolve(args, args.method)
    team = join_team(args.device)
    pictures = Path(s.data).resolve()
    if s.dataset == "folder" and not (pictures / "train").is_dir() and pictures in Path(s.out).resolve().parents:
        raise InputError(f"the run's folder {s.out} would lie among the pictures of {s.data}; name another --out")
    with rank_zero_first():
        data = load_data(s.dataset, s.data, s.image_size, s.subset, s.seed)
    training, frozen = (autocast_dtype(s, team.device, frozen) for frozen in (False, True))
    also = f", its frozen teacher in {frozen}" if s.method == "seed" and frozen != training else ""
    say(f"{data}; {team.ranks} process{'es' * (team.ranks > 1)} on {team.device.type}, the network in {training}{also}"
        .replace("torch.", ""))
    torch.manual_seed(s.seed)
    untrained = Encoder(s.arch, s.dim, s.hidden_dim, s.small_images, s.image_size)     # also refuses a bad name early
    rows = [dict(name=f"{s.arch}, untrained", encoder=untrained, seconds=None, labels="no")]
    students = [s]
    if args.compare and not args.benchmark:
        others = ["moco"] + ["supervised"] * bool(data.classes)
        students += [resolve(args, method, out=f"{s.out}/{method}") for method in others if method != s.method]

    for student in students:
        check(student, data, team)

    teacher, labels = None, dict(moco="no", supervised="yes")
    if s.method == "seed":
        teacher, seconds = get_teacher(args, s, data, team)
        if args.dim and args.dim != teacher.dim:
            raise InputError(f"--dim {args.dim}: the teacher embeds in {teacher.dim} numbers, and so must the student; "
                             "leave --dim out")
        s.dim = teacher.dim
        say(f"\nteacher: {teacher.made}, {with_labels(teacher.labels_seen)}")
        seen = {True: "yes", False: "no", None: "unknown"}[teacher.labels_seen]
        labels["seed"] = "by its teacher" if teacher.labels_seen else seen
        rows.append(dict(name=f"{teacher.arch}, the teacher", encoder=teacher, seconds=seconds, labels=seen))
    if args.benchmark:
        announce(s, data)
        benchmark(s, data, team, teacher)
        students = []
    for student in students:
        name = f"{student.arch} by {NAMES[student.method]}"
        say(f"\n{'stage 2: ' if teacher and student is s else ''}{name}, in {student.out}")
        announce(student, data)
        seconds = train(student, data, team, teacher if student.method == "seed" else None)
        encoder = Path(student.out) / "encoder.pt"
        rows.append(dict(name=name, encoder=encoder, seconds=seconds, labels=labels[student.method]))
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_first() and students:
        table(rows, data, s, team)


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        if not is_first():                                                      # rank 0 speaks, unless only we know
            time.sleep(5)
        print(report(e), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; lower --batch-size or --image-size, or use --precision bf16")
    except OSError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command resumes from the last full epoch")
