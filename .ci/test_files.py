"""Checkpoints: published layouts, damaged and hostile files, downloads, torch.hub, and saving."""
import argparse
import collections
import datetime
import enum
import functools
import http.server
import io
import math
import os
import pathlib
import re
import sys
import zipfile
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import probe
import train
from probe import load_teacher, read_checkpoint, save_encoder
from seed import Encoder, InputError
from test_seed import ARCH, make_cfg, refusal, run, same, spy, with_statistics


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_every_classification_network_becomes_an_encoder_or_is_one_line():
    """If the wrong layer were replaced, features of another layer would be distilled silently."""
    refused = []
    for arch in torchvision.models.list_models(module=torchvision.models):
        if "regnet" in arch and "mf" not in arch:                       # needs too much memory
            continue
        with torch.device("cpu" if "regnet" in arch else "meta"):       # they need numbers
            network = torchvision.models.get_model(arch, weights=None)
            try:
                encoder = Encoder(arch, 8, 4)
            except InputError as e:
                assert "\n" not in str(e) and arch in str(e)
                refused.append(arch)
                continue
            linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
            assert encoder.feature_dim == linears[-1].in_features, arch
        assert probe.find_backbone(network.state_dict(), arch, None, "file") == ("", ()), arch
    assert refused == ["googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1"]


@pytest.mark.parametrize("options, words", [
    (dict(arch="mobilenetv3_large"), "did you mean mobilenet_v3_large, "),
    (dict(arch="deeplabv3_resnet50"), "unknown network 'deeplabv3_resnet50'"),
    (dict(arch="vit_b_16", image_size=32), "vit_b_16 does not turn images of 32 px into vectors"),
    (dict(arch="convnext_tiny", small_images=True), "use --no-small-images"),
    (dict(arch="mine", backbone=nn.Conv2d(3, 7, 3)), "mine does not turn images of 224 px into")])
def test_a_network_that_does_not_fit_is_one_line(options, words):
    """If networks were not tried first, a traceback would appear in the first step, an hour later
    for a student."""
    with torch.device("meta"):
        assert words in refusal(Encoder, **options)


# ------------------------------------------------------------------------------- published layouts
def head_of(words, width=512):
    """Return a head: a Linear's width ("64-": no bias), relu, bn, or plain (bn without weights)."""
    modules = []
    for word in words.split():
        if word == "relu":
            modules.append(nn.ReLU())
        elif word in ("bn", "plain"):
            modules.append(nn.BatchNorm1d(width, affine=word == "bn"))
        else:
            modules.append(nn.Linear(width, int(word.strip("-")), bias="-" not in word))
            width = modules[-1].out_features
    return with_statistics(nn.Sequential(*modules) if len(modules) > 1 else modules[0]).eval()


def backbone_of(arch):
    """Return a network without its classifier, with statistics that are not the initial ones."""
    network = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    return with_statistics(network).eval()


def hollow(network):
    """Return a state dict that takes no space: each weight is a single number, repeated."""
    return {name: torch.ones((), dtype=value.dtype).expand(value.shape)
            for name, value in network.state_dict().items()}


