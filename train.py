"""Train a small network by SEED, or by MoCo-v2 or with labels for comparison.

    python train.py --arch mobilenet_v3_large                        # built-in shapes, any laptop
    python train.py --dataset cifar10 --arch mobilenet_v3_large     # trains a MoCo-v2 teacher first
    torchrun --nproc_per_node=8 train.py --dataset imagenet --data /imagenet \\
        --arch mobilenet_v3_large --teacher moco_v2_800ep_pretrain.pth.tar      # eight GPUs

A run leaves a folder: encoder.pt (the result), last.pt (from which the same command resumes),
log.csv, args.json (what makes this run), results.json, views.png and neighbors.png.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from probe import (LABEL_USE, SMALL, STOP_SIGNALS, Parser, accuracy, add_data_flags,
                   average_batch_norm, center_views, check_out, describe, evaluate,
                   extract_features, is_main_process, label_fraction, load_data, load_teacher,
                   make_folder, number, pick_device, print0, read_checkpoint, read_images,
                   run_command, save_encoder, save_file, save_json, save_neighbors, save_views,
                   without_secrets)
from seed import (SEED, Encoder, InputError, MoCo, SmallCropSEED, Supervised, augment,
                  concat_all_gather, rank_and_world_size, uniforms)

METHODS = dict(seed="SEED", moco="MoCo-v2", supervised="supervision", linear="the linear probe",
               finetune="fine-tuning")
PRECISIONS = dict(auto=torch.float32, fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
LOG_EVERY = 10                  # steps per row of log.csv
KNN_LIMIT = 10_000              # images per split for kNN during training
TABLE_LIMIT = 50_000            # images per split for the final table

# ----------------------------------------------------------------------------------- 1. settings
# The defaults. Each row changes the rows above it, for its kind of data set and its method. Flags
# change all of them. "small" are shapes, CIFAR, and folders at up to 64 px. `lr` is for batch 256.
RECIPES = {
    ("any", "any"): dict(           # the authors' settings on ImageNet
        arch="mobilenet_v3_large", image_size=224, small_images=False, crop_scale=(0.2, 1.0),
        blur=True, color=True, dim=128, hidden_dim=None, epochs=200, warmup_epochs=5,
        schedule="cosine", batch_size=256, lr=0.03, backbone_factor=1.0, weight_decay=1e-4,
        queue_size=65536, tau_s=0.2, tau_t=0.01, key_momentum=0.999, eval_every=10, small_crops=0,
        small_size=96, small_scale=(0.05, 0.14), view_epochs=None, teacher_arch="resnet50",
        teacher_method="moco", teacher_epochs=200),
    ("small", "any"): dict(
        image_size=32, blur=False, epochs=20, warmup_epochs=1, batch_size=128, lr=0.1,
        queue_size=2048, eval_every=5, teacher_arch="resnet18", teacher_epochs=12,
        small_size=24, small_scale=(0.2, 0.5)),     # to a teacher, all crops of 16 px look alike
    ("small", "seed"): dict(lr=0.2, tau_t=0.05),
    ("small", "moco"): dict(lr=0.03, key_momentum=0.99, tau_s=0.1),
    ("shapes", "any"): dict(
        crop_scale=(0.4, 1.0), batch_size=64, epochs=6, teacher_epochs=5,
        teacher_method="supervised"),               # smaller crops would hide the outline
    ("shapes", "seed"): dict(lr=0.4),
    ("shapes", "moco"): dict(lr=0.06, queue_size=256, tau_s=0.2),
    ("cifar", "any"): dict(
        small_images=True, epochs=200, warmup_epochs=5, batch_size=256, queue_size=4096,
        eval_every=20, teacher_epochs=200),
    ("cifar", "seed"): dict(tau_t=0.01),
    ("cifar", "moco"): dict(weight_decay=5e-4),
    ("cifar", "supervised"): dict(weight_decay=5e-4),
    ("any", "linear"): dict(        # the authors' linear probe
        crop_scale=(0.08, 1.0), blur=False, color=False, epochs=100, warmup_epochs=0,
        schedule="steps", batch_size=256, lr=30.0, weight_decay=0.0),
    ("any", "finetune"): dict(      # ours; without --init, the backbone's factor is 1
        crop_scale=(0.08, 1.0), blur=False, color=False, epochs=60, warmup_epochs=0,
        schedule="steps", batch_size=256, lr=0.1, backbone_factor=0.1, weight_decay=1e-4),
}
SWAV = dict(crop_scale=(0.14, 1.0), small_crops=6)      # for a teacher of its kind, above 64 px
NOT_INHERITED = ("lr", "weight_decay", "queue_size", "tau_s", "tau_t", "dim", "hidden_dim", "init",
                 "view_epochs", "small_crops", "small_size", "teacher_cache")   # of --method
MAY_CHANGE = ("workers", "device", "data", "out", "teacher", "init", "eval_every", "max_steps",
              "compare", "compile", "teacher_cache", "profile", "precision", "save_minutes")


def parse_args(argv=None):
    """Return the flags as given; None where the recipe decides. InputError if they contradict."""
    parser = Parser(description=__doc__, epilog="Defaults: RECIPES in train.py, and each run's "
                    "args.json. Small networks gain from more epochs.",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    args = parser.parse_args(argv)
    wrong = [name for name in ("teacher", "teacher_cache", "small_crops") if getattr(args, name)]
    if args.method != "seed" and wrong:
        parser.error(f"--{wrong[0].replace('_', '-')} is only for --method seed")
    if args.method in ("linear", "finetune") and args.compare:
        parser.error(f"--compare does not go with --method {args.method}")
    if "" in vars(args).values():
        parser.error("the value of a flag is empty; is a variable of the shell not set?")
    if args.method == "linear" and not args.init:
        parser.error("--method linear evaluates an encoder; name its file with --init")
    return args


def add_flags(parser):
    """Add the flags: first what to train and on what, then how."""
    count = number(int, 1, 1e9)
    temperature = number(float, 1e-6, 1e3)
    flag = parser.add_argument_group("what to train").add_argument
    flag("--method", choices=METHODS, default="seed", help="linear, finetune: evaluate --init")
    flag("--arch", help="a torchvision classification network")
    flag("--dim", type=count, help="of the embeddings; a student has its teacher's")
    flag("--hidden-dim", type=number(int, 0, 2**16), help="of the head; 0: no hidden layer")
    flag("--init", type=expanduser, metavar="FILE", help="start from these weights")
    flag = parser.add_argument_group("the teacher").add_argument
    flag("--teacher", type=expanduser, metavar="PATH_OR_URL", help="a file, URL or hub:REPO:ENTRY, "
         "which runs code; if not given, a teacher is trained first")
    flag("--teacher-arch", help="its network, if the file does not name it; or the one to train")
    flag("--teacher-prefix", help="of its keys, if the file has several networks")
    channels = dict(nargs=3, metavar="X")
    flag("--teacher-mean", type=number(float, 0, 1), **channels, help="SimCLR's pixels: 0 0 0")
    flag("--teacher-std", type=number(float, 1e-3, 10), **channels, help="SimCLR's pixels: 1 1 1")
    flag("--teacher-method", choices=("moco", "supervised"), help="how to train it")
    flag("--teacher-epochs", type=count, help="a better teacher makes a better student")
    flag("--teacher-cache", type=expanduser, metavar="DIR", help="keep its embeddings there")
    flag("--view-epochs", type=count, metavar="E", help="repeat the views of E epochs: less cache")
    flag = parser.add_argument_group("the data").add_argument
    add_data_flags(flag)
    flag("--image-size", type=number(int, 8, 4096), help=f"of a view; up to {SMALL}: in memory")
    flag("--small-crops", type=number(int, 0, 64), metavar="N", help="per image; authors' code: 6")
    flag("--small-size", type=number(int, 8, 4096), help="side of a small crop")
    flag = parser.add_argument_group("the run").add_argument
    flag("--epochs", type=count, help="passes over the images")
    flag("--max-steps", type=count, help="end each stage early; the learning rate stays the same")
    flag("--batch-size", type=number(int, 2, 1e6), help="images per step, over all processes")
    flag("--lr", type=number(float, 1e-9, 1e3), help="for a batch of 256; scaled by batch/256")
    flag("--weight-decay", type=number(float, 0, 10), help="of all weights")
    flag("--warmup-epochs", type=number(float, 0, 1e6), help="raise it if the loss explodes")
    flag("--queue-size", type=count, metavar="K", help="about 5%% of the images, at most all")
    flag("--tau-s", type=temperature, help="the student's temperature, and MoCo's")
    flag("--tau-t", type=temperature, help="the teacher's; higher: similar images count more")
    flag("--out", type=expanduser, metavar="DIR", help="default: runs/DATASET-METHOD-ARCH")
    flag("--precision", choices=PRECISIONS, default="auto", help="auto: fp32; on CUDA 16 bits")
    flag("--compile", action="store_true", help="torch.compile the networks; pays in long runs")
    flag("--save-minutes", type=number(float, 0, 1e6), default=10.0, metavar="M",
         help="between saves (%(default)s); also saved after each epoch")
    flag("--eval-every", type=number(int, 0, 1e6), help="epochs between evaluations; 0: none")
    flag("--compare", action="store_true", help="also train by MoCo-v2 and with labels")
    flag("--profile", action="store_true", help="only time some steps, part by part")


def make_config(args, method, **changes):
    """Return all settings of one stage: the recipe, then the flags, then `changes`."""
    kinds = {"any", args.dataset.rstrip("0123456789")}          # "cifar10" is of the kind "cifar"
    large = ("folder", "imagenet") if (args.image_size or 224) > SMALL else ("imagenet",)
    if args.dataset not in large:
        kinds.add("small")
    settings = dict.fromkeys(vars(args))                        # None: no recipe, no flag
    for (kind, name), row in RECIPES.items():
        if kind in kinds and name in ("any", method):
            settings.update(row)
    for key, value in vars(args).items():
        if value is not None and (method == args.method or key not in NOT_INHERITED):
            settings[key] = value
    cfg = argparse.Namespace(**{**settings, "method": method, **changes})
    if method == "finetune" and not args.init:
        cfg.backbone_factor = 1.0
    cfg.teacher = without_secrets(cfg.teacher)
    cfg.init = without_secrets(cfg.init)
    cfg.warmup_epochs = min(cfg.warmup_epochs, cfg.epochs / 2)
    cfg.out = cfg.out or f"runs/{cfg.dataset}-{cfg.method}-{cfg.arch}"
    return cfg


# ---------------------------------------------------------------------------------- 2. processes
def init_distributed(device_name):
    """Join torchrun's process group, if there is one. Return the device of this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = [name for name in names[:3] if os.environ.get(name)]
    missing = [name for name in names if not os.environ.get(name)]
    if found and missing:
        raise InputError(f"of torchrun's variables, {' and '.join(found)} is set but {missing[0]} "
                         "is not; unset it, or start several processes with torchrun")
    values = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT="0")     # of one process
    values = {name: os.environ.get(name) or value for name, value in values.items()}
    if not "".join(values.values()).isdecimal() or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        raise InputError(f"torchrun's variables cannot be {values}; unset them")
    world_size = int(values["WORLD_SIZE"])
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(values["LOCAL_RANK"]))
        gpus = torch.cuda.device_count()
        if device.index >= gpus:
            raise InputError(f"there are only {gpus} GPUs; lower --nproc_per_node")
        if world_size == 1 and gpus > 1:
            print(f"note: {gpus - 1} GPUs are idle; torchrun --nproc_per_node={gpus} uses them")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True                   # choose the fastest convolutions
    if world_size > 1 and device.type == "mps":
        raise InputError("several processes need NVIDIA GPUs or --device cpu")
    if world_size > 1:
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends a wait for the others
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", None, timedelta(hours=2), device_id=gpu)
    return device


