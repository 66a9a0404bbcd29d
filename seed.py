"""SEED: self-supervised distillation (Fang et al., ICLR 2021, arXiv 2101.04731) in one file.

Contrastive learning makes good large networks and poor small ones.  SEED lets a large, frozen network
(the teacher) teach a small one (the student) without a single label.  The student does not copy the
teacher's embedding.  It learns to *rank*: given a long queue of things the teacher has seen before, how
similar is this picture to each of them?  Whoever answers that like the teacher sees like the teacher.

                     +--> student --> z_s --.        z_s . d_j / tau_s  --softmax-->  p_s
    picture --> view |                       >--- D+ = {z_t, d_1 .. d_K}              cross-entropy(p_t, p_s)
                     +--> teacher --> z_t --'        z_t . d_j / tau_t  --softmax-->  p_t
                          (frozen)     |
                                       '--> afterwards z_t enters the queue; the oldest entry leaves

Letters: B batch of a process, R processes (ranks), D embedding width, K queue length, F width of the backbone's
features, C classes, S side of a view in pixels, H x W a picture's height and width, U uniform numbers per view.
A line that changes a tensor's shape ends in the new one.

Departures from the authors' code, each explained where it happens:
  * tau_t = 0.01 by default, as in a later re-implementation; the authors' code says 1e-4, at which the teacher's
    ranking is all but one-hot;
  * enqueue after backward instead of before: the queue is never cloned;
  * the colour operations of a view come in one fixed order; a crop's box need not lie on whole pixels, and where no
    random shape fits, the largest that does lies anywhere.

Read on: 1 losses, 2 queue, 3 encoders, 4 teachers, 5 views, 6 methods.  `python seed.py` distils a toy.
"""
import copy
import difflib
import hashlib
import math
import os
import warnings
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InputError(ValueError):
    """Something the user can mend: one line that says what is wrong and what to do."""


# ------------------------------------------------------------------------------------------ 1. the losses
@contextmanager
def exact_float32(device):
    """Float32 products that stay float32: autocast off, and TF32 and bf16 shortcuts off (`.float()` alone is
    undone by the next matmul).  Near 1, bf16 knows steps of 0.0039: at tau_t = 0.01 that is 0.39 of a logit, at
    1e-4 it is 39, and the teacher's ranking is noise.  (Backward runs outside: gradients follow your settings.)"""
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [m.fp32_precision for m in matmuls]
    try:
        for m in matmuls:
            m.fp32_precision = "ieee"
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for m, precision in zip(matmuls, before):
            m.fp32_precision = "none"                                   # follow the settings above it, if that will do
            if m.fp32_precision != precision:
                m.fp32_precision = precision


def ranking_logits(z, key, queue, tau):
    """Cosine of each z with its own key, then with every queue entry, over tau: float32 logits [B, K+1].

    Column 0 is the sample's own key, so D+ has K+1 entries.  Dividing z [B, D] by tau, and not the
    logits [B, K+1], gives the same numbers for less memory.
    """
    if z.ndim != 2 or key.shape != z.shape or queue.ndim != 2 or queue.shape[1] != z.shape[1]:
        raise ValueError(f"expected two [B, D] and a [K, D], got {[list(x.shape) for x in (z, key, queue)]}")
    if not tau > 0:
        raise ValueError(f"a temperature must be above 0, got {tau}")
    with exact_float32(z.device):
        z = z.float() / tau                                             # [B, D]
        own = (z * key.float()).sum(1, keepdim=True)                    # [B, 1]
        return torch.cat([own, z @ queue.float().T], dim=1)             # [B, K+1]


