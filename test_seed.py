"""What must be true of SEED, as lessons.  `pytest` runs them all on the CPU, without network, in a few minutes.

Each test's name is a sentence; its docstring says what would go wrong in a real run if it failed.  Where it can, a
test computes the same thing again in a slow and obvious way (loops, float64, Pillow, torchvision) and compares.
"""
import collections
import copy
import csv
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as T
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import probe
import seed
import train
from probe import Pictures, evaluate, knn, linear_probe, load_data
from seed import (SEED, Encoder, FeatureQueue, InputError, MoCo, Supervised, augment, crop_box, info_nce, load_teacher,
                  save_encoder, seed_loss, uniforms)

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def same_chance_each_time():
    torch.manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


class Toy(nn.Module):
    """A network small enough to look through: x [B, 3, S, S] -> z [B, dim]."""

    def __init__(self, dim=8):
        super().__init__()
        self.arch, self.dim, self.width, self.image_size, self.labels_seen = "toy", dim, 16, 8, False
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, dim)

    def features(self, x):
        return self.backbone(x)

    def forward(self, x):
        return F.normalize(self.head(self.features(x)), dim=1)


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -------------------------------------------------------------------------------------------------- the loss
def slow_seed_loss(student, teacher, queue, tau_s, tau_t):
    """The paper's formula with loops, in float64."""
    total = 0.0
    for z_s, z_t in zip(student.double(), teacher.double()):
        entries = [z_t] + list(queue.double())
        score_t = [math.exp(float(z_t @ d) / tau_t - 1 / tau_t) for d in entries]
        score_s = [math.exp(float(z_s @ d) / tau_s) for d in entries]
        p_t, p_s = np.array(score_t) / sum(score_t), np.array(score_s) / sum(score_s)
        total -= float((p_t * np.log(p_s)).sum())
    return total / len(student)


@pytest.mark.parametrize("tau_s, tau_t", [(0.2, 0.01), (0.2, 0.05), (0.1, 0.5), (1.0, 1.0)])
def test_the_loss_is_the_papers_formula(tau_s, tau_t):
    """Otherwise the student learns something else, and nobody sees it: the loss still falls."""
    student, teacher, queue = unit(5, 6), unit(5, 6), unit(11, 6)
    assert seed_loss(student, teacher, queue, tau_s, tau_t).item() == pytest.approx(slow_seed_loss(student, teacher, queue, tau_s, tau_t), rel=1e-5)


def test_the_default_temperatures_are_those_of_the_docstring():
    """tau_t = 1e-4, the authors' default, would turn the ranking into a one-hot vector."""
    student, teacher, queue = unit(5, 6), unit(5, 6), unit(11, 6)
    assert seed_loss(student, teacher, queue) == seed_loss(student, teacher, queue, tau_s=0.2, tau_t=0.01)
    assert info_nce(student, teacher, queue) == info_nce(student, teacher, queue, tau=0.2)


def test_the_samples_own_teacher_embedding_is_one_of_the_entries():
    """Without it (K instead of K+1 entries) the closest match of all is missing from the ranking."""
    z = unit(3, 4)
    stats = {}
    opposite = -z[:1].expand(7, 4)
    seed_loss(z[:1], z[:1], opposite, 1.0, 1.0, stats)
    e = math.exp(1) / (math.exp(1) + 7 * math.exp(-1))
    assert stats["own"].item() == pytest.approx(e, rel=1e-5)


def test_at_a_vanishing_teacher_temperature_the_loss_is_info_nce():
    """MoCo's loss is a corner of SEED's: if the limit fails, one of the two is wrong."""
    student, teacher, queue = unit(6, 16), unit(6, 16), unit(40, 16)
    assert seed_loss(student, teacher, queue, 0.2, 1e-5).item() == pytest.approx(info_nce(student, teacher, queue, 0.2).item(), rel=1e-6)


def test_info_nce_is_the_log_probability_of_the_own_key():
    """The baseline must be the real one, or the comparison is worth nothing."""
    q, k, queue, total = unit(4, 8), unit(4, 8), unit(9, 8), 0.0
    for a, b in zip(q.double(), k.double()):
        scores = [math.exp(float(a @ d) / 0.3) for d in [b] + list(queue.double())]
        total -= math.log(scores[0] / sum(scores)) / 4
    assert info_nce(q, k, queue, 0.3).item() == pytest.approx(total, rel=1e-5)


def test_the_loss_stops_at_the_teachers_entropy():
    """A user who waits for 0 waits forever: KL, not the loss, tells how far the student is."""
    z, queue, stats = unit(6, 8), unit(30, 8), {}
    loss = seed_loss(z, z, queue, 0.3, 0.3, stats)                  # a student that is the teacher
    assert stats["kl"].abs() < 1e-5 and torch.isclose(loss, stats["entropy"], atol=1e-5)
    assert stats["agree"] == 1
    worse = {}
    assert seed_loss(unit(6, 8), z, queue, 0.3, 0.3, worse) > loss
    assert worse["kl"] > 0.01 and torch.isclose(worse["entropy"], stats["entropy"])


def test_the_diagnostics_say_what_they_claim():
    """They are all a user has to judge a run by."""
    student, teacher, queue, stats = unit(7, 5), unit(7, 5), unit(12, 5), {}
    loss = seed_loss(student, teacher, queue, 0.2, 0.1, stats)
    entries = [torch.cat([t[None], queue]) for t in teacher]
    p = torch.stack([(d @ t / 0.1).softmax(0) for t, d in zip(teacher, entries)])
    q = torch.stack([(d @ s / 0.2).softmax(0) for s, d in zip(student, entries)])
    assert torch.isclose(stats["entropy"], -(p * p.log()).sum(1).mean(), rtol=1e-4)
    assert torch.isclose(stats["kl"], loss + (p * p.log()).sum(1).mean(), atol=1e-5)
    assert torch.isclose(stats["own"], p[:, 0].mean())
    assert torch.isclose(stats["agree"], (p.argmax(1) == q.argmax(1)).float().mean())
    stats = {}
    info_nce(student, teacher, queue, 0.2, stats)
    assert torch.isclose(stats["agree"], (q.argmax(1) == 0).float().mean())


def test_the_gradient_is_the_difference_of_the_two_rankings():
    """dL/dlogits = (p_s - p_t) / B: what the student is pulled by."""
    student, teacher, queue = unit(4, 6).requires_grad_(), unit(4, 6), unit(10, 6)
    seed_loss(student, teacher, queue, 0.2, 0.1).backward()
    for b in range(4):
        entries = torch.cat([teacher[b:b + 1], queue])
        p_s, p_t = (entries @ student[b].detach() / 0.2).softmax(0), (entries @ teacher[b] / 0.1).softmax(0)
        assert torch.allclose(student.grad[b], (p_s - p_t) @ entries / 0.2 / 4, atol=1e-5)


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_only_the_student_gets_a_gradient(loss):
    """A teacher or queue that is pulled along makes the task trivial: everything collapses to a point."""
    student, teacher, queue = (unit(n, 6).requires_grad_() for n in (4, 4, 10))
    loss(student, teacher, queue).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and queue.grad is None


def test_the_order_of_the_queue_does_not_matter():
    """The queue is a set of points of reference; only what is in it counts."""
    student, teacher, queue = unit(4, 6), unit(4, 6), unit(10, 6)
    assert torch.isclose(seed_loss(student, teacher, queue), seed_loss(student, teacher, queue[torch.randperm(10)]))


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_the_loss_is_float32_whatever_the_surroundings_do(loss):
    """In bf16 a logit at tau_t = 0.01 is off by 0.4: the teacher's ranking would be noise."""
    z = [unit(8, 128), unit(8, 128), unit(500, 128)]
    exact = loss(*z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(*z), exact) and loss(*z).dtype == torch.float32
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")                # may round to bf16 inside a float32 product
        matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        chosen = [matmul.fp32_precision for matmul in matmuls]
        assert torch.equal(loss(*z), exact)
        assert [matmul.fp32_precision for matmul in matmuls] == chosen != ["none", "none"], "the user's setting is put back"
        assert torch.get_float32_matmul_precision() == "medium"
        with seed.exact_float32("cpu"):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    try:
        for everywhere in ("tf32", "ieee"):
            torch.backends.fp32_precision = everywhere
            assert torch.equal(loss(*z), exact)
            for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                assert matmul.fp32_precision == everywhere, "and still follows the setting for all of torch"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_a_loss_refuses_what_does_not_fit(loss):
    """Broadcasting would otherwise turn a mistake into a number."""
    for shapes in (((4, 6), (3, 6), (9, 6)), ((4, 6), (4, 6), (9, 5)), ((4, 6), (4, 6), (9,)), ((6,), (6,), (9, 6))):
        with pytest.raises(ValueError, match="expected"):
            loss(*(unit(*shape) for shape in shapes))
    with pytest.raises(ValueError, match="temperature"):
        loss(unit(2, 3), unit(2, 3), unit(4, 3), 0.0)


def test_the_worked_example_of_the_docstring_is_right():
    """Examples are read before code."""
    import doctest
    result = doctest.testmod(seed)
    assert result.attempted >= 3 and result.failed == 0


