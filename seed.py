"""SEED: self-supervised distillation (Fang et al., ICLR 2021, arXiv 2101.04731) in one file.

Contrastive learning needs no labels; it makes good large networks and poor small ones. SEED trains
a small network (the student) with the help of a large one (the teacher), which is trained already
and stays frozen. No label takes part.

The student does not copy the teacher's embeddings. The teacher says how similar an image is to each
of a queue of earlier images: a probability distribution over the queue. The student compares its
own embedding of the image with the same queue, and is trained to give the same distribution. Both
look at the same view, a randomly cropped and recolored copy of the image.

    image -> view -+-> student -> z_s --> z_s . d_j / tau_s -> softmax -> p_s -+
                   |                            ^                              |
                   |            d_0 = z_t,  d_1 ... d_K = the queue            +-> cross-entropy
                   |                            v                              |
                   +-> teacher -> z_t --> z_t . d_j / tau_t -> softmax -> p_t -+
                       (frozen)    |
                                   +--> after the step: z_t enters the queue, the oldest leaves

Letters in shapes (a line that changes a tensor's shape ends in the new one):
    B  images in the batch of one process      D  width of an embedding (128)
    R  processes that train together           K  length of the queue (65,536)
    C  classes                                 F  width of the backbone's features
    V  views of an image                       S  side of a view in pixels
    U  random numbers that make one view       H, W  height and width of an image in pixels

Differences ("-": we could not check what the paper says):

                  paper   authors' code                 here
    tau_t         -       1e-4                          0.01, as in a re-implementation
    enqueue       -       before backward, so the       after backward: the same numbers, and no
                          queue is cloned               clone is needed
    color jitter  -       in random order               in one fixed order
    crop box      -       on whole pixels               between pixels, too
    small crops   -       6, for the best results       --small-crops 6, or a SwAV teacher

The training loop is `train` in train.py; data sets and evaluation are in probe.py. This file needs
neither: `python seed.py` trains a toy in a few seconds.
"""
import argparse
import codecs
import contextlib
import copy
import difflib
import hashlib
import itertools
import math
import os
import re
import shutil
import zipfile
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from numpy._core.multiarray import _reconstruct, scalar
from torch import nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputError(ValueError):
    """A bad file or name; one line says what is wrong and what to do. (A bad call: ValueError.)"""


# ------------------------------------------------------------------------------------- 1. the loss
def similarity_logits(z, own, queue, tau):
    """Cosine similarities of each z to d_0 = own (of the same image) and d_1 ... d_K = queue, over
    tau.

    Args: z, own: float [B, D]; queue: float [K, D]; all rows of length 1; tau: above 0.
    Returns: float32 [B, 1+K]. Raises: ValueError for other shapes or another tau."""
    if z.ndim != 2 or own.shape != z.shape or queue.ndim != 2 or queue.shape[1] != z.shape[1]:
        shapes = [list(x.shape) for x in (z, own, queue)]
        raise ValueError(f"expected shapes [B, D], [B, D] and [K, D], got {shapes}")
    if not tau > 0:
        raise ValueError(f"a temperature must be above 0, got {tau}")
    # bf16 rounds a cosine near 1 to steps of 0.004; divided by tau = 0.01, that is 0.4 in a logit.
    # So autocast is off here. (Leave TF32 off for matrix products, too, as PyTorch does.)
    with torch.autocast(z.device.type, enabled=False):
        z = z.float() / tau                                 # cheaper than dividing the logits
        to_own = (z * own.float()).sum(dim=1, keepdim=True)             # [B, 1]
        to_queue = z @ queue.float().T                                  # [B, K]
        return torch.cat([to_own, to_queue], dim=1)                     # [B, 1+K]


def seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=0.01):
    """The SEED loss: cross-entropy between the similarity distributions of teacher and student.

        p_t[j] = softmax_j(z_t . d_j / tau_t)         d_0 = z_t,  d_1 ... d_K = the queue
        p_s[j] = softmax_j(z_s . d_j / tau_s)
        loss   = mean over the batch of  - sum_j p_t[j] log p_s[j]

    Why are both compared with the teacher's entries? They tie the two spaces together: the student
    has to put an image where the teacher's embeddings of similar images are. And entry j means the
    same image to both, so that p_s[j] and p_t[j] can be compared. So both need the same D.

    What does tau_t do? z_t . z_t = 1 is the largest similarity there is. As tau_t -> 0, all of p_t
    moves to that entry, and the loss becomes `info_nce`, "find your own entry": neighbors count for
    nothing. As tau_t -> infinity, p_t becomes uniform and says nothing. In between, an image shares
    its weight with similar ones. Authors' code: 1e-4, nearly the first limit; a re-implementation:
    0.01, as here; CompRess, a similar method: 0.04 for both networks. Try 0.01 to 0.1, and watch
    `self_prob`, the weight that p_t leaves to the image itself.

    How low does it get? It starts near log(1 + K), 11.1 for K = 65,536, and is at least H(p_t), the
    entropy of p_t; KL = loss - H(p_t) is the student's part. KL does not reach 0 either, because
    tau_s > tau_t makes p_s flatter than p_t. At the defaults p_t is nearly one-hot, and a copy of
    the teacher (z_s = z_t) has a KL of -log p_s[0] = log(1 + K e^-5 E[e^(5 cos)]), where 5 is
    1 / tau_s and cos its similarity to an entry: 6.2 nats for a random queue, more for a real one.
    So compare a run with `loss_of_a_copy` in `seed_diagnostics`.

    Args: z_s: float [B, D], the student's embeddings, which alone get a gradient (with respect to
        the student's logits it is (p_s - p_t) / B); z_t: float [B, D], the teacher's, of the same
        views; queue: float [K, D], its earlier embeddings, without this batch's; all rows of length
        1; tau_s, tau_t: temperatures above 0.
    Returns: scalar float32, also under autocast. Raises: ValueError as `similarity_logits`.

    >>> z = torch.tensor([[1., 0.]])
    >>> queue = torch.tensor([[0., 1.], [-1., 0.]])                 # similarities to z: 1, 0, -1
    >>> round(seed_loss(z, z, queue, tau_s=1., tau_t=1.).item(), 4)    # p_t = p_s: .665, .245, .090
    0.8324
    >>> round(seed_loss(-z, z, queue, tau_s=1., tau_t=1.).item(), 3)   # p_s: .090, .245, .665
    1.983
    """
    z_t = z_t.detach()
    queue = queue.detach()
    p_t = similarity_logits(z_t, z_t, queue, tau_t).softmax(dim=1)             # [B, 1+K]
    log_p_s = similarity_logits(z_s, z_t, queue, tau_s).log_softmax(dim=1)     # [B, 1+K]
    return -(p_t * log_p_s).sum(dim=1).mean()


