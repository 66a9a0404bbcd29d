"""Compute features, accuracies and image grids from images and networks.

    python probe.py runs/shapes-seed-mobilenet_v3_large/encoder.pt
    python probe.py random:mobilenet_v3_large
    python probe.py encoder.pt --dataset folder --data ~/images

An encoder that was trained without labels is judged by its frozen features, on a task for which it
was not trained. kNN lets the ten nearest training images vote for the label of a test image. It has
no settings to tune. A linear probe fits one linear layer that predicts labels from features. Its
learning rate is chosen on held-out *training* images. No choice depends on the test images.

Shapes use the letters of seed.py, and N, M (images in a split) and F (features)."""
import argparse
import atexit
import contextlib
import copy
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import ExifTags, Image, PngImagePlugin
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pad, pil_to_tensor, resize

from seed import Encoder, InputError, augment, crop_box, to_float, torchvision_backbone, uniforms

DATASETS = dict(shapes=32, cifar10=32, cifar100=32, imagenet=224, folder=224)   # pixels per side
SMALL = 64                      # images of at most this many pixels per side stay decoded in memory
MEMORY = 2 * 2**30              # if they fit in this many bytes
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif",
              ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".mpo", ".apng")
NO_CLASSES = {"__macosx", "lost+found", "@eadir", "#recycle", "@recycle", "$recycle.bin",
              "#snapshot", "~snapshot", "@recently-snapshot", "network trash folder",
              "temporary items", "system volume information", "found.000", "recycler",
              "thevolumesettingsfolder", "@sharebin"}   # what operating systems leave
VAL_NAMES = ("val", "valid", "validation", "test")
SPLIT_NAMES = {"train", "training", "testing", *VAL_NAMES}
WHITE = (1, 255, 4095, 65535)   # possible values of white in images with more than 8 bits
NOT_THE_IMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
UNREADABLE = set()              # files that were reported
TURNS = dict(zip(range(2, 9), (                # what undoes an EXIF orientation
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90)))
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")]
warnings.filterwarnings("ignore", module="PIL")    # on metadata, from every worker
Image.MAX_IMAGE_PIXELS = 2**29                 # phones take 200 megapixels
PngImagePlugin.MAX_TEXT_CHUNK = 2**26          # bytes of a color profile; Pillow allows 2**20


# -------------------------------------------------------------------------------------- 1. images
@dataclass
class Split:
    """The training or the test images: either decoded pixels, uint8 [N, 3, S, S], or N file paths.
    labels: int64 [N] or None."""
    pixels: torch.Tensor = None
    files: list = None
    labels: torch.Tensor = None
    total: int = None           # images of the split from which this sample was drawn

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def subset(self, index):
        """Return the images at `index` (int64 array), in that order."""
        pixels = None if self.pixels is None else self.pixels[index]
        files = None if self.files is None else [self.files[i] for i in index]
        labels = None if self.labels is None else self.labels[index]
        return Split(pixels, files, labels)


@dataclass
class Data:
    """A data set. classes: C names, empty if the images have no labels; fingerprint: a hash of the
    labels and the pixels, or the names of images on disk; notes: what was left out."""
    name: str
    image_size: int
    train: Split
    test: Split
    classes: list
    fingerprint: str = ""
    notes: tuple = ()

    def __str__(self):
        labels = f"{len(self.classes)} classes" if self.classes else "without labels"
        place = "on disk" if self.train.pixels is None else "in memory"
        counts = f"{len(self.train):,} training and {len(self.test):,} test images"
        text = f"{self.name}, {counts} of {self.image_size} px {place}, {labels}"
        return "; ".join([text, *self.notes])