class Peak(TorchDispatchMode):
    """Counts the tensors of `size` numbers or more that are alive after each operation, backward included."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.most = size, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= 4 * self.size:
                self.alive[x.untyped_storage().data_ptr()] = StorageWeakRef(x.untyped_storage())
        self.alive = {place: ref for place, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return out


def test_a_step_of_the_loss_fits_in_four_matrices_and_copies_no_queue():
    """[B, K+1] at B 256 and K 65,536 is 67 MB, the queue 34 MB: peers hold two copies of it, and run out of memory first."""
    B, K, D = 32, 2048, 64                                              # a queue is twice as large as a matrix
    student, queue, key = unit(B, D).requires_grad_(), FeatureQueue(K, D), unit(B, D)
    with Peak(B * K) as matrices:
        seed_loss(student, key, queue.features, stats={}).backward()
        queue.enqueue(key)
    queues = Peak(K * D)
    student.grad = None
    with queues:
        seed_loss(student, key, queue.features, stats={}).backward()
        queue.enqueue(key)
    assert 2 <= matrices.most - 1 <= 4, "beside the queue itself"
    assert queues.most == 1, "the queue, once"


# ------------------------------------------------------------------------------------------------- the queue
def test_the_queue_is_first_in_first_out_for_any_batch_size():
    """A wrapped batch that is cut off or misplaced leaves stale entries among the points of reference."""
    queue, shadow = FeatureQueue(7, 3), collections.deque(maxlen=7)
    shadow.extend(queue.features.clone())
    for b in (3, 3, 3, 1, 7, 5, 16, 2, 0, 14):
        z = unit(b, 3)
        queue.enqueue(z)
        shadow.extend(z)
        oldest = int(queue.seen) % 7
        assert torch.equal(torch.roll(queue.features, -oldest, 0), torch.stack(list(shadow)))


def test_the_queue_starts_with_random_unit_vectors_and_knows_how_full_it_is():
    """Zeros instead would sit at the same distance from everything, and weigh in the softmax."""
    queue = FeatureQueue(100, 16)
    assert torch.allclose(queue.features.norm(dim=1), torch.ones(100)) and queue.features.std(0).min() > 0.1
    assert FeatureQueue(2000, 16).features.mean(0).abs().max() < 0.03, "in all directions"
    for fill in (0.0, 0.4, 0.8, 1.0, 1.0):
        assert queue.fill.item() == pytest.approx(fill)
        queue.enqueue(unit(40, 16))


def test_the_queue_stores_float32_without_a_graph():
    """A queue that keeps the graph of its entries alive eats the memory in a few steps."""
    queue = FeatureQueue(4, 3)
    queue.enqueue(unit(2, 3).bfloat16().requires_grad_())
    assert queue.features.dtype == torch.float32 and not queue.features.requires_grad and queue.features.grad_fn is None


def test_the_queue_survives_a_checkpoint():
    """Resuming with a random queue would repeat the start of the run, when all points of reference are noise."""
    queue, other = FeatureQueue(6, 3), FeatureQueue(6, 3)
    queue.enqueue(unit(4, 3))
    other.load_state_dict(queue.state_dict())
    z = unit(4, 3)
    queue.enqueue(z), other.enqueue(z)
    assert same(queue.state_dict(), other.state_dict())


def test_the_queue_refuses_what_does_not_fit():
    """A queue of another width cannot be compared with anything."""
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        FeatureQueue(4, 3).enqueue(unit(2, 5))
    with pytest.raises(ValueError, match="at least 1"):
        FeatureQueue(0, 3)


# ---------------------------------------------------------------------------------------------- the encoders
@pytest.mark.parametrize("arch, width, size", [
    ("mobilenet_v3_large", 1280, 32), ("mobilenet_v3_small", 1024, 32), ("efficientnet_b0", 1280, 32), ("efficientnet_b1", 1280, 32),
    ("resnet18", 512, 32), ("resnet34", 512, 32), ("resnet50", 2048, 32), ("resnet101", 2048, 32), ("resnet152", 2048, 32),
    ("shufflenet_v2_x1_0", 1024, 32), ("regnet_y_400mf", 440, 32), ("convnext_tiny", 768, 32), ("vit_b_16", 768, 224)])
def test_an_encoder_gives_features_and_unit_embeddings(arch, width, size):
    """F must be what the paper says (MobileNet-V3: 1280, behind the classifier's hidden layer)."""
    encoder = Encoder(arch, dim=12, hidden_dim=20, image_size=size).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert encoder.width == width and encoder.features(x).shape == (2, width)
        z = encoder(x)
    assert z.shape == (2, 12) and torch.allclose(z.norm(dim=1), torch.ones(2), atol=1e-5)


def test_the_head_is_the_papers():
    """Linear(F, F) - ReLU - Linear(F, 128) by default; the width matters (58.0 or 60.3 on ImageNet for ResNet-18)."""
    head = Encoder("resnet18").head
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (head[0].in_features, head[0].out_features, head[2].out_features) == (512, 512, 128)
    assert Encoder("resnet18", hidden_dim=2048).head[0].out_features == 2048
    assert isinstance(Encoder("resnet18", hidden_dim=0).head, nn.Linear)
    bare = Encoder("resnet18", dim=None).eval()
    x = torch.randn(2, 3, 32, 32)
    assert bare.dim == 512 and torch.allclose(bare(x), F.normalize(bare.features(x), dim=1))


def test_features_are_those_of_torchvision():
    """Weights must mean the same here and there, or nobody can use what was trained."""
    theirs = torchvision.models.resnet18(weights=None).eval()
    ours = Encoder("resnet18").eval()
    ours.backbone.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(theirs.fc(ours.features(x)), theirs(x), atol=1e-5)


@pytest.mark.parametrize("arch, before, after", [("resnet18", 1, 4), ("mobilenet_v3_large", 1, 2), ("efficientnet_b0", 1, 2), ("shufflenet_v2_x1_0", 1, 2)])
def test_small_images_open_the_stem(arch, before, after):
    """At 32 px ImageNet's stem leaves a single position to the last layers."""
    side = {}
    for small in (False, True):
        encoder = Encoder(arch, small_images=small, image_size=32).eval()
        convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        convs[-1].register_forward_hook(lambda m, i, out: side.update({small: out.shape[-1]}))
        encoder.features(torch.randn(1, 3, 32, 32))
    assert side == {False: before, True: after}
    if arch == "resnet18":
        assert encoder.backbone.conv1.kernel_size == (3, 3) and isinstance(encoder.backbone.maxpool, nn.Identity)


def test_a_network_that_does_not_fit_is_refused_by_name():
    """A clear line now instead of a traceback after an hour of teaching."""
    with pytest.raises(InputError, match="mobilenet_v3_large"):
        Encoder("mobilenetv3_large")
    with pytest.raises(InputError, match="squeezenet1_0 has no Linear"):
        Encoder("squeezenet1_0")
    with pytest.raises(InputError, match="googlenet .* more than one"):
        Encoder("googlenet")
    with pytest.raises(InputError, match="vit_b_16 .* at 32 px"):
        Encoder("vit_b_16", image_size=32)
    with pytest.raises(InputError, match="stem"):
        Encoder("convnext_tiny", small_images=True)


# ---------------------------------------------------------------------------------------------- the teachers
def moco_file(path, arch="resnet18", version=2, dim=128):
    """A checkpoint laid out as MoCo's own code writes it; returns the query encoder that is in it."""
    net = torchvision.models.get_model(arch, weights=None)
    width = net.fc.in_features
    net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim)) if version == 2 else nn.Linear(width, dim)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.encoder_k.{k}": torch.randn_like(v.float()) for k, v in net.state_dict().items()}
    state |= {"module.queue": torch.randn(dim, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 800, "arch": arch, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    return net.eval()


@pytest.mark.parametrize("version", [1, 2])
def test_a_moco_checkpoint_becomes_the_teacher_that_is_in_it(tmp_path, version):
    """Peers load with strict=False: a wrong prefix, and the student learns from random weights without a word."""
    net = moco_file(tmp_path / "moco.pth.tar", version=version)
    teacher = load_teacher(tmp_path / "moco.pth.tar")
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(teacher(x), F.normalize(net(x), dim=1), atol=1e-5)
    assert "matched 120/120" in teacher.made and teacher.labels_seen is False
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_a_torchvision_file_teaches_by_its_features(tmp_path):
    """Its last layer scores classes, and a random head in its place would teach noise."""
    net = torchvision.models.resnet18(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    teacher = load_teacher(tmp_path / "resnet18.pth", "resnet18")
    net.fc, x = nn.Identity(), torch.randn(2, 3, 64, 64)
    assert teacher.dim == 512 and torch.allclose(teacher(x), F.normalize(net(x), dim=1), atol=1e-5)
    assert teacher.labels_seen is None, "the file does not say"
    with pytest.raises(InputError, match="--teacher-arch"):
        load_teacher(tmp_path / "resnet18.pth")
    with pytest.raises(InputError, match="keys match"):
        load_teacher(tmp_path / "resnet18.pth", "resnet34")
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(InputError, match="more than a resnet18"):
        load_teacher(tmp_path / "resnet34.pth", "resnet18")         # every key of a resnet18 is there, and then some
    torch.save({"module." + k: v for k, v in torchvision.models.resnet18(weights=None).state_dict().items() if "num_batches" not in k},
               tmp_path / "old.pth")
    assert load_teacher(tmp_path / "old.pth", "resnet18").dim == 512


@pytest.mark.parametrize("options", [dict(dim=16, hidden_dim=24), dict(dim=16, hidden_dim=0), dict(dim=None), dict(small_images=True, image_size=32)])
def test_an_encoder_file_comes_back_as_it_went(tmp_path, options):
    """What a run leaves must be what it trained, head, stem and all."""
    encoder = Encoder("resnet18", **options).eval()
    save_encoder(tmp_path / "encoder.pt", encoder, "made by a test", True)
    back, x = load_teacher(tmp_path / "encoder.pt"), torch.randn(2, 3, 32, 32)
    assert torch.equal(back(x), encoder(x)) and back.labels_seen is True and "made by a test" in back.made
    file = torch.load(tmp_path / "encoder.pt", weights_only=True)
    if not options.get("small_images"):
        missing = torchvision.models.resnet18(weights=None).load_state_dict(file["backbone"], strict=False)
        assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    assert not list(tmp_path.glob("*.tmp"))


def test_a_teacher_file_that_is_not_whole_is_an_error(tmp_path):
    """Each of these would otherwise be distilled, or end in a traceback."""
    path = tmp_path / "t.pth"
    moco_file(path)
    whole = torch.load(path, weights_only=True)

    def refuses(match, asked=None, **change):
        torch.save(whole | change, path)
        with pytest.raises(InputError, match=match) as e:
            load_teacher(path, asked)
        assert "\n" not in str(e.value)

    state = whole["state_dict"]
    refuses("layer1.0.conv1.weight is missing", state_dict={k: v for k, v in state.items() if "layer1.0.conv1" not in k})
    refuses("projection head", state_dict={k: v for k, v in state.items() if ".fc." not in k})
    refuses("fc.0.bias is missing", state_dict={k: v for k, v in state.items() if k != "module.encoder_q.fc.0.bias"})
    refuses("not finite", state_dict=state | {"module.encoder_q.conv1.weight": state["module.encoder_q.conv1.weight"] * math.nan})
    refuses("start with", state_dict={f"other.{k}": v for k, v in state.items()})
    refuses("holds a resnet18, not a resnet50", asked="resnet50")
    refuses("expected", arch="resnet34")
    refuses("more than a resnet18", state_dict=state | {"module.encoder_q.layer5.weight": torch.zeros(3)})
    refuses("not a checkpoint", state_dict=None)
    refuses("not a whole encoder.pt", format="seed-encoder")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot read"):
        load_teacher(path)
    with pytest.raises(InputError, match="no such file"):
        load_teacher(tmp_path / "nothing.pth")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """Checkpoints are passed around by strangers."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pth")
    with pytest.raises(InputError, match="cannot read"):
        load_teacher("bomb.pth", "resnet18")
    assert not Path("exploded").exists()
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: asked.append(options) or {})
    for address in ("https://a.org/teacher.pth", "https://b.org/teacher.pth"):
        seed.read_checkpoint(address)
    assert all(options["weights_only"] is True for options in asked), "from afar least of all"
    assert asked[0]["file_name"] != asked[1]["file_name"], "two teachers, two files"


# ------------------------------------------------------------------------------------------------- the views
def test_uniforms_are_a_function_of_who_asks():
    """Views must not depend on batch, worker, rank or machine; so the numbers are pinned for good."""
    u = uniforms(0, 0, range(8))
    assert u.shape == (8, seed.UNIFORMS) and u.dtype == torch.float32
    assert torch.equal(uniforms(0, 0, [5]), u[5:6]) and torch.equal(uniforms(0, 0, torch.tensor([3, 1])), u[[3, 1]])
    for other in (uniforms(1, 0, range(8)), uniforms(0, 1, range(8)), uniforms(0, 0, range(8), view=1), uniforms(0, 0, range(8, 16))):
        assert not (other == u).any()
    assert not torch.equal(uniforms(1, 2, [3]), uniforms(2, 1, [3])), "(seed, epoch) is a pair, not a sum"


def test_uniforms_are_splitmix64():
    """Written out with Python's integers; the first output from seed 0 is the published one."""
    full, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def stir(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & full
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & full
        return x ^ (x >> 31)

    assert stir(golden) == 0xE220A8397B1DCDAF
    for who in ((0, 0, 0, 0), (3, 2, 1, 7), (-1, 10**6, 2, 1_281_166)):
        x = 0
        for word in who:                                            # seed, epoch, view, index
            x = stir(((x ^ word & full) + golden) & full)
        slow = [(stir((x + golden * j) & full) >> 40) / 2**24 for j in range(1, seed.UNIFORMS + 1)]
        assert uniforms(who[0], who[1], [who[3]], who[2])[0].tolist() == slow


def test_uniforms_are_uniform_and_independent():
    """A poor hash would give every picture the same few crops."""
    u = torch.cat([uniforms(0, epoch, range(5000)) for epoch in range(4)]).double()
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) > 0.95 * u.numel() * (1 - u.numel() / 2**25)
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.var(0) - 1 / 12).abs().max() < 0.005
    assert (torch.corrcoef(u.T) - torch.eye(seed.UNIFORMS)).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([u[:5000, 0], u[5000:10000, 0]]))[0, 1].abs() < 0.05


def pictures(n=4, h=40, w=48):
    """Smooth random colours, so that an error of half a pixel shows but noise does not drown it."""
    return F.interpolate(torch.rand(n, 3, 7, 7), (h, w), mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_crop_and_resize_is_torchvisions(size):
    """Shrinking without antialiasing, or half a pixel of shift, costs accuracy that nobody can explain."""
    x = torch.rand(4, 3, 40, 48)
    boxes = torch.tensor([[0, 0, 40, 48], [3, 5, 20, 30], [10, 10, 7, 9], [39, 47, 1, 1]])
    ours = seed.crop_and_resize(x, boxes.float(), size)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        assert (ours[i] - T.resized_crop(x[i], top, left, h, w, [size, size], antialias=True)).abs().max() < 1e-5


def test_colour_operations_are_torchvisions():
    """Same names, same meaning: settings carry over from every other code base."""
    x, f = torch.rand(5, 3, 20, 30), torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4])
    turn, column = torch.tensor([-0.1, -0.03, 0.0, 0.07, 0.5]), lambda v: v[:, None, None, None]
    contrast = seed.blend_(x.clone(), seed.to_grey(x).mean((2, 3), keepdim=True), column(f))
    saturation, hue = seed.blend_(x.clone(), seed.to_grey(x), column(f)), seed.shift_hue(x, column(turn))
    for i in range(5):
        assert (contrast[i] - T.adjust_contrast(x[i], f[i].item())).abs().max() < 1e-4
        assert (saturation[i] - T.adjust_saturation(x[i], f[i].item())).abs().max() < 1e-4
        assert (hue[i] - T.adjust_hue(x[i], turn[i].item())).abs().max() < 1e-4
    grey = torch.full((1, 3, 4, 4), 0.3)
    assert torch.allclose(seed.shift_hue(grey, torch.tensor(0.3).view(1, 1, 1, 1)), grey)


