"""What must be true of SEED: one lesson per test, on the CPU, without a network.

Each test's name is a sentence, and its docstring says what would go wrong in a real run if it
failed. Where possible, a test computes the same thing in a slow and obvious way, and compares.
The hard cases (damaged files, kills, odd images, several processes) are in .ci/.
"""
import collections
import copy
import csv
import doctest
import inspect
import math
import os
import signal
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

import probe
import seed
import train
from probe import Split, load_data, load_teacher, save_encoder
from seed import (SEED, Encoder, FeatureQueue, InputError, MoCo, SmallCropSEED, Supervised, augment,
                  info_nce, seed_diagnostics, seed_loss, uniforms)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
ARCH = "shufflenet_v2_x0_5"         # torchvision's fastest network at 32 px on a CPU
TINY = ("--subset 96 --batch-size 16 --epochs 2 --teacher-epochs 1 --queue-size 64 --eval-every 0 "
        "--device cpu").split()
draw_all_shapes = probe.draw_shapes


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers_in_each_test():
    torch.manual_seed(0)


@pytest.fixture
def few_shapes(monkeypatch):
    """The built-in data set with 250 training and 100 test images."""
    def draw_few_shapes(n, split):
        return draw_all_shapes(n // 20, split)

    monkeypatch.setattr(probe, "draw_shapes", draw_few_shapes)


@pytest.fixture
def quick(tmp_path, monkeypatch, few_shapes):
    """Runs in a folder of their own, on few shapes, without size checks and the final table."""
    def skip_check(self, image_size):
        return 512 if self.arch == "resnet18" else 1024         # ARCH, mobilenet_v3_small

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Encoder, "check_image_size", skip_check)
    monkeypatch.setattr(train, "print_table", lambda *args: None)
    return tmp_path


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """An encoder.pt with 32-dimensional embeddings and trained-looking batch-norm statistics."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    save_encoder(path, with_statistics(Encoder(ARCH, 32, image_size=32)), "a test", False)
    return str(path)


class SmallNetwork(nn.Module):
    """A network of one's own: images [B, 3, S, S] -> embeddings [B, dim], with batch norm."""

    def __init__(self, dim=8):
        super().__init__()
        self.dim = dim
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, dim)

    def forward(self, x):
        return self.head(self.backbone(x))


def unit(*shape):
    """Return random vectors of unit norm."""
    return F.normalize(torch.randn(*shape), dim=-1)


def random_embeddings(batch, dim, length):
    """Return z_s [B, D], z_t [B, D] and a queue [K, D]; or a query, a key and a queue."""
    return unit(batch, dim), unit(batch, dim), unit(length, dim)


def with_statistics(network):
    """Give a network batch-norm statistics that are not the initial ones. Return it."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def snapshot(module):
    """Return a copy of all weights and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    """Return whether two state dicts have the same names and values."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spy(monkeypatch, owner, name):
    """Record each call of owner.name: return a list of (arguments, result)."""
    calls = []
    function = getattr(owner, name)

    def recorded(*args, **options):
        result = function(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return calls


def refusal(function, *args, **options):
    """Return the single line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def write_images(root, images):
    """Write image files: a dict of path -> a gray value or color, or uint8 pixels [H, W, 3]."""
    for name, pixels in images.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(pixels, np.ndarray):
            pixels = np.full((40, 40, 3), pixels, np.uint8)
        Image.fromarray(pixels).save(path)


def make_cfg(*flags, method="seed"):
    """Return all settings of a stage, from its flags."""
    args = train.parse_args(["--device", "cpu", "--method", method, *flags])
    return train.make_config(args, method)


def run(flags, out="run"):
    """Train on few shapes as `python train.py FLAGS --out OUT` does (fixture `quick`)."""
    train.main([*TINY, "--arch", ARCH, *flags.split(), "--out", out])


def last_checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def log_rows(folder):
    """Return the rows of a run's log.csv, without the columns that depend on the machine."""
    with open(Path(folder) / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("waiting", "images_per_s")} for row in rows]


def assert_same_run(whole, cut):
    """Check that two runs have the same weights, momenta and log, bit for bit."""
    a = last_checkpoint(whole)
    b = last_checkpoint(cut)
    assert same(a["method"], b["method"])
    momenta = b["optimizer"]["state"]
    for key, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], momenta[key]["momentum_buffer"])
    assert log_rows(whole) == log_rows(cut)


# --------------------------------------------------------------------------------------- the loss
def slow_softmax(z, own, queue, tau):
    """Return the similarity distribution of one image, a list of 1+K floats, by the formula."""
    entries = torch.cat([own[None], queue]).double()
    logits = [float(z.double() @ entry) / tau for entry in entries]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def slow_seed_loss(z_s, z_t, queue, tau_s, tau_t):
    """Return the paper's loss, by its formula with loops."""
    total = 0.0
    for student, teacher in zip(z_s, z_t):
        p_t = slow_softmax(teacher, teacher, queue, tau_t)
        p_s = slow_softmax(student, teacher, queue, tau_s)
        total -= sum(p * math.log(q) for p, q in zip(p_t, p_s))
    return total / len(z_s)


@pytest.mark.parametrize("tau_s, tau_t", [(0.2, 0.01), (0.2, 0.05), (0.1, 0.5), (1.0, 1.0)])
def test_the_loss_is_the_papers_formula(tau_s, tau_t):
    """If the formula were wrong, the loss would fall, but the student would learn other things."""
    z_s, z_t, queue = random_embeddings(5, 6, 11)
    loss = seed_loss(z_s, z_t, queue, tau_s, tau_t)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_seed_loss(z_s, z_t, queue, tau_s, tau_t), rel=1e-5)


@pytest.mark.parametrize("function, expected", [
    (seed_loss, dict(tau_s=0.2, tau_t=0.01)),
    (seed_diagnostics, dict(tau_s=0.2, tau_t=0.01)),
    (SEED, dict(queue_size=65536, tau_s=0.2, tau_t=0.01)),
    (SmallCropSEED, dict(queue_size=65536, tau_s=0.2, tau_t=0.01, small_crops=6)),
    (info_nce, dict(tau=0.2)),
    (MoCo, dict(queue_size=65536, momentum=0.999, tau=0.2, images_per_part=32)),
    (Supervised, dict(tau=0.1)),
    (Encoder, dict(dim=128, hidden_dim=None, small_images=False, image_size=224)),
    (uniforms, dict(view=0)),
    (augment, dict(size=None, scale=(0.2, 1.0), blur=True, color=True))])
def test_the_defaults_are_the_documented_ones(function, expected):
    """If tau_t were the authors' 1e-4 by default, all weight would lie on the image's own entry."""
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in expected} == expected


def test_the_images_own_teacher_embedding_is_one_of_the_entries():
    """If the loss used only the queue, the most similar entry of all would be missing."""
    z = unit(1, 4)
    queue = -z.expand(7, 4)
    self_prob = seed_diagnostics(z, z, queue, tau_s=1.0, tau_t=1.0)["self_prob"]
    expected = math.exp(1) / (math.exp(1) + 7 * math.exp(-1))
    assert self_prob.item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_is_the_log_probability_of_the_own_key():
    """If the baseline's loss were not MoCo's, the comparison with MoCo would mean nothing."""
    query, key, queue = random_embeddings(4, 8, 9)
    total = 0.0
    for q, k in zip(query, key):
        total -= math.log(slow_softmax(q, k, queue, tau=0.3)[0])
    assert info_nce(query, key, queue, tau=0.3).item() == pytest.approx(total / 4, rel=1e-5)


def test_the_loss_has_the_limits_of_its_docstring():
    """If a vanishing tau_t did not give `info_nce`, one of the two losses would be wrong. If a high
    tau_t did not make p_t uniform, it would be applied the wrong way round."""
    z_s, z_t, queue = random_embeddings(6, 16, 40)
    loss = seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=1e-5)
    assert loss.item() == pytest.approx(info_nce(z_s, z_t, queue, tau=0.2).item(), rel=1e-6)
    found = seed_diagnostics(z_s, z_t, queue, tau_t=1e5)
    assert found["self_prob"].item() == pytest.approx(1 / 41, rel=1e-4)
    assert found["entropy"].item() == pytest.approx(math.log(41), rel=1e-4)


def test_the_first_loss_is_near_the_log_of_the_number_of_entries():
    """If the first loss were far from log(1 + K), a user could not recognize a wrong temperature or
    embeddings that are not normalized."""
    z_s, z_t, queue = random_embeddings(256, 128, 4096)
    assert seed_loss(z_s, z_t, queue).item() == pytest.approx(math.log(4097), abs=0.2)


def test_the_loss_is_at_least_the_teachers_entropy():
    """If the entropy were not a lower bound, the kl could be negative, and a user would not know
    what loss to expect."""
    z_s, z_t, queue = random_embeddings(6, 8, 30)
    of_a_copy = seed_diagnostics(z_t, z_t, queue, tau_s=0.3, tau_t=0.3)
    assert of_a_copy["kl"].abs() < 1e-5
    assert torch.isclose(seed_loss(z_t, z_t, queue, 0.3, 0.3), of_a_copy["entropy"], atol=1e-5)
    assert of_a_copy["top1_agreement"] == 1
    found = seed_diagnostics(z_s, z_t, queue, tau_s=0.3, tau_t=0.3)
    assert found["kl"] > 0.01
    assert seed_loss(z_s, z_t, queue, 0.3, 0.3) > of_a_copy["entropy"] + 0.01


def test_a_copy_of_the_teacher_has_a_kl_of_6_nats_at_the_default_temperatures():
    """If a copy had another kl, users would take a floor of 6 nats for a failure, or a failure for
    the floor."""
    z = unit(6, 128)
    queue = unit(65536, 128)
    kl = seed_diagnostics(z, z, queue)["kl"].item()
    mean = torch.exp(5 * (z @ queue.T)).mean().item()                   # 5 is 1 / tau_s
    assert kl == pytest.approx(6.2, abs=0.1)
    assert kl == pytest.approx(math.log(1 + 65536 * math.exp(-5) * mean), abs=0.05)