def load_data(name, root="data", image_size=None, subset=None, seed=0):
    """Open a data set by name.

    Args: name: one of DATASETS. root: its directory. shapes needs none; CIFAR is downloaded there;
        imagenet is ROOT/train/CLASS and ROOT/val/CLASS; folder is any directory of images, with or
        without class folders, with or without train/ and val/. image_size: pixels per side; None:
        as in DATASETS. subset: number of training images, chosen by `seed`.
    Returns: Data. Raises: InputError for a directory that is missing or contains no images."""
    image_size = image_size or DATASETS[name]
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
            digest.update(os.fsencode("\n".join(paths_below(root, split.files))))
            for file in split.files[::max(1, len(split) // 100)]:
                with contextlib.suppress(OSError):              # `report_unreadable` names it
                    if os.path.isfile(file):                    # a named pipe would block
                        digest.update(Path(file).read_bytes())
            if image_size <= SMALL and len(split) * 3 * image_size**2 <= MEMORY:
                split = decode(split, image_size)
        for values in (split.pixels, split.labels):
            if values is not None:
                digest.update(values.numpy())
        splits.append(split)
    return Data(name, image_size, *splits, classes, digest.hexdigest()[:12], notes)


def read_cifar(name, root):
    """Return the splits and classes of CIFAR-10 or -100. Download it if it is missing."""
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
    """Return the training split, test split, classes and notes for the image files below `root`."""
    if not root.is_dir():
        raise InputError(f"there is no directory {root}; --data names the directory of images")
    top, val = split_folders(root)
    files, notes = list_files(top)
    others = [path.name for path in root.glob("[!.]*") if path.is_dir() and path not in (top, val)]
    if top != root and others:                                  # "train" may also be a class
        notes.append(f"folders beside {top} are not used: {', '.join(sorted(others)[:3])}")
    if len(files) < 2:
        raise InputError(f"{len(files) or 'no'} image in {top} (looked for {' '.join(EXTENSIONS)})")
    folders = class_folders(files, top)
    classes = sorted(set(folders))
    words = {folder.lower().rstrip("0123456789") for folder in classes}     # like COCO's train2017
    if words <= SPLIT_NAMES:
        raise InputError(f"{top} contains {' and '.join(classes)}, which are not classes; put "
                         "train and val directly into --data")
    if "" in classes and len(classes) > 2:
        notes.append(f"{top} has images outside class folders, so its folders are not classes")
    if len(classes) < 2 or "" in classes:                       # a single class is no label
        classes = []
    if classes and top == root and not words.isdisjoint(VAL_NAMES):
        notes.append("there is no train/, so a folder named like test images is one of the classes")
    if name == "imagenet" and not (val and classes):
        raise InputError(f"{root} needs train/ and val/, each with one folder per class; otherwise "
                         "use --dataset folder")
    labels = torch.tensor(np.searchsorted(classes, folders)) if classes else None
    train = Split(files=files, labels=labels)
    if val:
        test_files, more_notes = list_files(val)
        if not test_files:
            raise InputError(f"no image in {val}")
        test_folders = class_folders(test_files, val)
        unknown = sorted(set(test_folders) - set(classes) - {""})
        if classes and unknown:
            raise InputError(f"{val} has classes that {top} lacks: {', '.join(unknown[:3])}")
        if not classes or "" not in test_folders:
            labels = torch.tensor(np.searchsorted(classes, test_folders)) if classes else None
            return train, Split(files=test_files, labels=labels), classes, notes + more_notes
        notes.append(f"{val} has images outside class folders; a part of {top} is held out instead")
    held_out = choose_held_out(paths_below(top, files), folders if classes else [""] * len(files))
    if not held_out.any():
        raise InputError(f"{top} has one image per class, so no image can be held out for testing")
    test = train.subset(np.flatnonzero(held_out))
    return train.subset(np.flatnonzero(~held_out)), test, classes, notes


def split_folders(root):
    """Return the folders of the training and the test images; without train/, `root` and None."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    val = [folders[name] for name in VAL_NAMES if name in folders and "train" in folders]
    return folders.get("train", root), val[0] if val else None


def choose_held_out(names, folders):
    """Return which images are test images, bool [N]: about a tenth, chosen by a hash of the name.

    So no other image moves if images are added or removed. But each class of two images or more has
    one on both sides, if necessary the one with the lowest or highest hash."""
    digests = [hashlib.sha256(os.fsencode(name.replace(os.sep, "/"))).digest() for name in names]
    position = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
    held_out = position < 0.1
    _, label = np.unique(folders, return_inverse=True)          # [N]
    order = np.lexsort((position, label))                       # by class, then by hash
    for members in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        held_out[members[0]] = True
        held_out[members[-1]] = False                           # also the only image of a class
    return held_out


def list_files(top):
    """Return all image files below `top`, sorted, and notes on what was left out. Hidden files,
    such as macOS's ._x.jpg, are skipped. Symlinks are followed, but no directory twice."""
    found = []
    others = Counter()
    seen = set()
    root = os.path.realpath(top)

    def cannot_open(error):
        raise InputError(f"cannot open the folder {error.filename} ({error.strerror})")

    def is_found_elsewhere(path):
        """Return whether a symlink leads to something below `top` that is no hidden file."""
        below = os.path.relpath(os.path.realpath(path), root) if os.path.islink(path) else ".."
        return not below.startswith("..") and (below == "." or f"{os.sep}." not in os.sep + below)

    for folder, folders, names in os.walk(top, onerror=cannot_open, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        others.update(f"folder {name}" for name in folders if name.lower() in NO_CLASSES)
        folders[:] = sorted(name for name in folders if name[0] != "." and name.lower() not in
                            NO_CLASSES and not is_found_elsewhere(os.path.join(folder, name)))
        for name in names:
            path = os.path.join(folder, name)
            extension = os.path.splitext(name)[1].lower()
            if name.startswith(".") or is_found_elsewhere(path):
                continue
            if extension in EXTENSIONS or (not extension and is_image(path)):
                found.append(path)
            else:
                others[extension or "without extension"] += 1
    counts = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3))
    return sorted(found), [f"left out in {top}: {counts}"] if others else []


def is_image(path):
    with contextlib.suppress(Exception), open_image(path):      # a decoder may raise anything
        return True
    return False


def open_image(path):
    """Open an image with Pillow. Refuse a named pipe, which would block forever."""
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    return Image.open(path)


def paths_below(top, files):
    """Return the paths relative to the directory `top`."""
    return [file[len(os.path.join(top, "")):] for file in files]


def class_folders(files, top):
    """Return the name of each file's folder directly below `top`, or "" if it is in none."""
    return [path.rpartition(os.sep)[0].split(os.sep)[0] for path in paths_below(top, files)]


def read_crops(path, sizes, choose_boxes):
    """Open one image and return crops of it, a list of uint8 [3, size, size], one for each size.

    `choose_boxes(height, width)` returns their boxes: rows of (top, left, height, width) in pixels.
    Pillow resizes each box directly from the image, and decodes a JPEG at 1/2, 1/4 or 1/8 of its
    size where that is fine enough. Raises: InputError if the image cannot be read."""
    try:
        with open_image(path) as image:
            turn = orientation(image)
            width, height = image.size if turn < 5 else image.size[::-1]
            boxes = choose_boxes(height, width)
            zoom = max(size / min(h, w) for size, (_, _, h, w) in zip(sizes, boxes))
            image.draft("RGB", [int(side * zoom) for side in image.size])
            if turn > 1:
                image = image.transpose(TURNS[turn])
            scale_x = image.width / width
            scale_y = image.height / height
            if image.mode[0] in "IF":                           # convert() would clip at 255
                values = np.nan_to_num(np.asarray(image, np.float32), posinf=0).clip(min=0)
                top = values.max()                              # resizing may overshoot white
                white = min([white for white in WHITE if top <= 1.2 * white], default=top)
                image = Image.fromarray((values * (255 / white)).clip(0, 255).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGB")
            crops = []
            for size, (top, left, h, w) in zip(sizes, boxes):
                corners = (left * scale_x, top * scale_y, (left + w) * scale_x, (top + h) * scale_y)
                crop = image.resize((size, size), Image.Resampling.BILINEAR, box=corners)
                crops.append(pil_to_tensor(crop))               # [3, size, size]
    except Exception as e:                                      # a decoder may raise anything
        if isinstance(e, MemoryError) or getattr(e, "errno", None) in NOT_THE_IMAGE:
            raise                                               # the image is not the reason
        raise InputError(f"cannot read the image {path} ({e}); replace or remove it") from None
    return crops


def orientation(image):
    """Return the EXIF orientation, 1 to 8; 1 if it is absent, damaged, or applied by Pillow."""
    turn = 1
    with contextlib.suppress(Exception):                        # the pixels may be fine
        turn = image.getexif().get(ExifTags.Base.Orientation)
    return turn if turn in TURNS and image.format != "TIFF" else 1


def center_box(size):
    """Return a `choose_boxes` for the test view: the central square if the view is small, otherwise
    7/8 of its side (as in: resize to 256, crop 224)."""
    fraction = 1 if size <= SMALL else 7 / 8

    def choose_boxes(height, width):
        side = min(height, width) * fraction
        return [((height - side) / 2, (width - side) / 2, side, side)]

    return choose_boxes


class Crops(Dataset):
    """Crops of image files, for a DataLoader. Item (epoch, index) is a list of uint8 [3, S, S], one
    for each view, and "". If the image cannot be read, they are gray crops and the file's path.

    views: side and crop scale of each, which is None for the test view."""

    def __init__(self, files, views, seed=0):
        self.files = np.array([os.fsencode(file) for file in files])    # one block for all workers
        self.views = views
        self.seed = seed

    def __getitem__(self, item):
        epoch, index = item
        file = os.fsdecode(self.files[index])

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
        try:
            return read_crops(file, sizes, choose_boxes), ""
        except InputError:
            return [torch.full((3, size, size), 128, dtype=torch.uint8) for size in sizes], file


def report_unreadable(files, known, total):
    """Print each file that cannot be read once; `known` collects them. Raise InputError if they are
    more than 1% of `total`."""
    known.update(set(files) - {""})
    if len(known) > max(1, total // 100) or len(known) == total:
        raise InputError(f"{len(known)} of {total:,} images cannot be read, such as "
                         f"{', '.join(sorted(known)[:3])}; replace or remove them")
    for file in sorted(known - UNREADABLE):
        print0(f"note: the image {file} cannot be read; a gray one takes its place")
    UNREADABLE.update(known)


def decode(split, size):
    """Return the split with its files decoded: their central squares, uint8 [N, 3, size, size]."""
    crops = Crops(split.files, [(size, None)])
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(crops.__getitem__, [(0, i) for i in range(len(split))]))
    report_unreadable([file for _, file in found], set(), len(split))
    return Split(torch.stack([crop for [crop], _ in found]), split.files, split.labels)


def start_worker(worker):
    """Let a DataLoader worker ignore signals. Ctrl-C, `timeout` and Slurm signal every process, but
    the run still needs its workers to finish its step."""
    if hasattr(os, "setpgrp"):                                  # Windows has no process groups
        os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kill workers that an error left behind: Python would wait for them forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # PyTorch's handler raises an error
    for process in multiprocessing.active_children():
        process.kill()


OUTLINES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "stripes", "checks", "circles")
SHAPE_CLASSES = [f"{t} {o}" for o, t in itertools.product(OUTLINES, TEXTURES)]


def draw_shapes(n, split):
    """Draw the built-in data set: n images of 32 px in 20 classes, each an outline with a texture.
    Position, size, angle and colors are random. Drawing needs no file and takes a second. A split
    (0: training, 1: test) is the same on every machine."""
    labels = torch.arange(n) % len(SHAPE_CLASSES)
    outline = labels // len(TEXTURES)
    texture = labels % len(TEXTURES)
    image = torch.arange(n)
    u = uniforms(0, split, image, view=-1)[:, :, None, None]    # view -1 is never a view

    grid = (torch.arange(32) + 0.5) / 16 - 1                    # pixel centers in -1 .. 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")            # [32, 32]
    radius = 0.75 + 0.2 * u[:, 0]                               # [N, 1, 1]
    angle = 1.2 * (u[:, 1] - 0.5)
    moved_x = (x - (1 - radius) * (2 * u[:, 2] - 1)) / radius   # [N, 32, 32]
    moved_y = (y - (1 - radius) * (2 * u[:, 3] - 1)) / radius
    x = angle.cos() * moved_x + angle.sin() * moved_y           # along the shape's own axes
    y = angle.cos() * moved_y - angle.sin() * moved_x
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
    first_color = u[:, 6:9]                                     # [N, 3, 1, 1]
    second_color = (first_color + 0.5) % 1                      # always different from the first
    background = u[:, 9:12]
    share = (2 * wave + 0.5).clamp(0, 1)[:, None]               # [N, 1, 32, 32]
    shape = torch.lerp(second_color, first_color, share)        # [N, 3, 32, 32]
    pixels = torch.lerp(background, shape, inside)
    return Split(pixels=(255 * pixels).round().to(torch.uint8), labels=labels)


# --------------------------------------------------------------------------------- 2. checkpoints
# Published files differ in the names around the weights. A backbone is found under any prefix that
# has all of its keys, and its head is in the place of the classifier or beside the backbone. Every
# missing key is an error, and every key that is neither part of them nor in UNUSED. If a file has
# several complete networks, the first line here that fits exactly one of them decides:
PREFERRED = ("encoder_q.", "base_encoder.", "module.student.",  # MoCo v1 and v2; v3; SEED's authors
             "teacher.backbone.", "teacher.module.backbone.",       # DINO
             "encoder.backbone.", "backbone.", "")  # our last.pt; lightly, solo-learn; a single one
UNUSED = re.compile(r"encoder_k|key_encoder|momentum|queue|prototypes|predict|optim|dino_loss|"
                    r"criterion\.|class_vectors|memory_bank|method\.classifier\.|head\.mlp\.|"
                    r"last_layer\.|callbacks\.")
RESNET_KEYS = ("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight")
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def load_teacher(path_or_url, arch=None, prefix=None, mean=None, std=None):
    """Return a trained Encoder, frozen and in evaluation mode.

    Its head is the one in the file, but a classifier is dropped. Without a head, or with DINO's,
    which has other activations, the embedding is the normalized features.

    Args: path_or_url: a file, an http(s) URL (kept in torch's hub folder), or hub:REPO:ENTRY for
        torch.hub, where REPO may be a directory. torch.hub runs that repository's code.
        arch: the network's name, if neither the file nor the shapes of a ResNet tell it, or if the
        file has the wrong one. prefix: of the backbone's keys, if the file has several networks.
        mean, std: of each color channel, in 0..1, if it was not trained with ImageNet's.
    Returns: Encoder. `used_labels`, if the file does not record it, is False with a head (published
        heads are trained without labels), otherwise None.
    Raises: InputError for a file that is missing, damaged, unknown, or does not fit the network."""
    path = str(path_or_url)
    pixels = {name: x for name, x in dict(mean=mean, std=std).items() if x is not None}
    if path.startswith("hub:"):
        return load_from_hub(path, pixels)
    file = read_checkpoint(path)
    tensors = name_children(flatten(file))
    arch = network_name(arch, file, path)
    prefix, others = find_backbone(tensors, arch, prefix, path)
    if arch is None:                                        # a ResNet's name counts its layers
        convolution = re.compile(re.escape(prefix) + r"layer.*conv[123]\.weight")
        arch = f"resnet{2 + len([key for key in tensors if convolution.fullmatch(key)])}"
    teacher = new_teacher(file, arch, tensors.get(f"{prefix}conv1.weight"), pixels, path)
    backbone, head, head_name = sort_weights(tensors, prefix, others, teacher, path)
    fill(teacher, backbone, head, path)
    layers = ", ".join(type(layer).__name__ for layer in teacher.head.children())
    known = f"head '{head_name}' ({layers or 'Linear'})" if head else "no projection head"
    made = file.get("provenance", f"weights under '{prefix}', {known}")
    total = len(teacher.backbone.state_dict())
    teacher.provenance = f"{teacher.arch}, {made}, matched {total} backbone keys"
    teacher.used_labels = file.get("used_labels", False if head else None)
    teacher.multi_crop = any("prototypes" in name for name in tensors)
    return teacher.eval().requires_grad_(False)


def new_teacher(file, arch, stem, pixels, path):
    """Return an Encoder with the options of an encoder.pt, or those of the first convolution of a
    ResNet: SwAV's and VICReg's may be wider, and CIFAR's have a stem for small images. (That of
    solo-learn pads by 2 instead of 1, which the weights do not show.)"""
    try:
        options = dict(dim=None, small_images=stem is not None and stem.shape[2:] == (3, 3))
        if file.get("format") == "seed-encoder":
            names = ("dim", "hidden_dim", "small_images", "image_size", "mean", "std")
            options = {name: file[name] for name in names}
        factor = len(stem) // 64 if stem is not None and stem.ndim == 4 else 1
        if 2 <= factor <= 9:
            options["backbone"] = wide_resnet(arch, factor)
            arch = f"{arch}w{factor}"
        teacher = Encoder(arch, **{**options, **pixels})
    except (KeyError, RuntimeError, TypeError):
        raise InputError(f"{path} is not a complete encoder.pt; save it again") from None
    if not (teacher.std > 0).all():
        raise InputError(f"{path}: the pixels' standard deviations, std, must be above 0")
    return teacher


def wide_resnet(arch, factor):
    """Return a torchvision ResNet without its final Linear, with all layers `factor` times as wide.
    (In torchvision's own wide ResNets, only the blocks are wider inside.)"""
    resnet, _ = torchvision_backbone(arch)
    for m in resnet.modules():                              # __init__ makes a layer again, wider
        if isinstance(m, nn.Conv2d):
            inputs = 3 if m.in_channels == 3 else factor * m.in_channels
            outputs = factor * m.out_channels
            m.__init__(inputs, outputs, m.kernel_size, m.stride, m.padding, bias=False)
        elif isinstance(m, nn.BatchNorm2d):
            m.__init__(factor * m.num_features)
    return resnet


def load_from_hub(name, pixels):
    """Return the Encoder hub:REPO:ENTRY. Its embedding is its normalized output."""
    repo, _, entry = name.removeprefix("hub:").rpartition(":")
    repo = expanduser(repo)
    source = "local" if os.path.isdir(repo) else "github"
    try:
        backbone, again = [torch.hub.load(repo, entry, source=source, trust_repo="check")
                           for _ in range(2)]
        encoder = Encoder(name, None, backbone=backbone, **pixels)
        for weights, others in zip(backbone.state_dict().values(), again.state_dict().values()):
            if not torch.equal(weights, others):
                raise ValueError("some of its layers have random weights; use its file of weights")
    except (Exception, SystemExit) as e:                                # it is other people's code
        raise InputError(f"cannot load {name}: {first_line(e)}") from None
    encoder.provenance = f"{name}, no projection head"
    encoder.used_labels = None
    return encoder.eval().requires_grad_(False)


def flatten(value, name=""):
    """Return all tensors in nested dicts, by their dotted names; torch.compile adds _orig_mod."""
    if isinstance(value, torch.Tensor):
        return {name.replace("_orig_mod.", ""): value}
    found = {}
    is_dict = isinstance(value, dict) and name.count(".") < 30      # it might contain itself
    for key, inner in value.items() if is_dict else ():
        found.update(flatten(inner, f"{name}.{key}" if name else str(key)))
    return found


def name_children(tensors):
    """Name the numbered children of nn.Sequential(*resnet.children()), as in lightly's files."""
    block = "4.0.conv1.weight"
    prefixes = [name.removesuffix(block) for name in tensors if f".{name}".endswith(f".{block}")]
    for prefix in prefixes:
        for name in [name for name in tensors if name.startswith(prefix)]:
            child, _, rest = name.removeprefix(prefix).partition(".")
            if child in CHILDREN:
                tensors[f"{prefix}{CHILDREN[child]}.{rest}"] = tensors.pop(name)
    return tensors


def network_name(arch, file, path):
    """Return the network's name, given or in the file, or None. InputError if it is unknown."""
    found = arch or file.get("arch", getattr(file.get("args"), "arch", None))
    if not isinstance(found, str):
        return None
    name = re.sub(r"^(resnet\d+)[wx]\d$", r"\1", found.lower())        # a wider ResNet
    if arch is None and name not in torchvision.models.list_models():
        raise InputError(f"{path} is a {found}, which torchvision does not have. If one of its "
                         "networks computes the same, --teacher-arch (probe.py: --arch) names it")
    return name


def find_backbone(tensors, arch, prefix, path):
    """Return the prefix of the backbone's keys, and those of other complete networks."""
    keys = RESNET_KEYS
    if arch:
        keys = torchvision_backbone(arch)[0].state_dict()
        keys = [key for key in keys if "num_batches_tracked" not in key]    # old files lack these
    counts = Counter()
    for key in keys:
        counts.update(name.removesuffix(key) for name in tensors if name.endswith(key))
    whole = [found for found in counts if counts[found] == len(keys)]
    candidates = [found for found in whole if prefix in (found, found[:-1])]
    if prefix is None:
        candidates = [found for found in whole if not UNUSED.search(found)]
    for end in PREFERRED:
        chosen = [found for found in candidates if f".{found}".endswith(f".{end}")]
        if len(chosen) == 1:
            return chosen[0], tuple(found for found in whole if found not in ("", *chosen))
    if whole and (candidates or prefix is None):
        raise InputError(f"{path} contains several networks, under {whole}; choose one of them "
                         "with --teacher-prefix (probe.py: --prefix)")
    prefix = prefix or max(counts, key=counts.get, default="")
    missing = ", ".join([key for key in keys if prefix + key not in tensors][:3])
    held = ", ".join(list(tensors)[:3]) or "no tensors"
    raise InputError(f"{path} has no complete {arch or 'ResNet'}: {counts[prefix]} of {len(keys)} "
                     f"keys are there, under '{prefix}', without {missing}; it contains {held}. "
                     "--teacher-arch (probe.py: --arch) names another network")


def sort_weights(tensors, prefix, others, teacher, path):
    """Return the backbone's weights, the head's, and the head's prefix.

    If the backbone is "module.backbone.", a head is looked for in the place of its classifier and
    beside it, such as "module.projector." Barlow Twins keeps a batch norm there: "module.bn." """
    layer = re.compile(r"(|.*?\.)(\d+\.)?(weight|bias|running_(mean|var)|num_batches_tracked)")
    own = teacher.backbone.state_dict()
    children = dict(teacher.backbone.named_children())
    classifier = f"{prefix}{teacher.last_layer or 'fc'}."
    beside = prefix[:prefix.rstrip(".").rfind(".") + 1]                 # without its last word
    backbone = {}
    heads = {}
    unknown = []
    for name, value in tensors.items():
        key = name.removeprefix(prefix)
        match = layer.fullmatch(name)
        is_inside = name.startswith(prefix) and key.split(".")[0] in children
        is_part = is_inside and not name.startswith(classifier)
        if name.startswith(prefix) and key in own:
            backbone[key] = value
        elif name.startswith((*others, f"{beside}bn.")):
            continue
        elif UNUSED.findall(name) != UNUSED.findall(prefix):
            continue
        elif match and match[1].startswith(beside) and not is_part:
            heads.setdefault(match[1], {})[name.removeprefix(match[1])] = value
        elif is_inside or (value.numel() > 1 and value.is_floating_point()):
            unknown.append(name)                # others are an accuracy, or a random state
    # Not wanted: a classifier (a Linear, except in MoCo v1), another network's head, DINO's head.
    owners = [re.sub("backbone.*", "", network) for network in (prefix, *others)]
    dino = [name.rpartition("last_layer.")[0] for name in tensors if "head.last_layer." in name]
    for group, head in list(heads.items()):
        shapes = [value.shape[1:] for value in head.values() if value.ndim > 1]
        is_projection = "proj" in group.removeprefix(prefix).removeprefix(beside)
        is_projection |= bool(re.search("encoder_[qk]", prefix)) or teacher.hidden_dim == 0
        is_classifier = shapes == [(teacher.feature_dim,)] and not is_projection
        owner = max([x for x in owners if group.startswith(x)], key=len, default=owners[0])
        if is_classifier or owner != owners[0] or group.startswith(tuple(dino)):
            del heads[group]
    if unknown or len(heads) > 1:
        names = ", ".join((unknown or list(heads))[:3])
        raise InputError(f"{path} has weights that are no part of torchvision's {teacher.arch} or "
                         f"its head, such as {names}; remove them")
    head_name, head = heads.popitem() if heads else ("", {})
    return backbone, head, head_name


def rebuild_head(weights, width):
    """Return a head with weights "0.weight", "1.running_mean", ..., and the width of its output.

    A layer with running statistics is a BatchNorm1d, any other a Linear, and a missing one between
    them a ReLU. (A single Linear has no number.)"""
    numbers = {int(name.split(".")[0]) for name in weights if name[0].isdigit()}
    if not numbers:
        return nn.Linear(width, len(weights.get("weight", ()))), len(weights.get("weight", ()))
    has_norm = any("running_mean" in name for name in weights)  # then biases may be absent
    head = nn.Sequential()
    for number in range(max(numbers) + 1):
        if f"{number}.running_mean" in weights:
            head.append(nn.BatchNorm1d(width, affine=f"{number}.weight" in weights))
        elif number in numbers:
            bias = f"{number}.bias" in weights or not has_norm
            head.append(nn.Linear(width, len(weights.get(f"{number}.weight", ())), bias))
            width = head[-1].out_features
        elif {number - 1, number + 1} <= numbers:
            head.append(nn.ReLU(inplace=True))
        else:
            raise ValueError(f"its head lacks layer {number}")
    return head, width


def fill(teacher, backbone, head, path):
    """Load all weights into the teacher. Raise InputError for what does not fit."""
    weights = {f"backbone.{name}": value for name, value in backbone.items()}
    weights.update({f"head.{name}": value for name, value in head.items()})
    try:
        if head:
            teacher.head, teacher.dim = rebuild_head(head, teacher.feature_dim)
            if isinstance(teacher.head, nn.Linear):
                teacher.hidden_dim = 0
        own = teacher.state_dict()
        for name, value in weights.items():
            if name.endswith(("weight", "bias")) and not value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, not torch.float32")
            if not torch.isfinite(value.float()).all():
                raise ValueError(f"{name} has values that are not finite")
            if name.endswith("running_var") and (value < 0).any():
                raise ValueError(f"{name} has negative values, but it is a variance")
        for name in list(own):
            if "num_batches_tracked" not in name:                       # old files lack these
                del own[name]
        own.update(weights)                     # keeps torch's record of the modules' versions
        teacher.load_state_dict(own)
    except (RuntimeError, TypeError, ValueError) as e:
        lines = str(e).split("\n\t")                                    # one for each misfit
        problems = "; ".join(line[:120] for line in lines[1:4] or lines)
        raise InputError(f"{path} does not fit a {teacher.arch}: {problems}") from None


class StandIn(list):
    """What `read_checkpoint` makes of an object that is not a tensor. It keeps attributes, such as
    args.arch, and ignores everything else."""
    __hash__ = object.__hash__

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


class DictStandIn:              # the same for a kind of dict, which may contain weights
    def __new__(cls, *args):
        return OrderedDict()


def read_checkpoint(path_or_url):
    """Return the dict in a file or at a URL. Nothing in it is executed or constructed except
    tensors and plain values. Raise InputError if it cannot be read."""
    path = str(path_or_url)
    try:
        if path.startswith(("http://", "https://")):
            path = download(path)
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged:                                         # torch.load ignores checksums
            raise ValueError(f"{damaged} in it is damaged")
        file = load_without_objects(path)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as e:                                  # damaged, code inside, no network
        reason = why_unreadable(path, e)
        if path != str(path_or_url):
            os.remove(path)                 # otherwise the next run would load the damaged download
        raise InputError(f"cannot read {without_secrets(path)}: {reason}") from None
    if not isinstance(file, dict):
        raise InputError(f"{path} is not a checkpoint: expected a dict of weights")
    return file


def load_without_objects(path):
    """Return what torch.load returns, with a stand-in for each object that it refuses."""
    stand_ins = {}
    while True:
        try:
            allowed = [(kind, name) for name, kind in stand_ins.items()]
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            refused = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(e))
            filled = re.search(rf"Can only SETITEMS? .*<class '{__name__}\.([\w.]+)'>", str(e))
            found = refused or filled                           # a dict of another kind
            name = found[1] if found else ""
            name = name if "." in name else f"builtins.{name}"
            if not found or (refused and name in stand_ins):
                raise
            stand_ins[name] = DictStandIn if filled else type(name, (StandIn,), {})