def test_blur_is_torchvisions():
    """With its kernel of 13; the border is mirrored."""
    x, sigma = torch.rand(4, 3, 20, 30), torch.tensor([0.1, 0.7, 1.3, 2.0])
    ours = seed.gaussian_blur(x, sigma)
    for i in range(4):
        assert (ours[i] - T.gaussian_blur(x[i], [13, 13], [sigma[i].item()] * 2)).abs().max() < 1e-4


def neutral(n=1):
    """Uniform numbers that change nothing but brightness (factor 1): no flip, jitter, grey or blur."""
    return torch.full((n, seed.UNIFORMS), 0.999)


def restored(view):
    """Undo the normalisation."""
    return view * torch.tensor(seed.IMAGENET_STD).view(1, 3, 1, 1) + torch.tensor(seed.IMAGENET_MEAN).view(1, 3, 1, 1)


def test_a_view_is_torchvisions_chain_with_the_same_numbers():
    """The operations in their order, each with the parameter that its column names."""
    images = (255 * pictures(6)).round().to(torch.uint8)
    u = uniforms(0, 0, range(100))
    u = u[(u[:, seed.JITTER] < 0.8) & (u[:, seed.BLUR] < 0.5)][:6]
    u[3:, seed.GREY], u[3:, seed.FLIP], u[:3, seed.GREY], u[:3, seed.FLIP] = 0.1, 0.1, 0.3, 0.6
    ours = restored(augment(images, u, 32))
    for i, row in enumerate(u.tolist()):
        top, left, h, w = crop_box(u[i:i + 1], 40, 48)[0]
        x = seed.crop_and_resize(images[i:i + 1] / 255, torch.stack([top, left, h, w])[None], 32)[0]
        strength = lambda c: 1 + 0.4 * (2 * row[c] - 1)
        x = T.horizontal_flip(x) if row[seed.FLIP] < 0.5 else x
        x = T.adjust_brightness(x, strength(seed.BRIGHT))
        x = T.adjust_contrast(x, strength(seed.CONTRAST))
        x = T.adjust_saturation(x, strength(seed.SATURATE))
        x = T.adjust_hue(x, 0.1 * (2 * row[seed.HUE] - 1))
        x = T.rgb_to_grayscale(x, 3) if row[seed.GREY] < 0.2 else x
        x = T.gaussian_blur(x, [13, 13], [0.1 + 1.9 * row[seed.SIGMA]] * 2)
        assert (ours[i] - x).abs().max() < 2 / 255


def test_each_switch_has_mocos_probability():
    """Jitter 0.8, grey 0.2, blur 0.5, flip 0.5: a weaker view makes the task too easy."""
    image = (255 * pictures(1, 32, 32)).round().to(torch.uint8)
    plain = augment(image, neutral(), 32, scale=None)
    for column, p in ((seed.FLIP, 0.5), (seed.GREY, 0.2), (seed.BLUR, 0.5), (seed.JITTER, 0.8)):
        for value, changes in ((p - 0.01, True), (p + 0.01, False)):
            u = neutral()
            u[:, column] = value
            assert torch.allclose(augment(image, u, 32, scale=None), plain, atol=1e-4) != changes, (column, value)
    u = neutral()
    u[:, seed.BLUR] = 0
    assert torch.equal(augment(image, u, 32, scale=None, blur=False), plain)


def test_a_view_does_not_depend_on_its_neighbours():
    """Otherwise one process and two would not see the same pictures."""
    images, u = (255 * pictures(6)).to(torch.uint8), uniforms(3, 1, range(6))
    together = augment(images, u, 24)
    assert torch.equal(together, augment(images, u, 24)), "and it is the same each time"
    for i in range(6):
        assert torch.allclose(together[i:i + 1], augment(images[i:i + 1], u[i:i + 1], 24), atol=1e-5)


def test_a_view_leaves_the_pictures_alone_and_reads_bytes_as_floats():
    """The data set lies in memory: an operation in place would wear it away."""
    images, u = (255 * pictures(4)).to(torch.uint8), uniforms(0, 0, range(4))
    before = images.clone()
    white = seed.normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert torch.allclose(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])), "as every ImageNet checkpoint"
    as_bytes = augment(images, u, 24)
    floats = images / 255
    kept = floats.clone()
    assert torch.allclose(augment(floats, u, 24), as_bytes, atol=1e-5)
    assert torch.allclose(augment(floats, u, scale=None), augment(images, u, scale=None), atol=1e-5)
    assert torch.equal(images, before) and torch.equal(floats, kept)
    with pytest.raises(ValueError, match="expected"):
        augment(images, u[:2], 24)


@pytest.mark.parametrize("height, width", [(320, 320), (300, 400), (500, 200)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    """Area 0.2-1 of the picture, aspect ratio 3/4-4/3, anywhere inside it: larger crops make an easier, worse task."""
    u = torch.cat([uniforms(0, epoch, range(5000)) for epoch in range(2)])
    top, left, h, w = crop_box(u, height, width).unbind(1)
    assert h.dtype == torch.float32
    assert top.min() >= 0 and left.min() >= 0 and (top + h).max() <= height * 1.0001 and (left + w).max() <= width * 1.0001
    theirs = torch.tensor([torchvision.transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (0.2, 1.0), (3 / 4, 4 / 3))
                           for _ in range(10000)]).double()
    deciles = torch.linspace(0.1, 0.9, 9).double()
    for ours, their in ((h * w, theirs[:, 2] * theirs[:, 3]), (w / h, theirs[:, 3] / theirs[:, 2]), (top, theirs[:, 0]), (left, theirs[:, 1])):
        spread = their.quantile(0.9) - their.quantile(0.1)
        assert ((ours.double().quantile(deciles) - their.quantile(deciles)).abs() / spread).max() < 0.05


def test_small_crops_are_small():
    """The paper's multi-crop setting: 0.05-0.14 of the picture."""
    u = uniforms(0, 0, range(2000))
    small = crop_box(u, 100, 100, (0.05, 0.14))
    assert (small[:, 2] * small[:, 3] / 1e4).min() > 0.0499 and (small[:, 2] * small[:, 3] / 1e4).max() < 0.1401


# ----------------------------------------------------------------------------------------------- the methods
def test_the_teacher_cannot_be_woken():
    """In train mode its batch norm drifts with every batch, and the queue compares apples with pears."""
    method = SEED(Toy(), Toy(), queue_size=16)
    before = snapshot(method.teacher)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        method.train()
        loss, _ = method([torch.randn(4, 3, 8, 8)])
        loss.backward()
        optimizer.step()
        method.finish_step()
    assert same(before, snapshot(method.teacher)) and not method.teacher.training and method.encoder.training


def test_seed_shows_the_same_view_to_both_and_moves_the_queue_only_afterwards():
    """The logits use the queue as it was; an entry of this very batch would be a second right answer."""
    student, teacher, x = Toy(), Toy().eval(), torch.randn(4, 3, 8, 8)
    method = SEED(student, teacher, queue_size=16, tau_s=0.3, tau_t=0.07)
    queue = method.queue.features.clone()
    copied = copy.deepcopy(student)
    loss, stats = method([x])
    assert torch.equal(method.queue.features, queue) and stats["fill"] == 0
    assert torch.isclose(loss, seed_loss(copied(x), teacher(x), queue, 0.3, 0.07))
    method.finish_step()
    assert torch.allclose(method.queue.features[:4], teacher(x)) and torch.equal(method.queue.features[4:], queue[4:])


def test_seed_takes_teacher_embeddings_ready_made():
    """All that a cache of embeddings needs: the teacher does not run."""
    method, x = SEED(Toy(), Toy(), queue_size=16), torch.randn(4, 3, 8, 8)
    method.encoder.eval()
    z = method.teacher(x)
    loss, _ = method([x])
    method.teacher = None
    assert torch.equal(method([x], teacher_z=z)[0], loss)


def test_a_student_of_another_width_is_refused():
    """Embeddings of different widths cannot be compared with one queue."""
    with pytest.raises(InputError, match="--dim 8"):
        SEED(Toy(4), Toy(8), 16)


def test_seed_teaches():
    """The whole idea: after some steps the student ranks as its teacher does, though nobody told it why."""
    teacher, x = Toy(), 2 * torch.randn(64, 3, 1, 1) + 0.3 * torch.randn(64, 3, 8, 8)
    method = SEED(Toy(), teacher, queue_size=128, tau_s=0.2, tau_t=0.1)
    optimizer, kl = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1, momentum=0.9), []
    for step in range(120):
        loss, stats = method([x[torch.randperm(64)[:32]]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.finish_step()
        kl.append(stats["kl"].item())
    assert np.mean(kl[-10:]) < 0.5 * np.mean(kl[5:15])


def test_mocos_key_encoder_follows_slowly_and_without_gradient():
    """k <- m k + (1 - m) q, after the step; with a gradient of its own it would chase the query."""
    method, views = MoCo(Toy(), queue_size=16, momentum=0.9), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    start = [p.clone() for p in method.encoder.parameters()]
    loss, _ = method(views)
    loss.backward()
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    assert all(torch.equal(k, q) for k, q in zip(method.key_encoder.parameters(), start)), "nothing moves in forward"
    assert all(k.grad is None for k in method.key_encoder.parameters())
    method.finish_step()
    assert all(torch.allclose(k, q + 0.1, atol=1e-6) for k, q in zip(method.key_encoder.parameters(), start))


def test_moco_compares_two_views_and_keeps_keys_in_order():
    """Keys are shuffled for batch norm's sake; unshuffled wrongly, each query would be shown a stranger as itself."""
    method, views = MoCo(Toy(), queue_size=16, tau=0.3), [torch.randn(6, 3, 8, 8) for _ in range(2)]
    method.eval()
    queue = method.queue.features.clone()
    loss, _ = method(views)
    q, k = method.encoder(views[0]), method.key_encoder(views[1])
    assert torch.isclose(loss, info_nce(q, k, queue, 0.3), atol=1e-5) and torch.equal(method.queue.features, queue)
    method.finish_step()
    assert torch.allclose(method.queue.features[:6], k, atol=1e-5)


def test_a_key_is_computed_among_other_neighbours_than_its_query():
    """Unshuffled, both share their batch statistics: MoCo reads the answer off them and learns little else."""
    method, x, seen = MoCo(Toy(), queue_size=16), torch.randn(16, 3, 8, 8), []
    method.key_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method([x, x])
    assert not torch.equal(seen[0], x)
    assert torch.equal(seen[0].sum((1, 2, 3)).sort()[0], x.sum((1, 2, 3)).sort()[0])


def test_split_batch_norm_is_batch_norm_on_separate_devices():
    """Without the split, query and key share batch statistics, and MoCo learns to read those instead of the picture."""
    method, x = MoCo(Toy(), queue_size=16, bn_splits=4), torch.randn(8, 3, 8, 8)
    split, plain = method.encoder.backbone[1], nn.BatchNorm2d(16)
    assert (1 - split.momentum) ** 4 == pytest.approx(1 - plain.momentum), "a step counts once in the running statistics"
    plain.momentum = split.momentum
    y = torch.randn(8, 16, 6, 6)
    assert torch.allclose(split(y), torch.cat([plain(part) for part in y.chunk(4)]), atol=1e-6)
    assert torch.allclose(split.running_mean, plain.running_mean)
    assert not torch.allclose(split(y), nn.BatchNorm2d(16)(y), atol=1e-3)
    assert type(method.key_encoder.backbone[1]) is type(split) and method.key_encoder.backbone[1] is not split
    assert method.encoder(x).shape == (8, 8)
    plain.load_state_dict(split.state_dict())
    assert torch.allclose(split.eval()(y), plain.eval()(y), atol=1e-6)


def test_supervised_training_reaches_the_head():
    """A head without a gradient stalls several GPUs, and would be distilled untrained."""
    method = Supervised(Toy(), classes=5)
    loss, stats = method([torch.randn(6, 3, 8, 8)], torch.tensor([0, 1, 2, 3, 4, 0]))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in method.named_parameters() if "0.bias" not in name)
    method.eval()
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 0])
    method.class_vectors.data *= 3                                  # only their direction counts
    logits = method.encoder(x) @ F.normalize(method.class_vectors, dim=1).T / 0.1
    loss, stats = method([x], y)
    assert torch.isclose(loss, F.cross_entropy(logits, y)) and torch.isclose(stats["agree"], (logits.argmax(1) == y).float().mean())