def test_the_diagnostics_are_what_their_docstring_says():
    """If one were wrong, a user would misjudge the run. If one kept its graph, a log would fill the
    memory within some steps."""
    z_s, z_t, queue = random_embeddings(7, 5, 12)
    z_s[:3] = F.normalize(z_t[:3] + 0.1 * z_s[:3], dim=1)               # some that agree
    found = seed_diagnostics(z_s.clone().requires_grad_(), z_t, queue, tau_s=0.2, tau_t=0.1)
    p_t = [slow_softmax(t, t, queue, 0.1) for t in z_t]
    p_s = [slow_softmax(s, t, queue, 0.2) for s, t in zip(z_s, z_t)]
    entropy = np.mean([-sum(p * math.log(p) for p in row) for row in p_t])
    expected = dict(kl=slow_seed_loss(z_s, z_t, queue, tau_s=0.2, tau_t=0.1) - entropy,
                    entropy=entropy,
                    loss_of_a_copy=slow_seed_loss(z_t, z_t, queue, tau_s=0.2, tau_t=0.1),
                    self_prob=np.mean([row[0] for row in p_t]),
                    top1_agreement=np.mean([np.argmax(row) == 0 for row in p_s]))
    assert 0 < expected["top1_agreement"] < 1
    assert not any(value.requires_grad for value in found.values())
    found = {name: value.item() for name, value in found.items()}
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_the_difference_of_the_two_distributions():
    """If the gradient were not (p_s - p_t) / B, a different loss would be minimized."""
    z_s, z_t, queue = random_embeddings(4, 6, 10)
    seed_loss(z_s.requires_grad_(), z_t, queue, tau_s=0.2, tau_t=0.1).backward()
    for b in range(4):
        entries = torch.cat([z_t[b:b + 1], queue])
        p_s = torch.softmax(entries @ z_s[b].detach() / 0.2, dim=0)
        p_t = torch.softmax(entries @ z_t[b] / 0.1, dim=0)
        assert torch.allclose(z_s.grad[b], (p_s - p_t) @ entries / 0.2 / 4, atol=1e-5)


def test_a_copy_of_the_teacher_is_the_minimum_only_at_equal_temperatures():
    """If a copy were the minimum at any temperatures, `loss_of_a_copy` would be the lowest possible
    loss. At tau_s > tau_t, a student can come out below it."""
    _, z_t, queue = random_embeddings(6, 8, 30)
    z_s = z_t.clone().requires_grad_()
    for tau_t, is_minimum in ((0.2, True), (0.01, False)):
        loss = seed_loss(F.normalize(z_s, dim=1), z_t, queue, tau_s=0.2, tau_t=tau_t)
        gradient, = torch.autograd.grad(loss, z_s)
        assert (gradient.abs().max() < 1e-5) == is_minimum
        moved = F.normalize(z_s - 0.1 * gradient, dim=1)
        assert (seed_loss(moved, z_t, queue, tau_s=0.2, tau_t=tau_t) < loss - 1e-4) != is_minimum


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_only_the_student_gets_a_gradient(loss):
    """If the teacher or the queue moved too, both networks could map all images to one point."""
    z_s, z_t, queue = [z.requires_grad_() for z in random_embeddings(4, 6, 10)]
    loss(z_s, z_t, queue).backward()
    assert z_s.grad.abs().sum() > 0
    assert z_t.grad is None
    assert queue.grad is None


def test_neither_the_order_of_the_queue_nor_a_rotation_changes_the_loss():
    """If an entry's position mattered, the loss would change as the entry moves through the queue.
    Only angles between embeddings count, so the loss cannot depend on a common rotation."""
    z_s, z_t, queue = random_embeddings(4, 6, 10)
    loss = seed_loss(z_s, z_t, queue)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert torch.isclose(seed_loss(z_s, z_t, queue[torch.randperm(10)]), loss)
    assert torch.isclose(seed_loss(z_s @ rotation, z_t @ rotation, queue @ rotation), loss,
                         rtol=1e-4)


@pytest.mark.parametrize("tau_s", [1e-6, 1e3])
@pytest.mark.parametrize("tau_t", [1e-6, 1e3])
def test_loss_and_gradient_are_finite_at_the_ends_of_the_allowed_temperatures(tau_s, tau_t):
    """If exp() overflowed at a temperature that train.py accepts, all weights would become NaN."""
    z_s, z_t, queue = random_embeddings(8, 16, 50)
    for loss in (seed_loss(z_s.requires_grad_(), z_t, queue, tau_s, tau_t),
                 info_nce(z_s, z_t, queue, tau_s)):
        gradient, = torch.autograd.grad(loss, z_s)
        assert loss.isfinite() and gradient.isfinite().all()
    found = seed_diagnostics(z_s, z_t, queue, tau_s, tau_t)
    assert all(value.isfinite() for value in found.values())


def test_the_worked_example_of_the_docstring_is_right():
    """If the example were wrong, it would confuse readers before they read the code."""
    result = doctest.testmod(seed)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize("loss", [seed_loss, info_nce])
def test_the_loss_is_computed_in_float32(loss):
    """If a logit were bf16, it would be off by 0.4 at tau_t = 0.01, and the teacher's distribution
    would be noise. Autocast must not reach the loss, nor may bf16 embeddings."""
    z_s, z_t, queue = random_embeddings(8, 128, 500)
    exact = loss(z_s, z_t, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(z_s, z_t, queue)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, exact)
    rounded = [z.bfloat16() for z in (z_s, z_t, queue)]
    assert loss(*rounded).dtype == torch.float32
    assert torch.equal(loss(*rounded), loss(*[z.float() for z in rounded]))


FIT = [(4, 6), (4, 6), (9, 6)]                              # z_s, z_t and a queue
NO_FIT = [[(4, 6), (3, 6), (9, 6)], [(4, 6), (4, 6), (9, 5)], [(4, 6), (4, 6), (9,)],
          [(6,), (6,), (9, 6)], [(4, 6), (1, 6), (9, 6)], [(4, 6), (4, 1), (9, 6)]]


@pytest.mark.parametrize("call, shapes, options, message", [
    *[(seed_loss, shapes, {}, "expected shapes") for shapes in NO_FIT],
    *[(info_nce, shapes, {}, "expected shapes") for shapes in NO_FIT],
    *[(seed_loss, FIT, dict(tau_s=tau), "temperature") for tau in (0.0, -0.1, math.nan)],
    *[(seed_loss, FIT, dict(tau_t=tau), "temperature") for tau in (0.0, -0.1, math.nan)],
    (info_nce, FIT, dict(tau=0.0), "temperature"),
    (FeatureQueue, [], dict(size=0, dim=3), "at least 1"),
    (FeatureQueue, [], dict(size=3, dim=0), "at least 1"),
    *[(FeatureQueue(4, 3).enqueue, [shape], {}, r"\[B, 3\]") for shape in ((2, 5), (2, 1), (3,))],
    (augment, [(4, 3, 9), (4, 31)], {}, "expected images"),
    (augment, [(4, 1, 9, 9), (4, 31)], {}, "expected images"),
    (augment, [(4, 3, 9, 9), (2, 31)], {}, "expected images"),
    (augment, [(4, 3, 9, 9), (4, 30)], {}, "expected images")])
def test_wrong_shapes_and_temperatures_are_errors(call, shapes, options, message):
    """If such a call were accepted, broadcasting would turn the mistake into a number. A negative
    temperature would train the student to be unlike its teacher."""
    with pytest.raises(ValueError, match=message):
        call(*[unit(*shape) for shape in shapes], **options)


def test_autograd_keeps_two_matrices_and_no_copy_of_the_queue():
    """If autograd kept more, the GPU would be full at a smaller batch. At B = 256 and K = 65,536, a
    matrix [B, 1+K] has 67 MB, and the queue 34 MB."""
    B, K, D = 32, 2048, 64
    z_s, z_t, _ = random_embeddings(B, D, 1)
    queue = FeatureQueue(K, D).features
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        seed_loss(z_s.requires_grad_(), z_t, queue)
    large = {x.untyped_storage().data_ptr() for x in kept if x.numel() >= B * K}
    assert len(large) == 3
    assert queue.data_ptr() in large


# --------------------------------------------------------------------------------------- the queue
def test_the_queue_is_first_in_first_out_for_any_batch_size():
    """If a batch that wraps around were cut or misplaced, old entries would stay forever. If the
    queue kept the graphs of its entries, the memory would be full within some steps."""
    queue = FeatureQueue(7, 3)
    expected = collections.deque(queue.features.clone(), maxlen=7)
    for batch in (3, 3, 3, 1, 7, 5, 16, 2, 0, 14):
        z = unit(batch, 3).bfloat16()
        queue.enqueue(z.requires_grad_())
        expected.extend(z.detach().float())
        oldest = int(queue.seen) % 7
        assert torch.equal(queue.features.roll(-oldest, 0), torch.stack(list(expected)))
    assert queue.features.dtype == torch.float32
    queue.double().enqueue(z)                                   # another dtype, if you want it
    assert not queue.features.requires_grad


def test_the_queue_starts_with_random_unit_vectors():
    """If entries were zeros, all images would be equally similar to them."""
    queue = FeatureQueue(2000, 16)
    assert torch.allclose(queue.features.norm(dim=1), torch.ones(2000))
    assert queue.features.mean(dim=0).abs().max() < 0.03                # in all directions
    assert queue.features.std(dim=0).min() > 0.1
    assert not torch.equal(queue.features, FeatureQueue(2000, 16).features)


def test_the_queue_must_not_move_before_backward():
    """If it moved between loss and `backward`, the gradient would belong to other entries. PyTorch
    notices this. If it moved before the loss, each image would have two own entries, and each would
    get half of the weight."""
    z_s, z_t, _ = random_embeddings(4, 128, 1)
    queue = FeatureQueue(16, 128)
    loss = seed_loss(z_s.requires_grad_(), z_t, queue.features)
    assert seed_diagnostics(z_s, z_t, queue.features)["self_prob"] > 0.99
    queue.enqueue(z_t)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    found = seed_diagnostics(z_s, z_t, queue.features)
    assert found["self_prob"].item() == pytest.approx(0.5, abs=0.01)


# ------------------------------------------------------------------------------------- the methods
def make_method(name, **options):
    """Return a method with small networks, and the views and labels of 8 images."""
    if name == "supervised":
        method = Supervised(SmallNetwork(), classes=5, **options)
    elif name == "moco":
        method = MoCo(SmallNetwork(), queue_size=16, **options)
    else:
        kind = SEED if name == "seed" else SmallCropSEED
        method = kind(SmallNetwork(), with_statistics(SmallNetwork()), queue_size=16, **options)
    sizes = [12, 12] if name == "moco" else [12] + [8] * (method.views_per_image - 1)
    return method, [torch.rand(8, 3, size, size) for size in sizes], torch.arange(8) % 5