def seed_loss(student, teacher, queue, tau_s=0.2, tau_t=0.01, stats=None):
    """The SEED objective: cross-entropy between the teacher's and the student's ranking of the queue.

        p_t[j] = softmax_j(z_t . d_j / tau_t)      p_s[j] = softmax_j(z_s . d_j / tau_s)      d_j in D+
        loss   = mean over the batch of  - sum_j p_t[j] log p_s[j]

    Both networks are compared with *teacher* embeddings: the K in the queue and the sample's own z_t.
    Since z_t . z_t = 1 is the largest score there is, a tiny tau_t makes p_t one-hot at that entry, and
    the loss turns into `info_nce` with z_t as the positive.  A larger tau_t says more about neighbours.
    The loss cannot fall under the teacher's entropy H(p_t); KL = loss - H(p_t) is the part that depends on
    the student.  It does not reach 0 while tau_s > tau_t: cosines over 0.2 are flatter than cosines over 0.01.
    The gradient by the student's logits is (p_s - p_t) / B.

    Args:
        student: float [B, D], unit rows; the only argument that gets a gradient.
        teacher: float [B, D], unit rows, of the same views.
        queue: float [K, D], unit rows, earlier teacher embeddings, *without* this batch's.
        tau_s, tau_t: temperatures, above 0.
        stats: a dict to be filled with scalar tensors that diagnose a run: kl and entropy in nats, `own`
            (the teacher's mean weight on the sample's own entry), `agree` (share of samples for which
            both rank the same entry first).
    Returns: scalar float32, whatever autocast is on.
    Raises: ValueError for shapes that do not fit or a temperature that is not positive.

    >>> z = torch.tensor([[1., 0.]]); queue = torch.tensor([[0., 1.], [-1., 0.]])
    >>> round(seed_loss(z, z, queue, tau_s=1., tau_t=1.).item(), 4)   # scores 1, 0, -1: p = .665, .245, .090
    0.8324
    >>> round(seed_loss(-z, z, queue, tau_s=1., tau_t=1.).item(), 3)   # the student ranks them backwards
    1.983
    """
    teacher, queue = teacher.detach(), queue.detach()
    p_t = ranking_logits(teacher, teacher, queue, tau_t).softmax(1)       # [B, K+1]
    log_p_s = ranking_logits(student, teacher, queue, tau_s).log_softmax(1)  # [B, K+1]
    loss = -(p_t * log_p_s).sum(1).mean()
    if stats is not None:
        entropy = torch.special.entr(p_t).sum(1).mean()
        agree = (p_t.argmax(1) == log_p_s.argmax(1)).float().mean()
        stats.update(kl=loss.detach() - entropy, entropy=entropy, own=p_t[:, 0].mean(), agree=agree)
    return loss


def info_nce(query, key, queue, tau=0.2, stats=None):
    """MoCo's contrastive loss, which is `seed_loss` in the limit tau_t -> 0: the own key is the right answer.

    Args: query, key: float [B, D], unit rows, two views of the same pictures; queue: float [K, D], unit rows,
        keys of other pictures; tau: temperature above 0 (MoCo-v2: 0.2); stats: a dict to be filled with
        `agree`, the share of queries closest to their own key.  Only `query` gets a gradient.
    Returns: scalar float32.  Raises: ValueError as `seed_loss`.
    """
    logits = ranking_logits(query, key.detach(), queue.detach(), tau)     # [B, K+1]
    if stats is not None:
        stats.update(agree=(logits.argmax(1) == 0).float().mean())
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