# ------------------------------------------------------------------------------------------------ the judges
def test_knn_is_a_vote_of_the_ten_nearest():
    """Every number that the README shows goes through it."""
    x, y, queries, answers = torch.randn(200, 6) + 1, torch.randint(0, 4, (200,)), torch.randn(400, 6) + 1, []
    for q in queries:
        cosine = F.cosine_similarity(q[None], x)
        near = cosine.argsort(descending=True)[:10]
        answers.append(int(np.argmax([sum(max(0.0, cosine[i].item()) for i in near if y[i] == c) for c in range(4)])))
    answers = torch.tensor(answers)
    assert knn(x, y, queries, answers) == 100 and knn(x, y, x, y, k=1) == 100
    answers[:100] += 1
    assert knn(x, y, queries, answers) == 75


def test_the_linear_probe_learns_what_is_linear():
    """Whatever the scale of the features: one list of learning rates has to serve every network."""
    w, x = torch.randn(10, 3), torch.randn(1200, 10)
    y = (x @ w).argmax(1)
    for scale in (1e-8, 1.0, 1e4):
        accuracy, _ = linear_probe(scale * x[:1000], y[:1000], scale * x[1000:], y[1000:])
        assert accuracy > 92
    accuracy, _ = linear_probe(x[:1000], torch.randint(0, 3, (1000,)), x[1000:], y[1000:])
    assert accuracy < 60, "no accuracy out of random labels"
    x[:, 5] = 3.0                                                   # a feature that never changes
    for c in range(3):
        only = y[1000:] == c                                        # test pictures that are unlike the training pictures
        assert linear_probe(x[:1000], y[:1000], x[1000:][only], y[1000:][only])[0] > 80


def test_the_linear_probe_is_plain_sgd_as_in_the_paper():
    """Momentum 0.9, no decay, rate x 0.1 at 60% and 80%: another recipe, and no figure compares with a published one."""
    x, y, layer = torch.randn(300, 6), torch.randint(0, 3, (300,)), nn.Linear(6, 3)
    (w, b), _ = probe.fit_linear(x, y, 3, [0.01, 0.3], epochs=10), (nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias))
    sgd = torch.optim.SGD(layer.parameters(), 0.3, momentum=0.9)
    falls = torch.optim.lr_scheduler.MultiStepLR(sgd, [6, 8])
    for epoch in range(10):
        for batch in np.array_split(np.random.default_rng(epoch).permutation(300), [256]):
            sgd.zero_grad(), F.cross_entropy(layer(x[batch]), y[batch]).backward(), sgd.step()
        falls.step()
    assert torch.allclose(w[1].T, layer.weight, atol=1e-5) and torch.allclose(b[1, 0], layer.bias, atol=1e-5)
    assert probe.fit_linear.__defaults__ == (100, 256)


def test_the_linear_probe_never_looks_at_the_test_labels_to_choose(monkeypatch):
    """A learning rate chosen on the test set is the commonest way to flatter a method."""
    sizes, fit, x = [], probe.fit_linear, torch.randn(300, 8)
    monkeypatch.setattr(probe, "fit_linear", lambda x, *args: sizes.append(len(x)) or fit(x, *args))
    y = x[:, :3].argmax(1)
    for rates in ((0.0, 0.1), (0.1, 0.0)):
        assert linear_probe(x[:200], y[:200], x[200:], y[200:], rates)[1] == 0.1, "the better one"
    assert sizes == [180, 200] * 2, "chosen on a tenth held out, then fitted to all"
    y = torch.randint(0, 3, (300,))
    rates = {linear_probe(x[:200], y[:200], x[200:], test_y)[1] for test_y in (y[200:], torch.zeros(100).long(), y[:100])}
    assert len(rates) == 1


def test_evaluate_judges_the_test_pictures_by_features_of_normalised_ones():
    """Training accuracy, or features of pictures the network never saw the like of: every number in the table is wrong."""
    encoder, data = Encoder("resnet18", image_size=32), load_data("shapes", subset=200)
    data.test = data.test.part(range(100))
    scores, (_, _, x, y) = evaluate(encoder, data)
    assert encoder.training, "a look during training leaves it training"
    with torch.no_grad():
        for split, found in ((data.train, x), (data.test, y)):
            assert torch.allclose(found, encoder.eval().features(seed.normalise(split.pixels)), rtol=1e-3, atol=1e-4)
    judged = x, data.train.labels, y, data.test.labels
    assert scores["knn"] == knn(*judged) and scores["linear"] == linear_probe(*judged)[0]
    data.train = data.train.part(data.train.labels.argsort(stable=True))           # sorted by class, as folders are
    parts = evaluate(encoder, data, limit=50, linear=False)[1]
    assert [len(part) for part in parts] == [50] * 4 and len(parts[0].labels.unique()) > 10, "some of each class"


# --------------------------------------------------------------------------------------------------- the data
def write_pictures(root, names, size=(40, 30)):
    """Files of one colour each; returns nothing."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "RGBA" if name.endswith(".webp") else "L" if name.endswith(".bmp") else "RGB"
        Image.new("RGB", size, (i * 29 % 256, i * 71 % 256, 90)).convert(mode).save(path)


def test_a_folder_may_have_any_layout(tmp_path, monkeypatch):
    """Users have directories, not data sets."""
    write_pictures(tmp_path / "a", [f"train/{c}/{i}.png" for c in "xy" for i in range(4)] + [f"val/{c}/0.JPG" for c in "xy"])
    data = load_data("folder", tmp_path / "a", 16)
    assert data.judged and data.classes == ["x", "y"] and len(data.train) == 8 and len(data.test) == 2
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 and data.train.pixels.shape == (8, 3, 16, 16)

    write_pictures(tmp_path / "b", [f"{c}/{'deep/' * (i % 2)}{i}.webp" for c in "xyz" for i in range(10)])
    data = load_data("folder", tmp_path / "b", 16)
    assert data.judged and len(data.classes) == 3 and (len(data.train), len(data.test)) == (27, 3)
    assert not set(data.train.files) & set(data.test.files), "no test picture is trained on"
    for split in (data.train, data.test):
        assert [Path(f).relative_to(tmp_path / "b").parts[0] for f in split.files] == [data.classes[i] for i in split.labels]

    write_pictures(tmp_path / "c", [f"{i}.bmp" for i in range(20)] + ["._hidden.png", "sub/1.png"])
    (tmp_path / "c" / "notes.txt").write_text("not a picture")
    data = load_data("folder", tmp_path / "c", 16)
    assert not data.judged and data.classes == [] and (len(data.train), len(data.test)) == (19, 2)
    write_pictures(tmp_path / "d", [f"only/{i}.png" for i in range(4)])
    assert not load_data("folder", tmp_path / "d", 16).judged, "one class is no label"

    for name in "ab":
        monkeypatch.chdir(tmp_path / name)
        assert load_data("folder", ".", 80).key == load_data("folder", tmp_path / name, 80).key, "wherever it is called from"


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    """Medical and depth pictures would be all white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    crop = probe.read_crops(tmp_path / "ramp.png", 64, lambda h, w: [(0.0, 0.0, 64.0, 64.0)])[0]
    assert np.abs(crop[0, 0].numpy() - np.linspace(0, 255, 64)).max() <= 1


