"""Everything that looks: reading pictures, features, nearest neighbours, linear probe.

    python probe.py runs/shapes-seed-mobilenet_v3_large/encoder.pt
    python probe.py random:mobilenet_v3_large
    python probe.py encoder.pt --dataset folder --data ~/pictures

An encoder without labels is judged by how well its frozen features serve a question it was never asked.  Two
judges: kNN (do the ten nearest training pictures have the right label?) has nothing to tune, and a linear probe
(can one matrix read the label off the features?) chooses its learning rate on a part of the *training* pictures
that it holds out.  The test pictures choose nothing.

Letters as in seed.py; N pictures, C classes.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from seed import Encoder, InputError, as_float, augment, crop_and_resize, crop_box, load_teacher, normalise, uniforms

DATASETS = ("shapes", "cifar10", "cifar100", "imagenet", "folder")
SMALL, MEMORY = 64, 2 * 2**30          # pictures up to 64 px are kept decoded, as long as they fit in 2 GiB
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


# ------------------------------------------------------------------------------------------ the pictures
@dataclass
class Pictures:
    """One split.  pixels: uint8 [N, 3, S, S], decoded, or files: N paths; labels: int64 [N] or None."""
    pixels: torch.Tensor = None
    files: list = None
    labels: torch.Tensor = None

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def part(self, index):
        """The pictures at `index` (int64 array), in that order."""
        index = np.asarray(index)
        return Pictures(None if self.pixels is None else self.pixels[index],
                        None if self.files is None else [self.files[i] for i in index],
                        None if self.labels is None else self.labels[index])


@dataclass
class Data:
    """A data set, ready for use.  classes: C names, empty without labels; key: a hash of the pixels (of files
    on disk: their names) and labels."""
    name: str
    image_size: int
    train: Pictures
    test: Pictures
    classes: list
    key: str = ""

    @property
    def judged(self):
        """Whether accuracy can be told: both splits carry labels."""
        return self.train.labels is not None and self.test.labels is not None

    def __str__(self):
        labels = f"{len(self.classes)} classes" if self.judged else "without labels"
        place = "on disk" if self.train.pixels is None else "in memory"
        counts = f"{len(self.train):,} training and {len(self.test):,} test pictures"
        return f"{self.name}, {counts} of {self.image_size} px {place}, {labels}"


def load_data(name, root="data", image_size=None, subset=None, seed=0):
    """Open a data set by name.

    Args: name: one of DATASETS; root: its directory (shapes needs none; CIFAR is downloaded there; imagenet is
        ROOT/train/CLASS, ROOT/val/CLASS; folder is any directory of pictures: class folders or none, with or
        without train/ and val/); image_size: side of the pictures in pixels (None: 32, for imagenet and folder
        224); subset: train on that many pictures, chosen by `seed`.
    Returns: Data.  Raises: InputError for a directory or picture that is missing or cannot be read.
    """
    image_size, root = image_size or native_size(name), Path(root).absolute()
    if name == "shapes":
        train, test, classes = draw_shapes(5000, 0), draw_shapes(2000, 1), SHAPE_CLASSES
    elif name.startswith("cifar"):
        train, test, classes = read_cifar(name, root)
    else:
        train, test, classes = find_pictures(name, root)
    if subset is not None:
        if not 0 < subset <= len(train):
            raise InputError(f"--subset {subset}: there are {len(train):,} training pictures")
        train = train.part(np.sort(np.random.default_rng(seed).permutation(len(train))[:subset]))
    key = hashlib.sha256(name.encode())
    for split in (train, test):
        if split.pixels is None:
            key.update("\n".join(file[len(str(root)) + 1:] for file in split.files).encode("utf-8", "surrogateescape"))
            if image_size <= SMALL and len(split) * 3 * image_size**2 <= MEMORY:
                split.pixels = decode(split.files, image_size)
        for values in (split.pixels, split.labels):
            if values is not None:
                key.update(values.numpy())
    return Data(name, image_size, train, test, classes, key.hexdigest()[:12])


def native_size(name):
    """Side of a data set's pictures in pixels, unless told."""
    return 224 if name in ("imagenet", "folder") else 32