def first_of_node(function, *args):
    """Call a function in all processes, first in one of each node. The others then find the files
    that it downloaded."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not is_first:
        dist.barrier()
    try:
        return function(*args)
    finally:
        if dist.is_initialized() and is_first:
            dist.barrier()


def from_main_process(function, *args):
    """Call a function only in the main process, since a run's folder may exist only on the first
    node. Return its result, or raise its InputError, in all processes."""
    found = [None, None]
    if is_main_process():
        try:
            found[0] = function(*args)
        except InputError as e:
            found[1] = e
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[1]:
        raise found[1]
    return found[0]


def load_teacher_on_all(path, *args):
    """Call `load_teacher` for all processes. A file needs to exist only on the first node."""
    if path.startswith("hub:"):                                 # each process imports its code
        return first_of_node(load_teacher, path, *args)
    return from_main_process(load_teacher, path, *args)


# ------------------------------------------------------------------------------------ 3. batches
@dataclass
class Batch:
    """What one process sees in one step."""
    step: int
    epoch: int                  # of the views
    samples: np.ndarray         # int64 [B], indices of the images
    views: list                 # float [B, 3, S, S] each, on the device; S may differ
    labels: torch.Tensor        # int64 [B], or None
    start: float                # when it was requested, in seconds
    wait: float                 # seconds until its images were read


def plan(num_images, cfg, steps):
    """Yield (step, epoch of the views, this process's samples [B]) for each step of a range.

    Process r sees images r, r+R, ... of the global batch, so the batches do not depend on the
    number of processes. With --view-epochs E, epoch e has the views of epoch e mod E."""
    rank, world_size = rank_and_world_size()
    steps_per_epoch = num_images // cfg.batch_size
    for step in steps:
        epoch, batch = divmod(step, steps_per_epoch)
        if batch == 0 or step == steps[0]:
            order = np.random.default_rng((cfg.seed, epoch)).permutation(num_images)
        samples = order[batch * cfg.batch_size:(batch + 1) * cfg.batch_size]
        yield step, epoch % (cfg.view_epochs or cfg.epochs), samples[rank::world_size]


def batches(split, cfg, device, views, steps):
    """Yield a Batch for each step of a range. Everything after the crop is computed on the device,
    a whole batch at once. views: side and crop scale of each view."""
    items = ([(epoch, int(sample)) for sample in samples]
             for _, epoch, samples in plan(len(split), cfg, steps))
    reader = read_images(split, views, items, device, cfg.workers, cfg.seed)
    for step, epoch, samples in plan(len(split), cfg, steps):
        start = time.perf_counter()
        with torch.profiler.record_function("reading"):
            images = next(reader)
        wait = time.perf_counter() - start
        augmented = []
        with torch.profiler.record_function("augmentation"):
            for view, (size, scale) in enumerate(views):
                u = uniforms(cfg.seed, epoch, samples, view)
                crop = None if split.pixels is None else scale      # files are cropped already
                x = augment(images[view], u, size, crop, cfg.blur, cfg.color)
                augmented.append(x.contiguous(memory_format=torch.channels_last))
        labels = split.labels
        if labels is not None:
            labels = labels[samples].to(device, non_blocking=True)
        yield Batch(step, epoch, samples, augmented, labels, start, wait)


def view_plan(cfg):
    """Return the side and crop scale of each view of an image."""
    large = 2 if cfg.method == "moco" else 1
    small = [(cfg.small_size, cfg.small_scale)] * cfg.small_crops
    return [(cfg.image_size, cfg.crop_scale)] * large + small


# ----------------------------------------------------------------------------------- 4. the loop
class Classifier(Supervised):
    """A linear classifier on an encoder's features. It is the paper's linear probe if the encoder
    and its batch norm are frozen. Otherwise, the encoder is fine-tuned."""

    def __init__(self, encoder, classes, frozen):
        nn.Module.__init__(self)                                # without class vectors
        self.frozen = frozen
        self.encoder = encoder.requires_grad_(not frozen)
        encoder.head.requires_grad_(False)                      # unused
        self.classifier = nn.Linear(encoder.feature_dim, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, views):
        return self.classifier(self.encoder.features(views[0])).float()     # [B, C]


def new_encoder(cfg, init=None):
    """Return the network at the start of training."""
    torch.manual_seed(cfg.seed)
    if init and cfg.method in ("linear", "finetune"):
        encoder = copy.deepcopy(init).requires_grad_(True)
    else:
        encoder = Encoder(cfg.arch, cfg.dim, cfg.hidden_dim, cfg.small_images, cfg.image_size)
    encoder.image_size = cfg.image_size
    for size, _ in view_plan(cfg):
        encoder.check_image_size(size)
    if init:
        if init.small_images != encoder.small_images:           # weights may fit both stems
            flag = "--small-images" if init.small_images else "--no-small-images"
            raise InputError(f"--init {cfg.init} needs {flag}")
        try:
            encoder.backbone.load_state_dict(init.backbone.state_dict())
        except RuntimeError:
            raise InputError(f"--init {cfg.init} is no {cfg.arch} of {cfg.image_size} px") from None
        encoder.mean.copy_(init.mean)
        encoder.std.copy_(init.std)
        if str(encoder.head) == str(init.head):                 # the same layers
            encoder.head.load_state_dict(init.head.state_dict())
        encoder.provenance = init.provenance
        encoder.used_labels = init.used_labels
    return encoder


def build(cfg, data, device, teacher=None, init=None):
    """Return the network to train and its method, on the device, equal in all processes."""
    encoder = new_encoder(cfg, init)
    shared = (cfg.queue_size, cfg.tau_s, cfg.tau_t)
    if cfg.method == "seed" and cfg.small_crops:
        method = SmallCropSEED(encoder, teacher, *shared, cfg.small_crops)
    elif cfg.method == "seed":
        method = SEED(encoder, teacher, *shared)
    elif cfg.method == "moco":
        method = MoCo(encoder, cfg.queue_size, cfg.key_momentum, cfg.tau_s)
    elif cfg.method == "supervised":
        method = Supervised(encoder, len(data.classes))
    else:
        method = Classifier(encoder, len(data.classes), frozen=cfg.method == "linear")
    if cfg.profile:
        for stage in ("targets", "forward", "loss"):
            setattr(method, stage, torch.profiler.record_function(stage)(getattr(method, stage)))
    if device.type == "cpu":
        speed_up_small_maps(method)
    return encoder, method.to(device, memory_format=torch.channels_last).train()


def speed_up_small_maps(network):
    """Make convolutions SmallMapConv2d if their kernels are odd and square and zeros surround the
    map, so that a stride of 1 keeps its size."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.dilation == (1, 1):
            half = layer.kernel_size[0] // 2
            if layer.kernel_size == (2 * half + 1,) * 2 and layer.padding == (half, half):
                layer.__class__ = SmallMapConv2d            # weights and names stay


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is faster on a CPU if the map x [B, C, H, W] is smaller than the kernel.
    That is so in the last layers at 32 px; assets/PERFORMANCE.md has the times."""

    def forward(self, x):
        height, width = x.shape[-2:]
        pad = self.padding[0]
        weight = self.weight
        if max(height, width) <= min(self.stride):              # one output: the part on the map
            weight = weight[:, :, pad:pad + height, pad:pad + width]
        elif self.groups > 1 and width <= 2 * pad:              # padding is faster as a step
            x = nn.functional.pad(x, [pad] * 4)
        else:
            return super().forward(x)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, groups=self.groups)


def make_optimizer(method, cfg):
    """Return SGD with two groups, since the learning rate of the backbone may have a factor."""
    trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    backbone = [p for name, p in trained if ".backbone." in name]
    others = [p for name, p in trained if ".backbone." not in name]
    groups = [dict(params=others, factor=1.0), dict(params=backbone, factor=cfg.backbone_factor)]
    return torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)


def compile_and_distribute(method, cfg):
    """Return the method as the loop calls it: compiled if asked, its gradients averaged."""
    for network in method.modules():
        if cfg.compile and isinstance(network, Encoder):
            network.backbone.compile()
    if not dist.is_initialized():
        return method
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)    # of torch 2.14
    return nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)


def network_dtype(cfg, device):
    """Return the dtype in which the networks compute."""
    if cfg.precision == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return PRECISIONS[cfg.precision]


def lr_at(step, cfg, steps_per_epoch):
    """Return the learning rate, which is scaled with the batch size. "cosine": a linear warm-up,
    then half a cosine down to 0; "steps": a tenth after 60% of the steps, and again after 80%."""
    warmup = cfg.warmup_epochs * steps_per_epoch
    total = cfg.epochs * steps_per_epoch
    peak = cfg.lr * cfg.batch_size / 256
    if cfg.schedule == "steps":
        milestones = [part for part in (0.6, 0.8) if step >= round(part * total)]
        return peak * 0.1 ** len(milestones)
    if step < warmup:
        return peak * min(1, (step + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def train(cfg, data, device, teacher=None, init=None):
    """Train one network by `cfg.method`, from where its folder stopped. Return the Run."""
    encoder, method = build(cfg, data, device, teacher, init)
    optimizer = make_optimizer(method, cfg)
    dtype = network_dtype(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(cfg, data, device, encoder, method, optimizer, scaler, teacher, init)
    cache = TeacherCache(cfg, data, method, dtype) if cfg.teacher_cache else None
    steps = run.open()                                          # those that are left
    model = compile_and_distribute(method, cfg)
    with note_signals() as run.signals:
        for batch in batches(data.train, cfg, device, view_plan(cfg), steps):
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * lr_at(batch.step, cfg, run.steps_per_epoch)
            seed_generators(cfg, batch.step)                    # a resumed run draws the same
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                if cache:
                    targets = cache.targets(batch)
                else:
                    targets = method.targets(batch.views, batch.labels)
                outputs = model(batch.views)
            loss = method.loss(outputs, targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            if run.is_logged(batch.step):                       # with the queue that the loss saw
                run.note(loss, method.diagnostics(outputs, targets))
            method.after_step(targets)                          # only now the queue moves on
            run.end_step(batch)
    return run


def seed_generators(cfg, step):
    """Seed dropout and MoCo's shuffle."""
    numbers = np.random.default_rng((cfg.seed, step, rank_and_world_size()[0]))
    torch.manual_seed(int(numbers.integers(2**32)))             # a CPU uses 32 bits of it


@contextlib.contextmanager
def note_signals():
    """Yield a list that collects signals, so that the loop can finish its step and save. Then exit.
    Outside the block they have their usual effect, and ignored ones (nohup) are left alone."""
    received = []

    def note(signum, frame):
        received.append(signum)
        text = f"\n{signal.Signals(signum).name}: finishing the step, then saving\n"
        with contextlib.suppress(OSError):                      # it may have interrupted a print()
            os.write(1, text.encode() if is_main_process() else b"")

    with contextlib.ExitStack() as at_exit:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):           # in a thread, none can be set
                    at_exit.callback(signal.signal, signum, signal.signal(signum, note))
        yield received
    if received:
        sys.exit(128 + received[-1])