def info_nce(query, key, queue, tau=0.2):
    """MoCo's contrastive loss, the limit of `seed_loss` as tau_t -> 0: find your own key.

    Args: query, key: float [B, D], from two views of the same images; only `query` gets a gradient;
        queue: float [K, D], keys of other images; all rows of length 1; tau: above 0.
    Returns: scalar float32. Raises: ValueError as `similarity_logits`."""
    logits = similarity_logits(query, key.detach(), queue.detach(), tau)       # [B, 1+K]
    column = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # [B]
    return F.cross_entropy(logits, column)


@torch.no_grad()
def seed_diagnostics(z_s, z_t, queue, tau_s=0.2, tau_t=0.01):
    """What tells whether a run is all right: a dict of scalar tensors. Arguments as `seed_loss`.

    kl: loss - entropy, in nats: the part that depends on the student.
    entropy: H(p_t) in nats; p_t is spread over about e^entropy entries.
    loss_of_a_copy: the loss if z_s = z_t: a yardstick. (A good student may come out below it: where
        tau_s > tau_t, z_t is not quite the minimum.)
    self_prob: p_t's weight on the image's own entry; near 1, it is contrastive learning.
    top1_agreement: share of images whose own entry is the most similar to the student, as it always
        is to the teacher."""
    loss = seed_loss(z_s, z_t, queue, tau_s, tau_t)
    loss_of_a_copy = seed_loss(z_t, z_t, queue, tau_s, tau_t)
    p_t = similarity_logits(z_t, z_t, queue, tau_t).softmax(dim=1)             # [B, 1+K]
    logits_s = similarity_logits(z_s, z_t, queue, tau_s)                       # [B, 1+K]
    entropy = torch.special.entr(p_t).sum(dim=1).mean()
    agreement = (logits_s.argmax(dim=1) == 0).float().mean()
    return dict(kl=loss - entropy, entropy=entropy, loss_of_a_copy=loss_of_a_copy,
                self_prob=p_t[:, 0].mean(), top1_agreement=agreement)


# ------------------------------------------------------------------------------------ 2. the queue
def rank_and_world_size():
    """Number of this process, and R, the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def concat_all_gather(x):
    """x [B, ...] of each process -> [R*B, ...], without gradient. Process r holds images r, r+R,
    ... of the global batch, so the parts are interleaved: in the order of a single process."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return x
    parts = [torch.empty_like(x.contiguous()) for _ in range(world_size)]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)                      # [B, R, ...] -> [R*B, ...]


class FeatureQueue(nn.Module):
    """The last `size` embeddings, first in, first out (authors' code: K = 65,536).

    Why embeddings of the teacher? It is frozen, so an entry never goes stale, and the queue may be
    long. The student's own would be those of an earlier, worse student. (MoCo, which has no frozen
    network, needs its slowly moving key encoder for that reason.)

    Why does it start with random unit vectors? The first step needs K entries, and no real ones are
    there yet; within K/(R*B) steps they replace the random ones. A random vector is unlike every
    image and easy to tell from it, a real one is not: the loss may *rise* until the queue is full.

    Buffers: features: float32 [size, dim], rows of length 1; seen: int64, embeddings ever enqueued.
    Raises: ValueError for a size or dim below 1 and for embeddings of another width."""

    def __init__(self, size, dim):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs a size and dim of at least 1, got {size} and {dim}")
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))      # [K, D]
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, z):
        """Replace the oldest entries by z [B, D] of all processes; any B, also above K."""
        size, dim = self.features.shape
        if z.ndim != 2 or z.shape[1] != dim:
            raise ValueError(f"the queue holds embeddings [B, {dim}], got {list(z.shape)}")
        z = concat_all_gather(z.float())                                # [R*B, D]
        slots = (self.seen + torch.arange(len(z), device=z.device)) % size     # [R*B], wraps around
        self.features[slots[-size:]] = z[-size:]                        # if R*B > K, the last K
        self.seen += len(z)

    @property
    def filled(self):
        """Share of entries that are real embeddings by now: scalar tensor in [0, 1]."""
        return (self.seen / len(self.features)).clamp(max=1)