def read_cifar(name, root):
    """CIFAR-10 or -100 through torchvision, downloaded where it is missing."""
    cls = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        parts = [cls(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as e:
        raise InputError(f"cannot download {name} ({e}); put {cls.filename} into {root}/ by hand, "
                         "or use --dataset shapes, which needs no download") from None
    return *(Pictures(pixels=torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                      labels=torch.tensor(part.targets)) for part in parts), parts[0].classes


def find_pictures(name, root):
    """The picture files below `root` and their labels, from whatever layout is there."""
    if not root.is_dir():
        raise InputError(f"no directory {root}; say with --data where the pictures are")
    val = next((root / n for n in ("val", "valid", "validation", "test") if (root / n).is_dir()), None)
    needs = InputError(f"{root} needs train/ and val/, each with a folder for each class; else use --dataset folder")
    if name == "imagenet" and not (val and (root / "train").is_dir()):
        raise needs
    if (root / "train").is_dir():
        found = [list_files(root / "train"), list_files(val) if val else []]
        tops = [root / "train", val]
    else:
        found, tops = [list_files(root), []], [root, None]
    if len(found[0]) < 2:
        raise InputError(f"{len(found[0]) or 'no'} picture in {tops[0]} (looked for {', '.join(sorted(ENDINGS))})")

    # A label is the folder right below the top; where some picture lies in none, or all in one, there are no labels.
    below = lambda file, top: file[len(str(top)) + 1:].rpartition(os.sep)[0].partition(os.sep)[0]
    owners = [[below(file, top) for file in files] for files, top in zip(found, tops)]
    classes = sorted(set(owners[0]))
    if len(classes) < 2 or "" in classes:
        classes = []
    if name == "imagenet" and (not classes or "" in owners[1]):
        raise needs
    strange = set(owners[1]) - set(classes) - {""}
    if classes and strange:
        raise InputError(f"{tops[1]} has classes that {tops[0]} lacks: {', '.join(sorted(strange)[:3])}")
    number = {label: i for i, label in enumerate(classes)}
    labels = [torch.tensor([number[owner] for owner in own]) if classes and "" not in own else None for own in owners]
    splits = [Pictures(files=files, labels=own) for files, own in zip(found, labels)]
    if not found[1]:                                            # hold out a tenth, always the same one
        order = np.random.default_rng(0).permutation(len(found[0]))
        cut = max(1, min(10_000, len(order) // 10))
        splits = [splits[0].part(np.sort(part)) for part in (order[cut:], order[:cut])]
    return *splits, classes


def list_files(top):
    """All picture files below `top`, sorted; hidden files and folders (such as macOS's ._x.jpg) are left out."""
    found = []
    for folder, folders, files in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in files
                  if os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith(".")]
    return sorted(found)


def read_crops(path, size, choose_boxes):
    """Open one picture and cut out of it: uint8 [V, 3, size, size].

    `choose_boxes(height, width)` names the V boxes, rows of (top, left, height, width) in pixels.  Pillow resizes
    each straight out of the picture, and a JPEG is decoded at 1/2, 1/4 or 1/8 where that is still fine enough.
    Raises: InputError naming the file if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            boxes = choose_boxes(height, width)
            smallest = min(min(h, w) for _, _, h, w in boxes)
            image.draft("RGB", (int(width * size / smallest), int(height * size / smallest)))
            sx, sy = image.width / width, image.height / height
            if image.mode.startswith("I"):                              # 16 bits of grey: convert() would clip
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            image = image if image.mode == "RGB" else image.convert("RGB")       # which would copy it all the same
            corners = [(left * sx, top * sy, (left + w) * sx, (top + h) * sy) for top, left, h, w in boxes]
            crops = [image.resize((size, size), Image.Resampling.BILINEAR, box=box) for box in corners]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read the picture {path} ({e}); put a readable one in its place") from None
    return torch.from_numpy(np.array([[np.asarray(channel) for channel in crop.split()] for crop in crops]))


def centre_box(size):
    """The test view: the central square; for large pictures 7/8 of it (resize to 256, cut out 224)."""
    def choose(height, width):
        side = min(height, width) * (1 if size <= SMALL else 7 / 8)
        return [((height - side) / 2, (width - side) / 2, side, side)]
    return choose


def decode(files, size):
    """The central squares of all files at once: uint8 [N, 3, size, size]."""
    with ThreadPoolExecutor() as pool:
        return torch.cat(list(pool.map(lambda file: read_crops(file, size, centre_box(size)), files)))


class Crops(Dataset):
    """Files as crops, for DataLoader workers.  Item (epoch, index) -> (uint8 [V, 3, S, S], epoch, index); the V random
    boxes follow from (seed, epoch, index) alone.  views = 0: the test view."""

    def __init__(self, files, size, views=0, seed=0, scale=(0.2, 1.0)):
        self.files = np.array([os.fsencode(file) for file in files])    # one block: workers would copy a million strings
        self.size, self.views, self.seed, self.scale = size, views, seed, scale

    def __getitem__(self, item):
        epoch, index = item
        u = [uniforms(self.seed, epoch, [index], view) for view in range(self.views)]
        random_boxes = lambda height, width: [crop_box(row, height, width, self.scale)[0].tolist() for row in u]
        choose = random_boxes if self.views else centre_box(self.size)
        return read_crops(os.fsdecode(self.files[index]), self.size, choose), epoch, index


# -------------------------------------------------------------------------------------------- shapes, drawn
OUTLINES, TEXTURES = ("disc", "square", "triangle", "cross", "ring"), ("plain", "stripes", "checks", "circles")
SHAPE_CLASSES = [f"{texture} {outline}" for outline in OUTLINES for texture in TEXTURES]


def draw_shapes(n, split):
    """n pictures of 32 px, outline x texture making the class; place, size, turn, colours and stripes are chance.

    The built-in data set: no file, no network, made in a second, always the same for a split (0 train, 1 test).
    """
    label = torch.arange(n) % len(SHAPE_CLASSES)
    outline, texture, pick = label // len(TEXTURES), label % len(TEXTURES), torch.arange(n)
    u = uniforms(0, split, pick, view=-1)                                       # numbers that no view is made of
    column = lambda i: u[:, i, None, None]                                      # [N, 1, 1]

    grid = (torch.arange(32) + 0.5) / 16 - 1                                    # pixel centres in -1 .. 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    radius, angle = 0.75 + 0.2 * column(0), 1.2 * (column(1) - 0.5)
    x, y = ((p - (1 - radius) * (2 * column(i) - 1)) / radius for p, i in ((x, 2), (y, 3)))
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x  # [N, 32, 32], the shape's own axes
    r, ax, ay = (x * x + y * y).sqrt(), x.abs(), y.abs()

    depth = torch.stack([0.85 - r,                                              # how far inside a pixel lies
                         0.75 - torch.maximum(ax, ay),
                         torch.stack([0.5 - y, 0.5 + y / 2 + 0.866 * x, 0.5 + y / 2 - 0.866 * x]).amin(0),
                         torch.maximum(torch.minimum(0.3 - ax, 0.95 - ay), torch.minimum(0.95 - ax, 0.3 - ay)),
                         0.22 - (r - 0.7).abs()])[outline, pick]                # [N, 32, 32]
    inside = (16 * radius * depth + 0.5).clamp(0, 1)[:, None]                   # soft over one pixel
    pitch, phase = 6 + 2 * column(4), 6.283 * column(5)
    sx, sy = (pitch * x + phase).sin(), (pitch * y + phase).sin()
    wave = torch.stack([torch.ones_like(x), sx, 2 * sx * sy, (pitch * r + phase).sin()])[texture, pick]
    first, back = u[:, 6:9, None, None], u[:, 9:12, None, None]                 # [N, 3, 1, 1]
    second = (first + 0.5) % 1                                                  # never too close to the first
    image = torch.lerp(second, first, (2 * wave + 0.5).clamp(0, 1)[:, None])    # [N, 3, 32, 32]
    return Pictures(pixels=(255 * torch.lerp(back, image, inside)).round().to(torch.uint8), labels=label)


# -------------------------------------------------------------------------------------- features and judges
def plain_views(pictures, size, device, workers, batch_size=256):
    """The test views, normalised, on the device: float32 [B, 3, size, size] batch by batch.  Decoded pictures are taken
    whole, those on disk by their `centre_box`."""
    if pictures.pixels is not None:
        source = (resize(pixels.to(device), size) for pixels in pictures.pixels.split(batch_size))
    else:
        loader = DataLoader(Crops(pictures.files, size), batch_size, sampler=[(0, i) for i in range(len(pictures))],
                            num_workers=workers)
        source = (crops[:, 0].to(device) for crops, _, _ in loader)
    for images in source:
        yield normalise(images).contiguous(memory_format=torch.channels_last)


def resize(pixels, size):
    """uint8 [B, 3, H, W] -> float in [0, 1], [B, 3, size, size]; nothing is cut off."""
    b, _, h, w = pixels.shape
    whole = torch.tensor([0.0, 0.0, h, w], device=pixels.device).expand(b, 4)
    return as_float(pixels) if h == w == size else crop_and_resize(as_float(pixels), whole, size)


@torch.no_grad()
def features(encoder, pictures, device="cpu", workers=0):
    """Backbone features of the pictures' test views: float32 [N, F] on the CPU.  The encoder keeps its mode."""
    training = encoder.training
    encoder.eval()
    found = []
    for x in plain_views(pictures, encoder.image_size, device, workers):
        found.append(encoder.features(x).float().cpu())                         # [B, F]
    encoder.train(training)
    return torch.cat(found)


def neighbours(queries, bank, k=10, chunk=512):
    """Cosine [M, k] and place [M, k] in `bank` [N, F] of the k nearest to each query [M, F], in chunks."""
    bank = F.normalize(bank, dim=1)
    found = [(F.normalize(part, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1) for part in queries.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def knn(train_x, train_y, test_x, test_y, k=10):
    """kNN accuracy in percent: each of the k nearest training pictures votes for its label with its cosine.

    train_x [N, F], test_x [M, F]: float features; train_y [N], test_y [M]: int64 labels.
    """
    cosine, place = neighbours(test_x, train_x, k)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1, device=test_x.device)
    votes.scatter_add_(1, train_y[place], cosine.clamp(min=1e-9))               # [M, C]
    return 100 * (votes.argmax(1) == test_y).float().mean().item()


def fit_linear(x, y, classes, rates, epochs=100, batch_size=256):
    """One linear layer for each learning rate, all trained at once: weights [L, F, C] and bias [L, 1, C].

    The paper's probe: SGD, momentum 0.9, no weight decay, 100 epochs, rate x 0.1 at 60 and 80.
    """
    rates = torch.tensor(rates, device=x.device)[:, None, None]                 # [L, 1, 1]
    weights = [torch.zeros(len(rates), n, classes, device=x.device, requires_grad=True) for n in (x.shape[1], 1)]
    momenta = [torch.zeros_like(w) for w in weights]
    for epoch in range(epochs):
        lr = rates * (1 if epoch < 0.6 * epochs else 0.1 if epoch < 0.8 * epochs else 0.01)
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(x))).to(x.device)
        for batch in order.split(batch_size):
            logits = x[batch] @ weights[0] + weights[1]                         # [L, B, C]
            loss = F.cross_entropy(logits.flatten(0, 1), y[batch].repeat(len(rates)), reduction="sum") / len(batch)
            for w, m, g in zip(weights, momenta, torch.autograd.grad(loss, weights)):
                m.mul_(0.9).add_(g)
                w.data.sub_(lr * m)
    return [w.detach() for w in weights]


def linear_probe(train_x, train_y, test_x, test_y, rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """Accuracy of a linear classifier on frozen features in percent, and the learning rate it chose.

    The rate is chosen on a tenth of the *training* set, held out; then all of it is used; the last epoch counts.
    Features are brought to mean 0 and deviation 1 first, so that one list of rates serves every network.
    Args as `knn`.
    """
    mean, std = train_x.mean(0), train_x.std(0)
    std = std.clamp(min=1e-5 * std.max().item() + 1e-30)                        # a constant feature stays at 0
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    classes = int(train_y.max()) + 1
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train_x))).to(train_x.device)
    held, rest = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    w, b = fit_linear(train_x[rest], train_y[rest], classes, rates)
    hits = ((train_x[held] @ w + b).argmax(2) == train_y[held]).sum(1)          # [L]
    rate = rates[hits.argmax().item()]
    w, b = fit_linear(train_x, train_y, classes, [rate])
    return 100 * ((test_x @ w[0] + b[0]).argmax(1) == test_y).float().mean().item(), rate