def download(url):
    """Return the file at a URL, kept in torch's hub folder. A signature after "?" is not kept."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = os.path.join(folder, f"{digest}-{os.path.basename(urlsplit(url).path)}")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path)
    return path


def without_secrets(path):
    """Return a URL without its signature and password, or any other path as it is."""
    if not str(path).startswith(("http://", "https://")):
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def why_unreadable(path, error):
    """Return in one line why torch.load failed."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it contains a {code[1]}, which could run code; save only the weights"
    if os.path.isfile(path):
        with open(path, "rb") as file:
            start = file.read(100).lstrip()
        if start.startswith(b"<"):
            return "it is a web page; download the file again"
        if start.startswith(b"version https://git-lfs"):
            return "it only points to a file; fetch that with git lfs pull"
    if "persistent_load" in str(error):
        return "it contains a whole network as an object; save its state_dict()"
    if "TorchScript" in str(error):
        return "it is a torchscript program; save only the weights of its network"
    reason = first_line(error)
    if "only load" in reason or not isinstance(error, (OSError, RuntimeError, ValueError)):
        return "torch.save did not write it, or not all of it"
    return reason


def first_line(error):
    """Return the first line of an exception's text, or its type if it has none."""
    return str(error).split("\n")[0] or type(error).__name__


def describe(encoder, provenance, used_labels):
    """Return what `load_teacher` needs to know about an Encoder besides its weights: a dict."""
    return dict(format="seed-encoder", provenance=provenance, used_labels=used_labels,
                arch=encoder.arch, hidden_dim=encoder.hidden_dim, image_size=encoder.image_size,
                dim=None if isinstance(encoder.head, nn.Identity) else encoder.dim,
                small_images=encoder.small_images, mean=encoder.mean.flatten().tolist(),
                std=encoder.std.flatten().tolist())