def training_step(method, views, labels=None):
    """Make the step of seed.py's toy with SGD. Return the diagnostics."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    targets = method.targets(views, labels)
    outputs = method(views)
    method.loss(outputs, targets).backward()
    optimizer.step()
    diagnostics = method.diagnostics(outputs, targets)
    method.after_step(targets)
    return diagnostics


@pytest.mark.parametrize("name, views_per_image", [
    ("seed", 1), ("small crops", 7), ("moco", 2), ("supervised", 1)])
def test_one_training_step_serves_all_methods(name, views_per_image):
    """If a layer got no gradient, it would stay random, and a head without gradient would be
    distilled untrained. If a method needed a step of its own, train.py's loop could not run it."""
    method, views, labels = make_method(name)
    assert method.views_per_image == len(views) == views_per_image
    before = snapshot(method)
    diagnostics = training_step(method, views, labels)
    for key, p in method.named_parameters():
        if p.requires_grad and not key.endswith("backbone.0.bias"):     # batch norm removes it
            assert p.grad.abs().sum() > 0, key
            assert not torch.equal(p, before[key]), key
    assert "top1_agreement" in diagnostics
    for value in diagnostics.values():
        assert value.shape == ()
        assert not value.requires_grad


@pytest.mark.parametrize("name", ["seed", "small crops", "moco"])
def test_embeddings_are_normalized_in_float32_whatever_the_networks_return(name):
    """If embeddings were not normalized, the student could lower the loss by longer ones. If they
    were normalized in bf16, norms in the queue would be off by 0.004. Targets need neither labels
    nor a gradient."""
    method, views, _ = make_method(name)
    method.requires_grad_(True)                                         # also the teacher
    z = method(views)
    targets = method.targets(views)
    assert not targets.requires_grad
    assert torch.allclose(z.norm(dim=1), torch.ones(len(z)))
    assert torch.allclose(targets.norm(dim=1), torch.ones(len(targets)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rounded in (method(views), method.targets(views)):
            assert rounded.dtype == torch.float32
            assert torch.allclose(rounded.norm(dim=1), torch.ones(len(rounded)), atol=1e-5)
    for network in method.children():
        if isinstance(network, SmallNetwork):
            for p in network.head.parameters():
                p.data *= 7                                             # 7 times as long
    assert torch.allclose(method(views), z, atol=1e-6)
    assert torch.allclose(method.targets(views), targets, atol=1e-6)


def test_the_teacher_stays_as_it_was_loaded():
    """If its batch norm were in training mode, its statistics would follow our data, and the queue
    would contain embeddings of different teachers."""
    method = SEED(SmallNetwork().eval(), SmallNetwork().train(), queue_size=16)
    assert method.student.backbone.training
    assert not method.teacher.backbone.training
    before = snapshot(method.teacher)
    for _ in range(3):
        assert method.train() is method
        training_step(method, [torch.rand(4, 3, 8, 8)])
    assert same(before, snapshot(method.teacher))
    assert not method.teacher.backbone.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert not method.eval().student.training


def test_seed_shows_the_same_view_to_both_and_moves_the_queue_only_afterwards():
    """If the batch were enqueued before the loss, each image would appear twice. If the log used
    other temperatures, it would mislead a user who tunes them. If more than the targets needed the
    teacher, cached embeddings would not save its cost."""
    method, [x], _ = make_method("seed", tau_s=0.3, tau_t=0.07)
    queue = method.queue.features.clone()
    z_t = F.normalize(method.teacher(x), dim=1)
    z_s = F.normalize(method.student(x), dim=1)
    assert torch.allclose(method.targets([x]), z_t, atol=1e-6)
    method.teacher = None
    assert torch.allclose(method([x]), z_s, atol=1e-6)
    assert torch.equal(method.loss(z_s, z_t), seed_loss(z_s, z_t, queue, tau_s=0.3, tau_t=0.07))
    expected = seed_diagnostics(z_s, z_t, queue, tau_s=0.3, tau_t=0.07)
    assert method.diagnostics(z_s, z_t) == dict(expected, queue_filled=0)
    assert torch.equal(method.queue.features, queue)
    method.after_step(z_t)
    assert torch.equal(method.queue.features, torch.cat([z_t, queue[8:]]))
    for filled in (0.5, 1.0, 1.0):
        assert method.diagnostics(z_s, z_t)["queue_filled"] == filled
        method.after_step(z_t)


@pytest.mark.parametrize("dim_s, dim_t", [(4, 8), (8, None), (None, 8), (None, None)])
def test_student_and_teacher_need_an_equal_dim(dim_s, dim_t):
    """If two dimensions were accepted, the embeddings could not be compared with one queue. The
    message says which network has which."""
    student, teacher = [nn.Linear(3, 8) if d is None else SmallNetwork(d) for d in (dim_s, dim_t)]
    with pytest.raises(ValueError, match=f"student.dim is {dim_s} and teacher.dim is {dim_t}"):
        SEED(student, teacher, queue_size=16)


def test_small_crops_have_their_own_queue_and_their_loss_is_added():
    """If small crops shared the queue with whole images, the scale would tell them apart. If all of
    an image's crops were enqueued, most entries would show the same few images."""
    method, views, _ = make_method("small crops", tau_s=0.3, tau_t=0.07, small_crops=3)
    queue = method.queue.features.clone()
    small_queue = method.small_queue.features.clone()
    z_s = method(views)
    z_t = method.targets(views)
    targets = [F.normalize(method.teacher(view), dim=1) for view in views]
    outputs = [F.normalize(z, dim=1) for z in (method.student(views[0]),
                                               *method.student(torch.cat(views[1:])).split(8))]
    assert torch.allclose(z_t, torch.cat(targets), atol=1e-6)
    assert torch.allclose(z_s, torch.cat(outputs), atol=1e-6)
    large_loss, *small_losses = [
        seed_loss(s, t, entries, 0.3, 0.07)
        for s, t, entries in zip(outputs, targets, [queue] + 3 * [small_queue])]
    small_loss = sum(small_losses) / 3
    assert torch.isclose(method.loss(z_s, z_t), large_loss + small_loss)
    found = method.diagnostics(z_s, z_t)
    assert torch.isclose(found["small_loss"], small_loss)
    assert torch.isclose(found["kl"] + found["entropy"], large_loss, atol=1e-6)
    method.after_step(z_t)
    assert torch.equal(method.queue.features, torch.cat([z_t[:8], queue[8:]]))
    assert torch.equal(method.small_queue.features, torch.cat([z_t[8:16], small_queue[8:]]))


def test_moco_compares_two_views_and_keeps_keys_in_order():
    """If keys came back in another order, each query's positive would be another image. If the log
    were wrong, nobody would see a baseline that never finds its keys."""
    method, views, _ = make_method("moco", tau=0.3)
    method.eval()
    method.after_step(unit(4, 8))
    queue = method.queue.features.clone()
    query = F.normalize(method.encoder(views[0]), dim=1)
    key = F.normalize(method.key_encoder(views[1]), dim=1)
    assert torch.allclose(method(views), query, atol=1e-6)
    assert torch.allclose(method.targets(views), key, atol=1e-6)
    query, key, _ = random_embeddings(8, 8, 1)
    query[:2] = F.normalize(key[:2] + 0.1 * query[:2], dim=1)           # some that agree
    p = [slow_softmax(q, k, queue, 0.3) for q, k in zip(query, key)]
    agreement = np.mean([np.argmax(row) == 0 for row in p])
    assert 0 < agreement < 1
    assert torch.equal(method.loss(query, key), info_nce(query, key, queue, tau=0.3))
    assert method.diagnostics(query, key) == dict(top1_agreement=agreement, queue_filled=0.25)
    method.after_step(key)
    assert torch.equal(method.queue.features, torch.cat([queue[:4], key, queue[12:]]))


def test_mocos_key_encoder_follows_slowly_and_without_gradient():
    """If k were not m k + (1 - m) q, or moved before the step, keys in the queue would go stale, or
    the key encoder would never learn."""
    method, views, _ = make_method("moco", momentum=0.9)
    start = [p.clone() for p in method.encoder.parameters()]
    keys = method.targets(views)
    method.loss(method(views), keys).backward()
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)                                                 # in place of a step
    for k, q in zip(method.key_encoder.parameters(), start, strict=True):
        assert torch.equal(k, q)
        assert k.grad is None
        assert not k.requires_grad
    method.after_step(keys)
    for k, q in zip(method.key_encoder.parameters(), start, strict=True):
        assert torch.allclose(k, q + 0.1, atol=1e-6)


def test_mocos_key_encoder_is_in_training_mode_and_keeps_its_own_statistics():
    """If the key encoder were in evaluation mode, old statistics would normalize its keys. If it
    took the encoder's statistics, they would not fit its weights, which move more slowly."""
    method, views, _ = make_method("moco")
    assert method.key_encoder.backbone.training
    method.after_step(method.targets(views))
    method(views)
    for network, x in ((method.encoder, views[0]), (method.key_encoder, views[1])):
        conv, norm = network.backbone[:2]
        assert norm.num_batches_tracked == 1
        assert torch.allclose(norm.running_mean, 0.1 * conv(x).mean((0, 2, 3)), atol=1e-6)


def test_moco_shuffles_keys_and_splits_its_batch_into_parts():
    """If query and key were computed among the same images, they would share batch-norm statistics,
    and MoCo would recognize these. A remainder is no part of its own: one image has no variance."""
    method = MoCo(SmallNetwork(), queue_size=16, images_per_part=4)
    shown = []
    for network in (method.encoder, method.key_encoder):
        network.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    for images, sizes in ((9, [5, 4]), (8, [4, 4]), (7, [7]), (3, [3])):
        x = torch.rand(images, 3, 8, 8)
        z = method([x, x])
        assert method.targets([x, x]).shape == z.shape == (images, 8)
        assert [len(part) for part in shown] == 2 * sizes
        queries, keys = torch.cat(shown).sum((1, 2, 3)).split(images)
        assert torch.equal(queries, x.sum((1, 2, 3)))
        assert torch.equal(keys.sort()[0], queries.sort()[0])
        assert images < 4 or not torch.equal(keys, queries)
        parts = [F.normalize(method.encoder(part), dim=1) for part in x.split(sizes)]
        assert torch.allclose(z, torch.cat(parts), atol=1e-6)
        shown.clear()


def test_the_supervised_loss_is_cross_entropy_over_cosines():
    """If lengths counted here, the head would be trained for other distances than those that are
    compared with the queue. If logits were bf16, they would be rounded to steps of 0.06."""
    encoder = nn.Identity()
    encoder.dim = 8
    method = Supervised(encoder, classes=5)
    assert torch.allclose(method.class_vectors.norm(dim=1), torch.ones(5))
    method.class_vectors.data *= 3                                      # no effect
    z = unit(12, 8)
    labels = torch.arange(12) % 5
    cosines = F.cosine_similarity(z[:, None], method.class_vectors[None], dim=2)
    logits = method([z])
    assert torch.allclose(logits, cosines / 0.1, atol=1e-5)
    assert method.targets([z], labels) is labels
    assert torch.isclose(method.loss(logits, labels), F.cross_entropy(cosines / 0.1, labels))
    correct = cosines.argmax(dim=1) == labels
    assert 0 < correct.sum() < 12
    assert method.diagnostics(logits, labels) == dict(top1_agreement=correct.float().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method([z]), logits)
        assert method([z.bfloat16()]).dtype == torch.float32


# ------------------------------------------------------------------------------------ the encoders
@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("arch, feature_dim, size", [
    ("mobilenet_v3_large", 1280, 32), ("mobilenet_v3_small", 1024, 32),
    ("efficientnet_b0", 1280, 32), ("efficientnet_b1", 1280, 32), ("resnet18", 512, 32),
    ("resnet34", 512, 32), ("resnet50", 2048, 32), ("resnet101", 2048, 32),
    ("resnet152", 2048, 32), ("shufflenet_v2_x1_0", 1024, 32),
    ("convnext_tiny", 768, 32), ("vit_b_16", 768, 224)])
def test_an_encoder_has_the_papers_features(arch, feature_dim, size):
    """If features came from another layer, the results could not be compared with the paper's.
    MobileNet-V3's 1,280 are behind its hidden layer."""
    with torch.device("meta"):                                          # computes only shapes
        encoder = Encoder(arch, dim=12, hidden_dim=20, image_size=size).eval()
        x = torch.empty(2, 3, size, size)
        assert encoder.feature_dim == feature_dim
        assert encoder.features(x).shape == (2, feature_dim)
        assert encoder(x).shape == (2, 12)


@pytest.mark.parametrize("arch, options, layers", [
    ("resnet18", {}, [(512, 512), (128, 512)]),
    (ARCH, {}, [(1024, 1024), (128, 1024)]),
    ("resnet18", dict(hidden_dim=2048), [(2048, 512), (128, 2048)]),
    ("resnet18", dict(dim=16, hidden_dim=0), [(16, 512)]),
    ("resnet18", dict(dim=None), [])])
def test_the_head_is_the_papers(arch, options, layers):
    """If the hidden layer were missing, accuracy would be lower: 58.0 instead of 60.3 on ImageNet
    for a ResNet-18. Without `hidden_dim`, it is as wide as the features."""
    encoder = Encoder(arch, **options)
    found = [m for m in encoder.head.modules() if not isinstance(m, nn.Sequential)]
    assert [tuple(m.weight.shape) for m in found if isinstance(m, nn.Linear)] == layers
    assert len(layers) < 2 or [type(m) for m in found] == [nn.Linear, nn.ReLU, nn.Linear]
    assert encoder.dim == (layers[-1][0] if layers else 512)


@pytest.mark.parametrize("dim", [None, 16])
def test_embeddings_are_float32_of_unit_norm(dim):
    """If a network without head returned plain features, they would have any norm. If they were
    normalized in bf16, norms would be off by 0.004."""
    encoder = Encoder(ARCH, dim=dim).eval()
    x = torch.rand(8, 3, 32, 32)
    assert torch.equal(encoder(x), F.normalize(encoder.head(encoder.features(x)), dim=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder(x)
    assert z.dtype == torch.float32
    assert torch.allclose(z.norm(dim=1), torch.ones(8), atol=1e-5)


@pytest.mark.parametrize("options, mean, std", [
    ({}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    (dict(mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 1.0)), (0.5, 0.4, 0.3), (0.5, 0.2, 1.0))])
def test_features_are_torchvisions_on_normalized_images(options, mean, std):
    """If weights meant something else here, nobody could use what was trained. If pixels were not
    normalized, a published teacher would see images unlike those that it knows."""
    theirs = torchvision.models.resnet18(weights=None).eval()
    ours = Encoder("resnet18", **options).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.backbone.load_state_dict(weights)
    assert "mean" not in ours.state_dict()                              # weights alone
    images = smooth_images(2)
    expected = theirs(T.normalize(images / 255, mean, std))
    assert torch.allclose(theirs.fc(ours.features(images)), expected, atol=1e-5)
    assert torch.allclose(theirs.fc(ours.features(images / 255)), expected, atol=1e-5)
    assert torch.equal(ours.features(images.long()), ours.features(images))
    assert ours.features((images / 255).double()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_your_own_network_becomes_an_encoder():
    """If only torchvision's networks were accepted, nobody could study another one."""
    network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = Encoder("mine", dim=5, image_size=16, backbone=network)
    assert encoder.feature_dim == 7
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert encoder.backbone is network
    message = refusal(Encoder, "mine", image_size=16, backbone=network[:2])
    assert "mine does not turn images of 16 px into vectors" in message
    assert "did you mean mobilenet_v3_large" in refusal(Encoder, "mobilenetv3_large")
    with torch.device("meta"):                                  # it has two more classifiers
        assert "googlenet does not turn images" in refusal(Encoder, "googlenet")


def side_before_the_end(encoder):
    """Return the side of the last map that a convolution of 3x3 or more makes of 32 px."""
    sides = []
    convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    convs[-1].register_forward_hook(lambda module, args, out: sides.append(out.shape[-1]))
    encoder.eval().features(torch.rand(1, 3, 32, 32))
    return sides[0]


@pytest.mark.parametrize("arch, plain, adapted", [
    ("resnet18", 1, 4), ("mobilenet_v3_large", 1, 2), ("efficientnet_b0", 1, 2),
    ("shufflenet_v2_x1_0", 1, 2)])
def test_small_images_keep_their_resolution_at_first(arch, plain, adapted):
    """If ImageNet's stem were kept at 32 px, the last layers would see a single position. If a
    ResNet's stem were not the usual one, results on CIFAR could not be compared."""
    with torch.device("meta"):
        encoder = Encoder(arch, small_images=True, image_size=32)
        assert side_before_the_end(Encoder(arch, image_size=32)) == plain
        assert side_before_the_end(encoder) == adapted
    if arch == "resnet18":
        stem = encoder.backbone.conv1
        assert stem.weight.shape == (64, 3, 3, 3)
        assert stem.bias is None
        assert stem(torch.rand(1, 3, 32, 32, device="meta")).shape == (1, 64, 32, 32)
        assert isinstance(encoder.backbone.maxpool, nn.Identity)


# --------------------------------------------------------------------------------------- the views
def test_uniforms_depend_only_on_seed_epoch_index_and_view():
    """If views depended on batch, worker or machine, no run could be repeated. If these values
    changed, no run could be resumed with a later version of the code."""
    u = uniforms(0, 0, range(8))
    assert u.shape == (8, seed.UNIFORMS)
    assert u.dtype == torch.float32
    assert torch.equal(uniforms(0, 0, [5]), u[5:6])
    assert torch.equal(uniforms(0, 0, torch.tensor([3, 1])), u[[3, 1]])
    for other in (uniforms(1, 0, range(8)), uniforms(0, 1, range(8)),
                  uniforms(0, 0, range(8), view=1), uniforms(0, 0, range(8, 16))):
        assert not (other == u).any()
    assert not torch.equal(uniforms(1, 2, [3]), uniforms(2, 1, [3]))
    assert seed.splitmix64(np.zeros(1, np.uint64)) == 0xE220A8397B1DCDAF    # published: seed 0
    pinned = torch.tensor([12418933, 9850594, 13153447]) / 2**24
    assert torch.equal(uniforms(-1, 10**6, [1_281_166], view=2)[0, :3], pinned)


def test_uniforms_are_uniform_and_independent():
    """If the hash were poor, each image would get the same few crops, or neighboring images, two
    views or two epochs would get similar ones."""
    u = uniforms(0, 0, range(20001)).double()
    assert 0 <= u.min() and u.max() < 1
    assert len(u.unique()) > 0.95 * u.numel()
    assert (u.mean(dim=0) - 0.5).abs().max() < 0.01
    assert (u.var(dim=0) - 1 / 12).abs().max() < 0.005
    others = [uniforms(0, 0, range(20000), view=1), uniforms(0, 1, range(20000)),
              uniforms(1, 0, range(20000))]
    columns = torch.cat([u[:-1], u[1:], *others], dim=1)                # [20000, 5U]
    correlation = torch.corrcoef(columns.T) - torch.eye(5 * seed.UNIFORMS)
    assert correlation.abs().max() < 0.04


def smooth_images(n=4, height=40, width=48):
    """Return uint8 images whose colors change slowly, so that an error of half a pixel shows."""
    x = F.interpolate(torch.rand(n, 3, 7, 7), (height, width), mode="bicubic").clamp(0, 1)
    return (255 * x).round().to(torch.uint8)


def unchanging(n=1):
    """Return uniforms with which `augment` changes nothing unless it crops."""
    return torch.full((n, seed.UNIFORMS), 0.999)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_crop_and_resize_is_torchvisions(size):
    """If antialiasing were missing, or a crop half a pixel off, accuracy would be lower."""
    x = torch.rand(4, 3, 40, 48)
    boxes = torch.tensor([[0, 0, 40, 48], [3, 5, 20, 30], [10, 10, 7, 9], [39, 47, 1, 1]])
    ours = seed.crop_and_resize(x, boxes.float(), size)
    for i, box in enumerate(boxes.tolist()):
        theirs = T.resized_crop(x[i], *box, [size, size], antialias=True)
        assert (ours[i] - theirs).abs().max() < 1e-5


def test_hue_and_blur_are_torchvisions():
    """If they differed, settings of other code bases would mean something else here."""
    x = torch.rand(5, 3, 20, 30)
    x[:, :, 0, :3] = torch.tensor([0.0, 0.5, 1.0])                      # black, gray and white
    shift = torch.tensor([-0.1, -0.03, 0.0, 0.07, 0.5])
    rotated = seed.adjust_hue(x, shift.view(5, 1, 1, 1))
    for i in range(5):
        assert (rotated[i] - T.adjust_hue(x[i], shift[i].item())).abs().max() < 1e-4
    sigma = torch.tensor([0.1, 0.7, 1.0, 1.3, 2.0])
    for images in (x, x[:, :, 5:12, 5:12]):                             # 7 px is the smallest side
        blurred = seed.gaussian_blur(images, sigma)
        for i in range(5):
            theirs = T.gaussian_blur(images[i], [13, 13], [sigma[i].item()] * 2)
            assert (blurred[i] - theirs).abs().max() < 1e-4


def slow_view(image, row, size):
    """Return the view of one image [3, H, W] by torchvision's functions; row: U floats."""
    box = seed.crop_box(torch.tensor([row]), *image.shape[1:])
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
    """If the order of operations differed, or two columns were swapped, the views would not be
    MoCo-v2's."""
    images = smooth_images(6)
    u = uniforms(0, 0, range(100))
    u = u[(u[:, seed.JITTER] < 0.8) & (u[:, seed.BLUR] < 0.5)][:6]
    u[:, seed.FLIP] = torch.tensor([0.6, 0.6, 0.6, 0.1, 0.1, 0.1])
    u[:, seed.GRAY] = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.1, 0.1])
    ours = augment(images, u, 32)
    assert ours.shape == (6, 3, 32, 32)
    for i, row in enumerate(u.tolist()):
        assert (ours[i] - slow_view(images[i], row, 32)).abs().max() < 2 / 255
    assert augment(images, u).shape == (6, 3, 40, 40)                   # as high as the images
    assert augment(images, u, scale=None).shape == (6, 3, 40, 48)


@pytest.mark.parametrize("name, p", [("FLIP", 0.5), ("GRAY", 0.2), ("BLUR", 0.5), ("JITTER", 0.8)])
def test_each_switch_has_mocos_probability(name, p):
    """If views changed less often, the task would be too easy."""
    image = smooth_images(1)
    plain = augment(image, unchanging(), scale=None)
    assert torch.allclose(plain, image / 255, atol=1e-5)
    u = unchanging()
    u[:, getattr(seed, name)] = p + 0.01
    assert torch.allclose(augment(image, u, scale=None), plain, atol=1e-4)
    u[:, getattr(seed, name)] = p - 0.01
    assert not torch.allclose(augment(image, u, scale=None), plain, atol=1e-4)


def test_blur_and_color_can_be_switched_off():
    """If small images were blurred, little would be left of them. If a linear probe were trained on
    jittered colors, its images would look like no test image."""
    x = smooth_images(6) / 255
    u = uniforms(0, 3, range(6))
    sharp = u.clone()
    sharp[:, seed.BLUR] = 1
    assert torch.equal(augment(x, u, 24, blur=False), augment(x, sharp, 24))
    assert not torch.allclose(augment(x, u, 24), augment(x, sharp, 24), atol=1e-4)
    cropped = seed.crop_and_resize(x, seed.crop_box(u, 40, 48, (0.3, 0.6)), 24)
    flipped = u[:, seed.FLIP] < 0.5
    assert 0 < flipped.sum() < 6
    cropped[flipped] = cropped[flipped].flip(3)
    assert torch.allclose(augment(x, u, 24, (0.3, 0.6), color=False), cropped, atol=1e-5)


def test_a_view_does_not_depend_on_its_neighbors():
    """If the other images of the batch mattered, one process and two would see different views."""
    images = smooth_images(6)
    u = uniforms(3, 1, range(6))
    together = augment(images, u, 24)
    assert torch.equal(together, augment(images, u, 24))                # the same each time
    for i in range(6):
        alone = augment(images[i:i + 1], u[i:i + 1], 24)
        assert torch.allclose(together[i:i + 1], alone, atol=1e-5)


@pytest.mark.parametrize("scale", [(0.2, 1.0), None])
def test_a_view_leaves_the_images_as_they_are(scale):
    """If `augment` worked in place, it would change the data set in memory for all later epochs."""
    images = smooth_images()
    u = uniforms(0, 0, range(4))
    u[0] = unchanging()                                                 # nothing copies this one
    inputs = [images, images / 255, u]
    before = [x.clone() for x in inputs]
    view = augment(images, u, scale=scale)
    assert view.dtype == torch.float32
    assert torch.allclose(augment(inputs[1], u, scale=scale), view, atol=1e-5)
    for x, unchanged in zip(inputs, before):
        assert torch.equal(x, unchanged)


def slow_crop_box(row, height, width, scale):
    """Return one image's box with loops: the first of ten candidates that fits, or the largest."""
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
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.14)])
def test_crop_boxes_are_the_first_candidates_that_fit(height, width, scale):
    """If a candidate that does not fit were used, a box would reach beyond the image, and small
    crops would not be 0.05 to 0.14 of it."""
    u = uniforms(5, 2, range(200))
    boxes = seed.crop_box(u, height, width, scale)
    expected = [slow_crop_box(row, height, width, scale) for row in u.tolist()]
    assert torch.allclose(boxes, torch.tensor(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("height, width", [(320, 320), (300, 400), (500, 200)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    """If crops were larger, the task would be easier and the student would learn less."""
    ours = seed.crop_box(uniforms(0, 0, range(10000)), height, width)
    assert ours.dtype == torch.float32
    image = torch.empty(3, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(10000)])
    deciles = torch.linspace(0.1, 0.9, 9).double()
    quantiles = []
    for boxes in (ours, theirs):
        top, left, h, w = boxes.double().unbind(1)
        assert min(top.min(), left.min()) >= 0
        assert (top + h).max() <= height * 1.0001
        assert (left + w).max() <= width * 1.0001
        quantiles.append(torch.stack([h * w, w / h, top, left]).quantile(deciles, dim=1))
    spread = quantiles[1][-1] - quantiles[1][0]                         # [4]
    assert ((quantiles[0] - quantiles[1]).abs() / spread).max() < 0.05


# ----------------------------------------------------------------------------------------- the toy
def test_the_toy_runs_and_teaches(capsys):
    """If the toy failed, the first command that a reader tries would fail. If its docstring showed
    other numbers, readers would look for their own mistake."""
    def rows_of(text):
        lines = [line.split() for line in text.splitlines() if line.strip().startswith("step")]
        return [dict(zip(line[::2], map(float, line[1::2]))) for line in lines]

    seed.toy()
    rows = rows_of(capsys.readouterr().out)
    printed = {row["step"]: row for row in rows}
    for row in rows_of(seed.toy.__doc__):
        for name, value in row.items():
            assert value == pytest.approx(printed[row["step"]][name], abs=0.05), name
    for row in rows:
        assert row["loss"] == pytest.approx(row["kl"] + row["entropy"], abs=0.011)
        assert row["loss_of_a_copy"] >= row["entropy"]
    assert [row["step"] for row in rows] == [0, 3, 10, 30, 100, 300]
    assert [row["queue_filled"] for row in (rows[0], rows[-1])] == [0, 1]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss_of_a_copy"], abs=0.5)
    assert rows[-1]["kl"] < 0.6 * rows[0]["kl"]
    assert rows[-1]["top1_agreement"] > 0.3


# ------------------------------------------------------------------------------------ the teachers
@pytest.mark.parametrize("version", [1, 2])
def test_a_moco_checkpoint_becomes_the_teacher_that_is_in_it(tmp_path, version):
    """If the keys' prefix or the pixels' normalization were wrong, a run would distill a random or
    a confused network, and its loss would fall all the same."""
    network = torchvision.models.resnet18(weights=None)
    network.fc = nn.Linear(512, 128)
    if version == 2:
        network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), network.fc)
    with_statistics(network.eval())
    state = {"module.queue": torch.randn(128, 64)}
    for name, value in network.state_dict().items():
        state[f"module.encoder_q.{name}"] = value
        state[f"module.encoder_k.{name}"] = torch.rand_like(value.float())
    torch.save(dict(epoch=800, arch="resnet18", state_dict=state), tmp_path / "moco.pth.tar")
    teacher = load_teacher(tmp_path / "moco.pth.tar")
    pixels = torch.rand(2, 3, 64, 64)
    x = T.normalize(pixels, seed.IMAGENET_MEAN, seed.IMAGENET_STD)
    assert torch.allclose(teacher(pixels), F.normalize(network(x), dim=1), atol=1e-5)
    network.fc = nn.Identity()
    assert torch.allclose(teacher.features(pixels), network(x), rtol=1e-4, atol=1e-4)
    assert (teacher.dim, teacher.used_labels, teacher.training) == (128, False, False)


def test_a_file_of_a_larger_network_is_refused(tmp_path):
    """A resnet34 has each key of a resnet18, in the same shape. If extra keys were ignored, a run
    would distill half of a network."""
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    line = refusal(load_teacher, tmp_path / "resnet34.pth", "resnet18")
    assert "no part of torchvision's resnet18" in line and "layer1.2.conv1" in line


@pytest.mark.parametrize("options", [
    dict(arch=ARCH, dim=16, hidden_dim=24, image_size=32), dict(arch="resnet18", small_images=True),
    dict(arch=ARCH, dim=None, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))])
