"""What must be true of SEED. `pytest` runs the tests on the CPU, without network; those that are
slow, because they start processes or try hundreds of inputs, only as `pytest -m slow`.

Each test's name is a sentence; its docstring says what would go wrong in a real run if it failed.
Where possible, a test computes the same thing again in a slow and obvious way (loops in float64,
Pillow, torchvision), and compares.
"""
import argparse
import ast
import collections
import copy
import csv
import dataclasses
import doctest
import errno
import inspect
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as T
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import probe
import seed
import train
from probe import Split, evaluate, knn, linear_probe, load_data
from seed import (SEED, Encoder, FeatureQueue, InputError, MoCo, SplitBatchNorm2d, Supervised,
                  augment, crop_box, info_nce, load_teacher, save_encoder, seed_diagnostics,
                  seed_loss, similarity_logits, uniforms)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
ARCH = "shufflenet_v2_x0_5"         # the quickest network of torchvision at 32 px on a CPU
ONE_VIEW = [(32, (0.2, 1.0))]       # side and crop scale
draw_all_shapes = probe.draw_shapes
with warnings.catch_warnings():
    warnings.simplefilter("ignore")     # a mark can be registered only in a file of settings
    slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def slow_tests_are_asked_for(request):
    """Skips slow tests unless the command line says -m or the test's name."""
    if request.node.get_closest_marker("slow"):
        named = request.node.name.split("[")[0] in " ".join(request.config.invocation_params.args)
        if not request.config.getoption("-m") and not named:
            pytest.skip("slow: pytest -m slow")


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run takes over the signals that end it; so Ctrl-C would not end the tests."""
    before = {number: signal.getsignal(number) for number in train.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    train.STOP.number = 0
    train.STOP.in_loop = False


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks as small as here are slower on several threads; far slower if cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers_in_each_test():
    torch.manual_seed(0)


def unit(*shape):
    """Random vectors of length 1."""
    return F.normalize(torch.randn(*shape), dim=-1)


def random_embeddings(batch, dim, length):
    """z_s [B, D], z_t [B, D] and a queue [K, D]; or a query, a key and a queue."""
    return unit(batch, dim), unit(batch, dim), unit(length, dim)


class SmallNetwork(nn.Module):
    """Images [B, 3, S, S] -> embeddings [B, dim], rows of length 1; with batch norm."""

    def __init__(self, dim=8):
        super().__init__()
        self.dim = dim
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, dim)

    def forward(self, x):
        return F.normalize(self.head(self.backbone(x)), dim=1)


def snapshot(module):
    """A copy of all weights and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    """Whether two state dicts hold the same names and numbers."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(state):
    """A state dict without the statistics of batch norm, which each process has of its own."""
    return {name: value for name, value in state.items()
            if not re.search("running|num_batches", name)}


# --------------------------------------------------------------------------------------- the loss
def slow_softmax(z, own, queue, tau):
    """The similarity distribution of one image, a list of 1+K floats, by the formula."""
    entries = torch.cat([own[None], queue]).double()
    logits = [float(z.double() @ entry) / tau for entry in entries]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def slow_seed_loss(z_s, z_t, queue, tau_s, tau_t):
    """The paper's formula with loops."""
    total = 0.0
    for student, teacher in zip(z_s, z_t):
        p_t = slow_softmax(teacher, teacher, queue, tau_t)
        p_s = slow_softmax(student, teacher, queue, tau_s)
        total -= sum(p * math.log(q) for p, q in zip(p_t, p_s))
    return total / len(z_s)


@pytest.mark.parametrize("tau_s, tau_t", [(0.2, 0.01), (0.2, 0.05), (0.1, 0.5), (1.0, 1.0)])
def test_the_loss_is_the_papers_formula(tau_s, tau_t):
    """Otherwise the student would learn something else; the loss would fall all the same."""
    z_s, z_t, queue = random_embeddings(5, 6, 11)
    loss = seed_loss(z_s, z_t, queue, tau_s, tau_t)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_seed_loss(z_s, z_t, queue, tau_s, tau_t), rel=1e-5)


def test_the_default_temperatures_are_those_of_the_docstring():
    """With tau_t = 1e-4, the authors' default, all weight would lie on the image's own entry."""
    z_s, z_t, queue = random_embeddings(5, 6, 11)
    assert seed_loss(z_s, z_t, queue) == seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=0.01)
    assert info_nce(z_s, z_t, queue) == info_nce(z_s, z_t, queue, tau=0.2)
    expected = seed_diagnostics(z_s, z_t, queue, tau_s=0.2, tau_t=0.01)
    assert seed_diagnostics(z_s, z_t, queue) == expected
    method = SEED(SmallNetwork(), SmallNetwork())
    assert (method.tau_s, method.tau_t) == (0.2, 0.01)
    assert method.queue.features.shape == (65536, 8)


def test_the_images_own_teacher_embedding_is_one_of_the_entries():
    """Without it (K entries instead of K+1), the most similar entry of all would be missing."""
    z = unit(1, 4)
    queue = -z.expand(7, 4)
    self_prob = seed_diagnostics(z, z, queue, tau_s=1.0, tau_t=1.0)["self_prob"]
    expected = math.exp(1) / (math.exp(1) + 7 * math.exp(-1))
    assert self_prob.item() == pytest.approx(expected, rel=1e-5)


def test_similarity_logits_have_the_own_entry_first():
    """`info_nce` and `self_prob` take column 0 for it; another one is another image."""
    z, own, queue = random_embeddings(5, 6, 11)
    logits = similarity_logits(z, own, queue, 0.1)
    expected = torch.cat([F.cosine_similarity(z, own)[:, None], z @ queue.T], dim=1) / 0.1
    assert logits.shape == (5, 12)
    assert torch.allclose(logits, expected, atol=1e-5)


def test_at_a_vanishing_teacher_temperature_the_loss_is_info_nce():
    """The docstring promises this limit; without it, one of the two losses would be wrong."""
    z_s, z_t, queue = random_embeddings(6, 16, 40)
    loss = seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=1e-5)
    assert loss.item() == pytest.approx(info_nce(z_s, z_t, queue, tau=0.2).item(), rel=1e-6)


def test_info_nce_is_the_log_probability_of_the_own_key():
    """The baseline must be MoCo's loss, or the comparison with it would mean nothing."""
    query, key, queue = random_embeddings(4, 8, 9)
    total = 0.0
    for q, k in zip(query, key):
        total -= math.log(slow_softmax(q, k, queue, tau=0.3)[0])
    assert info_nce(query, key, queue, tau=0.3).item() == pytest.approx(total / 4, rel=1e-5)


def test_the_loss_is_at_least_the_teachers_entropy():
    """A user who waits for a loss of 0 would wait forever; KL says how far the student is."""
    z_s, z_t, queue = random_embeddings(6, 8, 30)
    copied = seed_diagnostics(z_t, z_t, queue, tau_s=0.3, tau_t=0.3)
    assert copied["kl"].abs() < 1e-5
    assert torch.isclose(seed_loss(z_t, z_t, queue, 0.3, 0.3), copied["entropy"], atol=1e-5)
    assert copied["top1_agreement"] == 1
    other = seed_diagnostics(z_s, z_t, queue, tau_s=0.3, tau_t=0.3)
    assert other["kl"] > 0.01
    assert torch.isclose(other["entropy"], copied["entropy"])
    assert seed_loss(z_s, z_t, queue, 0.3, 0.3) > copied["entropy"] + 0.01


def test_the_diagnostics_are_what_their_docstring_says():
    """A user decides by these numbers whether a run is all right."""
    z_s, z_t, queue = random_embeddings(7, 5, 12)
    z_s[:3] = F.normalize(z_t[:3] + 0.1 * z_s[:3], dim=1)                # some that agree
    found = seed_diagnostics(z_s, z_t, queue, tau_s=0.2, tau_t=0.1)
    p_t = [slow_softmax(t, t, queue, 0.1) for t in z_t]
    p_s = [slow_softmax(s, t, queue, 0.2) for s, t in zip(z_s, z_t)]
    entropy = np.mean([-sum(p * math.log(p) for p in row) for row in p_t])
    agreement = np.mean([np.argmax(row) == 0 for row in p_s])
    loss = slow_seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=0.1)
    assert 0 < agreement < 1
    assert found.keys() == {"kl", "entropy", "loss_of_a_copy", "self_prob", "top1_agreement"}
    assert found["entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert found["kl"].item() == pytest.approx(loss - entropy, rel=1e-4)
    assert found["self_prob"].item() == pytest.approx(np.mean([row[0] for row in p_t]), rel=1e-4)
    assert found["top1_agreement"].item() == pytest.approx(agreement)


def test_the_diagnostics_keep_no_graph():
    """A log that keeps the graphs of its numbers would fill the memory within some steps."""
    z_s, z_t, queue = random_embeddings(4, 6, 10)
    found = seed_diagnostics(z_s.requires_grad_(), z_t, queue)
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("tau_s, tau_t", [(0.2, 0.01), (0.3, 0.1)])
def test_the_loss_of_a_copy_is_that_of_a_student_that_equals_its_teacher(tau_s, tau_t):
    """It is what a user compares the loss with, so it must not depend on the student."""
    z_s, z_t, queue = random_embeddings(6, 8, 30)
    found = seed_diagnostics(z_s, z_t, queue, tau_s, tau_t)["loss_of_a_copy"]
    assert torch.isclose(found, seed_loss(z_t, z_t, queue, tau_s, tau_t))
    assert found.item() == pytest.approx(slow_seed_loss(z_t, z_t, queue, tau_s, tau_t), rel=1e-4)


def test_a_perfect_student_has_the_kl_that_the_docstring_names():
    """Otherwise users would take a KL of 6 nats for a failure, or a real failure for the floor."""
    z = unit(6, 128)
    queue = unit(65536, 128)
    kl = seed_diagnostics(z, z, queue, tau_s=0.2, tau_t=0.01)["kl"].item()
    mean = torch.exp(5 * (z @ queue.T)).mean().item()
    assert kl == pytest.approx(6.2, abs=0.1)
    assert kl == pytest.approx(math.log(1 + 65536 * math.exp(-5) * mean), abs=0.05)


def test_the_gradient_is_the_difference_of_the_two_distributions():
    """With another one than (p_s - p_t) / B by the logits, another loss would be trained."""
    z_s, z_t, queue = random_embeddings(4, 6, 10)
    seed_loss(z_s.requires_grad_(), z_t, queue, tau_s=0.2, tau_t=0.1).backward()
    for b in range(4):
        entries = torch.cat([z_t[b:b + 1], queue])
        p_s = torch.softmax(entries @ z_s[b].detach() / 0.2, dim=0)
        p_t = torch.softmax(entries @ z_t[b] / 0.1, dim=0)
        assert torch.allclose(z_s.grad[b], (p_s - p_t) @ entries / 0.2 / 4, atol=1e-5)


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_only_the_student_gets_a_gradient(loss):
    """If the teacher or the queue moved too, both could map all images to one point."""
    z_s, z_t, queue = [z.requires_grad_() for z in random_embeddings(4, 6, 10)]
    loss(z_s, z_t, queue).backward()
    assert z_s.grad.abs().sum() > 0
    assert z_t.grad is None
    assert queue.grad is None


def test_the_order_of_the_queue_does_not_matter():
    """The oldest entry moves through the queue; the loss must not change with its position."""
    z_s, z_t, queue = random_embeddings(4, 6, 10)
    shuffled = queue[torch.randperm(10)]
    assert torch.isclose(seed_loss(z_s, z_t, queue), seed_loss(z_s, z_t, shuffled))


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_the_loss_is_float32_under_autocast(loss):
    """In bf16 a logit at tau_t = 0.01 is off by 0.4, and the teacher's distribution is noise."""
    z_s, z_t, queue = random_embeddings(8, 128, 500)
    exact = loss(z_s, z_t, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(z_s, z_t, queue)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, exact)


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_the_loss_of_bf16_embeddings_is_computed_in_float32(loss):
    """A network under autocast may return bf16; the sum over 65,537 entries must not be bf16."""
    rounded = [z.bfloat16() for z in random_embeddings(8, 128, 500)]
    found = loss(*rounded)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(*[z.float() for z in rounded]))


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
@pytest.mark.parametrize("shapes", [((4, 6), (3, 6), (9, 6)), ((4, 6), (4, 6), (9, 5)),
                                    ((4, 6), (4, 6), (9,)), ((6,), (6,), (9, 6)),
                                    ((4, 6), (1, 6), (9, 6)), ((4, 6), (4, 1), (9, 6))])
def test_a_loss_refuses_shapes_that_do_not_fit(loss, shapes):
    """Broadcasting would turn the mistake into a number."""
    with pytest.raises(ValueError, match="expected shapes"):
        loss(*[unit(*shape) for shape in shapes])


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan])
def test_a_loss_refuses_a_temperature_that_is_not_positive(tau):
    """A negative one would train the student to be as unlike its teacher as it can be."""
    z_s, z_t, queue = random_embeddings(2, 3, 4)
    with pytest.raises(ValueError, match="temperature"):
        info_nce(z_s, z_t, queue, tau)
    with pytest.raises(ValueError, match="temperature"):
        seed_loss(z_s, z_t, queue, tau_s=tau, tau_t=0.1)
    with pytest.raises(ValueError, match="temperature"):
        seed_loss(z_s, z_t, queue, tau_s=0.1, tau_t=tau)


def test_the_worked_example_of_the_docstring_is_right():
    """Readers check their understanding with the example before they read the code."""
    result = doctest.testmod(seed)
    assert result.attempted >= 3
    assert result.failed == 0


class LiveTensors(TorchDispatchMode):
    """Counts the storages of `size` floats or more that are alive after an operation; `most` is
    the largest count. Backward is included."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= 4 * self.size:
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage)
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return result


def largest_count(size, step):
    """How many tensors of `size` floats or more are alive at once in step()."""
    with LiveTensors(size) as live:
        step()
    return live.most


def test_a_step_of_the_loss_needs_four_matrices_and_no_copy_of_the_queue():
    """[B, 1+K] at B = 256 and K = 65,536 is 67 MB, the queue 34 MB: with more copies of them, a
    GPU would be full at a smaller batch."""
    B, K, D = 32, 2048, 64                                              # a queue: two matrices
    z_s, z_t, _ = random_embeddings(B, D, 1)
    z_s.requires_grad_()
    queue = FeatureQueue(K, D)

    def step():
        z_s.grad = None
        seed_loss(z_s, z_t, queue.features).backward()
        queue.enqueue(z_t)

    matrices = largest_count(B * K, step) - 1                           # without the queue
    assert 2 <= matrices <= 4
    assert largest_count(K * D, step) == 1                              # the queue itself


def test_the_diagnostics_need_three_matrices_and_no_copy_of_the_queue():
    """Otherwise a run would fail for lack of memory in the first step that it logs."""
    B, K, D = 32, 2048, 64
    z_s, z_t, _ = random_embeddings(B, D, 1)
    queue = FeatureQueue(K, D)

    def step():
        seed_diagnostics(z_s, z_t, queue.features)

    assert 2 <= largest_count(B * K, step) - 1 <= 3
    assert largest_count(K * D, step) == 1


# --------------------------------------------------------------------------------------- the queue
def test_the_queue_is_first_in_first_out_for_any_batch_size():
    """If a batch that wraps around were cut or misplaced, old entries would stay for good."""
    queue = FeatureQueue(7, 3)
    expected = collections.deque(queue.features.clone(), maxlen=7)
    for batch in (3, 3, 3, 1, 7, 5, 16, 2, 0, 14):
        z = unit(batch, 3)
        queue.enqueue(z)
        expected.extend(z)
        oldest = int(queue.seen) % 7
        assert torch.equal(queue.features.roll(-oldest, 0), torch.stack(list(expected)))


def test_the_queue_starts_with_random_unit_vectors():
    """Zeros would be equally similar to all images, and have a weight in each softmax."""
    queue = FeatureQueue(2000, 16)
    assert torch.allclose(queue.features.norm(dim=1), torch.ones(2000))
    assert queue.features.mean(dim=0).abs().max() < 0.03                # in all directions
    assert queue.features.std(dim=0).min() > 0.1
    assert not torch.equal(queue.features, FeatureQueue(2000, 16).features)


def test_the_queue_says_how_far_it_is_filled():
    """The loss may rise until it is; a user who does not see that would stop the run."""
    queue = FeatureQueue(100, 16)
    for filled in (0.0, 0.4, 0.8, 1.0, 1.0):
        assert queue.filled.item() == pytest.approx(filled)
        queue.enqueue(unit(40, 16))


def test_the_queue_stores_float32_without_a_graph():
    """A queue that keeps the graphs of its entries would fill the memory within some steps."""
    queue = FeatureQueue(4, 3)
    queue.enqueue(unit(2, 3).bfloat16().requires_grad_())
    assert queue.features.dtype == torch.float32
    assert not queue.features.requires_grad
    assert queue.features.grad_fn is None


def test_the_queue_is_saved_and_restored():
    """A resumed run with a random queue would repeat the start, when all entries are noise."""
    queue = FeatureQueue(6, 3)
    other = FeatureQueue(6, 3)
    queue.enqueue(unit(4, 3))
    other.load_state_dict(queue.state_dict())
    z = unit(4, 3)
    queue.enqueue(z)
    other.enqueue(z)
    assert other.seen == 8
    assert same(queue.state_dict(), other.state_dict())


def test_the_queue_refuses_what_does_not_fit():
    """Embeddings of another width could not be compared with its entries."""
    for shape in ((2, 5), (2, 1), (3,)):
        with pytest.raises(ValueError, match=r"\[B, 3\]"):
            FeatureQueue(4, 3).enqueue(unit(*shape))
    for size, dim in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            FeatureQueue(size, dim)


def test_without_a_process_group_nothing_is_gathered():
    """Training on one GPU or the CPU must not need torch.distributed."""
    x = unit(3, 2)
    assert seed.rank_and_world_size() == (0, 1)
    assert seed.concat_all_gather(x) is x


def test_gathered_parts_are_interleaved(monkeypatch):
    """Process r holds the images r, r+R, ...: in another order, two processes would fill the queue
    otherwise than one, and MoCo would take the keys of other images."""
    whole = torch.arange(12.0).view(6, 2)

    def all_gather(parts, x):
        assert x.is_contiguous()
        assert torch.equal(x, whole[1::2])
        for rank, part in enumerate(parts):
            assert part.is_contiguous()                                 # gloo and NCCL insist
            part.copy_(whole[rank::2])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    assert seed.rank_and_world_size() == (1, 2)
    assert torch.equal(seed.concat_all_gather(whole[1::2]), whole)
    assert torch.equal(seed.concat_all_gather(whole[1::2].T.contiguous().T), whole)
    queue = FeatureQueue(8, 2)
    queue.enqueue(whole[1::2])
    assert torch.equal(queue.features[:6], whole)
    assert queue.seen == 6


# ------------------------------------------------------------------------------------- the methods
def make_method(name):
    """One of the three methods with small networks."""
    if name == "seed":
        return SEED(SmallNetwork(), SmallNetwork(), queue_size=16)
    if name == "moco":
        return MoCo(SmallNetwork(), queue_size=16, bn_splits=2)
    return Supervised(SmallNetwork(), classes=5)


def sgd(method, lr=0.1):
    """An optimizer for what the method trains."""
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr, momentum=0.9)


def training_step(method, optimizer, views, labels=None):
    """The step that seed.py prints above its methods. Returns the diagnostics."""
    targets = method.targets(views, labels)
    outputs = method(views)
    loss = method.loss(outputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    diagnostics = method.diagnostics(outputs, targets)
    method.after_step(targets)
    return diagnostics


@pytest.mark.parametrize("name, views_per_image", [("seed", 1), ("moco", 2), ("supervised", 1)])
def test_one_training_step_serves_all_three_methods(name, views_per_image):
    """train.py has one loop for all; a method that departs from it would not train there."""
    method = make_method(name)
    assert method.views_per_image == views_per_image
    trained = {n: p.detach().clone() for n, p in method.named_parameters() if p.requires_grad}
    views = [torch.randn(8, 3, 8, 8) for _ in range(views_per_image)]
    diagnostics = training_step(method, sgd(method), views, torch.arange(8) % 5)
    assert "top1_agreement" in diagnostics
    for value in diagnostics.values():
        assert value.shape == ()
        assert not value.requires_grad
    after = dict(method.named_parameters())
    changed = [n for n, value in trained.items() if not torch.equal(after[n], value)]
    assert "class_vectors" in changed or name != "supervised"
    assert any(n.endswith("head.weight") for n in changed)
    assert any(n.endswith("backbone.0.weight") for n in changed)


@pytest.mark.parametrize("name", ["seed", "moco"])
def test_the_targets_have_no_gradient_and_need_no_labels(name):
    """A graph of the teacher would take its memory in each step, and no label may take part."""
    method = make_method(name)
    views = [torch.randn(8, 3, 8, 8) for _ in range(method.views_per_image)]
    for network in method.children():
        network.requires_grad_(True)                                    # even so
    targets = method.targets(views)
    assert targets.shape == (8, 8)
    assert not targets.requires_grad


def test_the_teacher_stays_as_it_was_loaded():
    """In training mode its batch norm would follow our data, and the queue would hold embeddings
    of several different teachers."""
    method = make_method("seed")
    before = snapshot(method.teacher)
    optimizer = sgd(method)
    for _ in range(3):
        method.train()
        training_step(method, optimizer, [torch.randn(4, 3, 8, 8)])
    assert same(before, snapshot(method.teacher))
    assert not method.teacher.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert method.student.training
    assert not method.eval().student.training


def test_the_teacher_is_in_evaluation_mode_from_the_start():
    """train.py need not call `train()`; the first step must not change the teacher's statistics."""
    method = SEED(SmallNetwork().eval(), SmallNetwork().train(), queue_size=16)
    assert not method.teacher.backbone.training
    assert method.student.backbone.training


def test_seed_shows_the_same_view_to_both_and_moves_the_queue_only_afterwards():
    """With this batch in the queue before the loss, each image would have two own entries."""
    student = SmallNetwork()
    teacher = SmallNetwork().eval()
    x = torch.randn(4, 3, 8, 8)
    method = SEED(student, teacher, queue_size=16, tau_s=0.3, tau_t=0.07)
    queue = method.queue.features.clone()
    expected = seed_loss(copy.deepcopy(student)(x), teacher(x), queue, tau_s=0.3, tau_t=0.07)
    z_t = method.targets([x])
    z_s = method([x])
    assert torch.equal(z_t, teacher(x))
    assert torch.isclose(method.loss(z_s, z_t), expected)
    assert method.diagnostics(z_s, z_t)["queue_filled"] == 0
    assert torch.equal(method.queue.features, queue)
    method.after_step(z_t)
    assert torch.equal(method.queue.features[:4], z_t)
    assert torch.equal(method.queue.features[4:], queue[4:])
    assert method.diagnostics(z_s, z_t)["queue_filled"] == 0.25


def test_symmetric_views_are_each_compared_with_the_teachers_of_the_other():
    """With its own view twice, the two views would be nothing but a larger batch."""
    student = SmallNetwork()
    teacher = SmallNetwork().eval()
    x = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    method = SEED(student, teacher, queue_size=16, tau_s=0.3, tau_t=0.07, symmetric=True)
    assert method.views_per_image == 2
    z_t = method.targets(x)
    z_s = method(x)
    both = copy.deepcopy(student).train()(torch.cat(x))                 # batch norm over both
    queue = method.queue.features.clone()
    expected = (seed_loss(both[:4], teacher(x[1]), queue, 0.3, 0.07)
                + seed_loss(both[4:], teacher(x[0]), queue, 0.3, 0.07)) / 2
    assert torch.isclose(method.loss(z_s, z_t), expected)
    found = method.diagnostics(z_s, z_t)
    assert torch.isclose(found["kl"] + found["entropy"], expected, atol=1e-6)
    assert torch.isclose(found["loss_of_a_copy"], method.loss(z_t, z_t), atol=1e-6)
    method.after_step(z_t)
    assert torch.allclose(method.queue.features[:4], teacher(x[0]), atol=1e-6)
    assert torch.equal(method.queue.features[4:], queue[4:]), "one view of an image, not both"


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_crops_have_a_queue_of_their_own_and_their_loss_is_added(symmetric):
    """In one queue with whole images they would be told apart by their scale; and with six of an
    image in it, five of six entries would show the same few images."""
    student = SmallNetwork()
    teacher = SmallNetwork().eval()
    large = [torch.randn(4, 3, 12, 12) for _ in range(1 + symmetric)]
    small = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    method = SEED(student, teacher, 16, 0.3, 0.07, symmetric, small_crops=3)
    assert method.views_per_image == len(large) + 3
    queues = [method.queue.features.clone(), method.small_queue.features.clone()]
    assert not torch.equal(*queues)
    z_t = method.targets(large + small)
    z_s = method(large + small)
    assert z_t.shape == z_s.shape == (4 * method.views_per_image, 8)
    reference = copy.deepcopy(student).train()
    z_large = reference(torch.cat(large)).split(4)
    z_small = reference(torch.cat(small)).split(4)
    losses = [seed_loss(z, teacher(x), queues[0], 0.3, 0.07) for z, x in zip(z_large, large[::-1])]
    small_losses = [seed_loss(z, teacher(x), queues[1], 0.3, 0.07) for z, x in zip(z_small, small)]
    expected = sum(losses) / len(large) + sum(small_losses) / 3
    assert torch.isclose(method.loss(z_s, z_t), expected)
    found = method.diagnostics(z_s, z_t)
    assert torch.isclose(found["small_loss"], sum(small_losses) / 3)
    assert torch.isclose(found["kl"] + found["entropy"] + found["small_loss"], expected, atol=1e-6)
    method.after_step(z_t)
    for queue, before, view in ((method.queue, queues[0], large[0]),
                                (method.small_queue, queues[1], small[0])):
        assert torch.allclose(queue.features[:4], teacher(view), atol=1e-6)
        assert torch.equal(queue.features[4:], before[4:])
    method.loss(z_s, z_t).backward()
    assert student.head.weight.grad.abs().sum() > 0


def test_views_of_one_size_pass_a_network_together():
    """One by one they would take far longer, and batch norm would see fewer images."""
    sizes = []
    network = SmallNetwork()
    network.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    views = [torch.randn(2, 3, size, size) for size in (12, 8, 8, 8)]
    z = seed.embed(network.eval(), views)
    assert sizes == [(2, 3, 12, 12), (6, 3, 8, 8)]
    assert torch.allclose(z, torch.cat([network(view) for view in views]), atol=1e-6)


def test_seed_logs_the_diagnostics_of_its_own_queue_and_temperatures():
    """Diagnostics of other temperatures than the run's would mislead whoever sets them by these."""
    method = SEED(SmallNetwork(), SmallNetwork(), queue_size=16, tau_s=0.3, tau_t=0.07)
    z_s, z_t, _ = random_embeddings(4, 8, 1)
    expected = seed_diagnostics(z_s, z_t, method.queue.features, tau_s=0.3, tau_t=0.07)
    assert method.diagnostics(z_s, z_t) == {**expected, "queue_filled": 0}


def test_only_the_targets_need_the_teacher():
    """With stored embeddings of the teacher, a step must not run it: it is most of the cost."""
    method = make_method("seed")
    runs = []
    method.teacher.register_forward_hook(lambda module, args, out: runs.append(len(out)))
    views = [torch.randn(4, 3, 8, 8)]
    z_t = method.targets(views)
    assert runs == [4]
    z_s = method(views)
    loss = method.loss(z_s, z_t)
    assert torch.equal(method.loss(z_s, z_t.clone()), loss)
    loss.backward()
    method.diagnostics(z_s, z_t)
    method.after_step(z_t)
    assert runs == [4]


class OwnNetwork(nn.Module):
    """A user's own: nothing but `dim` and rows of length 1."""

    def __init__(self, hidden):
        super().__init__()
        self.dim = 6
        self.layers = nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 6))

    def forward(self, x):
        return F.normalize(self.layers(x.flatten(1)), dim=1)


def test_seed_distills_networks_of_ones_own():
    """The docstring promises that `dim` and embeddings of length 1 are all that is needed."""
    method = SEED(OwnNetwork(hidden=7), OwnNetwork(hidden=30), queue_size=64)
    optimizer = sgd(method, lr=0.3)
    x = torch.randn(32, 3, 2, 2)
    kl = [training_step(method, optimizer, [x])["kl"].item() for _ in range(40)]
    assert method.queue.features.shape == (64, 6)
    assert kl[-1] < kl[5] - 0.1


def test_networks_without_an_equal_dim_are_refused_by_name():
    """Embeddings of two widths cannot be compared with one queue; which network is to be changed
    must be plain from the message."""
    without = nn.Linear(3, 8)
    for student, teacher, match in (
            (SmallNetwork(4), SmallNetwork(8), "student.dim is 4 and teacher.dim is 8"),
            (SmallNetwork(8), without, "student.dim is 8 and teacher.dim is None"),
            (without, SmallNetwork(8), "student.dim is None and teacher.dim is 8"),
            (without, without, "student.dim is None and teacher.dim is None")):
        with pytest.raises(ValueError, match=match) as caught:
            SEED(student, teacher, queue_size=16)
        assert not isinstance(caught.value, InputError)                 # a bug, not a wrong input


@pytest.mark.parametrize("shape", [(4, 5), (4, 8, 1), (4,)])
def test_embeddings_of_another_shape_are_refused_by_name(shape):
    """An own network that returns its features instead would end in a traceback about matrices."""
    with pytest.raises(ValueError, match=r"the student must return embeddings \[B, 8\], got \[4"):
        make_method("seed").loss(unit(*shape), unit(4, 8))
    with pytest.raises(ValueError, match=r"the teacher must return embeddings \[B, 8\], got \[4"):
        make_method("seed").loss(unit(4, 8), unit(*shape))


@pytest.mark.parametrize("length", [0.0, 0.997, 1.003, 2.0, math.nan])
def test_embeddings_that_are_not_of_length_1_are_refused_by_name(length):
    """Without normalization the logits are no cosines, and the student can lower the loss by
    longer embeddings alone."""
    z = unit(4, 8)
    one_row = z.clone()
    one_row[2] *= length
    with pytest.raises(ValueError, match="the student's embeddings must have length 1"):
        make_method("seed").loss(one_row, z)
    with pytest.raises(ValueError, match="the teacher's embeddings must have length 1"):
        make_method("seed").loss(z, one_row)


def test_embeddings_of_length_1_up_to_rounding_are_accepted():
    """A network in float16 rounds the length too; it must not be refused."""
    z = unit(4, 8)
    for rounded in (1.0005 * z, 0.9995 * z, z.half()):
        assert make_method("seed").loss(rounded, rounded).isfinite()


def test_embeddings_are_checked_in_the_first_step_only(monkeypatch):
    """The check waits for the GPU; in each step that would cost time."""
    checked = []
    monkeypatch.setattr(seed, "check_embeddings", lambda name, z, dim: checked.append(name))
    method = make_method("seed")
    for _ in range(3):
        method.loss(unit(4, 8), unit(4, 8))
    assert checked == ["student", "teacher"]


def test_seed_teaches():
    """The method as a whole: after some steps the student has its teacher's distributions."""
    x = 2 * torch.randn(64, 3, 1, 1) + 0.3 * torch.randn(64, 3, 8, 8)
    method = SEED(SmallNetwork(), SmallNetwork(), queue_size=128, tau_s=0.2, tau_t=0.1)
    optimizer = sgd(method)
    kl = []
    for _ in range(120):
        views = [x[torch.randperm(64)[:32]]]
        kl.append(training_step(method, optimizer, views)["kl"].item())
    assert np.mean(kl[-10:]) < 0.5 * np.mean(kl[5:15])