def evaluate(encoder, data, device="cpu", workers=0, limit=None, linear=True):
    """Judge an encoder on a data set, on no more than `limit` pictures of each split (those of a fixed shuffle).

    Returns: scores, a dict of knn and linear (percent) and rate (the probe's learning rate), None where labels are
    missing or `linear` is off; and what they rest on: train and test Pictures and their features [N, F].
    """
    some = lambda split: split.part(np.random.default_rng(0).permutation(len(split))[:limit])
    train, test = (some(split) if limit and len(split) > limit else split for split in (data.train, data.test))
    x, y = features(encoder, train, device, workers), features(encoder, test, device, workers)
    scores = dict(knn=None, linear=None, rate=None)
    if data.judged:
        judged = [values.to(device) for values in (x, train.labels, y, test.labels)]
        scores["knn"] = knn(*judged)
        if linear:
            scores["linear"], scores["rate"] = linear_probe(*judged)
    return scores, (train, test, x, y)


# ------------------------------------------------------------------------------------------------ pictures
def save_grid(path, rows, frames=None):
    """Write rows (a list of lists of float [3, S, S] in [0, 1]) as one picture; `frames` names a colour for each."""
    colours = dict(white=(1.0, 1.0, 1.0), green=(0.1, 0.7, 0.2), red=(0.85, 0.2, 0.15))
    side = rows[0][0].shape[1]
    zoom, tiles = max(1, 96 // side), []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            colour = torch.tensor(colours[frames[i][j] if frames else "white"])[:, None, None]
            frame = colour.repeat(1, side * zoom + 8, side * zoom + 8)          # [3, S', S']
            frame[:, 4:-4, 4:-4] = tile.cpu().repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
            tiles.append(frame)
    torchvision.utils.save_image(tiles, path, nrow=len(rows[0]), padding=2, pad_value=1)


def picture(pictures, index, size):
    """The test view of one picture, float [3, size, size] in [0, 1]."""
    if pictures.pixels is not None:
        return resize(pictures.pixels[index:index + 1], size)[0]
    return as_float(read_crops(pictures.files[index], size, centre_box(size)))[0]


def save_views(path, data, scale, blur, seed=0, columns=8, count=6):
    """What augmentation does: a row for each picture, itself first, then seven views of it."""
    size, rows = data.image_size, []
    for index in range(min(count, len(data.train))):
        whole = picture(data.train, index, size)
        u = torch.cat([uniforms(seed, epoch, [index]) for epoch in range(columns - 1)])
        views = augment(whole.expand(columns - 1, -1, -1, -1), u, size, scale, blur)
        black, white = (normalise(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
        rows.append([whole, *((views - black) / (white - black)).clamp(0, 1)])
    save_grid(path, rows)


def save_neighbours(path, train, test, train_x, test_x, size, count=8, k=7):
    """Test pictures and the training pictures nearest to them; green frame: the same label, red: another."""
    queries = np.random.default_rng(0).permutation(len(test))[:count]
    place = neighbours(test_x[queries], train_x, k)[1]
    rows, frames = [], []
    for query, near in zip(queries.tolist(), place.tolist()):
        rows.append([picture(test, query, size)] + [picture(train, i, size) for i in near])
        if train.labels is None or test.labels is None:
            frames.append(["white"] * (k + 1))
        else:
            right = (train.labels[near] == test.labels[query]).tolist()
            frames.append(["white"] + ["green" if same else "red" for same in right])
    save_grid(path, rows, frames)


# ------------------------------------------------------------------------------------------- the command
def report(error):
    """The one line of an InputError; one that comes from a DataLoader worker drags a traceback behind it."""
    return "error: " + str(error).strip().split("\n")[-1].split("InputError: ")[-1]


def with_labels(seen):
    """Whether labels took part in making an encoder, in words."""
    return {True: "WITH the labels of the training pictures", False: "without labels", None: "labels unknown"}[seen]


def pick_device(name):
    """torch.device from auto, cpu, cuda or mps; InputError where there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name):
        raise InputError(f"no device '{name}' here; use --device {' or '.join(n for n in there if there[n])}")
    return torch.device(name)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show a default where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def main(argv=None):
    parser = Parser(description="kNN and linear probe of an encoder's frozen features.")
    flag = parser.add_argument
    flag("encoder", help="an encoder.pt or another checkpoint that seed.load_teacher reads, or random:ARCH")
    flag("--arch", help="the network's name, where the file does not say it")
    flag("--dataset", choices=DATASETS, default="shapes", help="what to judge it on")
    flag("--data", default="data", metavar="DIR", help="where the pictures are")
    flag("--image-size", type=int, help="side of a picture in pixels; the size it was trained at if not given")
    flag("--small-images", action="store_true", help="with random:ARCH: open the stem for small pictures")
    flag("--subset", type=int, metavar="N", help="use N training pictures, chosen by the seed")
    flag("--seed", type=int, default=0, help="of the subset, and of random:ARCH")
    flag("--workers", type=int, default=min(8, os.cpu_count()), help="processes that read pictures from disk")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--out", metavar="DIR", help="for probe.json and neighbours.png; beside the encoder's file, or here")
    args = parser.parse_args(argv)
    start = time.time()
    device = pick_device(args.device)
    if args.encoder.startswith("random:"):
        torch.manual_seed(args.seed)
        size = args.image_size or native_size(args.dataset)
        encoder = Encoder(args.encoder[7:], small_images=args.small_images, image_size=size)
        encoder.made, encoder.labels_seen = f"{encoder.arch}, random weights", False
    else:
        encoder = load_teacher(args.encoder, args.arch)
        if args.image_size:
            encoder.try_size(args.image_size)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    data = load_data(args.dataset, args.data, encoder.image_size, args.subset, args.seed)
    print(f"{encoder.made}, {with_labels(encoder.labels_seen)}\n{data}")
    scores, material = evaluate(encoder, data, device, args.workers)
    if data.judged:
        print(f"kNN {scores['knn']:.1f}%   linear probe {scores['linear']:.1f}% (learning rate {scores['rate']})")
    else:
        print("no labels, so no accuracy")
    out = Path(args.out or (Path(args.encoder).parent if os.path.exists(args.encoder) else "."))
    out.mkdir(parents=True, exist_ok=True)
    save_neighbours(out / "neighbours.png", *material, data.image_size)
    summary = dict(encoder=args.encoder, made=encoder.made, labels_seen=encoder.labels_seen, data=str(data)) | scores
    (out / "probe.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"wrote {out / 'probe.json'} and {out / 'neighbours.png'} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(report(e), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; use --subset or --device cpu")
    except OSError as e:
        sys.exit(f"error: {e}")