# ----------------------------------------------------------------------------------- 5. the folder
def fingerprint(module):
    """Return a hash of all weights and buffers, or None if there is no module."""
    digest = hashlib.sha256()
    for value in [*module.parameters(), *module.buffers()] if module else ():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12] if module else None


def run_identity(cfg, data, **fingerprints):
    """Return what makes a run, as args.json has it: settings, and fingerprints of its inputs."""
    identity = {**vars(cfg), "data_fingerprint": data.fingerprint, **fingerprints}
    return json.loads(json.dumps(identity))


def differences(path, current):
    """Return in words where the identity in a JSON file differs from the current one, or ""."""
    try:
        saved = dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return f"its {path.name} is damaged"
    keys = [key for key in current if key not in MAY_CHANGE and saved.get(key) != current[key]]
    return "; ".join(f"{key} was {saved.get(key)}, is {current[key]}" for key in keys)


def check_folder(out, identity):
    """Raise InputError if the folder contains anything but this run."""
    args = Path(out, "args.json")
    found = [name for name in ("last.pt", "encoder.pt", "log.csv") if Path(out, name).exists()]
    other = differences(args, identity) if args.exists() else ""
    problem = ""
    if found and not args.exists():
        problem = f"a {found[0]} but no args.json, so it is not the folder of a run"
    elif other:
        problem = f"a run with other settings ({other})"
    elif "encoder.pt" in found and "last.pt" not in found:
        problem = "no last.pt to resume from"
    if problem:
        raise InputError(f"{out} has {problem}; use another --out (--init FILE starts from the "
                         "weights of an encoder.pt), or delete it")