# ---------------------------------------------------------------------------------- 3. the methods
# SEED, the baseline that it beats, and the upper bound: three modules, one training step for all:
#
#     targets = method.targets(views, labels)        what to match; no gradient
#     outputs = method(views)                        what the network in training says
#     loss = method.loss(outputs, targets)
#     optimizer.zero_grad()
#     loss.backward()
#     optimizer.step()
#     method.after_step(targets)                     only now the queue moves on
#
# views: a list of `views_per_image` tensors [B, 3, S, S]; labels: int64 [B], or None.
# `method.diagnostics(outputs, targets)` gives scalars for the log; call it before `after_step`.
#
#     teacher = load_teacher("teacher.pt")
#     student = Encoder("mobilenet_v3_large", dim=teacher.dim)
#     method = SEED(student, teacher)
class SEED(nn.Module):
    """Self-supervised distillation: the student learns the teacher's similarity distributions.

    Args: student: the network to train; teacher: a trained one, frozen here. Either may be any
        module with an attribute `dim` (D) that turns a view into embeddings [B, D], rows of length
        1; see `TinyNetwork` below. queue_size: K; tau_s, tau_t: the temperatures of `seed_loss`.
        symmetric: take two views; the student's embedding of each is compared with the teacher's of
        the other (the re-implementation's; a point better there). small_crops: number of further
        views, last in the list, each a small part of the image. They cost little, and must be
        recognized by a detail. A part is unlike any whole image, so they have their own queue.
    Raises: ValueError if `dim` is missing or not the same for both; the first `loss` raises it for
        embeddings of another shape or length."""

    def __init__(self, student, teacher, queue_size=65536, tau_s=0.2, tau_t=0.01, symmetric=False,
                 small_crops=0):
        super().__init__()
        dim_s, dim_t = [getattr(network, "dim", None) for network in (student, teacher)]
        if dim_s is None or dim_s != dim_t:
            raise ValueError(f"student.dim is {dim_s} and teacher.dim is {dim_t}; both need a dim, "
                             "the width of their embeddings, and it must be the same")
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.queue = FeatureQueue(queue_size, teacher.dim)
        self.small_queue = FeatureQueue(queue_size, teacher.dim) if small_crops else None
        self.tau_s = tau_s
        self.tau_t = tau_t
        self.large_views = 2 if symmetric else 1
        self.views_per_image = self.large_views + small_crops
        self.embeddings_checked = False
        self.train()                                                    # the teacher: eval mode

    def train(self, mode=True):
        """Put the student in training mode; the teacher stays in evaluation mode.

        Else its batch norm would drift with our data. In evaluation mode z_t depends on its view
        alone. So the student cannot read it off the statistics of the batch, and nothing has to be
        shuffled between GPUs (MoCo has to)."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, views, labels=None):
        """The teacher's embeddings z_t of V views, [V*B, D]; labels are not looked at."""
        return embed(self.teacher, views)

    def forward(self, views):
        """The student's embeddings z_s of the same views, [V*B, D]."""
        return embed(self.student, views)

    def loss(self, z_s, z_t):
        """The loss of the batch, scalar float32; the queues are not changed."""
        if not self.embeddings_checked:
            check_embeddings("student", z_s, self.student.dim)
            check_embeddings("teacher", z_t, self.teacher.dim)
            self.embeddings_checked = True
        loss = seed_loss(*self.large(z_s, z_t), self.queue.features, self.tau_s, self.tau_t)
        if self.small_queue is not None:
            loss = loss + self.small_loss(z_s, z_t)
        return loss

    def large(self, z_s, z_t):
        """z_s and z_t of the large views; of two views, those of the teacher change places."""
        n = len(z_t) * self.large_views // self.views_per_image
        return z_s[:n], torch.cat(z_t[:n].chunk(self.large_views)[::-1])

    def small_loss(self, z_s, z_t):
        """The mean over all small crops of the batch, each compared with its own z_t."""
        n = len(z_t) * self.large_views // self.views_per_image
        return seed_loss(z_s[n:], z_t[n:], self.small_queue.features, self.tau_s, self.tau_t)

    @torch.no_grad()
    def diagnostics(self, z_s, z_t):
        """See `seed_diagnostics`, for the large views; small_loss; how far the queue is filled."""
        values = seed_diagnostics(*self.large(z_s, z_t), self.queue.features, self.tau_s,
                                  self.tau_t)
        if self.large_views > 1:                            # a copy's views change places, too
            values["loss_of_a_copy"] = seed_loss(*self.large(z_t, z_t), self.queue.features,
                                                 self.tau_s, self.tau_t)
        if self.small_queue is not None:
            values["small_loss"] = self.small_loss(z_s, z_t)
        return dict(values, queue_filled=self.queue.filled)

    def after_step(self, z_t):
        """Enqueue z_t; after `backward`, which still needs the old entries (autograd would stop:
        "modified by an inplace operation"). Before `loss`, z_t would be among the entries twice.
        Of several views only the first large and the first small one enter."""
        by_view = z_t.chunk(self.views_per_image)                       # V times [B, D]
        self.queue.enqueue(by_view[0])
        if self.small_queue is not None:
            self.small_queue.enqueue(by_view[self.large_views])


def embed(network, views):
    """Embeddings [V*B, D], view by view; neighbors of one size pass the network together."""
    z = []
    for _, same_size in itertools.groupby(views, key=lambda view: view.shape):
        z.append(network(torch.cat(list(same_size))))
    return torch.cat(z)


def check_embeddings(name, z, dim):
    """Raise ValueError unless z is [B, dim] with rows of length 1."""
    if z.ndim != 2 or z.shape[1] != dim:
        raise ValueError(f"the {name} must return embeddings [B, {dim}], got {list(z.shape)}")
    if not ((z.float().norm(dim=1) - 1).abs() < 1e-3).all():
        raise ValueError(f"the {name}'s embeddings must have length 1 (to 0.001): let its forward "
                         "end with F.normalize(z.float(), dim=1)")


class SplitBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that sees `splits` separate parts of a batch, as if each had its own GPU."""

    def __init__(self, bn, splits):
        # Each part updates the running statistics; together that shall count as one step.
        super().__init__(bn.num_features, bn.eps, 1 - (1 - bn.momentum) ** (1 / splits))
        self.load_state_dict(bn.state_dict())
        self.to(bn.running_mean)                                        # the same device
        self.splits = splits

    def forward(self, x):
        splits = min(self.splits, max(1, len(x) // 2))                  # two images a part
        parts = x.tensor_split(splits) if self.training else [x]
        return torch.cat([nn.BatchNorm2d.forward(self, part) for part in parts])


class MoCo(nn.Module):
    """MoCo-v2 (He et al.; Chen et al., 2020): the baseline, and a way to a teacher without labels.

    From one view of an image, the encoder learns to recognize the image's key among K earlier keys.
    A slowly moving copy of it makes the keys, from another view. Batch norm would let it cheat:
    normalized over the same images, query and key share a fingerprint. So keys are shuffled over
    the processes, and batch norm works on separate parts of a process's batch.

    Args: encoder: the network to train, as SEED's student; its BatchNorm2d are replaced in place;
        queue_size: K; momentum: of the key encoder; tau: temperature; bn_splits: parts of a
        process's batch (MoCo's CIFAR demonstration: 8, in place of 8 GPUs)."""
    views_per_image = 2

    def __init__(self, encoder, queue_size=65536, momentum=0.999, tau=0.2, bn_splits=8):
        super().__init__()
        for name, module in list(encoder.named_modules()):
            if type(module) is nn.BatchNorm2d:
                encoder.set_submodule(name, SplitBatchNorm2d(module, bn_splits))
        self.encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, encoder.dim)
        self.momentum = momentum
        self.tau = tau

    @torch.no_grad()
    def targets(self, views, labels=None):
        """Keys [B, D] of the second views, each computed among other images than its query."""
        rank, world_size = rank_and_world_size()
        everyone = concat_all_gather(views[1])                          # [R*B, 3, S, S]
        order = torch.randperm(len(everyone), device=everyone.device)   # [R*B]
        if world_size > 1:
            dist.broadcast(order, src=0)
        keys = self.key_encoder(everyone[order[rank::world_size]])      # [B, D]
        keys = concat_all_gather(keys)                                  # [R*B, D], shuffled
        return keys[order.argsort()][rank::world_size]                  # [B, D], order undone

    def forward(self, views):
        return self.encoder(views[0])                                   # queries [B, D]

    def loss(self, query, key):
        return info_nce(query, key, self.queue.features, self.tau)

    @torch.no_grad()
    def diagnostics(self, query, key):
        """top1_agreement: share of queries most similar to their own key; queue_filled."""
        logits = similarity_logits(query, key, self.queue.features, self.tau)     # [B, 1+K]
        agreement = (logits.argmax(dim=1) == 0).float().mean()
        return dict(top1_agreement=agreement, queue_filled=self.queue.filled)

    @torch.no_grad()
    def after_step(self, key):
        """Enqueue the keys, then let the key encoder follow: k <- m k + (1 - m) q."""
        self.queue.enqueue(key)
        for k, q in zip(self.key_encoder.parameters(), self.encoder.parameters()):
            k.lerp_(q, 1 - self.momentum)


class Supervised(nn.Module):
    """Training with labels, the upper bound: softmax over z . w_c / tau, one vector w_c a class.

    The loss goes through the projection head, so a network trained here has a head fit to be
    distilled; the w_c have length 1, so that angles count, as they do in the queue.
    Args: encoder: the network to train, as SEED's student; classes: C; tau: temperature."""
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

    def diagnostics(self, logits, labels):
        """top1_agreement: accuracy on the batch."""
        return dict(top1_agreement=(logits.argmax(dim=1) == labels).float().mean())

    def after_step(self, labels):
        """Nothing moves but the weights."""