def test_an_encoder_file_reloads_bit_for_bit(tmp_path, options):
    """If a part of a network were not saved, such as its pixels' mean, an encoder.pt would compute
    other features than the network that was trained."""
    encoder = with_statistics(Encoder(**options)).eval()
    save_encoder(tmp_path / "encoder.pt", encoder, "made by a test", True)
    loaded = load_teacher(tmp_path / "encoder.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), encoder(x))
    for name in ("arch", "dim", "hidden_dim", "small_images", "image_size", "feature_dim"):
        assert getattr(loaded, name) == getattr(encoder, name), name
    assert loaded.used_labels is True and "made by a test" in loaded.provenance


class RunsACommand:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """If checkpoints were unpickled, a stranger's teacher could run any command on your machine."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsACommand()}, "file.pth")
    refusal(load_teacher, "file.pth", "resnet18")
    assert not Path("exploded").exists()


# ---------------------------------------------------------------------------------- the evaluation
def slow_knn_label(query, x, y):
    """Return the label with the most votes among the ten images most similar to the query."""
    similarity = F.cosine_similarity(query[None], x)
    votes = {}
    for i in similarity.argsort(descending=True)[:10].tolist():
        votes[int(y[i])] = votes.get(int(y[i]), 0.0) + max(0.0, similarity[i].item())
    return max(votes, key=votes.get)


def test_knn_is_a_vote_of_the_ten_nearest():
    """If kNN counted its votes differently, no kNN accuracy could be compared with others."""
    x = torch.randn(200, 6) + 1
    y = torch.randint(0, 4, (200,))
    queries = torch.randn(600, 6) + 1
    labels = torch.tensor([slow_knn_label(query, x, y) for query in queries])
    assert probe.knn(x, y, queries, labels) == 100
    labels[:150] += 1
    assert probe.knn(x, y, queries, labels) == 75


def test_the_linear_probe_is_the_papers_sgd():
    """If the probe were trained by another recipe, its accuracy could not be compared with the
    paper's."""
    x = torch.randn(300, 6)
    y = torch.randint(0, 3, (300,))
    layer = probe.fit_linear(x, y, 3, [0.01, 0.3], epochs=10)
    x = torch.cat([x, torch.ones(300, 1)], dim=1)               # the last weight is the bias
    weight = torch.zeros(3, 7)
    momentum = torch.zeros(3, 7)
    for epoch in range(10):
        lr = 0.3 * 0.1 ** len([milestone for milestone in (6, 8) if epoch >= milestone])
        order = np.random.default_rng(epoch).permutation(300)
        for batch in (order[:256], order[256:]):
            p = (x[batch] @ weight.T).softmax(1)
            gradient = (p - F.one_hot(y[batch], 3)).T @ x[batch] / len(batch)
            momentum = 0.9 * momentum + gradient
            weight = weight - lr * momentum
    assert torch.allclose(layer.weight[3:], weight[:, :6], atol=1e-5)
    assert torch.allclose(layer.bias[3:], weight[:, 6], atol=1e-5)
    assert not torch.allclose(layer.weight[:3], weight[:, :6], atol=1e-2)
    assert probe.fit_linear.__defaults__ == (100, 256)


def test_the_linear_probe_learns_what_is_linear_at_any_scale():
    """If the scale of features mattered, one list of learning rates could not serve all networks.
    A constant feature must not matter either, nor which test images there are."""
    x = torch.randn(1200, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    x[:, 5] = 3.0
    train_x, test_x = x.split([1000, 200])
    train_y, test_y = y.split([1000, 200])
    for scale in (1e-8, 1.0, 1e4):
        assert probe.linear_probe(scale * train_x, train_y, scale * test_x, test_y)[0] > 85
    only = test_y == 0
    assert probe.linear_probe(train_x, train_y, test_x[only], test_y[only])[0] > 75
    assert probe.linear_probe(train_x, train_y[torch.randperm(1000)], test_x, test_y)[0] < 60
    found, _ = probe.linear_probe(train_x[:1], train_y[:1], test_x, test_y)
    assert found == 100 * (test_y == train_y[0]).float().mean(), "a single image has no deviation"


def test_the_linear_probe_never_uses_the_test_labels_to_choose(monkeypatch):
    """If the learning rate were chosen on the test images, every accuracy would be too high."""
    fits = spy(monkeypatch, probe, "fit_linear")
    x = torch.randn(300, 8)
    y = x[:, :3].argmax(1)
    for rates in ((0.0, 0.1), (0.1, 0.0)):
        assert probe.linear_probe(x[:200], y[:200], x[200:], y[200:], rates)[1] == 0.1
    sizes = [len(args[0]) for args, _ in fits]
    assert sizes == [180, 200, 180, 200], "chosen on a held-out tenth, then fitted to all"
    y = torch.randint(0, 3, (300,))
    chosen = set()
    for test_y in (y[200:], torch.zeros(100, dtype=torch.long), y[:100]):
        chosen.add(probe.linear_probe(x[:200], y[:200], x[200:], test_y)[1])
    assert len(chosen) == 1


@pytest.mark.parametrize("size", [32, 48])
def test_evaluate_uses_the_features_of_test_views(few_shapes, size):
    """If features came from training mode, or from images of another size than in training, every
    accuracy of the table would be wrong."""
    encoder = with_statistics(Encoder(ARCH, image_size=size))
    data = load_data("shapes", subset=200)
    scores, (_, _, (train_x, test_x)) = probe.evaluate(encoder, data)
    assert encoder.training, "an evaluation must not change the mode"
    encoder.eval()
    with torch.no_grad():
        for split, found in ((data.train, train_x), (data.test, test_x)):
            pixels = T.resize(split.pixels / 255, [size, size], antialias=True)
            assert torch.allclose(found, encoder.features(pixels), rtol=1e-3, atol=1e-4)
    material = (train_x, data.train.labels, test_x, data.test.labels)
    assert scores["knn"] == probe.knn(*material)
    assert (scores["linear"], scores["rate"]) == probe.linear_probe(*material)


# ---------------------------------------------------------------------------------------- the data
def photo(height, width):
    """Return a smooth image, uint8 [3, height, width]. (At sharp edges, interpolations differ.)"""
    y, x = torch.meshgrid(torch.arange(height) / 40, torch.arange(width) / 40, indexing="ij")
    waves = torch.stack([(x + y).sin(), (2 * x - y + 1).sin(), (x - 1.5 * y).cos()])
    return (127.5 + 127 * waves).byte()


def write_photos(root, count, *folders, side=90):
    """Write `count` different images into each folder below root. Return root."""
    for number, folder in enumerate(folders):
        for i in range(count):
            pixels = photo(side, side).roll((13 * i, 7 * i + number), (1, 2)).permute(1, 2, 0)
            write_images(root, {f"{folder}/{i:02d}.png": pixels.numpy()})
    return root


def test_a_crop_from_disk_is_torchvisions_and_that_from_memory(tmp_path):
    """If a crop from disk were another one, a data set would give other results once it is too
    large for memory."""
    pixels = photo(120, 160)
    write_images(tmp_path, {"0.png": pixels.permute(1, 2, 0).numpy()})
    boxes = [(20, 30, 100, 90), (5, 0, 40, 64)]                 # one to shrink, one to enlarge
    found = probe.read_crops(tmp_path / "0.png", [48, 96], lambda height, width: boxes)
    for crop, box, size in zip(found, boxes, (48, 96)):
        expected = T.resized_crop(pixels, *box, [size, size], antialias=True)
        assert (crop.float() - expected.float()).abs().max() <= 3
    views = [(48, (0.1, 0.9)), (48, (0.1, 0.9)), (20, (0.05, 0.14))]
    crops = probe.Crops([str(tmp_path / "0.png")], views, seed=7)
    for epoch in range(5):
        found, unreadable = crops[epoch, 0]
        assert unreadable == ""
        for view, (size, scale) in enumerate(views):
            box = seed.crop_box(uniforms(7, epoch, [0], view), 120, 160, scale)
            expected = seed.crop_and_resize(pixels[None] / 255, box, size)[0]
            assert (found[view] / 255 - expected).abs().max() < 4 / 255


def test_the_test_view_is_the_center_of_the_image(tmp_path):
    """If the test view were not "resize to 256, crop 224", no accuracy on ImageNet could be
    compared with a published one."""
    assert probe.center_box(224)(256, 320) == [(16, 48, 224, 224)]
    assert probe.center_box(32)(30, 40) == [(0, 5, 30, 30)]
    pixels = photo(300, 400)
    write_images(tmp_path, {"0.png": pixels.permute(1, 2, 0).numpy()})
    split = Split(files=[str(tmp_path / "0.png")])
    [view] = probe.center_views(split, 224, "cpu", workers=0)
    expected = T.center_crop(T.resize(pixels / 255, 256, antialias=True), 224)
    assert (view[0] - expected).abs().mean() < 2 / 255


def test_shapes_are_the_same_everywhere_and_not_trivial():
    """If the images changed with the machine, or test images were training images, the results of
    the quick start would mean nothing. So they would if raw pixels were enough for kNN."""
    data = load_data("shapes")
    assert (len(data.train), len(data.test), len(data.classes)) == (5000, 2000, 20)
    assert data.train.labels.bincount().tolist() == [250] * 20
    assert torch.equal(draw_all_shapes(100, split=0).pixels, data.train.pixels[:100])
    train_images = {image.numpy().tobytes() for image in data.train.pixels}
    assert not train_images & {image.numpy().tobytes() for image in data.test.pixels}
    train_x = data.train.pixels.flatten(1) / 255 - 0.5
    test_x = data.test.pixels[:500].flatten(1) / 255 - 0.5
    assert probe.knn(train_x, data.train.labels, test_x, data.test.labels[:500]) < 30


def test_a_subset_is_chosen_by_the_seed(few_shapes):
    """If two methods were trained on different subsets, they could not be compared."""
    first, again, other = [load_data("shapes", subset=100, seed=number) for number in (0, 0, 1)]
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(first.train) == 100 and len(first.train.labels.unique()) == 20


def test_a_fraction_of_the_labels_is_the_same_of_each_class():
    """If the images with labels were drawn from all, a class might have none at 1%."""
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    split = Split(pixels=torch.arange(153), labels=labels)
    chosen, again, other = [probe.label_fraction(split, 0.1, number) for number in (0, 0, 1)]
    assert torch.bincount(chosen.labels).tolist() == [10, 5, 1]
    assert torch.equal(labels[chosen.pixels], chosen.labels)
    assert torch.equal(chosen.pixels, again.pixels) and not torch.equal(chosen.pixels, other.pixels)


@pytest.mark.parametrize("folders, classes, images, test_from", [
    ("train/x train/y val/x val/y", ["x", "y"], 48, "val/"),
    ("train/x train/y validation/x", ["x", "y"], 36, "validation/"),
    ("train/x train/x/deep train/y test/y", ["x", "y"], 48, "test/"),
    ("train/x train/y", ["x", "y"], 24, "train/"),
    ("train/x train/y val", ["x", "y"], 24, "train/"),          # val/ has no labels to test with
    ("x y y/deep/er", ["x", "y"], 36, ""),
    ("x y __MACOSX .hidden", ["x", "y"], 24, ""),               # no classes
    ("train val", [], 24, "val/"), ("only", [], 12, ""), ("x y .", [], 36, ""), (".", [], 12, "")])
def test_a_folder_may_have_many_layouts(tmp_path, folders, classes, images, test_from):
    """If a layout were misread, a run would train on its test images, or invent or lose classes."""
    write_photos(tmp_path, 12, *folders.split(), side=8)
    write_images(tmp_path, {"._00.png": 9})                     # a hidden file of macOS
    data = load_data("folder", tmp_path, 16)
    assert data.classes == classes
    for split in (data.train, data.test):
        folder = [next((c for c in classes if f"/{c}/" in file), None) for file in split.files]
        assert not classes or [data.classes[label] for label in split.labels] == folder
    assert len({*data.train.files, *data.test.files}) == len(data.train) + len(data.test) == images
    assert all(file.startswith(f"{tmp_path}/{test_from}") for file in data.test.files)


def test_held_out_images_stay_when_images_are_added():
    """If adding images changed the held-out tenth, test images would become training images, and
    the accuracies before and after could not be compared."""
    names = [f"{'xy'[i % 2]}/{i}.jpg" for i in range(1000)]
    more = [f"{'xyz'[i % 3]}/new{i}.jpg" for i in range(600)]
    before = probe.choose_held_out(names, [name[0] for name in names])
    after = probe.choose_held_out(more + names, [name[0] for name in more + names])
    assert np.array_equal(before, after[len(more):]) and 70 < before.sum() < 130
    few = probe.choose_held_out(["a/1", "a/2", "b/1", "c/1", "c/2", "c/3"], list("aabccc"))
    assert few[:2].sum() == 1 and not few[2] and 1 <= few[3:].sum() <= 2, "both sides, if possible"


@pytest.mark.parametrize("size", [72, 32])                      # on disk, in memory
def test_an_unreadable_image_becomes_gray(tmp_path, capsys, size):
    """If a single damaged file ended a run, it might do so after days. If another image took its
    place, that image would count twice."""
    write_photos(tmp_path, 4, "train/x", "train/y", "val/x")
    broken = tmp_path / "train/x/02.png"
    broken.write_bytes(broken.read_bytes()[:60])
    cfg = make_cfg(*"--batch-size 4 --workers 0".split())
    cfg.color = False
    data = load_data("folder", tmp_path, size)
    for batch in train.batches(data.train, cfg, CPU, [(size, (0.5, 1.0))], range(4)):
        for sample, view in zip(batch.samples, batch.views[0]):
            is_gray = torch.allclose(view, torch.tensor(128 / 255))
            assert is_gray == (data.train.files[sample] == str(broken))
    assert capsys.readouterr().out.count(f"note: the image {broken} cannot be read") == 1


# ------------------------------------------------------------------------------------ the settings
def test_imagenet_gets_the_papers_settings():
    """If a default were another one, the experiment would not be the paper's."""
    cfg = make_cfg("--dataset", "imagenet")
    expected = dict(queue_size=65536, tau_s=0.2, tau_t=0.01, lr=0.03, weight_decay=1e-4, epochs=200,
                    warmup_epochs=5, batch_size=256, dim=128, hidden_dim=None, schedule="cosine",
                    crop_scale=(0.2, 1.0), blur=True, color=True, image_size=224)
    assert vars(cfg).items() >= expected.items()
    assert make_cfg("--dataset", "imagenet", method="moco").key_momentum == 0.999
    cfg = make_cfg("--dataset", "imagenet", "--init", "encoder.pt", method="linear")
    expected = dict(lr=30.0, epochs=100, batch_size=256, weight_decay=0, schedule="steps")
    assert vars(cfg).items() >= expected.items()
    method = SEED(SmallNetwork(), SmallNetwork())
    assert (method.tau_s, method.tau_t, len(method.queue.features)) == (0.2, 0.01, 65536)
    method = MoCo(SmallNetwork())
    assert (method.tau, method.momentum, len(method.queue.features)) == (0.2, 0.999, 65536)


def test_a_flag_beats_the_recipe_and_a_methods_flag_stays_with_the_method():
    """If --lr of the student also changed the teacher and the baselines, a comparison of methods
    would be one of learning rates."""
    args = train.parse_args("--lr 0.5 --tau-s 0.7 --dim 9 --batch-size 64".split())
    student = train.make_config(args, "seed")
    baseline = train.make_config(args, "moco")
    recipe = train.make_config(train.parse_args([]), "moco")
    assert (student.lr, student.tau_s, student.dim, student.batch_size) == (0.5, 0.7, 9, 64)
    assert baseline.batch_size == 64
    for name in ("lr", "tau_s", "dim"):
        assert getattr(baseline, name) == getattr(recipe, name) != getattr(student, name)


def test_the_learning_rate_warms_up_and_falls():
    """If the rate were too high at first, the loss would explode. If it did not fall, or depended
    on where a run was stopped, accuracy would be lost."""
    cfg = make_cfg(*"--epochs 10 --warmup-epochs 2 --lr 0.1 --batch-size 512 --max-steps 9".split())
    rates = [train.lr_at(step, cfg, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[99] == rates[100] == max(rates) == pytest.approx(0.2)
    assert rates[300] == pytest.approx(0.1) and rates[-1] < 1e-5
    assert np.all(np.diff(rates[:100]) > 0) and np.all(np.diff(rates[100:]) < 0)
    assert make_cfg(*"--epochs 1 --warmup-epochs 5".split()).warmup_epochs == 0.5
    cfg.schedule = "steps"
    rates = [train.lr_at(step, cfg, 50) for step in (0, 299, 300, 399, 400, 499)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])


# ------------------------------------------------------------------------------------- the batches
def test_any_number_of_processes_sees_the_same_batches(monkeypatch):
    """If the batches depended on the number of GPUs, so would the experiment. They have another
    order in each epoch, even if the views are repeated."""
    cfg = make_cfg(*"--batch-size 12 --view-epochs 2".split())
    whole = list(train.plan(50, cfg, range(9)))
    assert [epoch for _, epoch, _ in whole] == [0] * 4 + [1] * 4 + [0]
    for world_size in (2, 3):
        parts = []
        for rank in range(world_size):
            monkeypatch.setattr(train, "rank_and_world_size", lambda: (rank, world_size))
            parts.append(list(train.plan(50, cfg, range(2, 9))))        # a run that resumes
        for (step, epoch, samples), *found in zip(whole[2:], *parts):
            assert {part[:2] for part in found} == {(step, epoch)}
            assert np.array_equal(np.stack([part[2] for part in found], axis=1).flat, samples)
    first_epoch = np.concatenate([samples for *_, samples in whole[:4]])
    assert len(set(first_epoch)) == 48, "no image twice in an epoch"
    assert len({tuple(samples) for *_, samples in whole[::4]}) == 3


@pytest.mark.parametrize("place, workers", [("memory", 0), ("disk", 0), ("disk", 2)])
def test_a_batch_has_the_planned_images_and_random_numbers(tmp_path, few_shapes, place, workers):
    """If two views of an image were equal, or the same in each epoch, MoCo would learn nothing,
    although its loss would fall. If views depended on the number of DataLoader workers, so would
    the experiment. Images from disk are cropped once, not twice."""
    data = load_data("shapes", subset=64)
    if place == "disk":
        data = load_data("folder", write_photos(tmp_path, 12, "a", "b"), 72)
    cfg = make_cfg("--batch-size", "8", "--seed", "3", "--workers", str(workers))
    views = [(72, (0.1, 0.4)), (72, (0.1, 0.4)), (30, (0.05, 0.1))]
    crops = probe.Crops(data.train.files or [], views, seed=3)
    steps = range(1, 12, 5)
    found = train.batches(data.train, cfg, CPU, views, steps)
    planned = train.plan(len(data.train), cfg, steps)
    for batch, (step, epoch, samples) in zip(found, planned, strict=True):
        assert (batch.step, batch.epoch, batch.samples.tolist()) == (step, epoch, samples.tolist())
        assert torch.equal(batch.labels, data.train.labels[samples])
        for v, (size, scale) in enumerate(views):
            if place == "disk":
                scale = None
                images = torch.stack([crops[epoch, int(i)][0][v] for i in samples])
            else:
                images = data.train.pixels[samples]
            expected = augment(images, uniforms(3, epoch, samples, v), size, scale, blur=False)
            assert torch.allclose(batch.views[v], expected, atol=1e-5)


# ---------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("flags", ["--teacher FILE --arch mobilenet_v3_small --small-crops 2",
                                   "--method moco"])
def test_a_run_that_was_cut_is_the_run_that_never_stopped(quick, teacher_file, flags):
    """If a resumed run had other weights, queues, momenta or dropout, an interrupted experiment
    would be another one. Slurm interrupts with SIGTERM."""
    flags = flags.replace("FILE", teacher_file)
    lr_at = train.lr_at

    def interrupted(step, *args):
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return lr_at(step, *args)

    run(flags, "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "lr_at", interrupted)
        run(flags, "cut")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert last_checkpoint("cut")["step"] == 8, "the step was finished, and saved"
    run(flags, "cut")
    assert_same_run("whole", "cut")


def small_teacher():
    """Return a SmallNetwork with what a run records about its teacher."""
    teacher = with_statistics(SmallNetwork())
    vars(teacher).update(provenance="a test", used_labels=False)
    return teacher


def slow_training(method, data, cfg, views):
    """Train for two epochs of three steps with SGD by its formula: momentum 0.9, weight decay 0.5
    and a learning rate of 0.4 * 32/256, of which a fine-tuned backbone gets a tenth."""
    classifies = isinstance(method, train.Classifier)
    steps = [1, 1, 1, 1, 0.1, 0.01]                             # a tenth after 60%, and after 80%
    cosine = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]                   # after one epoch of warm-up
    schedule = steps if classifies else cosine
    weights = {name: p for name, p in method.named_parameters() if p.requires_grad}
    momenta = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step, epoch, samples in train.plan(len(data.train), cfg, range(6)):
        images = []
        for v, (size, scale) in enumerate(views):
            u = uniforms(0, epoch, samples, v)
            view = augment(data.train.pixels[samples], u, size, scale, False, not classifies)
            images.append(view.contiguous(memory_format=torch.channels_last))
        train.seed_generators(cfg, step)                        # for MoCo's shuffle
        targets = method.targets(images, data.train.labels[samples])
        loss = method.loss(method(images), targets)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(weights.items(), gradients):
                factor = 0.1 if classifies and "backbone" in name else 1.0
                momenta[name].mul_(0.9).add_(gradient.add(p, alpha=0.5))
                p.sub_(momenta[name], alpha=0.05 * schedule[step] * factor)
        method.after_step(targets)


LARGE = (32, (0.4, 1.0))        # sides and crop scales
SMALL = (24, (0.2, 0.5))
CROP = (32, (0.08, 1.0))
RECIPES = {                     # flags: views, and how the method is made from student and teacher
    "seed": ([LARGE], lambda s, t: SEED(s, t, 64, 0.3, 0.07)),
    "seed --small-crops 2": ([LARGE, SMALL, SMALL],
                             lambda s, t: SmallCropSEED(s, t, 64, 0.3, 0.07, 2)),
    "moco": ([LARGE, LARGE], lambda s, t: MoCo(s, 64, 0.99, 0.3)),
    "supervised": ([LARGE], lambda s, t: Supervised(s, 20)),
    "linear": ([CROP], lambda s, t: train.Classifier(s, 20, frozen=True)),
    "finetune": ([CROP], lambda s, t: train.Classifier(s, 20, frozen=False))}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_its_recipe_step_by_step(quick, teacher_file, name):
    """If a setting did not reach the loop (decay, schedule, temperature, queue), or an evaluation
    changed the training, a run would be another experiment. Its loss would fall all the same."""
    flags = (f"--arch {ARCH} --dim 8 --batch-size 32 --lr 0.4 --weight-decay 0.5 --tau-s 0.3 "
             f"--tau-t 0.07 --init {teacher_file} --eval-every 1 --image-size 32 --out run")
    cfg = make_cfg(*TINY, *flags.split(), *name.split()[1:], method=name.split()[0])
    data = load_data("shapes", subset=96)
    teacher = small_teacher() if cfg.method == "seed" else None
    init = load_teacher(teacher_file) if cfg.method in ("linear", "finetune") else None
    train.train(cfg, data, CPU, teacher, init)
    found = last_checkpoint("run")["method"]

    torch.manual_seed(0)
    student = copy.deepcopy(init).requires_grad_(True) if init else Encoder(ARCH, 8, image_size=32)
    views, make = RECIPES[name]
    method = make(student, teacher).to(memory_format=torch.channels_last).train()
    train.speed_up_small_maps(method)                           # with the same rounding
    before = snapshot(method)
    slow_training(method, data, cfg, views)
    after = method.state_dict()
    for part in ("backbone", "head", "class", "queue"):         # class_vectors or classifier
        names = [n for n in found if part in n and found[n].is_floating_point()]
        error = sum((after[n] - found[n]).square().sum() for n in names)
        change = sum((after[n] - before[n]).square().sum() for n in names)
        assert error <= 1e-4 * change, part
        assert part != "backbone" or (change == 0) == (name == "linear"), "the probe freezes it"


def test_a_row_of_the_log_has_the_numbers_of_its_step(quick, monkeypatch):
    """If log.csv had other numbers than the training, such as those of a queue that already
    contains the batch, it would mislead a user who tunes tau_t."""
    losses = spy(monkeypatch, SEED, "loss")
    cfg = make_cfg(*TINY, "--arch", ARCH, "--dim", "8", "--out", "run")
    train.train(cfg, load_data("shapes", subset=96), CPU, small_teacher())
    rows = log_rows("run")
    assert " ".join(rows[0]) == ("step epoch lr loss kl entropy loss_of_a_copy self_prob "
                                 "top1_agreement queue_filled accuracy")
    assert [row["step"] for row in rows] == ["6", "10", "12"], "each tenth, and the epochs' last"
    for row in rows:
        assert row.pop("accuracy") == "", "--eval-every 0"
        found = {key: float(text) for key, text in row.items()}
        step = int(row["step"])
        (_, z_s, z_t), loss = losses[step - 1]
        queue = torch.cat([args[2] for args, _ in losses[step - 5:step - 1]])   # 64: four batches
        lr = train.lr_at(step - 1, cfg, 6)
        expected = dict(seed_diagnostics(z_s, z_t, queue, 0.2, 0.05), loss=loss.detach(), step=step,
                        epoch=step / 6, lr=lr, queue_filled=1)
        assert found == pytest.approx({key: float(x) for key, x in expected.items()}, rel=1e-4)


def test_batch_norm_is_averaged_over_training_images():
    """If encoder.pt kept the running statistics, they would be those of weights hundreds of steps
    ago. If averaging them changed the training, results would depend on the number of saves."""
    split = draw_all_shapes(600, 0)
    encoder = Encoder("efficientnet_b0", 16, image_size=32).train()     # with stochastic depth
    before = snapshot(encoder)
    averaged = probe.average_batch_norm(encoder, split)
    assert encoder.training and same(before, encoder.state_dict())
    assert same(averaged.state_dict(), probe.average_batch_norm(averaged, split).state_dict())
    assert all(map(torch.equal, encoder.parameters(), averaged.parameters()))
    chosen = split.pixels[np.random.default_rng(1).permutation(600)[:512]]
    conv, bn, _ = averaged.backbone.features[0]
    x = conv(T.normalize(chosen / 255, seed.IMAGENET_MEAN, seed.IMAGENET_STD)).detach()
    x = x.unflatten(0, (16, 32)).transpose(1, 2).flatten(2)     # 16 batches of 32: [16, C, n]
    assert torch.allclose(bn.running_mean, x.mean(2).mean(0), atol=1e-5)
    assert torch.allclose(bn.running_var, x.var(2).mean(0), rtol=1e-4)


# ----------------------------------------------------------------------------------- the processes
def plain_encoder(cfg, init):
    """Return an Encoder without batch norm, which sees other batches in several processes."""
    torch.manual_seed(cfg.seed)
    layers = (nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Encoder("plain", 8, image_size=32, backbone=nn.Sequential(*layers))


def train_together(folder, name):
    """Train for three steps, in one process or in each of several. Return the method's state."""
    torch.manual_seed(5)
    teacher = small_teacher() if name == "seed" else None
    data = probe.Data("shapes", 32, draw_all_shapes(64, 0), draw_all_shapes(20, 1), ["no"] * 20)
    cfg = make_cfg(*TINY, *f"--max-steps 3 --out {folder}/{name}".split(), method=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "new_encoder", plain_encoder)
        built = spy(patch, train, "build")
        train.train(cfg, data, CPU, teacher)
    return snapshot(built[0][1][1])                             # not the encoder, but its method


def two_ranks(rank, folder):
    """Do what one of two processes does, and leave its results in FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: train_together(folder, name) for name in ("seed", "moco")}
    moco = MoCo(SmallNetwork(), 16)
    moco.key_encoder = nn.Identity()                            # a key is the view itself
    computed = spy(pytest.MonkeyPatch(), moco, "embed")
    torch.manual_seed(rank)                                     # each process has its own numbers
    found["views"] = unit(4, 8)
    found["keys"] = moco.targets([None, found["views"]])
    found["computed here"] = computed[0][1]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Return the results of two processes and of one, and the folders of their runs."""
    two = tmp_path_factory.mktemp("two")
    one = tmp_path_factory.mktemp("one")
    torch.multiprocessing.spawn(two_ranks, args=(str(two),), nprocs=2)
    single = {name: train_together(one, name) for name in ("seed", "moco")}
    return torch.load(two / "0.pt"), torch.load(two / "1.pt"), single, two, one


def test_two_processes_compute_each_others_keys(two_processes):
    """If MoCo's keys were computed among the images of their queries, batch norm would reveal which
    belong together. If they did not return in order, they would be compared with other images."""
    views = torch.cat([found["views"] for found in two_processes[:2]])
    sources = []
    for found in two_processes[:2]:
        assert torch.allclose(found["keys"], found["views"])
        sources.append((found["computed here"] @ views.T).argmax(1).tolist())
        assert min(sources[-1]) < 4 <= max(sources[-1]), "images of both processes"
    assert sorted(sources[0] + sources[1]) == list(range(8)), "each image once"


@pytest.mark.parametrize("name", ["seed", "moco"])
def test_two_processes_have_the_weights_of_one(two_processes, name):
    """If gradients were not averaged, or each process had its own start or batches, two processes
    would train two networks."""
    rank0, rank1, single, *_ = two_processes
    assert same(rank0[name], rank1[name])
    for key, value in single[name].items():
        assert torch.allclose(rank0[name][key], value, atol=1e-5), key


@pytest.mark.parametrize("name", ["seed", "moco"])
def test_two_processes_have_the_queue_and_the_log_of_one(two_processes, name):
    """If each process enqueued only its own images, the queue would move at half the speed. If the
    log were about the images of one process, it would be noisier than the run."""
    _, rank1, single, two, one = two_processes
    queue = single[name]["queue.features"]
    assert torch.allclose(rank1[name]["queue.features"], queue, atol=1e-5)
    assert rank1[name]["queue.seen"] == single[name]["queue.seen"] == 48
    assert (queue[:16] - queue[1:17]).norm(dim=1).min() > 1e-3, "else the order is not tested"
    for row, expected in zip(log_rows(two / name), log_rows(one / name), strict=True):
        for key in set(row) - {"accuracy"}:
            assert float(row[key]) == pytest.approx(float(expected[key]), rel=1e-4), key


def test_the_readmes_core_runs(tmp_path, monkeypatch, teacher_file):
    """If the code to copy did not run, no user could start from it."""
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    [core] = [block.split("```")[0] for block in blocks if "import SEED" in block]
    (tmp_path / "teacher.pt").write_bytes(Path(teacher_file).read_bytes())
    monkeypatch.chdir(tmp_path)
    names = dict(loader=[(0, range(8), draw_all_shapes(8, 0).pixels)] * 2)
    exec(core, names)
    assert names["loss"].isfinite() and names["method"].queue.seen == 16
    assert all(p.grad is not None for p in names["student"].parameters())
