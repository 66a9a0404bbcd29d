"""Hard cases of images, folders, DataLoader workers and evaluations."""
import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

import probe
import train
from probe import Split, load_data
from seed import IMAGENET_MEAN, IMAGENET_STD, Encoder, augment, uniforms
from test_seed import (ARCH, CPU, HERE, draw_all_shapes, make_cfg, refusal, same, snapshot, spy,
                       with_statistics, write_images)

RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)
COLORS = Image.fromarray((255 * np.stack([RAMP, RAMP.T, 1 - RAMP], 2)).astype(np.uint8))
CORNERS = Image.new("RGB", (128, 64))                   # turning it changes it
CORNERS.paste("red", (0, 0, 64, 32))
CORNERS.paste("lime", (0, 32, 64, 64))
MODES = dict(png="1 L LA P RGB RGBA", jpg="L RGB CMYK YCbCr", tif="1 L LA P RGB RGBA CMYK YCbCr",
             gif="1 L P RGB", bmp="1 L P RGB", webp="L RGB RGBA", jp2="L LA RGB RGBA CMYK")
AB = {f"{'ab'[i % 2]}/{i}.png": 20 * i for i in range(12)}


def read(path, box=None):
    """Return a crop of a file, float [64, 64, 3] in 0..255: of the whole image, or of a box."""
    def choose_boxes(height, width):
        return [box or (0, 0, height, width)]

    [crop] = probe.read_crops(path, [64], choose_boxes)
    return crop.permute(1, 2, 0).numpy().astype(float)


def is_like(path, image):
    """Return whether a file is read as an image that is displayed like this one."""
    expected = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    return np.abs(read(path) - np.asarray(expected, float)).mean() < 12


def red_files(folder, count):
    """Write images in two class folders, image i with 2 * i as red. Return the training split."""
    y, x = np.mgrid[:80, :80].astype(np.uint8)
    write_images(folder, {f"{'ab'[i % 2]}/{i:03d}.png": np.stack([0 * x + 2 * i % 256, x, y], 2)
                          for i in range(count)})
    return load_data("folder", folder, 72).train


@pytest.mark.parametrize("values", ["u1 255", "u2 4095", "u2 65535", "i4 255", "f4 1", "f4 255",
                                    "f4 1.003", "f4 1 nan", "f4 255 inf", "i4 1000000"])
def test_grays_of_every_depth_are_scaled(tmp_path, values):
    """If depth were ignored, 16-bit and float images would be black or white. Values may be
    infinite or overshoot."""
    dtype, white, *odd = values.split()
    pixels = (float(white) * RAMP).astype(dtype)
    pixels[0, :len(odd)] = odd
    path = tmp_path / ("a.png" if dtype[0] == "u" else "a.tif")
    Image.fromarray(pixels).save(path)
    assert np.abs(read(path)[1:, :, 0] - 255 * RAMP[1:]).max() <= 2