def lock_folder(out):
    """Return an open file that locks the folder, or raise InputError if another run has locked it.
    Windows and some network disks have no locks."""
    file = open(Path(out, ".lock"), "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another run is using {out}; wait for it, or use another --out") from None
    except (ImportError, OSError):
        pass
    return file


class Run:
    """A run: when to log, evaluate, save and stop, and what is in its folder."""

    def __init__(self, cfg, data, device, encoder, method, optimizer, scaler, teacher, init):
        self.cfg = cfg
        self.data = data
        self.device = device
        self.encoder = encoder
        self.parts = dict(method=method, optimizer=optimizer, scaler=scaler)
        self.out = Path(cfg.out)
        self.identity = run_identity(cfg, data, teacher_fingerprint=fingerprint(teacher),
                                     init_fingerprint=fingerprint(init))
        self.origin = f", started from: {encoder.provenance}" if init else ""
        self.labels = [cfg.method in ("supervised", "finetune"), encoder.used_labels]
        if teacher:
            self.origin += f", teacher: {teacher.provenance}"
            self.labels.append(teacher.used_labels)
        self.steps_per_epoch = len(data.train) // cfg.batch_size
        self.last_step = min(cfg.epochs * self.steps_per_epoch, cfg.max_steps or math.inf)
        self.seconds = 0.0                                      # of training
        self.times = np.zeros(3)        # since the last row: seconds, waiting, steps
        self.numbers = {}                                       # of the last row of the log
        self.printed = 0.0
        self.saved = time.monotonic()

    def open(self):
        """Make the folder, or load its checkpoint. Return the range of steps that are left."""
        saved = from_main_process(self.prepare)
        if not saved:
            return range(self.last_step)
        self.seconds = saved["seconds"]
        whole = self.parts["method"].state_dict()               # also the teacher's weights
        whole.update(saved["method"])
        saved["method"] = whole
        for name, part in self.parts.items():
            if saved[name]:                                     # the scaler's is empty without fp16
                part.load_state_dict(saved[name])
        verb = "finished before," if saved["step"] >= self.last_step else "resuming"
        print0(f"{verb} at step {saved['step']}; delete {self.out} to start again")
        if is_main_process() and not (self.out / "encoder.pt").exists():
            self.save(saved["step"])
        return range(saved["step"], self.last_step)

    def prepare(self):
        """Lock the folder and make it ready. Return its checkpoint, or None."""
        make_folder(self.out)
        self.lock = lock_folder(self.out)
        check_folder(self.out, self.identity)
        for unfinished in self.out.glob("*.[0-9]*.tmp"):        # of a run that was killed
            unfinished.unlink()
        log = self.out / "log.csv"
        if not (self.out / "last.pt").exists():
            save_json(self.out / "args.json", self.identity)
            save_views(self.out / "views.png", self.data, self.cfg)
            log.write_text("")
            return None
        try:
            saved = read_checkpoint(self.out / "last.pt")
            if "log_size" not in saved:
                raise InputError(f"{self.out}/last.pt is not the checkpoint of a run")
        except InputError as e:
            raise InputError(f"{e}; delete {self.out}, or use another --out (--init "
                             f"{self.out}/encoder.pt starts from its weights)") from None
        log.touch()
        rows = log.read_bytes()[:saved["log_size"]]             # later rows come again
        os.truncate(log, rows.rfind(b"\n") + 1)                 # without a torn one
        return saved

    def ends_epoch(self, step):
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.last_step

    def is_logged(self, step):
        """Return whether a step has a row in the log: each tenth, and the last of an epoch."""
        return (step + 1) % LOG_EVERY == 0 or self.ends_epoch(step)

    def note(self, loss, diagnostics):
        """Keep the means over processes for the row of the log. Raise FloatingPointError if they
        diverged. This waits for the device."""
        values = {"loss": loss, **diagnostics}
        own = torch.stack([value.detach().float() for value in values.values()])
        means = concat_all_gather(own[None]).mean(dim=0)
        self.numbers = dict(zip(values, means.tolist()))
        self.check_finite("the loss", self.numbers.values())

    def check_finite(self, what, values):
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f"{what} is not finite; with --precision fp32, the same command resumes from the "
                f"last good checkpoint; or delete {self.out} and lower --lr")

    def end_step(self, batch):
        """Evaluate if it is due, write the row of the log, and save. Exit after a signal. Only the
        main process works here; the others wait in the next shared operation."""
        took = time.perf_counter() - batch.start                # without evaluation and saving
        self.seconds += took
        self.times += (took, batch.wait, 1)
        if self.is_logged(batch.step) and is_main_process():
            self.write_row(batch.step + 1)
        signum = self.signal_of_any(batch.step)
        is_due = time.monotonic() - self.saved >= 60 * self.cfg.save_minutes
        if is_main_process() and (signum or is_due or self.ends_epoch(batch.step)):
            self.save(batch.step + 1)
        if signum:
            if dist.is_initialized():
                dist.barrier()                                  # until the main process has saved
            print0(f"stopped by {signal.Signals(signum).name}; the same command resumes from here")
            sys.exit(128 + signum)                              # also if only another got it

    def signal_of_any(self, step):
        """Return a signal that a process received, or 0: the same in all processes. Several agree
        on it only at logged steps, where they wait for each other anyway."""
        signum = max(self.signals, default=0)
        if not dist.is_initialized():
            return signum
        if not self.is_logged(step):
            return 0
        return int(concat_all_gather(torch.tensor([signum], device=self.device)).max())

    def evaluate(self):
        """Return the accuracy in percent on the test images: the classifier's, or by kNN."""
        encoder = self.averaged_encoder()
        workers = self.cfg.workers
        if not isinstance(self.parts["method"], Classifier):
            scores, _ = evaluate(encoder, self.data, self.device, workers, KNN_LIMIT, False)
            return scores["knn"]
        x = extract_features(encoder, self.data.test, self.device, workers)
        y = self.data.test.labels.to(self.device)
        return accuracy(self.parts["method"].classifier(x.to(self.device)), y)

    def averaged_encoder(self):
        """Return the encoder with averaged batch-norm statistics, unless it is frozen."""
        if self.cfg.method == "linear":
            return self.encoder
        return average_batch_norm(self.encoder, self.data.train, self.cfg.workers)

    def write_row(self, steps_done):
        """Append a row to log.csv. Print it after ten seconds, and with each evaluation."""
        took, waited, steps = self.times
        epoch = steps_done / self.steps_per_epoch
        row = dict(step=steps_done, epoch=epoch, lr=self.parts["optimizer"].param_groups[0]["lr"],
                   **self.numbers, waiting=waited / took,
                   images_per_s=steps * self.cfg.batch_size / took, accuracy="")
        every = self.cfg.eval_every
        if every and epoch % every == 0 and self.data.classes and not self.signals:
            row["accuracy"] = self.evaluate()
        texts = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values()]
        try:
            with open(self.out / "log.csv", "a") as file:
                header = "" if file.tell() else ",".join(row) + "\n"
                file.write(header + ",".join(texts) + "\n")
        except OSError as e:
            raise OSError(f"cannot write {self.out}/log.csv: {e}") from None
        is_last = steps_done == self.last_step
        if is_last or row["accuracy"] != "" or time.perf_counter() - self.printed > 10:
            self.printed = time.perf_counter()
            self.print_row(row)
        self.times[:] = 0

    def print_row(self, row):
        yardstick = f" (a copy: {row['loss_of_a_copy']:.3f})" if "loss_of_a_copy" in row else ""
        small = f" (small crops: {row['small_loss']:.3f})" if "small_loss" in row else ""
        score = "" if row["accuracy"] == "" else f"  accuracy {row['accuracy']:.1f}%"
        left = int((self.last_step - row["step"]) * self.cfg.batch_size / row["images_per_s"])
        print0(f"{row['step'] / self.last_step:4.0%}  epoch {row['epoch']:.1f}/{self.cfg.epochs}  "
               f"loss {row['loss']:.3f}{yardstick}{small}  lr {row['lr']:.3g}  "
               f"{row['images_per_s']:.0f} images/s  waiting {row['waiting']:.0%}  "
               f"ETA {left // 60}:{left % 60:02d}{score}")

    def save(self, steps_done):
        """Write encoder.pt, then last.pt, so that a complete encoder.pt is never the older one."""
        epochs = f"{steps_done / self.steps_per_epoch:.4g} epochs"
        provenance = f"{METHODS[self.cfg.method]}, {epochs} on {self.data.name}{self.origin}"
        used_labels = any(self.labels) or (None if None in self.labels else False)
        about = (provenance, used_labels)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["method"] = {name: value for name, value in state["method"].items()
                           if not name.startswith("teacher.")}  # frozen: its fingerprint will do
        self.check_finite("a weight", [x.abs().max() for x in state["method"].values()])
        state.update(describe(self.encoder, *about), step=steps_done, seconds=self.seconds,
                     log_size=(self.out / "log.csv").stat().st_size)
        if not (self.out / "last.pt").exists():                 # `open` makes a missing encoder.pt
            save_file(self.out / "last.pt", state)
        save_encoder(self.out / "encoder.pt", self.averaged_encoder(), *about)
        save_file(self.out / "last.pt", state)
        self.saved = time.monotonic()