def test_unreadable_data_is_one_clear_line(tmp_path):
    """Before the training, naming the file."""
    with pytest.raises(InputError, match="no directory"):
        load_data("folder", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no picture"):
        load_data("folder", tmp_path / "empty")
    write_pictures(tmp_path / "one", ["1.png", ".hidden/2.png"])
    with pytest.raises(InputError, match="1 picture"):
        load_data("folder", tmp_path / "one")
    write_pictures(tmp_path / "flat", ["train/x/1.png", "train/y/1.png", "val/1.png"])
    with pytest.raises(InputError, match="folder for each class"):
        load_data("imagenet", tmp_path / "flat")
    write_pictures(tmp_path / "a", [f"{i}.png" for i in range(12)])
    with pytest.raises(InputError, match="--subset 100"):
        load_data("folder", tmp_path / "a", 16, subset=100)
    with pytest.raises(InputError, match="train/ and val/"):
        load_data("imagenet", tmp_path / "a")
    (tmp_path / "a" / "3.png").write_bytes(b"no picture at all")
    with pytest.raises(InputError, match="3.png"):
        load_data("folder", tmp_path / "a", 16)
    write_pictures(tmp_path / "b", ["train/x/1.png", "train/y/1.png", "val/z/1.png"])
    with pytest.raises(InputError, match="lacks: z"):
        load_data("folder", tmp_path / "b", 16)


def test_a_crop_from_disk_is_the_crop_from_memory(tmp_path):
    """Two data paths, one definition of the box: a view must not depend on where its picture lies."""
    x = pictures(1, 120, 160)
    Image.fromarray((255 * x[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(tmp_path / "p.png")
    files = [str(tmp_path / "p.png")]
    for epoch in range(5):
        crops, e, index = probe.Crops(files, 48, views=2, seed=7)[(epoch, 0)]
        assert crops.shape == (2, 3, 48, 48) and crops.dtype == torch.uint8 and (e, index) == (epoch, 0)
        for view in range(2):
            u = uniforms(7, epoch, [0], view)
            memory = seed.crop_and_resize(x, crop_box(u, 120, 160), 48)[0]
            assert (memory - crops[view] / 255).abs().max() < 4 / 255


def test_a_large_jpeg_is_decoded_small_without_losing_the_crop(tmp_path):
    """The decoder may skip work (1/2, 1/4, 1/8), but the crop must stay where it is, and sharp."""
    x = pictures(1, 700, 900)
    Image.fromarray((255 * x[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(tmp_path / "p.jpg", quality=95)
    for box in ((100.0, 200.0, 500.0, 600.0), (0.0, 0.0, 700.0, 900.0), (300.5, 310.5, 64.0, 70.0)):
        crop = probe.read_crops(tmp_path / "p.jpg", 64, lambda h, w: [box])[0] / 255
        assert (crop - seed.crop_and_resize(x, torch.tensor([box]), 64)[0]).abs().mean() < 3 / 255
    x = (torch.arange(900) // 4 % 2).float().expand(1, 3, 700, 900)                # fine stripes, which 1/8 would wipe out
    Image.fromarray((255 * x[0]).to(torch.uint8).permute(1, 2, 0).numpy()).save(tmp_path / "p.jpg", quality=95)
    whole, small = (0.0, 0.0, 700.0, 900.0), (300.0, 310.0, 64.0, 64.0)
    for boxes in ([small], [whole, small], [small, whole]):
        crop = probe.read_crops(tmp_path / "p.jpg", 64, lambda h, w: boxes)[boxes.index(small)] / 255
        assert (crop - seed.crop_and_resize(x, torch.tensor([small]), 64)[0]).abs().mean() < 0.05


def test_the_test_view_is_the_centre_of_the_picture(tmp_path):
    """Resize to 256, cut out 224: with another view no accuracy can be compared with a published one."""
    assert probe.centre_box(224)(256, 320) == [(16, 48, 224, 224)] and probe.centre_box(32)(30, 40) == [(0, 5, 30, 30)]
    x = pictures(1, 300, 400)
    Image.fromarray((255 * x[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(tmp_path / "p.png")
    want = T.center_crop(T.resize(x, 256, antialias=True), 224)[0]
    assert (probe.picture(Pictures(files=[str(tmp_path / "p.png")]), 0, 224) - want).abs().mean() < 2 / 255


def test_shapes_are_the_same_everywhere_and_not_trivial():
    """The built-in data set carries the README's table: easy for a trained network, hard for raw pixels."""
    data = load_data("shapes")
    assert (len(data.train), len(data.test), len(data.classes)) == (5000, 2000, 20)
    assert data.train.labels.bincount().tolist() == [250] * 20
    assert data.key == load_data("shapes").key
    assert not {row.numpy().tobytes() for row in data.train.pixels} & {row.numpy().tobytes() for row in data.test.pixels}
    raw = [seed.normalise(split.pixels).flatten(1) for split in (data.train, data.test)]
    assert knn(raw[0], data.train.labels, raw[1], data.test.labels) < 30


def test_a_subset_is_seeded():
    """Two methods on different subsets are not comparable."""
    one, other, third = (load_data("shapes", subset=100, seed=s) for s in (0, 0, 1))
    assert one.key == other.key != third.key and len(one.train) == 100 and len(one.test) == 2000


# ---------------------------------------------------------------------------------------------------- the run
def settings(*flags, method="seed"):
    args = train.parse_flags(["--device", "cpu", "--method", method, *flags])
    return train.resolve(args, method)


def team(rank=0, ranks=1):
    return train.SimpleNamespace(rank=rank, ranks=ranks, device=torch.device("cpu"))


def test_imagenet_gets_the_papers_settings():
    """Whoever runs the paper's experiment must get the paper's experiment."""
    s = settings("--dataset", "imagenet")
    want = dict(queue_size=65536, tau_s=0.2, tau_t=0.01, lr=0.03, weight_decay=1e-4, epochs=200, warmup_epochs=5, batch_size=256,
                dim=128, hidden_dim=None, crop_scale=(0.2, 1.0), blur=True, image_size=224)
    assert {key: getattr(s, key) for key in want} == want
    assert settings("--dataset", "imagenet", method="moco").key_momentum == 0.999


def test_a_flag_beats_the_recipe_and_a_methods_flag_stays_with_the_method():
    """--lr of the student must not retune its teacher or its rivals."""
    args = train.parse_flags(["--lr", "0.5", "--batch-size", "64"])
    mine, theirs = train.resolve(args, "seed"), train.resolve(args, "moco")
    assert mine.lr == 0.5 and theirs.lr == train.RECIPES["shapes"]["moco"]["lr"] and theirs.batch_size == 64
    flags = "--lr 9 --weight-decay 9 --queue-size 9 --tau-s 9 --tau-t 9 --dim 9 --hidden-dim 9 --view-epochs 9".split()
    plain, theirs = (train.resolve(train.parse_flags(given), "moco") for given in ([], flags))
    assert vars(plain) == vars(theirs), "nor any other of the method's own"


def test_the_recipes_are_those_of_the_tables():
    """A number changed by the way makes the README's tables and commands disagree."""
    said = lambda name, method: [getattr(settings("--dataset", name, method=method), key) for key in
                                 ("lr", "weight_decay", "queue_size", "tau_s", "tau_t", "key_momentum", "epochs", "batch_size")]
    assert said("shapes", "seed") == [0.4, 1e-4, 2048, 0.2, 0.05, 0.999, 14, 128]
    assert said("shapes", "moco") == [0.06, 1e-4, 256, 0.2, 0.01, 0.99, 14, 128]
    assert said("cifar10", "seed") == [0.2, 1e-4, 4096, 0.2, 0.01, 0.999, 200, 256]
    assert said("cifar10", "moco") == [0.03, 5e-4, 4096, 0.1, 0.01, 0.99, 200, 256]
    assert [said(name, "supervised")[:2] for name in ("shapes", "cifar10")] == [[0.1, 1e-4], [0.1, 5e-4]]
    small = [settings("--dataset", "folder", "--image-size", "32", method=method) for method in ("seed", "moco", "supervised")]
    assert [(s.lr, s.tau_t, s.key_momentum, s.queue_size) for s in small] == [(0.1, 0.05, 0.999, 2048), (0.06, 0.01, 0.99, 2048), (0.1, 0.01, 0.999, 2048)]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    """The schedule belongs to the whole run, wherever it is stopped."""
    s = settings("--epochs", "10", "--warmup-epochs", "2", "--lr", "0.1", "--batch-size", "512")
    rates = [train.lr_at(step, s, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.2 / 100) and rates[99] == pytest.approx(0.2) and max(rates) == pytest.approx(0.2)
    assert rates[300] == pytest.approx(0.1) and rates[-1] < 1e-5
    assert all(a <= b for a, b in zip(rates[:99], rates[1:100])) and all(a >= b for a, b in zip(rates[100:], rates[101:]))
    s = settings("--epochs", "1", "--warmup-epochs", "5")
    assert s.warmup_epochs == 0.5 and train.lr_at(99, s, 100) < 0.01 * s.lr, "a short run comes to its end too"
    assert max(train.lr_at(step, s, 39) for step in range(39)) <= s.lr * s.batch_size / 256, "half a step of warm-up is no excuse"


def test_any_number_of_ranks_sees_the_same_batches():
    """Otherwise the number of GPUs changes the experiment."""
    s = settings("--batch-size", "12")
    one = list(train.plan(50, s, team(), range(0, 9)))
    for ranks in (2, 3):
        parts = [list(train.plan(50, s, team(rank, ranks), range(0, 9))) for rank in range(ranks)]
        for step, (epoch, index) in enumerate(one):
            joined = np.stack([part[step][1] for part in parts], 1).reshape(-1)
            assert np.array_equal(joined, index) and parts[0][step][0] == epoch
    seen = np.concatenate([index for epoch, index in one if epoch == 0])
    assert len(set(seen)) == 48 == len(seen), "no picture twice in an epoch"
    assert not np.array_equal(one[0][1], one[4][1]), "another order in the next epoch"
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(one[5:], train.plan(50, s, team(), range(5, 9)))), "also from the middle"
    s.seed = 1
    assert not np.array_equal(one[0][1], next(train.plan(50, s, team(), [0]))[1]), "another order by another seed"


@pytest.fixture
def folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for c in "ab":
        (tmp_path / "pictures" / c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (90, 100, 3), np.uint8)).save(tmp_path / "pictures" / c / f"{i}.jpg")
    return tmp_path / "pictures"


def test_workers_do_not_change_a_view(folder_of_pictures):
    """Views are computed from who asks, not drawn: 0 or 2 workers, the same batches."""
    s = settings("--dataset", "folder", "--image-size", "72", "--batch-size", "8", "--seed", "3")
    s.crop_scale = (0.1, 0.4)
    data = load_data("folder", folder_of_pictures, 72)
    assert data.train.pixels is None
    runs = []
    for s.workers in (0, 2):
        runs.append([(views, labels) for views, labels, _ in train.batches(data.train, s, team(), 2, range(3, 6))])
    for (one, labels), (other, more) in zip(*runs):
        assert len(one) == 2 and not torch.equal(one[0], one[1])
        assert all(torch.equal(a, b) for a, b in zip(one, other)) and torch.equal(labels, more)
    order = np.random.default_rng((3, 1)).permutation(len(data.train))[8:16]       # two batches an epoch: step 3
    assert torch.equal(runs[0][0][1], data.train.labels[order]), "labels belong to their pictures"
    crops = torch.stack([probe.Crops(data.train.files, 72, 2, 3, (0.1, 0.4))[1, int(i)][0] for i in order])
    for v in range(2):
        once = augment(crops[:, v], uniforms(3, 1, order, v), scale=None, blur=s.blur)
        assert torch.allclose(runs[0][0][0][v], once, atol=1e-5), "cropped once, not twice"


def test_pictures_from_disk_are_judged_by_their_test_view(folder_of_pictures):
    """Random crops instead would lower every figure of ImageNet by a little."""
    train_pictures = load_data("folder", folder_of_pictures, 72).train
    view = next(probe.plain_views(train_pictures, 72, torch.device("cpu"), 0))
    assert torch.equal(view[3], seed.normalise(probe.picture(train_pictures, 3, 72)[None])[0])


def last(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


TINY = ["--subset", "96", "--batch-size", "16", "--epochs", "2", "--teacher-epochs", "1", "--queue-size", "64", "--eval-every", "0", "--device", "cpu"]


@pytest.mark.parametrize("method, arch", [("seed", "mobilenet_v3_small"), ("moco", "resnet18"), ("supervised", "shufflenet_v2_x0_5")])
def test_a_run_that_was_cut_is_the_run_that_never_stopped(tmp_path, monkeypatch, method, arch):
    """To the last bit: weights, queue, optimiser, dropout; a resumed run must not be another experiment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "table", lambda *a: None)
    flags = ["--method", method, "--arch", arch, "--teacher-arch", "resnet18", *TINY]
    train.main([*flags, "--max-steps", "8", "--eval-every", "1", "--out", "whole"])     # looking at kNN changes nothing
    teacher = ["--teacher", str(next(Path("runs/teachers").glob("*/encoder.pt")))] if method == "seed" else []
    train.main([*flags, *teacher, "--max-steps", "4", "--out", "cut"])
    train.main([*flags, *teacher, "--max-steps", "8", "--out", "cut"])
    one, other = last("whole"), last("cut")
    assert one["step"] == other["step"] == 8 and same(one["method"], other["method"])
    group, speeds = one["optimizer"]["param_groups"][0], [run["optimizer"]["state"] for run in (one, other)]
    assert len(speeds[0]) == len(speeds[1]) == len(group["params"]) > 20, "every parameter got a gradient"
    assert all(torch.equal(speeds[0][i]["momentum_buffer"], speeds[1][i]["momentum_buffer"]) for i in speeds[0])
    s = settings(*TINY, method=method)
    assert (group["momentum"], group["weight_decay"]) == (0.9, s.weight_decay)
    assert group["lr"] == pytest.approx(train.lr_at(7, s, 6))
    assert int(one["method"].get("queue.seen", 8 * 16)) == 8 * 16, "the queue moves once a step"
    assert not any(key.startswith("teacher.") for key in one["method"])
    assert [row["knn"] != "" for row in csv.DictReader(open("whole/log.csv"))] == [True, False], "kNN after the full epoch"
    assert [row["step"] for row in csv.DictReader(open("cut/log.csv"))] == ["4", "6", "8"], "the rows before the cut stay"


@pytest.mark.parametrize("method", ["seed", "moco", "supervised"])
def test_a_run_is_its_recipe_step_by_step(tmp_path, method):
    """What never reaches the loop (decay, schedule, temperature, queue) makes another experiment, and the loss still falls."""
    flags = "--arch resnet18 --dim 8 --batch-size 32 --lr 0.4 --weight-decay 0.5 --tau-s 0.3 --tau-t 0.07 --max-steps 4 --precision fp32".split()
    s = settings(*TINY, *flags, "--out", str(tmp_path / "run"), method=method)
    data, teacher = load_data("shapes", subset=96), Toy()
    teacher.made = "toy"
    train.train(s, data, team(), teacher if method == "seed" else None)

    torch.manual_seed(0)
    net = Encoder("resnet18", 8, image_size=32)
    m = {"seed": lambda: SEED(net, teacher, 64, 0.3, 0.07), "moco": lambda: MoCo(net, 64, 0.99, 0.3, 1),
         "supervised": lambda: Supervised(net, 20)}[method]().to(memory_format=torch.channels_last)
    start, learning = snapshot(m), [p for p in m.parameters() if p.requires_grad]
    speeds = [torch.zeros_like(p) for p in learning]
    for step, (epoch, index) in enumerate(train.plan(96, s, team(), range(0, 4))):
        views = [augment(data.train.pixels[index], uniforms(0, epoch, index, v), 32, blur=False)
                 .contiguous(memory_format=torch.channels_last) for v in range(m.views_needed)]
        torch.manual_seed(step)                                     # MoCo's shuffle
        loss, _ = m(views, data.train.labels[index])
        with torch.no_grad():
            for p, v, g in zip(learning, speeds, torch.autograd.grad(loss, learning)):
                v.mul_(0.9).add_(g + 0.5 * p)
                p.sub_(0.05 * min(step + 1, 3) / 3 * v)             # 0.4 * 32/256, three steps of warm-up
        m.finish_step()
    slow, fast = m.state_dict(), last(tmp_path / "run")["method"]
    keys = [key for key, value in fast.items() if value.is_floating_point() and "running" not in key]
    distance = lambda a, b: math.sqrt(sum((a[key] - b[key]).square().sum().item() for key in keys))
    assert distance(slow, fast) < 0.01 * distance(slow, start)


def test_a_killed_run_has_its_last_full_epoch(tmp_path, monkeypatch):
    """A power cut after nine days must not cost nine days."""
    monkeypatch.chdir(tmp_path)
    steps = iter(range(7))
    monkeypatch.setattr(train.Supervised, "finish_step", lambda self: next(steps))
    with pytest.raises(StopIteration):
        train.main(["--method", "supervised", "--arch", "resnet18", "--out", "run", *TINY])
    assert last("run")["step"] == 6 and load_teacher("run/encoder.pt").arch == "resnet18"


@pytest.mark.parametrize("name", ["encoder.pt", "last.pt"])
def test_a_kill_while_saving_costs_nothing(tmp_path, monkeypatch, name):
    """The moment of writing is when full disks and time limits strike."""
    s = settings("--arch", "mobilenet_v3_small", "--batch-size", "8", "--out", str(tmp_path / "run"), method="supervised")
    data, write = load_data("shapes", subset=8), torch.save
    folder = train.RunFolder(s, data, train.Trainer(s, data, team()))
    folder.resume(), folder.save(1, 0.0)

    def cut(state, path):
        write(state, path)
        if name in str(path):
            Path(path).write_bytes(b"half")
            raise OSError("power cut")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError):
        folder.save(2, 0.0)
    assert last(s.out)["step"] == 1 and load_teacher(f"{s.out}/encoder.pt").arch == s.arch


def test_a_student_does_not_go_on_under_another_teacher(tmp_path, monkeypatch):
    """Half of it learned from one, half from the other, ranked against a queue of both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "table", lambda *a: None)
    moco_file("a"), moco_file("b")
    flags = ["--arch", "resnet18", "--out", "run", *TINY]
    train.main([*flags, "--teacher", "a", "--max-steps", "1"])
    with pytest.raises(InputError, match=r"other settings \(teacher "):
        train.main([*flags, "--teacher", "b", "--max-steps", "2"])
    with pytest.raises(InputError, match="pictures "):
        train.main([*flags, "--teacher", "a", "--subset", "95"])
    with pytest.raises(InputError, match="of another teacher"):
        train.main([*flags, "--max-steps", "2"])
    os.remove("run/last.pt")
    with pytest.raises(InputError, match="no last.pt"):
        train.main([*flags, "--teacher", "a"])


def test_a_run_is_built_from_its_settings():
    """A flag that goes nowhere: args.json says tau_t = 0.07, and the run trains with 0.01."""
    flags = "--dataset cifar10 --arch resnet18 --dim 8 --hidden-dim 20 --queue-size 50 --tau-s 0.3 --tau-t 0.07".split()
    m = train.build(settings(*flags), None, Toy(), team())
    assert (m.tau_s, m.tau_t, len(m.queue.features)) == (0.3, 0.07, 50)
    assert m.encoder.options == dict(arch="resnet18", dim=8, hidden_dim=20, small_images=True, image_size=32)
    m = train.build(settings(*flags, method="moco"), None, None, team())
    assert (m.tau, m.momentum, len(m.queue.features), m.encoder.backbone.bn1.splits) == (0.3, 0.99, 50, 8)
    m = train.build(settings(*flags, method="moco"), None, None, team(0, 8))
    assert m.encoder.backbone.bn1.splits == 1, "eight ranks split the batch already"
    data, made = load_data("shapes", subset=8), {}
    for number in "01":
        made[number] = train.build(settings(*flags, "--seed", number, method="supervised"), data, None, team()).class_vectors
    assert not torch.equal(made["0"], made["1"]), "other weights by another seed"


def test_another_setting_is_another_run():
    """Resumed under it, half a run is one experiment and half another."""
    data = load_data("shapes", subset=8)
    for change in ("--weight-decay 9", "--batch-size 9", "--tau-s 9", "--tau-t 9", "--queue-size 9", "--warmup-epochs 0", "--precision bf16",
                   "--hidden-dim 9", "--image-size 40", "--small-images", "--arch resnet18", "--view-epochs 1", "--dim 9"):
        assert train.identity(settings(*change.split()), data) != train.identity(settings(), data), change


@pytest.mark.parametrize("method, networks", [("seed", ["encoder", "teacher"]), ("moco", ["encoder", "key_encoder"]), ("supervised", ["encoder"])])
def test_compile_compiles_each_network(monkeypatch, method, networks):
    """One that is left out sets the pace."""
    compiled, s = [], settings("--arch", "resnet18", "--dim", "8", "--batch-size", "8", "--compile", method=method)
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    trainer = train.Trainer(s, load_data("shapes", subset=8), team(), Toy() if method == "seed" else None)
    trainer.start()
    assert compiled == [getattr(trainer.method, name) for name in networks]


def test_chance_is_another_in_each_step_on_each_rank_and_by_each_seed():
    """Dropout, and MoCo's shuffle: the same mask all along would switch the same features off for good."""
    data, seen = load_data("shapes", subset=8), []
    for number, rank in (("0", 0), ("0", 1), ("1", 0), ("1", 1)):
        s = settings("--arch", "mobilenet_v3_small", "--batch-size", "4", "--seed", number, method="supervised")
        trainer = train.Trainer(s, data, team(rank, 2))
        trainer.update = lambda loss: seen.append(torch.initial_seed())
        for step, batch in enumerate(train.batches(data.train, s, team(rank, 2), 1, range(2))):
            trainer.step(step, *batch)
    assert len(set(seen)) == 8


def test_the_log_tells_means_and_stops_at_nan():
    """A loss that is not a number trains on for days, and saves itself over the good checkpoint."""
    progress = train.Progress(settings(), Path("nowhere"), 0, 10, 5, 0.0)
    for loss in (1.0, 2.0, 3.0):
        progress.add(torch.tensor(loss), {})
    assert progress.stop_clock(3, 0.1)["loss"] == 2.0
    progress.start_clock(), progress.add(torch.tensor(math.nan), {})
    with pytest.raises(InputError, match="not finite at step 4; lower --lr"):
        progress.stop_clock(4, 0.1)


@pytest.mark.parametrize("flags, units, teachers, students", [
    ("--image-size 48", True, torch.bfloat16, torch.float32), ("--small-images", True, torch.bfloat16, torch.float32),
    ("--image-size 48", False, torch.float32, torch.float32), ("--image-size 32", True, torch.float32, torch.float32),
    ("--image-size 48 --precision fp32", True, torch.float32, torch.float32), ("--precision bf16", False, torch.bfloat16, torch.bfloat16)])
def test_a_frozen_teacher_uses_the_bf16_units_of_a_cpu(monkeypatch, flags, units, teachers, students):
    """Twice as fast for a teacher, which only goes forward; the student would train more slowly, and so would tiny layers."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(amx_bf16=units))
    s = settings("--arch", "resnet18", "--dim", "8", "--batch-size", "4", *flags.split())
    data, teacher, found = load_data("shapes", subset=8), Encoder("resnet18", 8, image_size=32).eval(), {}
    trainer = train.Trainer(s, data, team(), teacher)
    for name, net in (("teacher", teacher), ("student", trainer.method.encoder)):
        net.backbone.conv1.register_forward_hook(lambda module, x, out, name=name: found.__setitem__(name, out.dtype))
    loss, _, _ = trainer.step(0, *next(train.batches(data.train, s, team(), 1, [0])))
    assert found == dict(teacher=teachers, student=students) and trainer.method.latest.dtype == loss.dtype == torch.float32
    assert not trainer.scaler.is_enabled()
    s.precision = "fp16"
    assert train.Trainer(s, data, team(), teacher).scaler.is_enabled(), "small gradients would be 0 in float16"


def test_a_batch_is_the_planned_pictures_each_under_its_own_numbers():
    """Two equal views, or the same view each epoch: MoCo has nothing to learn, and its loss looks splendid."""
    s, data = settings("--batch-size", "16"), load_data("shapes", subset=64)
    s.crop_scale, s.blur, s.seed = (0.1, 0.4), True, 3
    for (epoch, index), (views, labels, whose) in zip(train.plan(64, s, team(), range(3, 6)), train.batches(data.train, s, team(), 2, range(3, 6))):
        assert torch.equal(labels, data.train.labels[index]) and len(views) == 2
        for v, view in enumerate(views):
            numbers = uniforms(3, epoch, index, v)
            assert torch.allclose(view, augment(data.train.pixels[index], numbers, 32, (0.1, 0.4), True), atol=1e-5)


def calls_of(monkeypatch):
    """Counts, in a list of one number, how often a SEED teacher is asked."""
    asked, load = [0], train.load_teacher

    def loaded(*args):
        teacher = load(*args)
        teacher.register_forward_hook(lambda *a: asked.__setitem__(0, asked[0] + 1))
        return teacher
    monkeypatch.setattr(train, "load_teacher", loaded)
    monkeypatch.setattr(train, "table", lambda *a: None)
    return asked


@pytest.fixture
def teacher_file(tmp_path):
    net = Encoder("resnet18", 32, image_size=32)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    save_encoder(tmp_path / "teacher.pt", net, "a test", False)
    return tmp_path / "teacher.pt"


CACHED = ["--arch", "mobilenet_v3_small", "--precision", "fp32", "--teacher", "teacher.pt", "--teacher-cache", "cache", *TINY]


def test_a_kept_answer_is_the_teachers_answer(tmp_path, monkeypatch, teacher_file):
    """A second student, a resumed run or a torn row must train as if the teacher had been asked: to the last bit."""
    monkeypatch.chdir(tmp_path)
    asked = calls_of(monkeypatch)
    runs = []
    for out, flags, calls in (("without", CACHED[:6] + TINY, 12), ("first", CACHED, 12), ("second", CACHED, 1)):
        train.main([*flags, "--out", out])
        runs.append(last(out))
        assert asked[0] == calls, f"{out}: 12 steps; a cache that is full asks in the first step alone"
        asked[0] = 0
    rows = np.memmap("cache/z.float32", np.float32, "r+", shape=(2, 96, 32))
    whole = np.array(rows)
    assert np.allclose(np.linalg.norm(whole, axis=2), 1, atol=1e-5), "each picture's view of each epoch"
    rows[1, 7, 16:], rows[0, 3] = 0, np.nan                             # a kill tears one row, a bad disk another
    train.main([*CACHED, "--out", "torn"])
    assert asked[0] == 3 and np.array_equal(np.array(rows), whole), "the two batches again, and the first step"
    train.main([*CACHED, "--tau-t", "0.2", "--out", "another"])
    for other in (*runs[1:], last("torn")):
        assert same(runs[0]["method"], other["method"])
    assert not same(runs[0]["method"], last("another")["method"])


def test_answers_are_addressed_by_epoch_and_picture(tmp_path, monkeypatch, teacher_file):
    """A row in another's place is a teacher that looks at another picture; nothing else would notice."""
    monkeypatch.chdir(tmp_path)
    calls_of(monkeypatch)
    train.main([*CACHED, "--out", "run"])
    rows = np.memmap("cache/z.float32", np.float32, "r", shape=(2, 96, 32))
    data, teacher = load_data("shapes", subset=96), load_teacher("teacher.pt")
    for epoch, index in ((0, [5, 80]), (1, [5, 17])):
        view = augment(data.train.pixels[index], uniforms(0, epoch, index), 32, blur=False)
        assert np.allclose(rows[epoch, index], teacher(view).numpy(), atol=1e-4)


def test_a_cache_grows_and_repeats(tmp_path, monkeypatch, teacher_file, capsys):
    """More epochs keep what is there; --view-epochs bounds the disk, and shuffles the pictures all the same."""
    monkeypatch.chdir(tmp_path)
    asked = calls_of(monkeypatch)
    train.main([*CACHED, "--view-epochs", "1", "--out", "once"])
    assert asked[0] == 7 and os.path.getsize("cache/z.float32") == 4 * 96 * 32, "the second epoch only looks once"
    assert "1 x 96 x 32 float32, 0.00 GB" in capsys.readouterr().out
    train.main([*CACHED, "--out", "twice"])
    assert asked[0] == 7 + 7 and os.path.getsize("cache/z.float32") == 2 * 4 * 96 * 32
    s = settings("--batch-size", "10", "--epochs", "5", "--view-epochs", "2")
    planned = list(train.plan(20, s, team(), range(10)))
    assert [epoch for epoch, _ in planned[::2]] == [0, 1, 0, 1, 0]
    assert not np.array_equal(planned[0][1], planned[4][1]), "other company in each epoch"
    with pytest.raises(InputError, match="view_epochs"):
        train.main([*CACHED, "--view-epochs", "1", "--out", "twice"])


def test_a_cache_of_other_answers_is_refused(tmp_path, monkeypatch, teacher_file):
    """Answers to other views, or of another teacher, would be learnt without a word."""
    monkeypatch.chdir(tmp_path)
    calls_of(monkeypatch)
    flags = [*CACHED, "--out", "other", "--max-steps", "7"]
    train.main([*CACHED, "--out", "run"])
    kept = Path("cache/z.float32").read_bytes()
    for change, named in ((["--seed", "1"], "seed 0 there, 1 here"), (["--subset", "95"], "subset 96 there, 95 here"),
                          (["--precision", "bf16"], "precision torch.float32 there, torch.bfloat16 here"),
                          (["--image-size", "40"], "image_size 32 there, 40 here")):
        with pytest.raises(InputError, match=named):
            train.main([*flags, *change])
    for name, other in (("crop_scale", (0.1, 1.0)), ("blur", True)):
        monkeypatch.setitem(train.RECIPES["shapes"]["common"], name, other)
        with pytest.raises(InputError, match=name):
            train.main(flags)
    load = train.load_data
    monkeypatch.setattr(train, "load_data", lambda *a: dataclasses.replace(load(*a), key="another"))
    with pytest.raises(InputError, match="pictures .* there"):
        train.main(flags)
    monkeypatch.undo(), monkeypatch.chdir(tmp_path), calls_of(monkeypatch)
    monkeypatch.setattr(train, "augment", lambda *a: augment(*a).flip(2))       # code that the fingerprint does not know
    with pytest.raises(InputError, match="answers differently"):
        train.main(flags)
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    save_encoder("teacher.pt", Encoder("resnet18", 32, image_size=32), "another", False)
    with pytest.raises(InputError, match="teacher .* there"):
        train.main(flags)
    with pytest.raises(InputError, match="teacher-cache is for --method seed"):
        train.main(["--method", "moco", "--teacher-cache", "cache"])
    assert Path("cache/z.float32").read_bytes() == kept, "nothing lost"
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: train.SimpleNamespace(free=100))
    with pytest.raises(InputError, match="lower --view-epochs"):
        train.main([*CACHED[:-len(TINY)], *TINY, "--teacher-cache", "new", "--out", "other"])


@pytest.mark.parametrize("method, place", [("seed", "memory"), ("moco", "memory"), ("supervised", "memory"), ("seed", "disk")])
def test_the_benchmark_measures_and_trains_nothing(tmp_path, monkeypatch, capsys, folder_of_pictures, method, place):
    """Its table must add up, name each part, and leave no run behind."""
    monkeypatch.chdir(tmp_path)
    disk = f"--dataset folder --data {folder_of_pictures} --image-size 72 --subset 20 --workers 1".split() if place == "disk" else []
    train.main(["--benchmark", "--method", method, "--arch", "mobilenet_v3_small", "--teacher-arch", "resnet18", *TINY, *disk])
    out = capsys.readouterr().out
    assert f"on {place}" in out or f"in {place}" in out
    assert list(tmp_path.iterdir()) == [folder_of_pictures]
    row = lambda name: [float(word) for word in re.search(rf"^{name} +([\d.]+) +([\d.]+)$", out, re.M).groups()]
    network = dict(seed=["teacher"], moco=["key encoder"], supervised=[])[method]
    for name in ["reading", "augmentation", *network, "student: forward, backward, update", "whole step"]:
        ms, rate = row(name)
        assert 0 < ms and ms == pytest.approx(16e3 / rate, rel=0.02, abs=0.006)
    floor, ratio = map(float, re.search(r"whole step: its networks alone take ([\d.]+) ms, ([\d.]+) of it", out).groups())
    assert floor == pytest.approx(sum(row(name)[0] for name in [*network, "student: forward, backward, update"]), abs=0.02)
    assert ratio == pytest.approx(floor / row("whole step")[0], abs=0.01)
    assert ("loss and queue" in out) == (method != "supervised") and ("teacher cached" in out) == (method == "seed")


def test_a_run_resumes_or_says_that_it_is_finished_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    """The same command again must never silently train something else into the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "table", lambda *a: None)
    flags = ["--method", "supervised", "--arch", "resnet18", "--out", "run", *TINY]
    train.main(flags)
    before = (Path("run") / "encoder.pt").read_bytes()
    train.main([*flags, "--workers", "1", "--eval-every", "1"])
    assert "finished before" in capsys.readouterr().out and (Path("run") / "encoder.pt").read_bytes() == before
    for change in (["--lr", "0.3"], ["--epochs", "3"], ["--seed", "1"]):
        with pytest.raises(InputError, match=change[0].strip("-") + " "):
            train.main([*flags, *change])
    rows = list(csv.DictReader(open("run/log.csv")))
    assert [int(row["step"]) for row in rows] == [6, 10, 12] and float(rows[-1]["loss"]) > 0
    assert json.load(open("run/args.json"))["lr"] == 0.1 and Image.open("run/views.png").size[0] > 100


def test_a_teacher_is_trained_once_and_kept_under_what_made_it(tmp_path, monkeypatch, capsys):
    """A cached teacher of another recipe or seed would spoil a comparison without a word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "table", lambda *a: None)
    flags = ["--arch", "mobilenet_v3_small", "--teacher-arch", "resnet18", "--max-steps", "2", *TINY]
    train.main([*flags, "--out", "a"])
    assert "WITH the labels" in capsys.readouterr().out
    made = json.loads((next(Path("runs/teachers").iterdir()) / "args.json").read_text())
    assert (made["arch"], made["epochs"], made["method"]) == ("resnet18", 1, "supervised")
    train.main([*flags, "--tau-t", "0.1", "--out", "b"])
    assert "finished before" in capsys.readouterr().out and len(list(Path("runs/teachers").iterdir())) == 1
    train.main([*flags, "--teacher-method", "moco", "--out", "c"])
    train.main([*flags, "--seed", "1", "--out", "d"])
    assert len(list(Path("runs/teachers").iterdir())) == 3
    assert load_teacher("a/encoder.pt").labels_seen is True and load_teacher("c/encoder.pt").labels_seen is False


def test_the_paper_s_setting_runs_on_large_pictures(tmp_path, folder_of_pictures):
    """ImageNet's path: JPEGs from disk at 224 px, a MoCo-v2 ResNet-50, in a process of its own."""
    moco_file(tmp_path / "moco.pth.tar", "resnet50")
    done = command("train.py", "--dataset", "folder", "--data", folder_of_pictures, "--arch", "mobilenet_v3_large", "--teacher",
                   tmp_path / "moco.pth.tar", "--batch-size", "4", "--max-steps", "2", "--workers", "1", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "matched 318/318" in done.stdout and "without labels" in done.stdout and "waiting" in done.stdout
    assert load_teacher(tmp_path / "runs/folder-seed-mobilenet_v3_large/encoder.pt").dim == 128


def command(*words, cwd, launcher=(sys.executable,), threads=None):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | ({"OMP_NUM_THREADS": threads} if threads else {})
    return subprocess.run([*launcher, str(HERE / words[0]), *map(str, words[1:])], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def test_two_processes_are_one_run(tmp_path, monkeypatch):
    """Weights and queue must be equal on both, to the bit, and the batches those of a single process."""
    monkeypatch.chdir(tmp_path)
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name in ("seed", "moco"):
        weights = [{k: v for k, v in state[name].items() if "running" not in k and "num_batches" not in k} for state in (one, other)]
        assert same(*weights), name
        assert same(one[name + " start"], other[name + " start"])
        assert not same(one[name + " start"], weights[0])
    assert same(one["run"], other["run"]), "train.py wraps the networks, or eight GPUs train eight of them"
    assert one["mean"] == other["mean"] == 2.5, "the log is about all ranks"
    assert torch.equal(one["gathered"], torch.arange(8.0)[:, None]) and torch.equal(other["gathered"], one["gathered"])
    assert torch.allclose(one["shuffled"], torch.arange(0.0, 12, 2)[:, None]) and torch.allclose(other["shuffled"], torch.arange(1.0, 12, 2)[:, None])

    # One process on the whole batch: the same keys in the queue, in the same order, since the teacher sees the same views.
    s, data, teacher = two_rank_setting()
    method = SEED(Toy(), teacher, 64)
    for views, _, _ in train.batches(data.train, s, team(), 1, range(0, 3)):
        method(views)
        method.finish_step()
    queue = one["seed"]["queue.features"]
    assert torch.allclose(queue[:48], method.queue.features[:48], atol=1e-5)
    assert torch.equal(queue[48:], one["seed start"]["queue.features"][48:]), "and no more than three batches"


def two_rank_setting():
    torch.manual_seed(5)
    return settings("--batch-size", "16", "--image-size", "32"), load_data("shapes", subset=64), Toy()


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    s, data, teacher = two_rank_setting()
    result = {"gathered": seed.gather(torch.tensor([[0.0], [2], [4], [6]]) + rank)}
    for name in ("seed", "moco"):
        torch.manual_seed(6)
        method = SEED(Toy(), teacher, 64) if name == "seed" else MoCo(Toy(), 64, momentum=0.9)
        result[name + " start"] = {k: v for k, v in snapshot(method).items() if "running" not in k and "num_batches" not in k}
        model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
        for views, labels, _ in train.batches(data.train, s, team(rank, 2), method.views_needed, range(0, 3)):
            loss, _ = model(views, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.finish_step()
        result[name] = snapshot(method)
    progress = train.Progress(s, Path(folder), 0, 1, 1, 0.0)
    progress.add(torch.tensor(2.0 + rank), {})
    result["mean"] = progress.stop_clock(1, 0.1)["loss"]
    method.key_encoder = nn.Identity()
    torch.manual_seed(rank)                                         # as in a real run: each rank has its own chance
    result["shuffled"] = method.embed_keys(torch.arange(0.0, 12, 2)[:, None] + rank)
    os.environ["RANK"], built, build = str(rank), [], train.build
    train.build = lambda *a: built.append(build(*a)) or built[-1]
    s.arch, s.dim, s.out, s.max_steps, teacher.made = "resnet18", 8, f"{folder}/run", 3, "toy"
    train.train(s, data, team(rank, 2), teacher)
    result["run"] = {k: v for k, v in snapshot(built[0]).items() if "running" not in k and "num_batches" not in k}
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_torchrun_with_two_processes_gives_a_student(tmp_path):
    """The README's command for several processes, here on the CPU."""
    done = command("train.py", "--arch", "mobilenet_v3_small", "--teacher-arch", "mobilenet_v3_small", "--max-steps", "2", *TINY, cwd=tmp_path,
                   launcher=(*TORCHRUN, "--nproc_per_node=2"), threads="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 2") == 1 and "2 processes on cpu" in done.stdout and "mobilenet_v3_small by SEED" in done.stdout


def test_the_readmes_main_command_runs(tmp_path):
    """Cut to a few steps; what it prints last is the table."""
    done = command("train.py", "--arch", "mobilenet_v3_large", "--max-steps", "3", "--subset", "256", cwd=tmp_path, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs/shapes-seed-mobilenet_v3_large"
    rows = json.loads((out / "results.json").read_text())
    assert [row["labels"] for row in rows] == ["no", "yes", "by its teacher"] and all(0 <= row["knn"] <= 100 for row in rows)
    assert all(Image.open(out / name).size[0] > 300 for name in ("views.png", "neighbours.png"))
    done = command("probe.py", out / "encoder.pt", "--subset", "256", cwd=tmp_path)
    assert done.returncode == 0 and "kNN" in done.stdout, done.stderr
    found = json.loads((out / "probe.json").read_text())
    assert found["knn"] == pytest.approx(rows[2]["knn"], abs=0.5) and "SEED" in found["made"]


def test_the_readmes_commands_are_understood():
    """A printed command that does not run is worse than none."""
    blocks = [block.split("```")[0] for block in (HERE / "README.md").read_text().split("```sh\n")[1:]]
    lines = [line.split("#")[0].split() for block in blocks for line in block.splitlines() if " train.py " in line]
    assert len(lines) >= 7
    for words in lines:
        args = train.parse_flags(words[words.index("train.py") + 1:])
        train.resolve(args, args.method)
    for block in (HERE / "README.md").read_text().split("```python\n")[1:]:
        compile(block.split("```")[0], "README.md", "exec")


def test_cifar_is_read_through_torchvision_and_a_failed_download_is_explained(tmp_path, monkeypatch):
    """The user without a network is told what to do, not shown a stack of sockets."""
    class Fake:
        filename, classes = "cifar-10-python.tar.gz", list("abcdefghij")

        def __init__(self, root, train, download):
            self.data = np.arange((6 if train else 4) * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(-1, 32, 32, 3)
            self.targets = list(range(6 if train else 4))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_data("cifar10", tmp_path)
    assert data.judged and data.train.pixels.shape == (6, 3, 32, 32) and data.test.labels.tolist() == [0, 1, 2, 3]
    assert data.train.pixels[0, :, 0, 1].tolist() == [3, 4, 5], "channels first"

    def refused(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(Fake, "__init__", refused)
    with pytest.raises(InputError, match=r"put cifar-10-python.tar.gz into .* --dataset shapes"):
        load_data("cifar10", tmp_path)


def test_probe_judges_an_untrained_network_too(tmp_path, monkeypatch, capsys):
    """Without this row nobody can tell what a number means."""
    monkeypatch.chdir(tmp_path)
    probe.main(["random:resnet18", "--subset", "200", "--device", "cpu", "--out", "here"])
    assert "resnet18, random weights" in capsys.readouterr().out
    found = json.loads(Path("here/probe.json").read_text())
    assert 5 < found["knn"] < 30 and Path("here/neighbours.png").exists()


def test_pictures_without_labels_are_welcome(tmp_path, monkeypatch, capsys):
    """SEED needs no label, so a directory of pictures must do; only the accuracies are left out."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "p", [f"{i}.png" for i in range(40)])
    train.main(["--dataset", "folder", "--data", "p", "--image-size", "32", "--arch", "mobilenet_v3_small", "--teacher-arch", "mobilenet_v3_small",
                "--batch-size", "8", "--epochs", "1", "--teacher-epochs", "1", "--device", "cpu", "--compare"])
    printed = capsys.readouterr().out
    out = Path("runs/folder-seed-mobilenet_v3_small")
    assert json.loads((out / "args.json").read_text())["queue_size"] == 36, "no longer than there are pictures"
    rows = json.loads((out / "results.json").read_text())
    assert "without labels" in printed and [row["name"] for row in rows][-1] == "mobilenet_v3_small by MoCo-v2"
    assert all(row["knn"] is row["linear"] is None for row in rows) and (out / "neighbours.png").exists()


@pytest.mark.parametrize("flags, words", [
    (["--arch", "mobilenet_v3"], "did you mean .*mobilenet_v3_large"),
    (["--teacher", "nothing.pt"], "no such file"),
    (["--dataset", "folder", "--data", "nowhere"], "no directory .*nowhere"),
    (["--dataset", "imagenet", "--data", "."], "train/ and val/"),
    (["--batch-size", "6000"], "larger than the 5,000"),
    (["--lr", "-1"], "--lr must be above 0"),
    (["--tau-t", "0"], "--tau-t must be above 0"),
    (["--method", "sed"], "invalid choice"),
    (["--lr", "fast"], "invalid float"),
    (["--arch", "vit_b_16"], "vit_b_16 cannot be an encoder at 32 px"),
    (["--device", "cuda:99"], "no device")])
def test_bad_input_is_an_error_before_any_training(tmp_path, monkeypatch, flags, words):
    """One line that says what is wrong; nothing trained, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        train.main(flags)
    assert not list(tmp_path.iterdir())


def test_a_run_does_not_write_among_its_pictures(tmp_path, monkeypatch):
    """Its own views.png would be training data the next time."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, [f"{i}.png" for i in range(20)])
    with pytest.raises(InputError, match="among the pictures"):
        train.main(["--dataset", "folder", "--data", ".", "--image-size", "32", "--batch-size", "8", "--device", "cpu"])


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    """What a shell script, and a tired reader, can act on."""
    for words in (["train.py", "--lr", "-1"], ["probe.py", "nothing.pt"]):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = command("train.py", "--batch-size", "129", cwd=tmp_path, launcher=(*TORCHRUN, "--nproc_per_node=2"), threads="1")
    assert done.returncode != 0 and done.stderr.count("error: --batch-size 129 must be a multiple") == 1


def test_the_toy_runs():
    """`python seed.py` is the first thing a reader tries; seed.py needs no other file."""
    done = command("seed.py", cwd="/")
    assert done.returncode == 0 and "100%" in done.stdout and "own entry" in done.stdout