def save_encoder(path, encoder, provenance, used_labels):
    """Write an Encoder to an encoder.pt, with the backbone under torchvision's names. provenance,
    used_labels: the values of these attributes when the file is loaded."""
    file = describe(encoder, provenance, used_labels)
    for part in ("backbone", "head"):
        weights = getattr(encoder, part).state_dict()
        file[part] = {name: value.cpu().contiguous() for name, value in weights.items()}
    save_file(path, file)


@contextlib.contextmanager
def replace_file(path):
    """Yield a binary file that becomes `path` once it is complete and on the disk. After a kill or
    a power cut, `path` has its old content or its new content. Raise OSError if writing fails."""
    temporary = f"{path}.{os.getpid()}.tmp"
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {path}: there is no folder {folder}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                                # torch's own: RuntimeError
        free = shutil.disk_usage(folder).free
        raise OSError(f"cannot write {path}: {first_line(e)}; {free:,} bytes are free") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_file(path, content):
    with replace_file(path) as file:
        torch.save(content, file)


def save_json(path, content):
    with replace_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


# ------------------------------------------------------------------------------------ 3. features
def read_images(split, views, items, device, workers, seed=0):
    """Yield each batch as a list with its images for each view, uint8 [B, 3, H, W], on the device.
    Images in memory are whole; those on disk are `Crops`.

    views: side and crop scale of each view; items: for each batch a list of (epoch, index)."""
    if split.pixels is not None:
        pixels = split.pixels.to(device)
        for batch in items:
            index = torch.tensor([i for _, i in batch])         # a list would wait for the GPU
            yield [pixels[index.to(device, non_blocking=True)]] * len(views)
        return
    loader = DataLoader(Crops(split.files, views, seed), batch_sampler=items, num_workers=workers,
                        worker_init_fn=start_worker, pin_memory=device.type == "cuda")
    known = set()
    for crops, unreadable in loader:
        report_unreadable(unreadable, known, split.total or len(split))
        yield [crop.to(device, non_blocking=True) for crop in crops]