# ------------------------------------------------------------------------------------- 4. encoders
class Encoder(nn.Module):
    """A torchvision classification network with a projection head in place of its last Linear.

    The head is the authors': Linear, ReLU, Linear, then L2 normalization; input and hidden layer as
    wide as the replaced layer's input, which is 512 for ResNet-18, 1280 for MobileNet-V3-Large.

    Args: arch: name of a torchvision classification network, such as "mobilenet_v3_large"; or
        "resnet50w2" (or w3 to w9): all of a ResNet's widths twice as large, as in SwAV.
        dim: D, width of the embeddings; None: no head, the embedding is the normalized features.
        hidden_dim: width of the head's hidden layer; None: that of the features; 0: no such layer.
        small_images: keep the resolution at first, see `adapt_stem_for_small_images`.
        image_size: S, side of the views in pixels, which the network must accept.
        backbone: a module of your own in place of torchvision's, images [B, 3, S, S] -> [B, F].
    Attributes: feature_dim: width of the features; provenance: a line on how it was trained;
        used_labels: whether labels took part, None if unknown; multi_crop: whether its file has
        prototypes, as that of SwAV, which was trained with small crops.
    Raises: InputError for an unknown name, or a network that cannot be an encoder at this size."""

    def __init__(self, arch, dim=128, hidden_dim=None, small_images=False, image_size=224,
                 backbone=None):
        super().__init__()
        self.arch = arch
        self.small_images = small_images
        self.provenance = f"{arch}, random weights"
        self.used_labels = False
        self.multi_crop = False
        self.last_layer = None
        self.backbone = self.torchvision_backbone() if backbone is None else backbone
        if small_images:
            adapt_stem_for_small_images(self.backbone, arch)
        self.check_image_size(image_size)
        self.set_head(dim, hidden_dim)

    def torchvision_backbone(self):
        """The network `arch` without its last Linear."""
        widened = re.fullmatch(r"(resnet\d+)w([2-9])", str(self.arch))
        name = widened[1] if widened else self.arch
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, cutoff=0)
            raise InputError(f"unknown network '{name}'; did you mean {', '.join(near)}?")
        network = torchvision.models.get_model(name, weights=None)
        if widened:
            widen(network, int(widened[2]))
        linears = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise InputError(f"{name} has no Linear layer to replace; choose another network")
        self.last_layer = linears[-1]                                   # "fc", "classifier.3", ...
        self.feature_dim = network.get_submodule(self.last_layer).in_features
        network.set_submodule(self.last_layer, nn.Identity())
        return network

    def set_head(self, dim, hidden_dim=None):
        """Put a new projection head in place; for the widths see the class."""
        self.dim = self.feature_dim if dim is None else dim
        self.hidden_dim = hidden_dim
        hidden = hidden_dim or self.feature_dim
        if dim is None:
            self.head = nn.Identity()
        elif hidden_dim == 0:
            self.head = nn.Linear(self.feature_dim, dim)
        else:
            self.head = nn.Sequential(nn.Linear(self.feature_dim, hidden), nn.ReLU(inplace=True),
                                      nn.Linear(hidden, dim))

    def check_image_size(self, image_size):
        """Remember the size; InputError unless images of it pass. (Of torchvision's networks the
        shapes alone are computed, on the device "meta"; one of your own runs once, which also tells
        its `feature_dim`.)"""
        device = "meta" if self.last_layer else "cpu"
        network = copy.deepcopy(self.backbone).to(device).train(device == "meta")
        problem = "it returns more than one vector an image"
        try:
            with torch.no_grad():
                out = network(torch.zeros(2, 3, image_size, image_size, device=device))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and len(out) == 2:
                self.feature_dim = out.shape[1]
                self.image_size = image_size
                return
        except Exception as e:                                          # whatever a network raises
            problem = first_line(e)
        raise InputError(f"{self.arch} cannot be an encoder at {image_size} px: {problem}; choose "
                         "another network or image size")

    def start_from(self, other):
        """Take over the weights of an Encoder of the same network; its head, too, if it fits."""
        try:
            self.backbone.load_state_dict(other.backbone.state_dict())
        except RuntimeError as e:
            raise InputError(f"{other.provenance} does not fit: {first_line(e)}") from None
        if str(self.head) == str(other.head):                           # the same layers
            self.head.load_state_dict(other.head.state_dict())
        self.provenance = other.provenance
        self.used_labels = other.used_labels

    def features(self, x):
        """x float [B, 3, S, S], normalized -> [B, feature_dim], for kNN and linear probes."""
        return self.backbone(x)

    def forward(self, x):
        """x float [B, 3, S, S], normalized -> embeddings z, float32 [B, D], rows of length 1."""
        return F.normalize(self.head(self.features(x)).float(), dim=1)