class TeacherCache:
    """The teacher's embeddings of views, in DIR/z.float32 [E, N, V, D], for the next student. A
    view depends only on (seed, epoch, image). A row whose norm is not 1 is missing or incomplete,
    and is computed. DIR/fingerprint.json records what the embeddings depend on."""

    def __init__(self, cfg, data, method, dtype):
        self.method = method
        path = Path(cfg.teacher_cache)
        current = dict(teacher_fingerprint=fingerprint(method.teacher), blur=cfg.blur,
                       data_fingerprint=data.fingerprint, seed=cfg.seed,
                       views=str(view_plan(cfg)), dtype=str(dtype),
                       label_fraction=cfg.label_fraction)
        epochs = min(cfg.view_epochs or cfg.epochs, cfg.epochs)
        shape = (epochs, len(data.train), method.views_per_image, method.teacher.dim)
        make_folder(path)
        if not (path / "z.float32").exists():
            save_json(path / "fingerprint.json", current)
        other = differences(path / "fingerprint.json", current)
        if other:
            raise InputError(f"--teacher-cache {path} has other embeddings ({other}); use another")
        with open(path / "z.float32", "ab") as file:
            file.truncate(max(file.tell(), 4 * math.prod(shape)))           # a sparse file
        self.file = open(path / "z.float32", "r+b", buffering=0)
        self.rows = np.memmap(path / "z.float32", np.float32, "r", shape=shape)

    def targets(self, batch):
        """Return what `SEED.targets` returns, from the disk if all rows are there."""
        rows = torch.from_numpy(self.rows[batch.epoch, batch.samples])      # [B, V, D]
        if ((rows.norm(dim=2) - 1).abs() < 1e-4).all():
            return rows.transpose(0, 1).flatten(0, 1).to(batch.views[0].device)     # [V*B, D]
        z_t = self.method.targets(batch.views)                              # [V*B, D]
        rows = z_t.unflatten(0, (len(batch.views), -1)).transpose(0, 1)     # [B, V, D]
        for sample, row in zip(batch.samples.tolist(), rows.contiguous().cpu().numpy()):
            self.file.seek((batch.epoch * self.rows.shape[1] + sample) * row.nbytes)
            try:
                self.file.write(row)
            except OSError as e:
                raise OSError(f"cannot write the --teacher-cache {self.file.name}: {e}") from None
        return z_t