def center_views(split, size, device="cpu", workers=0, batch_size=None, index=None):
    """Yield the test views of the images at `index`, or of all, float [B, 3, size, size] in 0..1,
    on the device: decoded images as they are, and the `center_box` of images on disk."""
    device = torch.device(device)
    index = torch.arange(len(split)) if index is None else torch.as_tensor(index)
    if batch_size is None:                                      # a larger batch is slower on a CPU
        batch_size = 32 if device.type == "cpu" and size > SMALL else 256
    items = [[(0, i) for i in part.tolist()] for part in index.split(batch_size)]
    for [images] in read_images(split, [(size, None)], items, device, workers):
        images = resize(to_float(images), [size, size])         # nothing is cropped
        yield images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def average_batch_norm(encoder, split, workers=0, images=512):
    """Return a copy of an encoder, in evaluation mode, whose batch-norm statistics are the mean
    over batches of 32 of some images of a split.

    Running statistics lag behind the weights, in MobileNets by hundreds of steps, and those of an
    untrained network are 0 and 1. (torch.optim.swa_utils.update_bn would also turn on dropout.)"""
    encoder = copy.deepcopy(encoder).eval()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None                              # every batch counts equally
            module.train()
    device = next(encoder.parameters()).device
    some = split.subset(np.random.default_rng(1).permutation(len(split))[:images])
    some.total = len(split)
    for x in center_views(some, encoder.image_size, device, workers, batch_size=32):
        if len(x) > 1:                                          # a single image has no variance
            encoder(x)
    return encoder.eval()