@pytest.mark.parametrize("extension", MODES)
def test_all_modes_become_rgb(tmp_path, extension):
    """If a mode were converted wrongly, inverted images would be trained on, and nobody would look
    at them."""
    for mode in MODES[extension].split():
        image = COLORS.convert(mode)
        image.save(tmp_path / f"a.{extension}")
        assert is_like(tmp_path / f"a.{extension}", image), mode


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp", "avif", "mpo"])
def test_an_image_is_read_as_it_is_displayed(tmp_path, extension):
    """If EXIF orientation were ignored, photos of phones would lie on their side. Values such as 0
    and 9 mean nothing."""
    path = tmp_path / f"a.{extension}"
    for turn in range(10):
        exif = Image.Exif()
        exif[274] = turn
        options = dict(tiffinfo={274: turn}) if extension == "tif" else dict(exif=exif)
        CORNERS.save(path, **options)
        shown = ImageOps.exif_transpose(Image.open(path))
        assert is_like(path, shown), turn


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_and_size_make_no_image_unreadable(tmp_path):
    """If odd metadata were an error, users would be told to remove good images, such as phones' of
    200 megapixels."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / ("a.jpg", "a.png", "a.webp")[i % 3]
        damaged = b"Exif\0\0II*\0\x08\0\0\0\5\0" + rng.bytes(i)
        CORNERS.save(path, exif=damaged[:6 + 2 * i], dpi=(72, 72))
        assert is_like(path, CORNERS), damaged
    COLORS.save(tmp_path / "profile.png", icc_profile=bytes(range(256)) * 8000)
    assert is_like(tmp_path / "profile.png", COLORS)
    Image.new("L", (16320, 12240), 200).save(tmp_path / "large.jpg")
    assert (read(tmp_path / "large.jpg") == 200).all()


@pytest.mark.parametrize("mode, turn", [("RGB", 1), ("RGB", 6), ("L", 1), ("CMYK", 3)])
def test_a_large_jpeg_is_decoded_small_and_stays_sharp(tmp_path, monkeypatch, mode, turn):
    """If JPEGs were decoded in full, a GPU would wait for images. If too small, crops would be
    blurred."""
    y, x = np.mgrid[:704, :896]
    pixels = np.where((x + y) // 16 % 2, 210, 40).astype(np.uint8)      # fine stripes
    pixels[:352, :448] = (x + y)[:352, :448] // 5                       # a smooth ramp
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.jpg", quality=95, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB")
    calls = spy(monkeypatch, Image.Image, "resize")
    for box, side in (((0, 0, shown.height, shown.width), 112), ((100, 60, 256, 256), 224),
                      ((400, 300, 140, 130), 448), ((400, 300, 250, 64), 896)):
        crop = read(tmp_path / "a.jpg", box)
        assert max(calls[-1][0][0].size) == side
        top, left, height, width = box
        expected = shown.crop((left, top, left + width, top + height)).resize((64, 64), 2)
        assert np.abs(crop - np.asarray(expected, float)).mean() < 6


def test_what_pillow_can_open_is_read_and_the_rest_is_counted(tmp_path):
    """If files were left out silently, half of a data set could be missing. A named pipe would
    block forever."""
    names = ["a.jfif", "b.JPE", "c", "d.avif", "e.png", "f.webp", "g.pnm", "h.mpo", "i.apng"]
    for name in (*names, ".hidden.jpg", "._a.jpg"):
        COLORS.save(tmp_path / name, format="JPEG" if name < "d" else None)
    for name in ("notes.txt", "more.txt", "f.heic", "README"):
        (tmp_path / name).write_text("no image")
    os.mkfifo(tmp_path / "pipe")
    files, [note] = probe.list_files(tmp_path)
    assert [Path(file).name for file in files] == names
    assert all(count in note for count in ("2 .txt", "1 .heic", "2 without extension"))
    assert note in str(load_data("folder", tmp_path, 32))
    os.mkfifo(tmp_path / "pipe.png")
    assert "cannot read the image" in refusal(read, tmp_path / "pipe.png")


@pytest.mark.parametrize("link, target", [
    ("a/up", ".."), ("again", "a"), ("Z", "a"), ("a/link", "../b"), ("b/copy.png", "../a/0.png")])
def test_each_image_is_read_once_whatever_symlinks_lead_to_it(tmp_path, link, target):
    """If a symlink were a second image, test images would also be training images."""
    write_images(tmp_path, {"c/x.png": 8, "y.png": 7, **{f"data/{name}": 9 for name in AB}})
    for name, other in ((link, target), ("c", "../c"), ("b/y.png", "../../y.png")):
        os.symlink(other, tmp_path / "data" / name)
    data = load_data("folder", tmp_path / "data", 32)
    names = probe.paths_below(tmp_path / "data", data.train.files + data.test.files)
    assert sorted(names) == sorted([*AB, "b/y.png", "c/x.png"])


@pytest.mark.parametrize("name", [
    "__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information",
    "$Recycle.Bin", "@Recycle", "#snapshot", "~snapshot", "Network Trash Folder", "found.000",
    "RECYCLER", "TheVolumeSettingsFolder", "@sharebin"])
def test_folders_of_operating_systems_are_no_classes(tmp_path, name):
    """If every folder were a class, those of macOS and network drives would add classes of
    thumbnails or deleted images."""
    write_images(tmp_path, {**AB, f"{name}/0.png": 1, f"a/{name}/1.png": 2, ".Trashes/2.png": 3})
    data = load_data("folder", tmp_path, 32)
    assert (data.classes, len(data.train) + len(data.test)) == (["a", "b"], 12)
    assert name in str(data)


def test_folders_beside_train_are_named(tmp_path):
    """If "train" is a class, like bus and car, the other classes are not used, and a user would not
    know it."""
    write_images(tmp_path, {"train/a.png": 1, "train/b.png": 2, ".git/c.png": 3, "val/d.png": 4})
    assert "not used" not in str(load_data("folder", tmp_path, 32))
    write_images(tmp_path, {"bus/a.png": 1, "car/b.png": 2})
    assert "not used: bus, car" in str(load_data("folder", tmp_path, 32))


@pytest.mark.parametrize("name, images, words", [
    ("folder", ["Training/a/1.png", "Training/b/2.png", "Test/a/3.png"], "Test and Training, w"),
    ("folder", ["train2017/1.png", "test2017/2.png"], "test2017 and train2017, which are not"),
    ("folder", ["train/a/1.png", "train/b/2.png", "val/.hidden.png"], "no image in"),
    ("folder", ["1.png", ".hidden/2.png"], "1 image in"), ("folder", [], "no directory"),
    ("folder", ["a/1.png", "b/1.png"], "image"),                # none can be held out
    ("folder", ["train/x/1.png", "train/y/1.png", "val/z/1.png"], "lacks: z"),
    ("imagenet", ["1.png", "2.png"], "train/ and val/"),
    ("imagenet", ["train/1.png", "train/2.png", "val/x/1.png"], "one folder per class")])
def test_a_folder_that_does_not_fit_is_one_line(tmp_path, name, images, words):
    """If these folders were accepted, a network would learn to tell training from test images, or
    fail after days."""
    write_images(tmp_path / "data", dict.fromkeys(images, 7))
    line = refusal(load_data, name, tmp_path / "data", 32)
    assert words in line and f"{tmp_path}/data" in line


@pytest.mark.parametrize("train, test", [("train", "Test"), ("Train", "VAL"), ("TRAIN", "valid")])
def test_the_split_of_a_folder_is_found_in_any_case(tmp_path, train, test):
    """If case mattered, Test/ would be left out, and a tenth of the training images held out
    instead."""
    names = [f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/a/3.png"]
    write_images(tmp_path, dict.fromkeys(names, 7))
    data = load_data("folder", tmp_path, 32)
    assert data.test.files == [str(tmp_path / names[2])] and len(data.train) == 2
    assert "is among the images" in refusal(probe.check_out, tmp_path / test, "folder", tmp_path)


def test_a_class_that_is_named_like_test_images_is_noted(tmp_path):
    """Without train/, a folder val/ beside the classes is probably meant to be held out."""
    write_images(tmp_path, dict.fromkeys(["a/1.png", "a/2.png", "b/1.png", "val/a/1.png"], 7))
    assert "a folder named like test images is one" in str(load_data("folder", tmp_path))


def test_an_image_beside_class_folders_is_noted(tmp_path):
    """With one image outside the folders, they are not classes, and there are no accuracies."""
    write_images(tmp_path, {**AB, "thumb.png": 3})
    data = load_data("folder", tmp_path)
    assert not data.classes and "has images outside class folders" in str(data)


def test_no_class_is_lost(tmp_path, monkeypatch):
    """os.walk skips folders that cannot be opened. With --data / or D:\\, names of classes would
    lose their first letter: cat and bat become one."""
    assert probe.class_folders([str(Path(os.sep, "cat", "1.png"))], Path(os.sep)) == ["cat"]
    monkeypatch.setattr(os, "scandir", Mock(side_effect=OSError(errno.EACCES, "Permission denied")))
    assert "Permission denied" in refusal(load_data, "folder", tmp_path, 32)


def test_held_out_images_stay_when_a_folder_changes():
    """If the split depended on the other images, training images would become test images when some
    are added."""
    names = [f"{'abc'[i % 3]}/{i}.png" for i in range(300)] + ["d/0.png", "d/1.png", "e/0.png"]
    held_out = {}
    for listed in (names, [name for name in names if name[-5] not in "37"], names[::-1],
                   ["0/0.png", *names, *(f"a/new{i}.png" for i in range(30)), "zoo/0.png"]):
        folders = np.array([name.split("/")[0] for name in listed])
        found = probe.choose_held_out(listed, folders)
        for folder in set(folders):
            some = found[folders == folder]
            assert not some.all() and (some.any() or len(some) == 1)
        for name, side in zip(listed, found):
            assert held_out.setdefault(name, side) == side
    assert 15 < sum(held_out[name] for name in names) < 50


def test_cifar_is_read(tmp_path, monkeypatch):
    """If channels were in the wrong place, images would be noise. Without a network, the line must
    name the remedy."""
    cifar = torchvision.datasets.CIFAR10
    files = [file for file, _ in cifar.train_list + cifar.test_list]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), np.uint8)
    contents = [{"data": part, "labels": [9, 1, 2, i]} for i, part in enumerate(pixels)]
    contents.append({"label_names": [*"abcdefghij"]})
    with tarfile.open(tmp_path / cifar.filename, "w:gz") as archive:
        for file, content in zip([*files, "batches.meta"], contents):
            (tmp_path / file).write_bytes(pickle.dumps(content))
            archive.add(tmp_path / file, f"{cifar.base_folder}/{file}")
    monkeypatch.setattr(cifar, "tgz_md5", None)
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": None})
    monkeypatch.setattr(cifar, "train_list", [[file, None] for file in files[:5]])
    monkeypatch.setattr(cifar, "test_list", [[files[5], None]])
    data = load_data("cifar10", tmp_path)
    assert (data.classes, data.test.labels.tolist()) == ([*"abcdefghij"], [9, 1, 2, 5])
    found = torch.cat([data.train.pixels, data.test.pixels])
    assert torch.equal(found, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/x.tar.gz")
    line = refusal(load_data, "cifar100", tmp_path)
    assert f"put cifar-100-python.tar.gz into {tmp_path}/" in line and "--dataset shapes" in line


def test_nothing_is_written_among_the_images(tmp_path, monkeypatch):
    """If --out could be among the images, the views.png of a run would be a training image of the
    next run."""
    monkeypatch.chdir(tmp_path)
    write_images(".", dict.fromkeys([*(f"flat/{i}.png" for i in range(3)), "two/train/1.png"], 3))
    os.symlink("flat", "link")
    os.makedirs("linked")
    os.symlink("../two/train", "linked/train")
    for out in ("flat", "flat/runs/x", "link/x", "two/train/run", "two/val", "two/test",
                "linked/train/run"):
        data = {"link": "flat"}.get(out.split("/")[0], out.split("/")[0])
        assert "is among the images" in refusal(probe.check_out, out, "folder", data)
        probe.check_out(out, "shapes", data)
    for out, data in (("elsewhere", "two"), ("flat-runs", "flat"), ("two/runs/x", "two")):
        probe.check_out(out, "folder", data)
    monkeypatch.chdir("flat")
    before = sorted(tmp_path.rglob("*"))
    flags = f"--dataset folder --data {tmp_path}/flat --image-size 32 --device cpu".split()
    train_flags = f"--arch {ARCH} --batch-size 2 --out {tmp_path}/else".split()
    assert "is among the images" in refusal(train.main, [*train_flags, *flags])
    assert "is among the images" in refusal(probe.main, [f"random:{ARCH}", *flags])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [32, 80])
def test_the_fingerprint_is_that_of_the_images(tmp_path, monkeypatch, size):
    """If the fingerprint missed exchanged images, a run would resume with them. If it contained the
    directory, no copy would do."""
    monkeypatch.chdir(tmp_path)
    write_images(".", AB)
    before = load_data("folder", ".", size).fingerprint
    assert load_data("folder", tmp_path, size).fingerprint == before
    with monkeypatch.context() as patch:                        # unreadable, reported later
        patch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError()))
        assert load_data("folder", tmp_path, size).fingerprint
    write_images(".", {name: 255 - value for name, value in AB.items()})
    replaced = load_data("folder", ".", size).fingerprint
    os.rename("a/0.png", "a/new.png")
    assert len({before, replaced, load_data("folder", ".", size).fingerprint}) == 3


@pytest.mark.parametrize("size", [72, 32])
def test_an_unreadable_image_is_gray_and_workers_change_nothing(tmp_path, capsys, size):
    """One bad file among a million would end a run, or be named in each epoch. Workers must not
    change batches, nor stop at Ctrl-C, which goes to all processes of a terminal."""
    files = red_files(tmp_path, 120).files
    expected = torch.tensor([2 * int(Path(file).stem) for file in files])
    expected[40] = 128
    Path(files[40]).write_bytes(Path(files[40]).read_bytes()[:60])
    data = load_data("folder", tmp_path, size)
    cfg = make_cfg(*f"--dataset folder --image-size {size} --batch-size 16 --seed 3".split())
    cfg.blur = cfg.color = False
    seen = []
    for cfg.workers in (0, 2):
        steps = train.batches(data.train, cfg, CPU, [(size, (0.2, 1)), (24, (0.1, 1))], range(14))
        seen.append([next(steps), next(steps)])                         # one from each worker
        workers = torch.multiprocessing.active_children()
        assert len(workers) == (cfg.workers if size == 72 else 0)
        for worker in workers:
            assert os.getpgid(worker.pid) != os.getpgrp()
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        seen[-1] += steps
        x = torch.cat([*probe.center_views(data.train, size, CPU, cfg.workers)])
        assert torch.equal((255 * x[:, 0, 9, 9]).round().long(), expected)
    for batch, again in zip(*seen, strict=True):
        assert np.array_equal(batch.samples, again.samples)
        assert torch.equal(batch.labels, data.train.labels[batch.samples])
        for view, other in zip(batch.views, again.views):
            assert torch.equal(view, other)
            assert torch.equal((255 * view[:, 0, 9, 9]).round().long(), expected[batch.samples])
    out = capsys.readouterr().out
    assert out.count("cannot be read") == out.count(f"the image {files[40]} cannot be read") == 1


def test_too_many_unreadable_images_are_counted_and_named(tmp_path):
    """An interrupted copy of the data would be another data set without a word. But the sample of
    an evaluation, which may happen to include many, must not end a run after hours."""
    split = red_files(tmp_path, 700)
    for i in np.random.default_rng(1).permutation(len(split))[:6]:      # more than 1% of 512
        Path(split.files[i]).write_bytes(b"")
    network = Encoder(ARCH, 8, image_size=32)
    probe.average_batch_norm(network, split)
    for path in tmp_path.glob("b/*.png"):
        path.write_bytes(b"")
    cfg = make_cfg(*"--dataset folder --image-size 72 --batch-size 16 --workers 0".split())
    steps = train.batches(split, cfg, CPU, [(72, (0.2, 1.0))], range(3))
    bad = Split(files=[str(path)])                              # all of its images
    for call in ((load_data, "folder", tmp_path, 32), (probe.decode, bad, 32), (list, steps),
                 (probe.extract_features, network, split), (probe.extract_features, network, bad)):
        line = refusal(*call)
        assert "images cannot be read, such as" in line and ".png" in line


def test_test_images_that_cannot_be_read_are_found_before_training(tmp_path, monkeypatch):
    """If the first evaluation found them, its epochs would be lost. If they were then removed, as
    the error asks, the run could not resume: its images would be others."""
    monkeypatch.chdir(tmp_path)
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        write_images(folder, dict.fromkeys(["1.png", "2.png", "3.png", "4.png"], 7))
    Path("val/a/1.png").write_bytes(b"")
    Path("val/b/1.png").write_bytes(b"")
    flags = f"--dataset folder --data . --image-size 72 --arch {ARCH} --out runs/x --device cpu"
    line = refusal(train.main, [*flags.split(), "--method", "moco", "--batch-size", "4"])
    assert "2 of 8 images cannot be read" in line and not Path("runs").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error, words", [
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"), (MemoryError(), "memory"),
    (OSError(errno.EIO, "Input/output error"), "Input/output"), (IndexError(), "remove"),
    (OSError(errno.ESTALE, "Stale handle"), "Stale"), (SyntaxError(), "remove")])
def test_some_errors_are_not_the_images_fault(tmp_path, monkeypatch, capsys, workers, error, words):
    """If a lack of memory or a failing disk counted as an unreadable image, gray images would be
    trained on, and users would remove good files."""
    network = Encoder(ARCH, 8, image_size=72)
    split = red_files(tmp_path, 8)
    monkeypatch.setattr(Image, "open", Mock(side_effect=error))
    with pytest.raises(SystemExit):
        probe.run_command(lambda: probe.extract_features(network, split, CPU, workers))
    probe.end_workers()
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and words in line, "no traceback of a worker"
    assert ("replace or remove" in line) == (words == "remove")


def test_little_shared_memory_is_one_line(tmp_path):
    """If small shared memory, as in Docker, were a traceback, it would hide the two remedies."""
    red_files(tmp_path, 20)
    CORNERS.save(tmp_path / "a" / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    command = (f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} {HERE}/probe.py "
               f"random:{ARCH} --dataset folder --data {tmp_path} --image-size 224 --workers 1 "
               f"--device cpu --out {tmp_path}-out")
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    done = subprocess.run(["unshare", "-rm", "bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--shm-size" in done.stderr and "--workers 0" in done.stderr


def test_batch_norm_is_averaged_over_batches():
    """If statistics lagged behind the weights, all features of a MobileNet would be nearly
    equal."""
    encoder = with_statistics(Encoder("mobilenet_v3_small", 8, image_size=32)).train()
    expected = copy.deepcopy(encoder)
    split = draw_all_shapes(80, 0)
    average = probe.average_batch_norm(encoder, split, images=64)
    assert same(snapshot(encoder), snapshot(expected)) and encoder.training and not average.training
    for module in expected.modules():                           # dropout must stay off
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    x = split.pixels[np.random.default_rng(1).permutation(80)[:64]] / 255
    torch.optim.swa_utils.update_bn(x.split(32), expected)
    for name, value in average.state_dict().items():
        assert torch.allclose(value, expected.state_dict()[name], rtol=1e-3, atol=1e-5), name
    probe.average_batch_norm(encoder, split.subset([3]))        # a single image has no variance


def test_an_evaluation_of_a_part_has_images_of_all_classes(few_shapes):
    """If the first images of a folder, which is sorted by class, were the part, kNN would compare
    with 8 of ImageNet's 1,000 classes."""
    data = load_data("shapes")
    data.train = data.train.subset(data.train.labels.argsort(stable=True))
    network = Encoder(ARCH, image_size=32)
    scores, material = probe.evaluate(network, data, limit=50, linear=False)
    assert [len(part) for part in (*material[:2], *material[2])] == [50] * 4
    assert len(material[0].labels.unique()) > 10 and scores["linear"] is scores["rate"] is None
    again = probe.evaluate(network, data, limit=50, linear=False)[1]
    assert torch.equal(material[0].pixels, again[0].pixels), "the same part in each epoch"