def widen(resnet, factor):
    """Multiply all widths of a ResNet (torchvision's wide ones: only those inside the blocks)."""
    for name, m in list(resnet.named_modules()):
        if isinstance(m, nn.Conv2d):
            inputs = 3 if m.in_channels == 3 else factor * m.in_channels
            outputs = factor * m.out_channels
            wide = nn.Conv2d(inputs, outputs, m.kernel_size, m.stride, m.padding, bias=False)
            nn.init.kaiming_normal_(wide.weight, mode="fan_out")        # as torchvision does
        elif isinstance(m, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(factor * m.num_features)
        elif isinstance(m, nn.Linear):
            wide = nn.Linear(factor * m.in_features, m.out_features)
        else:
            continue
        resnet.set_submodule(name, wide)


def adapt_stem_for_small_images(backbone, arch):
    """Give the first convolution stride 1; a 7x7 becomes a 3x3, and loses the max-pool behind it.
    Usual on CIFAR: ImageNet's first layers would shrink 32 px to 8 before the first block."""
    name, conv = next((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
    if conv.stride != (2, 2):
        raise InputError(f"{arch} cannot be adapted to small images: the stride of its first "
                         f"convolution is {conv.stride[0]}, not 2; leave small_images off "
                         "(--no-small-images)")
    conv.stride = (1, 1)
    if conv.kernel_size == (7, 7):
        bias = conv.bias is not None
        backbone.set_submodule(name, nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=bias))
        pool = next(n for n, m in backbone.named_modules() if isinstance(m, nn.MaxPool2d))
        backbone.set_submodule(pool, nn.Identity())


# ---------------------------------------------------------------------------------- 5. checkpoints
# With strict=False a teacher may stay random without a word. Here each key finds its place and each
# place its key, or it is an error. Files are read with weights_only=True: they cannot run code.
#
# Published files differ in the names around the weights. One rule serves them all: the backbone
# stands under whatever prefix has all of its keys; numbered layers beside it are the head; what is
# neither must be a known leftover of training.
EVALUATED = (".encoder_q.", ".base_encoder.", ".student.", ".teacher.backbone.",
             ".encoder.backbone.", ".backbone.", "")    # which to take of several networks
LEFTOVERS = ("encoder_k", "key_encoder", "momentum", "queue", "prototypes", "predict", "optimizer",
             "class_vectors", "memory_bank", "head.mlp.", "last_layer.", "dino_loss", "callbacks.")
RESNET_KEYS = ("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight")
RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3",
                   "7": "layer4"}
HARMLESS = [argparse.Namespace, codecs.encode, np.ndarray, np.dtype, scalar, _reconstruct,
            (scalar, "numpy.core.multiarray.scalar"),   # these two: NumPy 1's names
            (_reconstruct, "numpy.core.multiarray._reconstruct"),
            *[type(np.dtype(letter)) for letter in "?bhilqBHILQefd"]]


@contextlib.contextmanager
def replace_file(path):
    """A binary file to write, which becomes `path` once it is whole and on the disk: a kill or a
    loss of power at any moment leaves the old one or the new one. OSError if there is no room."""
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
        room = shutil.disk_usage(folder).free
        raise OSError(f"cannot write {path}: {first_line(e)}; {room:,} bytes are free") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_file(path, content):
    """torch.save by way of `replace_file`."""
    with replace_file(path) as file:
        torch.save(content, file)


def describe(encoder, provenance, used_labels):
    """What `load_teacher` has to know of an Encoder beside its weights: a dict."""
    file = dict(format="seed-encoder", provenance=provenance, used_labels=used_labels,
                dim=None if isinstance(encoder.head, nn.Identity) else encoder.dim,
                mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for name in ("arch", "hidden_dim", "small_images", "image_size"):
        file[name] = getattr(encoder, name)
    return file


def save_encoder(path, encoder, provenance, used_labels):
    """Write what a user takes away: the backbone under torchvision's key names, and the head.

    Args: path: of the file; encoder: Encoder; provenance, used_labels: as Encoder's attributes."""
    file = describe(encoder, provenance, used_labels)
    for part in ("backbone", "head"):
        weights = getattr(encoder, part).state_dict()
        file[part] = {name: value.cpu().contiguous() for name, value in weights.items()}
    save_file(path, file)


def load_teacher(path_or_url, arch=None):
    """A trained Encoder, frozen, in evaluation mode.

    Its head is the one in the file; a layer that scores classes is dropped. Without a head (or with
    DINO's, which has other activations) the embedding is the features.

    Args: path_or_url: a file, or an http(s) address (kept in torch's hub folder); or hub:REPO:ENTRY
        for torch.hub, where REPO may be a directory: this runs that repository's code.
        arch: name of the network, if neither the file nor its shapes (a ResNet's do) say it.
    Returns: Encoder; its `provenance` says what it is. `used_labels`, if the file does not say, is
        False with a head (such heads learn without labels), else None.
    Raises: InputError for a file that is missing, broken, unknown, or does not fit the network."""
    path = str(path_or_url)
    if path.startswith("hub:"):
        return load_from_hub(path)
    file = read_checkpoint(path)
    tensors = name_children(flatten(file))
    if arch is None:
        said = file.get("arch", getattr(file.get("args"), "arch", None))
        arch = said if str(said) in torchvision.models.list_models() else None
    prefix, others = find_backbone(tensors, arch, path)
    stem = tensors.get(f"{prefix}conv1.weight", torch.empty(0))         # a ResNet's
    arch = arch or resnet_name(tensors, prefix, path)
    if re.fullmatch(r"resnet\d+", arch) and stem.ndim == 4 and len(stem) > 64:
        arch = f"{arch}w{len(stem) // 64}"
    is_ours = str(file.get("format")) == "seed-encoder"
    try:
        options = [None, None, stem.shape[2:] == (3, 3)]
        if is_ours:
            options = [file[name] for name in ("dim", "hidden_dim", "small_images", "image_size")]
        teacher = Encoder(arch, *options)
    except (KeyError, RuntimeError, TypeError):
        raise InputError(f"{path} is not a whole encoder.pt; make it anew") from None
    backbone, head, head_name = sort_weights(tensors, prefix, others, teacher, path)
    fill(teacher, backbone, head, path)
    total = len(teacher.backbone.state_dict())                          # all are there by now
    known = f"head '{head_name}', {teacher.dim} wide" if head else "no projection head"
    made = file.get("provenance", file.get("made", f"weights under '{prefix}', {known}"))
    teacher.provenance = f"{arch}, {made}, matched {total}/{total} backbone keys"
    labels = False if head and not is_ours else None
    teacher.used_labels = file.get("used_labels", file.get("labels_seen", labels))
    teacher.multi_crop = any("prototypes" in name for name in tensors)
    return teacher.eval().requires_grad_(False)


def load_from_hub(name):
    """The Encoder hub:REPO:ENTRY; its features, normalized, are the embedding."""
    repo, _, entry = name.removeprefix("hub:").rpartition(":")
    source = "local" if os.path.isdir(repo) else "github"
    try:
        backbone, again = [torch.hub.load(repo, entry, source=source, trust_repo="check")
                           for _ in range(2)]
        encoder = Encoder(name, None, backbone=backbone)
        for weights, others in zip(backbone.parameters(), again.parameters()):
            if not torch.equal(weights, others):
                raise ValueError("some of its layers have random weights; take the file of weights")
    except (Exception, SystemExit) as e:                                # it is other people's code
        raise InputError(f"cannot load {name}: {first_line(e)}") from None
    encoder.provenance = f"{name}, no projection head"
    encoder.used_labels = None
    return encoder.eval().requires_grad_(False)


def flatten(value, name=""):
    """All tensors in nested dicts, by their dotted names."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    for key, inner in value.items() if isinstance(value, dict) else ():
        found.update(flatten(inner, f"{name}.{key}" if name else str(key)))
    return found


def name_children(tensors):
    """Undo the numbers that nn.Sequential(*resnet.children()), lightly's way, gives the layers."""
    block = "4.0.conv1.weight"
    prefixes = [name.removesuffix(block) for name in tensors if f".{name}".endswith(f".{block}")]
    renamed = {}
    for name, value in tensors.items():
        for prefix in prefixes:
            child, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and child in RESNET_CHILDREN:
                name = f"{prefix}{RESNET_CHILDREN[child]}.{rest}"
        renamed[name] = value
    return renamed


def resnet_name(tensors, prefix, path):
    """The ResNet of these weights; its number counts the convolutions and the class layer."""
    convolution = re.compile(re.escape(prefix) + r"layer.*conv[123]\.weight")
    name = f"resnet{2 + len([key for key in tensors if convolution.fullmatch(key)])}"
    if name not in torchvision.models.list_models():
        raise InputError(f"{path} holds a ResNet that torchvision does not know, or not all of "
                         "one; --teacher-arch NAME tells what is missing")
    return name


def find_backbone(tensors, arch, path):
    """The prefix under which all keys of the network stand; and those of other such networks."""
    keys = RESNET_KEYS
    if arch:
        with torch.device("meta"):
            keys = list(Encoder(arch, dim=None).backbone.state_dict())
        keys = [key for key in keys if "num_batches_tracked" not in key]    # old files lack it
    counts = Counter()
    for key in keys:
        counts.update(name.removesuffix(key) for name in tensors if name.endswith(key))
    whole = [prefix for prefix in counts if counts[prefix] == len(keys)]
    for end in EVALUATED:
        chosen = [prefix for prefix in whole if f".{prefix}".endswith(end)]
        if len(chosen) == 1:
            return chosen[0], tuple(prefix for prefix in whole if prefix not in ("", chosen[0]))
    if whole:
        raise InputError(f"{path} holds several networks, under {whole}; keep one of them")
    held = ", ".join(list(tensors)[:3]) or "no tensors"
    if arch is None:
        raise InputError(f"{path} does not say which network it is, and holds no whole ResNet but "
                         f"{held}; name the network (--teacher-arch)")
    prefix = max(counts, key=counts.get, default="")
    missing = ", ".join([key for key in keys if prefix + key not in tensors][:3])
    raise InputError(f"{path} does not fit torchvision's {arch}: {counts[prefix]} of {len(keys)} "
                     f"keys are there, under '{prefix}', without {missing}; it holds {held}")


def sort_weights(tensors, prefix, others, teacher, path):
    """The backbone's weights, the head's, and what the file calls the head.

    Of "module.backbone.conv1.weight" and "module.projector.0.weight" the prefix is
    "module.backbone."; so the head is looked for beside it, under "module.", and found as
    "module.projector.". Barlow Twins' loss keeps a batch norm there, too: "module.bn."."""
    ends = "weight|bias|running_mean|running_var|num_batches_tracked"
    layer = re.compile(rf"(|.*?\.)(\d+\.)?({ends})")         # group, number in it, what
    own = teacher.backbone.state_dict()
    children = dict(teacher.backbone.named_children())
    class_layer = f"{prefix}{teacher.last_layer}."
    beside = prefix[:prefix.rstrip(".").rfind(".") + 1]                 # without its last word
    backbone = {}
    heads = {}
    unknown = []
    for name, value in tensors.items():
        key = name.removeprefix(prefix)
        group = layer.fullmatch(name)
        is_inside = name.startswith(prefix) and key.split(".")[0] in children
        is_child = is_inside and not name.startswith(class_layer)
        if name.startswith(prefix) and key in own:
            backbone[key] = value
        elif name.startswith((*others, f"{beside}bn.")) or any(w in name for w in LEFTOVERS):
            continue
        elif group and group[1].startswith(beside) and not is_child:
            heads.setdefault(group[1], {})[name.removeprefix(group[1])] = value
        else:
            unknown.append(name)
    for group, head in list(heads.items()):             # one layer scores classes, but MoCo v1's
        shapes = [value.shape[1:] for value in head.values() if value.ndim > 1]
        is_projection = "proj" in group or "encoder_q" in prefix or teacher.hidden_dim == 0
        if shapes == [(teacher.feature_dim,)] and not is_projection:
            del heads[group]
    if unknown or len(heads) > 1:
        names = ", ".join((unknown or list(heads))[:3])
        raise InputError(f"{path} has weights that are no part of torchvision's {teacher.arch} or "
                         f"its head, such as {names}; keep the others alone")
    head_name, head = heads.popitem() if heads else ("", {})
    return backbone, head, head_name


def rebuild_head(weights, width):
    """A projection head of weights "0.weight", "1.running_mean", ...: Linear, or BatchNorm1d where
    running statistics are; a missing number is a ReLU. (A Linear alone has no number.)"""
    numbers = sorted({int(name.split(".")[0]) for name in weights if name[0].isdigit()})
    if not numbers:
        layer = nn.Linear(width, len(weights.get("weight", ())))
        return layer, layer.out_features
    has_norm = any("running_mean" in name for name in weights)  # then biases may be left out
    head = nn.Sequential()
    previous = numbers[0] - 1
    for number in numbers:
        if number == previous + 2:
            head.add_module(str(number - 1), nn.ReLU(inplace=True))
        elif number > previous + 2:
            raise ValueError(f"its head does not say what follows layer {previous}")
        if f"{number}.running_mean" in weights:
            layer = nn.BatchNorm1d(width, affine=f"{number}.weight" in weights)
        else:
            bias = f"{number}.bias" in weights or not has_norm
            layer = nn.Linear(width, len(weights.get(f"{number}.weight", ())), bias)
            width = layer.out_features
        head.add_module(str(number), layer)
        previous = number
    return head, width


def fill(teacher, backbone, head, path):
    """Load all weights; InputError for what does not fit."""
    weights = {f"backbone.{name}": value for name, value in backbone.items()}
    weights.update({f"head.{name}": value for name, value in head.items()})
    try:
        if head:
            teacher.head, teacher.dim = rebuild_head(head, teacher.feature_dim)
            if isinstance(teacher.head, nn.Linear):
                teacher.hidden_dim = 0
        own = teacher.state_dict()
        for name, value in weights.items():
            if name in own and value.is_floating_point() != own[name].is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, not {own[name].dtype}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} has numbers that are not finite")
            if name.endswith("running_var") and (value < 0).any():
                raise ValueError(f"{name} has numbers below 0, which no variance is")
        for name in list(own):
            if "num_batches_tracked" not in name:                       # which old files lack
                del own[name]
        own.update(weights)                     # a plain dict would lack the versions of modules
        teacher.load_state_dict(own)
    except (RuntimeError, TypeError, ValueError) as e:      # a line for each kind of misfit
        lines = str(e).split("\n\t")
        problems = "; ".join(line[:120] for line in lines[1:4] or lines)
        raise InputError(f"{path} does not fit a {teacher.arch}: {problems}") from None


def read_checkpoint(path_or_url):
    """The dict in a file or behind an address; InputError if there is none."""
    path = str(path_or_url)
    try:
        if path.startswith(("http://", "https://")):
            path = download(path)
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged:                                         # torch.load does not look at checksums
            raise ValueError(f"{damaged} in it is damaged")
        with torch.serialization.safe_globals(HARMLESS):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as e:                                  # a broken zip, code inside, no network
        reason = why_unreadable(path, e)
        if path != str(path_or_url):
            os.remove(path)                                 # else it would be found again
        raise InputError(f"cannot read {path}: {reason}") from None
    if not isinstance(file, dict):
        raise InputError(f"{path} is not a checkpoint: expected a dict of weights")
    return file


def download(url):
    """The file behind an address, kept in torch's hub folder."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]   # addresses may share their last part
    path = os.path.join(folder, f"{digest}-{os.path.basename(url)}")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path)
    return path


def why_unreadable(path, error):
    """What torch.load means, in a line."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it holds a {code[1]}, which could run code; save the weights alone"
    start = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            start = file.read(100).lstrip()
    if start.startswith(b"<"):
        return "it is a web page; download the file again"
    if start.startswith(b"version https://git-lfs"):
        return "it only points to a file; fetch that with git lfs pull"
    reason = first_line(error)
    if "only load" in reason or not isinstance(error, (OSError, RuntimeError, ValueError)):
        return "torch.save did not write it, or not all of it"
    return reason


def first_line(error):
    """The first line of an exception's text; its type if it has none."""
    return str(error).split("\n")[0] or type(error).__name__


# ---------------------------------------------------------------------------------------- 6. views
# torchvision's transforms draw from a generator, one image at a time. Here all that is random about
# a view is a row of U numbers computed from (seed, epoch, sample, view). So a view depends on these
# four alone, not on workers, processes or interruptions; `augment` makes a batch of them at once.
AREA = slice(0, 10)                                                     # ten tries, see `crop_box`
RATIO = slice(10, 20)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA = range(20, 31)
UNIFORMS = 31                                                           # U

FLIP_P, JITTER_P, GRAY_P, BLUR_P = 0.5, 0.8, 0.2, 0.5                   # MoCo-v2's, which SEED uses
JITTER_STRENGTH, HUE_STRENGTH = 0.4, 0.1
MIN_SIGMA, MAX_SIGMA, BLUR_RADIUS = 0.1, 2.0, 6                         # pixels
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x):
    """Mix the bits of uint64 numbers until each looks random (Steele et al., 2014). A generator of
    NumPy's for each view would do, too, but it takes 50 times as long."""
    x = x + GOLDEN                                                      # wraps around, as it should
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed, epoch, index, view=0):
    """Float32 [B, U] in [0, 1): row b depends on (seed, epoch, index[b], view) and nothing else.

    Args: seed, epoch, view: ints; index: B sample numbers (list, array or tensor of ints)."""
    key = np.zeros(1, np.uint64)                                        # an array: may wrap around
    for word in (seed, epoch, view):
        key = splitmix64(key ^ np.array([int(word) % 2**64], np.uint64))
    key = splitmix64(key ^ np.asarray(index, np.int64).astype(np.uint64).reshape(-1, 1))  # [B, 1]
    bits = splitmix64(key + np.arange(UNIFORMS, dtype=np.uint64) * GOLDEN)     # [B, U]
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def crop_box(u, height, width, scale=(0.2, 1.0)):
    """The random resized crop's box, float32 [B, 4] = top, left, height, width in pixels.

    As in torchvision: area uniform in `scale` (share of the image), log aspect ratio uniform in
    3/4 .. 4/3, position uniform; of ten tries the first that fits counts, else the largest box of
    such a ratio (centered in torchvision). u: [B, U]. (In NumPy: quickest for a single image.)"""
    u = u.numpy()
    area = (scale[0] + u[:, AREA] * (scale[1] - scale[0])) * float(height * width)    # [B, 10]
    ratio = np.exp((2 * u[:, RATIO] - 1) * math.log(4 / 3))             # [B, 10], width / height
    h = np.sqrt(area / ratio)                                           # [B, 10]
    w = np.sqrt(area * ratio)                                           # [B, 10]
    fits = (h <= height) & (w <= width)
    first = fits.argmax(axis=1)[:, None]                                # [B, 1]; 0 if none fits
    h = np.where(fits, h, min(height, width * 4 / 3))                   # [B, 10]
    w = np.where(fits, w, min(width, height * 4 / 3))                   # [B, 10]
    h = np.take_along_axis(h, first, axis=1)[:, 0]                      # [B]
    w = np.take_along_axis(w, first, axis=1)[:, 0]                      # [B]
    box = np.stack([u[:, TOP] * (height - h), u[:, LEFT] * (width - w), h, w], axis=1)    # [B, 4]
    return torch.from_numpy(box.astype(np.float32))