@torch.no_grad()
def extract_features(encoder, split, device="cpu", workers=0):
    """Return the features of a split's test views: float32 [N, F] on the CPU."""
    was_training = encoder.training
    encoder.eval()
    features = torch.empty(len(split), encoder.feature_dim)     # once, because it may be large
    done = 0
    for x in center_views(split, encoder.image_size, device, workers):
        features[done:done + len(x)] = encoder.features(x)      # [B, F]
        done += len(x)
    encoder.train(was_training)
    return features


def nearest_neighbors(queries, bank, k=10):
    """Return the cosine similarities [M, k] and indices [M, k] of the k rows of `bank` [N, F] that
    are most similar to each of the queries [M, F]."""
    bank = F.normalize(bank, dim=1).T
    parts = F.normalize(queries, dim=1).split(128)              # [128, N] similarities at a time
    found = [(part @ bank).topk(min(k, bank.shape[1]), dim=1) for part in parts]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def knn(train_x, train_y, test_x, test_y, k=10):
    """Return the kNN accuracy in percent. Each of the k nearest training images votes for its label
    with its cosine similarity. train_x: float [N, F], train_y: int64 [N]; test_x, test_y: M."""
    similarities, indices = nearest_neighbors(test_x, train_x, k)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1, device=test_x.device)
    votes.scatter_add_(1, train_y[indices], similarities.clamp(min=1e-9))      # [M, C]
    return accuracy(votes, test_y)