# ------------------------------------------------------------------------------------- 6. stages
def fit_to_data(cfg, data):
    """Refuse what cannot work before anything is trained. Shorten a queue that is too long."""
    world_size = rank_and_world_size()[1]
    images = len(data.train)
    if cfg.method in ("supervised", "linear", "finetune") and not data.classes:
        raise InputError(f"{cfg.data} has no labels to train with; use class folders, or moco as "
                         "--method or --teacher-method")
    if cfg.label_fraction < 1:
        cfg.batch_size = min(cfg.batch_size, images - images % world_size)
    if cfg.batch_size > images:
        raise InputError(f"--batch-size {cfg.batch_size}: there are {images:,} training images")
    if cfg.batch_size % world_size or cfg.batch_size < 2 * world_size:
        raise InputError(f"--batch-size {cfg.batch_size} must be a multiple of the {world_size} "
                         "processes, with at least 2 images for each")
    if cfg.queue_size > images and cfg.method in ("seed", "moco") and not cfg.profile:
        print0(f"note: the queue of {cfg.queue_size:,} is cut to the {images:,} images")
        cfg.queue_size = images
    from_main_process(check_out, cfg.out, cfg.dataset, cfg.data)
    if not cfg.profile:
        late = ("dim", *SWAV)                                   # the teacher decides these later
        identity = {key: x for key, x in run_identity(cfg, data).items() if key not in late}
        from_main_process(check_folder, cfg.out, identity)


