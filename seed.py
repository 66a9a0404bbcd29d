"""SEED: self-supervised distillation (Fang et al., ICLR 2021, arXiv 2101.04731) in one file.

Contrastive learning needs no labels, but it works well only for large networks. SEED trains a small
network (the student) with the help of a large one (the teacher), which is already trained and stays
frozen. No labels are used.

The student does not copy the teacher's embeddings. The teacher computes how similar an image is to
each entry of a queue of earlier images, as a probability distribution over the queue. The student
compares its own embedding of the image with the same queue, and learns to produce the same
distribution. Both networks see the same view, a randomly cropped and recolored copy of the image.

    image -> view -+-> student -> z_s --> z_s . d_j / tau_s -> softmax -> p_s -+
                   |                            ^                              |
                   |            d_0 = z_t,  d_1 ... d_K = the queue            +-> cross-entropy
                   |                            v                              |
                   +-> teacher -> z_t --> z_t . d_j / tau_t -> softmax -> p_t -+
                       (frozen)    |
                                   +--> after `backward`: z_t enters the queue, the oldest leaves

Letters in shapes (a line that changes a tensor's shape ends in the new shape):
    B  images in the batch of one process      D  dimension of an embedding (128)
    R  processes that train together           K  length of the queue (65,536)
    V  views of an image                       S  side of a view in pixels
    C  classes                                 H, W  height and width of an image in pixels
    U  uniform numbers that determine a view

The authors' code (github.com/jacobswan1/SEED) uses tau_t = 1e-4. It enqueues before `backward` and
therefore clones the queue. A re-implementation (github.com/zhangyifei01/SEED_ICLR21) uses 0.01.
This code uses 0.01. It enqueues after `backward`: the loss is the same, and no clone is needed.
`python seed.py` trains a toy in seconds. The training loop is `train` in train.py."""
import copy
import difflib
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2.functional import rgb_to_grayscale


# ------------------------------------------------------------------------------------- 1. the loss
def similarity_logits(z, own_entry, queue, tau):
    """Return the similarities of z to d_0 (own_entry) and d_1 ... d_K (queue), divided by tau.

    Args: z: float [B, D]; own_entry: float [B, D], the teacher's embeddings of the same views;
        queue: float [K, D]; tau: above 0. All rows have unit norm.
    Returns: float32 [B, 1+K]. Raises: ValueError for other shapes or a tau of 0 or below."""
    if z.ndim != 2 or own_entry.shape != z.shape or queue.ndim != 2 or queue.shape[1] != z.shape[1]:
        shapes = [list(x.shape) for x in (z, own_entry, queue)]
        raise ValueError(f"expected shapes [B, D], [B, D] and [K, D], got {shapes}")
    if not tau > 0:
        raise ValueError(f"a temperature must be above 0, got {tau}")
    # No autocast: bf16 rounds a cosine near 1 to steps of 0.004, or 0.4 in a logit at tau = 0.01.
    with torch.autocast(z.device.type, enabled=False):
        z = z.float() / tau                                 # cheaper than dividing the logits
        to_own = (z * own_entry.float()).sum(dim=1, keepdim=True)       # [B, 1]
        to_queue = z @ queue.float().T                                  # [B, K]
        return torch.cat([to_own, to_queue], dim=1)                     # [B, 1+K]


def seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=0.01):
    """Return the cross-entropy between the similarity distributions of teacher and student.

        p_t[j] = softmax_j(z_t . d_j / tau_t)         d_0 = z_t,  d_1 ... d_K = the queue
        p_s[j] = softmax_j(z_s . d_j / tau_s)
        loss   = mean over the batch of  - sum_j p_t[j] log p_s[j]

    Both networks are compared with the teacher's entries. This ties the two embedding spaces
    together: the student must place an image near the teacher's embeddings of similar images.

    tau_t controls how much similar images count. The image's own entry d_0 is the most similar one.
    As tau_t -> 0, p_t puts all its weight there, and the loss becomes `info_nce`, with the
    teacher's embeddings as positive and negatives. As tau_t -> infinity, p_t becomes uniform and
    carries no information. In between, images that the teacher finds similar share the weight. How
    much depends on the teacher: at tau_t 0.01, 0.05 and 0.1, p_t[0] is 0.22, 0.02 and 0.01 in
    train.py's default run, whose teacher has seen labels, but 1.00, 0.80 and 0.24 with a MoCo-v2
    teacher on 10,000 images of CIFAR-10. Try 0.01 to 0.1, and watch `self_prob`.

    Args: z_s: float [B, D], the student's embeddings, the only input that receives a gradient;
        z_t: float [B, D], the teacher's embeddings of the same views; queue: float [K, D], earlier
        teacher embeddings, without this batch; all rows have unit norm; tau_s, tau_t: above 0.
    Returns: float32 scalar, also under autocast. Raises: ValueError, like `similarity_logits`.

    >>> z = torch.tensor([[1., 0.]])
    >>> queue = torch.tensor([[0., 1.], [-1., 0.]])                 # similarities to z: 1, 0, -1
    >>> round(seed_loss(z, z, queue, tau_s=1., tau_t=1.).item(), 3)  # p_t = p_s = .665, .245, .090
    0.832
    >>> round(seed_loss(z, z, queue, tau_s=1., tau_t=.5).item(), 3)  # p_t is now .867, .117, .016
    0.557
    """
    z_t = z_t.detach()
    queue = queue.detach()
    p_t = similarity_logits(z_t, z_t, queue, tau_t).softmax(dim=1)             # [B, 1+K]
    log_p_s = similarity_logits(z_s, z_t, queue, tau_s).log_softmax(dim=1)     # [B, 1+K]
    return -(p_t * log_p_s).sum(dim=1).mean()


@torch.no_grad()
def seed_diagnostics(z_s, z_t, queue, tau_s=0.2, tau_t=0.01):
    """Return what shows whether a run is healthy: a dict of scalars. Arguments as in `seed_loss`.

    An untrained student has a loss of about log(1 + K). The loss never reaches 0: it is the sum of
        entropy: H(p_t) in nats, which the student cannot change; p_t covers about e^entropy entries
        kl: loss - entropy, which the student reduces, but not to 0. Similarities are at most 1, so
            p_s cannot be as peaked as p_t if tau_s > tau_t, even for a copy of the teacher.
    So compare the loss with
        loss_of_a_copy: the loss if z_s were z_t. A copy does not quite minimize this loss if
            tau_s > tau_t, so a good student may have a lower one.
    Two numbers show whether p_t is one-hot, as in contrastive learning, and whether p_s follows:
        self_prob: p_t's weight on the image's own entry
        top1_agreement: fraction of images whose own entry the student ranks first, as the teacher
            always does"""
    p_t = similarity_logits(z_t, z_t, queue, tau_t).softmax(dim=1)             # [B, 1+K]
    logits_s = similarity_logits(z_s, z_t, queue, tau_s)                       # [B, 1+K]
    loss = -(p_t * logits_s.log_softmax(dim=1)).sum(dim=1).mean()
    entropy = torch.special.entr(p_t).sum(dim=1).mean()
    return dict(kl=loss - entropy, entropy=entropy,
                loss_of_a_copy=seed_loss(z_t, z_t, queue, tau_s, tau_t),
                self_prob=p_t[:, 0].mean(),
                top1_agreement=(logits_s.argmax(dim=1) == 0).float().mean())


# ------------------------------------------------------------------------------------ 2. the queue
def rank_and_world_size():
    """Return the index of this process and R, the number of processes; (0, 1) for a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def concat_all_gather(x):
    """Gather x [B, ...] of all processes into [R*B, ...], without gradient. Process r holds images
    r, r+R, ... of the global batch. Interleaving restores the order that a single process has."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return x
    parts = [torch.empty_like(x.contiguous()) for _ in range(world_size)]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)                      # [B, R, ...] -> [R*B, ...]


