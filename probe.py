"""Data sets, and everything that evaluates: features, nearest neighbors, linear probe, image grids.

    python probe.py runs/shapes-seed-mobilenet_v3_large/encoder.pt
    python probe.py random:mobilenet_v3_large
    python probe.py encoder.pt --dataset folder --data ~/images

An encoder trained without labels is evaluated by how well its frozen features serve a question that
it was never asked. kNN (do the ten nearest training images have the right label?) has nothing to
tune. A linear probe (can one linear layer read the label off the features?) chooses its learning
rate on a part of the *training* images that it holds out. The test images choose nothing.

Letters in shapes as in seed.py; and N, M images of a split, V views of an image.
"""
import argparse
import atexit
import copy
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset

from seed import (IMAGENET_MEAN, IMAGENET_STD, Encoder, InputError, SplitBatchNorm2d, augment,
                  crop_box, load_teacher, normalize, rank_and_world_size, replace_file, save_file,
                  to_float, uniforms)

DATASETS = ("shapes", "cifar10", "cifar100", "imagenet", "folder")
SMALL = 64                      # images up to so many pixels a side are decoded once and kept,
MEMORY = 2 * 2**30              # if all of them take no more bytes than this
TABLE_LIMIT = 50_000            # images of a split that the table looks at
ENDINGS = set(".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm .jp2".split())
VAL_NAMES = ("val", "valid", "validation", "test")
SPLIT_NAMES = {"train", "training", "testing", *VAL_NAMES}
WHITE = (1, 255, 4095, 65535)   # the brightest value of an image with more than 8 bits
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
SKIPPED = set()                 # files of images that cannot be read; each is named once
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1")
                if hasattr(signal, name)]                       # Windows has no SIGUSR1


# ------------------------------------------------------------------------------------ the data sets
@dataclass
class Split:
    """The training or the test images. pixels: uint8 [N, 3, S, S], decoded; or files: N paths.
    labels: int64 [N], or None."""
    pixels: torch.Tensor = None
    files: list = None
    labels: torch.Tensor = None

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def subset(self, index):
        """The images at `index` (int64 array), in that order."""
        index = np.asarray(index)
        pixels = None if self.pixels is None else self.pixels[index]
        files = None if self.files is None else [self.files[i] for i in index]
        labels = None if self.labels is None else self.labels[index]
        return Split(pixels, files, labels)


@dataclass
class Data:
    """A data set, ready for use. classes: C names, empty without labels; fingerprint: a hash of the
    labels and the pixels (of images on disk: of their names); notes: on files left out."""
    name: str
    image_size: int
    train: Split
    test: Split
    classes: list
    fingerprint: str = ""
    notes: tuple = ()

    @property
    def has_labels(self):
        """Whether accuracy can be told: both splits carry labels."""
        return self.train.labels is not None and self.test.labels is not None

    def __str__(self):
        labels = f"{len(self.classes)} classes" if self.has_labels else "without labels"
        place = "on disk" if self.train.pixels is None else "in memory"
        counts = f"{len(self.train):,} training and {len(self.test):,} test images"
        text = f"{self.name}, {counts} of {self.image_size} px {place}, {labels}"
        return "; ".join([text, *self.notes])


def load_data(name, root="data", image_size=None, subset=None, seed=0):
    """Open a data set by name.

    Args: name: one of DATASETS. root: its directory (shapes needs none; CIFAR is downloaded there;
        imagenet is ROOT/train/CLASS and ROOT/val/CLASS; folder is any directory of images: with
        class folders or without, with train/ and val/ or without). image_size: side of the images
        in pixels; None: 32, for imagenet and folder 224. subset: train on so many images, chosen
        by `seed`.
    Returns: Data. Raises: InputError for a directory or image that is missing or cannot be read."""
    image_size = image_size or native_size(name)
    root = Path(root).absolute()
    notes = []
    if name == "shapes":
        train = draw_shapes(5000, split=0)
        test = draw_shapes(2000, split=1)
        classes = SHAPE_CLASSES
    elif name.startswith("cifar"):
        train, test, classes = read_cifar(name, root)
    else:
        train, test, classes, notes = find_images(name, root)
    if subset is not None:
        if not 0 < subset <= len(train):
            raise InputError(f"--subset {subset}: there are {len(train):,} training images")
        order = np.random.default_rng(seed).permutation(len(train))
        train = train.subset(np.sort(order[:subset]))
    digest = hashlib.sha256(name.encode())
    splits = []
    for split in (train, test):
        if split.files is not None:
            names = "\n".join(file[len(str(root)) + 1:] for file in split.files)
            digest.update(names.encode("utf-8", "surrogateescape"))
            if image_size <= SMALL and len(split) * 3 * image_size**2 <= MEMORY:
                split = decode(split, image_size)
        for values in (split.pixels, split.labels):
            if values is not None:
                digest.update(values.numpy())
        splits.append(split)
    return Data(name, image_size, *splits, classes, digest.hexdigest()[:12], notes)


def native_size(name):
    """Side of a data set's images in pixels, unless told."""
    return 224 if name in ("imagenet", "folder") else 32


def read_cifar(name, root):
    """CIFAR-10 or -100 through torchvision, downloaded where it is missing."""
    cifar = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    splits = []
    for is_train in (True, False):
        try:
            part = cifar(root, train=is_train, download=True)
        except (OSError, RuntimeError) as e:
            raise InputError(f"cannot download {name} ({e}); put {cifar.filename} into {root}/ by "
                             "hand, or use --dataset shapes, which needs no download") from None
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()      # [N, 3, 32, 32]
        splits.append(Split(pixels=pixels, labels=torch.tensor(part.targets)))
    return *splits, part.classes