def test_mocos_key_encoder_follows_slowly_and_without_gradient():
    """k <- m k + (1 - m) q after the step; otherwise keys in the queue would go stale at once."""
    method = MoCo(SmallNetwork(), queue_size=16, momentum=0.9)
    views = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    start = [p.clone() for p in method.encoder.parameters()]
    keys = method.targets(views)
    method.loss(method(views), keys).backward()
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    for k, q in zip(method.key_encoder.parameters(), start, strict=True):
        assert torch.equal(k, q)                                        # not before the step
        assert k.grad is None
        assert not k.requires_grad
    method.after_step(keys)
    for k, q in zip(method.key_encoder.parameters(), start, strict=True):
        assert torch.allclose(k, q + 0.1, atol=1e-6)


def test_moco_compares_two_views_and_keeps_keys_in_order():
    """If the keys came back in another order, each query's positive would be another image."""
    method = MoCo(SmallNetwork(), queue_size=16, tau=0.3).eval()
    views = [torch.randn(6, 3, 8, 8) for _ in range(2)]
    queue = method.queue.features.clone()
    query = method.encoder(views[0])
    key = method.key_encoder(views[1])
    found = method.targets(views)
    assert torch.allclose(found, key, atol=1e-5)
    assert torch.equal(method(views), query)
    assert torch.isclose(method.loss(query, found), info_nce(query, key, queue, 0.3), atol=1e-5)
    assert torch.equal(method.queue.features, queue)
    method.after_step(found)
    assert torch.equal(method.queue.features[:6], found)


def test_mocos_diagnostics_are_what_their_docstring_says():
    """A baseline that never finds its keys must be seen in the log."""
    method = MoCo(SmallNetwork(), queue_size=16, tau=0.3)
    method.after_step(unit(4, 8))
    query, key, _ = random_embeddings(6, 8, 1)
    query[:2] = F.normalize(key[:2] + 0.1 * query[:2], dim=1)
    found = method.diagnostics(query, key)
    p = [slow_softmax(q, k, method.queue.features, 0.3) for q, k in zip(query, key)]
    agreement = np.mean([np.argmax(row) == 0 for row in p])
    assert 0 < agreement < 1
    assert found.keys() == {"top1_agreement", "queue_filled"}
    assert found["top1_agreement"].item() == pytest.approx(agreement)
    assert found["queue_filled"] == 0.25


def test_a_key_is_computed_among_other_images_than_its_query():
    """Not shuffled, query and key share batch statistics: MoCo would recognize these instead."""
    method = MoCo(SmallNetwork(), queue_size=16)
    x = torch.randn(16, 3, 8, 8)
    seen = []
    method.key_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.targets([x, x])
    assert not torch.equal(seen[0], x)
    assert torch.equal(seen[0].sum((1, 2, 3)).sort()[0], x.sum((1, 2, 3)).sort()[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_shuffle_keys_over_both_and_put_them_in_order(monkeypatch, rank):
    """If each got back the keys of the other's images, no query would find its own key."""
    method = MoCo(SmallNetwork(), queue_size=16).eval()
    everyone = torch.randn(8, 3, 8, 8)
    order = torch.randperm(8)
    keys = method.key_encoder(everyone)
    gathered = []

    def concat_all_gather(x):
        gathered.append(x)
        return everyone if len(gathered) == 1 else keys[order]

    def broadcast(x, src):
        x.copy_(order)                                                  # the same in both

    monkeypatch.setattr(seed, "rank_and_world_size", lambda: (rank, 2))
    monkeypatch.setattr(seed, "concat_all_gather", concat_all_gather)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    found = method.targets([None, everyone[rank::2]])
    assert torch.equal(gathered[0], everyone[rank::2])
    assert torch.allclose(gathered[1], keys[order[rank::2]], atol=1e-5)
    assert torch.allclose(found, keys[rank::2], atol=1e-5)


def test_mocos_defaults_are_mocos():
    """The table's baseline is made with them."""
    defaults = {n: p.default for n, p in inspect.signature(MoCo).parameters.items()}
    assert (defaults["queue_size"], defaults["momentum"]) == (65536, 0.999)
    assert (defaults["tau"], defaults["bn_splits"]) == (0.2, 8)


def test_split_batch_norm_is_batch_norm_on_separate_devices():
    """Without the split, MoCo would recognize shared batch statistics instead of images."""
    plain = nn.BatchNorm2d(16, eps=1e-3)
    nn.init.uniform_(plain.weight)
    nn.init.normal_(plain.bias)
    split = SplitBatchNorm2d(plain, splits=4)
    x = torch.randn(8, 16, 6, 6)
    assert split.eps == 1e-3
    assert not torch.allclose(split(x), plain(x), atol=1e-3)
    split = SplitBatchNorm2d(plain, splits=4)
    assert same(split.state_dict(), plain.state_dict())                 # also what it has seen
    assert (1 - split.momentum) ** 4 == pytest.approx(1 - plain.momentum)   # a step counts once
    plain.momentum = split.momentum
    assert torch.allclose(split(x), torch.cat([plain(part) for part in x.chunk(4)]), atol=1e-6)
    assert torch.allclose(split.running_mean, plain.running_mean)
    assert torch.allclose(split.running_var, plain.running_var)
    assert torch.allclose(split.eval()(x), plain.eval()(x), atol=1e-6)


def test_split_batch_norm_has_as_many_parts_as_it_says():
    """Nine images in parts of two would leave one alone, which has no variance at 1x1 pixels."""
    split = SplitBatchNorm2d(nn.BatchNorm2d(3), splits=4)
    for sizes in ([3, 2, 2, 2], [2, 2, 2], [3]):                # two images a part, at least
        x = torch.randn(sum(sizes), 3, 1, 1)
        parts = [F.batch_norm(part, None, None, training=True) for part in x.split(sizes)]
        assert torch.allclose(split(x), torch.cat(parts), atol=1e-5)


def test_moco_splits_the_batch_norm_of_both_encoders_and_keeps_the_weights():
    """A network trained by MoCo must load where the plain one does, with the weights it had."""
    encoder = SmallNetwork()
    nn.init.uniform_(encoder.backbone[1].weight)
    before = snapshot(encoder)
    method = MoCo(encoder, queue_size=16, bn_splits=4)
    for network in (method.encoder, method.key_encoder):
        assert type(network.backbone[1]) is SplitBatchNorm2d
        assert network.backbone[1].splits == 4
        assert same(network.state_dict(), before)
    assert method.encoder is encoder
    assert method.key_encoder.backbone[1] is not encoder.backbone[1]
    assert method.encoder(torch.randn(8, 3, 8, 8)).shape == (8, 8)


def test_supervised_training_reaches_the_head():
    """A head without a gradient would be distilled untrained, and stops training on several
    GPUs."""
    method = make_method("supervised")
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    views = [torch.randn(6, 3, 8, 8)]
    assert torch.equal(method.targets(views, labels), labels)
    method.loss(method(views), labels).backward()
    for name, p in method.named_parameters():
        if name != "encoder.backbone.0.bias":                           # batch norm removes it
            assert p.grad.abs().sum() > 0, name


def test_the_supervised_loss_is_cross_entropy_over_cosines():
    """Only angles count in the queue, so only angles may be trained here."""
    method = make_method("supervised").eval()
    method.class_vectors.data *= 3                                      # no effect
    x = torch.randn(12, 3, 8, 8)
    labels = torch.arange(12) % 5
    cosines = F.cosine_similarity(method.encoder(x)[:, None], method.class_vectors[None], dim=2)
    logits = method([x])
    assert torch.allclose(logits, cosines / 0.1, atol=1e-5)
    assert torch.isclose(method.loss(logits, labels), F.cross_entropy(cosines / 0.1, labels))
    correct = cosines.argmax(dim=1) == labels
    assert 0 < correct.sum() < 12
    assert torch.isclose(method.diagnostics(logits, labels)["top1_agreement"],
                         correct.float().mean())


class NoNetwork(nn.Module):
    """Takes embeddings [B, 8] for the view and returns them."""
    dim = 8

    def forward(self, z):
        return z


def test_supervised_logits_are_float32_under_autocast():
    """At tau = 0.1, bf16 would round the logits to steps of 0.06."""
    method = Supervised(NoNetwork(), classes=5)
    z = unit(6, 8)
    exact = method([z])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = method([z])
    assert logits.dtype == torch.float32
    assert torch.equal(logits, exact)
    assert torch.equal(method([z.bfloat16()]), method([z.bfloat16().float()]))


# ------------------------------------------------------------------------------------ the encoders
@pytest.mark.parametrize("arch, feature_dim", [
    ("mobilenet_v3_large", 1280), ("mobilenet_v3_small", 1024), ("efficientnet_b0", 1280),
    ("resnet18", 512), ("shufflenet_v2_x1_0", 1024), ("regnet_y_400mf", 440)])
def test_an_encoder_gives_features_and_unit_embeddings(arch, feature_dim):
    """The features must be the paper's (MobileNet-V3: 1280, behind the hidden layer)."""
    encoder = Encoder(arch, dim=12, hidden_dim=20, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encoder.features(x)
        z = encoder(x)
    assert encoder.feature_dim == feature_dim
    assert features.shape == (2, feature_dim)
    assert z.shape == (2, 12)
    assert torch.allclose(z.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.equal(z, F.normalize(encoder.head(features), dim=1))


@pytest.mark.parametrize("arch, feature_dim, size", [
    ("efficientnet_b1", 1280, 32), ("resnet34", 512, 32), ("resnet50", 2048, 32),
    ("resnet101", 2048, 32), ("resnet152", 2048, 32), ("convnext_tiny", 768, 32),
    ("vit_b_16", 768, 224)])
def test_larger_networks_have_the_shapes_that_they_promise(arch, feature_dim, size):
    """A teacher whose features are of another layer would be distilled without a word."""
    with torch.device("meta"):                                          # shapes alone
        encoder = Encoder(arch, dim=12, hidden_dim=20, image_size=size).eval()
        x = torch.empty(2, 3, size, size)
        assert encoder.feature_dim == feature_dim
        assert encoder.features(x).shape == (2, feature_dim)
        assert encoder(x).shape == (2, 12)


def test_the_head_is_the_papers():
    """Its hidden layer matters: 58.0 or 60.3 on ImageNet for a ResNet-18."""
    encoder = Encoder("resnet18")
    assert [type(layer) for layer in encoder.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert encoder.head[0].weight.shape == (512, 512)
    assert encoder.head[2].weight.shape == (128, 512)
    assert encoder.dim == 128
    encoder = Encoder("shufflenet_v2_x0_5")
    assert encoder.head[0].weight.shape == (1024, 1024)                 # as wide as its features
    assert encoder.head[2].weight.shape == (128, 1024)
    encoder = Encoder("resnet18", hidden_dim=2048)
    assert encoder.head[0].weight.shape == (2048, 512)
    assert encoder.head[2].weight.shape == (128, 2048)
    encoder = Encoder("resnet18", dim=16, hidden_dim=0)
    assert type(encoder.head) is nn.Linear
    assert encoder.head.weight.shape == (16, 512)


def test_without_a_head_the_embedding_is_the_normalized_features():
    """A teacher from torchvision is used so; its features would otherwise have any length."""
    bare = Encoder("shufflenet_v2_x0_5", dim=None).eval()
    x = torch.randn(2, 3, 32, 32)
    assert bare.dim == bare.feature_dim == 1024
    assert torch.allclose(bare(x), F.normalize(bare.features(x), dim=1))


def test_a_new_encoder_says_that_its_weights_are_random():
    """An untrained network must not pass for a trained one in a table."""
    encoder = Encoder("shufflenet_v2_x0_5")
    assert encoder.provenance == "shufflenet_v2_x0_5, random weights"
    assert encoder.used_labels is False
    assert encoder.image_size == 224


def test_embeddings_are_float32_of_length_1_under_autocast():
    """bf16 would store lengths of 0.996 in the queue, and the loss would refuse the network."""
    encoder = Encoder("shufflenet_v2_x0_5").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder(torch.randn(8, 3, 32, 32))
    assert z.dtype == torch.float32
    assert torch.allclose(z.norm(dim=1), torch.ones(8), atol=1e-5)


def test_features_are_those_of_torchvision():
    """Weights must mean the same here and there, or nobody could use what was trained."""
    theirs = torchvision.models.resnet18(weights=None).eval()
    ours = Encoder("resnet18").eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.backbone.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(theirs.fc(ours.features(x)), theirs(x), atol=1e-5)


def test_a_network_of_ones_own_becomes_an_encoder():
    """Coursework trains networks that torchvision does not have."""
    network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = Encoder("mine", dim=5, image_size=16, backbone=network)
    assert encoder.feature_dim == 7
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(InputError, match="mine cannot be an encoder at 16 px: .*more than one"):
        Encoder("mine", image_size=16, backbone=network[:2])


def side_before_the_end(encoder):
    """Side of the map behind the last convolution that sees more than one pixel; images: 32 px."""
    sides = []
    convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    convs[-1].register_forward_hook(lambda module, args, out: sides.append(out.shape[-1]))
    encoder.features(torch.randn(1, 3, 32, 32))
    return sides[0]


@pytest.mark.parametrize("arch, plain, adapted", [
    ("resnet18", 1, 4), ("mobilenet_v3_large", 1, 2), ("efficientnet_b0", 1, 2),
    ("shufflenet_v2_x1_0", 1, 2)])
def test_small_images_keep_their_resolution_at_first(arch, plain, adapted):
    """At 32 px ImageNet's first layers would leave a single position to the last ones."""
    assert side_before_the_end(Encoder(arch, image_size=32).eval()) == plain
    encoder = Encoder(arch, small_images=True, image_size=32).eval()
    assert side_before_the_end(encoder) == adapted
    assert encoder.small_images


def test_a_resnets_stem_becomes_that_of_cifar():
    """Its results on CIFAR could not be compared with others' otherwise."""
    backbone = Encoder("resnet18", small_images=True, image_size=32).backbone
    assert backbone.conv1.kernel_size == (3, 3)
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)
    assert backbone.conv1.bias is None
    assert backbone.conv1(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert isinstance(backbone.maxpool, nn.Identity)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_a_network_that_does_not_fit_is_refused_by_name():
    """Instead of this line there would be a traceback, an hour later if it is the student's."""
    with torch.device("meta"):                                          # no weights are needed
        for options, match in (
                (dict(arch="mobilenetv3_large"), "did you mean .*mobilenet_v3_large"),
                (dict(arch="?"), "unknown network '\\?'; did you mean [a-z0-9_]+, [a-z0-9_]+, "),
                (dict(arch="squeezenet1_0"), "squeezenet1_0 has no Linear"),
                (dict(arch="googlenet"), "googlenet .* more than one"),
                (dict(arch="vit_b_16", image_size=32), "vit_b_16 .* at 32 px"),
                (dict(arch="convnext_tiny", small_images=True), "stride .* is 4, not 2")):
            with pytest.raises(InputError, match=match) as caught:
                Encoder(**options)
            assert "\n" not in str(caught.value)


class Fails(nn.Module):
    """Raises an error of two lines."""

    def forward(self, x):
        raise RuntimeError("too small\nat layer 3")


def test_whatever_a_network_raises_becomes_one_line():
    """The command line prints the message as it is; a user reads one line, not a traceback."""
    encoder = Encoder("shufflenet_v2_x0_5")
    encoder.backbone = Fails()
    with pytest.raises(InputError, match="^shufflenet.* at 32 px: too small; choose [^\n]*$"):
        encoder.check_image_size(32)


# ------------------------------------------------------------------------------------ the teachers
def moco_network(arch, version):
    """A network with MoCo's head of that version, and statistics that are not the initial ones."""
    network = torchvision.models.get_model(arch, weights=None)
    width = network.fc.in_features
    network.fc = nn.Linear(width, 128)
    if version == 2:
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), network.fc)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def moco_file(network, arch):
    """A checkpoint as MoCo's code writes it, with `network` as the query encoder."""
    state = {}
    for name, value in network.state_dict().items():
        state[f"module.encoder_q.{name}"] = value
        state[f"module.encoder_k.{name}"] = torch.randn_like(value.float())
    state["module.queue"] = torch.randn(128, 64)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    optimizer = {"state": {}, "param_groups": []}
    return {"epoch": 800, "arch": arch, "state_dict": state, "optimizer": optimizer}


@pytest.mark.parametrize("version", [1, 2])
def test_a_moco_checkpoint_becomes_the_teacher_that_is_in_it(tmp_path, version):
    """With strict=False a wrong prefix would go unnoticed, and a random network be distilled."""
    network = moco_network("resnet18", version)
    torch.save(moco_file(network, "resnet18"), tmp_path / "moco.pth.tar")
    teacher = load_teacher(tmp_path / "moco.pth.tar")
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(teacher(x), F.normalize(network(x), dim=1), atol=1e-5)
    assert teacher.dim == 128
    assert teacher.provenance == (
        "resnet18, weights under 'state_dict.module.encoder_q.', head "
        "'state_dict.module.encoder_q.fc.', 128 wide, matched 120/120 backbone keys")
    assert teacher.used_labels is False
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_torchvision_file_teaches_by_its_features(tmp_path):
    """Its last layer scores classes; a random head in its place would teach noise."""
    network = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), path)
    teacher = load_teacher(path, "resnet18")
    network.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert teacher.dim == 512
    assert torch.allclose(teacher(x), F.normalize(network(x), dim=1), atol=1e-5)
    assert teacher.used_labels is None                                  # the file does not say
    assert "no projection head" in teacher.provenance
    assert load_teacher(path).arch == "resnet18"                        # its shapes tell
    with pytest.raises(InputError, match="fit torchvision's resnet34: 100 of 180 keys.*layer1.2.c"):
        load_teacher(path, "resnet34")


def test_a_file_of_a_larger_network_is_refused(tmp_path):
    """It has each key of a resnet18, in the same shape: the result would be half a network."""
    path = tmp_path / "resnet34.pth"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(InputError, match="no part of torchvision's resnet18.*layer1.2.conv1"):
        load_teacher(path, "resnet18")


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_older_and_wrapped_files_load_too(tmp_path, key):
    """Trained with several GPUs, by an old PyTorch, or by torchvision's script, a file has other
    names; it must not be refused, and must give the same weights."""
    network = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    weights = {f"module.{k}": v for k, v in network.state_dict().items() if "num_batches" not in k}
    assert len(weights) < len(network.state_dict())
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "old.pth")
    teacher = load_teacher(tmp_path / "old.pth", "shufflenet_v2_x0_5")
    network.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(teacher.features(x), network(x), atol=1e-5)


@pytest.mark.parametrize("options", [
    dict(arch="shufflenet_v2_x0_5", dim=16, hidden_dim=24, image_size=32),
    dict(arch="shufflenet_v2_x0_5", dim=16, hidden_dim=0),
    dict(arch="shufflenet_v2_x0_5", dim=None),
    dict(arch="swin_t", dim=16, image_size=32),         # calls its class layer "head", as we ours
    dict(arch="swin_t", dim=16, hidden_dim=0, image_size=32),
    dict(arch="resnet18", small_images=True, image_size=32)])
def test_an_encoder_file_comes_back_as_it_was_saved(tmp_path, options):
    """What a run leaves must be what it trained: backbone, head and first layers."""
    encoder = Encoder(**options).eval()
    save_encoder(tmp_path / "encoder.pt", encoder, "made by a test", True)
    loaded = load_teacher(tmp_path / "encoder.pt")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), encoder(x))
    for name in ("arch", "dim", "hidden_dim", "small_images", "image_size", "feature_dim"):
        assert getattr(loaded, name) == getattr(encoder, name), name
    assert type(loaded.head) is type(encoder.head)
    assert loaded.used_labels is True
    assert loaded.provenance.startswith(f"{encoder.arch}, made by a test, matched ")
    assert not any(p.requires_grad for p in loaded.parameters())
    assert os.listdir(tmp_path) == ["encoder.pt"]


def test_the_backbone_in_an_encoder_file_has_torchvisions_names(tmp_path):
    """Users load it into a plain torchvision network; the statistics say how to normalize."""
    save_encoder(tmp_path / "encoder.pt", Encoder("resnet18"), "made by a test", False)
    file = torch.load(tmp_path / "encoder.pt", weights_only=True)
    network = torchvision.models.resnet18(weights=None)
    result = network.load_state_dict(file["backbone"], strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert not result.unexpected_keys
    assert (file["mean"], file["std"]) == (seed.IMAGENET_MEAN, seed.IMAGENET_STD)


def test_an_encoder_file_of_the_first_version_still_loads(tmp_path):
    """Whoever trained a teacher before the names changed would have to train it again."""
    path = tmp_path / "encoder.pt"
    encoder = Encoder("shufflenet_v2_x0_5", dim=16).eval()
    save_encoder(path, encoder, "made long ago", True)
    file = torch.load(path, weights_only=True)
    file["made"] = file.pop("provenance")
    file["labels_seen"] = file.pop("used_labels")
    torch.save(file, path)
    loaded = load_teacher(path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), encoder(x))
    assert "made long ago" in loaded.provenance
    assert loaded.used_labels is True


def test_a_kill_while_saving_leaves_the_earlier_file(tmp_path, monkeypatch):
    """Half a file in place of the last checkpoint would cost the whole run."""
    path = tmp_path / "last.pt"
    seed.save_file(path, {"step": 1})

    def killed(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        seed.save_file(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


def refusal(path, arch=None):
    """The line with which `load_teacher` refuses a file."""
    with pytest.raises(InputError) as caught:
        load_teacher(path, arch)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))                # not each of 300 keys
    return str(caught.value)


def test_a_moco_file_that_is_not_whole_is_an_error(tmp_path):
    """Each of these would otherwise be distilled, or end in a traceback."""
    path = tmp_path / "moco.pth"
    arch = "shufflenet_v2_x0_5"
    whole = moco_file(moco_network(arch, version=2), arch)
    query = "module.encoder_q."

    def refused(change, drop="nothing"):
        """The line about the file with other weights, and without those with `drop` in the name."""
        state = {k: v for k, v in {**whole["state_dict"], **change}.items() if drop not in k}
        torch.save({**whole, "state_dict": state}, path)
        return refusal(path)

    conv = whole["state_dict"][f"{query}conv1.0.weight"]
    one_nan = conv.clone()
    one_nan[3, 1, 0, 2] = math.nan
    message = refused({}, drop="conv5.0.weight")
    assert "279 of 280 keys are there, under 'state_dict.module.encoder_q.'" in message
    assert "without conv5.0.weight; it holds state_dict.module.encoder_q." in message
    assert 'Missing key(s) in state_dict: "head.0.bias"' in refused({}, drop="q.fc.0.bias")
    assert 'Missing key(s) in state_dict: "head.2.bias"' in refused({}, drop="q.fc.2.bias")
    assert 'Missing key(s) in state_dict: "head.2.weight"' in refused({}, drop="q.fc.2.weight")
    assert "conv1.0.weight has numbers that are not finite" in refused(
        {f"{query}conv1.0.weight": one_nan})
    message = refused({f"{query}conv1.0.weight": conv[..., 0]})
    assert "size mismatch for backbone.conv1.0.weight" in message
    message = refused({f"{query}conv1.0.weight": 3})
    assert "no part of torchvision's" in message                       # the whole one is encoder_k
    message = refused({f"{query}conv1.0.weight": conv.long()})
    assert "backbone.conv1.0.weight is torch.int64, not torch.float32" in message
    for name in (f"{query}conv5.2.weight", f"{query}layer5.weight", "decoder.weight"):
        message = refused({name: torch.zeros(3)})
        assert f"weights that are no part of torchvision's {arch} or its head" in message
        assert name.removesuffix("weight") in message
    message = refused({"decoder.weight": torch.zeros(3)}, drop="q.conv5.0.weight")
    assert "280 of 280" not in message


def test_a_file_of_another_network_is_an_error(tmp_path):
    """Each of these would otherwise be distilled, or end in a traceback."""
    path = tmp_path / "file.pth"
    arch = "shufflenet_v2_x0_5"
    whole = moco_file(moco_network(arch, version=2), arch)
    torch.save(whole, path)
    assert "does not fit torchvision's resnet50: 0 of 265 keys" in refusal(path, "resnet50")
    torch.save({**whole, "arch": "shufflenet_v2_x1_0"}, path)
    assert "does not fit a shufflenet_v2_x1_0: size mismatch for backbone." in refusal(path)
    torch.save({**whole, "arch": "someones_net"}, path)
    message = refusal(path)
    assert "does not say which network it is, and holds no whole ResNet but state_dict." in message
    torch.save({"epoch": 1, "state_dict": {"foo.weight": torch.zeros(3)}}, path)
    message = refusal(path, "resnet18")
    assert "0 of 100 keys are there, under '', without conv1.weight" in message
    assert message.endswith("it holds state_dict.foo.weight")            # what it does hold


def test_what_is_no_checkpoint_is_an_error_in_one_line(tmp_path):
    """A traceback would not say which file it is about, or what to do."""
    path = tmp_path / "file.pth"
    torch.save(torch.zeros(3), path)
    assert f"{path} is not a checkpoint" in refusal(path)
    for content in ({"state_dict": None}, {"state_dict": {1: torch.zeros(3)}}, {}):
        torch.save(content, path)
        assert f"{path} does not fit torchvision's {ARCH}: 0 of 280" in refusal(path, ARCH)
        assert "does not say which network it is" in refusal(path)
    save_encoder(path, Encoder(ARCH), "made by a test", False)
    whole = torch.load(path, weights_only=True)
    for name in ("dim", "hidden_dim", "small_images", "image_size"):
        torch.save({k: v for k, v in whole.items() if k != name}, path)
        assert f"{path} is not a whole encoder.pt" in refusal(path)
    torch.save({**whole, "backbone": [1, 2]}, path)
    assert "0 of 280 keys" in refusal(path)
    torch.save({**whole, "head": [1, 2]}, path)
    assert 'Missing key(s) in state_dict: "head.0.weight"' in refusal(path)
    torch.save(whole, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64                                    # one bit
    path.write_bytes(content)
    assert re.search("cannot read .*: file/data/[0-9]+ in it is damaged", refusal(path))
    path.write_bytes(content[:300])
    assert f"cannot read {path}: " in refusal(path)
    for content, words in ((b"<!DOCTYPE html><html>no quota left</html>", "it is a web page"),
                           (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
                           (pickle.dumps({"state_dict": 1}), "torch.save did not write it"),
                           (b"", "or not all of it")):
        path.write_bytes(content)
        assert f"cannot read {path}: " in refusal(path)
        assert words in refusal(path)
    assert f"no such file: {tmp_path / 'nothing.pth'}" in refusal(tmp_path / "nothing.pth")


def test_a_full_disk_is_a_line_and_leaves_the_earlier_file(tmp_path, monkeypatch):
    """The half file would keep the disk full, and the run could not go on after cleaning up."""
    path = tmp_path / "last.pt"
    seed.save_file(path, {"step": 1})
    for error in (OSError(28, "No space left on device"), RuntimeError("stream writer failed")):
        def full(content, file):
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="cannot write .*last.pt: .*; [0-9,]+ bytes"):
            seed.save_file(path, {"step": 2})
        assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


class RunsACommand:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """Checkpoints are passed on by strangers."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsACommand()}, "file.pth")
    message = refusal("file.pth", "resnet18")
    assert re.match(r"cannot read file.pth: it holds a (posix|nt).system, which could run", message)
    assert not Path("exploded").exists()


def test_a_checkpoint_from_an_address_is_downloaded_once(tmp_path, monkeypatch):
    """It cannot run code either, and two teachers whose addresses end alike must not be taken for
    each other."""
    asked = []
    files = {"https://a.org/teacher.pth": {"from": "a"}, "http://b.org/teacher.pth": {"from": "b"},
             "https://c.org/teacher.pth": RunsACommand()}

    def download(url, path):
        asked.append(url)
        torch.save(files[url], path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for _ in range(2):
        for address in ("https://a.org/teacher.pth", "http://b.org/teacher.pth"):
            assert seed.read_checkpoint(address) == files[address]
    assert asked == list(files)[:2]
    with pytest.raises(InputError, match="which could run code"):
        load_teacher("https://c.org/teacher.pth")
    assert not Path("exploded").exists()


def mlp(*layers):
    """A head in the notation of its authors' papers: widths, "bn" and "relu"."""
    modules = []
    for layer in layers:
        if layer == "relu":
            modules.append(nn.ReLU())
        elif layer == "bn":
            modules.append(nn.BatchNorm1d(modules[-1].out_features))
        elif layer == "plain bn":
            modules.append(nn.BatchNorm1d(modules[-1].out_features, affine=False))
        else:
            modules.append(nn.Linear(*layer[:2], bias=len(layer) == 2))
    head = nn.Sequential(*modules)
    for module in head:
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return head.eval()


def under(prefix, weights):
    """A state dict with longer names."""
    return {prefix + name: value for name, value in weights.items()}


ARGS = argparse.Namespace(arch="resnet18", lr=0.1)
TWO_LAYERS = mlp((512, 512), "relu", (512, 128))
SWAV_HEAD = mlp((512, 96), "bn", "relu", (96, 32))
SIMSIAM_HEAD = mlp((512, 64, "no bias"), "bn", "relu", (64, 64, "no bias"), "bn", "relu", (64, 64),
                   "plain bn")
MOCO_V3_HEAD = mlp((512, 64, "no bias"), "bn", "relu", (64, 32, "no bias"), "plain bn")
BARLOW_HEAD = mlp((512, 64, "no bias"), "bn", "relu", (64, 48, "no bias"))
OTHER = {name: torch.rand_like(value.float()) for name, value in
         torchvision.models.resnet18(weights=None).state_dict().items()
         if "fc." not in name and "num_batches" not in name}
DINO_HEAD = {"head.mlp.0.weight": torch.randn(64, 512), "head.mlp.0.bias": torch.randn(64),
             "head.mlp.2.weight": torch.randn(32, 64), "head.mlp.2.bias": torch.randn(32),
             "head.last_layer.weight_g": torch.ones(90, 1),
             "head.last_layer.weight_v": torch.randn(90, 32)}
CLASSES = {"fc.weight": torch.randn(10, 512), "fc.bias": torch.randn(10)}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}


def numbered(weights):
    """The names of nn.Sequential(*list(resnet18().children())[:-1])."""
    order = [name for name, _ in torchvision.models.resnet18().named_children()]
    return {f"{order.index(name.split('.')[0])}.{name.split('.', 1)[1]}": value
            for name, value in weights.items()}