def get_teacher(args, cfg, data, device):
    """Load the teacher, or train it and keep it for the next student. Return the teacher, the
    seconds of its training, and changes to the settings. For --profile, random weights will do."""
    seconds = None
    if args.profile and not args.teacher:
        teacher = Encoder(cfg.teacher_arch, cfg.dim, None, cfg.small_images, cfg.image_size)
    else:
        path = args.teacher
        if not path:
            path, seconds = train_teacher(args, cfg, data, device)
        teacher = load_teacher_on_all(path, args.teacher_arch, args.teacher_prefix,
                                      args.teacher_mean, args.teacher_std)
    if args.dim not in (None, teacher.dim):
        raise InputError(f"--dim {args.dim}: the teacher's embeddings have {teacher.dim} "
                         "dimensions, and so must the student's; omit --dim")
    changes = dict(dim=teacher.dim)
    if teacher.multi_crop and cfg.image_size > SMALL:
        changes.update(SWAV)
        if args.small_crops is not None:
            changes["small_crops"] = args.small_crops
        print0(f"a teacher like SwAV: crop scale {SWAV['crop_scale']} as in its training, and "
               f"{changes['small_crops']} small crops (--small-crops)")
    teacher.check_image_size(cfg.image_size)
    teacher.image_size = cfg.image_size
    if changes.get("small_crops", cfg.small_crops):
        teacher.check_image_size(cfg.small_size)
    print0(f"\nteacher: {teacher.provenance}, {LABEL_USE[teacher.used_labels]}")
    return teacher.to(device, memory_format=torch.channels_last), seconds, changes


def train_teacher(args, cfg, data, device):
    """Train a teacher in a folder named by a hash of its settings. Return its file and seconds."""
    if cfg.dataset == "imagenet":
        raise InputError("no --teacher: use a published one, such as MoCo-v2's (README has its "
                         "URL), or train one for days with --method moco --arch resnet50")
    teacher_cfg = make_config(args, cfg.teacher_method, arch=cfg.teacher_arch, dim=cfg.dim,
                              epochs=cfg.teacher_epochs, init=None)
    identity = {key: value for key, value in run_identity(teacher_cfg, data).items()
                if key not in MAY_CHANGE}
    identity = json.dumps([identity, cfg.max_steps], sort_keys=True)
    name = f"{cfg.dataset}-{cfg.teacher_method}-{cfg.teacher_arch}"
    teacher_cfg.out = f"runs/teachers/{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    fit_to_data(teacher_cfg, data)
    print0(f"\nstage 1: no --teacher given, so a {cfg.teacher_arch} is trained on the same images, "
           f"{LABEL_USE[cfg.teacher_method == 'supervised']}")
    print_settings(teacher_cfg, data)
    run = train(teacher_cfg, data, device)
    return f"{teacher_cfg.out}/encoder.pt", run.seconds


def print_settings(cfg, data):
    """Print the folder, the settings, and the loss at chance level."""
    settings = " ".join(f"{key}={value}" for key, value in sorted(vars(cfg).items())
                        if value is not None)
    entries = cfg.queue_size + 1 if cfg.method in ("seed", "moco") else len(data.classes)
    print0(f"  {settings}\n  loss at chance level: log({entries:,}) = {math.log(entries):.2f}")