def find_images(name, root):
    """The image files below `root` and their labels: training split, test split, classes, notes."""
    if not root.is_dir():
        raise InputError(f"no directory {root}; say with --data where the images are")
    has_train = (root / "train").is_dir()
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    not_imagenet = InputError(f"{root} needs train/ and val/, each with a folder for each class; "
                              "else use --dataset folder")
    if name == "imagenet" and not (val and has_train):
        raise not_imagenet
    top = root / "train" if has_train else root
    files, notes = list_files(top)
    if len(files) < 2:
        raise InputError(f"{len(files) or 'no'} image in {top} (looked for "
                         f"{', '.join(sorted(ENDINGS))})")
    folders = class_folders(files, top)
    classes = sorted(set(folders))
    words = {folder.lower().rstrip("0123456789") for folder in classes}     # as COCO's train2017
    if classes and words <= SPLIT_NAMES:
        raise InputError(f"{top} holds {' and '.join(classes)}, which are no classes; have train "
                         "and val right below --data")
    if len(classes) < 2 or "" in classes:                       # one class is no label
        classes = []
    train = Split(files=files, labels=number_labels(folders, classes))
    if name == "imagenet" and not classes:
        raise not_imagenet
    if has_train and val:
        test_files, more_notes = list_files(val)
        if not test_files:
            raise InputError(f"no image in {val}")
        test_folders = class_folders(test_files, val)
        unknown = sorted(set(test_folders) - set(classes) - {""})
        if classes and unknown:
            raise InputError(f"{val} has classes that {top} lacks: {', '.join(unknown[:3])}")
        if not classes or "" not in test_folders:
            test = Split(files=test_files, labels=number_labels(test_folders, classes))
            return train, test, classes, notes + more_notes
        notes.append(f"{val} has no class folders, so a part of {top} is held out instead")
    order = np.random.default_rng(0).permutation(len(files))    # hold out a tenth, always the same
    held_out = max(1, min(10_000, len(order) // 10))
    return (train.subset(np.sort(order[held_out:])), train.subset(np.sort(order[:held_out])),
            classes, notes)


def list_files(top):
    """All image files below `top`, sorted, and notes on what was left out. Hidden files are, such
    as macOS's ._x.jpg; links are followed, but no directory is read twice."""
    found = []
    others = Counter()
    seen = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            ending = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if ending in ENDINGS or (not ending and is_image(path)):
                found.append(path)
            else:
                others[ending or "no ending"] += 1
    counts = ", ".join(f"{count} {ending}" for ending, count in others.most_common(3))
    return sorted(found), [f"left out in {top}: {counts}"] if others else []


def is_image(path):
    """Whether Pillow knows the format of a file."""
    try:
        with open_image(path):
            return True
    except Exception:                                           # whatever a decoder raises
        return False


def open_image(path):
    """Pillow's Image; but at a named pipe that would wait for ever."""
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    return Image.open(path)


def refuse_among_data(out, dataset, data):
    """InputError if a picture written into `out` would be an image of the data from then on."""
    root = Path(data).resolve()
    tops = [root]
    if (root / "train").is_dir():
        tops = [root / name for name in ("train", *VAL_NAMES)]
    out = Path(out).resolve()
    if dataset in ("folder", "imagenet") and any(top == out or top in out.parents for top in tops):
        raise InputError(f"{out} would lie among the images of {data}; name another --out")


def make_folder(path):
    """A directory, made if it is missing; InputError if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the folder {path} ({e.strerror}); name another") from None


def class_folders(files, top):
    """For each file the name of the folder right below `top` that it lies in; "" if in none."""
    below = [file[len(str(top)) + 1:] for file in files]
    return [path.split(os.sep)[0] if os.sep in path else "" for path in below]


def number_labels(folders, classes):
    """Class numbers, int64 [N]; None if there are no classes or an image lies in none of them."""
    number = {name: i for i, name in enumerate(classes)}
    if not classes or "" in folders:
        return None
    return torch.tensor([number[folder] for folder in folders], dtype=torch.long)


def read_crops(path, sizes, choose_boxes):
    """Open one image and cut crops out of it: a list of uint8 [3, size, size], one for each size.

    `choose_boxes(height, width)` names their boxes, rows of (top, left, height, width) in pixels.
    Pillow resizes each straight out of the image, and decodes a JPEG at 1/2, 1/4 or 1/8 where that
    is still fine enough. Raises: InputError naming the file if it cannot be read."""
    try:
        with open_image(path) as image:
            width, height = image.size
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            if turn > 4 and image.format != "TIFF":             # Pillow turns those by itself
                width, height = height, width
            boxes = choose_boxes(height, width)
            zoom = max(size / min(h, w) for size, (_, _, h, w) in zip(sizes, boxes))
            image.draft("RGB", [int(side * zoom) for side in image.size])
            if turn > 1:
                image = ImageOps.exif_transpose(image)
            scale_x = image.width / width
            scale_y = image.height / height
            if image.mode[0] in "IF":                           # convert() would clip at 255
                values = np.nan_to_num(np.asarray(image, np.float32)).clip(0, 65535)
                white = min(white for white in WHITE if values.max() <= white)
                image = Image.fromarray((values * (255 / white)).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGB")
            crops = []
            for size, (top, left, h, w) in zip(sizes, boxes):
                corners = (left * scale_x, top * scale_y, (left + w) * scale_x, (top + h) * scale_y)
                crop = image.resize((size, size), Image.Resampling.BILINEAR, box=corners)
                pixels = np.array([np.asarray(channel) for channel in crop.split()])
                crops.append(torch.from_numpy(pixels))          # [3, size, size]
    except Exception as e:                                      # whatever a decoder raises
        if isinstance(e, MemoryError) or getattr(e, "errno", None) in NO_RESOURCES:
            raise                                               # it is not the image's fault
        raise InputError(f"cannot read the image {path} ({e}); replace or remove it") from None
    return crops


def skip(files, total, whole_batch=False):
    """Name images that cannot be read, each once; InputError for more than 1% of all, or a batch of
    nothing else."""
    names = ", ".join(sorted(files)[:3])
    if whole_batch or len(files) == total or len(files) > max(1, total // 100):
        raise InputError(f"{len(files)} of {total:,} images cannot be read, such as {names}; "
                         "replace or remove them")
    for file in sorted(set(files) - SKIPPED):
        print0(f"note: the image {file} cannot be read and is skipped")
    SKIPPED.update(files)


def center_box(size):
    """The test view: the central square; of large images 7/8 of it (resize to 256, crop 224)."""
    share = 1 if size <= SMALL else 7 / 8

    def choose_boxes(height, width):
        side = min(height, width) * share
        return [((height - side) / 2, (width - side) / 2, side, side)]

    return choose_boxes


def decode(split, size):
    """The split with its files decoded: their central squares, uint8 [N, 3, size, size]."""
    def read(file):
        try:
            return read_crops(file, [size], center_box(size))[0]
        except InputError:
            return None

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read, split.files))
    split = without_unreadable(split, np.array([image is not None for image in images]))
    split.pixels = torch.stack([image for image in images if image is not None])
    return split


def without_unreadable(split, readable):
    """The images of a split that could be read (bool [N]), with their labels."""
    if readable.all():
        return split
    skip([split.files[i] for i in np.flatnonzero(~readable)], len(split))
    return split.subset(np.flatnonzero(readable))


class Crops(Dataset):
    """Files as crops, for a DataLoader. Item (epoch, index) -> a list of uint8 [3, S, S], epoch,
    index, and the index of the image that was read: where one cannot be, another takes its place,
    always the same. `views`: side and crop scale of each; scale None: the test view. The boxes
    depend on (seed, epoch, index) and the view's number alone."""

    def __init__(self, files, views, seed=0):
        self.files = np.array([os.fsencode(file) for file in files])    # one block for all workers
        self.views = views
        self.seed = seed

    def __getitem__(self, item):
        epoch, index = item
        others = np.random.default_rng(index).integers(len(self.files), size=10).tolist()
        for number in (index, *others):
            try:
                return self.crops(epoch, number), epoch, index, number
            except InputError as e:
                error = e
        raise InputError(f"{len({index, *others})} images cannot be read, such as: {error}")

    def crops(self, epoch, index):
        """The crops of an image; InputError if it cannot be read."""
        def choose_boxes(height, width):
            boxes = []
            for view, (size, scale) in enumerate(self.views):
                if scale is None:
                    boxes += center_box(size)(height, width)
                else:
                    u = uniforms(self.seed, epoch, [index], view)
                    boxes += crop_box(u, height, width, scale).tolist()
            return boxes

        sizes = [size for size, _ in self.views]
        return read_crops(os.fsdecode(self.files[index]), sizes, choose_boxes)


def leave_group(worker):
    """For a process that reads: Ctrl-C, `timeout` and Slurm signal all processes, and mean the
    run, which still needs its readers for the step that it finishes."""
    if hasattr(os, "setpgrp"):                                  # Windows has no groups
        os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_readers():
    """After an error Python would ask readers to end, which they ignore, and wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # PyTorch's raises an error
    for process in multiprocessing.active_children():
        process.kill()


# ----------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """What one step of one process looks at."""
    views: list                 # float [B, 3, S, S] each, on the device; S may differ
    labels: torch.Tensor        # int64 [B], or None
    epoch: int                  # whose views they are
    samples: np.ndarray         # int64 [B], the images' numbers
    wait: float                 # seconds that it took to make


@functools.lru_cache(maxsize=1)
def epoch_order(seed, epoch, num_images):
    """The order in which an epoch shows the images, int64 [N]."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def samples_of_step(step, num_images, cfg, rank=0, world_size=1):
    """What a step shows: the epoch of the views, and the numbers of this process's images [B].

    Process r takes images r, r+R, ... of the global batch, so any number of processes sees the same
    batches. With --view-epochs E epoch e has the views of epoch e mod E, in an order of its own."""
    epoch, step_in_epoch = divmod(step, num_images // cfg.batch_size)
    first = step_in_epoch * cfg.batch_size
    batch = epoch_order(cfg.seed, epoch, num_images)[first:first + cfg.batch_size]
    return epoch % (cfg.view_epochs or cfg.epochs), batch[rank::world_size]


def images_in_memory(split, cfg, device, views, planned):
    """Yield epoch, samples [B] and, for each view, uint8 [B, 3, H, W], which lie on the device."""
    pixels = split.pixels.to(device)
    for epoch, samples in planned:
        index = torch.from_numpy(samples).to(device, non_blocking=True)
        yield epoch, samples, [pixels[index]] * len(views)


def images_from_disk(split, cfg, device, views, planned):
    """The same for images on disk, of which workers send crops, uint8 [B, 3, S, S]. What a worker
    is asked for is (epoch, sample), and not an index alone: the crop depends on both."""
    items = ([(epoch, int(sample)) for sample in samples] for epoch, samples in planned)
    loader = DataLoader(Crops(split.files, views, cfg.seed), batch_sampler=items,
                        num_workers=cfg.workers, worker_init_fn=leave_group,
                        pin_memory=device.type == "cuda")
    unreadable = set()
    for crops, epoch, asked, samples in loader:                 # crops: uint8 [B, 3, S, S] each
        missing = [split.files[i] for i in asked[asked != samples]]
        if missing:
            unreadable.update(missing)
            skip(unreadable, len(split), whole_batch=len(missing) == len(asked))
        images = [crop.to(device, non_blocking=True) for crop in crops]
        yield int(epoch[0]), samples.numpy(), images


def batches(split, cfg, device, views, steps, color=True):
    """A Batch for each step. All that follows the crop happens on the device, a batch at once.

    views: side and crop scale of each view of an image; color: as in `augment`."""
    planned = (samples_of_step(step, len(split), cfg, *rank_and_world_size()) for step in steps)
    on_disk = split.pixels is None
    read = images_from_disk if on_disk else images_in_memory
    reader = read(split, cfg, device, views, planned)
    for _ in steps:
        start = time.perf_counter()
        with record_function("reading"):
            epoch, samples, images = next(reader)
        augmented = []
        with record_function("augmentation"):
            for view, (size, scale) in enumerate(views):
                u = uniforms(cfg.seed, epoch, samples, view)
                scale = None if on_disk else scale              # from disk they are crops already
                x = augment(images[view], u, size, scale, cfg.blur, color)
                augmented.append(x.contiguous(memory_format=torch.channels_last))
        labels = split.labels
        if labels is not None:
            labels = labels[samples].to(device, non_blocking=True)
        yield Batch(augmented, labels, epoch, samples, time.perf_counter() - start)


# ------------------------------------------------------------------------------- shapes, drawn here
OUTLINES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "stripes", "checks", "circles")
SHAPE_CLASSES = [f"{t} {o}" for o, t in itertools.product(OUTLINES, TEXTURES)]


def draw_shapes(n, split):
    """n images of 32 px, a class being outline x texture; position, size, angle, colors are random.

    The built-in data set: no file, no network, drawn in a second, the same on every machine for a
    split (0: training, 1: test)."""
    labels = torch.arange(n) % len(SHAPE_CLASSES)
    outline = labels // len(TEXTURES)
    texture = labels % len(TEXTURES)
    image = torch.arange(n)
    u = uniforms(0, split, image, view=-1)[:, :, None, None]    # numbers that no view is made of

    grid = (torch.arange(32) + 0.5) / 16 - 1                    # pixel centers in -1 .. 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")            # [32, 32]
    radius = 0.75 + 0.2 * u[:, 0]                               # [N, 1, 1]
    angle = 1.2 * (u[:, 1] - 0.5)
    x = (x - (1 - radius) * (2 * u[:, 2] - 1)) / radius         # [N, 32, 32], the shape's own axes
    y = (y - (1 - radius) * (2 * u[:, 3] - 1)) / radius
    turned_x = angle.cos() * x + angle.sin() * y
    turned_y = angle.cos() * y - angle.sin() * x
    x, y = turned_x, turned_y
    r = (x * x + y * y).sqrt()

    bar = torch.minimum(0.3 - x.abs(), 0.95 - y.abs())
    other_bar = torch.minimum(0.95 - x.abs(), 0.3 - y.abs())
    edges = torch.stack([0.5 - y, 0.5 + y / 2 + 0.866 * x, 0.5 + y / 2 - 0.866 * x])
    depth = torch.stack([0.85 - r,                              # how far inside a pixel lies
                         0.75 - torch.maximum(x.abs(), y.abs()),
                         edges.amin(0),
                         torch.maximum(bar, other_bar),
                         0.22 - (r - 0.7).abs()])[outline, image]
    inside = (16 * radius * depth + 0.5).clamp(0, 1)[:, None]   # [N, 1, 32, 32], soft over a pixel
    pitch = 6 + 2 * u[:, 4]
    phase = 6.283 * u[:, 5]
    stripes = (pitch * x + phase).sin()
    checks = 2 * stripes * (pitch * y + phase).sin()
    circles = (pitch * r + phase).sin()
    wave = torch.stack([torch.ones_like(x), stripes, checks, circles])[texture, image]
    first_color = u[:, 6:9, 0]                                  # [N, 3, 1]
    second_color = (first_color + 0.5) % 1                      # never too close to the first
    background = u[:, 9:12, 0]
    share = (2 * wave + 0.5).clamp(0, 1)[:, None]               # [N, 1, 32, 32]
    shape = torch.lerp(second_color[..., None], first_color[..., None], share)     # [N, 3, 32, 32]
    pixels = torch.lerp(background[..., None], shape, inside)
    return Split(pixels=(255 * pixels).round().to(torch.uint8), labels=labels)


# -------------------------------------------------------------------------- features and accuracies
def resize(pixels, size):
    """uint8 [B, 3, H, W] -> float in [0, 1], [B, 3, size, size]; nothing is cut off."""
    images = to_float(pixels)
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def test_views(split, size, device, workers, batch_size=None):
    """The test views of a split, batch by batch: the images' numbers, int64 [B], and the views on
    the device, normalized, float32 [B, 3, size, size]. Decoded images are taken whole, those on
    disk by their `center_box`; what cannot be read is left out."""
    if batch_size is None:                                      # more at once are slower on a CPU
        on_cpu = torch.device(device).type == "cpu"
        batch_size = 32 if on_cpu and size > SMALL else 256
    if split.pixels is not None:
        numbers = torch.arange(len(split)).split(batch_size)
        found = ((samples, resize(split.pixels[samples].to(device), size)) for samples in numbers)
    else:
        loader = DataLoader(Crops(split.files, [(size, None)]), batch_size, num_workers=workers,
                            sampler=[(0, i) for i in range(len(split))],
                            worker_init_fn=leave_group)
        found = ((asked[asked == samples], crops[0][asked == samples].to(device))
                 for crops, _, asked, samples in loader)
    for samples, images in found:
        yield samples, normalize(images).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def average_batch_norm(encoder, split, workers=0, images=512):
    """A copy of an encoder, in evaluation mode, with the batch-norm statistics of some images of a
    split: the mean over batches of 32.

    Running statistics lag behind the weights, in MobileNets by hundreds of steps, and those of an
    untrained network are 0 and 1. As torch.optim.swa_utils.update_bn, but dropout stays off."""
    encoder = copy.deepcopy(encoder).eval()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None                              # each batch counts alike
            module.train()
        if isinstance(module, SplitBatchNorm2d):
            module.splits = 1
    device = next(encoder.parameters()).device
    some = split.subset(np.random.default_rng(1).permutation(len(split))[:images])
    for _, x in test_views(some, encoder.image_size, device, workers, batch_size=32):
        if len(x) > 1:                                          # one image has no variance
            encoder(x)
    return encoder.eval()


@torch.no_grad()
def extract_features(encoder, split, device="cpu", workers=0):
    """Backbone features of the test views: float32 [N, feature_dim], on the CPU; and the split of
    these N images: all that can be read."""
    was_training = encoder.training
    encoder.eval()
    features = torch.empty(len(split), encoder.feature_dim)     # once: there may be millions
    readable = np.zeros(len(split), bool)
    for samples, x in test_views(split, encoder.image_size, device, workers):
        features[samples] = encoder.features(x).float().cpu()   # [B, feature_dim]
        readable[samples] = True
    encoder.train(was_training)
    if not readable.all():
        features = features[readable]
    return features, without_unreadable(split, readable)


def nearest_neighbors(queries, bank, k=10):
    """Cosine similarities [M, k] and indices [M, k] of the k rows of `bank` [N, feature_dim] that
    are most similar to each of the queries [M, feature_dim]."""
    bank = F.normalize(bank, dim=1)
    similarities = []
    indices = []
    for part in queries.split(128):                             # [128, N] at a time
        top = (F.normalize(part, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        similarities.append(top.values)
        indices.append(top.indices)
    return torch.cat(similarities), torch.cat(indices)


def knn(train_x, train_y, test_x, test_y, k=10):
    """kNN accuracy in percent: each of the k nearest training images votes for its label with its
    cosine similarity. train_x: features [N, feature_dim], train_y: int64 [N]; test_x, test_y: M."""
    similarities, indices = nearest_neighbors(test_x, train_x, k)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1, device=test_x.device)
    votes.scatter_add_(1, train_y[indices], similarities.clamp(min=1e-9))      # [M, C]
    return 100 * (votes.argmax(1) == test_y).float().mean().item()


def fit_linear(x, y, rows, classes, rates, epochs=100, batch_size=256):
    """Linear layers that read y [N] off x [N, feature_dim], one for each learning rate; trained on
    some rows of both, int64 [n].

    The authors' probe: SGD, momentum 0.9, no weight decay, 100 epochs, rate x 0.1 at 60 and 80."""
    layers = [nn.Linear(x.shape[1], classes).to(x.device) for _ in rates]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    groups = [dict(params=layer.parameters(), lr=rate) for layer, rate in zip(layers, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    milestones = [round(0.6 * epochs), round(0.8 * epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(rows)))
        for batch in rows[order.to(x.device)].split(batch_size):
            batch_x = x[batch]
            batch_y = y[batch]
            loss = sum(F.cross_entropy(layer(batch_x), batch_y) for layer in layers)
            optimizer.zero_grad()
            loss.backward()                                     # each layer gets its own gradient
            optimizer.step()
        schedule.step()
    return layers


@torch.no_grad()
def accuracy(layer, x, y):
    """Percent of the features x [M, feature_dim] whose label y [M] the layer finds."""
    return 100 * (layer(x).argmax(1) == y).float().mean().item()


def linear_probe(train_x, train_y, test_x, test_y, rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """Accuracy of a linear classifier on frozen features in percent, and its learning rate.

    The rate is chosen on a tenth of the *training* set, which is held out; then all of it is used,
    and the last epoch counts. Features are first brought to mean 0 and standard deviation 1, so
    that the same rates serve every network. Arguments as `knn`."""
    mean = train_x.mean(0)
    std = train_x.std(0)
    std = std.clamp(min=1e-5 * std.max().item() + 1e-30)        # a constant feature stays at 0
    train_x = (train_x - mean).div_(std)
    test_x = (test_x - mean).div_(std)
    classes = int(train_y.max()) + 1
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train_x))).to(train_x.device)
    held_out, rest = order.tensor_split([max(1, len(order) // 10)])
    layers = fit_linear(train_x, train_y, rest, classes, rates)
    found = [accuracy(layer, train_x[held_out], train_y[held_out]) for layer in layers]
    rate = rates[int(np.argmax(found))]
    [layer] = fit_linear(train_x, train_y, order, classes, [rate])
    return accuracy(layer, test_x, test_y), rate


def evaluate(encoder, data, device="cpu", workers=0, limit=None, linear=True):
    """Evaluate an encoder on a data set, on at most `limit` images of each split (a fixed choice).

    Returns: scores: a dict of knn and linear (percent) and rate (the probe's learning rate), None
    where labels are missing or `linear` is off; and what they rest on, for `save_neighbors`:
    training split, test split, and the features of both."""
    splits = []
    for split in (data.train, data.test):
        if limit and len(split) > limit:
            split = split.subset(np.random.default_rng(0).permutation(len(split))[:limit])
        splits.append(split)
    train_x, train = extract_features(encoder, splits[0], device, workers)
    test_x, test = extract_features(encoder, splits[1], device, workers)
    scores = dict(knn=None, linear=None, rate=None)
    if data.has_labels:
        labeled = [x.to(device) for x in (train_x, train.labels, test_x, test.labels)]
        scores["knn"] = knn(*labeled)
        if linear:
            scores["linear"], scores["rate"] = linear_probe(*labeled)
    return scores, (train, test, train_x, test_x)


# ------------------------------------------------------------- protocols that train on random crops
CROPS = dict(crop_scale=(0.08, 1.0), batch_size=256, blur=False, view_epochs=None)
LINEAR = dict(CROPS, epochs=100, lr=30.0, backbone_lr=0.0, weight_decay=0.0)      # the authors'
FINETUNE = dict(CROPS, epochs=60, lr=0.1, backbone_lr=0.01, weight_decay=1e-4)    # ours
SCRATCH = dict(CROPS, epochs=60, lr=0.1, backbone_lr=0.1, weight_decay=1e-4)


def protocol(settings, args, encoder, data):
    """The settings of `fit_classifier` for these flags and data."""
    cfg = argparse.Namespace(**settings, seed=args.seed, workers=args.workers,
                             image_size=encoder.image_size)
    cfg.epochs = args.epochs or cfg.epochs
    world_size = rank_and_world_size()[1]
    cfg.batch_size = min(args.batch_size or cfg.batch_size, len(data.train))
    cfg.batch_size -= cfg.batch_size % world_size
    if cfg.batch_size < 2 * world_size:
        raise InputError(f"{len(data.train)} training images are too few, or the batch is: each "
                         "process needs 2; raise --label-fraction or --batch-size")
    return cfg


def fit_classifier(encoder, data, device, cfg):
    """Accuracy in percent of a class layer that is trained on random crops and flips.

    The features are not normalized. With cfg.backbone_lr = 0 the backbone is frozen, batch norm
    included: a linear probe. Else it is trained, too. Learning rates are for a batch of 256; x 0.1
    after 60 and 80% of the epochs. The test images are looked at once, at the end."""
    torch.manual_seed(cfg.seed)
    is_trained = cfg.backbone_lr > 0
    backbone = encoder.backbone.train(is_trained).requires_grad_(is_trained)
    layer = nn.Linear(encoder.feature_dim, len(data.classes)).to(device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    network = nn.Sequential(backbone, layer)
    model = distribute(network)
    scale = cfg.batch_size / 256
    groups = [dict(params=layer.parameters(), lr=scale * cfg.lr)]
    if is_trained:
        groups.append(dict(params=backbone.parameters(), lr=scale * cfg.backbone_lr))
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=cfg.weight_decay)
    steps_per_epoch = len(data.train) // cfg.batch_size
    steps = cfg.epochs * steps_per_epoch
    milestones = [round(0.6 * steps), round(0.8 * steps)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    views = [(cfg.image_size, cfg.crop_scale)]
    stream = batches(data.train, cfg, device, views, range(steps), color=False)
    for step, batch in enumerate(stream, start=1):
        loss = F.cross_entropy(model(batch.views[0]), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % steps_per_epoch == 0:
            if not layer.weight.isfinite().all():               # the same on every process
                raise FloatingPointError("a weight is not finite; the accuracy would mean nothing")
            print0(f"  epoch {step // steps_per_epoch}/{cfg.epochs}  loss {loss.item():.3f}")
    if is_trained:
        encoder = average_batch_norm(encoder, data.train, cfg.workers)
    features, test = extract_features(encoder, data.test, device, cfg.workers)
    return accuracy(layer, features.to(device), test.labels.to(device))


def label_fraction(split, fraction, seed):
    """The same share of each class, one image at least, chosen by the seed."""
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels.numpy()[order]
    chosen = []
    for label in np.unique(labels):
        members = order[labels == label]
        chosen.append(members[:max(1, round(fraction * len(members)))])
    return split.subset(np.sort(np.concatenate(chosen)))


def export(encoder, path):
    """Write the backbone as torchvision's own weights, for `load_state_dict` with strict=False: all
    keys but the class layer's. InputError for what torchvision does not have."""
    if encoder.small_images or encoder.arch not in torchvision.models.list_models():
        raise InputError(f"torchvision has no {encoder.arch} like this one (wider, with a stem for "
                         "small images, or from torch.hub); use encoder.pt and load_teacher")
    weights = encoder.backbone.state_dict()
    save_file(path, {name: value.cpu().contiguous() for name, value in weights.items()})


# ---------------------------------------------------------------------------------- grids of images
FRAMES = dict(white=(1.0, 1.0, 1.0), green=(0.1, 0.7, 0.2), red=(0.85, 0.2, 0.15))


def save_grid(path, rows, frames=None):
    """Write rows (lists of float [3, S, S] in [0, 1]) as one image; `frames` names a color each."""
    side = rows[0][0].shape[1]
    zoom = max(1, 96 // side)
    tiles = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            color = FRAMES[frames[i][j] if frames else "white"]
            framed = torch.tensor(color)[:, None, None].repeat(1, side * zoom + 8, side * zoom + 8)
            framed[:, 4:-4, 4:-4] = tile.cpu().repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
            tiles.append(framed)
    with replace_file(path) as file:
        torchvision.utils.save_image(tiles, file, "png", nrow=len(rows[0]), padding=2, pad_value=1)


def save_json(path, content):
    """Write numbers and texts as JSON."""
    with replace_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def test_image(split, index, size):
    """The test view of one image, float [3, size, size] in [0, 1]; of another if it is broken."""
    if split.pixels is not None:
        return resize(split.pixels[index:index + 1], size)[0]
    [crop], *_ = Crops(split.files[index:index + 1000], [(size, None)])[0, 0]
    return to_float(crop)


def save_views(path, data, scale, blur, seed=0, columns=8, count=6):
    """What augmentation does: a row for each image, itself first, then views of it."""
    size = data.image_size
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    rows = []
    for index in range(min(count, len(data.train))):
        image = test_image(data.train, index, size)
        u = torch.cat([uniforms(seed, epoch, [index]) for epoch in range(columns - 1)])
        views = augment(image.expand(columns - 1, -1, -1, -1), u, size, scale, blur)
        rows.append([image, *(views * std + mean).clamp(0, 1)])
    save_grid(path, rows)


def save_neighbors(path, train, test, train_x, test_x, size, count=8, k=7):
    """Test images, and the training images nearest to them. Green frame: the same label; red:
    another one."""
    queries = np.random.default_rng(0).permutation(len(test))[:count]
    indices = nearest_neighbors(test_x[queries], train_x, k)[1]
    rows = []
    frames = []
    for query, near in zip(queries.tolist(), indices.tolist()):
        rows.append([test_image(test, query, size)] + [test_image(train, i, size) for i in near])
        colors = ["white"] * len(near)
        if train.labels is not None and test.labels is not None:
            same = train.labels[near] == test.labels[query]
            colors = ["green" if hit else "red" for hit in same]
        frames.append(["white", *colors])
    save_grid(path, rows, frames)


def print_table(rows, data, device, workers, out):
    """Evaluate the encoder of each row, print a table, and keep it as OUT/results.json.

    rows: dicts of name, encoder (Encoder, or the path of its file; of OUT/encoder.pt the neighbors
    are drawn) and seconds (of training, or None)."""
    counts = [f"{min(len(split), TABLE_LIMIT):,}" for split in (data.train, data.test)]
    more = f" of {len(data.train):,}; probe.py takes all" if len(data.train) > TABLE_LIMIT else ""
    print(f"\nevaluating on {counts[0]} training and {counts[1]} test images{more}")
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}s}     kNN  linear  seconds  labels used")
    results = []
    for row in rows:
        encoder = row["encoder"]
        if not isinstance(encoder, nn.Module):
            encoder = load_teacher(encoder)
        encoder = encoder.to(device, memory_format=torch.channels_last)
        scores, material = evaluate(encoder, data, device, workers, TABLE_LIMIT)
        texts = ["-", "-"]
        if data.has_labels:
            texts = [f"{scores['knn']:.1f}%", f"{scores['linear']:.1f}%"]
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else "-"
        labels = {True: "yes", False: "no", None: "unknown"}[encoder.used_labels]
        made = encoder.provenance.split(", started from: ")
        if encoder.used_labels and len(made) == 1 and "teacher: " in made[0]:
            labels = "by its teacher"
        print(f"{row['name']:{width}s}  {texts[0]:>6s}  {texts[1]:>6s}  {seconds:>7s}  {labels}",
              flush=True)
        results.append(dict(name=row["name"], seconds=row["seconds"], labels=labels, **scores))
        if row["encoder"] == f"{out}/encoder.pt":
            save_neighbors(Path(out, "neighbors.png"), *material, data.image_size)
    save_json(Path(out, "results.json"), results)
    print(f"wrote {out}/: encoder.pt, log.csv, results.json, views.png, neighbors.png")


# --------------------------------------------------------------------------- devices and processes
def pick_device(name):
    """torch.device from auto, cpu, cuda or mps; InputError if there is none such."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    names = [device for device in here if here[device]]
    name = names[0] if name == "auto" else name
    if name not in names:
        raise InputError(f"no device '{name}' here; use --device {' or '.join(names)}")
    return torch.device(name)


def init_distributed(device_name):
    """Join the process group that torchrun describes in the environment, if it did; the device."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    gpus = torch.cuda.device_count()
    if world_size > 1 and device.type == "mps":
        raise InputError("several processes need GPUs of NVIDIA's or --device cpu")
    if device.type == "cuda":
        if processes_here() > gpus:
            raise InputError(f"{processes_here()} processes but {gpus} GPUs; lower "
                             "--nproc_per_node")
        if world_size == 1 and gpus > 1:
            command = f"torchrun --nproc_per_node={gpus} {shlex.join(sys.argv)}"
            print(f"note: {gpus - 1} GPUs are not used; {command}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True                   # pick the fastest convolutions
    if world_size > 1:
        gpu = device if device.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=gpu)
    return device


def distribute(module):
    """The module, its gradients averaged over the processes, if there are several."""
    if not dist.is_initialized():
        return module
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)    # torch 2.14's
    return DistributedDataParallel(module, broadcast_buffers=False)


def is_main_process():
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def print0(*words):
    """Print, from the main process alone; Ctrl-C ends `| tee` before the run has saved."""
    try:
        if is_main_process():
            print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def processes_here():
    """How many of the processes that train together run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def default_workers():
    """Processes that read images: the CPUs that this process may use, at most 8."""
    cpus = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):                        # Linux: fewer, if so bound
        cpus = len(os.sched_getaffinity(0))
    return max(1, min(8, cpus // processes_here()))


@contextmanager
def main_process_first():
    """The main process runs the block, then one process of each other machine, then the others:
    what those download or write, these find, whether the machines share their disks or not."""
    before = 1 if os.environ.get("LOCAL_RANK") == "0" else 2    # turns of others
    before = 0 if is_main_process() else before
    after = 2 - before
    if not dist.is_initialized():
        before = after = 0
    for _ in range(before):
        dist.barrier()
    try:
        yield
    finally:
        for _ in range(after):
            dist.barrier()


def from_main_process(function, *args):
    """Call a function on the main process alone; what it returns, or its InputError, goes to all:
    the folder of a run is on the first machine."""
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


def load_teacher_on_all(path, arch=None):
    """`load_teacher` for several processes; a file has to be on the first machine alone."""
    if path.startswith("hub:"):                                 # each imports its code
        with main_process_first():
            return load_teacher(path, arch)
    return from_main_process(load_teacher, path, arch)


def load_data_on_all(*args):
    """`load_data` for several processes; InputError if two machines have other images."""
    with main_process_first():
        data = load_data(*args)
    if data.fingerprint != from_main_process(getattr, data, "fingerprint"):
        raise InputError(f"the images on {platform.node()} are not those of the first machine")
    return data


# ------------------------------------------------------------------------------------- the command
def one_line(error):
    """The line of an InputError; one from a DataLoader's worker drags a traceback behind it."""
    return "error: " + str(error).strip().split("\n")[-1].split("InputError: ")[-1]


def label_use(used_labels):
    """Whether labels took part in training an encoder, in words."""
    words = {True: "WITH the labels of the training images", False: "without labels"}
    return words.get(used_labels, "labels unknown")


REASONS = {                     # what errors of PyTorch's mean, those that are no bugs
    r"DataLoader worker \(pid|shared memory|/torch_": "a process that reads images was killed; if "
    "shared memory (/dev/shm) is small, as in Docker, give it more (--shm-size 8g), or take "
    "--workers 0",
    "out of memory|llocate|ALLOC_FAILED": "out of memory; lower --batch-size, --image-size, "
    "--subset or --workers",
    "onnection (closed|reset)|NCCL": "another process of this run has ended, or cannot be reached; "
    "the same command goes on from the last checkpoint"}


def run_command(main):
    """Call `main`; what a user can mend becomes one line and an exit code."""
    if hasattr(sys.stdout, "reconfigure"):                      # a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as e:
        fail(one_line(e), 2)
    except (FloatingPointError, OSError) as e:
        fail(f"error: {e}", 1)
    except KeyboardInterrupt:
        fail("\ninterrupted", 130)
    except (RuntimeError, MemoryError) as e:
        text = str(e) or "out of memory"
        reasons = [line for pattern, line in REASONS.items() if re.search(pattern, text)]
        if not reasons:
            raise
        fail(f"error: {reasons[0]} ({text.splitlines()[0][:150]})", 1)


def fail(line, code):
    """End with a line, of the main process if it fails, too."""
    if not is_main_process():                                   # it ends this one before it speaks
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(line, file=sys.stderr)
    sys.exit(code)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Texts as they are written; defaults where there are any."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


RANGES = dict(                  # least and most of each flag that is a number
    epochs=(1, 10**6), teacher_epochs=(1, 10**6), view_epochs=(1, 10**6), eval_every=(0, 10**6),
    warmup_epochs=(0, 10**6), max_steps=(1, 10**12), batch_size=(2, 10**6), subset=(1, 10**9),
    lr=(1e-9, 1e3), weight_decay=(0, 10), tau_s=(1e-6, 1e3), tau_t=(1e-6, 1e3), dim=(1, 2**16),
    hidden_dim=(0, 2**16), queue_size=(1, 10**7), image_size=(8, 4096), small_size=(8, 4096),
    small_crops=(0, 64), workers=(0, 256), seed=(0, 2**63 - 1), save_minutes=(0, 10**6),
    label_fraction=(1e-9, 1))


def check_ranges(args):
    """InputError for a number that is out of its range."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be from {least:g} to {most:g}, got {value}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_args(argv=None):
    """The command line of probe.py."""
    parser = Parser(description="kNN and linear probe of an encoder's frozen features.")
    flag = parser.add_argument
    flag("encoder", help="an encoder.pt, or what else seed.load_teacher reads; or random:ARCH")
    flag("--arch", help="the network's name, where the file does not say it")
    flag("--dataset", choices=DATASETS, default="shapes", help="what to evaluate on")
    flag("--data", default="data", metavar="DIR", help="where the images are")
    flag("--image-size", type=int, help="side of an image in pixels; if not given, the size at "
         "which it was trained")
    flag("--small-images", action="store_true", help="with random:ARCH: the stem for small images")
    flag("--subset", type=int, metavar="N", help="use N training images, chosen by the seed")
    flag("--label-fraction", type=float, default=1.0, metavar="P",
         help="use this share of each class of the training images")
    flag("--linear", choices=("cached", "paper"), default="cached", help="the linear probe: on "
         "features of center crops, and with kNN; or the paper's, on random crops, by torchrun too")
    flag("--finetune", action="store_true", help="train the whole network with labels; and another "
         "from scratch, to compare")
    flag("--epochs", type=int, help="of --linear paper (if not given, 100) and --finetune (60)")
    flag("--batch-size", type=int, help="of both, over all processes; if not given, 256")
    flag("--export", metavar="PATH", help="only write the weights as torchvision names them")
    flag("--seed", type=int, default=0, help="of the subset, and of random:ARCH")
    flag("--workers", type=int, default=default_workers(),
         help="processes that read images")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--out", metavar="DIR", help="for probe.json and neighbors.png; if not given, beside the "
         "encoder's file, or here")
    args = parser.parse_args(argv)
    check_ranges(args)
    if args.finetune and args.linear == "paper":
        parser.error("--finetune and --linear paper are two runs; leave one out")
    if (args.epochs or args.batch_size) and not args.finetune and args.linear != "paper":
        parser.error("--epochs and --batch-size are for --finetune and --linear paper")
    return args


def load_encoder(args):
    """The encoder that the command line names."""
    if args.encoder.startswith("random:"):
        torch.manual_seed(args.seed)
        size = args.image_size or native_size(args.dataset)
        arch = args.encoder.removeprefix("random:")
        return Encoder(arch, small_images=args.small_images, image_size=size)
    encoder = load_teacher_on_all(args.encoder, args.arch)
    if args.image_size:
        encoder.check_image_size(args.image_size)
    return encoder


NAMES = dict(knn="kNN", linear="linear probe", linear_paper="linear probe as in the paper",
             finetuned="fine-tuned", from_scratch="the same network from scratch")


def run_protocol(args, encoder, data, device, out):
    """What the flags ask for: a dict of scores."""
    if not data.has_labels and (args.finetune or args.linear == "paper"):
        raise InputError(f"{args.data} has no labels to train with; use class folders")
    if args.finetune:
        torch.manual_seed(args.seed)
        scratch = Encoder(encoder.arch, small_images=encoder.small_images,
                          image_size=encoder.image_size).to(device)
        rows = {"finetuned": (FINETUNE, encoder), "from_scratch": (SCRATCH, scratch)}
    elif args.linear == "paper":
        rows = {"linear_paper": (LINEAR, encoder)}
    elif not is_main_process():
        return {}
    else:
        scores, material = evaluate(encoder, data, device, args.workers)
        save_neighbors(out / "neighbors.png", *material, data.image_size)
        return scores
    scores = {}
    for name, (settings, network) in rows.items():
        print0(f"{name}:")
        cfg = protocol(settings, args, network, data)
        scores[name] = fit_classifier(network, data, device, cfg)
    return scores


def main(argv=None):
    args = parse_args(argv)
    start = time.time()
    device = init_distributed(args.device)
    encoder = load_encoder(args).to(device, memory_format=torch.channels_last)
    if args.export:
        if is_main_process():
            export(encoder, args.export)
        return print0(f"wrote {args.export}: {encoder.arch}, all but its class layer")
    data = load_data_on_all(args.dataset, args.data, encoder.image_size, args.subset, args.seed)
    if args.encoder.startswith("random:"):
        encoder = average_batch_norm(encoder, data.train, args.workers)
    if args.label_fraction < 1 and data.has_labels:
        data.train = label_fraction(data.train, args.label_fraction, args.seed)
    print0(f"{encoder.provenance}, {label_use(encoder.used_labels)}\n{data}")
    out = Path(args.encoder).parent if os.path.exists(args.encoder) else Path(".")
    out = Path(args.out or out)
    refuse_among_data(out, args.dataset, args.data)
    make_folder(out)
    scores = run_protocol(args, encoder, data, device, out)
    if dist.is_initialized():
        dist.destroy_process_group()
    if not is_main_process():
        return
    found = [f"{NAMES[key]} {scores[key]:.1f}%" for key in NAMES if scores.get(key) is not None]
    print("   ".join(found) or "no labels, so no accuracy")
    summary = dict(encoder=args.encoder, provenance=encoder.provenance,
                   used_labels=encoder.used_labels, data=str(data), flags=vars(args), **scores)
    file = out / "probe.json"
    if args.finetune or args.linear == "paper":
        file = out / f"probe-{next(iter(scores))}.json"         # beside those of other protocols
    save_json(file, summary)
    print(f"wrote {file} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