def resize_weights(start, length, source, size):
    """What each of `source` pixels adds to each of `size` pixels if [start, start + length) of the
    source is resized, bilinearly with antialiasing. start, length: [B] -> [B, size, source]."""
    step = (length / size)[:, None, None]                               # source pixels per target
    first = start[:, None, None]
    last = first + length[:, None, None]
    target = torch.arange(size, device=start.device)[:, None]           # [size, 1]
    pixel = torch.arange(source, device=start.device)                   # [source]
    distance = pixel + 0.5 - (first + (target + 0.5) * step)            # [B, size, source]
    weight = (1 - distance.abs() / step.clamp(min=1)).clamp(min=0)      # wider when shrinking
    weight = weight * ((pixel + 1 > first) & (pixel < last))            # nothing from outside
    return weight / weight.sum(dim=2, keepdim=True)


def crop_and_resize(images, box, size):
    """Cut box [B, 4] (see `crop_box`) out of images float [B, 3, H, W] -> [B, 3, size, size].
    Resizing is linear in rows and in columns: two matrix products, at once for all images."""
    top, left, height, width = box.unbind(1)
    rows = resize_weights(top, height, images.shape[2], size)           # [B, size, H]
    columns = resize_weights(left, width, images.shape[3], size)        # [B, size, W]
    return rows[:, None] @ (images @ columns[:, None].mT)