def profile(cfg, data, device, teacher, init):
    """Time parts of some steps of a run whose folder is deleted. Leave the trace."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")             # the profiler logs every start
    profiler = torch.profiler.profile()
    with tempfile.TemporaryDirectory() as folder, profiler:
        vars(cfg).update(out=folder, max_steps=24, eval_every=0, teacher_cache=None)
        train(cfg, data, device, teacher, init)
    for name in ("reading", "augmentation", "targets", "forward", "loss"):
        us = [max(event.cpu_time_total, event.device_time_total)
              for event in profiler.events() if event.name == name]
        print0(f"{name:14s}{np.median(us) / 1e3:10.2f} ms per step")
    if is_main_process():
        trace = f"trace-{cfg.dataset}-{cfg.method}-{cfg.arch}.json"
        profiler.export_chrome_trace(trace)
        print(f"wrote {trace}; open it in chrome://tracing or ui.perfetto.dev")


def print_table(rows, data, device, workers, out):
    """Evaluate the encoder of each row, print a table, and write it to OUT/results.json.

    rows: dicts of name, encoder (Encoder or its file), seconds (of training, if any), by_teacher
    (if labels were used, then by its teacher), and in_picture (show it in neighbors.png)."""
    print0(f"\nevaluating on all images, but at most {TABLE_LIMIT:,} of each split")
    width = max(len(row["name"]) for row in rows)
    print0(f"{'':{width}s}     kNN  linear  seconds  labels used")
    results = []
    pictured = []
    for row in rows:
        encoder = row["encoder"]
        if not isinstance(encoder, nn.Module):
            encoder = load_teacher(encoder)
        encoder = encoder.to(device, memory_format=torch.channels_last)
        scores, (train, test, features) = evaluate(encoder, data, device, workers, TABLE_LIMIT)
        texts = [f"{scores[name]:.1f}%" if data.classes else "-" for name in ("knn", "linear")]
        seconds = f"{row['seconds']:.0f}" if row.get("seconds") else "-"
        labels = {True: "yes", False: "no", None: "unknown"}[encoder.used_labels]
        if encoder.used_labels and row.get("by_teacher"):
            labels = "by its teacher"
        print0(f"{row['name']:{width}s}  {texts[0]:>6s}  {texts[1]:>6s}  {seconds:>7s}  {labels}")
        results.append(dict(name=row["name"], seconds=row.get("seconds"), labels=labels, **scores))
        if row.get("in_picture"):
            pictured.append(features)
    save_neighbors(Path(out, "neighbors.png"), train, test, pictured, data.image_size)
    save_json(Path(out, "results.json"), results)
    print0(f"wrote {out}/: encoder.pt, log.csv, results.json, views.png, neighbors.png")


def report_classifier(run, name):
    """Print the test accuracy of a linear probe or of fine-tuning. Write it to results.json."""
    found = run.evaluate()
    print(f"accuracy of the classifier on {len(run.data.test):,} test images: {found:.1f}%")
    if run.numbers.get("loss", 0) > math.log(len(run.data.classes)):
        print("note: its last loss is above chance level; use a lower --lr and another --out")
    save_json(run.out / "results.json", dict(name=name, accuracy=found))


def students_of(args, cfg, data):
    """Return the settings of the student and of baselines. Refuse what cannot work."""
    students = [cfg]
    for method in ("moco", "supervised") if args.compare else ():
        if method != cfg.method and (method == "moco" or data.classes):
            students.append(make_config(args, method, out=f"{cfg.out}/{method}"))
    for student in students:
        fit_to_data(student, data)
    return students


def check_test_images(cfg, data):
    """Before a new run, raise InputError if too many test images on disk cannot be read. Otherwise
    the first evaluation would end it."""
    is_new = not cfg.profile and not Path(cfg.out, "last.pt").exists()
    if is_new and data.test.pixels is None:
        for _ in center_views(data.test, SMALL, workers=cfg.workers):
            pass


def main(argv=None):
    torch.set_flush_denormal(True)          # p_t has numbers below 1e-38, which slow CPUs down
    args = parse_args(argv)
    device = init_distributed(args.device)
    init = load_teacher_on_all(args.init, args.arch) if args.init else None
    if init:
        args.arch = init.arch
    if init and args.method in ("linear", "finetune"):
        args.image_size = args.image_size or init.image_size
    cfg = make_config(args, args.method)
    data = first_of_node(load_data, cfg.dataset, cfg.data, cfg.image_size, cfg.subset, cfg.seed)
    if data.fingerprint != from_main_process(getattr, data, "fingerprint"):
        raise InputError(f"the images on {platform.node()} differ from those on the first node")
    data.train = label_fraction(data.train, cfg.label_fraction, cfg.seed)
    print0(f"{data}; {rank_and_world_size()[1]} process(es) on {device.type}, networks in "
           f"{network_dtype(cfg, device)}")
    untrained = new_encoder(cfg, init)      # a network that cannot be used fails early
    students = students_of(args, cfg, data)
    from_main_process(check_test_images, cfg, data)
    rows = [dict(name=f"{cfg.arch}, {'as it starts' if init else 'untrained'}", encoder=untrained)]
    teacher = None
    if cfg.method == "seed":
        teacher, seconds, changes = get_teacher(args, cfg, data, device)
        vars(cfg).update(changes)
        rows.append(dict(name=f"{teacher.arch}, the teacher", encoder=teacher, seconds=seconds,
                         in_picture=True))
    if args.profile:
        return profile(cfg, data, device, teacher, init)
    for student in students:
        name = f"{student.arch} by {METHODS[student.method]}"
        print0(f"\n{'stage 2: ' if student.method == 'seed' else ''}{name}")
        print_settings(student, data)
        teacher_of = teacher if student.method == "seed" else None
        run = train(student, data, device, teacher_of, init if student is cfg else None)
        rows.append(dict(name=name, encoder=f"{student.out}/encoder.pt", seconds=run.seconds,
                         by_teacher=student.method == "seed" and not init,
                         in_picture=student is cfg))
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_main_process() and cfg.method in ("linear", "finetune"):
        report_classifier(run, name)
    elif is_main_process():
        if not init:                        # with statistics of its own, like the other rows
            rows[0]["encoder"] = average_batch_norm(untrained.to(device), data.train, cfg.workers)
        print_table(rows, data, device, cfg.workers, cfg.out)


if __name__ == "__main__":
    run_command(main)