LAYOUTS = {         # name: file of a backbone's weights w, the head in it, the prefix
    "MoCo v1": (lambda w, h: dict(arch="resnet18", state_dict={
        **under("module.encoder_q.", {**w, **under("fc.", h)}),
        **under("module.encoder_k.", {**OTHER, **under("fc.", h)}),
        "module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1).long()}),
        nn.Linear(512, 128), "state_dict.module.encoder_q."),
    "MoCo v2 without module.": (lambda w, h: dict(state_dict=under("encoder_q.", {
        **w, **under("fc.", h)}), optimizer=OPTIMIZER), TWO_LAYERS, "state_dict.encoder_q."),
    "SwAV": (lambda w, h: {**under("module.", w), **under("module.projection_head.", h),
                           "module.prototypes.weight": torch.randn(30, 32)}, SWAV_HEAD, "module."),
    "SwAV, several prototypes": (lambda w, h: {
        **w, **under("projection_head.", h), "prototypes.prototypes0.weight": torch.randn(30, 128),
        "prototypes.prototypes1.weight": torch.randn(30, 128)}, TWO_LAYERS, ""),
    "SimCLR": (lambda w, h: dict(model=under("module.module.module.", {**w, **under("fc.", h)})),
               SWAV_HEAD, "model.module.module.module."),
    "a backbone": (lambda w, h: dict(w), None, ""),
    "DINO": (lambda w, h: dict(
        student=under("module.", {**under("backbone.", OTHER), **DINO_HEAD}), args=ARGS, epoch=3,
        teacher={**under("backbone.", w), **DINO_HEAD}, optimizer=OPTIMIZER,
        dino_loss={"center": torch.zeros(1, 90)}), None,
        "teacher.backbone."),
    "Barlow Twins": (lambda w, h: dict(epoch=1, model={
        **under("module.backbone.", w), **under("module.projector.", h),
        "module.bn.running_mean": torch.zeros(48), "module.bn.running_var": torch.ones(48),
        "module.bn.num_batches_tracked": torch.tensor(3)}), BARLOW_HEAD, "model.module.backbone."),
    "MoCo v3": (lambda w, h: dict(arch="resnet18", state_dict={
        **under("module.base_encoder.", {**w, **under("fc.", h)}),
        **under("module.momentum_encoder.", {**OTHER, **under("fc.", h)}),
        "module.predictor.0.weight": torch.randn(3, 3)}), MOCO_V3_HEAD,
        "state_dict.module.base_encoder."),
    "SimSiam": (lambda w, h: dict(arch="resnet18", state_dict={
        **under("module.encoder.", {**w, **under("fc.", h)}),
        **under("module.predictor.", TWO_LAYERS.state_dict())}), SIMSIAM_HEAD,
        "state_dict.module.encoder."),
    "a SEED student": (lambda w, h: dict(state_dict={
        **under("module.student.", {**w, **under("fc.", h)}),
        **under("module.teacher.", {**OTHER, **under("fc.", h)}), "module.queue": torch.ones(9)}),
        TWO_LAYERS, "state_dict.module.student."),
    "torchvision's reference": (lambda w, h: dict(model={**w, **CLASSES}, optimizer=OPTIMIZER,
                                                  epoch=3, args=ARGS), None, "model."),
    "numbers of NumPy": (lambda w, h: dict(
        state_dict={**w, **CLASSES}, best=np.float64(71.2), epoch=np.int64(3), top1=np.float32(1),
        history=np.zeros(3)), None, "state_dict."),
    "a name under model": (lambda w, h: dict(model="resnet18", state_dict={**w, **CLASSES}), None,
                           "state_dict."),
    "compiled": (lambda w, h: dict(model=under("_orig_mod.", w)), None, "model._orig_mod."),
    "lightly's MoCo": (lambda w, h: {
        **under("backbone.", numbered(w)), **under("backbone_momentum.", numbered(OTHER)),
        **under("projection_head.layers.", h), **under("projection_head_momentum.layers.", h)},
        TWO_LAYERS, "backbone."),
    "solo-learn's BYOL": (lambda w, h: dict(epoch=1, state_dict={
        **under("backbone.", w), **under("momentum_backbone.", OTHER), **under("projector.", h),
        **under("momentum_projector.", h), **under("predictor.", h),
        **under("classifier.", {"weight": torch.ones(10, 512), "bias": torch.ones(10)})}),
        SWAV_HEAD, "state_dict.backbone."),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_becomes_the_network_that_its_authors_evaluate(tmp_path, name):
    """A backbone under another prefix, the slow copy in place of the trained one, or a head that is
    left out or rebuilt otherwise: each would teach something else, and nothing would tell."""
    file, head, prefix = LAYOUTS[name]
    network = moco_network("resnet18", version=1)
    network.fc = nn.Identity()
    head_weights = head.state_dict() if head else {}
    torch.save(file(network.state_dict(), head_weights), tmp_path / "file.pth")
    teacher = load_teacher(tmp_path / "file.pth")
    x = torch.randn(2, 3, 64, 64)
    expected = network(x) if head is None else head(network(x))
    assert torch.allclose(teacher(x), F.normalize(expected, dim=1), atol=1e-5)
    assert torch.allclose(teacher.features(x), network(x), atol=1e-5)
    assert teacher.dim == expected.shape[1]
    assert teacher.arch == "resnet18"
    assert f"weights under '{prefix}'" in teacher.provenance
    assert teacher.provenance.endswith("matched 120/120 backbone keys")
    assert teacher.used_labels is (False if head else None)
    assert teacher.multi_crop == name.startswith("SwAV")
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    save_encoder(tmp_path / "encoder.pt", teacher, teacher.provenance, False)
    assert torch.equal(load_teacher(tmp_path / "encoder.pt")(x), teacher(x)), "as a file of ours"


def mutate(file, rng):
    """Change one thing in a checkpoint as accidents do: a nested dict, in place."""
    inner = [file]
    while inner:
        file = inner[rng.integers(len(inner))]
        inner = [value for value in file.values() if seed.flatten(value)]
        inner = [value for value in inner if isinstance(value, dict)]
    names = [name for name in file if isinstance(file[name], torch.Tensor)]
    name, other = rng.choice(names, 2)
    value = file[name]
    kind = rng.choice("drop rename swap shape transpose dtype nan code number cut prefix".split())
    if kind == "drop":
        del file[name]
    elif kind == "rename":
        others = [name + "x", name[:-1], f"x.{name}", name.replace(".", "_")]
        file[rng.choice(others)] = file.pop(name)
    elif kind == "swap":
        file[name] = file[other]
        file[other] = value
    elif kind == "shape":
        file[name] = torch.cat([value.reshape(-1), value.reshape(-1)])
    elif kind == "transpose":
        file[name] = value.T if value.ndim == 2 else value[None]
    elif kind == "dtype":
        file[name] = value.to(rng.choice([torch.float64, torch.int32, torch.bool, torch.float16]))
    elif kind == "nan":
        file[name] = torch.full_like(value.float(), rng.choice([math.nan, math.inf]))
    elif kind == "code":
        file[name] = RunsACommand()
    elif kind == "number":
        file[name] = float(value.float().sum())
    elif kind == "cut":
        file[name] = value[:0] if value.ndim else value
    elif kind == "prefix":
        for key in names:
            file[f"net.{key}"] = file.pop(key)


@slow
def test_no_mutated_checkpoint_becomes_another_network(tmp_path, monkeypatch):
    """A download that broke off, an edited file, or one made to run code: each would teach nonsense
    without a word, or end in a traceback."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    network = moco_network("resnet18", version=1)
    network.fc = nn.Identity()
    found = collections.Counter()
    for number in range(300):
        layout, head, prefix = LAYOUTS[rng.choice(list(LAYOUTS))]
        head_weights = head.state_dict() if head else {}
        file = copy.copy(layout(dict(network.state_dict()), dict(head_weights)))
        for _ in range(rng.integers(1, 3)):
            mutate(file, rng)
        torch.save(file, "file.pth")
        if number % 3 == 0:
            content = bytearray(Path("file.pth").read_bytes())
            for place in rng.integers(len(content), size=3):
                content[place] ^= 1 << rng.integers(8)
            Path("file.pth").write_bytes(content[:rng.choice([len(content), len(content) // 2])])
        try:
            teacher = load_teacher("file.pth")
        except InputError as e:
            assert "\n" not in str(e)
            found["refused"] += 1
            continue
        finally:
            assert not os.path.exists("exploded")
        found["loaded"] += 1
        weights = seed.name_children(seed.flatten(torch.load("file.pth", weights_only=False)))
        prefix = re.search("weights under '(.*?)'", teacher.provenance)[1]
        assert "_k." not in prefix and "momentum" not in prefix and "student.back" not in prefix
        for name, value in teacher.backbone.state_dict().items():
            if f"{prefix}{name}" in weights:                    # a counter may be missing
                kept = weights[f"{prefix}{name}"].to(value.dtype)
                assert torch.equal(kept.view_as(value), value)
            else:
                assert "num_batches_tracked" in name
        assert torch.isfinite(teacher(torch.randn(2, 3, 32, 32))).all()
    assert min(found["loaded"], found["refused"]) > 20, found


@pytest.mark.parametrize("name", ["head.fc.", "fc.1.", "linear.", "classifier.", "model.fc."])
def test_scores_of_classes_are_no_embedding(tmp_path, name):
    """mmpretrain, Lightning and code for transfer name them in their own ways; as an embedding they
    would teach the classes, and be called label-free."""
    network = moco_network("resnet18", version=1)
    network.fc = nn.Identity()
    scores = under(name, {"weight": torch.randn(10, 512), "bias": torch.randn(10)})
    prefix = {"model.fc.": "model.", "fc.1.": ""}.get(name, "backbone.")
    torch.save(dict(state_dict={**under(prefix, network.state_dict()), **scores}), tmp_path / "f")
    teacher = load_teacher(tmp_path / "f")
    assert teacher.dim == 512
    assert teacher.used_labels is None
    assert "no projection head" in teacher.provenance


def test_a_head_that_the_file_does_not_tell_is_refused(tmp_path):
    """A head without its bias, or with other layers between, would give other embeddings."""
    network = moco_network("resnet18", version=1)
    network.fc = nn.Identity()
    linear = {"weight": torch.randn(64, 512), "bias": torch.randn(64)}
    last = {"weight": torch.randn(32, 64), "bias": torch.randn(32)}
    norm = {"weight": torch.ones(48), "bias": torch.ones(48), "running_mean": torch.zeros(48),
            "running_var": torch.ones(48), "num_batches_tracked": torch.tensor(1)}
    no_bias = [{"weight": part["weight"]} for part in (linear, last)]
    for head, words in ((under("0.", linear) | under("3.", last), "what follows layer 0"),
                        (under("0.", no_bias[0]) | under("2.", no_bias[1]), "head.0.bias"),
                        (under("0.", linear) | under("1.", norm) | under("3.", last), "head.1.")):
        weights = {**network.state_dict(), **under("projection_head.", head)}
        torch.save(weights, tmp_path / "f")
        assert words in refusal(tmp_path / "f")
    head = under("proj.fc.", linear) | under("proj.bn.", norm)          # in which order?
    torch.save({**under("backbone.", network.state_dict()), **head}, tmp_path / "f")
    assert "proj.bn." in refusal(tmp_path / "f")


def test_a_network_that_segments_is_no_teacher(tmp_path):
    """Its backbone has the names of a ResNet, but other strides; the features would be others."""
    for entry in ("fcn_resnet50", "deeplabv3_resnet50"):
        network = getattr(torchvision.models.segmentation, entry)(weights_backbone=None)
        torch.save(network.state_dict(), tmp_path / "f")
        with pytest.raises(InputError):
            load_teacher(tmp_path / "f")


class SwavResNet(torchvision.models.ResNet):
    """A ResNet of another width, whose first convolution pads in two steps: an independent
    reference for SwAV's wide ResNets."""

    def __init__(self, block, counts, factor):
        super().__init__(block, counts)
        self.inplanes = 64 * factor
        self.conv1 = nn.Conv2d(3, 64 * factor, 7, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(64 * factor)
        for i, count in enumerate(counts):
            layer = self._make_layer(block, 64 * factor * 2**i, count, stride=min(i, 1) + 1)
            setattr(self, f"layer{i + 1}", layer)
        self.fc = nn.Identity()

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize("arch, block, counts, factor", [
    ("resnet18", "BasicBlock", [2, 2, 2, 2], 1), ("resnet34", "BasicBlock", [3, 4, 6, 3], 1),
    pytest.param("resnet18w2", "BasicBlock", [2, 2, 2, 2], 2, marks=slow),
    pytest.param("resnet50w2", "Bottleneck", [3, 4, 6, 3], 2, marks=slow)])
def test_depth_and_width_are_read_off_the_weights(tmp_path, arch, block, counts, factor):
    """The teacher of the paper's best rows, a SwAV ResNet-50x2, is no network of torchvision's."""
    network = SwavResNet(getattr(torchvision.models.resnet, block), counts, factor).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    width = 64 * 8 * factor * (4 if block == "Bottleneck" else 1)
    head = mlp((width, 16), "relu", (16, 8))                            # SwAV's w5: no batch norm
    torch.save({**under("module.", network.state_dict()),
                **under("module.projection_head.", head.state_dict())}, tmp_path / "swav.pth")
    x = torch.randn(2, 3, 64, 64)
    for flag in (None, arch, "resnet18") if arch == "resnet18w2" else (None,):
        teacher = load_teacher(tmp_path / "swav.pth", flag)
        assert teacher.arch == arch
        assert teacher.feature_dim == width
        expected = F.normalize(head(network(x)), dim=1)
        assert torch.allclose(teacher(x), expected, atol=1e-5), flag


def test_the_stem_is_read_off_the_weights(tmp_path):
    """A teacher trained on CIFAR has a 3x3 convolution and no max-pool in front."""
    network = torchvision.models.resnet18(weights=None).eval()
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    torch.save(network.state_dict(), tmp_path / "cifar.pth")
    network.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    teacher = load_teacher(tmp_path / "cifar.pth")
    assert teacher.small_images
    assert torch.allclose(teacher.features(x), network(x), atol=1e-5)


def test_a_file_that_leaves_a_choice_is_refused(tmp_path):
    """Which of two networks, or of two heads? One of them would be taken without a word."""
    path = tmp_path / "file.pth"
    torch.save(dict(model=OTHER, model_ema=OTHER), path)
    assert "holds several networks, under ['model.', 'model_ema.']; keep one" in refusal(path)
    heads = {**under("one.", TWO_LAYERS.state_dict()), **under("two.", TWO_LAYERS.state_dict())}
    torch.save({**OTHER, **heads}, path)
    assert "no part of torchvision's resnet18 or its head, such as one., two." in refusal(path)
    torch.save({**OTHER, "norm.0.weight": torch.ones(512), "norm.0.bias": torch.ones(512)}, path)
    assert "does not fit a resnet18: size mismatch for head.0.weight" in refusal(path)
    wide = {**OTHER, **under("fc.", mlp((99, 16), "relu", (16, 8)).state_dict())}
    torch.save(wide, path)
    assert "does not fit a resnet18: size mismatch for head.0.weight" in refusal(path)


def test_a_network_that_knows_its_version_resumes_and_comes_back(quick):
    """MNASNet refuses weights without it: a run would end before its table, and could not go on."""
    flags = ["--method", "supervised", "--arch", "mnasnet0_5", *TINY, "--out", "run"]
    train.main([*flags, "--max-steps", "1"])
    train.main([*flags, "--max-steps", "2"])
    encoder = load_teacher("run/encoder.pt")
    assert encoder.arch == "mnasnet0_5"
    saved = torch.load("run/encoder.pt", weights_only=True)
    assert same(encoder.backbone.state_dict(), saved["backbone"])


def test_a_broken_download_is_not_kept(tmp_path, monkeypatch):
    """A page that says "no quota" would be found again in each start."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pages = [b"<html>no quota left</html>"]

    def fetch(url, path):
        if pages:
            Path(path).write_bytes(pages.pop())
        else:
            torch.save(OTHER, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(InputError, match="it is a web page; download the file again"):
        load_teacher("https://example.org/file.pth")
    assert load_teacher("https://example.org/file.pth").arch == "resnet18"


def test_a_resnet_without_a_layer_is_no_other_resnet(tmp_path):
    """The line would speak of a network 'resnet17', which nobody has named."""
    weights = {name: value for name, value in OTHER.items() if "layer2.0.conv2" not in name}
    torch.save(dict(weights, arch=np.zeros(3), format=np.zeros(2)), tmp_path / "f")
    assert "a ResNet that torchvision does not know, or not all of one" in refusal(tmp_path / "f")


def test_students_of_the_authors_that_are_other_networks_are_refused(tmp_path):
    """Their MobileNet is not torchvision's; its teacher, in the same file, must not slip in."""
    path = tmp_path / "student.pth"
    blocks = {"blocks.0.weight": torch.ones(3, 3), "stem.weight": torch.ones(3, 3)}
    state = {**under("module.student.", blocks), **under("module.teacher.", OTHER)}
    torch.save(dict(arch="mobilenetv3_large_", state_dict=state), path)
    assert "no part of torchvision's resnet18" in refusal(path)
    torch.save(dict(arch="mobilenet_v3_large", state_dict=state), path)
    assert "does not fit torchvision's mobilenet_v3_large: 0 of " in refusal(path)


def test_the_last_checkpoint_of_a_run_is_a_teacher_too(quick, teacher_file):
    """Whoever kept last.pt alone would have to train again."""
    x = torch.randn(2, 3, 32, 32)
    for method in ("seed", "moco", "supervised"):
        flags = ["--method", method, "--arch", ARCH, "--out", method, *TINY]
        train.main([*flags, "--teacher", teacher_file] if method == "seed" else flags)
        kept = load_teacher(f"{method}/encoder.pt")
        last = load_teacher(f"{method}/last.pt")
        assert same(trained(last.state_dict()), trained(kept.state_dict()))
        last.load_state_dict(kept.state_dict())
        assert torch.equal(last(x), kept(x))
        for name in ("provenance", "used_labels", "image_size", "dim", "arch"):
            assert getattr(last, name) == getattr(kept, name), name


def test_a_network_of_torch_hub_teaches_by_its_output(tmp_path, monkeypatch):
    """DINOv2 and many others are there, and in no file that one could load otherwise."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "hubconf.py").write_text(
        "import torch\n"
        "def tiny(side=1):\n"
        "    torch.manual_seed(3)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 7, 3), torch.nn.BatchNorm2d(7),\n"
        "                               torch.nn.AdaptiveAvgPool2d(side), torch.nn.Flatten())\n"
        "def map(): return tiny()[:2]\n")
    name = f"hub:{tmp_path / 'repo'}:tiny"
    teacher = load_teacher(name)
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten()).eval()
    x = torch.randn(4, 3, 40, 40)
    assert torch.allclose(teacher(x), F.normalize(network(x), dim=1), atol=1e-6)
    assert (teacher.dim, teacher.feature_dim, teacher.used_labels) == (7, 7, None)
    assert not teacher.training
    teacher.check_image_size(32)
    for entry, words in (("map", "returns more than one vector"), ("nothing", "nothing")):
        with pytest.raises(InputError, match=words) as caught:
            load_teacher(f"hub:{tmp_path / 'repo'}:{entry}")
        assert "\n" not in str(caught.value)
    with open(tmp_path / "repo" / "hubconf.py", "a") as file:
        file.write("def untrained():\n"
                   "    return torch.nn.Sequential(torch.nn.Conv2d(3, 7, 8), torch.nn.Flatten())\n")
    with pytest.raises(InputError, match="untrained: some of its layers have random weights"):
        load_teacher(f"hub:{tmp_path / 'repo'}:untrained")
    asked = {}

    def hub_load(repo, entry, **options):
        asked.update(options, repo=repo, entry=entry)
        return network

    monkeypatch.setattr(torch.hub, "load", hub_load)
    load_teacher("hub:facebookresearch/dinov2:dinov2_vits14")
    assert asked == dict(repo="facebookresearch/dinov2", entry="dinov2_vits14", source="github",
                         trust_repo="check")                            # torch.hub asks the user


# --------------------------------------------------------------------------------------- the views
def test_uniforms_depend_on_seed_epoch_sample_and_view_alone():
    """Views must not depend on batch, worker, process or machine, or no run could be repeated."""
    u = uniforms(0, 0, range(8))
    assert u.shape == (8, seed.UNIFORMS)
    assert u.dtype == torch.float32
    assert torch.equal(uniforms(0, 0, [5]), u[5:6])
    assert torch.equal(uniforms(0, 0, torch.tensor([3, 1])), u[[3, 1]])
    for other in (uniforms(1, 0, range(8)), uniforms(0, 1, range(8)),
                  uniforms(0, 0, range(8), view=1), uniforms(0, 0, range(8, 16))):
        assert not (other == u).any()
    assert not torch.equal(uniforms(1, 2, [3]), uniforms(2, 1, [3]))


FULL = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x):
    """SplitMix64's output function with Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & FULL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & FULL
    return x ^ (x >> 31)


@pytest.mark.parametrize("number, epoch, view, index", [
    (0, 0, 0, 0), (3, 2, 1, 7), (-1, 10**6, 2, 1_281_166)])
def test_uniforms_are_splitmix64(number, epoch, view, index):
    """With other numbers a run could not be resumed by a later version of this code."""
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF                            # published: seed 0
    x = 0
    for word in (number, epoch, view, index):
        x = mix(((x ^ word & FULL) + GOLDEN) & FULL)
    counters = [x + GOLDEN * j & FULL for j in range(1, seed.UNIFORMS + 1)]
    expected = [(mix(counter) >> 40) / 2**24 for counter in counters]
    assert uniforms(number, epoch, [index], view)[0].tolist() == expected


def test_uniforms_are_uniform_and_independent():
    """A poor hash would give each image the same few crops."""
    u = torch.cat([uniforms(0, epoch, range(5000)) for epoch in range(4)]).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert len(u.unique()) > 0.95 * u.numel() * (1 - u.numel() / 2**25)
    assert (u.mean(dim=0) - 0.5).abs().max() < 0.01
    assert (u.var(dim=0) - 1 / 12).abs().max() < 0.005
    assert (torch.corrcoef(u.T) - torch.eye(seed.UNIFORMS)).abs().max() < 0.03
    two_epochs = torch.stack([u[:5000, 0], u[5000:10000, 0]])
    assert torch.corrcoef(two_epochs)[0, 1].abs() < 0.05


def smooth_images(n=4, height=40, width=48):
    """Random colors that change slowly: an error of half a pixel shows, noise does not hide it."""
    x = F.interpolate(torch.rand(n, 3, 7, 7), (height, width), mode="bicubic")
    return x.clamp(0, 1)


def smooth_bytes(n=4, height=40, width=48):
    """The same as uint8."""
    return (255 * smooth_images(n, height, width)).round().to(torch.uint8)


def unchanging(n=1):
    """Random numbers with which `augment` changes nothing, if it does not crop."""
    return torch.full((n, seed.UNIFORMS), 0.999)


def denormalized(view):
    """The view in [0, 1] again."""
    mean = torch.tensor(seed.IMAGENET_MEAN).view(1, 3, 1, 1)
    return view * torch.tensor(seed.IMAGENET_STD).view(1, 3, 1, 1) + mean


@pytest.mark.parametrize("size", [16, 32, 64])
def test_crop_and_resize_is_torchvisions(size):
    """Without antialiasing, or half a pixel off, accuracy is lost that nobody can explain."""
    x = torch.rand(4, 3, 40, 48)
    boxes = torch.tensor([[0, 0, 40, 48], [3, 5, 20, 30], [10, 10, 7, 9], [39, 47, 1, 1]])
    ours = seed.crop_and_resize(x, boxes.float(), size)
    for i, box in enumerate(boxes.tolist()):
        theirs = T.resized_crop(x[i], *box, [size, size], antialias=True)
        assert (ours[i] - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("column, operation", [
    (seed.BRIGHTNESS, T.adjust_brightness), (seed.CONTRAST, T.adjust_contrast),
    (seed.SATURATION, T.adjust_saturation)])
def test_color_operations_are_torchvisions(column, operation):
    """Settings of other code bases would mean something else here."""
    x = torch.rand(5, 3, 20, 30)
    factors = torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4])
    u = unchanging(5)
    u[:, seed.JITTER] = 0
    u[:, [seed.BRIGHTNESS, seed.CONTRAST, seed.SATURATION, seed.HUE]] = 0.5     # factor 1, hue 0
    u[:, column] = (factors - 0.6) / 0.8
    ours = denormalized(augment(x, u, scale=None))
    for i, factor in enumerate(factors.tolist()):
        assert (ours[i] - operation(x[i], factor)).abs().max() < 1e-4


def test_the_hue_is_torchvisions():
    """Settings of other code bases would mean something else here."""
    x = torch.rand(5, 3, 20, 30)
    x[:, :, 0, :3] = torch.tensor([0.0, 0.5, 1.0])                      # black, gray and white
    shift = torch.tensor([-0.1, -0.03, 0.0, 0.07, 0.5])
    ours = seed.adjust_hue(x, shift.view(5, 1, 1, 1))
    for i in range(5):
        assert (ours[i] - T.adjust_hue(x[i], shift[i].item())).abs().max() < 1e-4
    gray = torch.full((1, 3, 4, 4), 0.3)
    assert torch.allclose(seed.adjust_hue(gray, torch.full((1, 1, 1, 1), 0.3)), gray)


@pytest.mark.parametrize("height, width", [(20, 30), (7, 7)])
def test_blur_is_torchvisions(height, width):
    """With its kernel of 13 and mirrored borders; 7 px is the smallest side it allows."""
    x = torch.rand(4, 3, height, width)
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    ours = seed.gaussian_blur(x, sigma)
    for i in range(4):
        theirs = T.gaussian_blur(x[i], [13, 13], [sigma[i].item()] * 2)
        assert (ours[i] - theirs).abs().max() < 1e-4


def slow_view(image, row, size):
    """The view of one image [3, H, W] by torchvision's functions; row: U floats."""
    box = crop_box(torch.tensor([row]), *image.shape[1:])
    x = seed.crop_and_resize(image[None] / 255, box, size)[0]
    if row[seed.FLIP] < 0.5:
        x = T.horizontal_flip(x)
    x = T.adjust_brightness(x, 1 + 0.4 * (2 * row[seed.BRIGHTNESS] - 1))
    x = T.adjust_contrast(x, 1 + 0.4 * (2 * row[seed.CONTRAST] - 1))
    x = T.adjust_saturation(x, 1 + 0.4 * (2 * row[seed.SATURATION] - 1))
    x = T.adjust_hue(x, 0.1 * (2 * row[seed.HUE] - 1))
    if row[seed.GRAY] < 0.2:
        x = T.rgb_to_grayscale(x, 3)
    return T.gaussian_blur(x, [13, 13], [0.1 + 1.9 * row[seed.SIGMA]] * 2)


def test_a_view_is_torchvisions_chain_with_the_same_numbers():
    """In another order, or with swapped columns, the views would be other than MoCo-v2's."""
    images = smooth_bytes(6)
    u = uniforms(0, 0, range(100))
    u = u[(u[:, seed.JITTER] < 0.8) & (u[:, seed.BLUR] < 0.5)][:6]
    u[:3, seed.FLIP] = 0.6
    u[3:, seed.FLIP] = 0.1
    u[:3, seed.GRAY] = 0.3
    u[3:, seed.GRAY] = 0.1
    ours = denormalized(augment(images, u, 32))
    assert ours.shape == (6, 3, 32, 32)
    for i, row in enumerate(u.tolist()):
        assert (ours[i] - slow_view(images[i], row, 32)).abs().max() < 2 / 255


@pytest.mark.parametrize("name, p", [("FLIP", 0.5), ("GRAY", 0.2), ("BLUR", 0.5), ("JITTER", 0.8)])
def test_each_switch_has_mocos_probability(name, p):
    """Weaker views make the task too easy."""
    image = smooth_bytes(1, 32, 32)
    plain = augment(image, unchanging(), 32, scale=None)
    assert torch.allclose(denormalized(plain), image / 255, atol=1e-5)
    u = unchanging()
    u[:, getattr(seed, name)] = p + 0.01
    assert torch.allclose(augment(image, u, 32, scale=None), plain, atol=1e-4)
    u[:, getattr(seed, name)] = p - 0.01
    assert not torch.allclose(augment(image, u, 32, scale=None), plain, atol=1e-4)


def test_blur_can_be_switched_off():
    """Small images are trained without it, as in MoCo's CIFAR demonstration."""
    image = smooth_bytes(1, 32, 32)
    u = unchanging()
    u[:, seed.BLUR] = 0
    plain = augment(image, unchanging(), scale=None)
    assert torch.equal(augment(image, u, scale=None, blur=False), plain)
    assert not torch.allclose(augment(image, u, scale=None), plain, atol=1e-4)


def test_a_view_does_not_depend_on_its_neighbors():
    """Otherwise one process and two would not see the same images."""
    images = smooth_bytes(6)
    u = uniforms(3, 1, range(6))
    together = augment(images, u, 24)
    assert torch.equal(together, augment(images, u, 24))                # the same each time
    for i in range(6):
        alone = augment(images[i:i + 1], u[i:i + 1], 24)
        assert torch.allclose(together[i:i + 1], alone, atol=1e-5)


def test_normalize_is_that_of_every_imagenet_checkpoint():
    """A published teacher expects it; otherwise it would see images unlike those it knows."""
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert torch.allclose(seed.normalize(white).flatten(), expected)
    x = torch.rand(2, 3, 4, 4)
    theirs = T.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(seed.normalize(x), theirs, atol=1e-6)
    assert seed.normalize(x.double()).dtype == torch.float32


@pytest.mark.parametrize("scale", [(0.2, 1.0), None])
def test_a_view_leaves_the_images_as_they_are(scale):
    """The data set lies in memory: an operation in place would change it for all later epochs."""
    images = smooth_bytes()
    floats = images / 255
    images_before = images.clone()
    floats_before = floats.clone()
    u = uniforms(0, 0, range(4))
    u[0] = unchanging()                                                 # one that nothing copies
    u_before = u.clone()
    of_bytes = augment(images, u, scale=scale)
    assert of_bytes.dtype == torch.float32
    assert torch.allclose(augment(floats, u, scale=scale), of_bytes, atol=1e-5)
    assert torch.equal(images, images_before)
    assert torch.equal(floats, floats_before)
    assert torch.equal(u, u_before)


def test_a_view_is_as_high_as_the_image_unless_a_size_is_given():
    """Networks are built for one size; images need not be square."""
    images = smooth_bytes(2)
    u = uniforms(0, 0, range(2))
    assert augment(images, u).shape == (2, 3, 40, 40)
    assert augment(images, u, 24).shape == (2, 3, 24, 24)
    assert augment(images, u, scale=None).shape == (2, 3, 40, 48)


def test_augment_refuses_what_does_not_fit():
    """A crop of another size than asked, or numbers of other images, would not be noticed."""
    images = smooth_bytes()
    u = uniforms(0, 0, range(4))
    for bad_images in (images[:, :, 0], images[:, :1]):
        with pytest.raises(ValueError, match="expected images"):
            augment(bad_images, u, 24)
    for bad_u in (u[:2], u[:, 1:]):
        with pytest.raises(ValueError, match="expected images"):
            augment(images, bad_u, 24)
    with pytest.raises(ValueError, match="40 px cannot become 24 px"):
        augment(images, u, 24, scale=None)


def slow_crop_box(row, height, width, scale):
    """The box of one image with loops: the first of ten tries that fits, or the largest box."""
    for area_number, ratio_number in zip(row[seed.AREA], row[seed.RATIO]):
        area = (scale[0] + area_number * (scale[1] - scale[0])) * height * width
        ratio = (3 / 4) * (16 / 9) ** ratio_number                      # 3/4 .. 4/3, even in log
        h = math.sqrt(area / ratio)
        w = math.sqrt(area * ratio)
        if h <= height and w <= width:
            break
    else:
        h = min(height, width * 4 / 3)
        w = min(width, height * 4 / 3)
    return [row[seed.TOP] * (height - h), row[seed.LEFT] * (width - w), h, w]


@pytest.mark.parametrize("height, width", [(40, 48), (500, 200), (1000, 10), (10, 1000)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.14, 1.0)])
def test_crop_boxes_are_the_first_try_that_fits(height, width, scale):
    """In memory and from disk an image has the same box only if the rule is exactly this one."""
    u = uniforms(5, 2, range(200))
    boxes = crop_box(u, height, width, scale)
    expected = [slow_crop_box(row, height, width, scale) for row in u.tolist()]
    assert torch.allclose(boxes, torch.tensor(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("height, width", [(320, 320), (300, 400), (500, 200)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    """Area 0.2 to 1 of the image, aspect ratio 3/4 to 4/3, anywhere inside: with larger crops the
    task would be easier and teach less."""
    u = torch.cat([uniforms(0, epoch, range(5000)) for epoch in range(2)])
    ours = crop_box(u, height, width)
    top, left, h, w = ours.unbind(1)
    assert ours.dtype == torch.float32
    assert min(top.min(), left.min()) >= 0
    assert (top + h).max() <= height * 1.0001
    assert (left + w).max() <= width * 1.0001
    image = torch.empty(3, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(10000)])
    deciles = torch.linspace(0.1, 0.9, 9).double()
    for measure in (box_area, box_ratio, box_top, box_left):
        our_deciles = measure(ours.double()).quantile(deciles)
        their_deciles = measure(theirs.double()).quantile(deciles)
        spread = their_deciles[-1] - their_deciles[0]
        assert ((our_deciles - their_deciles).abs() / spread).max() < 0.05


def box_area(box):
    return box[:, 2] * box[:, 3]


def box_ratio(box):
    return box[:, 3] / box[:, 2]


def box_top(box):
    return box[:, 0]


def box_left(box):
    return box[:, 1]


def test_small_crops_are_small():
    """The paper's multi-crop setting: 0.05 to 0.14 of the image."""
    share = box_area(crop_box(uniforms(0, 0, range(2000)), 100, 100, (0.05, 0.14))) / 1e4
    assert 0.0499 < share.min() < 0.052
    assert 0.138 < share.max() < 0.1401


def test_without_color_a_view_is_cropped_and_flipped_alone():
    """The paper's linear probe would be trained on images that look like no test image."""
    x = smooth_images(6)
    u = uniforms(0, 3, range(6))
    view = augment(x, u, 24, (0.3, 0.6), color=False)
    cropped = seed.crop_and_resize(x, crop_box(u, 40, 48, (0.3, 0.6)), 24)
    flipped = u[:, seed.FLIP] < 0.5
    assert 0 < flipped.sum() < 6
    cropped[flipped] = cropped[flipped].flip(3)
    assert torch.allclose(view, seed.normalize(cropped), atol=1e-5)


# ----------------------------------------------------------------------------------------- the toy
def test_the_toy_runs(capsys):
    """`python seed.py` is the first thing that a reader tries, and its table is explained there."""
    seed.toy()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "step" in line]
    rows = [dict(zip(line[::2], map(float, line[1::2]))) for line in lines]
    for row in rows:
        assert row["loss"] == pytest.approx(row["kl"] + row["entropy"], abs=0.011)
        assert row["loss_of_a_copy"] >= row["entropy"]
        assert 0 <= row["self_prob"] <= 1
    assert [row["step"] for row in rows] == [0, 3, 10, 30, 100, 300]
    assert [row["queue_filled"] for row in (rows[0], rows[-1])] == [0, 1]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss_of_a_copy"], abs=0.5)
    assert rows[-1]["kl"] < 0.6 * rows[0]["kl"]
    assert rows[-1]["top1_agreement"] > 0.3


def test_seed_py_needs_no_other_file():
    """Whoever copies this one file must be able to use it."""
    modules = set()
    for node in ast.walk(ast.parse(Path(seed.__file__).read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    assert "torch" in modules
    assert not modules & {"train", "probe"}
    assert modules <= set(sys.stdlib_module_names) | {"numpy", "torch", "torchvision"}


# ---------------------------------------------------------------------------------- the evaluation
def slow_knn_label(query, x, y):
    """The label with the most votes among the ten images most similar to the query, with loops."""
    similarity = F.cosine_similarity(query[None], x)
    votes = {}
    for i in similarity.argsort(descending=True)[:10].tolist():
        votes[int(y[i])] = votes.get(int(y[i]), 0.0) + max(0.0, similarity[i].item())
    return max(votes, key=votes.get)


def test_knn_is_a_vote_of_the_ten_nearest():
    """Every kNN accuracy of the README would be another number than the one it is said to be."""
    x = torch.randn(200, 6) + 1
    y = torch.randint(0, 4, (200,))
    queries = torch.randn(600, 6) + 1
    answers = torch.tensor([slow_knn_label(query, x, y) for query in queries])
    assert knn(x, y, queries, answers) == 100
    assert knn(x, y, x, y, k=1) == 100
    answers[:150] += 1
    assert knn(x, y, queries, answers) == 75


def test_a_neighbor_votes_with_its_similarity():
    """Three distant images would outvote two near ones; published figures weigh the votes."""
    angles = torch.tensor([0.1, 0.1, 1.3, 1.3, 1.3])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    y = torch.tensor([0, 0, 1, 1, 1])
    assert knn(x, y, torch.tensor([[5.0, 0.0]]), torch.tensor([0])) == 100


def test_the_linear_probe_learns_what_is_linear_at_any_scale():
    """One list of learning rates serves every network, so the scale of features must not count."""
    x = torch.randn(1200, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    for scale in (1e-8, 1.0, 1e4):
        found, _ = linear_probe(scale * x[:1000], y[:1000], scale * x[1000:], y[1000:])
        assert found > 92
    found, _ = linear_probe(x[:1000], torch.randint(0, 3, (1000,)), x[1000:], y[1000:])
    assert found < 60, "random labels teach nothing"


def test_the_linear_probe_bears_constant_features_and_other_test_images():
    """A feature without variance would be divided by 0; test images would be scaled by their own
    statistics, which one class alone shifts."""
    x = torch.randn(1200, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    x[:, 5] = 3.0
    for label in range(3):
        only = y[1000:] == label
        assert linear_probe(x[:1000], y[:1000], x[1000:][only], y[1000:][only])[0] > 80


def test_the_linear_probe_is_the_papers_sgd():
    """With another recipe no accuracy could be compared with a published one."""
    x = torch.randn(300, 6)
    y = torch.randint(0, 3, (300,))
    layers = probe.fit_linear(x, y, torch.arange(300), 3, [0.01, 0.3], epochs=10)
    expected = nn.Linear(6, 3)
    nn.init.zeros_(expected.weight)
    nn.init.zeros_(expected.bias)
    sgd = torch.optim.SGD(expected.parameters(), 0.3, momentum=0.9)
    for epoch in range(10):
        drops = sum(1 for milestone in (6, 8) if epoch >= milestone)
        sgd.param_groups[0]["lr"] = 0.3 * 0.1**drops
        order = np.random.default_rng(epoch).permutation(300)
        for batch in (order[:256], order[256:]):
            sgd.zero_grad()
            F.cross_entropy(expected(x[batch]), y[batch]).backward()
            sgd.step()
    assert len(layers) == 2
    assert torch.allclose(layers[1].weight, expected.weight, atol=1e-5)
    assert torch.allclose(layers[1].bias, expected.bias, atol=1e-5)
    assert not torch.allclose(layers[0].weight, expected.weight, atol=1e-2)
    assert probe.fit_linear.__defaults__ == (100, 256)


def test_the_linear_probe_never_looks_at_the_test_labels_to_choose(monkeypatch):
    """A learning rate chosen on the test images would make every accuracy too high."""
    sizes = []
    fit_linear = probe.fit_linear

    def recorded(x, y, rows, *args):
        sizes.append(len(rows))
        return fit_linear(x, y, rows, *args)

    monkeypatch.setattr(probe, "fit_linear", recorded)
    x = torch.randn(300, 8)
    y = x[:, :3].argmax(1)
    for rates in ((0.0, 0.1), (0.1, 0.0)):
        assert linear_probe(x[:200], y[:200], x[200:], y[200:], rates)[1] == 0.1, "the better one"
    assert sizes == [180, 200, 180, 200], "chosen on a tenth held out, then fitted to all"
    y = torch.randint(0, 3, (300,))
    chosen = set()
    for test_y in (y[200:], torch.zeros(100, dtype=torch.long), y[:100]):
        chosen.add(linear_probe(x[:200], y[:200], x[200:], test_y)[1])
    assert len(chosen) == 1


@pytest.fixture
def few_shapes(monkeypatch):
    """The built-in data set with 250 training and 100 test images."""
    def draw_few_shapes(n, split):
        return draw_all_shapes(n // 20, split)

    monkeypatch.setattr(probe, "draw_shapes", draw_few_shapes)


def test_evaluate_uses_the_features_of_normalized_test_images(few_shapes):
    """Accuracy on training images, or features of images as the network never saw them, would
    stand in the table."""
    encoder = Encoder("resnet18", image_size=32)
    data = load_data("shapes", subset=200)
    scores, (_, _, train_x, test_x) = evaluate(encoder, data)
    assert encoder.training, "an evaluation during training must not end it"
    encoder.eval()
    with torch.no_grad():
        for split, found in ((data.train, train_x), (data.test, test_x)):
            expected = encoder.features(seed.normalize(split.pixels))
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    evaluate(encoder, data, linear=False)
    assert not encoder.training
    material = (train_x, data.train.labels, test_x, data.test.labels)
    assert scores["knn"] == knn(*material)
    assert (scores["linear"], scores["rate"]) == linear_probe(*material)


def test_an_evaluation_of_a_part_has_images_of_all_classes(few_shapes):
    """Folders are sorted by class: kNN would look at 8 of ImageNet's 1,000 classes."""
    encoder = Encoder(ARCH, image_size=32)
    data = load_data("shapes")
    data.train = data.train.subset(data.train.labels.argsort(stable=True))
    scores, material = evaluate(encoder, data, limit=50, linear=False)
    assert [len(part) for part in material] == [50] * 4
    assert len(material[0].labels.unique()) > 10
    assert scores["linear"] is scores["rate"] is None
    again = evaluate(encoder, data, limit=50, linear=False)[1]
    assert torch.equal(material[0].pixels, again[0].pixels), "the same part in each epoch"


def test_an_evaluation_resizes_images_to_the_networks_size(few_shapes):
    """An encoder trained at 48 px would be evaluated on images of 32 px."""
    pixels = draw_all_shapes(4, 0).pixels
    [(samples, views)] = probe.test_views(Split(pixels=pixels), 48, CPU, 0)
    assert samples.tolist() == [0, 1, 2, 3]
    expected = T.resize(pixels / 255, [48, 48], antialias=True)
    assert torch.allclose(views, seed.normalize(expected), atol=1e-4)
    assert torch.equal(probe.resize(pixels, 32), pixels / 255)


def framed_colors(path, rows, columns, side):
    """The colors of the frames in a grid by `save_grid`: a list of rows."""
    grid = np.asarray(Image.open(path))
    cell = side * max(1, 96 // side) + 10
    colors = []
    for row in range(rows):
        colors.append([tuple(grid[row * cell + 3, column * cell + 3]) for column in range(columns)])
    return colors


def test_the_grid_of_neighbors_shows_them_in_order_and_the_right_ones_in_green(tmp_path):
    """The README's grid would show other images than the nearest, or call wrong ones right."""
    pixels = torch.arange(6)[:, None, None, None].repeat(1, 3, 32, 32) * 40
    train_split = Split(pixels=pixels.to(torch.uint8), labels=torch.tensor([0, 1, 0, 1, 0, 1]))
    test_split = train_split.subset([2, 5])
    angles = torch.arange(6) * 0.2
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    path = tmp_path / "neighbors.png"
    probe.save_neighbors(path, train_split, test_split, x, x[[2, 5]], 32, k=2)
    grid = np.asarray(Image.open(path))
    y = 50 if grid[50, 50, 0] == 80 else 156                    # the row of image 2
    tiles = grid[y, 50::106, 0].tolist()
    assert tiles[:2] == [80, 80], "the image, and itself as the nearest"
    assert tiles[2] in (40, 120)
    for row in framed_colors(path, 2, 3, 32):
        assert row[0] == (255, 255, 255)
        assert row[1][1] > 150 > row[1][0], "green: the same label"
        assert row[2][0] > 200 > row[2][1], "red: another label"
    test_split.labels = None
    probe.save_neighbors(path, train_split, test_split, x, x[[2, 5]], 32, k=2)
    assert framed_colors(path, 2, 3, 32) == [[(255, 255, 255)] * 3] * 2


def test_the_grid_of_views_shows_images_and_what_augmentation_makes_of_them(tmp_path, few_shapes):
    """Whoever checks the augmentation by this image would look at another one."""
    data = load_data("shapes")
    probe.save_views(tmp_path / "views.png", data, (0.1, 0.3), True, seed=3, columns=3, count=2)
    grid = np.asarray(Image.open(tmp_path / "views.png"))
    for row in range(2):
        top = 6 + 106 * row
        shown = torch.tensor(grid[top + 1:top + 97:3, 7:103:3]).permute(2, 0, 1)
        assert torch.equal(shown, data.train.pixels[row])
        u = uniforms(3, 1, [row])
        view = augment(data.train.pixels[row:row + 1], u, 32, (0.1, 0.3), True)
        mean = torch.tensor(seed.IMAGENET_MEAN).view(3, 1, 1)
        view = (view[0] * torch.tensor(seed.IMAGENET_STD).view(3, 1, 1) + mean).clamp(0, 1)
        shown = torch.tensor(grid[top + 1:top + 97:3, 219:315:3]).permute(2, 0, 1)
        assert (shown / 255 - view).abs().max() < 2 / 255


# ---------------------------------------------------------------------------------------- the data
def write_images(root, names, size=(40, 30)):
    """Image files of one color each."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {".webp": "RGBA", ".bmp": "L"}.get(path.suffix, "RGB")
        Image.new("RGB", size, (i * 29 % 256, i * 71 % 256, 90)).convert(mode).save(path)


def write_image(path, image, **options):
    """One image file of a float [3, H, W] in [0, 1]."""
    pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_a_folder_may_have_training_and_test_images(tmp_path, val):
    """The test images of the user's own split would be trained on, or not be found."""
    for label in "xy":
        write_images(tmp_path, [f"train/{label}/{i}.png" for i in range(4)])
        write_images(tmp_path, [f"{val}/{label}/0.JPG"])
    data = load_data("folder", tmp_path, 16)
    assert data.has_labels
    assert data.classes == ["x", "y"]
    assert (len(data.train), len(data.test)) == (8, 2)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.pixels.shape == (8, 3, 16, 16)


def test_a_folder_may_have_class_folders_alone(tmp_path):
    """A tenth is held out; a test image that is also trained on would make accuracies too high."""
    for label in "xyz":
        names = [f"{label}/{'deep/' * (i % 2)}{i}.webp" for i in range(10)]
        write_images(tmp_path, names)
    data = load_data("folder", tmp_path, 16)
    assert data.has_labels
    assert data.classes == ["x", "y", "z"]
    assert (len(data.train), len(data.test)) == (27, 3)
    assert not set(data.train.files) & set(data.test.files)
    for split in (data.train, data.test):
        folders = [Path(file).relative_to(tmp_path).parts[0] for file in split.files]
        assert folders == [data.classes[label] for label in split.labels]
    again = load_data("folder", tmp_path, 16, seed=1)
    assert again.test.files == data.test.files, "always the same tenth"


@pytest.mark.parametrize("names, words", [
    (("Training/a/1.png", "Training/b/2.png", "Test/a/3.png"), "Test and Training, which are no"),
    (("train2017/1.png", "test2017/2.png"), "test2017 and train2017, which are no"),
    (("train/a/1.png", "train/b/2.png", "val/readme.txt"), "no image in")])
def test_splits_of_other_names_are_no_classes(tmp_path, names, words):
    """A network would be praised for telling training images from test images; or evaluated on
    nothing, after days."""
    write_images(tmp_path, [name for name in names if name.endswith("png")])
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=words):
        load_data("folder", tmp_path, 16)


def test_a_folder_may_have_no_labels(tmp_path):
    """Files that are no images, or hidden copies of them, would be read as images."""
    names = [f"{i}.bmp" for i in range(20)]
    write_images(tmp_path / "a", [*names, "._hidden.png", ".hidden/2.png", "sub/1.png"])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = load_data("folder", tmp_path / "a", 16)
    assert not data.has_labels
    assert data.classes == []
    assert data.train.labels is data.test.labels is None
    assert (len(data.train), len(data.test)) == (19, 2)
    assert str(data).endswith("left out in %s: 1 .txt" % (tmp_path / "a"))
    write_images(tmp_path / "b", [f"only/{i}.png" for i in range(4)])
    assert not load_data("folder", tmp_path / "b", 16).has_labels, "one class is no label"


def test_a_folder_is_the_same_data_set_wherever_it_is_named_from(tmp_path, monkeypatch):
    """The same command from another directory would be refused as another run; and a run would go
    on although its images are other ones."""
    for label in "xy":
        write_images(tmp_path / "a", [f"{label}/{i}.png" for i in range(6)])
    monkeypatch.chdir(tmp_path / "a")
    for size in (16, 80):
        here = load_data("folder", ".", size).fingerprint
        assert load_data("folder", tmp_path / "a", size).fingerprint == here
    image = Image.new("RGB", (40, 30), (1, 2, 3))
    image.save(tmp_path / "a" / "x" / "0.png")
    assert load_data("folder", ".", 16).fingerprint != load_data("folder", ".", 80).fingerprint
    os.rename("x/0.png", "x/new.png")
    assert load_data("folder", ".", 80).fingerprint != here, "another name"


def test_pixels_and_labels_are_part_of_the_fingerprint(few_shapes, monkeypatch):
    """A run would go on with changed images or labels, half with these and half with those."""
    before = load_data("shapes").fingerprint
    for part, change in (("pixels", 255), ("labels", 19)):
        def draw_changed_shapes(n, split, part=part, change=change):
            drawn = draw_all_shapes(n // 20, split)
            getattr(drawn, part)[7] = change
            return drawn

        monkeypatch.setattr(probe, "draw_shapes", draw_changed_shapes)
        assert load_data("shapes").fingerprint != before


def test_small_images_are_decoded_once_and_large_ones_are_not(tmp_path):
    """ImageNet would be read into memory; or images of 32 px would be decoded in each epoch."""
    write_images(tmp_path, [f"{i}.png" for i in range(4)])
    assert load_data("folder", tmp_path, 64).train.pixels.shape == (3, 3, 64, 64)
    assert load_data("folder", tmp_path, 65).train.pixels is None
    assert load_data("folder", tmp_path).image_size == 224
    sizes = [probe.native_size(name) for name in probe.DATASETS]
    assert sizes == [32, 32, 32, 224, 224]


def test_sixteen_bits_of_gray_are_scaled_and_not_clipped(tmp_path):
    """Medical and depth images would be white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    [crop] = probe.read_crops(tmp_path / "ramp.png", [64], probe.center_box(64))
    assert np.abs(crop[0, 0].numpy() - np.linspace(0, 255, 64)).max() <= 1


def test_gray_images_of_many_bits_are_scaled_by_what_they_hold(tmp_path):
    """Measurements and depth would be black, or white."""
    gray = np.linspace(0, 1, 64)[None].repeat(64, 0)
    for name, pixels in (("float.tif", gray.astype(np.float32)),
                         ("float255.tif", (255 * gray).astype(np.float32)),
                         ("int255.tif", (255 * gray).astype(np.int32)),
                         ("twelve.png", (4095 * gray).astype(np.uint16)),
                         ("sixteen.png", (65535 * gray).astype(np.uint16)),
                         ("eight.png", (255 * gray).astype(np.uint8))):
        Image.fromarray(pixels).save(tmp_path / name)
        [crop] = probe.read_crops(tmp_path / name, [64], probe.center_box(64))
        assert np.abs(crop[0, 0].numpy() - np.linspace(0, 255, 64)).max() <= 1, name


@pytest.mark.parametrize("name", ["image.jpg", "image.tif", "image.png"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_read_as_it_is_displayed(tmp_path, name, turn):
    """A phone's photos would lie on their side, some of them."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:32, :64, 0] = 255                                           # the corners differ
    pixels[32:, :64, 1] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    options = dict(tiffinfo={274: turn}) if name.endswith("tif") else dict(exif=exif)
    Image.fromarray(pixels).save(tmp_path / name, **options)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
    assert shown.shape[:2] == ((64, 128) if turn < 5 else (128, 64))

    def whole(height, width):
        assert (height, width) == shown.shape[:2]
        return [(0, 0, height, width)]

    [crop] = probe.read_crops(tmp_path / name, [32], whole)
    expected = Image.fromarray(shown).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(crop.permute(1, 2, 0).numpy() - np.asarray(expected, float)).mean() < 3


def test_what_pillow_can_open_is_read_and_the_rest_is_counted(tmp_path):
    """Half of a data set might be missing, without a word."""
    image = Image.new("RGB", (40, 30), (200, 10, 10))
    for name in ("a.jfif", "b.JPE", "c", "d.jpeg"):
        image.save(tmp_path / name, format="JPEG")
    image.save(tmp_path / "e.png")
    for name in ("notes.txt", "more.txt", "f.heic", "README"):
        (tmp_path / name).write_text("no image")
    data = load_data("folder", tmp_path, 16)
    assert len(data.train) + len(data.test) == 5
    assert f"left out in {tmp_path}: 2 .txt, " in str(data)
    assert "1 .heic" in str(data) and "1 no ending" in str(data)


def test_each_directory_is_read_once_however_many_links_lead_to_it(tmp_path):
    """A link upwards would multiply the images, and put test images among the training images."""
    for label in "ab":
        write_images(tmp_path / label, [f"{i}.png" for i in range(6)])
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink("a", tmp_path / "again")
    data = load_data("folder", tmp_path, 16)
    assert len(data.train) + len(data.test) == 12
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_flat_val_folder_is_not_used_for_accuracy(tmp_path, name):
    """ImageNet from Kaggle has one; without a word there would be no accuracy at all."""
    for label in "xy":
        write_images(tmp_path / "train" / label, [f"{i}.png" for i in range(10)])
    write_images(tmp_path, ["val/1.png", "val/2.png"])
    data = load_data(name, tmp_path, 16)
    assert data.has_labels
    assert (len(data.train), len(data.test)) == (18, 2)
    assert "val has no class folders, so a part of" in str(data)


@pytest.mark.parametrize("names, refused, allowed", [
    (["1.png", "2.png", "3.png"], ["data", "data/runs/x"], ["elsewhere", "data-runs"]),
    (["train/a/1.png", "train/b/1.png", "val/a/1.png"], ["data/train/run", "data/val", "data/test"],
     ["data/runs/x", "elsewhere"])])
def test_nothing_is_written_among_the_images(tmp_path, monkeypatch, names, refused, allowed):
    """A run's views.png would be a training image from the second run on."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", names)
    for out in refused:
        with pytest.raises(InputError, match="would lie among the images of data"):
            probe.refuse_among_data(out, "folder", "data")
    for out in allowed:
        probe.refuse_among_data(out, "folder", "data")
    probe.refuse_among_data(refused[0], "shapes", "data")
    monkeypatch.chdir(tmp_path / "data" / Path(names[0]).parent)
    flags = f"--dataset folder --data {tmp_path / 'data'} --image-size 32 --device cpu".split()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="would lie among"):            # the teacher's folder
        train.main([*flags, "--arch", ARCH, "--batch-size", "2", "--out", str(tmp_path / "else")])
    with pytest.raises(InputError, match="would lie among"):
        probe.main([f"random:{ARCH}", *flags])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name, names, words", [
    ("folder", [], "no image in"),
    ("folder", ["1.png", ".hidden/2.png"], "1 image in"),
    ("folder", ["train/x/1.png", "train/y/1.png", "val/z/1.png"], "lacks: z"),
    ("imagenet", ["1.png", "2.png"], "train/ and val/"),
    ("imagenet", ["train/1.png", "train/2.png", "val/x/1.png"], "folder for each class")])
def test_a_directory_that_does_not_fit_is_one_clear_line(tmp_path, name, names, words):
    """The error would come during training, or as a traceback, or not at all."""
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", names)
    with pytest.raises(InputError, match=words) as caught:
        load_data(name, tmp_path / "images", 16)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_and_a_broken_file_are_named(tmp_path):
    """A traceback after an hour of reading would not say which file to remove."""
    with pytest.raises(InputError, match="no directory .*nothing"):
        load_data("folder", tmp_path / "nothing")
    write_images(tmp_path, [f"{i}.png" for i in range(12)])
    for subset in (100, 0, -1):
        with pytest.raises(InputError, match=f"--subset {subset}: there are 11 "):
            load_data("folder", tmp_path, 16, subset=subset)
    for i in (3, 5):
        (tmp_path / f"{i}.png").write_bytes(b"no image at all")
    with pytest.raises(InputError, match="2 of 11 images cannot be read, such as .*3.png, .*5.png"):
        load_data("folder", tmp_path, 16)


def test_a_crop_from_disk_is_the_crop_from_memory(tmp_path):
    """The same view of an image would be another one if the image lies on disk."""
    x = smooth_images(1, 120, 160)
    path = tmp_path / "image.png"
    write_image(path, x[0])
    views = [(48, (0.1, 0.9)), (48, (0.1, 0.9)), (20, (0.05, 0.14))]
    crops = probe.Crops([str(path)], views, seed=7)
    for epoch in range(5):
        images, e, index, read = crops[(epoch, 0)]
        assert [image.shape for image in images] == [(3, 48, 48), (3, 48, 48), (3, 20, 20)]
        assert (e, index, read) == (epoch, 0, 0)
        for view, (size, scale) in enumerate(views):
            assert images[view].dtype == torch.uint8
            box = crop_box(uniforms(7, epoch, [0], view), 120, 160, scale)
            from_memory = seed.crop_and_resize(x, box, size)[0]
            assert (from_memory - images[view] / 255).abs().max() < 4 / 255


def crop_of_file(path, box, boxes):
    """What `read_crops` makes of one of some boxes, float [3, 64, 64] in [0, 1]."""
    def choose_boxes(height, width):
        return boxes

    return probe.read_crops(path, [64] * len(boxes), choose_boxes)[boxes.index(box)] / 255


def test_a_large_jpeg_is_decoded_small_without_losing_the_crop(tmp_path):
    """The decoder skips work (1/2, 1/4, 1/8); the crop could come from another place, or be
    blurred."""
    path = tmp_path / "image.jpg"
    x = smooth_images(1, 700, 900)
    write_image(path, x[0], quality=95)
    whole = (0.0, 0.0, 700.0, 900.0)
    for box in ((100.0, 200.0, 500.0, 600.0), whole, (300.5, 310.5, 64.0, 70.0)):
        expected = seed.crop_and_resize(x, torch.tensor([box]), 64)[0]
        assert (crop_of_file(path, box, [box]) - expected).abs().mean() < 3 / 255
    stripes = (torch.arange(900) // 4 % 2).float().expand(1, 3, 700, 900)    # 1/8 would lose them
    write_image(path, stripes[0], quality=95)
    small = (300.0, 310.0, 64.0, 64.0)
    expected = seed.crop_and_resize(stripes, torch.tensor([small]), 64)[0]
    for boxes in ([small], [whole, small], [small, whole]):
        assert (crop_of_file(path, small, boxes) - expected).abs().mean() < 0.05


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    """Reading would be several times slower, and the GPU would wait for it."""
    path = tmp_path / "image.jpg"
    write_image(path, smooth_images(1, 700, 900)[0])
    sizes = []
    resize = Image.Image.resize

    def recorded(image, *args, **options):
        sizes.append(image.size)
        return resize(image, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    crop_of_file(path, (0.0, 0.0, 700.0, 900.0), [(0.0, 0.0, 700.0, 900.0)])
    assert sizes == [(113, 88)]


def test_the_test_view_is_the_center_of_the_image(tmp_path):
    """Of another view than "resize to 256, cut out 224", no accuracy compares with a published
    one."""
    assert probe.center_box(224)(256, 320) == [(16, 48, 224, 224)]
    assert probe.center_box(32)(30, 40) == [(0, 5, 30, 30)]
    x = smooth_images(1, 300, 400)
    write_image(tmp_path / "image.png", x[0])
    expected = T.center_crop(T.resize(x, 256, antialias=True), 224)[0]
    split = Split(files=[str(tmp_path / "image.png")])
    assert (probe.test_image(split, 0, 224) - expected).abs().mean() < 2 / 255


def test_shapes_are_the_same_everywhere_and_not_trivial():
    """The README's table rests on them; if kNN on raw pixels did as well, it would say nothing."""
    data = load_data("shapes")
    assert (len(data.train), len(data.test), len(data.classes)) == (5000, 2000, 20)
    for split, count in ((data.train, 250), (data.test, 100)):
        assert split.labels.bincount().tolist() == [count] * 20
    torch.manual_seed(1)
    assert torch.equal(draw_all_shapes(100, split=0).pixels, data.train.pixels[:100])
    train_images = {image.numpy().tobytes() for image in data.train.pixels}
    assert not train_images & {image.numpy().tobytes() for image in data.test.pixels}
    train_x = seed.normalize(data.train.pixels).flatten(1)
    test_x = seed.normalize(data.test.pixels[:1000]).flatten(1)
    assert knn(train_x, data.train.labels, test_x, data.test.labels[:1000]) < 30


def test_a_subset_is_chosen_by_the_seed(few_shapes):
    """Two methods on different subsets could not be compared."""
    one = load_data("shapes", subset=100, seed=0)
    again = load_data("shapes", subset=100, seed=0)
    other = load_data("shapes", subset=100, seed=1)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
    assert (len(one.train), len(one.test)) == (100, 100)
    assert len(one.train.labels.unique()) == 20


def test_cifar_is_read_through_torchvision_and_a_failed_download_is_explained(tmp_path,
                                                                             monkeypatch):
    """A user without a network would see a traceback, and not what to do."""
    class FewImages:
        filename = "cifar-10-python.tar.gz"
        classes = list("abcdefghij")

        def __init__(self, root, train, download):
            n = 6 if train else 4
            self.data = (np.arange(n * 32 * 32 * 3) % 256).astype(np.uint8).reshape(n, 32, 32, 3)
            self.targets = list(range(n))

    def refused(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FewImages)
    data = load_data("cifar10", tmp_path)
    assert data.has_labels
    assert data.train.pixels.shape == (6, 3, 32, 32)
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert data.train.pixels[0, :, 0, 1].tolist() == [3, 4, 5], "channels first"
    monkeypatch.setattr(FewImages, "__init__", refused)
    with pytest.raises(InputError, match=r"put cifar-10-python.tar.gz into .* --dataset shapes"):
        load_data("cifar10", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FewImages)
    with pytest.raises(InputError, match="cannot download cifar100"):
        load_data("cifar100", tmp_path)


# ------------------------------------------------------------------------------------ the settings
def make_cfg(*flags, method="seed"):
    """All settings of a stage, from its flags."""
    args = train.parse_args(["--device", "cpu", "--method", method, *flags])
    return train.make_config(args, method)


def test_imagenet_gets_the_papers_settings():
    """Whoever runs the paper's experiment would run another one."""
    cfg = make_cfg("--dataset", "imagenet")
    expected = dict(queue_size=65536, tau_s=0.2, tau_t=0.01, lr=0.03, weight_decay=1e-4, epochs=200,
                    warmup_epochs=5, batch_size=256, dim=128, hidden_dim=None,
                    crop_scale=(0.2, 1.0), blur=True, image_size=224)
    assert {key: getattr(cfg, key) for key in expected} == expected
    assert make_cfg("--dataset", "imagenet", method="moco").key_momentum == 0.999
    assert make_cfg("--dataset", "folder").epochs == 200
    assert make_cfg("--dataset", "folder", "--image-size", "65").epochs == 200


def test_a_flag_beats_the_recipe_and_a_methods_flag_stays_with_the_method():
    """--lr of the student would change its teacher and its rivals, too."""
    args = train.parse_args(["--lr", "0.5", "--batch-size", "64"])
    own = train.make_config(args, "seed")
    rival = train.make_config(args, "moco")
    assert own.lr == 0.5
    assert rival.lr == train.METHOD_CHANGES["shapes", "moco"]["lr"]
    assert own.batch_size == rival.batch_size == 64
    flags = ("--lr 9 --weight-decay 9 --queue-size 9 --tau-s 9 --tau-t 9 --dim 9 --hidden-dim 9 "
             "--view-epochs 9").split()
    without = train.make_config(train.parse_args([]), "moco")
    with_flags = train.make_config(train.parse_args(flags), "moco")
    assert vars(without) == vars(with_flags)


def test_the_recipes_are_those_of_the_tables():
    """A number changed in passing would make the README's tables and commands disagree."""
    keys = ("lr", "weight_decay", "queue_size", "tau_s", "tau_t", "key_momentum", "epochs",
            "batch_size")

    def recipe(name, method):
        cfg = make_cfg("--dataset", *name.split(), method=method)
        return [getattr(cfg, key) for key in keys]

    assert recipe("shapes", "seed") == [0.4, 1e-4, 2048, 0.2, 0.05, 0.999, 6, 64]
    assert recipe("shapes", "moco") == [0.06, 1e-4, 256, 0.2, 0.01, 0.99, 6, 64]
    assert recipe("shapes", "supervised")[:2] == [0.1, 1e-4]
    assert recipe("cifar10", "seed") == [0.2, 1e-4, 4096, 0.2, 0.01, 0.999, 200, 256]
    assert recipe("cifar100", "seed") == recipe("cifar10", "seed")
    assert recipe("cifar10", "moco") == [0.03, 5e-4, 4096, 0.1, 0.01, 0.99, 200, 256]
    assert recipe("cifar10", "supervised")[:2] == [0.1, 5e-4]
    small = "folder --image-size 64"
    assert recipe(small, "seed") == [0.1, 1e-4, 2048, 0.2, 0.05, 0.999, 20, 128]
    assert recipe(small, "moco") == [0.06, 1e-4, 2048, 0.2, 0.01, 0.99, 20, 128]
    assert recipe(small, "supervised") == [0.1, 1e-4, 2048, 0.2, 0.01, 0.999, 20, 128]


def test_help_shows_the_recipe_of_every_data_set(capsys):
    """The defaults that a user reads would not be those that run."""
    with pytest.raises(SystemExit) as ended:
        train.parse_args(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if "imagenet, folder" in line)
    rows = {}
    for line in lines[header + 1:]:
        rows[line[:18].strip()] = [line[i:i + 18].strip() for i in range(18, len(line), 18)]
    assert list(rows) == list(train.PAPER)
    flags = [["shapes"], ["cifar100"], ["folder", "--image-size", "32"], ["imagenet"]]
    names = [lines[header][i:i + 18].strip() for i in range(18, len(lines[header]), 18)]
    assert names == ["shapes", "cifar", "folder, to 64 px", "imagenet, folder"]
    for column, words in enumerate(flags):
        cfg = make_cfg("--dataset", *words)
        for key, cells in rows.items():
            assert cells[column] == str(getattr(cfg, key)), f"{key} of {words[0]}"


def test_help_shows_the_other_defaults(capsys):
    """A user would not know which seed two runs have in common."""
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: auto)" in text
    assert "(default: False)" not in text
    assert "of weights, views, order and subset (default: 0)" in text


def test_the_learning_rate_warms_up_and_falls_to_zero():
    """A rate that is too high at the start makes the loss explode; one that does not fall to 0,
    or that depends on where a run was stopped, costs accuracy."""
    cfg = make_cfg(*"--epochs 10 --warmup-epochs 2 --lr 0.1 --batch-size 512".split())
    rates = [train.lr_at(step, cfg, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.2 / 100)
    assert rates[99] == rates[100] == max(rates) == pytest.approx(0.2)
    assert rates[300] == pytest.approx(0.1)
    assert rates[-1] < 1e-5
    assert np.all(np.diff(rates[:100]) > 0)
    assert np.all(np.diff(rates[100:]) < 0)
    cfg = make_cfg(*"--epochs 1 --warmup-epochs 5".split())
    assert cfg.warmup_epochs == 0.5
    assert train.lr_at(99, cfg, 100) < 0.01 * cfg.lr, "a short run falls to zero, too"
    peak = cfg.lr * cfg.batch_size / 256
    assert max(train.lr_at(step, cfg, 39) for step in range(39)) <= peak, "19.5 steps of warm-up"
    cfg = make_cfg("--warmup-epochs", "0")
    assert train.lr_at(0, cfg, 39) == pytest.approx(cfg.lr * cfg.batch_size / 256)


@pytest.mark.parametrize("flag", ["--weight-decay 9", "--batch-size 9", "--tau-s 9", "--tau-t 9",
                                  "--queue-size 9", "--warmup-epochs 0",
                                  "--hidden-dim 9", "--image-size 40", "--small-images",
                                  "--arch resnet18", "--view-epochs 1", "--dim 9", "--lr 9",
                                  "--epochs 9", "--seed 9", "--subset 9"])
def test_another_setting_is_another_run(few_shapes, flag):
    """Resumed under it, half a run would be one experiment and half another."""
    data = load_data("shapes", subset=8)
    identity = train.run_identity(make_cfg(), data)
    assert train.run_identity(make_cfg(*flag.split()), data) != identity


def test_what_leaves_the_experiment_as_it_is_may_change_before_a_run_goes_on(few_shapes):
    """A run could not be resumed on a machine with other cores, disks or folders."""
    flags = ("--workers 3 --data elsewhere --out elsewhere --teacher file --eval-every 3 "
             "--max-steps 3 --compare --compile --teacher-cache elsewhere").split()
    data = load_data("shapes", subset=8)
    other = make_cfg(*flags)
    other.device = "cuda"
    assert train.run_identity(other, data) == train.run_identity(make_cfg(), data)


BAD_INPUT = [
    (["--arch", "mobilenet_v3"], "did you mean .*mobilenet_v3_large"),
    (["--teacher", "nothing.pt"], "no such file"),
    (["--dataset", "folder", "--data", "nowhere"], "no directory .*nowhere"),
    (["--dataset", "imagenet", "--data", "."], "train/ and val/"),
    (["--batch-size", "6000"], "--batch-size 6000: there are 250 training images"),
    (["--batch-size", "1"], "--batch-size must be from 2 to"),
    (["--subset", "6000"], "--subset 6000: there are 250"),
    (["--lr", "-1"], "--lr must be from 1e-09 to 1000, got "),
    (["--lr", "nan"], "--lr must be from 1e-09 to 1000, got "),
    (["--lr", "inf"], "--lr must be from 1e-09 to 1000, got "),
    (["--tau-t", "0"], "--tau-t must be from 1e-06 to "),
    (["--epochs", "0"], "--epochs must be from 1 to "),
    (["--weight-decay", "-1"], "--weight-decay must be from 0 to 10, got "),
    (["--weight-decay", "inf"], "--weight-decay must be from 0 to 10, got "),
    (["--seed", "-1"], "--seed must be from 0 to "),
    (["--method", "sed"], "invalid choice"),
    (["--lr", "fast"], "invalid float"),
    (["--arch", "vit_b_16"], "vit_b_16 cannot be an encoder at 32 px"),
    (["--method", "moco", "--teacher-cache", "cache"], "only for --method seed: --teacher-cache"),
    (["--method", "supervised", "--teacher", "file"], "only for --method seed: --teacher$"),
    (["--device", "cuda:99"], "no device")]


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_is_an_error_before_any_training(tmp_path, monkeypatch, few_shapes, flags,
                                                   words):
    """The mistake would show after hours, or leave a folder in which the next run is refused."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        train.main(["--device", "cpu", *flags])
    assert "\n" not in probe.one_line(caught.value)
    assert not list(tmp_path.iterdir())


def test_numbers_that_may_be_zero_may_be_zero():
    """No weight decay, or no evaluation on the way, could not be asked for."""
    flags = ("--weight-decay 0 --warmup-epochs 0 --hidden-dim 0 --workers 0 --eval-every 0 "
             "--seed 0").split()
    cfg = make_cfg(*flags)
    assert cfg.weight_decay == cfg.warmup_epochs == cfg.hidden_dim == cfg.workers == 0
    assert cfg.eval_every == cfg.seed == 0


NUMBERS = ("0 1 2 3 8 16 24 32 64 16 32 1 2 48 7 33 97 500 -1 1e-3 0.05 0.3 1.5 1e9 -1e9 1e400 "
           "nan inf -inf 1e-400 99999999999999999999 18446744073709551616 x 1_0 0x10").split()
VALUES = dict(
    method=["seed", "moco", "supervised", "byol"], precision=["fp32", "bf16", "auto", "fp64"],
    device=["cpu", "cuda", "tpu"], dataset=["shapes", "folder", "imagenet", "cifar"],
    arch=[ARCH, "resnet18", "mobilenet_v3_small", "squeezenet1_0", "nothing", ""],
    teacher=["teacher.pt", "nothing.pt", "images", "hub:images:x", "http://localhost:1/x"],
    teacher_arch=[ARCH, "resnet18", "nothing"], teacher_method=["moco", "supervised", "seed"],
    data=["images", "nothing", "teacher.pt", "."], out=["run", "teacher.pt", "images/run"],
    init=["teacher.pt", "nothing.pt"], teacher_cache=["cache", "teacher.pt"])
SWITCHES = ["--small-images", "--symmetric", "--compare", "--no-small-images", "--unknown", "more"]


@slow
def test_any_list_of_arguments_runs_or_is_one_line(quick, capsys, teacher_file):
    """A traceback says nothing to whoever made a slip in typing; and it may come after hours."""
    rng = np.random.default_rng(0)
    shutil.copy(teacher_file, "teacher.pt")
    gray_images(Path("images"), 40)
    ended = collections.Counter()
    failed = []
    for _ in range(300):
        flags = [*TINY, *"--max-steps 1 --workers 0 --out run --save-minutes 0".split()]
        flags += ["--arch", ARCH, "--teacher-arch", ARCH]
        for _ in range(rng.integers(1, 4)):
            kind = rng.integers(6)
            if kind == 0:
                flags.append(str(rng.choice(SWITCHES)))
            elif kind < 3:
                name = str(rng.choice(list(VALUES)))
                flags += [f"--{name.replace('_', '-')}", str(rng.choice(VALUES[name]))]
            else:
                name = str(rng.choice(list(probe.RANGES)))
                flags.append(f"--{name.replace('_', '-')}={rng.choice(NUMBERS)}")
        try:
            train.main(flags)
            ended["ran"] += 1
        except (InputError, FloatingPointError) as e:
            assert "\n" not in probe.one_line(e), flags
            ended["refused"] += 1
        except MemoryError:
            ended["memory"] += 1
        except Exception as e:
            failed.append((flags[24:], repr(e)[:200]))
        shutil.rmtree("run", ignore_errors=True)
        capsys.readouterr()
    assert not failed
    assert min(ended["ran"], ended["refused"]) > 50, ended


def test_workers_are_shared_among_the_processes_of_a_machine(monkeypatch):
    """Eight processes would start eight times as many workers as there are cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert make_cfg().workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make_cfg().workers == probe.parse_args(["x"]).workers == 3, "of 12 that may be used"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert make_cfg().workers == 1
    monkeypatch.delattr(os, "sched_getaffinity")                # macOS
    assert make_cfg().workers == 4


# ------------------------------------------------------------------------------------- the batches
def test_any_number_of_processes_sees_the_same_batches():
    """The number of GPUs would change the experiment."""
    cfg = make_cfg("--batch-size", "12")
    one = [probe.samples_of_step(step, 50, cfg) for step in range(9)]
    assert [epoch for epoch, _ in one] == [0] * 4 + [1] * 4 + [2]
    for world_size in (2, 3):
        for step, (epoch, samples) in enumerate(one):
            parts = []
            for rank in range(world_size):
                parts.append(probe.samples_of_step(step, 50, cfg, rank, world_size))
            joined = np.stack([part for _, part in parts], axis=1).reshape(-1)
            assert np.array_equal(joined, samples)
            assert {part_epoch for part_epoch, _ in parts} == {epoch}
    first_epoch = np.concatenate([samples for epoch, samples in one if epoch == 0])
    assert len(first_epoch) == len(set(first_epoch)) == 48, "no image twice in an epoch"
    assert not np.array_equal(one[0][1], one[4][1]), "another order in the next epoch"
    cfg.seed = 1
    assert not np.array_equal(one[0][1], probe.samples_of_step(0, 50, cfg)[1]), "by another seed"


def test_repeated_views_come_in_another_order():
    """With --view-epochs, MoCo's and SEED's batches would repeat with the views."""
    cfg = make_cfg(*"--batch-size 10 --epochs 5 --view-epochs 2".split())
    planned = [probe.samples_of_step(step, 20, cfg) for step in range(10)]
    assert [epoch for epoch, _ in planned[::2]] == [0, 1, 0, 1, 0]
    assert not np.array_equal(planned[0][1], planned[4][1])


@pytest.fixture
def folder_of_images(tmp_path):
    """24 JPEG files of noise in two class folders."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (90, 100, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.jpg")
    return tmp_path / "images"


def test_workers_do_not_change_a_view(folder_of_images):
    """The number of processes that read would change the experiment."""
    cfg = make_cfg(*"--dataset folder --image-size 72 --batch-size 8 --seed 3".split())
    cfg.crop_scale = (0.1, 0.4)
    data = load_data("folder", folder_of_images, 72)
    assert data.train.pixels is None
    runs = []
    for workers in (0, 2):
        cfg.workers = workers
        views = [(72, (0.1, 0.4)), (72, (0.1, 0.4)), (30, (0.05, 0.1))]
        runs.append(list(probe.batches(data.train, cfg, CPU, views, range(3, 6))))
    assert [len(run) for run in runs] == [3, 3]
    for batch, other in zip(*runs):
        assert [x.shape for x in batch.views] == [(8, 3, size, size) for size, _ in views]
        assert not torch.equal(batch.views[0], batch.views[1])
        assert all(torch.equal(x, y) for x, y in zip(batch.views, other.views))
        assert torch.equal(batch.labels, other.labels)
        assert batch.epoch == other.epoch
        assert np.array_equal(batch.samples, other.samples)
    first = runs[1][0]
    order = np.random.default_rng((3, 1)).permutation(len(data.train))[8:16]    # of step 3
    assert np.array_equal(first.samples, order)
    assert torch.equal(first.labels, data.train.labels[order])
    crops = probe.Crops(data.train.files, views, 3)
    for v in range(3):
        images = torch.stack([crops[1, int(i)][0][v] for i in order])
        once = augment(images, uniforms(3, 1, order, v), scale=None, blur=cfg.blur)
        assert torch.allclose(first.views[v], once, atol=1e-5), "cropped once, not twice"


def gray_images(folder, count, side=80, broken=()):
    """Images in two class folders; image i is of gray 2 * i; those in `broken` are cut in half."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (2 * i,) * 3).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])


@pytest.fixture
def none_skipped(monkeypatch):
    """No image has been named before."""
    monkeypatch.setattr(probe, "SKIPPED", set())


@pytest.mark.parametrize("size", [72, 32])
def test_an_unreadable_image_is_skipped_and_named_once(tmp_path, capsys, none_skipped, size):
    """One bad file among a million would end a run; or every label behind it would be another's."""
    gray_images(tmp_path, 120, broken=[31])
    cfg = make_cfg(*f"--dataset folder --image-size {size} --batch-size 16 --seed 3".split())
    data = load_data("folder", tmp_path, size)
    assert (data.train.pixels is None) == (size == 72)
    runs = []
    for workers in (0, 2):
        cfg.workers = workers
        runs.append(list(probe.batches(data.train, cfg, CPU, [(size, (0.2, 1.0))], range(14))))
    for batch, other in zip(*runs):
        assert torch.equal(batch.views[0], other.views[0]), "the same stands in for it"
        assert np.array_equal(batch.samples, other.samples)
    for batch in runs[0]:
        assert len(batch.labels) == 16
        for sample, label in zip(batch.samples, batch.labels):
            number = int(Path(data.train.files[sample]).stem)
            assert number != 31
            assert label == number % 2
    class GrayValue(Encoder):
        def features(self, x):
            return x[:, :1].mean((2, 3)).expand(-1, 1024)

    network = GrayValue(ARCH, 8, image_size=size)
    for workers in (0, 2):
        x, split = probe.extract_features(network, data.train, CPU, workers)
        gray = (255 * (x[:, 0] * seed.IMAGENET_STD[0] + seed.IMAGENET_MEAN[0])).round().int() // 2
        assert len(x) == len(split) == len(split.labels) == 107
        assert 31 not in gray
        assert torch.equal(gray % 2, split.labels.int()), "none is shifted"
        assert [int(Path(file).stem) for file in split.files] == gray.tolist()
    out = capsys.readouterr().out
    assert out.count("031.png cannot be read and is skipped") == 1
    assert out.count("cannot be read") == 1


def test_an_epoch_with_an_unreadable_image_has_all_others(tmp_path, none_skipped):
    """Whatever stands in must not push another image out."""
    gray_images(tmp_path, 100)
    data = load_data("folder", tmp_path, 72)
    cfg = make_cfg(*"--dataset folder --image-size 72 --batch-size 10 --workers 0".split())
    seen = set()
    broken = data.train.files[4]
    Path(broken).write_bytes(b"")
    for batch in probe.batches(data.train, cfg, CPU, [(72, (0.2, 1.0))], range(9)):
        seen.update(data.train.files[sample] for sample in batch.samples)
    assert seen == {*data.train.files} - {broken}


@pytest.mark.parametrize("size", [72, 32])
def test_too_many_unreadable_images_are_counted_and_named(tmp_path, none_skipped, size):
    """A copy of the data that broke off would become another data set without a word."""
    gray_images(tmp_path, 60, broken=range(20, 60))
    cfg = make_cfg(*f"--dataset folder --image-size {size} --batch-size 16".split())
    cfg.workers = 0
    with pytest.raises(InputError, match="[0-9]+ (of 54 )?images cannot be read, such as.*0.*png"):
        data = load_data("folder", tmp_path, size)
        list(probe.batches(data.train, cfg, CPU, [(size, (0.2, 1.0))], range(3)))
    network = Encoder(ARCH, 8, image_size=72)
    with pytest.raises(InputError, match="[0-9]+ (of 54 )?images cannot be read, such as.*0.*png"):
        probe.extract_features(network, load_data("folder", tmp_path, 72).train)


def test_a_batch_of_unreadable_images_is_an_error(tmp_path, none_skipped):
    """They are few among many, but the batch would be one of strangers."""
    gray_images(tmp_path, 111)
    files = load_data("folder", tmp_path, 72).train.files      # 100
    cfg = make_cfg(*"--dataset folder --image-size 72 --batch-size 2 --workers 0".split())
    cfg.batch_size = 1                                          # as on one of two processes
    [first] = probe.samples_of_step(0, len(files), cfg)[1]
    Path(files[first]).write_bytes(b"")
    data = load_data("folder", tmp_path, 72)
    assert len(data.train) == 100
    with pytest.raises(InputError, match="1 of 100 images cannot be read, such as"):
        next(probe.batches(data.train, cfg, CPU, [(72, (0.2, 1.0))], range(3)))


def test_a_run_goes_on_without_an_unreadable_image(quick, capsys, none_skipped):
    """The grid of views at the start would end it, or the neighbors in the end, if not the
    training."""
    gray_images(Path("pics"), 40, broken=[0])
    flags = f"--dataset folder --data pics --image-size 72 --arch {ARCH} --method moco".split()
    train.main([*flags, *"--batch-size 8 --epochs 1 --device cpu --workers 0 --out run".split()])
    assert capsys.readouterr().out.count("000.png cannot be read") == 1
    words = "run/encoder.pt --dataset folder --data pics --device cpu --workers 0".split()
    probe.main(words)
    assert Path("run/neighbors.png").exists()


def test_a_pipe_is_not_an_image(tmp_path, none_skipped):
    """Whoever opens it waits for ever."""
    gray_images(tmp_path, 30)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    os.mkfifo(tmp_path / "a" / "pipe")
    data = load_data("folder", tmp_path, 32)
    assert len(data.train) + len(data.test) == 30
    with pytest.raises(InputError, match="cannot read the image .*pipe.png"):
        probe.read_crops(tmp_path / "a" / "pipe.png", [32], probe.center_box(32))


def test_whatever_a_decoder_raises_is_an_unreadable_image(tmp_path, monkeypatch):
    """Pillow's plugins raise a dozen kinds of errors; each would end a run of days."""
    write_images(tmp_path, ["a.png"])
    for error in (IndexError("x"), struct.error("x"), KeyError("x"), EOFError()):
        def broken(path, error=error):
            raise error

        monkeypatch.setattr(Image, "open", broken)
        with pytest.raises(InputError, match="cannot read the image"):
            probe.read_crops(tmp_path / "a.png", [32], probe.center_box(32))


def test_a_lack_of_memory_is_not_an_unreadable_image(tmp_path, monkeypatch):
    """Another image would be trained on in its place, and nothing would tell."""
    write_images(tmp_path, ["a.png"])
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):
        def lacking(path, error=error):
            raise error

        monkeypatch.setattr(Image, "open", lacking)
        with pytest.raises(type(error)) as caught:
            probe.read_crops(tmp_path / "a.png", [32], probe.center_box(32))
        assert not isinstance(caught.value, InputError)


def test_a_split_of_unreadable_images_is_an_error(tmp_path, none_skipped):
    """Of a single test image nothing would be left, which ends in a traceback."""
    for size in (32, 72):
        files = [str(tmp_path / "a.png")]
        split = Split(files=files, labels=torch.tensor([0]))
        Path(files[0]).touch()
        with pytest.raises(InputError, match="1 of 1 images cannot be read|1 images cannot be re"):
            probe.decode(split, 32)
        with pytest.raises(InputError, match="images cannot be read"):
            probe.extract_features(Encoder(ARCH, 8, image_size=72), split)


def test_processes_that_read_leave_the_signals_to_the_main_one(folder_of_images):
    """Ctrl-C goes to all processes of a terminal: without its readers the main one cannot finish
    the step."""
    cfg = make_cfg(*"--dataset folder --image-size 72 --batch-size 4 --workers 2".split())
    data = load_data("folder", folder_of_images, 72)
    loader = probe.batches(data.train, cfg, CPU, [(72, (0.2, 1.0))], range(12))
    for _ in range(2):                                          # one of each
        next(loader)
    readers = torch.multiprocessing.active_children()
    assert len(readers) >= 2
    assert all(os.getpgid(reader.pid) != os.getpgrp() for reader in readers)
    assert len(list(loader)) == 10


def test_images_from_disk_are_evaluated_by_their_test_view(folder_of_images):
    """Random crops instead would lower every accuracy on ImageNet by a little."""
    split = load_data("folder", folder_of_images, 72).train
    parts = list(probe.test_views(split, 72, CPU, workers=0, batch_size=5))
    views = torch.cat([x for _, x in parts])
    assert torch.cat([samples for samples, _ in parts]).tolist() == list(range(len(split)))
    many = Split(pixels=torch.zeros(100, 3, 8, 8, dtype=torch.uint8))
    for size, counts in ((72, [32, 32, 32, 4]), (32, [100])):   # fewer are faster on a CPU
        assert [len(x) for _, x in probe.test_views(many, size, "cpu", 0)] == counts
    for i in (3, 20):
        assert torch.equal(views[i], seed.normalize(probe.test_image(split, i, 72)[None])[0])


def test_a_batch_has_the_planned_images_each_with_its_own_random_numbers(few_shapes):
    """With two equal views, or the same view in each epoch, MoCo would learn nothing, although its
    loss would fall."""
    cfg = make_cfg("--batch-size", "16")
    cfg.crop_scale = (0.1, 0.4)
    cfg.blur = True
    cfg.seed = 3
    data = load_data("shapes", subset=64)
    steps = range(3, 6)
    views = [(32, (0.1, 0.4)), (32, (0.1, 0.4)), (16, (0.05, 0.2))]
    found = list(probe.batches(data.train, cfg, CPU, views, steps))
    assert len(found) == 3
    for step, batch in zip(steps, found):
        epoch, samples = probe.samples_of_step(step, 64, cfg)
        assert batch.epoch == epoch
        assert np.array_equal(batch.samples, samples)
        assert torch.equal(batch.labels, data.train.labels[samples])
        assert batch.wait > 0
        assert len(batch.views) == 3
        for v, view in enumerate(batch.views):
            u = uniforms(3, epoch, samples, v)
            size, scale = views[v]
            expected = augment(data.train.pixels[samples], u, size, scale, True)
            assert torch.allclose(view, expected, atol=1e-5)
            assert view.is_contiguous(memory_format=torch.channels_last)


def test_images_without_labels_make_batches_without_labels(few_shapes):
    """SEED and MoCo could not be trained on a directory of images."""
    split = Split(pixels=draw_all_shapes(8, 0).pixels)
    [batch] = probe.batches(split, make_cfg("--batch-size", "8"), CPU, ONE_VIEW, [0])
    assert batch.labels is None


# ---------------------------------------------------------------------------------------- the loop
TINY = ("--subset 96 --batch-size 16 --epochs 2 --teacher-epochs 1 --queue-size 64 --eval-every 0 "
        "--device cpu").split()


@pytest.fixture
def quick_encoders(monkeypatch):
    """Encoders that do not try whether they accept images of a size; a third of a second each."""
    def remember(self, image_size):
        self.image_size = image_size

    monkeypatch.setattr(Encoder, "check_image_size", remember)


@pytest.fixture
def quick(tmp_path, monkeypatch, few_shapes, quick_encoders):
    """Runs in a folder of their own, on few shapes, without the evaluation at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "print_table", lambda *args: None)
    return tmp_path


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """An encoder.pt with embeddings of 32 numbers, whose batch norm is not the initial one."""
    torch.manual_seed(0)
    encoder = Encoder(ARCH, 32, image_size=32)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    save_encoder(path, encoder, "a test", False)
    return str(path)


class PowerCut(Exception):
    """What kills a run in these tests."""


def last_checkpoint(folder):
    """The content of a run's last.pt."""
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def log_rows(folder):
    """The rows of a run's log.csv: dicts of texts."""
    with open(Path(folder) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    """Rows of a log without what depends on the machine."""
    kept = []
    for row in rows:
        kept.append({k: v for k, v in row.items() if k not in ("waiting", "images_per_s")})
    return kept


@pytest.mark.parametrize("method, arch", [("seed", "mobilenet_v3_small"), ("moco", ARCH),
                                          ("supervised", "mobilenet_v3_small"),
                                          ("seed", f"{ARCH} --small-crops 2 --symmetric")])
def test_a_run_that_was_cut_is_the_run_that_never_stopped(quick, teacher_file, method, arch):
    """A resumed run would be another experiment: other weights, queue, momentum, or dropout."""
    flags = ["--method", method, "--arch", *arch.split(), *TINY]
    if method == "seed":
        flags += ["--teacher", teacher_file]
    train.main([*flags, "--max-steps", "8", "--eval-every", "1", "--out", "whole"])
    train.main([*flags, "--max-steps", "4", "--out", "cut"])
    seconds = last_checkpoint("cut")["seconds"]
    train.main([*flags, "--max-steps", "8", "--out", "cut"])
    whole = last_checkpoint("whole")
    cut = last_checkpoint("cut")
    assert whole["step"] == cut["step"] == 8
    assert cut["seconds"] > seconds > 0
    assert same(whole["method"], cut["method"]), "to the last bit; and kNN on the way changes none"
    group = whole["optimizer"]["param_groups"][0]
    assert len(group["params"]) > 20
    cfg = make_cfg(*TINY, method=method)
    assert (group["momentum"], group["weight_decay"]) == (0.9, cfg.weight_decay)
    assert group["lr"] == pytest.approx(train.lr_at(7, cfg, 6))
    momenta = [run["optimizer"]["state"] for run in (whole, cut)]
    assert len(momenta[0]) == len(momenta[1]) == len(group["params"]), "each got a gradient"
    for i in momenta[0]:
        assert torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"])
    assert int(whole["method"].get("queue.seen", 8 * 16)) == 8 * 16, "one batch a step"
    assert not any(name.startswith("teacher.") for name in whole["method"]), "frozen: not saved"
    assert [row["step"] for row in log_rows("whole")] == ["6", "8"]
    assert [row["knn"] != "" for row in log_rows("whole")] == [True, False], "at full epochs"
    assert [row["step"] for row in log_rows("cut")] == ["4", "6", "8"]


def test_a_killed_run_goes_on_from_its_last_full_epoch(quick, monkeypatch, capsys):
    """A power cut after nine days would cost nine days; or rows of the log would be missing, or
    stand there twice."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--epochs", "3"]
    train.main([*flags, "--out", "whole"])
    steps = iter(range(17))

    def cut_at_step_17(self, labels):
        if next(steps) == 16:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "after_step", cut_at_step_17)
        with pytest.raises(PowerCut):
            train.main([*flags, "--out", "run"])
    assert last_checkpoint("run")["step"] == 12
    assert load_teacher("run/encoder.pt").arch == ARCH
    with open("run/log.csv", "a") as file:
        file.write("13,2.2,0.1,3.0,0.1,0.0,100,\r\n")
    assert [row["step"] for row in log_rows("run")] == ["6", "10", "12", "13"]
    capsys.readouterr()
    train.main([*flags, "--out", "run"])
    assert "resuming at step 12" in capsys.readouterr().out
    assert [row["step"] for row in log_rows("run")] == ["6", "10", "12", "18"]
    assert without_times(log_rows("run")) == without_times(log_rows("whole"))
    assert same(last_checkpoint("run")["method"], last_checkpoint("whole")["method"])


@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 7), (signal.SIGTERM, 10),
                                          (signal.SIGINT, 6), (signal.SIGUSR1, 12)])
def test_a_signal_ends_a_run_when_its_step_is_saved(quick, monkeypatch, capsys, teacher_file,
                                                    number, step):
    """Where a time slot is shorter than an epoch no run would ever get beyond its first one."""
    flags = ["--arch", ARCH, *TINY, "--teacher", teacher_file]
    calls = []
    update = SEED.after_step

    def interrupted(self, targets):
        update(self, targets)
        calls.append(1)
        if len(calls) == step - 1:                              # seen in the step after it
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)                        # `timeout` sends it twice

    with monkeypatch.context() as patch:
        patch.setattr(SEED, "after_step", interrupted)
        with pytest.raises(SystemExit) as ended:
            train.main([*flags, "--out", "run"])
    assert ended.value.code == 128 + number
    name = signal.Signals(number).name
    assert f"ended by {name}; the same command goes on" in capsys.readouterr().out
    assert len(calls) == last_checkpoint("run")["step"] == step
    train.STOP.number = 0
    train.STOP.in_loop = False
    train.main([*flags, "--out", "run"])
    train.main([*flags, "--out", "whole"])
    assert same(last_checkpoint("run")["method"], last_checkpoint("whole")["method"])
    assert without_times(log_rows("run")) == without_times(log_rows("whole"))


def test_a_signal_is_not_forgotten_while_processes_agree(monkeypatch):
    """It comes most often just then, since they wait for each other; torchrun would kill the run
    half a minute later, before it has saved."""
    stop = train.StopSignal()
    stop.in_loop = True
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    asked = []

    def agree(number, op):
        assert op == dist.ReduceOp.MAX
        asked.append(int(number))
        if len(asked) == 1:
            stop.receive(signal.SIGTERM, None)

    monkeypatch.setattr(dist, "all_reduce", agree)
    assert not stop.was_asked(CPU, should_log=True), "the others do not know of it yet"
    assert not stop.was_asked(CPU, should_log=False)
    assert stop.was_asked(CPU, should_log=True)
    assert asked == [0, signal.SIGTERM]

    def from_another(number, op):
        number.fill_(int(signal.SIGUSR1))

    monkeypatch.setattr(dist, "all_reduce", from_another)
    other = train.StopSignal()
    assert other.was_asked(CPU, should_log=True)
    assert other.number == signal.SIGUSR1


@slow
def test_a_reader_that_has_gone_does_not_end_a_run(tmp_path):
    """Ctrl-C ends `| tee log` before the run has saved."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import probe\nsys.stdin.read()\n"
            "probe.print0('a'); probe.print0('b'); open('saved', 'w')")
    process = subprocess.Popen([sys.executable, "-c", code, HERE], cwd=tmp_path,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert Path(tmp_path, "saved").exists()


def test_a_signal_outside_the_loop_ends_the_command_at_once(quick, monkeypatch):
    """Ctrl-C would be remembered through minutes of reading, or until the table is printed."""
    monkeypatch.setattr(train, "load_data_on_all", lambda *args: os.kill(os.getpid(), 15))
    with pytest.raises(SystemExit) as ended:
        train.main(["--arch", ARCH, *TINY])
    assert ended.value.code == 143

    def late(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.undo()
    monkeypatch.setattr(train.RunFolder, "save", late)          # after the last look of the loop
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--max-steps", "2"]
    with pytest.raises(SystemExit) as ended:
        train.main([*flags, "--out", str(quick / "run")])
    assert ended.value.code == 130


def test_a_run_is_saved_every_few_minutes(quick, monkeypatch):
    """On ImageNet an epoch may take hours; a kill would cost them."""
    saved = []
    save = train.RunFolder.save
    now = [0.0]

    def recorded(self, steps_done, *args):
        saved.append(steps_done)
        save(self, steps_done, *args)

    def monotonic():
        now[0] += 31.0                                          # seconds from one look to the next
        return now[0]

    monkeypatch.setattr(train.RunFolder, "save", recorded)
    monkeypatch.setattr(train.time, "monotonic", monotonic)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--batch-size", "8"]
    for minutes, steps in (("0", [2, 4, 6, 8, 10, 12]), ("1", [4, 8, 12]), ("9", [12])):
        train.main([*flags, "--epochs", "1", "--save-minutes", minutes, "--out", minutes])
        assert saved == steps
        saved.clear()
    assert same(last_checkpoint("0")["method"], last_checkpoint("9")["method"])
    assert make_cfg().save_minutes == 10
    train.main([*flags, "--epochs", "1", "--save-minutes", "5", "--out", "9"])     # may change


def test_a_run_without_a_checkpoint_starts_its_log_anew(quick, monkeypatch):
    """The rows of a run that was killed in its first epoch would stand before those of the next."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]

    def cut(self, labels):
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "after_step", cut)
        patch.setattr(train.RunFolder, "save", cut)
        with pytest.raises(PowerCut):
            train.main(flags)
    Path("run/log.csv").write_text("step,loss\n5,1.0\n")
    train.main([*flags, "--max-steps", "1"])
    assert [row["step"] for row in log_rows("run")] == ["1"]


def test_torn_rows_of_a_log_are_left_out(tmp_path):
    """The row that was being written at a kill may look like that of an early step."""
    path = tmp_path / "log.csv"
    for torn in ("1", "12", "12,0.5,0.", "120,0.5,0.1", "\0\0\0\n", "\n"):
        path.write_text(f"step,epoch,lr\n10,0.5,0.1\n20,1,0.1\n30,1.5,0.1\n{torn}")
        train.cut_log(path, 20)
        assert path.read_text() == "step,epoch,lr\n10,0.5,0.1\n20,1,0.1\n"
    path.write_text("step,epo")
    train.cut_log(path, 20)
    assert path.read_text() == "", "the next row brings the names again"


def test_the_lines_of_a_resumed_log_end_as_the_others(quick):
    """Tools that take the first line's end for that of all would read a column too much."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]
    train.main([*flags, "--max-steps", "1"])
    train.main([*flags, "--max-steps", "2"])
    lines = Path("run/log.csv").read_bytes().splitlines(keepends=True)
    assert len({line.endswith(b"\r\n") for line in lines}) == 1


@pytest.mark.parametrize("text", [None, ""])
def test_a_run_whose_log_was_lost_goes_on(quick, text):
    """A full disk while the log is cut would cost the run; so would a user who removes the log."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]
    train.main([*flags, "--max-steps", "1"])
    os.remove("run/log.csv")
    if text is not None:
        Path("run/log.csv").write_text(text)
    train.main([*flags, "--max-steps", "2"])
    assert [row["step"] for row in log_rows("run")] == ["2"]


def small_teacher():
    """A SmallNetwork with what a run tells about its teacher."""
    teacher = SmallNetwork()
    teacher.provenance = "a test"
    teacher.used_labels = False
    return teacher


def slow_training(method, data, cfg, steps):
    """The steps of a run with SGD by its formula: momentum 0.9, weight decay 0.5, and a learning
    rate of 0.05 (0.4 * 32/256) after three steps of warm-up."""
    weights = [p for p in method.parameters() if p.requires_grad]
    momenta = [torch.zeros_like(p) for p in weights]
    for step in range(steps):
        epoch, samples = probe.samples_of_step(step, len(data.train), cfg)
        views = []
        for v in range(method.views_per_image):
            u = uniforms(0, epoch, samples, v)
            size, scale = (24, (0.2, 0.5)) if v >= 2 else (32, (0.4, 1.0))      # two small crops
            view = augment(data.train.pixels[samples], u, size, scale, blur=False)
            views.append(view.contiguous(memory_format=torch.channels_last))
        torch.manual_seed(step)                                 # for MoCo's shuffle
        targets = method.targets(views, data.train.labels[samples])
        gradients = torch.autograd.grad(method.loss(method(views), targets), weights)
        with torch.no_grad():
            for p, momentum, gradient in zip(weights, momenta, gradients):
                momentum.mul_(0.9).add_(gradient + 0.5 * p)
                p.sub_(0.05 * min(step + 1, 3) / 3 * momentum)
        method.after_step(targets)


@pytest.mark.parametrize("name", ["seed", "seed --small-crops 2 --symmetric", "moco",
                                  "supervised"])
def test_a_run_is_its_recipe_step_by_step(quick, name):
    """What does not reach the loop (decay, schedule, temperature, queue) would make another
    experiment, and the loss would fall all the same."""
    flags = (f"--arch {ARCH} --dim 8 --batch-size 32 --lr 0.4 --weight-decay 0.5 --tau-s 0.3 "
             "--tau-t 0.07 --max-steps 4 --precision fp32 --out run").split()
    name, *more = name.split()
    cfg = make_cfg(*TINY, *flags, *more, method=name)
    data = load_data("shapes", subset=96)
    teacher = small_teacher() if name == "seed" else None
    train.train(cfg, data, CPU, teacher)
    found = last_checkpoint("run")["method"]

    torch.manual_seed(0)
    network = Encoder(ARCH, 8, image_size=32)
    if name == "seed":
        options = dict(symmetric=True, small_crops=2) if more else {}
        method = SEED(network, teacher, 64, 0.3, 0.07, **options)
    elif name == "moco":
        method = MoCo(network, 64, 0.99, 0.3, 1)
    else:
        method = Supervised(network, 20)
    method = method.to(memory_format=torch.channels_last)
    start = snapshot(method)
    slow_training(method, data, cfg, steps=4)

    def distance(one, other):
        names = [name for name in trained(found) if found[name].is_floating_point()]
        return sum((one[name] - other[name]).square().sum() for name in names).sqrt()

    assert distance(method.state_dict(), found) < 0.01 * distance(method.state_dict(), start)


@pytest.mark.parametrize("name", ["new.pt", "encoder.pt"])
@pytest.mark.parametrize("first", [True, False])
def test_a_kill_while_saving_costs_nothing(quick, monkeypatch, name, first):
    """A time limit in the moment of writing would cost the whole run; or a run would call itself
    finished without having its encoder; or the same command would not go on."""
    cfg = make_cfg(*f"--arch {ARCH} --batch-size 8 --out run".split(), method="supervised")
    data = load_data("shapes", subset=8)

    def open_again():
        encoder, method = train.build(cfg, data, CPU)
        optimizer = torch.optim.SGD(method.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        folder = train.RunFolder(cfg, data, encoder, method, optimizer, scaler)
        return folder, folder.open()

    folder, start = open_again()
    assert start == (0, 0.0)
    saved = 0
    if not first:
        folder.save(1, 1.0, 2.5)
        saved = 1
    save = torch.save

    def cut(state, file):
        save(state, file)
        if name in file.name:
            file.truncate(99)
            os.link(file.name, "run/left.tmp")                  # as a kill would leave it
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(PowerCut):
            folder.save(2, 2.0, 5.0)
    if name == "encoder.pt":                                    # last.pt was written before it
        saved = 2
    folder, start = open_again()
    assert start == (saved, 2.5 * saved)
    assert not list(Path("run").glob("*.tmp"))
    if saved:
        assert f"{saved} epochs" in load_teacher("run/encoder.pt").provenance
        made = probe.average_batch_norm(folder.encoder, data.train)
        assert same(load_teacher("run/encoder.pt").state_dict(), made.state_dict())


def test_a_kill_between_two_names_costs_nothing(quick, monkeypatch):
    """For a moment the old checkpoint is not called last.pt any more, and the new one not yet."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]
    train.main([*flags, "--max-steps", "3"])
    replace = os.replace

    def cut(source, target):
        if str(source).endswith("new.pt"):
            raise PowerCut
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(PowerCut):
            train.main([*flags, "--max-steps", "5"])
    assert not Path("run/last.pt").exists()
    train.main([*flags, "--max-steps", "8"])
    train.main([*flags[:-1], "whole", "--max-steps", "8"])
    assert same(last_checkpoint("run")["method"], last_checkpoint("whole")["method"])


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_broken_checkpoint_is_not_the_end(quick, capsys, damage):
    """A disk that lost a file would cost a weekend; the checkpoint before it costs minutes."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]
    for steps in ("3", "6", "8"):
        train.main([*flags, "--max-steps", steps])
    whole = last_checkpoint("run")
    rows = log_rows("run")
    broken = Path("run/last.pt")
    if damage is None:                                          # a bit flipped somewhere
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        damage = bytes(content)
    broken.write_bytes(damage)
    capsys.readouterr()
    train.main([*flags, "--max-steps", "8"])
    out = capsys.readouterr().out
    assert re.search("cannot read run/last.pt: .*; resuming at step 6, from previous.pt", out)
    previous = torch.load("run/previous.pt", weights_only=True)
    assert previous["step"] == 6, "and not the broken one"
    assert same(last_checkpoint("run")["method"], whole["method"])
    assert without_times(log_rows("run")) == without_times(rows)
    for name in train.CHECKPOINTS:
        Path("run", name).write_bytes(damage)
    with pytest.raises(InputError, match=r"cannot read run/last.pt.*\(--init run/enc"):
        train.main([*flags, "--max-steps", "8"])


def test_a_folder_that_cannot_be_made_is_bad_input(quick):
    """A traceback of pathlib would end the command."""
    Path("file").touch()
    with pytest.raises(InputError, match="cannot make the folder file/run"):
        train.main(["--method", "moco", "--arch", ARCH, *TINY, "--out", "file/run"])


def test_two_runs_in_one_folder_do_not_mix(quick, teacher_file):
    """The same command started twice, or by srun without torchrun, would mix two logs."""
    train.main(["--teacher", teacher_file, "--arch", ARCH, *TINY, "--out", "run"])
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    holder = subprocess.Popen([sys.executable, "-c", "import pathlib, train\n"
                               "lock = train.lock_folder(pathlib.Path('run'))\n"
                               "print('held', flush=True)\ninput()"], cwd=quick, text=True,
                              env={**os.environ, "PYTHONPATH": str(HERE)},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    words = f"process {holder.pid} on .* is at work in run; wait for it"
    again = ["--teacher", teacher_file, "--arch", ARCH, *TINY, "--out", "run"]
    with pytest.raises(InputError, match=words):
        train.main(again)
    before.pop(Path("run/.lock"))
    assert before == {path: path.read_bytes() for path in before}
    holder.communicate("\n")
    train.main(again)                                           # as soon as the other has ended


def test_a_student_does_not_go_on_under_another_teacher(quick):
    """Half of it would be learned from one, half from the other, against a queue of both."""
    for name in "ab":
        save_encoder(name, Encoder(ARCH, 8, image_size=32), "a test", False)
    flags = ["--arch", ARCH, "--out", "run", *TINY]
    train.main([*flags, "--teacher", "a", "--max-steps", "1"])
    with pytest.raises(InputError, match=r"other settings \(teacher was .*, is "):
        train.main([*flags, "--teacher", "b", "--max-steps", "2"])
    with pytest.raises(InputError, match="subset was 96, is 95; .*data_fingerprint was "):
        train.main([*flags, "--teacher", "a", "--subset", "95"])
    with pytest.raises(InputError, match="of another teacher"):
        train.main([*flags, "--max-steps", "2"])
    assert last_checkpoint("run")["step"] == 1
    assert not Path("runs").exists()
    os.remove("run/last.pt")
    with pytest.raises(InputError, match="run has no checkpoint to resume from; name another"):
        train.main([*flags, "--teacher", "a"])
    torch.save({"weights": 1}, "run/last.pt")
    with pytest.raises(InputError, match="is not a run's checkpoint"):
        train.main([*flags, "--teacher", "a"])
    torch.save({"identity": "{}"}, "run/last.pt")                # the first version's
    with pytest.raises(InputError, match="is not a run's checkpoint"):
        train.main([*flags, "--teacher", "a"])


def test_a_run_is_built_from_its_settings(monkeypatch, few_shapes, quick_encoders):
    """args.json would say tau_t = 0.07, and the run would train with 0.01."""
    flags = ("--dataset cifar10 --arch resnet18 --dim 8 --hidden-dim 20 --queue-size 50 "
             "--tau-s 0.3 --tau-t 0.07").split()
    teacher = SmallNetwork()
    encoder, method = train.build(make_cfg(*flags), None, CPU, teacher)
    assert method.student is encoder
    assert method.teacher is teacher
    assert (method.tau_s, method.tau_t, len(method.queue.features)) == (0.3, 0.07, 50)
    assert (encoder.arch, encoder.dim, encoder.hidden_dim) == ("resnet18", 8, 20)
    assert (encoder.small_images, encoder.image_size) == (True, 32)
    encoder, method = train.build(make_cfg(*flags, method="moco"), None, CPU)
    assert method.encoder is encoder
    assert (method.tau, method.momentum, len(method.queue.features)) == (0.3, 0.99, 50)
    assert encoder.backbone.bn1.splits == 8, "parts of 32 images"
    assert method.training
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (0, 8))
    encoder, _ = train.build(make_cfg(*flags, method="moco"), None, CPU)
    assert encoder.backbone.bn1.splits == 1, "eight processes split the batch already"
    data = load_data("shapes", subset=8)
    flags = ["--arch", ARCH]
    _, method = train.build(make_cfg(*flags, method="supervised"), data, CPU)
    _, again = train.build(make_cfg(*flags, method="supervised"), data, CPU)
    _, other = train.build(make_cfg(*flags, "--seed", "1", method="supervised"), data, CPU)
    assert method.class_vectors.shape == (20, 128)
    assert torch.equal(method.class_vectors, again.class_vectors)
    assert not torch.equal(method.class_vectors, other.class_vectors), "by another seed"


def record_compiled(monkeypatch):
    """A list that grows by each network that is compiled (which would take a minute)."""
    compiled = []

    def compile(network):
        compiled.append(network)

    monkeypatch.setattr(nn.Module, "compile", compile)
    return compiled


@pytest.mark.parametrize("method, names", [("seed", ["student", "teacher"]),
                                           ("moco", ["encoder", "key_encoder"]),
                                           ("supervised", ["encoder"])])
def test_compile_compiles_each_network(monkeypatch, few_shapes, quick_encoders, method, names):
    """A network that is left out would stay as slow as it was."""
    compiled = record_compiled(monkeypatch)
    data = load_data("shapes", subset=8)
    teacher = SmallNetwork() if method == "seed" else None
    flags = ["--arch", ARCH, "--dim", "8"]
    _, built = train.build(make_cfg(*flags, "--compile", method=method), data, CPU, teacher)
    cfg = make_cfg(*flags, "--compile", method=method)
    assert train.compile_and_distribute(built, cfg) is built
    assert compiled == [getattr(built, name) for name in names]
    train.compile_and_distribute(built, make_cfg(*flags, method=method))
    assert len(compiled) == len(names), "only if asked for"


def test_a_run_has_its_networks_compiled(quick, monkeypatch, teacher_file):
    """--compile would change nothing."""
    compiled = record_compiled(monkeypatch)
    flags = ["--arch", ARCH, "--teacher", teacher_file, "--max-steps", "1", *TINY, "--compile"]
    train.main([*flags, "--out", "run"])
    assert len(compiled) == 2


def test_each_step_process_and_seed_draws_other_random_numbers(quick, monkeypatch):
    """Dropout, and MoCo's shuffle: the same mask in each step would switch the same features off
    for good."""
    seen = []
    targets = Supervised.targets
    forward = Supervised.forward

    def recorded_targets(self, views, labels):
        seen.append(torch.initial_seed())
        return targets(self, views, labels)

    def recorded_forward(self, views):
        assert torch.initial_seed() == seen[-1]
        return forward(self, views)

    monkeypatch.setattr(Supervised, "targets", recorded_targets)
    monkeypatch.setattr(Supervised, "forward", recorded_forward)
    data = load_data("shapes", subset=8)
    for number, rank in (("0", 0), ("0", 1), ("1", 0), ("1", 1)):
        flags = ["--arch", ARCH, "--batch-size", "4", "--seed", number, "--epochs", "1"]
        cfg = make_cfg(*flags, "--out", f"{number}-{rank}", method="supervised")
        monkeypatch.setattr(train, "rank_and_world_size", lambda rank=rank: (rank, 2))
        train.train(cfg, data, CPU)
    assert len(seen) == len(set(seen)) == 8
    flags = f"--arch {ARCH} --batch-size 4 --epochs 1 --seed {2**62} --out large".split()
    train.train(make_cfg(*flags, method="supervised"), data, CPU)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(quick, monkeypatch):
    """It would train on for days, and save itself over the good checkpoint. And the advice must be
    one that can be followed."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]
    train.main([*flags, "--max-steps", "6"])
    saved = Path("run/encoder.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervised, "loss", lambda self, logits, labels: logits.mean() * math.nan)
        with pytest.raises(FloatingPointError) as caught:
            train.main(flags)
    message = str(caught.value)
    assert message.startswith("the loss is not finite at step 10, learning rate 0.0")
    assert "run/last.pt, if there is one, is the last good checkpoint: with --precision" in message
    assert last_checkpoint("run")["step"] == 6
    assert Path("run/encoder.pt").read_bytes() == saved
    train.main([*flags, "--precision", "fp32"])
    assert last_checkpoint("run")["step"] == 12
    folder = train.RunFolder(make_cfg(*flags), load_data("shapes"), None, None, None, None)
    for bad in (math.nan, math.inf):
        row = dict(step=4, lr=0.1, loss=1.0, kl=bad)
        with pytest.raises(FloatingPointError, match="not finite at step 4"):
            folder.check(row)


def test_weights_that_are_not_finite_are_not_saved(quick, monkeypatch):
    """A gradient may be infinite in a step whose loss was not; the last good checkpoint would be
    lost with the next save."""
    flags = ["--method", "supervised", "--arch", ARCH, *TINY, "--out", "run"]
    train.main([*flags, "--max-steps", "6"])

    def broken(self, labels):
        nn.init.constant_(next(self.encoder.parameters()), math.inf)

    monkeypatch.setattr(Supervised, "after_step", broken)
    with pytest.raises(FloatingPointError, match="a weight is not finite after step 7; run/las"):
        train.main([*flags, "--max-steps", "7"])
    assert last_checkpoint("run")["step"] == 6
    assert all(w.isfinite().all() for w in load_teacher("run/encoder.pt").state_dict().values())


def test_a_row_of_the_log_has_the_numbers_of_its_step(quick, monkeypatch, teacher_file):
    """Whoever tunes tau_t or the learning rate by log.csv would look at other numbers than those
    of the training."""
    losses = []
    copies = []
    seen = []
    loss = SEED.loss
    diagnostics = SEED.diagnostics

    def checked(self, z_s, z_t):
        assert torch.equal(z_s, seen[0])
        assert torch.equal(z_t, seen[1])
        return diagnostics(self, z_s, z_t)

    def recorded(self, z_s, z_t):
        seen[:] = [z_s, z_t]
        losses.append(loss(self, z_s, z_t).item())
        queue = self.queue.features
        copies.append(seed_loss(z_t, z_t, queue, self.tau_s, self.tau_t).item())
        return loss(self, z_s, z_t)

    monkeypatch.setattr(SEED, "loss", recorded)
    monkeypatch.setattr(SEED, "diagnostics", checked)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    flags = ["--arch", ARCH, "--teacher", teacher_file, *TINY, "--queue-size", "80"]
    train.main([*flags, "--out", "run"])
    rows = log_rows("run")
    columns = ("step epoch lr loss kl entropy loss_of_a_copy self_prob top1_agreement queue_filled "
               "waiting images_per_s knn")
    assert list(rows[0]) == columns.split()
    assert [row.pop("knn") for row in rows] == [""] * 6, "--eval-every 0"
    cfg = make_cfg(*flags)
    for step, row in zip(range(2, 13, 2), rows):
        row = {name: float(text) for name, text in row.items()}
        assert row["step"] == step
        assert row["epoch"] == pytest.approx(step / 6, rel=1e-5)
        assert row["lr"] == pytest.approx(train.lr_at(step - 1, cfg, 6), rel=1e-5)
        assert row["loss"] == pytest.approx(losses[step - 1], rel=1e-5)
        assert row["loss"] == pytest.approx(row["entropy"] + row["kl"], abs=1e-4)
        assert row["loss_of_a_copy"] == pytest.approx(copies[step - 1], rel=1e-5)
        assert row["queue_filled"] == pytest.approx(min(1, (step - 1) * 16 / 80))
        assert 0 <= row["self_prob"] <= 1
        assert 0 <= row["top1_agreement"] <= 1
        assert 0 < row["waiting"] < 1
        assert row["images_per_s"] > 0


def test_a_student_may_start_from_weights(quick, teacher_file):
    """Whoever wants to train a finished student on would begin at nothing; and if labels made the
    start, the result must not be called label-free."""
    network = torchvision.models.get_model(ARCH)
    torch.save(network.state_dict(), "torchvision.pth")
    for file, dim, labels in ((teacher_file, 32, False), ("torchvision.pth", 8, None)):
        cfg = make_cfg(*TINY, "--arch", ARCH, "--init", file, "--dim", str(dim), method="moco")
        encoder = train.new_encoder(cfg)
        start = load_teacher(file, ARCH)
        assert same(encoder.backbone.state_dict(), start.backbone.state_dict())
        head = same(encoder.head.state_dict(), start.head.state_dict())
        assert head == (dim == 32), "the head as well, where it is of the same form"
        assert encoder.used_labels is labels
        assert all(p.requires_grad for p in encoder.parameters())
    for arch in ("resnet18", "shufflenet_v2_x1_0"):
        cfg.arch = arch
        with pytest.raises(InputError, match="torchvision.pth does not fit"):
            train.new_encoder(cfg)
    flags = [*TINY, "--arch", ARCH, "--max-steps", "1"]
    train.main([*flags, "--teacher", teacher_file, "--init", "torchvision.pth", "--out", "run"])
    made = load_teacher("run/encoder.pt")
    assert made.used_labels is None, "unknown, as that of its start"
    assert "started from: shufflenet_v2_x0_5, weights under ''" in made.provenance
    train.main([*flags, "--teacher-arch", ARCH, "--init", "torchvision.pth", "--out", "other"])
    [teacher] = Path("runs/teachers").glob("*/encoder.pt")
    assert "started from" not in load_teacher(teacher).provenance, "the student alone starts so"


@slow
def test_a_swav_teacher_brings_its_crops(quick, folder_of_images, capsys):
    """The paper's best rows rest on them: crops of 0.14 to 1 of an image, and six small ones."""
    file, head, _ = LAYOUTS["SwAV"]
    network = moco_network("resnet18", version=1)
    network.fc = nn.Identity()
    torch.save(file(network.state_dict(), head.state_dict()), "swav.pth")
    torch.save(LAYOUTS["a backbone"][0](network.state_dict(), {}), "plain.pth")
    flags = ("--dataset folder --batch-size 4 --max-steps 1 --image-size 72 --small-size 40 "
             f"--workers 0 --device cpu --eval-every 0 --arch {ARCH}").split()
    flags += ["--data", str(folder_of_images)]
    for out, teacher, more, count, scale in (
            ("swav", "swav.pth", [], 6, (0.14, 1.0)), ("none", "swav.pth", ["0"], 0, (0.14, 1.0)),
            ("two", "swav.pth", ["2"], 2, (0.14, 1.0)), ("plain", "plain.pth", [], 0, (0.2, 1.0))):
        number = ["--small-crops", *more] if more else []
        words = [*flags, "--teacher", teacher, "--out", out, *number]
        train.main(words)
        identity = last_checkpoint(out)["identity"]
        assert (identity["small_crops"], identity["crop_scale"]) == (count, scale)
        assert identity.get("small_scale") == ((0.05, 0.14) if count else None)
        assert ("a teacher of SwAV's kind" in capsys.readouterr().out) == (teacher == "swav.pth")
        train.main(words)                                       # the same command again
        assert "finished before" in capsys.readouterr().out


def test_small_crops_must_fit_the_networks(quick, teacher_file):
    """A network that takes 224 px may not take 96; the error would come in the first step."""
    class Picky(SmallNetwork):
        provenance = "a test"

        def check_image_size(self, image_size):
            if image_size == 24:
                raise InputError("not at 24 px")

    train_flags = [*TINY, "--arch", ARCH, "--small-crops", "1", "--teacher", "x", "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_teacher_on_all", lambda path, arch: Picky())
        patch.setattr(Picky, "multi_crop", False, raising=False)
        with pytest.raises(InputError, match="not at 24 px"):
            train.main(train_flags)


def centered(features):
    """Features as kNN sees them, [N, F]: unit rows, less their mean."""
    z = F.normalize(features.float(), dim=1)
    return z - z.mean(0)


@torch.no_grad()
def spread_and_agreement(encoder):
    """How far apart the features of some shapes lie, 0 (one point) to 1; and how far those that are
    computed in bf16 agree, 0 to 1."""
    x = seed.normalize(probe.to_float(draw_all_shapes(64, 1).pixels))
    exact = encoder.eval().features(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.features(x)
    agreement = F.cosine_similarity(centered(exact), centered(rounded), dim=1)
    return centered(exact).norm(dim=1).mean().item(), agreement.mean().item()


def slow_statistics(bn, inputs):
    """Mean and variance that a batch-norm layer is to have: averages over batches of 32."""
    batches = [x.transpose(0, 1).flatten(1).double() for x in inputs.split(32)]     # [C, n] each
    means = torch.stack([batch.mean(1) for batch in batches])
    variances = torch.stack([batch.var(1) for batch in batches])
    assert bn.num_batches_tracked == len(batches)
    return means.mean(0).float(), variances.mean(0).float()


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "efficientnet_b0"])
def test_batch_norm_is_averaged_over_training_images(quick_encoders, arch):
    """Features would be those of statistics from hundreds of steps ago, or of the augmented views
    of one batch; or, with dropout on, others each time."""
    split = draw_all_shapes(600, 0)
    encoder = Encoder(arch, 16, image_size=32).train()
    before = snapshot(encoder)
    made = probe.average_batch_norm(encoder, split)
    assert encoder.training
    assert same(before, encoder.state_dict()), "training goes on as if nothing had been"
    assert same(trained(before), trained(made.state_dict()))
    assert not any(module.training for module in made.modules())
    again = probe.average_batch_norm(made, split)
    assert same(made.state_dict(), again.state_dict())
    chosen = split.pixels[np.random.default_rng(1).permutation(600)[:512]]
    x = seed.normalize(probe.to_float(chosen))
    conv, bn, _ = made.backbone.features[0]
    mean, variance = slow_statistics(bn, conv(x).detach())
    assert torch.allclose(bn.running_mean, mean, atol=1e-5)
    assert torch.allclose(bn.running_var, variance, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 31, 33, 257])
def test_batch_norm_is_averaged_over_any_number_of_images(quick_encoders, count):
    """A folder of a few pictures would end with an error, when all the training is done."""
    encoder = Encoder(ARCH, 16, image_size=32)
    MoCo(encoder, 64, bn_splits=8)                              # puts in SplitBatchNorm2d
    made = probe.average_batch_norm(encoder, draw_all_shapes(count, 0))
    assert all(value.isfinite().all() for value in made.state_dict().values())
    if count > 2:
        assert spread_and_agreement(made)[0] > 0.5


@pytest.mark.parametrize("method", ["seed", "moco", "supervised"])
def test_the_file_of_a_short_run_has_usable_features(quick, teacher_file, method):
    """All features of a MobileNet would be one point, to six digits; kNN in float32 survives that,
    bf16 and whoever builds on the file do not."""
    flags = ["--method", method, "--arch", "mobilenet_v3_small", *TINY, "--out", "run"]
    train.main([*flags, "--teacher", teacher_file] if method == "seed" else flags)
    spread, agreement = spread_and_agreement(load_teacher("run/last.pt"))
    assert spread < 1e-3 and agreement < 0.5, "else this test shows nothing"
    spread, agreement = spread_and_agreement(load_teacher("run/encoder.pt"))
    assert spread > 0.5
    assert agreement > 0.95
    Path("run/encoder.pt").rename("made.pt")                    # as if killed before it was written
    train.main([*flags, "--teacher", teacher_file] if method == "seed" else flags)
    found = load_teacher("run/encoder.pt")
    assert same(found.state_dict(), load_teacher("made.pt").state_dict())


def test_untrained_networks_have_statistics_of_their_own_too(quick_encoders, tmp_path, monkeypatch,
                                                             few_shapes, teacher_file):
    """The row that all others are compared with would be of a network without batch norm; and a
    teacher, or weights to start from, must stay as they are."""
    monkeypatch.chdir(tmp_path)
    seen = []                                                   # the encoders that are evaluated

    def look(encoder, *args):
        seen.append(snapshot(encoder))
        return dict(knn=1.0, linear=1.0, rate=1.0), ()

    monkeypatch.setattr(probe, "evaluate", look)
    monkeypatch.setattr(probe, "save_neighbors", lambda *args: None)
    flags = ["--arch", ARCH, "--teacher", teacher_file, *TINY, "--max-steps", "1"]
    train.main([*flags, "--out", "run"])
    probe.main([f"random:{ARCH}", "--subset", "96", "--device", "cpu"])
    train.main([*flags, "--init", teacher_file, "--out", "other"])
    torch.manual_seed(0)
    untrained = Encoder(ARCH, 128, image_size=32)
    made = probe.average_batch_norm(untrained, load_data("shapes", subset=96).train).state_dict()
    assert not same(made, untrained.state_dict())
    assert same(seen[0], made)
    assert same(seen[1], load_teacher(teacher_file).state_dict())
    assert same(trained(seen[3]), trained(made))
    for name, value in made.items():                            # in another memory format
        assert torch.allclose(seen[3][name], value, rtol=1e-3, atol=1e-4)
    start = train.new_encoder(make_cfg(*flags, "--init", teacher_file))
    assert same(seen[4], start.state_dict())


def test_knn_during_training_is_that_of_the_network_in_training(quick, few_shapes):
    """The curve in log.csv would show another network, other images or other statistics."""
    flags = ["--method", "supervised", "--arch", "mobilenet_v3_small", *TINY, "--out", "run"]
    train.main([*flags, "--epochs", "3", "--eval-every", "2", "--max-steps", "12"])
    rows = log_rows("run")
    assert [row["knn"] != "" for row in rows] == [False, False, True]
    data = load_data("shapes", subset=96)
    scores, _ = evaluate(load_teacher("run/encoder.pt"), data, linear=False)
    assert float(rows[-1]["knn"]) == pytest.approx(scores["knn"], abs=1e-3)


def test_seconds_are_those_of_the_training_alone(quick, monkeypatch):
    """The table would count evaluation and saving, which depend on --eval-every, as training."""
    now = [0.0]

    def perf_counter():
        now[0] += 1
        return now[0]

    def slow_evaluate(*args, **options):
        now[0] += 1e6
        return dict(knn=50.0), None

    def slow_save(self, steps_done, epochs, seconds):
        now[0] += 1e6

    monkeypatch.setattr(train.time, "perf_counter", perf_counter)
    monkeypatch.setattr(train, "evaluate", slow_evaluate)
    monkeypatch.setattr(train.RunFolder, "save", slow_save)
    flags = [*TINY, "--arch", ARCH, "--eval-every", "1", "--out", "run"]
    cfg = make_cfg(*flags, method="supervised")
    seconds = train.train(cfg, load_data("shapes", subset=96), CPU)
    assert 12 < seconds < 100
    row = {name: float(text) for name, text in log_rows("run")[0].items()}
    took = 6 * 16 / row["images_per_s"]
    assert took == pytest.approx(round(took), rel=1e-4)
    assert 6 < took < seconds
    assert row["waiting"] == pytest.approx(6 / took, rel=1e-4), "a batch took a tick"


def test_a_row_is_printed_in_words_every_ten_seconds(tmp_path, monkeypatch, capsys):
    """The user would wait for a run that ends an hour later than it says; or see no kNN, or
    thousands of lines."""
    now = [100.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    cfg = make_cfg("--epochs", "4", "--batch-size", "10", "--out", str(tmp_path))
    data = probe.Data("shapes", 32, None, None, [])
    folder = train.RunFolder(cfg, data, None, None, None, None)
    row = dict(step=30, epoch=1.5, loss=7.25, loss_of_a_copy=7.125, lr=0.05, images_per_s=5.0,
               waiting=0.25, knn=33.33)
    folder.write_row(row, 80)
    assert capsys.readouterr().out == (
        " 38%  epoch 1.5/4  loss 7.250 (a copy: 7.125)  lr 0.05  5 images/s  waiting 25%  "
        "ETA 1:40  kNN 33.3%\n")
    row["knn"] = None
    for seconds, step, printed in ((109, 40, ""), (111, 40, "ETA 1:20\n"), (120, 50, ""),
                                   (120, 80, "ETA 0:00\n"), (129, 50, ""), (131, 50, "ETA 1:00\n")):
        now[0] = seconds
        folder.write_row({**row, "step": step}, 80)
        assert capsys.readouterr().out.endswith(printed)
        assert bool(printed) == (folder.printed == seconds)
    assert len(log_rows(tmp_path)) == 7


@pytest.mark.parametrize("flags, has_units, frozen, trained", [
    ("--image-size 48", True, torch.bfloat16, torch.float32),
    ("--small-images", True, torch.bfloat16, torch.float32),
    ("--image-size 48", False, torch.float32, torch.float32),
    ("--image-size 32", True, torch.float32, torch.float32),
    ("--image-size 48 --precision fp32", True, torch.float32, torch.float32),
    ("--precision fp16", False, torch.float16, torch.float16),
    ("--precision bf16", False, torch.bfloat16, torch.bfloat16)])
def test_a_frozen_teacher_uses_the_bf16_units_of_a_cpu(monkeypatch, flags, has_units, frozen,
                                                       trained):
    """The teacher would be half as fast; or the student, and tiny layers, slower than in fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(amx_bf16=has_units))
    cfg = make_cfg(*flags.split())
    assert train.network_dtype(cfg, CPU, frozen=True) == frozen
    assert train.network_dtype(cfg, CPU) == trained


@pytest.mark.parametrize("has_bf16, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_the_half_precision_that_it_has(monkeypatch, has_bf16, dtype):
    """An older GPU would emulate bf16, several times slower than fp16."""
    def is_bf16_supported(including_emulation=True):
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    for frozen in (False, True):
        assert train.network_dtype(make_cfg(), torch.device("cuda"), frozen) == dtype


def test_the_dtypes_reach_the_networks_and_the_loss_stays_float32(quick, monkeypatch):
    """bf16 would be announced and not used; or the loss would be rounded to steps of 0.03."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(amx_bf16=True))
    found = {}
    build = train.build
    loss = SEED.loss

    def hooked_build(*args):
        encoder, method = build(*args)
        for name in ("student", "teacher"):
            def record(module, inputs, out, name=name):
                found.setdefault(name, out.dtype)               # in training, before any saving

            conv = getattr(method, name).backbone.conv1[0]
            conv.register_forward_hook(record)
        return encoder, method

    def recorded_loss(self, z_s, z_t):
        found["loss"] = loss(self, z_s, z_t).dtype
        found["z_t"] = z_t.dtype
        return loss(self, z_s, z_t)

    monkeypatch.setattr(train, "build", hooked_build)
    monkeypatch.setattr(SEED, "loss", recorded_loss)
    data = load_data("shapes", subset=8)
    teacher = Encoder(ARCH, 8, image_size=48)
    flags = ["--arch", ARCH, "--dim", "8", "--batch-size", "4", "--max-steps", "1", "--epochs", "1"]
    for precision, student_dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        found.clear()
        more = f"--image-size 48 --precision {precision} --out {precision}".split()
        train.train(make_cfg(*flags, *more), data, CPU, teacher)
        assert found == dict(teacher=torch.bfloat16, student=student_dtype, loss=torch.float32,
                             z_t=torch.float32)


def test_float16_scales_the_loss_and_a_resumed_run_keeps_the_scale(quick, monkeypatch):
    """Small gradients would be 0 in float16; or a resumed run would start with a scale that makes
    them infinite."""
    asked = []
    grad_scaler = torch.amp.GradScaler

    def recorded(device_type, enabled):
        asked.append(enabled)
        return grad_scaler(device_type, enabled=True, init_scale=4.0, growth_interval=3)

    flags = ["--method", "supervised", "--arch", ARCH, *TINY]
    train.main([*flags, "--max-steps", "8", "--out", "without"])
    monkeypatch.setattr(torch.amp, "GradScaler", recorded)
    train.main([*flags, "--max-steps", "8", "--out", "whole"])
    train.main([*flags, "--max-steps", "4", "--out", "cut"])
    train.main([*flags, "--max-steps", "8", "--out", "cut"])
    assert asked == [False] * 3
    assert last_checkpoint("without")["scaler"] == {}
    assert last_checkpoint("whole")["scaler"]["scale"] == 16.0
    assert last_checkpoint("cut")["scaler"] == last_checkpoint("whole")["scaler"]
    for name in ("whole", "cut"):
        assert same(last_checkpoint("without")["method"], last_checkpoint(name)["method"])

    def stop(device_type, enabled):
        raise PowerCut(enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", stop)
    with pytest.raises(PowerCut, match="True"):
        train.main([*flags, "--precision", "fp16", "--out", "half"])


# -------------------------------------------------------------------------------- the teacher cache
CACHED = [*TINY, *("--arch mobilenet_v3_small --precision fp32 --teacher-cache cache --subset 48 "
                   "--queue-size 40").split()]       # a run of 6 steps


@pytest.fixture
def asked(monkeypatch):
    """A list that grows by one each time that SEED's teacher computes embeddings."""
    calls = []
    load = probe.load_teacher

    def load_and_count(*args):
        teacher = load(*args)
        teacher.register_forward_hook(lambda *args: calls.append(1))
        return teacher

    monkeypatch.setattr(probe, "load_teacher", load_and_count)
    return calls


def test_kept_embeddings_are_the_teachers(quick, asked, teacher_file):
    """A second student, or one whose cache was torn by a kill, would train as if from another
    teacher; nothing else would notice."""
    flags = [*CACHED, "--teacher", teacher_file]
    without = [flag for flag in flags if flag not in ("--teacher-cache", "cache")]
    runs = {}
    for out, words, calls in (("without", without, 6), ("first", flags, 6), ("second", flags, 0)):
        train.main([*words, "--out", out])
        runs[out] = last_checkpoint(out)["method"]
        assert len(asked) == calls, f"{out}: 6 steps, and none with a full cache"
        asked.clear()
    rows = np.memmap("cache/z.float32", np.float32, "r+", shape=(2, 48, 32))     # one view each
    whole = np.array(rows)
    assert np.allclose(np.linalg.norm(whole, axis=2), 1, atol=1e-5), "of each image in each epoch"
    data = load_data("shapes", subset=48)
    teacher = load_teacher(teacher_file)
    for epoch, samples in ((0, [5, 40]), (1, [5, 17])):
        view = augment(data.train.pixels[samples], uniforms(0, epoch, samples), 32, blur=False)
        assert np.allclose(rows[epoch, samples], teacher(view).numpy(), atol=1e-4)
    rows[1, 7, 16:] = 0                                         # a kill tears one row,
    rows[0, 3] = np.nan                                         # a bad disk another
    train.main([*flags, "--out", "torn"])
    assert len(asked) == 2, "the two batches with a torn row"
    assert np.array_equal(np.array(rows), whole)
    runs["torn"] = last_checkpoint("torn")["method"]
    for out in ("first", "second", "torn"):
        assert same(runs["without"], runs[out]), out
    train.main([*flags, "--tau-t", "0.2", "--out", "other"])
    assert not same(runs["without"], last_checkpoint("other")["method"])


def cache_of(folder, data, teacher, *flags):
    """A TeacherCache for a SEED method, and that method."""
    cfg = make_cfg(*TINY, "--teacher-cache", str(folder), *flags)
    method = SEED(SmallNetwork(teacher.dim), teacher, 64)
    return train.TeacherCache(cfg, data, method, torch.float32), method


def test_a_torn_row_is_computed_again(tmp_path, few_shapes):
    """A kill during the writing would leave numbers from which a student learns nonsense."""
    data = load_data("shapes", subset=96)
    cache, method = cache_of(tmp_path / "cache", data, SmallNetwork())
    batch = next(probe.batches(data.train, make_cfg(*TINY), CPU, ONE_VIEW, [7]))
    calls = []
    method.teacher.register_forward_hook(lambda *args: calls.append(1))
    whole = cache.targets(batch)
    assert torch.equal(whole, method.targets(batch.views))
    calls.clear()
    half = whole[3].numpy() * ([1] * 4 + [0] * 4)
    for torn in (0.0, math.nan, math.inf, 0.9 * whole[3].numpy(), half):
        cache.rows[batch.epoch, batch.samples[3]] = torn
        assert torch.equal(cache.targets(batch), whole)
        assert len(calls) == 1
        assert torch.equal(cache.targets(batch), whole), "repaired on the disk, too"
        assert len(calls) == 1
        calls.clear()


def test_a_cache_grows_and_repeats(quick, asked, teacher_file):
    """More epochs would compute anew what is there; --view-epochs would not bound the disk."""
    flags = [*CACHED, "--teacher", teacher_file]
    train.main([*flags, "--view-epochs", "1", "--out", "once"])
    assert len(asked) == 3, "in the second epoch, all views are there"
    assert os.path.getsize("cache/z.float32") == 4 * 48 * 32
    train.main([*flags, "--out", "twice"])
    assert len(asked) == 6
    assert os.path.getsize("cache/z.float32") == 2 * 4 * 48 * 32
    with pytest.raises(InputError, match="view_epochs was None, is 1"):
        train.main([*flags, "--view-epochs", "1", "--out", "twice"])


def test_a_cache_of_other_embeddings_is_refused(tmp_path, few_shapes, monkeypatch):
    """The embeddings of other views, or of another teacher, would be learned without a word."""
    data = load_data("shapes", subset=96)
    teacher = SmallNetwork()
    folder = tmp_path / "cache"
    cache, _ = cache_of(folder, data, teacher)
    batch = next(probe.batches(data.train, make_cfg(*TINY), CPU, ONE_VIEW, [7]))
    cache.targets(batch)
    kept = (folder / "z.float32").read_bytes()
    for flags, words in ((["--seed", "1"], "seed was 0, is 1"),
                         (["--subset", "95"], "subset was 96, is 95"),
                         (["--image-size", "40"], "views was .*32.*, is .*40")):
        with pytest.raises(InputError, match=words):
            cache_of(folder, data, teacher, *flags)
    changed = dataclasses.replace(data, fingerprint="another")
    with pytest.raises(InputError, match="data_fingerprint was .*, is another"):
        cache_of(folder, changed, teacher)
    with pytest.raises(InputError, match="teacher was .*, is "):
        cache_of(folder, data, SmallNetwork())
    cfg = make_cfg(*TINY, "--teacher-cache", str(folder))
    method = SEED(SmallNetwork(), teacher, 64)
    with pytest.raises(InputError, match="precision was torch.float32, is torch.bfloat16"):
        train.TeacherCache(cfg, data, method, torch.bfloat16)
    for name, value, key in (("crop_scale", (0.1, 1.0), "views"), ("blur", True, "blur"),
                             ("small_crops", 1, "views"), ("symmetric", True, "views")):
        other = argparse.Namespace(**{**vars(cfg), name: value})
        with pytest.raises(InputError, match=f"{key} was .*, is .*name another folder"):
            train.TeacherCache(other, data, method, torch.float32)
    assert (folder / "z.float32").read_bytes() == kept
    cache_of(folder, data, teacher, "--tau-t", "0.2", "--epochs", "3", "--lr", "0.5")


def test_a_cache_for_which_the_disk_is_too_small_is_refused(tmp_path, few_shapes, monkeypatch):
    """A full disk would kill the run after days; and a disk that is full of this very cache would
    be refused."""
    data = load_data("shapes", subset=96)
    teacher = SmallNetwork()
    cache, _ = cache_of(tmp_path / "cache", data, teacher, "--view-epochs", "1")
    file = tmp_path / "cache/z.float32"
    assert file.stat().st_blocks * 512 >= file.stat().st_size == 4 * 96 * teacher.dim, "reserved"
    batch = next(probe.batches(data.train, make_cfg(*TINY), CPU, ONE_VIEW, [3]))
    cache.targets(batch)
    before = file.read_bytes()
    size = {}

    def full(number, offset, length):
        size["asked"] = length
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="needs 6,144 bytes in .*z.float32 .*No space left"):
        cache_of(tmp_path / "cache", data, teacher)
    assert size["asked"] == 4 * 96 * teacher.dim, "of the second epoch"
    assert file.read_bytes() == before
    monkeypatch.delattr(os, "posix_fallocate")                  # macOS
    cache, _ = cache_of(tmp_path / "cache", data, teacher)
    assert np.array_equal(cache.rows[0].ravel(), np.frombuffer(before, np.float32))


def test_a_cache_without_its_fingerprint_is_refused(tmp_path, few_shapes):
    """Embeddings of unknown origin (such as a cache of the first version, whose fingerprint has
    another name) would be taken for this teacher's."""
    data = load_data("shapes", subset=96)
    cache, _ = cache_of(tmp_path, data, SmallNetwork())
    os.remove(tmp_path / "fingerprint.pt")
    with pytest.raises(InputError):
        cache_of(tmp_path, data, SmallNetwork())


def test_a_cache_is_for_the_student_alone(quick):
    """--teacher-cache could not be used where the teacher is trained first, or with --compare."""
    flags = ["--arch", ARCH, "--teacher-arch", ARCH, *TINY, "--max-steps", "1", "--compare"]
    train.main([*flags, "--teacher-cache", "cache", "--out", "run"])
    assert last_checkpoint("run")["step"] == last_checkpoint("run/moco")["step"] == 1


# ----------------------------------------------------------------------------------- the whole runs
STAGES = ["reading", "augmentation", "loss", "teacher", "student", "backward", "update"]


@pytest.mark.parametrize("method, place", [
    ("seed", "memory"), pytest.param("moco", "memory", marks=slow),
    pytest.param("supervised", "memory", marks=slow), pytest.param("seed", "disk", marks=slow)])
def test_a_profile_times_each_part_and_leaves_no_run_behind(quick, capsys, monkeypatch,
                                                            folder_of_images, method, place):
    """The table would not add up, or miss a part; or the next run would resume from the profile."""
    arch = "resnet18"                                           # few layers: few events
    flags = ["--profile", "--method", method, "--arch", arch, "--teacher-arch", arch, *TINY,
             *"--subset 20 --batch-size 4 --epochs 1 --compare --eval-every 1".split()]
    monkeypatch.setattr(train, "evaluate", None)                # an evaluation is no part of a step
    if method == "seed":
        flags += ["--teacher-cache", "cache"]
    if place == "disk":
        flags += ["--dataset", "folder", "--data", str(folder_of_images), "--image-size", "72",
                  "--workers", "1"]
    train.main(flags)
    out = capsys.readouterr().out
    assert f"{'on' if place == 'disk' else 'in'} {place}" in out
    dataset = "folder" if place == "disk" else "shapes"
    trace = quick / f"trace-{dataset}-{method}-{arch}.json"
    assert set(quick.iterdir()) == {folder_of_images, trace}
    assert f"wrote {trace.name}" in out
    named = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(STAGES) <= named
    table = {}
    for name, text, share, speed in re.findall(r"^(\w[\w ]+?) +([\d.]+) +(\d+)% +(\d+)$", out,
                                               re.M):
        ms = float(text)
        table[name] = ms
        assert 4e3 / (ms + 0.006) - 1 < float(speed) < 4e3 / (ms - 0.006) + 1
        assert float(share) == pytest.approx(100 * ms / table["whole step"], abs=0.6)
    assert list(table) == ["whole step", *STAGES, "networks"]
    assert min(table[name] for name in ("augmentation", "student", "backward", "update")) > 0
    networks = sum(table[name] for name in ("teacher", "student", "backward", "update"))
    assert table["networks"] == pytest.approx(networks, abs=0.03)
    parts = networks + table["reading"] + table["augmentation"] + table["loss"]
    assert 0.4 < parts / table["whole step"] < 1.5


def test_a_single_step_cannot_be_profiled(quick):
    """The table would hold nan."""
    flags = "--profile --method supervised --subset 4 --batch-size 4 --epochs 1".split()
    with pytest.raises(InputError, match="raise --epochs"):
        train.main([*TINY, *flags, "--arch", ARCH])


def test_a_finished_run_keeps_its_encoder_to_the_last_bit(quick):
    """A student knows its teacher by the bits: made anew, on another device, it would be another,
    and the student could not go on."""
    flags = ["--method", "supervised", "--arch", ARCH, "--out", "run", *TINY]
    train.main(flags)
    file = Path("run/encoder.pt")
    before = file.stat().st_mtime_ns
    train.main(flags)
    assert file.stat().st_mtime_ns == before
    file.unlink()
    train.main(flags)
    assert file.exists()


def test_a_folder_in_use_is_left_alone(quick):
    """`--out .` would empty a log.csv and delete temporary files that are of no run."""
    for name in ("log.csv", "notes.tmp"):
        Path(name).write_text("of a user")
    with pytest.raises(InputError, match="a log.csv that is of no run"):
        train.main(["--arch", ARCH, "--teacher-arch", ARCH, "--out", ".", *TINY])
    assert not Path("runs").exists(), "before the teacher is trained"
    assert {Path(name).read_text() for name in ("log.csv", "notes.tmp")} == {"of a user"}


def test_reading_initial_weights_leaves_the_random_numbers_alone(teacher_file, monkeypatch):
    """Only the first process reads; on the others the queue would start with other entries."""
    teacher = load_teacher(teacher_file)
    drawn = []
    for extra in (0, 7):
        def read(path, arch, extra=extra):
            torch.rand(extra)
            return teacher

        monkeypatch.setattr(train, "load_teacher_on_all", read)
        args = train.parse_args(["--arch", ARCH, "--init", teacher_file])
        train.new_encoder(train.make_config(args, "seed"))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_run_resumes_or_says_that_it_is_finished_and_refuses_other_settings(quick, capsys):
    """The same command again would silently train something else into the same folder."""
    flags = ["--method", "supervised", "--arch", ARCH, "--out", "run", *TINY]
    train.main(flags)
    before = Path("run/encoder.pt").read_bytes()
    capsys.readouterr()
    train.main([*flags, "--workers", "1", "--eval-every", "1"])
    assert "finished before, after 12 steps" in capsys.readouterr().out
    assert Path("run/encoder.pt").read_bytes() == before
    for name, value, is_now in (("lr", "0.3", "0.1, is 0.3"), ("epochs", "3", "2, is 3"),
                                ("seed", "1", "0, is 1")):
        with pytest.raises(InputError, match=f"{name} was {is_now}"):
            train.main([*flags, f"--{name}", value])
    rows = log_rows("run")
    assert [int(row["step"]) for row in rows] == [6, 10, 12]
    assert "kl" not in rows[0]
    args = json.loads(Path("run/args.json").read_text())
    assert (args["lr"], args["method"], args["arch"]) == (0.1, "supervised", ARCH)
    assert Image.open("run/views.png").size == (8 * 106 + 2, 6 * 106 + 2)
    encoder = load_teacher("run/encoder.pt")
    assert "supervision, 2 epochs on shapes" in encoder.provenance
    assert encoder.used_labels is True


def test_a_teacher_that_cannot_take_the_images_is_refused_before_training(monkeypatch):
    """A vision transformer of 224 px would fail in the first step of a student at 32 px."""
    teacher = Encoder(ARCH, image_size=64)

    def refuse(image_size):
        raise InputError(f"not at {image_size} px")

    monkeypatch.setattr(teacher, "check_image_size", refuse)
    monkeypatch.setattr(train, "load_teacher_on_all", lambda path, arch: teacher)
    args = train.parse_args(["--teacher", "teacher.pt", "--device", "cpu"])
    with pytest.raises(InputError, match="not at 32 px"):
        train.get_teacher(args, train.make_config(args, "seed"), None, CPU)


def test_a_teacher_is_trained_once_and_kept_under_what_made_it(quick, capsys):
    """A kept teacher of another recipe or seed would spoil a comparison without a word."""
    flags = ["--arch", ARCH, "--teacher-arch", ARCH, "--max-steps", "2", *TINY]
    train.main([*flags, "--out", "a"])
    out = capsys.readouterr().out
    assert "WITH the labels" in out
    assert "stage 1" in out
    teachers = Path("runs/teachers")
    [folder] = teachers.iterdir()
    made = json.loads((folder / "args.json").read_text())
    assert (made["arch"], made["epochs"], made["method"]) == (ARCH, 1, "supervised")
    train.main([*flags, "--tau-t", "0.1", "--lr", "0.1", "--out", "b"])
    assert "finished before" in capsys.readouterr().out
    assert list(teachers.iterdir()) == [folder]
    train.main([*flags, "--teacher-method", "moco", "--out", "c"])
    train.main([*flags, "--seed", "1", "--out", "d"])
    train.main([*flags, "--max-steps", "1", "--out", "e"])
    assert len(list(teachers.iterdir())) == 4
    student = load_teacher("a/encoder.pt")
    assert student.used_labels is True
    assert "SEED, 0.3333 epochs on shapes, teacher: " in student.provenance
    assert f"teacher: {ARCH}, supervision, 0.3333 epochs on shapes" in student.provenance
    assert load_teacher("c/encoder.pt").used_labels is False


def test_a_student_takes_its_teachers_dim(quick, teacher_file):
    """A teacher with embeddings of another width than 128 could not be used."""
    flags = ["--arch", ARCH, "--teacher", teacher_file, "--max-steps", "1", *TINY, "--out", "run"]
    with pytest.raises(InputError, match="--dim 8: the teacher's embeddings have 32 numbers"):
        train.main([*flags, "--dim", "8"])
    assert not Path("run").exists()
    train.main([*flags, "--dim", "32"])
    assert load_teacher("run/encoder.pt").dim == 32


def test_a_teacher_is_used_at_the_size_of_the_run(quick, teacher_file):
    """The table would show the teacher's accuracy on images of another size than the student's;
    and a teacher that cannot take images of this size would fail in the first step."""
    args = train.parse_args(["--teacher", teacher_file, "--image-size", "40"])
    teacher, _ = train.get_teacher(args, train.make_config(args, "seed"), None, CPU)
    assert teacher.image_size == 40


@slow
def test_the_papers_setting_runs_on_large_images(tmp_path, monkeypatch, folder_of_images, capsys):
    """ImageNet's path would be broken: JPEG files, workers, a published MoCo-v2 ResNet-50."""
    monkeypatch.chdir(tmp_path)
    torch.save(moco_file(moco_network("resnet50", version=2), "resnet50"), "moco.pth.tar")
    train.main(["--dataset", "folder", "--data", str(folder_of_images), "--image-size", "72",
                "--arch", ARCH, "--teacher", "moco.pth.tar", "--batch-size", "2", "--max-steps",
                "1", "--workers", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "matched 318/318" in out
    assert "without labels" in out
    assert "waiting" in out
    assert "the queue of 65,536 is cut to the 22 images" in out
    student = load_teacher(f"runs/folder-seed-{ARCH}/encoder.pt")
    assert (student.dim, student.image_size, student.used_labels) == (128, 72, False)


def test_imagenet_needs_a_teacher_and_says_where_there_is_one(tmp_path, monkeypatch):
    """A ResNet-50 would be trained for days without having been asked for."""
    monkeypatch.chdir(tmp_path)
    for label in "xy":
        write_images(tmp_path, [f"train/{label}/{i}.png" for i in range(4)])
        write_images(tmp_path, [f"val/{label}/0.png"])
    with pytest.raises(InputError, match="no --teacher: use a published one"):
        train.main(["--dataset", "imagenet", "--data", ".", "--arch", ARCH, "--image-size", "32",
                    "--batch-size", "4", "--device", "cpu"])
    assert not Path("runs").exists()


def readme_commands(program):
    """The commands with that program in the README's blocks of shell code: lists of words."""
    found = []
    variables = {}
    for block in (HERE / "README.md").read_text().split("```sh\n")[1:]:
        for line in block.split("```")[0].replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"\w+=", words[0]):
                name, _, value = words[0].partition("=")
                variables[name] = value
            if program in words:
                words = words[words.index(program) + 1:]
                ends = [i for i, word in enumerate(words) if word in ("&&", ";", "|", ">", "&")]
                found.append(words[:ends[0]] if ends else words)
    return found


def test_the_readmes_commands_are_understood():
    """A user would copy a command that does not run."""
    commands = readme_commands("train.py")
    assert len(commands) >= 8
    for words in commands:
        args = train.parse_args(words)
        train.make_config(args, args.method)
        assert args.teacher is None or args.teacher.startswith(("https://", "runs/"))
    commands = readme_commands("probe.py")
    assert len(commands) >= 4
    for words in commands:
        assert probe.parse_args(words).encoder.endswith("encoder.pt")
    for block in (HERE / "README.md").read_text().split("```python\n")[1:]:
        compile(block.split("```")[0], "README.md", "exec")


@slow
def test_an_exported_network_becomes_a_detector(quick):
    """As the README says; most users of a backbone without labels want to detect something."""
    for arch in ("mobilenet_v3_large", "resnet18"):
        save_encoder(f"{arch}.pt", Encoder(arch, 8, image_size=32), "a test", False)
        probe.main([f"{arch}.pt", "--export", "weights.pth"])
        names = {}
        if arch == "resnet18":                                          # the README's other word
            backbone_utils = torchvision.models.detection.backbone_utils
            body = backbone_utils.resnet_fpn_backbone(backbone_name=arch, weights=None,
                                                      norm_layer=nn.BatchNorm2d)
            body.body.load_state_dict(torch.load("weights.pth"))
        else:
            blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
            [block] = [b.split("```")[0] for b in blocks if "weights.pth" in b.split("```")[0]]
            exec(block, names)
            body = names["body"]
        saved = torch.load("weights.pth")
        for name, value in body.body.state_dict().items():
            assert torch.equal(value, saved[name if arch == "resnet18" else f"features.{name}"])
    detector = names.get("detector") or torchvision.models.detection.FasterRCNN(body, 91)
    [found] = detector.eval()([torch.rand(3, 64, 64)])
    assert {"boxes", "labels", "scores"} <= found.keys()


@slow
def test_the_readmes_main_command_runs(tmp_path, monkeypatch, few_shapes, capsys):
    """The first thing that a user tries would fail, or its table would not be what it says."""
    monkeypatch.chdir(tmp_path)
    words = readme_commands("train.py")[0]
    assert words == ["--arch", "mobilenet_v3_large"]
    train.main([*words, *"--subset 128 --max-steps 4 --epochs 2 --device cpu".split()])
    printed = capsys.readouterr().out
    out = Path("runs/shapes-seed-mobilenet_v3_large")
    rows = json.loads((out / "results.json").read_text())
    names = ["mobilenet_v3_large, untrained", "resnet18, the teacher", "mobilenet_v3_large by SEED"]
    assert [row["name"] for row in rows] == names
    assert [row["labels"] for row in rows] == ["no", "yes", "by its teacher"]
    assert [row["seconds"] is None for row in rows] == [True, False, False]
    for row in rows:
        assert 0 < row["knn"] <= 100
        assert 0 < row["linear"] <= 100
        line = next(line for line in printed.splitlines() if line.startswith(f"{row['name']}  "))
        shown = [f"{row['knn']:.1f}%", f"{row['linear']:.1f}%"]
        assert line.removeprefix(row["name"]).split()[:2] == shown
        assert line.endswith(row["labels"])
    for name in ("views.png", "neighbors.png"):
        assert Image.open(out / name).size[0] > 300
    probe.main([str(out / "encoder.pt"), "--subset", "128", "--device", "cpu"])
    assert "kNN" in capsys.readouterr().out
    found = json.loads((out / "probe.json").read_text())
    assert found["knn"] == pytest.approx(rows[2]["knn"], abs=0.5)
    assert found["linear"] == pytest.approx(rows[2]["linear"], abs=2)
    assert "mobilenet_v3_large, SEED, 2 epochs on shapes" in found["provenance"]
    assert found["used_labels"] is True


def test_compare_trains_the_same_network_by_the_other_methods(tmp_path, monkeypatch, few_shapes,
                                                              quick_encoders, teacher_file):
    """The README's comparison would not be one: other images, or settings of another method."""
    monkeypatch.chdir(tmp_path)
    flags = ["--arch", ARCH, "--teacher", teacher_file, "--lr", "0.7", "--max-steps", "1", *TINY]
    train.main([*flags, "--compare", "--out", "run"])
    rows = json.loads(Path("run/results.json").read_text())
    names = [f"{ARCH}, untrained", f"{ARCH}, the teacher", f"{ARCH} by SEED", f"{ARCH} by MoCo-v2",
             f"{ARCH} by supervision"]
    assert [row["name"] for row in rows] == names
    assert [row["labels"] for row in rows] == ["no", "no", "no", "no", "yes"]
    assert json.loads(Path("run/args.json").read_text())["lr"] == 0.7
    for method, lr in (("moco", 0.06), ("supervised", 0.1)):
        args = json.loads(Path(f"run/{method}/args.json").read_text())
        assert (args["method"], args["arch"], args["lr"]) == (method, ARCH, lr)
        assert load_teacher(f"run/{method}/encoder.pt").arch == ARCH


def test_a_folder_that_a_rival_cannot_use_is_an_error_before_any_training(quick, teacher_file):
    """The student would be trained for days before the error."""
    Path("run/moco").mkdir(parents=True)
    Path("run/moco/encoder.pt").touch()
    with pytest.raises(InputError, match="run/moco has no checkpoint to resume from"):
        train.main([*TINY, "--arch", ARCH, "--teacher", teacher_file, "--compare", "--out", "run"])
    assert os.listdir("run") == ["moco"]


def slow_linear_probe(encoder, data, steps, cfg):
    """The weights of the paper's linear probe after some steps, by SGD's formula."""
    weight = torch.zeros(len(data.classes), encoder.feature_dim)
    bias = torch.zeros(len(data.classes))
    torch.manual_seed(cfg.seed)
    nn.Linear(encoder.feature_dim, len(data.classes))           # draws its initial weights
    nn.init.normal_(weight, std=0.01)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    lr = 30 * 16 / 256
    for step in range(steps):
        if step in (round(0.6 * steps), round(0.8 * steps)):
            lr /= 10
        epoch, samples = probe.samples_of_step(step, len(data.train), cfg)
        u = uniforms(cfg.seed, epoch, samples)
        view = augment(data.train.pixels[samples], u, 32, (0.08, 1.0), color=False)
        x = encoder.features(view)
        labels = data.train.labels[samples]
        p = (x @ weight.T + bias).softmax(1)
        p[range(len(labels)), labels] -= 1
        for value, momentum, gradient in zip((weight, bias), momenta, (p.T @ x, p.sum(0))):
            momentum.mul_(0.9).add_(gradient / len(labels))
            value.sub_(lr * momentum)
    return weight, bias


def test_the_papers_linear_probe_is_the_papers(few_shapes, monkeypatch):
    """With another rate, normalized features, or batch norm in training mode, its number would not
    be comparable with any published one."""
    encoder = load_encoder_of_a_test()
    data = load_data("shapes", subset=48)
    cfg = argparse.Namespace(**{**probe.LINEAR, "batch_size": 16, "epochs": 5}, seed=3, workers=0,
                             image_size=32)
    weight, bias = slow_linear_probe(encoder, data, 15, cfg)
    x, _ = probe.extract_features(encoder, data.test)
    before = snapshot(encoder)
    kept = {}
    monkeypatch.setattr(probe, "accuracy", lambda layer, x, y: kept.update(layer=layer, x=x) or 7)
    assert probe.fit_classifier(encoder, data, CPU, cfg) == 7
    assert torch.equal(kept["x"], x), "of the test images, whole"
    assert torch.allclose(kept["layer"].weight, weight, atol=1e-3 * weight.abs().max())
    assert torch.allclose(kept["layer"].bias, bias, atol=1e-3 * weight.abs().max())
    assert same(snapshot(encoder), before)
    assert {k: probe.LINEAR[k] for k in ("lr", "epochs", "batch_size", "weight_decay")} == dict(
        lr=30.0, epochs=100, batch_size=256, weight_decay=0.0)


def test_a_protocol_that_diverges_ends_with_the_epoch(few_shapes, monkeypatch):
    """Who fine-tunes at too high a rate would wait for days, for an accuracy of nothing."""
    cfg = argparse.Namespace(**{**probe.LINEAR, "batch_size": 16, "epochs": 3, "lr": math.inf},
                             seed=0, workers=0, image_size=32)
    data = load_data("shapes", subset=48)
    steps = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *x: steps.append(1) or cross_entropy(*x))
    with pytest.raises(FloatingPointError, match="not finite"):
        probe.fit_classifier(load_encoder_of_a_test(), data, CPU, cfg)
    assert len(steps) == 3, "of 9"


def load_encoder_of_a_test():
    """A frozen encoder whose batch norm is not the initial one."""
    encoder = Encoder(ARCH, 8, image_size=32)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    return encoder.eval().requires_grad_(False)


def test_a_protocol_sees_the_same_batches_in_any_number_of_processes(few_shapes, monkeypatch):
    """With 8 GPUs the paper's learning rate would go with another batch."""
    args = argparse.Namespace(epochs=None, batch_size=None, seed=0, workers=0)
    data = load_data("shapes", subset=75)
    encoder = load_encoder_of_a_test()
    sizes = []
    for world_size in (1, 2, 4):
        monkeypatch.setattr(probe, "rank_and_world_size", lambda: (0, world_size))
        sizes.append(probe.protocol(probe.LINEAR, args, encoder, data).batch_size)
    assert sizes == [75, 74, 72], "over all processes; at most the images, evenly shared"
    monkeypatch.setattr(probe, "rank_and_world_size", lambda: (0, 64))
    with pytest.raises(InputError, match="75 training images are too few"):
        probe.protocol(probe.LINEAR, args, encoder, data)


def test_fine_tuning_trains_the_whole_network_on_the_share_of_labels(quick, few_shapes, capsys):
    """With the backbone frozen, or with more labels than it says, the semi-supervised row of the
    paper would be another experiment."""
    encoder = load_encoder_of_a_test()
    save_encoder("encoder.pt", encoder, "a test", False)
    seen = []
    fit = probe.fit_classifier

    def watched(encoder, data, device, cfg):
        before = snapshot(encoder.backbone)
        found = fit(encoder, data, device, cfg)
        after = snapshot(encoder.backbone)
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        seen.append((data.train.labels, len(moved) == len(before), encoder.provenance, cfg))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "fit_classifier", watched)
        probe.main("encoder.pt --finetune --label-fraction 0.1 --epochs 2 --device cpu".split())
    assert len(seen) == 2
    for labels, all_moved, _, _ in seen:
        assert all_moved, "weights, and statistics of batch norm"
        counts = torch.bincount(labels)
        assert counts.min() == counts.max() == round(0.1 * len(load_data("shapes").train) / 20)
    assert "random weights" in seen[1][2]
    assert [cfg.epochs for *_, cfg in seen] == [2, 2]
    out = capsys.readouterr().out
    assert re.search(r"fine-tuned [\d.]+%   the same network from scratch [\d.]+%", out)
    epochs = r"  epoch 1/2  loss [\d.]+\n  epoch 2/2  loss [\d.]+\n"
    lines = f"finetuned:\n{epochs}from_scratch:\n{epochs}"
    assert re.search(lines, out), "who waits an hour wants to see that it goes on"
    summary = json.loads(Path("probe-finetuned.json").read_text())
    assert {"finetuned", "from_scratch"} <= summary.keys()


def test_a_network_trained_for_few_steps_is_evaluated_with_statistics_of_its_own(few_shapes,
                                                                                 monkeypatch):
    """MobileNet's batch norm moves by 1% a step; in evaluation mode all features would be one
    point, and the row "from scratch" that of chance."""
    data = load_data("shapes", subset=64)
    encoder = Encoder("mobilenet_v3_small", 8, image_size=32)
    cfg = argparse.Namespace(**{**probe.SCRATCH, "batch_size": 32, "epochs": 2}, seed=0, workers=0,
                             image_size=32)
    extract = probe.extract_features
    evaluated = []

    def recorded(network, *args):
        evaluated.append(network)
        return extract(network, *args)

    monkeypatch.setattr(probe, "extract_features", recorded)
    probe.fit_classifier(encoder, data, CPU, cfg)
    [network] = evaluated
    assert spread_and_agreement(encoder)[0] < 1e-3, "else this test shows nothing"
    assert spread_and_agreement(network)[0] > 0.5
    expected = probe.average_batch_norm(encoder, data.train)
    assert same(network.state_dict(), expected.state_dict())
    first = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    assert first.momentum == 0.01, "as before, for whoever trains on"


def test_a_share_of_labels_is_the_same_of_each_class():
    """By chance a class might have no image at 1%."""
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    split = Split(pixels=torch.arange(153).view(-1, 1, 1, 1), labels=labels)
    chosen = probe.label_fraction(split, 0.1, seed=0)
    assert torch.bincount(chosen.labels).tolist() == [10, 5, 1]
    assert torch.equal(labels[chosen.pixels.flatten()], chosen.labels)
    assert torch.equal(probe.label_fraction(split, 0.1, 0).pixels, chosen.pixels)
    assert not torch.equal(probe.label_fraction(split, 0.1, 1).pixels, chosen.pixels)


@pytest.mark.parametrize("flags", ["--finetune --linear paper", "--epochs 3", "--batch-size 8"])
def test_flags_of_the_probe_that_would_do_nothing_are_refused(flags):
    """A user would read one number for another."""
    with pytest.raises(InputError, match="--finetune and --linear paper"):
        probe.parse_args(["encoder.pt", *flags.split()])


def test_protocols_refuse_what_they_cannot_do(quick, few_shapes):
    """Each would end in a traceback after minutes of reading."""
    write_images(Path("flat"), [f"{i}.png" for i in range(12)])
    for flags, words in (("--label-fraction 0", "--label-fraction must be from 1e-09 to 1, got 0"),
                         ("--label-fraction 2", "got 2"), ("--finetune --epochs 0", "from 1 to "),
                         ("--finetune --dataset folder --data flat", "no labels to train"),
                         ("--linear paper --dataset folder --data flat", "no labels to train")):
        with pytest.raises(InputError, match=words):
            probe.main([f"random:{ARCH}", "--image-size", "32", "--device", "cpu", *flags.split()])


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_large", ARCH])
def test_an_exported_file_is_torchvisions(quick, arch):
    """Users load it where torchvision's own weights would go."""
    encoder = Encoder(arch, 8, image_size=32)
    save_encoder("encoder.pt", encoder, "a test", False)
    probe.main(["encoder.pt", "--export", "weights.pth"])
    weights = torch.load("weights.pth", weights_only=True)
    network = torchvision.models.get_model(arch)
    result = network.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    last = {"mobilenet_v3_large": "classifier.3"}.get(arch, "fc")
    assert result.missing_keys == [f"{last}.weight", f"{last}.bias"]
    assert same(encoder.backbone.state_dict(), weights)
    encoder = Encoder("resnet18", 8, small_images=True, image_size=32)
    save_encoder("small.pt", encoder, "a test", True)
    with pytest.raises(InputError, match="torchvision has no resnet18 like this"):
        probe.main(["small.pt", "--export", "weights.pth"])


def test_probe_evaluates_an_untrained_network_too(tmp_path, monkeypatch, few_shapes, capsys):
    """Without that row nobody could tell what an accuracy means."""
    monkeypatch.chdir(tmp_path)
    probe.main(["random:resnet18", "--subset", "200", "--device", "cpu", "--out", "here"])
    assert "resnet18, random weights, without labels" in capsys.readouterr().out
    found = json.loads(Path("here/probe.json").read_text())
    assert 5 < found["knn"] < 30
    assert found["encoder"] == "random:resnet18"
    assert found["used_labels"] is False
    assert "200 training" in found["data"]
    assert Path("here/neighbors.png").exists()
    path = Path("encoder.pt")
    save_encoder(path, Encoder(ARCH, image_size=32), "a test", False)
    assert probe.load_encoder(probe.parse_args([str(path)])).image_size == 32
    assert probe.load_encoder(probe.parse_args([str(path), "--image-size", "48"])).image_size == 48
    one = probe.load_encoder(probe.parse_args([f"random:{ARCH}"]))
    again = probe.load_encoder(probe.parse_args([f"random:{ARCH}"]))
    other = probe.load_encoder(probe.parse_args([f"random:{ARCH}", "--seed", "1"]))
    assert same(one.state_dict(), again.state_dict())
    assert not same(one.state_dict(), other.state_dict())


def test_images_without_labels_are_welcome(tmp_path, monkeypatch, capsys):
    """SEED needs no label, and yet a directory of images would not do."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "p", [f"{i}.png" for i in range(40)])
    train.main(["--dataset", "folder", "--data", "p", "--image-size", "32", "--arch", ARCH,
                "--teacher-arch", ARCH, "--batch-size", "8", "--epochs", "1", "--teacher-epochs",
                "1", "--max-steps", "2", "--device", "cpu", "--compare"])
    assert "without labels" in capsys.readouterr().out
    out = Path(f"runs/folder-seed-{ARCH}")
    args = json.loads((out / "args.json").read_text())
    assert args["queue_size"] == 36, "no longer than there are images"
    rows = json.loads((out / "results.json").read_text())
    names = [f"{ARCH}, untrained", f"{ARCH}, the teacher", f"{ARCH} by SEED", f"{ARCH} by MoCo-v2"]
    assert [row["name"] for row in rows] == names
    assert all(row["knn"] is row["linear"] is None for row in rows)
    assert (out / "neighbors.png").exists()
    probe.main([str(out / "encoder.pt"), "--dataset", "folder", "--data", "p", "--device", "cpu"])
    assert "no labels, so no accuracy" in capsys.readouterr().out
    for flags in (["--method", "supervised"], ["--teacher-method", "supervised"]):
        with pytest.raises(InputError, match="training with labels needs them, and p has none"):
            train.main(["--dataset", "folder", "--data", "p", "--image-size", "32", "--batch-size",
                        "8", "--arch", ARCH, "--device", "cpu", "--out", "other", *flags])
    assert not Path("other").exists()


@pytest.mark.parametrize("flags", [[], ["--out", "deep/run"], ["--method", "moco", "--out", "run"]])
def test_a_run_does_not_write_among_its_images(tmp_path, monkeypatch, flags):
    """The run's own views.png would be a training image the next time."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, [f"{i}.png" for i in range(20)])
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match="among the images"):
        train.main(["--dataset", "folder", "--data", ".", "--image-size", "32", "--batch-size", "8",
                    "--arch", ARCH, "--device", "cpu", *flags])
    assert set(tmp_path.iterdir()) == before


def test_a_run_may_lie_beside_a_train_folder(tmp_path, few_shapes):
    """Whoever keeps runs beside train/ and val/ would be refused without need."""
    for label in "xy":
        write_images(tmp_path, [f"train/{label}/{i}.png" for i in range(4)])
    flags = ["--dataset", "folder", "--data", str(tmp_path), "--image-size", "32", "--batch-size",
             "4", "--out", str(tmp_path / "run")]
    train.fit_to_data(make_cfg(*flags), load_data("folder", tmp_path, 32))


def test_a_run_is_not_the_folder_of_its_images(tmp_path):
    """The run's own views.png would be a training image the next time."""
    write_images(tmp_path, [f"{i}.png" for i in range(20)])
    flags = ["--dataset", "folder", "--data", str(tmp_path), "--image-size", "32", "--batch-size",
             "4", "--out", str(tmp_path)]
    with pytest.raises(InputError, match="among the images"):
        train.fit_to_data(make_cfg(*flags), load_data("folder", tmp_path, 32))


# ----------------------------------------------------------------------------------- the processes
def run_as_command(name, *words):
    """Run a file as `python FILE WORDS` does, in this process; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(HERE / name), run_name="__main__")
    return ended.value.code


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """A shell script would go on; a reader would have to look for the reason in a traceback."""
    monkeypatch.chdir(tmp_path)
    for name, words in (("train.py", ["--lr", "-1"]), ("probe.py", ["nothing.pt"])):
        assert run_as_command(name, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    done = command(sys.executable, HERE / "probe.py", "nothing.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no such file: nothing.pt\n"
    assert done.stdout == ""


def test_bad_input_to_several_processes_is_one_line_of_the_first(monkeypatch, capsys):
    """Eight processes would print the same line eight times; or none, if one alone fails."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert run_as_command("train.py", "--lr", "-1") == 2
    assert slept == []
    monkeypatch.setenv("RANK", "1")
    assert run_as_command("train.py", "--lr", "-1") == 2
    assert slept == [5], "by then torchrun has ended it, since the main process has failed"
    assert capsys.readouterr().err.count("error: --lr must be from 1e-09 to 1000, got -1") == 2


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "\ninterrupted"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory; lower --batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "error: out of"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 1, "error: out of memor"),
    (np._core._exceptions._ArrayMemoryError((9,), np.dtype("f4")), 1, "error: out of memory"),
    (MemoryError(), 1, "error: out of memory; lower"),
    (RuntimeError("Connection closed by peer [127.0.0.1]:1"), 1, "error: another process of this"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to write to file "
                  "</torch_1_2_3>: No space left on device (28)"), 1, "error: a process that"),
    (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error."), 1,
     "error: a process that reads images was killed; if shared memory (/dev/shm) is small"),
    (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
    (OSError("disk full"), 1, "error: disk full")])
def test_a_run_that_cannot_go_on_says_why_in_one_line(monkeypatch, capsys, error, code, words):
    """The reader would have to look for the reason in a traceback."""
    def fail(*args):
        raise error

    monkeypatch.setattr(probe, "load_data", fail)
    assert run_as_command("train.py", "--device", "cpu") == code
    assert capsys.readouterr().err.startswith(words)


def test_a_bug_stays_a_traceback(monkeypatch):
    """A line about memory would hide where it happened."""
    def fail(*args):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal "
                           "Traceback:\nRuntimeError: mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(probe, "load_data", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        run_as_command("train.py", "--device", "cpu")


def test_an_error_of_a_worker_is_one_line():
    """The broken file's name would stand under a traceback of the worker."""
    error = InputError("Caught InputError in DataLoader worker process 0.\nTraceback:\n  x\n"
                       "seed.InputError: cannot read the image 3.png")
    assert probe.one_line(error) == "error: cannot read the image 3.png"


def test_the_batch_is_shared_evenly_or_refused(monkeypatch, few_shapes):
    """Processes would train on different numbers of images, or batch norm on a single one."""
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (0, 2))
    data = load_data("shapes")
    for size in (129, 2):
        with pytest.raises(InputError, match=f"--batch-size {size} must be a multiple of the 2 "):
            train.fit_to_data(make_cfg("--batch-size", str(size)), data)
    train.fit_to_data(make_cfg("--batch-size", "4"), data)


@pytest.mark.parametrize("device, gpus, environment, words", [
    ("mps", 0, dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"), "several processes need GPUs"),
    ("cuda", 1, dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"), "2 processes but 1 GPUs")])
def test_processes_that_the_machine_cannot_serve_are_refused(monkeypatch, device, gpus,
                                                             environment, words):
    """Processes would wait for each other for two hours, or share a GPU and be half as fast."""
    monkeypatch.setattr(probe, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        probe.init_distributed(device)
    assert not dist.is_initialized()


def test_gpus_that_are_not_used_are_mentioned(monkeypatch, capsys):
    """Seven of eight GPUs would be idle for days."""
    monkeypatch.setattr(probe, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", print)
    monkeypatch.setattr(sys, "argv", ["train.py", "--arch", "a b"])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert probe.init_distributed("cuda") == torch.device("cuda", 0)
    note = "note: 7 GPUs are not used; torchrun --nproc_per_node=8 train.py --arch 'a b'"
    assert note in capsys.readouterr().out


def start(*words, cwd):
    """Start a command as a user does, but on one thread: a Popen with its output."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen([str(word) for word in words], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def command(*words, cwd):
    """Run a command to its end: CompletedProcess with its output."""
    process = start(*words, cwd=cwd)
    out, error = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.returncode, out, error)


def torchrun(*flags):
    """The words of torchrun, and of train.py."""
    return [sys.executable, "-m", "torch.distributed.run", *flags, HERE / "train.py"]


def wait_for_rows(folder, count, process):
    """Until the log of a run has so many rows."""
    path = Path(folder, "log.csv")
    while not path.exists() or len(path.read_text().splitlines()) <= count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


SHORT_RUN = (f"--arch {ARCH} --dataset folder --data images --image-size 32 --batch-size 8 "
             "--epochs 8 --queue-size 64 --eval-every 4 --device cpu --save-minutes 0").split()


@slow
@pytest.mark.parametrize("ranks, flags", [
    (1, "--method supervised --image-size 72 --workers 2"),
    (1, "--teacher teacher.pt --small-crops 1 --teacher-cache cache"), (2, "--method moco"),
    (2, "--teacher teacher.pt --image-size 72 --workers 1 --teacher-cache cache")])
def test_a_run_that_is_killed_at_any_moment_is_the_run_that_never_stopped(tmp_path, teacher_file,
                                                                         ranks, flags):
    """Else nobody could tell what a run that was cut twice has computed."""
    gray_images(tmp_path / "images", 120)
    shutil.copy(teacher_file, tmp_path / "teacher.pt")
    launcher = [sys.executable, HERE / "train.py"]
    if ranks > 1:
        launcher = torchrun("--standalone", "--nproc_per_node", ranks)
    words = [*launcher, *SHORT_RUN, *flags.split()]
    whole = command(*words, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    for rows in (0, 5):
        process = start(*words, "--out", "run", cwd=tmp_path)
        wait_for_rows(tmp_path / "run", rows, process)
        time.sleep(0.02 * rows)
        kill_all(process)
    done = command(*words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    one = last_checkpoint(tmp_path / "whole")
    other = last_checkpoint(tmp_path / "run")
    assert one["step"] == other["step"] == 104
    assert same(one["method"], other["method"])
    momenta = [run["optimizer"]["state"] for run in (one, other)]
    assert all(same(momenta[0][i], momenta[1][i]) for i in momenta[0])
    logs = [without_times(log_rows(tmp_path / name)) for name in ("whole", "run")]
    assert logs[0] == logs[1]
    assert not list(tmp_path.glob("run/*.tmp"))


def kill_all(process, number=signal.SIGKILL):
    """Signal a command and the processes that it started; kill -9 if not told otherwise."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    parents = dict(line.split() for line in listed.splitlines()[1:])
    family = [str(process.pid)]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family[::-1]:                                    # readers first
        os.kill(int(pid), number)
    return process.communicate(timeout=60)[0]


@slow
def test_a_signal_to_all_processes_does_not_cost_the_last_minutes(tmp_path):
    """Slurm signals the readers of images, too; a run without them could not finish its step."""
    gray_images(tmp_path / "images", 120)
    flags = "--method supervised --image-size 72 --workers 2 --batch-size 2 --save-minutes 99"
    process = start(sys.executable, HERE / "train.py", *SHORT_RUN, *flags.split(), "--out", "run",
                    cwd=tmp_path)
    wait_for_rows(tmp_path / "run", 3, process)
    out = kill_all(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM; the same command goes on" in out
    assert last_checkpoint(tmp_path / "run")["step"] % 54 != 0, "not the save after an epoch"


@slow
def test_an_error_among_the_readers_ends_the_command(tmp_path):
    """It would wait for ever for readers that ignore signals; and other processes for it."""
    gray_images(tmp_path / "images", 120)
    flags = "--method supervised --image-size 72 --workers 2 --epochs 1000"
    process = start(sys.executable, HERE / "train.py", *SHORT_RUN, *flags.split(), "--out", "run",
                    cwd=tmp_path)
    wait_for_rows(tmp_path / "run", 3, process)
    shutil.rmtree(tmp_path / "images")
    assert "cannot be read" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


@slow
@pytest.mark.parametrize("number", train.STOP_SIGNALS)
def test_torchrun_passes_a_signal_on_and_all_processes_save_and_end(tmp_path, number):
    """A time limit, or Ctrl-C, would cost what was computed since the last save; or some processes
    would wait for one that has ended."""
    names = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"        # SIGUSR1 only if it is named
    if number != signal.SIGUSR1 or "signals-to-handle" not in command(
            *torchrun("--help")[:-1], cwd=tmp_path).stdout:
        names = "--max-restarts=0"
    gray_images(tmp_path / "images", 120)
    launcher = torchrun("--standalone", "--nproc_per_node=2", names)
    flags = [*SHORT_RUN, "--method", "moco", "--save-minutes", "99"]
    process = start(*launcher, *flags, "--out", "run", cwd=tmp_path)
    wait_for_rows(tmp_path / "run", 2, process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    if names == "--max-restarts=0" and number == signal.SIGUSR1:
        return                                                  # an old torchrun knows no more
    name = signal.Signals(number).name
    assert out.count(f"ended by {name}; the same command goes on from the last checkpoint") == 1
    step = last_checkpoint(tmp_path / "run")["step"]
    assert f"{step}" == log_rows(tmp_path / "run")[-1]["step"]
    assert 13 <= step < 104


@slow
def test_a_process_that_dies_ends_the_others_and_leaves_a_checkpoint(tmp_path):
    """Seven GPUs would wait for the eighth for days."""
    gray_images(tmp_path / "images", 120)
    launcher = torchrun("--standalone", "--nproc_per_node=2")
    process = start(*launcher, *SHORT_RUN, "--method", "moco", "--out", "run", cwd=tmp_path)
    wait_for_rows(tmp_path / "run", 3, process)
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    ranks = [line.split()[0] for line in listed.splitlines() if line.split()[1] == f"{process.pid}"]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    begin = time.time()
    error = process.communicate(timeout=60)[1]
    assert time.time() - begin < 60
    assert process.returncode != 0
    assert "error: another process of this run has ended" in error
    assert last_checkpoint(tmp_path / "run")["step"] >= 13


@slow
def test_two_machines_are_one_run(tmp_path, teacher_file):
    """Each would read or make data of its own, or write over the other's files; or the run would be
    another than on one machine with as many processes."""
    flags = (f"--dataset folder --data images --image-size 32 --arch {ARCH} --batch-size 8 "
             "--epochs 12 --queue-size 64 --eval-every 6 --device cpu --teacher-arch resnet18 "
             "--teacher-method moco --teacher-epochs 1 --out run").split()
    for name in ("one", "first", "second"):
        gray_images(tmp_path / name / "images", 40, side=40)
    done = command(*torchrun("--standalone", "--nproc_per_node=2"), *flags, cwd=tmp_path / "one")
    assert done.returncode == 0, done.stderr

    def start_both():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        agents = []
        for rank, name in enumerate(("first", "second")):
            launcher = torchrun("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1",
                                f"--master_port={port}", f"--node_rank={rank}")
            agents.append(start(*launcher, *flags, cwd=tmp_path / name))
        return agents

    agents = start_both()
    wait_for_rows(tmp_path / "first/run", 2, agents[0])
    agents[1].terminate()                                       # one machine is switched off
    outputs = [agent.communicate(timeout=100) for agent in agents]
    assert "ended by SIGTERM; the same command goes on" in outputs[0][0]
    assert 8 <= last_checkpoint(tmp_path / "first/run")["step"] < 48
    agents = start_both()
    outputs = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "resuming at step" in outputs[0][0]
    assert outputs[1][0] == "", "only the first prints"
    assert os.listdir(tmp_path / "second") == ["images"], "and writes"
    one, other = [last_checkpoint(tmp_path / name / "run") for name in ("one", "first")]
    assert one["step"] == other["step"] == 48
    assert same(one["method"], other["method"])
    logs = [without_times(log_rows(tmp_path / name / "run")) for name in ("one", "first")]
    assert logs[0] == logs[1]
    assert logs[0][-1]["knn"] != ""

    Image.new("RGB", (40, 40), "red").save(tmp_path / "second/images/a/000.png")
    outputs = [agent.communicate(timeout=300) for agent in start_both()]
    assert "are not those of the first machine" in outputs[1][1]


@slow
def test_torchrun_with_two_processes_gives_a_student(tmp_path, folder_of_images):
    """The README's command for several GPUs, here on the CPU, would fail, or print each line
    twice."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = ("--image-size 32 --batch-size 8 --epochs 2 --teacher-epochs 1 --max-steps 2 "
             "--teacher-method moco --device cpu --out run").split()
    done = command(sys.executable, *launcher, HERE / "train.py", "--dataset", "folder", "--data",
                   folder_of_images, "--arch", ARCH, "--teacher-arch", ARCH, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("stage 1", "stage 2", "2 process(es)", f"{ARCH} by SEED  ", "wrote run/"):
        assert done.stdout.count(words) == 1, words
    assert done.stdout.count("100%") == 2, "of teacher and student"
    assert len(log_rows(tmp_path / "run")) == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["labels"] for row in results] == ["no"] * 3
    probe_flags = ("--linear paper --epochs 2 --batch-size 8 --device cpu --workers 0 --dataset "
                   "folder --data").split()
    done = command(sys.executable, *launcher, HERE / "probe.py", "run/encoder.pt", *probe_flags,
                   folder_of_images, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear probe as in the paper") == 1
    summary = json.loads((tmp_path / "run/probe-linear_paper.json").read_text())
    assert summary["flags"]["epochs"] == 2


def test_two_processes_are_one_run(tmp_path, monkeypatch, few_shapes):
    """Two processes would train two networks, or with another queue than one process does."""
    monkeypatch.chdir(tmp_path)
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    one = torch.load(tmp_path / "rank0.pt")
    other = torch.load(tmp_path / "rank1.pt")
    for name in ("seed", "moco"):
        starts = [trained(result[name][0]) for result in (one, other)]
        ends = [trained(result[name][1]) for result in (one, other)]
        assert same(*starts), name
        assert same(*ends), name
        assert not same(starts[0], ends[0])
    assert same(trained(one["run"]), trained(other["run"])), "train.py averages gradients, too"
    assert one["mean"] == other["mean"] == dict(loss=2.5, kl=25.0), "the log is about both"
    assert one["nan"] and other["nan"], "NaN on one process ends both"
    for result in (one, other):
        assert torch.equal(result["gathered"], torch.arange(8.0)[:, None])
    assert torch.allclose(one["keys"], torch.arange(0.0, 12, 2)[:, None])
    assert torch.allclose(other["keys"], torch.arange(1.0, 12, 2)[:, None])
    assert one["order"] == "0 1 ", "the main process first"
    rows = np.fromfile("cache/z.float32", np.float32).reshape(1, 64, 8)
    kept = np.abs(np.linalg.norm(rows, axis=2) - 1) < 1e-4
    assert kept.sum() == 48, "what either process has computed"

    # One process on the whole batch has the same queue: the teacher sees the same views.
    cfg, data, teacher = two_rank_setting()
    method = SEED(SmallNetwork(), teacher, 64)
    for batch in probe.batches(data.train, cfg, CPU, ONE_VIEW, range(3)):
        method.after_step(method.targets(batch.views))
    before, after = [state["queue.features"] for state in one["seed"]]
    assert torch.allclose(after[:48], method.queue.features[:48], atol=1e-5)
    assert torch.equal(after[48:], before[48:]), "three batches, and no more"


def two_rank_setting():
    """Settings, data and a teacher; the same in each process."""
    torch.manual_seed(5)
    teacher = small_teacher()
    splits = [draw_all_shapes(64, split=0), draw_all_shapes(20, split=1)]
    data = probe.Data("shapes", 32, *splits, probe.SHAPE_CLASSES)
    return make_cfg("--batch-size", "16", "--image-size", "32"), data, teacher


def train_together(method, cfg, data):
    """Three steps of one of several processes; the weights and buffers before and after."""
    before = snapshot(method)
    model = train.compile_and_distribute(method, cfg)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    views = ONE_VIEW * method.views_per_image
    for batch in probe.batches(data.train, cfg, CPU, views, range(3)):
        targets = method.targets(batch.views)
        loss = method.loss(model(batch.views), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(targets)
    return before, snapshot(method)


def run_together(folder, data, teacher):
    """A run by train.py of one of several processes; the student in the end."""
    students = []
    build = train.build

    def recorded_build(*args):
        student, method = build(*args)
        students.append(student)
        return student, method

    train.build = recorded_build
    flags = f"--arch {ARCH} --dim 8 --batch-size 16 --epochs 1 --max-steps 3 --out {folder}/run"
    cfg = make_cfg(*flags.split(), "--teacher-cache", f"{folder}/cache")
    train.train(cfg, data, CPU, teacher)
    return snapshot(students[0])


def two_ranks(rank, folder):
    """What one of two processes does; leaves its results in FOLDER/rankRANK.pt."""
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    address = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    cfg, data, teacher = two_rank_setting()
    result = {"gathered": seed.concat_all_gather(torch.tensor([[0.0], [2], [4], [6]]) + rank)}
    torch.manual_seed(6)
    result["seed"] = train_together(SEED(SmallNetwork(), teacher, 64), cfg, data)
    torch.manual_seed(6)
    moco = MoCo(SmallNetwork(), 64, momentum=0.9)
    result["moco"] = train_together(moco, cfg, data)
    moco.key_encoder = nn.Identity()
    torch.manual_seed(rank)                                     # each process has its own numbers
    result["keys"] = moco.targets([None, torch.arange(0.0, 12, 2)[:, None] + rank])

    values = dict(loss=torch.tensor(2.0 + rank), kl=torch.tensor(20.0 + 10 * rank))
    result["mean"] = train.mean_of_ranks(values)
    one_nan = dict(loss=torch.tensor(1.0 if rank else math.nan))
    result["nan"] = math.isnan(train.mean_of_ranks(one_nan)["loss"])
    with probe.main_process_first():
        time.sleep(0 if rank else 0.5)
        with open(f"{folder}/order", "a") as file:
            file.write(f"{rank} ")
    dist.barrier()
    result["order"] = Path(folder, "order").read_text()
    result["run"] = run_together(folder, data, teacher)
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------ plain code
def test_the_code_stays_plain():
    """Readers would not find the method among long lines and long functions."""
    for name in ("seed.py", "probe.py", "train.py", "test_seed.py"):
        source = (HERE / name).read_text()
        for number, line in enumerate(source.splitlines(), 1):
            assert len(line) <= 100, f"{name}:{number}"
        if name == "test_seed.py":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                limit = 60 if (name, node.name) == ("train.py", "train") else 45
                assert node.end_lineno - node.lineno + 1 <= limit, f"{name}: {node.name}"