def fit_linear(x, y, classes, rates, epochs=100, batch_size=256):
    """Return a Linear that predicts y [N] from x [N, F] L times: C outputs for each learning rate.

    As in the authors' probe: SGD, momentum 0.9, no weight decay, 100 epochs, and a tenth of the
    learning rate after 60 and again after 80. Without weight decay, a factor of the loss acts like
    a factor of the learning rate, so all L classifiers fit into one fast layer."""
    layer = nn.Linear(x.shape[1], len(rates) * classes).to(x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    factors = torch.tensor(rates, device=x.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    milestones = [round(0.6 * epochs), round(0.8 * epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(x)))
        for batch in order.to(x.device).split(batch_size):
            logits = layer(x[batch]).view(-1, classes)                          # [B*L, C]
            labels = y[batch].repeat_interleave(len(rates))                     # [B*L]
            losses = F.cross_entropy(logits, labels, reduction="none").view(-1, len(rates))
            loss = losses.mean(dim=0) @ factors
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return layer


def accuracy(scores, y):
    """Return the percentage of rows of scores [M, C] that are highest at the label y [M]."""
    return 100 * (scores.argmax(1) == y).float().mean().item()


def linear_probe(train_x, train_y, test_x, test_y, rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """Return the accuracy of a linear classifier on frozen features in percent, and its learning
    rate. Arguments as for `knn`.

    The learning rate is chosen on a held-out tenth of the *training* images. Then all of them are
    used. Features are standardized, so the same rates suit every network."""
    mean = train_x.mean(0)
    std = train_x.std(0, correction=0)
    std = std.clamp(min=1e-5 * std.max().item() + 1e-30)        # a constant feature stays at 0
    train_x = (train_x - mean).div_(std)
    test_x = (test_x - mean).div_(std)
    classes = int(train_y.max()) + 1
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train_x))).to(train_x.device)
    held_out, rest = order.tensor_split([max(1, len(order) // 10)])
    layer = fit_linear(train_x[rest], train_y[rest], classes, rates)
    logits = layer(train_x[held_out]).view(-1, len(rates), classes)            # [M, L, C]
    found = [accuracy(part, train_y[held_out]) for part in logits.unbind(dim=1)]
    rate = rates[int(np.argmax(found))]
    layer = fit_linear(train_x, train_y, classes, [rate])
    return accuracy(layer(test_x), test_y), rate


def evaluate(encoder, data, device="cpu", workers=0, limit=None, linear=True):
    """Evaluate an encoder on a data set, on at most `limit` images of each split (a fixed choice).

    Returns: scores, a dict of knn and linear (percent) and rate (of the linear probe), which are
    None without labels; and for `save_neighbors` both splits, and the pair of their features."""
    splits = [data.train, data.test]
    for i, split in enumerate(splits):
        if limit and len(split) > limit:
            splits[i] = split.subset(np.random.default_rng(0).permutation(len(split))[:limit])
            splits[i].total = len(split)
    features = [extract_features(encoder, split, device, workers) for split in splits]
    scores = dict(knn=None, linear=None, rate=None)
    if data.classes:
        train_x, test_x = [x.to(device) for x in features]
        train_y, test_y = [split.labels.to(device) for split in splits]
        scores["knn"] = knn(train_x, train_y, test_x, test_y)
        if linear:
            scores["linear"], scores["rate"] = linear_probe(train_x, train_y, test_x, test_y)
    return scores, (*splits, features)


# ------------------------------------------------------------------------------------ 4. pictures
FRAMES = dict(white=(1.0, 1.0, 1.0), green=(0.1, 0.7, 0.2), red=(0.85, 0.2, 0.15))


def save_grid(path, images, columns, frames=None):
    """Write images, float [N, 3, S, S] in 0..1, row by row. `frames` has N colors of FRAMES."""
    images = F.interpolate(images.cpu(), scale_factor=max(1, 96 // images.shape[2]))
    colors = [FRAMES[name] for name in frames or ["white"] * len(images)]
    tiles = [pad(image, 4, fill=color) for image, color in zip(images, colors)]
    with replace_file(path) as file:
        torchvision.utils.save_image(tiles, file, "png", nrow=columns, padding=2, pad_value=1)


def save_views(path, data, cfg, columns=8, count=6):
    """Write what augmentation does with a run's settings: rows of an image, then views of it."""
    index = range(min(count, len(data.train)))
    [images] = center_views(data.train, data.image_size, index=index)
    shown = [images]
    for epoch in range(columns - 1):
        u = uniforms(cfg.seed, epoch, index)
        shown.append(augment(images, u, data.image_size, cfg.crop_scale, cfg.blur, cfg.color))
    save_grid(path, torch.stack(shown, dim=1).flatten(0, 1), columns)


def save_neighbors(path, train, test, features, size, count=6, k=7):
    """Write test images, each with its nearest training images, in one row for each pair of
    `features` (training, test). Frames are green for the same label and red for another one."""
    queries = np.random.default_rng(0).permutation(len(test))[:count]
    nearest = [nearest_neighbors(test_x[queries], train_x, k)[1] for train_x, test_x in features]
    images = []
    frames = []
    for i, query in enumerate(queries.tolist()):
        for near in nearest:
            images += center_views(test, size, index=[query])
            images += center_views(train, size, index=near[i])
            colors = ["white"] * len(near[i])
            if train.labels is not None and test.labels is not None:
                same = train.labels[near[i]] == test.labels[query]
                colors = ["green" if hit else "red" for hit in same]
            frames += ["white", *colors]
    save_grid(path, torch.cat(images), 1 + nearest[0].shape[1], frames)


# --------------------------------------------------------------------------------- 5. the command
def is_main_process():
    """Return whether this process prints and writes."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return (os.environ.get("RANK") or "0") == "0" or not os.environ.get("WORLD_SIZE")


def print0(*words):
    """Print, only in the main process. A closed pipe, as of `| tee` after Ctrl-C, is ignored."""
    try:
        if is_main_process():
            print(*words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


LABEL_USE = {True: "WITH the labels of the training images", False: "without labels",
             None: "labels unknown"}            # in words, for Encoder.used_labels
REASONS = {                     # what PyTorch's errors mean, if they are not bugs
    r"DataLoader worker \(pid|shared memory|</torch_": "a DataLoader worker was killed; if shared "
    "memory (/dev/shm) is small, as in Docker, enlarge it (--shm-size 8g), or use --workers 0",
    "Too many open files": "raise the limit of open files (ulimit -n 65536) or lower --workers",
    "out of memory|llocate|ALLOC_FAILED|MemoryError": "out of memory; lower --batch-size, "
    "--image-size, --subset or --workers",
    "onnection (closed|reset)|imed out|NCCL": "another process of this run has ended or cannot be "
    "reached; the same command resumes from the last checkpoint"}


def run_command(main):
    """Call `main`. An error that a user can fix becomes one line and an exit code."""
    if hasattr(sys.stdout, "reconfigure"):                      # a file name may be no valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as e:     # from a worker, it has a traceback in front of it
        fail("error: " + str(e).strip().split("\n")[-1].split("InputError: ")[-1], 2)
    except FloatingPointError as e:
        fail(f"error: {e}", 1)
    except KeyboardInterrupt:
        fail("\ninterrupted", 130)
    except (OSError, RuntimeError, MemoryError) as e:
        text = str(e).strip() or "out of memory"
        reasons = [f"{line}: " for pattern, line in REASONS.items() if re.search(pattern, text)]
        if not reasons and not isinstance(e, OSError):
            raise
        line = text.split("\n")[-1 if text.startswith("Caught ") else 0]       # of a worker
        fail(f"error: {''.join(reasons[:1])}{line[:300]}", 1)


def fail(line, code):
    """Print a line and exit. If the main process also fails, only its line appears."""
    if not is_main_process():                                   # torchrun ends this one meanwhile
        time.sleep(5)
    print(line, file=sys.stderr)
    sys.exit(code)


def number(kind, least, most):
    """Return an argparse type: an int or float from `least` to `most`."""
    def parse(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}, got {text}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def add_data_flags(flag):
    """Add the flags that train.py and probe.py share."""
    flag("--dataset", choices=DATASETS, default="shapes", help="shapes: built in")
    flag("--data", type=expanduser, default="data", metavar="DIR", help="where the images are")
    flag("--subset", type=number(int, 1, 1e9), metavar="N", help="use N training images")
    flag("--label-fraction", type=number(float, 1e-9, 1), default=1.0, metavar="P",
         help="use this fraction of each class of the training images")
    flag("--small-images", action=argparse.BooleanOptionalAction,
         help="full resolution in the first layers, for 32-64 px: better and far slower; use a GPU")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, views and subset")
    flag("--workers", type=number(int, 0, 256), default=default_workers(),
         help="DataLoader workers (%(default)s); raise it if a run waits for data")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")


def default_workers():
    """Return a number of DataLoader workers: the CPUs of this process, at most 8."""
    cpus = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):                        # on Linux, there may be fewer
        cpus = len(os.sched_getaffinity(0))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(8, cpus // max(1, int(processes) if processes.isdecimal() else 1)))


def pick_device(name):
    """Return a torch.device for auto, cpu, cuda or mps. InputError if there is no such device."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    names = [device for device in here if here[device]]
    name = names[0] if name == "auto" else name
    if name not in names:
        raise InputError(f"no device '{name}' here; use --device {' or '.join(names)}")
    return torch.device(name)


def make_folder(path):
    """Make a directory if it is missing. Raise InputError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the folder {path} ({e.strerror}); use another") from None


def check_out(out, dataset, data):
    """Raise InputError if `out` cannot be written, or if images in it would be among the data."""
    folder = Path(out).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot make the folder {out}; use another --out")
    root = Path(data)
    tops = [root]
    if root.is_dir() and split_folders(root)[0] != root:
        tops = [*filter(None, split_folders(root)), *[root / name for name in VAL_NAMES]]
    tops = {top.resolve() for top in tops}
    if dataset in ("folder", "imagenet") and {folder, *folder.parents} & tops:
        raise InputError(f"{out} is among the images of {data}; use another --out")


def label_fraction(split, fraction, seed):
    """Return a fraction of each class of a split, at least one image, chosen by the seed."""
    if fraction == 1:
        return split
    if split.labels is None:
        raise InputError("--label-fraction: the images have no labels")
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels.numpy()[order]
    chosen = []
    for label in np.unique(labels):
        members = order[labels == label]
        chosen.append(members[:max(1, round(fraction * len(members)))])
    return split.subset(np.sort(np.concatenate(chosen)))


def parse_args(argv=None):
    parser = Parser(description="kNN and a linear probe of an encoder's frozen features.")
    flag = parser.add_argument
    flag("encoder", type=expanduser, help="what load_teacher reads, or random:ARCH")
    flag("--arch", help="the network, if the file does not name it")
    flag("--prefix", help="of its keys, if the file has several networks")
    flag("--mean", type=number(float, 0, 1), nargs=3, metavar="M", help="of its pixels in 0..1")
    flag("--std", type=number(float, 1e-3, 10), nargs=3, metavar="S", help="likewise")
    flag("--image-size", type=number(int, 8, 4096), help="default: that of its training")
    flag("--out", type=expanduser, metavar="DIR", help="default: beside the encoder, or here")
    add_data_flags(flag)
    return parser.parse_args(argv)


def load_encoder(args):
    if not args.encoder.startswith("random:"):
        encoder = load_teacher(args.encoder, args.arch, args.prefix, args.mean, args.std)
        encoder.image_size = args.image_size or encoder.image_size
        encoder.check_image_size(encoder.image_size)
        return encoder
    torch.manual_seed(args.seed)
    arch = args.encoder.removeprefix("random:")
    size = args.image_size or DATASETS[args.dataset]
    return Encoder(arch, small_images=bool(args.small_images), image_size=size)


def main(argv=None):
    args = parse_args(argv)
    start = time.time()
    device = pick_device(args.device)
    encoder = load_encoder(args).to(device, memory_format=torch.channels_last)
    data = load_data(args.dataset, args.data, encoder.image_size, args.subset, args.seed)
    if args.encoder.startswith("random:"):
        encoder = average_batch_norm(encoder, data.train, args.workers)
    data.train = label_fraction(data.train, args.label_fraction, args.seed)
    print0(f"{encoder.provenance}, {LABEL_USE[encoder.used_labels]}\n{data}")
    out = Path(args.encoder).parent if os.path.exists(args.encoder) else Path(".")
    out = Path(args.out or out)
    check_out(out, args.dataset, args.data)
    make_folder(out)
    scores, (train, test, features) = evaluate(encoder, data, device, args.workers)
    if data.classes:
        print0(f"kNN {scores['knn']:.1f}%   linear probe {scores['linear']:.1f}%")
    else:
        print0("no labels, so no accuracy")
    save_neighbors(out / "probe.png", train, test, [features], data.image_size)
    args.encoder = without_secrets(args.encoder)
    summary = dict(encoder=args.encoder, provenance=encoder.provenance,
                   used_labels=encoder.used_labels, data=str(data), flags=vars(args), **scores)
    save_json(out / "probe.json", summary)
    print0(f"wrote {out}/probe.json and probe.png after {time.time() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