def test_the_backbone_in_an_encoder_file_has_torchvisions_names(tmp_path):
    """Users could not load it into torchvision's network, or would normalize images wrongly."""
    probe.save_encoder(tmp_path / "encoder.pt", Encoder("resnet18"), "made by a test", False)
    file = torch.load(tmp_path / "encoder.pt", weights_only=True)
    network = torchvision.models.resnet18(weights=None)
    result = network.load_state_dict(file["backbone"], strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert file["mean"] + file["std"] == pytest.approx([*IMAGENET_MEAN, *IMAGENET_STD])


def test_the_image_grids_show_the_right_images(tmp_path, few_shapes):
    """If the grid were wrong, README would show other images than the nearest, or mark wrong ones
    as right."""
    pixels = torch.arange(6)[:, None, None, None].repeat(1, 3, 32, 32) * 40
    bank = Split(pixels=pixels.to(torch.uint8), labels=torch.tensor([0, 1, 0, 1, 0, 1]))
    queries = bank.subset([2, 5])
    angles = torch.tensor([[0.0, 0.3, 0.5, 1.2, 2.0, 2.1], [2.0, 0.1, 1.2, 0.5, 0.3, 0.0]])
    both = [(x, x[[2, 5]]) for x in torch.stack([angles.cos(), angles.sin()], dim=2)]
    for queries.labels, signs in ((queries.labels, [0, -1, 1, -1]), (None, [0, 0, 0, 0])):
        probe.save_neighbors(tmp_path / "neighbors.png", bank, queries, both, 32, k=3)
        grid = np.asarray(Image.open(tmp_path / "neighbors.png")).astype(int)
        frames = grid[3::106, 3::106][:4:2, :4]                 # a cell has 96 + 8 + 2 pixels
        first, second = sorted(grid[50::106, 50::106, 0].reshape(2, 2, 4).tolist())
        assert first == [[80, 80, 40, 0], [80, 80, 120, 0]]
        assert second == [[200, 200, 160, 120], [200, 200, 40, 160]]
        assert np.sign(frames[..., 0] - frames[..., 1]).tolist() == [signs, signs], "red - green"
    data = load_data("shapes")
    cfg = make_cfg("--seed", "3")
    probe.save_views(tmp_path / "views.png", data, cfg, columns=2, count=2)
    grid = torch.tensor(np.asarray(Image.open(tmp_path / "views.png"))).permute(2, 0, 1) / 255
    for row, image in enumerate(data.train.pixels[:2]):
        [view] = augment(image[None], uniforms(3, 0, [row]), 32, cfg.crop_scale, cfg.blur)
        for column, expected in enumerate([image / 255, view]):
            tile = grid[:, 7 + 106 * row:, 7 + 106 * column:][:, :96:3, :96:3]
            assert (tile - expected).abs().max() < 2 / 255