class FeatureQueue(nn.Module):
    """A first-in, first-out queue of the last `size` embeddings (authors' code: K = 65,536).

    SEED stores teacher embeddings. The teacher is frozen, so its entries never go stale, and the
    queue can be long. Student embeddings would come from an earlier, worse student. (MoCo has no
    frozen network, and needs a slowly moving key encoder for this reason.)

    The queue starts with random unit vectors, because the first step needs K entries. Real
    embeddings replace them within K / (R*B) steps. A random vector is unlike every image and easy
    to tell apart from it, but a real embedding is not. The loss may therefore *rise* until the
    queue is full. The toy below shows it.

    Buffers: features: float32 [size, dim], unit-norm rows, equal in all processes if they start
        with the same seed, as in train.py; seen: int64, the number of embeddings ever enqueued.
    Raises: ValueError if size or dim is below 1, or for embeddings of another dimension."""

    def __init__(self, size, dim):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs a size and dim of at least 1, got {size} and {dim}")
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))      # [K, D]
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, z):
        """Replace the oldest entries by z [B, D] of all processes. B is equal in all of them."""
        size, dim = self.features.shape
        if z.ndim != 2 or z.shape[1] != dim:
            raise ValueError(f"the queue holds embeddings [B, {dim}], got {list(z.shape)}")
        z = concat_all_gather(z.to(self.features.dtype))                # [R*B, D]
        slots = (self.seen + torch.arange(len(z), device=z.device)) % size     # [R*B], wraps around
        self.features[slots[-size:]] = z[-size:]                        # if R*B > K, the last K
        self.seen += len(z)

    @property
    def filled(self):
        """The fraction of entries that are real embeddings, scalar in [0, 1]."""
        return (self.seen / len(self.features)).clamp(max=1)


# ---------------------------------------------------------------------------------------- 3. SEED
class SEED(nn.Module):
    """Self-supervised distillation: the student learns the teacher's similarity distributions.

    The training step is in `toy` below, and is the same for every method of this project. A method
    receives a list of `views_per_image` views (here one): images [B, 3, S, S], or your own data.

    Args: student, teacher: any modules that turn a view into embeddings [B, D] and have an
        attribute `dim` = D. SEED normalizes the embeddings and freezes the teacher.
        queue_size: K; tau_s, tau_t: the temperatures of `seed_loss`.
    Raises: ValueError unless both networks have the same `dim`."""
    views_per_image = 1

    def __init__(self, student, teacher, queue_size=65536, tau_s=0.2, tau_t=0.01):
        super().__init__()
        dim_s, dim_t = [getattr(network, "dim", None) for network in (student, teacher)]
        if dim_s is None or dim_s != dim_t:
            raise ValueError(f"student.dim is {dim_s} and teacher.dim is {dim_t}; both need a dim, "
                             "the dimension of their embeddings, and it must be the same")
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.queue = FeatureQueue(queue_size, dim_t)
        self.tau_s = tau_s
        self.tau_t = tau_t
        self.train()                                        # see `train`: not the teacher

    def train(self, mode=True):
        """Set the student's mode. The teacher always stays in evaluation mode.

        In training mode, its batch norm would drift with our data. In evaluation mode, z_t does
        not depend on the batch, so SEED need not shuffle images between GPUs, as MoCo must."""
        super().train(mode)
        self.teacher.eval()
        return self

    def embed(self, network, views):
        """Return the embeddings of the only view: float32 [B, D], unit norm, of any network."""
        return F.normalize(network(views[0]).float(), dim=1)

    @torch.no_grad()
    def targets(self, views, labels=None):
        """Return the teacher's embeddings z_t [B, D]. Labels are ignored."""
        return self.embed(self.teacher, views)

    def forward(self, views):
        """Return the student's embeddings z_s [B, D] of the same view."""
        return self.embed(self.student, views)

    def loss(self, z_s, z_t):
        """Return the loss of the batch, float32 scalar. The queue does not change."""
        return seed_loss(z_s, z_t, self.queue.features, self.tau_s, self.tau_t)

    def diagnostics(self, z_s, z_t):
        """Return `seed_diagnostics` and queue_filled. Call this before `after_step`."""
        found = seed_diagnostics(z_s, z_t, self.queue.features, self.tau_s, self.tau_t)
        return dict(found, queue_filled=self.queue.filled)

    def after_step(self, z_t):
        """Enqueue z_t. Call this after `backward`, which still needs the old entries: otherwise
        autograd raises an error. Before `loss`, nothing would fail, but each image's own entry
        would appear twice."""
        self.queue.enqueue(z_t)