# ------------------------------------------------------------------------------------------- 2. the queue
def world_size():
    """Number of processes that train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """The global batch [R*B, ...] from each rank's [B, ...], in the order one process would have had it.

    Rank r holds samples r, r+R, r+2R, ...; so the parts are interleaved, not chained.  No gradient flows.
    Every rank must bring the same shape.
    """
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)                      # [B, R, ...] -> [R*B, ...]


class FeatureQueue(nn.Module):
    """The last `size` embeddings, first in first out: the points of reference of the ranking (paper: K = 65,536).

    Starts as random unit vectors from torch's global generator (seed all ranks alike), which real embeddings
    have displaced after K/(R*B) steps; until then the task is easier than it will be, so the loss may *rise*.
    Lives in buffers: it moves with `.to()` and is saved by `state_dict()`.

    Attributes: features: float32 [size, dim], unit rows; seen: int64 scalar, embeddings ever enqueued.
    Raises: ValueError for a size or dim below 1, or an embedding of another width.
    """

    def __init__(self, size, dim):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs size and dim of at least 1, got {size} and {dim}")
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))  # [K, D]
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, z):
        """Put z [B, D] of all ranks in the place of the oldest entries; any B, also above `size`."""
        size, dim = self.features.shape
        if z.ndim != 2 or z.shape[1] != dim:
            raise ValueError(f"the queue holds embeddings [B, {dim}], got {list(z.shape)}")
        z = gather(z.detach().float())                                  # [R*B, D]
        slots = (self.seen + torch.arange(len(z), device=z.device)) % size  # [R*B]; wraps around
        self.features[slots[-size:]] = z[-size:]                        # of more than K only the last K stay
        self.seen += len(z)

    @property
    def fill(self):
        """Share of entries that are real embeddings: scalar tensor in [0, 1]."""
        return (self.seen / len(self.features)).clamp(max=1)


# ---------------------------------------------------------------------------------------- 3. the encoders
class Encoder(nn.Module):
    """A torchvision classification network with a projection head in the place of its last Linear layer.

    Paper: Linear(F, F) - ReLU - Linear(F, 128), then L2 normalisation; F is the width of whatever the last
    Linear layer took, for MobileNet-V3 the 1280 behind the classifier's hidden layer.  Dropout in front of it stays.

    Args:
        arch: a torchvision classification network by name ("mobilenet_v3_large", "resnet18", ...).
        dim: D, width of the embedding; None: no head at all, the embedding is the normalised features.
        hidden_dim: width of the head's hidden layer; None: F (the paper's); 0: a single Linear.
        small_images: open the stem for pictures of 32-64 px: the first convolution with stride 1; where it is
            7x7 (ResNets, DenseNets), a 3x3 in its place and no max-pool, as usual on CIFAR.
        image_size: side of the pictures in pixels; the network is tried at this size once, without arithmetic.
    Raises: InputError for an unknown name (with the nearest known ones) and for networks that do not fit:
        no final Linear, several outputs, another fixed image size, no stem to open.
    """

    def __init__(self, arch, dim=128, hidden_dim=None, small_images=False, image_size=224):
        super().__init__()
        self.arch, self.small_images = arch, small_images
        self.backbone = build_network(arch)
        linears = [name for name, m in self.backbone.named_modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise InputError(f"{arch} has no Linear layer that a projection head could replace; choose another network")
        self.head_name = linears[-1]                                    # "fc", "classifier.3", "heads.head", ...
        self.width = self.backbone.get_submodule(self.head_name).in_features
        self.backbone.set_submodule(self.head_name, nn.Identity())
        if small_images:
            open_stem(self.backbone, arch)
        self.try_size(image_size)
        self.set_head(dim, hidden_dim)

    def set_head(self, dim, hidden_dim=None):
        """Put a new projection head in place; see the class for the two widths."""
        self.dim, self.hidden_dim = self.width if dim is None else dim, hidden_dim
        if dim is None:
            self.head = nn.Identity()
        elif hidden_dim == 0:
            self.head = nn.Linear(self.width, dim)
        else:
            hidden = hidden_dim or self.width
            self.head = nn.Sequential(nn.Linear(self.width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))

    def try_size(self, image_size):
        """One pass on the meta device: shapes alone, no arithmetic; refuses what would fail in the first step."""
        self.image_size = image_size
        copied = copy.deepcopy(self.backbone).to("meta").train()
        try:
            out = copied(torch.empty(2, 3, image_size, image_size, device="meta"))
            fits = getattr(out, "shape", None) == (2, self.width)
            problem = None if fits else "it returns more than one vector a picture"
        except Exception as e:
            problem = str(e).split("\n")[0]
        if problem:
            raise InputError(f"{self.arch} cannot be an encoder at {image_size} px: {problem}; "
                             "choose another network or image size")

    @property
    def options(self):
        """The arguments that build this encoder again."""
        dim = None if isinstance(self.head, nn.Identity) else self.dim
        return dict(arch=self.arch, dim=dim, hidden_dim=self.hidden_dim,
                    small_images=self.small_images, image_size=self.image_size)

    def features(self, x):
        """x float [B, 3, S, S], normalised -> backbone features [B, F]: what kNN and linear probes look at."""
        return self.backbone(x)                                         # [B, F]

    def forward(self, x):
        """x float [B, 3, S, S], normalised -> embedding z, float32 [B, D], unit rows."""
        return F.normalize(self.head(self.features(x)).float(), dim=1)  # [B, D]


def build_network(arch):
    """The torchvision network of that name with random weights; InputError if there is none."""
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        near = difflib.get_close_matches(str(arch), known, n=3, cutoff=0.4)
        raise InputError(f"unknown network '{arch}'" + (f"; did you mean {', '.join(near)}?" if near else
                         "; torchvision's classification networks are known by name, e.g. mobilenet_v3_large"))
    with warnings.catch_warnings():                                     # two old networks warn about their init
        warnings.simplefilter("ignore")
        return torchvision.models.get_model(arch, weights=None)


def open_stem(net, arch):
    """Keep the resolution of small pictures: ImageNet stems would shrink 32 px to 8 before the first block."""
    name, conv = next((name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d))
    if conv.stride != (2, 2):
        raise InputError(f"{arch} has no stem to open for small images (its first convolution has stride "
                         f"{conv.stride[0]}); leave small_images off")
    if conv.kernel_size == (7, 7):
        net.set_submodule(name, nn.Conv2d(3, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None))
        pool = next(name for name, m in net.named_modules() if isinstance(m, nn.MaxPool2d))
        net.set_submodule(pool, nn.Identity())
    else:
        conv.stride = (1, 1)


def save_encoder(path, encoder, made, labels_seen):
    """Write what a user takes away: architecture, weights under torchvision's own key names, head beside them.

    `made` is one line on how the encoder was trained, `labels_seen` whether labels took part; both travel along.
    Written aside and renamed, so that a reader never meets half a file.
    """
    weights = lambda module: {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
    file = dict(format="seed-encoder", **encoder.options, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                made=made, labels_seen=labels_seen, backbone=weights(encoder.backbone), head=weights(encoder.head))
    torch.save(file, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


# ----------------------------------------------------------------------------------------- 4. the teachers
def load_teacher(path_or_url, arch=None):
    """A frozen Encoder from a checkpoint: every key finds its place and every place its key, or it is an error.

    Peers load with strict=False and may distil a randomly initialised teacher without a word.  Known formats:
    this project's encoder.pt; MoCo (v1, v2) with its own head; a plain torchvision state dict, whose last layer
    scores classes and is dropped: without a head, the normalised features are the embedding (D = F).

    Args: path_or_url: a file, or an http(s) address (kept in torch's hub folder); arch: the network's name,
        needed where the file does not say it.
    Returns: Encoder in eval mode, no parameter asks for a gradient; `.made` says in a line what it is,
        `.labels_seen` is True, False, or None where the file does not say.
    Raises: InputError for a missing, corrupt or unknown file, another architecture, keys that do not match.
    Files are read with weights_only=True: a checkpoint cannot run code.
    """
    file = read_checkpoint(path_or_url)
    if arch and file.get("arch") not in (None, arch):
        raise InputError(f"{path_or_url} holds a {file['arch']}, not a {arch}")
    arch = arch or file.get("arch")
    if arch is None:
        raise InputError(f"{path_or_url} does not name its network; do: --teacher-arch (probe.py: --arch)")

    if file.get("format") == "seed-encoder":
        teacher = Encoder(arch, file["dim"], file["hidden_dim"], file["small_images"], file["image_size"])
        weights = {f"backbone.{key}": value for key, value in file["backbone"].items()}
        weights |= {f"head.{key}": value for key, value in file["head"].items()}
        prefix, head, dropped = "backbone.", "head.", ()
        made, labels_seen = file["made"], file["labels_seen"]
    else:
        teacher, weights = Encoder(arch, dim=None), file.get("state_dict", file.get("model", file))
        prefix, head, dropped, made, labels_seen = published_layout(teacher, weights, path_or_url)

    expected = copy_weights(teacher.backbone, weights, prefix, path_or_url)
    used = expected | copy_weights(teacher.head, weights, head, path_or_url)
    strange = [key for key in weights if key not in used and not key.startswith(dropped)]
    if strange:
        raise InputError(f"{path_or_url} holds more than a {arch}: {len(strange)} keys have no place in it, "
                         f"such as {strange[0]}")
    teacher.made = f"{arch}, {made}, matched {len(expected)}/{len(expected)} backbone keys"
    teacher.labels_seen = labels_seen
    return teacher.eval().requires_grad_(False)


def published_layout(teacher, weights, place):
    """How others lay out their keys: prefix of the backbone, prefix of the head, keys to drop, a word on what it is,
    labels seen.  Gives `teacher` a head where the file has one."""
    if not any(key.startswith("module.encoder_q.") for key in weights):         # torchvision's own names
        prefix = "module." if all(key.startswith("module.") for key in weights) else ""
        last_layer = f"{prefix}{teacher.head_name}."
        return prefix, "", (f"{last_layer}weight", f"{last_layer}bias"), "torchvision weights, no projection head", None
    prefix = "module.encoder_q."                                                # MoCo: its head replaced the last layer
    head = f"{prefix}{teacher.head_name}."
    hidden, last = weights.get(f"{head}0.weight"), weights.get(f"{head}2.weight", weights.get(f"{head}weight"))
    if last is None:
        raise InputError(f"{place}: MoCo's projection head is missing (no {head}2.weight)")
    teacher.set_head(len(last), 0 if hidden is None else len(hidden))
    return prefix, head, ("module.encoder_k.", "module.queue"), "MoCo checkpoint", False


def read_checkpoint(path_or_url):
    """The dict in a file or behind an address; InputError in one line if there is none."""
    place = str(path_or_url)
    try:
        if place.startswith(("http://", "https://")):                   # two addresses may end in the same file name
            name = f"{hashlib.sha256(place.encode()).hexdigest()[:8]}-{os.path.basename(place)}"
            file = torch.hub.load_state_dict_from_url(place, map_location="cpu", weights_only=True, file_name=name)
        else:
            file = torch.load(place, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such file: {place}") from None
    except Exception as e:                                              # a broken zip, code in the pickle, no network
        raise InputError(f"cannot read {place}: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
    parts = [file] if isinstance(file, dict) else [None]
    parts += [parts[0][name] for name in ("state_dict", "model", "backbone", "head") if parts[0] and name in parts[0]]
    if not all(isinstance(part, dict) and part.keys() <= {str(key) for key in part} for part in parts):
        raise InputError(f"{place} is not a checkpoint: expected a dict of weights")
    parts_of_ours = {"arch", "dim", "hidden_dim", "small_images", "image_size", "backbone", "head", "made", "labels_seen"}
    if file.get("format") == "seed-encoder" and not parts_of_ours <= file.keys():
        raise InputError(f"{place} is not a whole encoder.pt; make it anew")
    return file


def copy_weights(module, weights, prefix, place):
    """Fill all of `module` from `weights[prefix + name]`; returns the keys it used, raises InputError at a gap."""
    own = module.state_dict()
    found = {name: weights[prefix + name] for name in own if isinstance(weights.get(prefix + name), torch.Tensor)}
    there = lambda name: list(found[name].shape) if name in found else "missing"
    wrong = [f"{prefix}{name} is {there(name)}, expected {list(value.shape)}"
             for name, value in own.items() if not name.endswith("num_batches_tracked")    # old files have none
             and (name not in found or found[name].shape != value.shape)]
    if wrong:
        starts = sorted({".".join(key.split(".")[:2]) for key in weights})
        raise InputError(f"{place}: {len(own) - len(wrong)} of {len(own)} keys match; {'; '.join(wrong[:3])}; "
                         f"the file's keys start with {', '.join(starts[:5])}")
    broken = [name for name, value in found.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"{place}: {prefix}{broken[0]} holds numbers that are not finite; the file is of no use")
    own.update(found)                                                   # in place: a state dict carries its version
    module.load_state_dict(own)
    return {prefix + name for name in found}


# -------------------------------------------------------------------------------------------- 5. the views
# Randomness is an argument.  All chance in a view is a row of uniform numbers: a hash of (seed, epoch, index, view),
# and not drawn from a generator.  So a view depends on these four alone, and not on workers, ranks, or where a run
# was cut; and each operation below is a pure function that can be held against torchvision's.
AREA, RATIO = slice(0, 10), slice(10, 20)                               # ten tries each, see `crop_box`
TOP, LEFT, FLIP, JITTER, BRIGHT, CONTRAST, SATURATE, HUE, GREY, BLUR, SIGMA = range(20, 31)
UNIFORMS = 31

JITTER_P, GREY_P, BLUR_P, FLIP_P = 0.8, 0.2, 0.5, 0.5                   # MoCo-v2's, which SEED takes over
STRENGTH, HUE_STRENGTH = 0.4, 0.1                                       # brightness, contrast, saturation; hue
SIGMA_RANGE, BLUR_RADIUS = (0.1, 2.0), 6                                # pixels; three times the largest sigma
LOG_RATIO = math.log(4 / 3)


def uniforms(seed, epoch, index, view=0):
    """Float32 [B, U] in [0, 1): row b is a hash of (seed, epoch, index[b], view), the same on every machine.

    Args: seed, epoch, view: ints; index: B sample numbers (list, array or tensor of ints).
    SplitMix64 (Steele et al., 2014): a counter, stepped by the golden ratio and stirred until each bit looks random.
    """
    full, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def stir(x):                                                        # an int, or uint64 [...], which wraps by itself
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & full
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & full
        return x ^ (x >> 31)

    x = 0
    for word in (seed, epoch, view):
        x = stir((x ^ int(word) & full) + golden & full)
    x = stir((np.asarray(index, np.int64).reshape(-1).astype(np.uint64) ^ x) + golden)         # [B]
    x = stir(x[:, None] + np.arange(1, UNIFORMS + 1, dtype=np.uint64) * golden)    # [B, U]
    return torch.from_numpy((x >> 40).astype(np.float32) * np.float32(2**-24))


def crop_box(u, height, width, scale=(0.2, 1.0)):
    """The random resized crop's box, float32 [B, 4] = top, left, height, width in pixels of an H x W picture.

    Area uniform in `scale` (share of the picture), log aspect ratio uniform in 3/4 .. 4/3, place uniform.  As in
    torchvision there are ten tries, of which the first that does not stick out counts; if none does, the largest box of
    such a shape (there torchvision takes the central one: a departure).  In NumPy, which is quickest for so few numbers.
    """
    u = u.cpu().numpy()
    area = (scale[0] + u[:, AREA] * (scale[1] - scale[0])) * float(height * width)  # [B, 10]
    ratio = np.exp((2 * u[:, RATIO] - 1) * LOG_RATIO)                   # [B, 10], width over height
    h, w = np.sqrt(area / ratio), np.sqrt(area * ratio)                 # [B, 10]
    fits = (h <= height) & (w <= width)
    each, first = np.arange(len(u)), fits.argmax(1)                     # [B]; the first is 0 if none fits
    h = np.where(fits, h, min(height, width * 4 / 3))[each, first]      # [B]
    w = np.where(fits, w, min(width, height * 4 / 3))[each, first]      # [B]
    return torch.from_numpy(np.stack([u[:, TOP] * (height - h), u[:, LEFT] * (width - w), h, w], axis=1))  # [B, 4]


def separable(images, rows, columns):
    """rows @ image @ columns^T for each image and channel: resizing and blurring are matrix products.
    images [B, 3, H, W], rows [B, S, H], columns [B, S, W] -> [B, 3, S, S]."""
    with exact_float32(images.device):
        return rows[:, None] @ (images @ columns[:, None].transpose(2, 3))


def resize_weights(start, length, source, size):
    """Bilinear weights with antialiasing, [B, size, source], of a stretch [start, start + length) of pixels."""
    step = (length / size)[:, None, None]                               # source pixels per target pixel
    target = torch.arange(size, device=start.device)[:, None]           # [size, 1]
    pixel = torch.arange(source, device=start.device)                   # [source]
    begin, end = start[:, None, None], (start + length)[:, None, None]
    centre = begin + (target + 0.5) * step                              # [B, size, 1]
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)   # a triangle, wider when shrinking
    weight = weight * ((pixel + 1 > begin) & (pixel < end))             # no pixel that lies outside the box
    return weight / weight.sum(2, keepdim=True)


def crop_and_resize(images, box, size):
    """Cut box [B, 4] (see `crop_box`) out of images float [B, 3, H, W]; bilinear, antialiased -> [B, 3, size, size]."""
    top, left, h, w = box.unbind(1)
    rows, columns = resize_weights(top, h, images.shape[2], size), resize_weights(left, w, images.shape[3], size)
    return separable(images, rows, columns)


def blend_(images, other, factor):
    """images becomes factor * images + (1 - factor) * other, kept in [0, 1]; factor [B, 1, 1, 1]."""
    return images.lerp_(other, 1 - factor).clamp_(0, 1)


def to_grey(images):
    """Luma of RGB images [B, 3, H, W] -> [B, 1, H, W] (ITU-R 601, rounded as in torchvision)."""
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def shift_hue(images, turn):
    """Turn the colour circle by `turn` [B, 1, 1, 1] in -0.5 .. 0.5; images [B, 3, H, W] in [0, 1].

    Through HSV and back in closed form: red, green, blue (n = 5, 3, 1) of a colour with hue h in sixths of the
    circle, value v and chroma c are v - c * clip(min(k, 4 - k), 0, 1) with k = (n + h) mod 6.
    """
    r, g, b = images.unbind(1)                                          # [B, H, W] each
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)                           # grey has no hue: any will do
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]     # 5, 3, 1
    k = ((hue + 6 * turn[:, 0])[:, None] + n).remainder_(6)             # [B, 3, H, W]
    return torch.addcmul(value[:, None], chroma[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def gaussian_blur(images, sigma):
    """Gaussian blur of images [B, 3, H, W] by sigma [B] pixels, mirrored at the border, taps up to BLUR_RADIUS."""
    taps = torch.exp(-0.5 * (torch.arange(BLUR_RADIUS + 2, device=images.device) / sigma[:, None]) ** 2)  # [B, R+2]
    taps[:, -1] = 0                                                     # stands for all that is farther away

    def weights(n):
        i, j = torch.arange(n, device=images.device)[:, None], torch.arange(n, device=images.device)
        tap = lambda distance: taps[:, distance.abs().clamp(max=BLUR_RADIUS + 1)]  # [B, n, n]
        weight = tap(i - j)                                             # target i takes pixel j,
        weight += tap(i + j) * (j > 0)                                  # its mirror image at -j,
        weight += tap(i + j - 2 * (n - 1)) * (j < n - 1)                # and the one beyond the far edge
        return weight / weight.sum(2, keepdim=True)

    rows = weights(images.shape[2])
    return separable(images, rows, rows if images.shape[2] == images.shape[3] else weights(images.shape[3]))


@cache
def mean_and_std(device):
    """ImageNet's, float32 [1, 3, 1, 1] each; made once a device."""
    return [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]


def normalise(images):
    """images uint8 or float in [0, 1], [B, 3, H, W] -> (x - ImageNet's mean) / its deviation, float32, per channel."""
    mean, std = mean_and_std(images.device)
    return (as_float(images) - mean).div_(std)


def as_float(images):
    """uint8 0..255 -> float32 0..1; other floats -> float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def to_device(x, device):
    """The tensor on that device.  On its way to a GPU it passes pinned memory, so that the CPU need not wait."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


@torch.no_grad()
def augment(images, u, size=None, scale=(0.2, 1.0), blur=True):
    """MoCo-v2's random view, which SEED uses too, as a pure function: same numbers, same view.

    Crop and resize, flip, jitter (brightness, contrast, saturation, hue, in this order: torchvision shuffles the
    four, a departure), grey, blur, normalise; each sample with its own numbers, the batch as one tensor.

    Args:
        images: uint8 [B, 3, H, W], or float in [0, 1], on any device.
        u: float [B, U] from `uniforms`, best left on the CPU.
        size: side of the view in pixels; None: as high as the pictures are.
        scale: the crop's share of the picture (paper: 0.2-1; SwAV teachers 0.14-1); None: the pictures are crops
            already, and stay as large as they are.
        blur: whether to blur at all (off for small pictures, as in MoCo's CIFAR recipe).
    Returns: float32 [B, 3, size, size], normalised by ImageNet's mean and deviation.
    Raises: ValueError for shapes that do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or u.shape != (len(images), UNIFORMS):
        raise ValueError(f"expected images [B, 3, H, W] and u [B, {UNIFORMS}], got {[list(x.shape) for x in (images, u)]}")
    if scale is None and size not in (None, images.shape[2]):
        raise ValueError(f"without a crop (scale=None) pictures of {images.shape[2]} px cannot become {size} px")
    x = as_float(images)
    if scale is not None:
        box = to_device(crop_box(u, x.shape[2], x.shape[3], scale), x.device)
        x = crop_and_resize(x, box, size or x.shape[2])
    blurred = to_device((u[:, BLUR] < BLUR_P).nonzero()[:, 0], x.device)           # counted on the CPU: no waiting
    u = to_device(u, x.device)
    column = lambda i: u[:, i, None, None, None]                        # [B, 1, 1, 1]
    x = torch.where(column(FLIP) < FLIP_P, x.flip(3), x)

    jitter = (column(JITTER) < JITTER_P).float()                        # off: factor 1 and turn 0, which change nothing
    factor = lambda i: 1 + jitter * STRENGTH * (2 * column(i) - 1)      # uniform in 0.6 .. 1.4
    x.mul_(factor(BRIGHT)).clamp_(0, 1)                                 # in place: x is ours since the flip
    blend_(x, to_grey(x).mean((2, 3), keepdim=True), factor(CONTRAST))
    blend_(x, to_grey(x), factor(SATURATE))
    x = shift_hue(x, jitter * HUE_STRENGTH * (2 * column(HUE) - 1))

    x = torch.where(column(GREY) < GREY_P, to_grey(x), x)
    if blur and len(blurred):
        sigma = SIGMA_RANGE[0] + u[blurred, SIGMA] * (SIGMA_RANGE[1] - SIGMA_RANGE[0])
        x[blurred] = gaussian_blur(x[blurred], sigma)
    return normalise(x)


# ------------------------------------------------------------------------------------------ 6. the methods
# SEED, the baseline it beats and the upper bound, with the same two calls:
#     loss, stats = method(views, labels)      the queue and the key encoder stay as they are
#     method.finish_step()                     after backward and the optimiser's step: now they move on
# `views_needed` says how many views of a picture a method asks for; `encoder` is the network it trains.
class SEED(nn.Module):
    """Self-supervised distillation: the student ranks the queue as the frozen teacher does.

    Args: student: an Encoder to train; teacher: an Encoder of the same D, from `load_teacher`; queue_size: K;
        tau_s, tau_t: temperatures (see `seed_loss`).
    Raises: InputError where the two embeddings differ in width.
    """
    views_needed = 1

    def __init__(self, student, teacher, queue_size=65536, tau_s=0.2, tau_t=0.01):
        super().__init__()
        if student.dim != teacher.dim:
            raise InputError(f"the student embeds in {student.dim} numbers, the teacher in {teacher.dim}; "
                             f"give the student --dim {teacher.dim}")
        self.encoder, self.teacher = student, teacher.requires_grad_(False)
        self.tau_s, self.tau_t = tau_s, tau_t
        self.queue = FeatureQueue(queue_size, teacher.dim)
        self.train()

    def train(self, mode=True):
        """Switch the student alone: in train mode the teacher's batch norm would drift with our data."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views, labels=None, teacher_z=None):
        """views: a list of one float [B, 3, S, S], seen by *both* networks; labels are not looked at;
        teacher_z: float [B, D], the teacher's embeddings of this view if they are known already.
        Returns the scalar loss and a dict of scalar diagnostics."""
        if teacher_z is None:
            with torch.no_grad():
                teacher_z = self.teacher(views[0])                      # [B, D]
        student_z = self.encoder(views[0])                              # [B, D]
        self.latest, stats = teacher_z, {}
        loss = seed_loss(student_z, teacher_z, self.queue.features, self.tau_s, self.tau_t, stats)
        return loss, stats | {"fill": self.queue.fill}

    def finish_step(self):
        """Enqueue the teacher's embeddings.  Not earlier: backward still needs the queue as it was."""
        self.queue.enqueue(self.latest)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that sees a batch as `splits` separate ones, as that many GPUs would."""
    splits = 1

    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        return torch.cat([super(SplitBatchNorm2d, self).forward(part) for part in x.chunk(self.splits)])


class MoCo(nn.Module):
    """MoCo-v2 (He et al., Chen et al., 2020): the baseline SEED is compared with, and a teacher without labels.

    Two views of a picture; the query encoder is trained to recognise its own key among K earlier keys, which a
    slow-moving copy of it (momentum m) has made.  Batch norm would let it cheat: query and key normalised over
    the same pictures share a fingerprint.  So keys are shuffled over the ranks, and within a rank batch norm
    works on `bn_splits` separate parts (MoCo's CIFAR demonstration: 8 parts, in the place of 8 GPUs).

    Args: encoder: an Encoder to train (batch norm layers become SplitBatchNorm2d); queue_size: K; momentum: m;
        tau: temperature; bn_splits: parts that a rank's batch is split into; 1 with one rank leaves the leak open.
    """
    views_needed = 2

    def __init__(self, encoder, queue_size=65536, momentum=0.999, tau=0.2, bn_splits=8):
        super().__init__()
        for module in encoder.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__, module.splits = SplitBatchNorm2d, bn_splits      # same weights, same key names
                module.momentum = 1 - (1 - module.momentum) ** (1 / bn_splits)     # a step counts once, not once a part
        self.encoder, self.key_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.momentum, self.tau = momentum, tau
        self.queue = FeatureQueue(queue_size, encoder.dim)

    @torch.no_grad()
    def embed_keys(self, x):
        """x float [B, 3, S, S] -> keys [B, D], each computed among other neighbours than its query was."""
        rank, ranks = (dist.get_rank() if dist.is_initialized() else 0), world_size()
        everyone = gather(x)                                            # [R*B, 3, S, S]
        order = torch.randperm(len(everyone), device=x.device)
        if ranks > 1:
            dist.broadcast(order, src=0)
        keys = gather(self.key_encoder(everyone[order[rank::ranks]]))   # [R*B, D], in the shuffled order
        return keys[order.argsort()][rank::ranks]                       # [B, D], in the order of x

    def forward(self, views, labels=None):
        """views: a list of two float [B, 3, S, S]; labels are not looked at.  Returns the loss and diagnostics."""
        query = self.encoder(views[0])                                  # [B, D]
        self.latest, stats = self.embed_keys(views[1]), {}
        loss = info_nce(query, self.latest, self.queue.features, self.tau, stats)
        return loss, stats | {"fill": self.queue.fill}

    @torch.no_grad()
    def finish_step(self):
        """Enqueue the keys, then let the key encoder follow: k <- m k + (1 - m) q."""
        self.queue.enqueue(self.latest)
        for key, query in zip(self.key_encoder.parameters(), self.encoder.parameters()):
            key.lerp_(query, 1 - self.momentum)


class Supervised(nn.Module):
    """Training with labels, the upper bound: cosine classifier on the embedding, softmax(z . w_c / tau).

    It goes *through* the projection head, so that the head of a network trained here is fit to be distilled; and
    unit class vectors w_c give its embeddings the geometry that the queue compares: angles.
    Args: encoder: an Encoder to train; classes: how many labels there are; tau: temperature.
    """
    views_needed = 1

    def __init__(self, encoder, classes, tau=0.1):
        super().__init__()
        self.encoder, self.tau = encoder, tau
        self.class_vectors = nn.Parameter(F.normalize(torch.randn(classes, encoder.dim), dim=1))  # [C, D]

    def forward(self, views, labels):
        """views: a list of one float [B, 3, S, S]; labels: int64 [B].  Returns the loss and diagnostics."""
        z = self.encoder(views[0])                                      # [B, D]
        with exact_float32(z.device):
            logits = z @ F.normalize(self.class_vectors, dim=1).T / self.tau  # [B, C]
        return F.cross_entropy(logits, labels), {"agree": (logits.argmax(1) == labels).float().mean()}

    def finish_step(self):
        """Nothing moves but the weights."""


# ------------------------------------------------------------------------------------------------- a toy
def toy():
    """Distil one random linear map into another, in a second, and say what to look at."""
    torch.manual_seed(0)
    B, D, K, pixels = 64, 16, 256, 32
    unit = lambda x: F.normalize(x, dim=1)
    teacher, student = torch.randn(pixels, D), torch.randn(pixels, D, requires_grad=True)
    queue, optimiser = FeatureQueue(K, D), torch.optim.SGD([student], lr=2.0)
    print(f"{B} samples a step, {D} numbers each, a queue of {K}: a guess costs log(K+1) = {math.log(K + 1):.2f} nats\n")
    print("step   loss  = teacher's entropy + KL     own entry   agree   queue filled")
    for step in range(301):
        x, stats = torch.randn(B, pixels), {}
        loss = seed_loss(unit(x @ student), unit(x @ teacher), queue.features, tau_t=0.2, stats=stats)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in (0, 3, 10, 30, 100, 300):
            s = {name: value.item() for name, value in stats.items()}
            print(f"{step:4d}  {loss:5.2f}  = {s['entropy']:6.2f}            + {s['kl']:5.2f}    {s['own']:6.2f}   "
                  f"{s['agree']:5.0%}   {queue.fill:6.0%}")
        queue.enqueue(unit(x @ teacher))
    print("\nThe loss stops at the teacher's entropy, not at 0; KL is the student's part (it nears 0 since tau_s = tau_t).\n"
          "`own` is the weight that the teacher gives to the sample itself: the rest is what it says about neighbours.")


if __name__ == "__main__":
    toy()