def adjust_hue(images, shift):
    """Turn the color circle by `shift` [B, 1, 1, 1] in -0.5 .. 0.5; images [B, 3, H, W] in [0, 1].

    Through HSV and back in one formula: red, green and blue (n = 5, 3, 1) are
    value - chroma * clip(min(k, 4 - k), 0, 1), k = (n + hue) mod 6, hue in sixths of the circle."""
    r, g, b = images.unbind(1)                                          # [B, H, W] each
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1)                        # gray: any hue will do
    hue = torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    hue = torch.where(value == r, (g - b) / divisor, hue) + 6 * shift[:, 0]    # [B, H, W]
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]     # [3, 1, 1]
    k = (n + hue[:, None]) % 6                                          # [B, 3, H, W]
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(images, sigma):
    """Blur images [B, 3, H, W], sides above 6, by sigma [B] pixels; borders are mirrored."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)    # [B, 13], a Gaussian
    kernel = kernel.repeat_interleave(3, dim=0)[:, None]                # [3B, 1, 13], by channel
    x = F.pad(images, [BLUR_RADIUS] * 4, mode="reflect")                # [B, 3, H+12, W+12]
    x = x.flatten(0, 1)[None]                                           # [1, 3B, H+12, W+12]
    x = F.conv2d(x, kernel[:, :, None], groups=len(kernel))             # [1, 3B, H+12, W]
    x = F.conv2d(x, kernel[:, :, :, None], groups=len(kernel))          # [1, 3B, H, W]
    return x.view_as(images)


def to_float(images):
    """uint8 0..255 -> float32 0..1; floats -> float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalize(images):
    """images uint8, or float in [0, 1], [B, 3, H, W] -> float32, (x - mean) / std by channel."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1).to(images.device, non_blocking=True)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1).to(images.device, non_blocking=True)
    return (to_float(images) - mean) / std


@torch.no_grad()
def augment(images, u, size=None, scale=(0.2, 1.0), blur=True, color=True):
    """MoCo-v2's random view, which SEED uses too, as a pure function: same numbers, same view.

    Crop, flip, jitter (brightness, contrast, saturation, hue), gray, blur; a batch at once. Call it
    outside autocast.

    Args: images: uint8 [B, 3, H, W], or float in [0, 1], on any device.
        u: float [B, U] from `uniforms`, on the CPU; size: S, side of the view in pixels, None: H.
        scale: share of the image that a crop covers; None: the images are crops already.
        blur: whether to blur (off for small images, as in MoCo's CIFAR demonstration).
        color: False: crop and flip alone, for training with labels.
    Returns: float32 [B, 3, S, S] (not cropped: [B, 3, H, W]), normalized. Raises: ValueError for
        shapes that do not fit."""
    if images.ndim != 4 or images.shape[1] != 3 or u.shape != (len(images), UNIFORMS):
        shapes = [list(x.shape) for x in (images, u)]
        raise ValueError(f"expected images [B, 3, H, W] and u [B, {UNIFORMS}], got {shapes}")
    if scale is None and size not in (None, images.shape[2]):
        raise ValueError(f"without a crop, images of {images.shape[2]} px cannot become {size} px")
    x = to_float(images)
    if scale is not None:
        box = crop_box(u, x.shape[2], x.shape[3], scale).to(x.device, non_blocking=True)
        x = crop_and_resize(x, box, size or x.shape[2])                 # [B, 3, S, S]
    # Found on the CPU: nonzero() on a GPU would make the program wait for it.
    blurred = (u[:, BLUR] < BLUR_P).nonzero()[:, 0].to(x.device, non_blocking=True)
    u = u.to(x.device, non_blocking=True)[:, :, None, None, None]       # u[:, FLIP]: [B, 1, 1, 1]
    x = torch.where(u[:, FLIP] < FLIP_P, x.flip(3), x)
    if not color:
        return normalize(x)

    jittered = (u[:, JITTER] < JITTER_P).float()                        # [B, 1, 1, 1], 0 or 1
    factors = 1 + JITTER_STRENGTH * jittered[:, None] * (2 * u[:, BRIGHTNESS:HUE] - 1)
    brightness, contrast, saturation = factors.unbind(1)                # 0.6 .. 1.4, or 1
    x = (x * brightness).clamp_(0, 1)
    mean_gray = rgb_to_grayscale(x).mean((2, 3), keepdim=True)          # [B, 1, 1, 1]
    x = torch.lerp(mean_gray, x, contrast).clamp_(0, 1)
    x = torch.lerp(rgb_to_grayscale(x), x, saturation).clamp_(0, 1)
    x = adjust_hue(x, HUE_STRENGTH * jittered * (2 * u[:, HUE] - 1))

    x = torch.where(u[:, GRAY] < GRAY_P, rgb_to_grayscale(x), x)
    if blur and len(blurred):
        sigma = MIN_SIGMA + (MAX_SIGMA - MIN_SIGMA) * u[blurred, SIGMA].flatten()
        x[blurred] = gaussian_blur(x[blurred], sigma)
    return normalize(x)


# ------------------------------------------------------------------------------------------- a toy
class TinyNetwork(nn.Module):
    """All that SEED asks of a network of your own: `dim`, and embeddings of length 1."""

    def __init__(self, hidden, inputs=32, dim=16):
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x):
        return F.normalize(self.layers(x).float(), dim=1)               # [B, inputs] -> [B, dim]


def toy():
    """Distil a random network into a smaller one, on noisy copies of 300 points."""
    torch.manual_seed(0)
    points = torch.randn(300, 32)
    teacher = TinyNetwork(hidden=256)
    student = TinyNetwork(hidden=64)
    method = SEED(student, teacher, queue_size=1024)                    # default temperatures
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
            found = method.diagnostics(z_s, z_t)
            values = "  ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"step {step:3d}  loss {loss:.2f}  {values}")
        method.after_step(z_t)
    print("\nThe loss comes down to about that of a copy of the teacher, not to 0: see seed_loss.")


if __name__ == "__main__":
    toy()