class TinyNetwork(nn.Sequential):
    """All that SEED requires of a network of your own: `dim`, and embeddings [B, dim]."""

    def __init__(self, hidden, inputs=32, dim=16):          # [B, inputs] -> [B, dim]
        super().__init__(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.dim = dim


def toy():
    """Distill a random network into a smaller one, on noisy copies of 300 points. Among others:

    step   0  loss 7.64  kl 7.64  entropy 0.00  loss_of_a_copy 2.75  self_prob 1.00 ...
    step   3  loss 6.10  kl 6.05  entropy 0.06  loss_of_a_copy 3.32  self_prob 0.99 ...
    step  10  loss 6.67  kl 6.52  entropy 0.15  loss_of_a_copy 3.90  self_prob 0.96 ...
    step 300  loss 3.79  kl 3.64  entropy 0.15  loss_of_a_copy 3.87  self_prob 0.96 ..."""
    torch.manual_seed(0)
    points = torch.randn(300, 32)
    student = TinyNetwork(hidden=64)
    method = SEED(student, teacher=TinyNetwork(hidden=256), queue_size=1024)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    for step in range(301):
        views = [points[torch.randint(300, (128,))] + 0.3 * torch.randn(128, 32)]
        z_t = method.targets(views)
        z_s = method(views)
        loss = method.loss(z_s, z_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, 3, 10, 30, 100, 300):
            values = [f"{name} {x:.2f}" for name, x in method.diagnostics(z_s, z_t).items()]
            print(f"step {step:3d}  loss {loss:.2f}  " + "  ".join(values))
        method.after_step(z_t)                              # only now the queue moves on


# The method is complete here. What follows serves it: networks, views, small crops and baselines.
# ------------------------------------------------------------------------------------ 4. encoders
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputError(ValueError):
    """A wrong file, name or setting. One line says what is wrong and what to do."""


class Encoder(nn.Module):
    """A torchvision classification network with a projection head instead of its final Linear.

    The head is the authors' Linear, ReLU, Linear. The encoder itself normalizes views, which are
    pixels in 0..1, so networks that expect different pixels can see the same views.
    Args: arch: the name of a torchvision classification network, such as "mobilenet_v3_large".
        dim: D; None: no head, the embedding is the normalized features. hidden_dim: width of the
        head's hidden layer; None: feature_dim, as the authors; 0: no such layer.
        small_images: see `adapt_stem_for_small_images`; image_size: S; mean, std: of each color
        channel; backbone: your own module [B, 3, S, S] -> [B, feature_dim].
    Attributes: feature_dim: number of features; provenance: a line on its training; used_labels:
        whether it used labels, None if unknown; multi_crop: whether it used small crops.
    Raises: InputError for an unknown name, or an image size that does not fit."""

    def __init__(self, arch, dim=128, hidden_dim=None, small_images=False, image_size=224,
                 backbone=None, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.arch = arch
        self.hidden_dim = hidden_dim
        self.small_images = small_images
        self.image_size = image_size
        self.provenance = f"{arch}, random weights"
        self.used_labels = False
        self.multi_crop = False
        self.backbone = backbone
        self.last_layer = None                              # in torchvision: "fc", "classifier.3"
        if backbone is None:
            self.backbone, self.last_layer = torchvision_backbone(arch)
        if small_images:
            adapt_stem_for_small_images(self.backbone, arch)
        self.feature_dim = self.check_image_size(image_size)
        self.dim = self.feature_dim if dim is None else dim
        hidden = self.feature_dim if hidden_dim is None else hidden_dim
        self.head = nn.Identity()
        if dim is not None and hidden == 0:
            self.head = nn.Linear(self.feature_dim, dim)
        elif dim is not None:
            self.head = nn.Sequential(nn.Linear(self.feature_dim, hidden), nn.ReLU(inplace=True),
                                      nn.Linear(hidden, dim))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def check_image_size(self, size):
        """Return the number of features. Raise InputError if images of this size do not pass."""
        device = "meta" if self.last_layer else "cpu"       # "meta": compute only shapes
        network = copy.deepcopy(self.backbone).to(device)
        network.train(device == "meta")                     # so GoogLeNet, with 3 outputs, fails
        try:
            with torch.no_grad():
                _, feature_dim = network(torch.zeros(2, 3, size, size, device=device)).shape
        except Exception as e:                              # a network may raise anything
            problem = str(e).split("\n")[0] or type(e).__name__
            raise InputError(f"{self.arch} does not turn images of {size} px into vectors "
                             f"({problem}); choose another network or image size") from None
        return feature_dim

    def features(self, x):
        """Return the features [B, feature_dim] of pixels x [B, 3, S, S]."""
        return self.backbone((to_float(x) - self.mean) / self.std)

    def forward(self, x):
        """Return the embeddings of pixels x [B, 3, S, S]: float32 [B, D], unit norm."""
        return F.normalize(self.head(self.features(x)).float(), dim=1)


def to_float(images):
    """Convert integers in 0..255, or floats in 0..1, to float32 in 0..1."""
    return images.float() if images.is_floating_point() else images / 255


def torchvision_backbone(arch):
    """Return a new network without its final Linear, and the name of that layer."""
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        near = ", ".join(difflib.get_close_matches(str(arch), known, cutoff=0))
        raise InputError(f"unknown network '{arch}'; did you mean {near}?")
    network = torchvision.models.get_model(arch, weights=None)
    linears = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise InputError(f"{arch} has no Linear layer to replace; choose another network")
    network.set_submodule(linears[-1], nn.Identity())
    return network, linears[-1]


def adapt_stem_for_small_images(backbone, arch):
    """Give the first convolution stride 1. A 7x7 one becomes 3x3 and loses the max-pool behind it.
    This is usual on CIFAR: ImageNet's stem would shrink 32 px to 8 before the first block."""
    name, conv = next((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
    if conv.stride != (2, 2):
        raise InputError(f"{arch} has no stem to adapt to small images; use --no-small-images")
    conv.stride = (1, 1)
    if conv.kernel_size == (7, 7):
        backbone.set_submodule(name, nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=False))
        pool = next(n for n, m in backbone.named_modules() if isinstance(m, nn.MaxPool2d))
        backbone.set_submodule(pool, nn.Identity())


# ---------------------------------------------------------------------------------------- 5. views
# Every random choice about a view comes from a row of U numbers that is computed from (seed, epoch,
# index, view). So a view does not depend on workers, processes or interruptions, and `augment` is a
# pure function of a whole batch. (torchvision's transforms use a generator, image by image.)
AREA = slice(0, 10)                                         # ten candidates, see `crop_box`
RATIO = slice(10, 20)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA = range(20, 31)
UNIFORMS = 31                                               # U

FLIP_P, JITTER_P, GRAY_P, BLUR_P = 0.5, 0.8, 0.2, 0.5       # MoCo-v2's, which SEED uses
JITTER_STRENGTH, HUE_STRENGTH = 0.4, 0.1
MIN_SIGMA, MAX_SIGMA, BLUR_RADIUS = 0.1, 2.0, 6             # pixels
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x):
    """Mix the bits of a uint64 array (Steele et al., 2014). Sums and products wrap around."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed, epoch, index, view=0):
    """Return float32 [B, U] in [0, 1). Row b depends only on (seed, epoch, index[b], view), which
    are ints; index: list, array or tensor of B sample indices."""
    key = np.zeros(1, np.uint64)                            # NumPy warns if a scalar wraps around
    for word in (seed, epoch, view):
        key = splitmix64(key ^ np.array([int(word) % 2**64], np.uint64))
    key = splitmix64(key ^ np.asarray(index, np.int64).astype(np.uint64).reshape(-1, 1))  # [B, 1]
    bits = splitmix64(key + np.arange(UNIFORMS, dtype=np.uint64) * GOLDEN)     # [B, U]
    bits = (bits >> np.uint64(40)).astype(np.float32)       # 24 bits, which fill a float32
    return torch.from_numpy(bits * np.float32(2**-24))


def crop_box(u, height, width, scale=(0.2, 1.0)):
    """Return the boxes of random resized crops: float32 [B, 4] = top, left, height, width in px.

    As in torchvision, the area is uniform in `scale`, a fraction of the image, and the logarithm of
    the aspect ratio in 3/4 .. 4/3. The first of ten candidates that fits is used; if none fits, the
    largest box within these ratios. u: [B, U] on the CPU."""
    u = u.numpy()                                           # NumPy is fastest for a single image
    area = (scale[0] + u[:, AREA] * (scale[1] - scale[0])) * float(height * width)    # [B, 10]
    ratio = np.exp((2 * u[:, RATIO] - 1) * math.log(4 / 3))             # [B, 10], width / height
    h = np.sqrt(area / ratio)                                           # [B, 10]
    w = np.sqrt(area * ratio)                                           # [B, 10]
    fits = (h <= height) & (w <= width)
    row = np.arange(len(u))
    first = fits.argmax(axis=1)                                         # [B]; 0 if none fits
    h = np.where(fits, h, min(height, width * 4 / 3))[row, first]       # [B]
    w = np.where(fits, w, min(width, height * 4 / 3))[row, first]       # [B]
    box = np.stack([u[:, TOP] * (height - h), u[:, LEFT] * (width - w), h, w], axis=1)    # [B, 4]
    return torch.from_numpy(box.astype(np.float32))


def resize_weights(start, length, source, size):
    """Return how much each of `source` pixels adds to each of `size` pixels, [B, size, source], if
    [start, start + length) is resized, bilinearly with antialiasing. start, length: [B]."""
    step = (length / size)[:, None, None]                               # source pixels per target
    first = start[:, None, None]
    target = torch.arange(size, device=start.device)[:, None]           # [size, 1]
    pixel = torch.arange(source, device=start.device)                   # [source]
    distance = pixel + 0.5 - (first + (target + 0.5) * step)            # [B, size, source]
    weight = (1 - distance.abs() / step.clamp(min=1)).clamp(min=0)      # wider when shrinking
    weight = weight * ((pixel + 1 > first) & (pixel < first + size * step))    # only from inside
    return weight / weight.sum(dim=2, keepdim=True)


def crop_and_resize(images, box, size):
    """Crop box [B, 4] (see `crop_box`) from images float [B, 3, H, W] -> [B, 3, size, size].
    Resizing is linear in rows and in columns, so two matrix products resize all images at once."""
    top, left, height, width = box.unbind(1)
    rows = resize_weights(top, height, images.shape[2], size)           # [B, size, H]
    columns = resize_weights(left, width, images.shape[3], size)        # [B, size, W]
    return rows[:, None] @ (images @ columns[:, None].mT)


def adjust_hue(images, shift):
    """Rotate the hue of images [B, 3, H, W] in 0..1 by `shift` [B, 1, 1, 1] in -0.5..0.5 turns.

    RGB to HSV and back: red, green and blue (n = 5, 3, 1) are
    value - chroma * clip(min(k, 4 - k), 0, 1), where k = (n + hue) mod 6 and hue is in 0..6."""
    r, g, b = images.unbind(1)                                          # [B, H, W] each
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1)                        # gray has no hue
    hue = torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    hue = torch.where(value == r, (g - b) / divisor, hue) + 6 * shift[:, 0]    # [B, H, W]
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]     # [3, 1, 1]
    k = (n + hue[:, None]) % 6                                          # [B, 3, H, W]
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(images, sigma):
    """Blur images [B, 3, H, W] by sigma [B] pixels. Borders are mirrored, so H, W > 6."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)    # [B, 13], a Gaussian
    kernel = kernel.repeat_interleave(3, dim=0)[:, None]                # [3B, 1, 13], per channel
    x = F.pad(images, [BLUR_RADIUS] * 4, mode="reflect").flatten(0, 1)  # [3B, H+12, W+12]
    x = F.conv2d(x, kernel[:, :, None], groups=len(kernel))             # [3B, H+12, W]
    x = F.conv2d(x, kernel[:, :, :, None], groups=len(kernel))          # [3B, H, W]
    return x.view_as(images)


@torch.no_grad()
def augment(images, u, size=None, scale=(0.2, 1.0), blur=True, color=True):
    """Return MoCo-v2's random view, which SEED also uses: crop, flip, color jitter, gray, blur.

    The same u gives the same view. (The authors' code jitters in random order and crops at whole
    pixels.) Call this outside autocast.
    images: uint8 [B, 3, H, W], or float in 0..1, on any device. u: float [B, U] from `uniforms`, on
    the CPU. size: S, the side of the view, or None for H. scale: the crop's area as a fraction of
    the image, or None for no crop. blur: off for small images, as in MoCo's CIFAR demonstration.
    color: off for training with labels, which only crops and flips.
    Returns: float32 [B, 3, S, S] in 0..1; without a crop [B, 3, H, W]. Raises: ValueError."""
    if images.ndim != 4 or images.shape[1] != 3 or u.shape != (len(images), UNIFORMS):
        shapes = [list(x.shape) for x in (images, u)]
        raise ValueError(f"expected images [B, 3, H, W] and u [B, {UNIFORMS}], got {shapes}")
    x = to_float(images)
    if scale is not None:
        box = crop_box(u, x.shape[2], x.shape[3], scale).to(x.device, non_blocking=True)
        x = crop_and_resize(x, box, size or x.shape[2])                 # [B, 3, S, S]
    # Computed on the CPU, because nonzero() on a GPU would make the program wait for it.
    blurred = (u[:, BLUR] < BLUR_P).nonzero()[:, 0].to(x.device, non_blocking=True)
    u = u.to(x.device, non_blocking=True)
    draw = u[:, :, None, None, None].unbind(1)              # draw[FLIP]: [B, 1, 1, 1]
    x = torch.where(draw[FLIP] < FLIP_P, x.flip(3), x)
    if not color:
        return x

    jittered = (draw[JITTER] < JITTER_P).float()                        # [B, 1, 1, 1], 0 or 1
    brightness, contrast, saturation = [                                # 0.6 .. 1.4, or 1
        1 + JITTER_STRENGTH * jittered * (2 * draw[column] - 1)
        for column in (BRIGHTNESS, CONTRAST, SATURATION)]
    x = (x * brightness).clamp_(0, 1)
    mean_gray = rgb_to_grayscale(x).mean((2, 3), keepdim=True)          # [B, 1, 1, 1]
    x = torch.lerp(mean_gray, x, contrast).clamp_(0, 1)
    x = torch.lerp(rgb_to_grayscale(x), x, saturation).clamp_(0, 1)
    x = adjust_hue(x, HUE_STRENGTH * jittered * (2 * draw[HUE] - 1))
    x = torch.where(draw[GRAY] < GRAY_P, rgb_to_grayscale(x), x)
    if blur and len(blurred):
        sigma = MIN_SIGMA + (MAX_SIGMA - MIN_SIGMA) * u[blurred, SIGMA]
        x[blurred] = gaussian_blur(x[blurred], sigma)
    return x


# --------------------------------------------------------------------------------- 6. small crops
class SmallCropSEED(SEED):
    """SEED with small crops, as for the paper's best results (authors' code: 6 of 96 px).

    After the large view, both networks see V-1 small crops of each image. They cost little, and
    force the student to recognize an image from a detail. They look unlike whole images, so they
    have their own queue. Args: as for SEED; small_crops: V-1."""

    def __init__(self, student, teacher, queue_size=65536, tau_s=0.2, tau_t=0.01, small_crops=6):
        super().__init__(student, teacher, queue_size, tau_s, tau_t)
        self.views_per_image = 1 + small_crops
        self.small_queue = FeatureQueue(queue_size, teacher.dim)

    def embed(self, network, views):
        """Return the embeddings [V*B, D]: large views, then all first small crops, and so on."""
        large = super().embed(network, views)                           # [B, D]
        small = super().embed(network, [torch.cat(views[1:])])          # [(V-1)*B, D]
        return torch.cat([large, small])                                # [V*B, D]

    def split(self, z):
        """Split z [V*B, D] into the large views' [B, D] and the small crops' [(V-1)*B, D]."""
        return z.tensor_split([len(z) // self.views_per_image])

    def loss(self, z_s, z_t):
        """Return the large views' loss plus the mean over all small crops."""
        large_s, small_s = self.split(z_s)
        large_t, small_t = self.split(z_t)
        large_loss = super().loss(large_s, large_t)
        small_queue = self.small_queue.features
        return large_loss + seed_loss(small_s, small_t, small_queue, self.tau_s, self.tau_t)

    @torch.no_grad()
    def diagnostics(self, z_s, z_t):
        """Return SEED's diagnostics of the large views, and small_loss."""
        large_s, _ = self.split(z_s)
        large_t, _ = self.split(z_t)
        small_loss = self.loss(z_s, z_t) - super().loss(large_s, large_t)
        return dict(super().diagnostics(large_s, large_t), small_loss=small_loss)

    def after_step(self, z_t):
        """Enqueue the large view and the first small crop of each image."""
        large_t, small_t = self.split(z_t)
        super().after_step(large_t)
        self.small_queue.enqueue(small_t[:len(large_t)])


# ----------------------------------------------------------------------------------- 7. baselines
def info_nce(query, key, queue, tau=0.2):
    """Return MoCo's contrastive loss, which `seed_loss` becomes as tau_t -> 0: a float32 scalar.

    query, key: float [B, D], of two views of the same images; only `query` receives a gradient.
    queue: float [K, D], keys of other images. All rows have unit norm."""
    logits = similarity_logits(query, key.detach(), queue.detach(), tau)       # [B, 1+K]
    positive = torch.zeros(len(logits), dtype=torch.long, device=logits.device)    # [B], column 0
    return F.cross_entropy(logits, positive)


class MoCo(nn.Module):
    """MoCo-v2 (He et al.; Chen et al., 2020): the baseline, and a way to train a teacher.

    From one view of an image, the encoder learns to find the image's key among K earlier keys. A
    slowly moving copy of the encoder computes the keys, from another view. If batch norm normalized
    query and key over the same images, the encoder could match them by those statistics. So keys
    are shuffled, and both encoders process a batch in parts, as if each part had its own GPU.

    Args: encoder: the network to train; queue_size: K; momentum: of the key encoder; tau:
        temperature; images_per_part: about how many images share batch-norm statistics."""
    views_per_image = 2

    def __init__(self, encoder, queue_size=65536, momentum=0.999, tau=0.2, images_per_part=32):
        super().__init__()
        self.encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, encoder.dim)
        self.momentum = momentum
        self.tau = tau
        self.images_per_part = images_per_part

    def embed(self, encoder, x):
        """Return the embeddings [B, D] of x [B, 3, S, S], computed part by part."""
        parts = x.tensor_split(max(1, len(x) // self.images_per_part))
        return F.normalize(torch.cat([encoder(part) for part in parts]).float(), dim=1)

    @torch.no_grad()
    def targets(self, views, labels=None):
        """Return the keys [B, D] of the second views, each computed among other images."""
        rank, world_size = rank_and_world_size()
        everyone = concat_all_gather(views[1])                          # [R*B, 3, S, S]
        order = torch.randperm(len(everyone), device=everyone.device)   # [R*B]
        if world_size > 1:
            dist.broadcast(order, src=0)
        keys = self.embed(self.key_encoder, everyone[order[rank::world_size]])     # [B, D]
        keys = concat_all_gather(keys)                                  # [R*B, D], shuffled
        return keys[order.argsort()][rank::world_size]                  # [B, D], order restored

    def forward(self, views):
        return self.embed(self.encoder, views[0])                       # queries [B, D]

    def loss(self, query, key):
        return info_nce(query, key, self.queue.features, self.tau)

    def diagnostics(self, query, key):
        """Return top1_agreement, the fraction of queries nearest to their own key; queue_filled."""
        found = seed_diagnostics(query, key, self.queue.features, self.tau, self.tau)
        return dict(top1_agreement=found["top1_agreement"], queue_filled=self.queue.filled)

    @torch.no_grad()
    def after_step(self, key):
        """Enqueue the keys, then move the key encoder: k <- m k + (1 - m) q."""
        self.queue.enqueue(key)
        for k, q in zip(self.key_encoder.parameters(), self.encoder.parameters()):
            k.lerp_(q, 1 - self.momentum)


class Supervised(nn.Module):
    """Training with labels, the upper bound: softmax over z . w_c / tau, with unit vectors w_c. The
    loss goes through the head, which can therefore be distilled.
    Args: encoder: the network to train; classes: C; tau: temperature."""
    views_per_image = 1

    def __init__(self, encoder, classes, tau=0.1):
        super().__init__()
        self.encoder = encoder
        self.class_vectors = nn.Parameter(F.normalize(torch.randn(classes, encoder.dim), dim=1))
        self.tau = tau

    def targets(self, views, labels):
        return labels                                                   # int64 [B]

    def forward(self, views):
        z = self.encoder(views[0])                                      # [B, D]
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ F.normalize(self.class_vectors, dim=1).T / self.tau        # [B, C]

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)

    def diagnostics(self, logits, labels):                              # accuracy on the batch
        return dict(top1_agreement=(logits.argmax(dim=1) == labels).float().mean())

    def after_step(self, labels):                                       # there is no queue
        pass


if __name__ == "__main__":
    toy()