RESNET = backbone_of("resnet18")
PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))     # the network gets the pixels as they are
PARTS = {           # what a file may contain under a prefix, and in the last lines without one
    "net": hollow(RESNET),
    "numbered": hollow(nn.Sequential(*RESNET.children())),
    "head": head_of("512 relu 128").state_dict(),
    "layer": {"weight": torch.ones(512, 512), "bias": torch.ones(512)},
    "norm": nn.BatchNorm1d(512, affine=False).state_dict(),
    "fcn": hollow(torchvision.models.get_model("fcn_resnet50", weights_backbone=None)),
    "arch": {"arch": "resnet18", "model": "a name"},
    "args": {"args": argparse.Namespace(arch="resnet18"), "best": np.float64(71.2),
             "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
    "dino": {"mlp.0.weight": torch.ones(64, 512), "mlp.0.bias": torch.ones(64),
             "last_layer.weight_g": torch.ones(90, 1), "last_layer.weight_v": torch.ones(90, 32)},
    "one": {"": torch.ones(1)}, "random": {"": torch.get_rng_state()},
    "some": {"": torch.ones(3, 3)}}
LAYOUTS = {         # where the backbone is, and its head; the head's layers; what else is there
    "MoCo v1": ("state_dict/module.encoder_q.", "module.encoder_q.fc.", "128",
                "arch:/ net:module.encoder_k. head:module.encoder_k.fc. some:module.queue"),
    "MoCo v2 without module.": ("state_dict/encoder_q.", "encoder_q.fc.", "512 relu 128",
                                "args:/ net:encoder_k. head:encoder_k.fc. some:queue"),
    "its key encoder": ("state_dict/encoder_k.", "encoder_k.fc.", "512 relu 128",
                        "chosen net:encoder_q. head:encoder_q.fc. some:queue"),
    "MoCo v2 beside a backbone": ("state_dict/encoder_q.", "encoder_q.fc.", "512 relu 128",
                                  "net:backbone."),
    "MoCo v3": ("state_dict/base_encoder.", "base_encoder.fc.", "64- bn relu 32- plain",
                "net:momentum_encoder. head:momentum_encoder.fc. head:predictor."),
    "SwAV": ("module.", "module.projection_head.", "96 bn relu 32", "some:prototypes.weight"),
    "DINO": ("teacher/backbone.", "", "", "args:/ net:student/module.backbone. dino:head. "
             "dino:student/module.head. some:dino_loss/center"),
    "DINO, ResNets": ("teacher/module.backbone.", "", "", "args:/ net:student/module.backbone. "
                      "dino:module.head. dino:student/module.head. some:dino_loss/center"),
    "Barlow Twins": ("model/module.backbone.", "module.projector.", "64- bn relu 48-",
                     "norm:module.bn."),
    "a SEED student": ("state_dict/module.student.", "module.student.fc.", "512 relu 128",
                       "net:module.teacher. head:module.teacher.fc. some:module.queue"),
    "a backbone": ("", "", "", ""),
    "torchvision's reference": ("model/", "", "", "args:/ layer:fc."),
    "its averages": ("model_ema/module.", "", "", "chosen net:model/ layer:module.fc. "
                     "one:n_averaged"),
    "PyTorch's ImageNet example": ("state_dict/module.", "", "", "arch:/ layer:module.fc. "
                                   "one:/best_acc1"),
    "an old PyTorch": ("state_dict/module.", "", "", "old layer:module.fc."),
    "an average of files": ("", "", "", "averaged"),
    "compiled": ("model/_orig_mod.module.", "_orig_mod.module.fc.", "512 relu 128", ""),
    "compiled in parts": ("state_dict/", "fc._orig_mod.", "512 relu 128", "parts"),
    "lightly's MoCo": ("state_dict/backbone.", "projection_head.layers.", "512 relu 128",
                       "numbered:backbone_momentum. head:projection_head_momentum.layers."),
    "lightly's BYOL": ("state_dict/backbone.", "projection_head.layers.", "96 bn relu 32",
                       "net:student_backbone. head:student_projection_head.layers. "
                       "head:student_prediction_head.layers. layer:online.head."),
    "its student": ("state_dict/student_backbone.", "student_projection_head.layers.",
                    "512 relu 128", "chosen net:backbone. head:projection_head.layers."),
    "lightly's DINO": ("state_dict/backbone.", "", "", "head:projection_head.layers. "
                       "some:projection_head.last_layer.weight_g net:student_backbone. "
                       "head:student_projection_head.layers. some:criterion.center.center "
                       "random:/rng_state"),
    "solo-learn's BYOL": ("state_dict/backbone.", "projector.", "96 bn relu 32",
                          "net:momentum_backbone. head:momentum_projector. head:predictor. "
                          "layer:classifier. one:/callbacks.best"),
    "its slow network": ("state_dict/momentum_backbone.", "momentum_projector.", "96 bn relu 32",
                         "chosen net:backbone. head:projector."),
    "dropout, then classes": ("", "", "", "layer:fc.1."),
    "a project, then classes": ("project/", "", "", "layer:fc.")}


def put(file, place, tensors):
    """Put tensors into a file: at "model/net." under the dict file["model"], as "net.NAME"."""
    top, _, prefix = place.rpartition("/")
    inner = file.setdefault(top, {}) if top else file
    inner.update({prefix + name: value for name, value in tensors.items()})


def add_parts(file, words, top=""):
    """Add PARTS, from words such as "head:PLACE", at "/" or below `top`."""
    for kind, _, place in [word.partition(":") for word in words.split()]:
        put(file, place if "/" in place else top + place, PARTS.get(kind, {}))


def layout_file(name, network, head):
    """Return the content of a file with a layout of LAYOUTS."""
    place, head_place, _, words = LAYOUTS[name]
    if "numbered" in words:
        network = nn.Sequential(*network.children())
    weights = network.state_dict()
    if "old" in words:
        weights = {key: value for key, value in weights.items() if "num_batches" not in key}
    if "parts" in words:
        weights = {key.replace("layer1.", "layer1._orig_mod."): weights[key] for key in weights}
    if "averaged" in words:                             # then the counters are not integers
        weights = {key: value.double() for key, value in weights.items()}
    top = place[:place.find("/") + 1]
    file = {}
    put(file, place, weights)
    put(file, top + head_place, head.state_dict() if head else {})
    add_parts(file, words, top)
    return file


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_becomes_the_network_that_its_authors_evaluate(tmp_path, name):
    """If another copy of the network or another head were loaded, it would be distilled
    silently."""
    place, _, layers, words = LAYOUTS[name]
    head = head_of(layers) if layers else nn.Identity()
    prefix = place.replace("/", ".").replace("_orig_mod.", "")
    torch.save(layout_file(name, RESNET, head), tmp_path / "file.pth",
               _use_new_zipfile_serialization="old" not in words)       # until 2020
    flags = dict(PLAIN, prefix=prefix) if "chosen" in words else PLAIN
    teacher = load_teacher(tmp_path / "file.pth", **flags)
    x = torch.rand(2, 3, 64, 64)
    expected = head(RESNET(x))
    assert teacher.dim == expected.shape[1]
    assert torch.allclose(teacher(x), F.normalize(expected, dim=1), atol=1e-5)
    assert torch.allclose(teacher.features(x), RESNET(x), atol=1e-5)
    assert f"weights under '{prefix}', {'head' if layers else 'no'}" in teacher.provenance
    assert teacher.provenance.endswith("matched 120 backbone keys")
    assert teacher.used_labels is (False if layers else None)
    assert teacher.multi_crop == (name == "SwAV")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    save_encoder(tmp_path / "encoder.pt", teacher, teacher.provenance, False)
    assert torch.equal(load_teacher(tmp_path / "encoder.pt")(x), teacher(x)), "as a file of ours"


class SwavResNet18(torchvision.models.ResNet):
    """A ResNet-18 that is twice as wide. Its first convolution pads in two steps, as in SwAV's."""

    def __init__(self):
        block = torchvision.models.resnet.BasicBlock
        super().__init__(block, [2, 2, 2, 2])
        self.inplanes = 128
        self.conv1 = nn.Conv2d(3, 128, 7, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        for i in range(4):
            setattr(self, f"layer{i + 1}", self._make_layer(block, 128 * 2**i, 2, min(i, 1) + 1))
        self.fc = nn.Identity()

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize("name, arch", [
    (None, "resnet18w2"), ("resnet18w2", "resnet18w2"), ("resnet18x2", "resnet18w2"),   # VICReg's
    (None, "resnet34")])
def test_depth_width_and_stem_are_read_off_the_weights(tmp_path, name, arch):
    """If only torchvision's networks were known, the teacher of the paper's best rows, a SwAV
    ResNet-50x2, could not be loaded."""
    network = SwavResNet18()
    if arch == "resnet34":                                              # trained on CIFAR
        network = Encoder(arch, None, small_images=True).backbone
    with_statistics(network).eval()
    torch.save({**network.state_dict(), "arch": name}, tmp_path / "file.pth")
    teacher = load_teacher(tmp_path / "file.pth", **PLAIN)
    x = torch.rand(2, 3, 64, 64)
    assert teacher.arch == arch
    assert torch.allclose(teacher.features(x), network(x), atol=1e-4)
    save_encoder(tmp_path / "encoder.pt", teacher, "a test", False)
    assert torch.equal(load_teacher(tmp_path / "encoder.pt")(x), teacher(x))


# ------------------------------------------------------------------------------------ what is amiss
DAMAGE = {"flat": torch.flatten, "int": torch.Tensor.long, "negative": torch.neg,
          "number": torch.Tensor.tolist, "drop": lambda value: None,
          "nan": lambda value: value * math.nan, "huge": lambda value: value.double() * 1e300}


def damage(file, kind, text):
    """Change the tensors whose names contain a text, in a file's first level or its second."""
    for part in [part for part in (file, *file.values()) if isinstance(part, dict)]:
        part.update({name: DAMAGE[kind](part[name]) for name in part if text in name})


MOCO = "arch:/ net:state_dict/module.encoder_q. head:state_dict/module.encoder_q.fc. "


@pytest.mark.parametrize("parts, words", [
    (MOCO + "named:resnetaa50", "is a resnetaa50, which torchvision does not have"),
    (MOCO + "prefix=foo.", "0 of 100 keys are there, under 'foo.', without conv1.weight, bn1.w"),
    (MOCO + "drop:layer1.0.bn1.bias", "99 of 100 keys are there, under 'state_dict.module.encoder_"
     "q.', without layer1.0.bn1.bias; it contains state_dict.module.encoder_q.conv1.weight"),
    (MOCO + "drop:q.conv1 net:state_dict/encoder_k.", "encoder_"),      # takes no other network
    (MOCO + "drop:fc.0.", "its head lacks layer 0"),
    (MOCO + "nan:q.conv1", "conv1.weight has values that are not finite"),
    (MOCO + "huge:q.conv1", "conv1.weight has values that are not finite"),
    (MOCO + "negative:bn1.running_var", "running_var has negative values"),
    (MOCO + "flat:q.conv1", "does not fit a resnet18: size mismatch for backbone.conv1.weight"),
    (MOCO + "int:q.conv1", "backbone.conv1.weight is torch.int64, not torch.float32"),
    (MOCO + "some:state_dict/module.encoder_q.layer4.2.conv1.weight", "encoder_q.layer4.2.conv1"),
    ("", "no complete ResNet"), ("some:foo.weight", "it contains foo.weight"),
    ("net: drop:layer2.0.conv2", "resnet"),                             # is no resnet17
    ("net:model. net:model_ema.", "several networks, under ['model.', 'model_ema.']; choose one of "
     "them with --teacher-prefix"),
    ("net: head:one. head:two.", "no part of torchvision's resnet18 or its head, such as one., tw"),
    ("net:backbone. layer:proj.fc. norm:proj.bn.", "proj.bn."),         # in which order?
    ("net: layer:projector.0. layer:projector.3.", "its head lacks layer 1"),
    ("net: layer:proj.0. layer:proj.2. drop:proj.0.bias drop:proj.2.bias", "head.0.bias"),
    ("fcn:", "resnet50"),                               # segments: a ResNet with other strides
    ("net: some:layer1.0.scale", "such as layer1.0.scale"),
    ("net:student. net:teacher.", "several networks, under ['student.', 'teacher.']")])
def test_a_file_that_is_incomplete_or_leaves_a_choice_is_refused(tmp_path, parts, words):
    """If any of these files were accepted, a wrong network would be distilled silently."""
    file = {}
    add_parts(file, parts)
    flags = dict(word.split("=") for word in parts.split() if "=" in word)
    for kind, _, text in [word.partition(":") for word in parts.split()]:
        if kind == "named":
            file["arch"] = text
        elif kind in DAMAGE:
            damage(file, kind, text)
    torch.save(file, tmp_path / "file.pth")
    assert words in refusal(load_teacher, tmp_path / "file.pth", **flags)


def content_of(value):
    """Return the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_no_checkpoint_is_one_line(tmp_path, teacher_file):
    """If these errors were tracebacks, they would not name the file or the remedy."""
    ours = torch.load(teacher_file, weights_only=True)
    path = tmp_path / "file.pth"
    flipped = bytearray(content_of({"conv1.weight": torch.randn(1000)}))
    flipped[len(flipped) // 2] ^= 64                                    # one bit
    script = torch.jit.script(nn.Linear(2, 2)).save_to_buffer()
    odd = io.BytesIO()
    with zipfile.ZipFile(odd, "w") as archive:                          # a size that is filled
        archive.writestr("f/data.pkl", b"\x80\x02ctorch\nSize\n)R(K\x01K\x02u.")
        archive.writestr("f/version", b"3\n")
    parent = {"foo": torch.zeros(3)}
    parent["child"] = {"parent": parent}                # as configurations do
    for content, words in (
            (b"<!DOCTYPE html><html>no quota left</html>", "it is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"some text", "torch.save did not write it"), (b"", "or not all of it"),
            (flipped, "in it is damaged"), (flipped[:300], "cannot read"), (script, "torchscript"),
            (odd.getvalue(), "torch.save did not write it"),
            (content_of([1]), "is not a checkpoint: expected a dict of weights"),
            (content_of({"state_dict": None, "model": nn.Linear(2, 2)}), "no tensors"),
            (content_of({"state_dict": {1: torch.zeros(3)}}), "it contains state_dict.1"),
            (content_of(parent), "it contains foo"),
            (content_of({**ours, "std": [0, 0, 0]}), "std"),    # each embedding would be NaN
            (content_of({**ours, "mean": [0.5]}), "is not a complete encoder.pt"),
            (content_of({**ours, "image_size": 0}), "does not turn images of 0 px into vectors"),
            (content_of({**ours, "backbone": [1]}), "0 of 280 keys"),
            (content_of({**ours, "head": [1]}), 'Missing key(s) in state_dict: "head.0.weight"'),
            (content_of({**ours, "arch": "resnet18"}), "no complete resnet18: 0 of 100 keys")):
        path.write_bytes(content)
        assert words in refusal(load_teacher, path)
    assert refusal(load_teacher, "none.pth") == "no such file: none.pth"
    assert "Is a directory" in refusal(load_teacher, str(tmp_path))


# ------------------------------------------------------------------------ objects and hostile files
Color = enum.Enum("Color", "RED")
Gone = type("Gone", (), {"__module__": "gone"})
Box = type("Box", (dict,), {"__module__": "gone"})                # like the settings of yacs


@pytest.mark.parametrize("thing", [
    pathlib.PurePosixPath("/d"), pathlib.PureWindowsPath("d"), argparse.Namespace(arch="resnet18"),
    collections.defaultdict(list, a=[1]), Color.RED, datetime.datetime(2020, 1, 1), np.float64(1),
    np.zeros(3), np.random.RandomState(0), np.dtype("f4"), Gone(), Box(a=Box(b=1)), Box(),
    nn.Linear, nn.Linear(2, 2), torch.optim.SGD([torch.ones(1)], 0.1), {1, 2}, torch.float16,
    {Color.RED: 1}, collections.deque([1]), functools.partial(torch.optim.Adam, lr=0.1)], ids=str)
def test_objects_beside_the_weights_do_no_harm(tmp_path, monkeypatch, thing):
    """If objects beside the weights were errors, files of Lightning, timm and DINO could not be
    read without their packages."""
    monkeypatch.setitem(sys.modules, "gone", argparse.Namespace(Gone=Gone, Box=Box))
    weights = {"conv1.weight": torch.randn(3)}
    torch.save(dict(state_dict=weights, settings={"a": [thing, (thing,)]}), tmp_path / "f")
    monkeypatch.delitem(sys.modules, "gone")
    assert same(read_checkpoint(tmp_path / "f")["state_dict"], weights)


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec])
def test_a_file_cannot_run_code(tmp_path, monkeypatch, function, is_zip):
    """If a checkpoint could run code, a stranger's file could do anything."""
    monkeypatch.chdir(tmp_path)
    code = "touch exploded" if function is os.system else "open('exploded', 'w')"
    torch.save(dict(PARTS["net"], extra=Runs(function, code)), "file.pth",
               _use_new_zipfile_serialization=is_zip)
    if function in (eval, exec):
        assert load_teacher("file.pth").arch == "resnet18"              # it is not called
    else:
        words = r"cannot read file.pth: it contains a \S+, which could run code"
        assert re.match(words, refusal(load_teacher, "file.pth"))
    assert os.listdir() == ["file.pth"]


def test_no_damaged_file_becomes_another_network(tmp_path, monkeypatch):
    """If damage were not noticed, an edited or incomplete file would teach nonsense silently."""
    network = backbone_of(ARCH)
    monkeypatch.setitem(PARTS, "net", hollow(network))
    rng = np.random.default_rng(0)
    path = tmp_path / "file.pth"
    count = 0
    for _ in range(40):
        name = rng.choice([*LAYOUTS])
        place, _, layers, words = LAYOUTS[name]
        prefix = place.replace("/", ".").replace("_orig_mod.", "")
        file = layout_file(name, network, head_of(layers, 1024) if layers else None)
        key = rng.choice([*probe.flatten(file)])
        damage(file, rng.choice([*DAMAGE]), key.partition(".")[2] or key)
        torch.save({**file, "args": argparse.Namespace(arch=ARCH)}, path)
        try:
            teacher = load_teacher(path, prefix=prefix if "chosen" in words else None)
        except InputError as e:
            assert "\n" not in str(e)
            continue
        count += 1
        tensors = probe.flatten(file)
        for key, value in teacher.backbone.state_dict().items():
            if "num_batches_tracked" not in key:                        # old files lack these
                assert torch.equal(tensors[prefix + key], value), (name, key)
    assert 3 < count < 37


# --------------------------------------------------------------------------------------- downloads
@pytest.fixture
def url(tmp_path, monkeypatch):
    """Serve the file "teacher.pth" of the current folder, whatever its query. Return its URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}/teacher.pth"
    server.shutdown()


def test_each_url_is_its_own_file_and_is_downloaded_once(url, monkeypatch):
    """If URLs that end alike were stored as one file, another teacher would be distilled
    silently."""
    urls = [url, url.replace("127.0.0.1", "localhost"), f"{url}?id=1", f"{url}?id=2"]
    asked = spy(monkeypatch, torch.hub, "download_url_to_file")
    for _ in range(2):
        for number, name in enumerate(urls):
            torch.save({"number": number}, "teacher.pth")
            assert read_checkpoint(name) == {"number": number}
    assert [args[0] for args, _ in asked] == urls


def test_a_download_that_cannot_be_read_is_removed(url):
    """If a page that says "no quota" were kept, each later start would find it again."""
    message = refusal(load_teacher, f"{url}?signature=secret")
    assert "HTTP Error 404" in message and "secret" not in message
    for content, words in ((b"<html>no quota left</html>", "it is a web page; download the file"),
                           (content_of({"a": torch.randn(99)})[:-200], "cannot read"),
                           (content_of({"a": Runs(os.system, "ls")}), "could run code")):
        pathlib.Path("teacher.pth").write_bytes(content)
        assert words in refusal(load_teacher, url)
        assert os.listdir("hub/checkpoints") == []
    torch.save(PARTS["net"], "teacher.pth")
    assert load_teacher(url).arch == "resnet18"


def test_a_signature_is_written_nowhere(url, monkeypatch, few_shapes):
    """If a signed URL were recorded, whoever receives a run's folder could open the storage of its
    teacher."""
    torch.save(dict(backbone_of(ARCH).state_dict(), arch=ARCH), "teacher.pth")
    url = f"{url}?signature={60 * 'secret'}"                            # too long for a file's name
    for name in (url, "http://me:secret@host/a.pth#secret"):
        assert "secret" not in probe.without_secrets(name)
    assert probe.without_secrets("a?b.pth") == "a?b.pth"
    scores = dict(knn=1.0, linear=1.0, rate=1.0)
    monkeypatch.setattr(probe, "evaluate", lambda *args: (scores, (0, 0, 0)))
    monkeypatch.setattr(probe, "save_neighbors", lambda *args: None)
    probe.main([url, "--out", "out", "--device", "cpu", "--image-size", "32"])
    cfg = make_cfg("--teacher", url, "--init", url)
    probe.save_json("args.json", train.run_identity(cfg, probe.load_data("shapes")))
    files = [path for path in pathlib.Path().rglob("*") if path.is_file()]
    assert len(files) == 4                              # the teacher twice, args.json, probe.json
    assert not [path for path in files if "secret" in str(path) or b"secret" in path.read_bytes()]


# --------------------------------------------------------------------------------------- torch.hub
HUBCONF = """
import sys, torch
from torch import nn
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def forward(self, x):
        return self.layer(self.patches(x).flatten(2).mT).mean(1)
def transformer():
    torch.manual_seed(3)
    return Tiny()
def untrained(): return Tiny()
def half_untrained():
    mask = torch.randn(3)
    network = transformer()
    network.register_buffer("mask", mask)
    return network
def maps(): return transformer().patches
def leaves(): sys.exit("no weights\\nhere")
"""


def test_a_network_of_torch_hub_teaches_by_its_output(tmp_path, monkeypatch):
    """If hub: did not work, DINOv2 and many other networks could not be teachers."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher = load_teacher("hub:~:transformer", mean=(0, 0, 0), std=(0.5, 0.5, 0.5))
    x = torch.rand(4, 3, 40, 40)
    assert torch.allclose(teacher(x), F.normalize(teacher.backbone(x / 0.5), dim=1), atol=1e-6)
    assert (teacher.dim, teacher.feature_dim, teacher.used_labels) == (8, 8, None)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert "does not turn images of 4 px into vectors" in refusal(teacher.check_image_size, 4)
    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda *args, **options: asked.append((args, options)))
    assert "cannot load hub:a/b:main:c: " in refusal(load_teacher, "hub:a/b:main:c")
    assert asked[0] == (("a/b:main", "c"), dict(source="github", trust_repo="check"))   # may ask


@pytest.mark.parametrize("entry, words", [
    ("maps", "does not turn images of 224 px into vectors"), ("nothing", "nothing"),
    ("leaves", "leaves: no weights"), ("", "cannot load hub:"),
    ("untrained", "untrained: some of its layers have random weights"),
    ("half_untrained", "half_untrained: some of its layers have random weights")])
def test_an_entry_of_torch_hub_that_is_no_teacher_is_one_line(tmp_path, entry, words):
    """If an entry were trusted, random layers would be distilled. It is other people's code and may
    do anything."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    assert words in refusal(load_teacher, f"hub:{tmp_path}:{entry}")


def test_the_backbone_in_an_encoder_file_has_torchvisions_names(tmp_path):
    """Users load it into a plain torchvision network, and normalize as the file says."""
    path = tmp_path / "encoder.pt"
    encoder = Encoder("resnet18", mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)).eval()
    save_encoder(path, encoder, "made by a test", False)
    file = torch.load(path, weights_only=True)
    network = torchvision.models.resnet18().eval()
    assert network.load_state_dict(file["backbone"], strict=False).unexpected_keys == []
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([file["mean"], file["std"]]).view(2, 3, 1, 1)
    assert torch.equal(network.fc(load_teacher(path).features(x)), network((x - mean) / std))
    assert torch.equal(network.fc(load_teacher(path, **PLAIN).features(x)), network(x))


def test_a_network_that_knows_its_version_resumes_and_comes_back(quick, monkeypatch):
    """If the state dict's version were lost, MNASNet would refuse its own weights: a run would end
    before its table."""
    monkeypatch.setattr(Encoder, "check_image_size", lambda self, size: 1280)
    for steps in (1, 2):
        run(f"--method supervised --arch mnasnet0_5 --max-steps {steps}")
    assert load_teacher("run/encoder.pt").arch == "mnasnet0_5"


@pytest.mark.parametrize("flags", ["--teacher {}", "--method moco", "--method supervised"])
def test_the_last_checkpoint_of_a_run_is_a_teacher_too(quick, teacher_file, flags):
    """If last.pt were no teacher, a user who kept only this file would have to train again."""
    run(flags.format(teacher_file))
    kept = load_teacher("run/encoder.pt")
    last = load_teacher("run/last.pt")
    for name, value in last.named_parameters():                         # statistics are averaged
        assert torch.equal(value, kept.get_parameter(name)), name
    for name in ("provenance", "used_labels", "image_size", "dim", "arch"):
        assert getattr(last, name) == getattr(kept, name), name


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(),
                                   RuntimeError("stream writer failed")])
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch, error):
    """If a file were written in place, a full disk would leave half of it, and the run would be
    lost."""
    def save(content, file):
        file.write(b"half")
        raise error

    path = tmp_path / "last.pt"
    path.write_text("the earlier one")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        probe.save_file(path, {"step": 2})
    if caught.type is OSError:
        assert re.match(r"cannot write .*last.pt: .*; [0-9,]+ bytes are free$", str(caught.value))
    assert os.listdir(tmp_path) == ["last.pt"]
    assert path.read_text() == "the earlier one"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """If a file were renamed before its content is on the disk, a power cut could leave it
    empty."""
    def fsync(number):
        [name] = os.listdir(tmp_path)
        assert os.stat(tmp_path / name).st_size == os.fstat(number).st_size > 0
        names.append(name)

    names = []
    monkeypatch.setattr(os, "fsync", fsync)
    probe.save_json(tmp_path / "last.pt", {"step": 1})
    assert "last.pt" not in names and len(names) == 1
    assert "there is no folder" in refusal(probe.save_json, tmp_path / "none" / "a.json", {})
