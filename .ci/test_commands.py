"""The commands as users type them: bad input, any list of arguments, README, seed.py alone."""
import ast
import collections
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import probe
import seed
import train
from probe import load_data, load_teacher, save_encoder
from seed import Encoder, TinyNetwork
from test_seed import (ARCH, HERE, TINY, draw_all_shapes, make_cfg, refusal, spy,
                       write_images)

PROGRAMS = {"train.py": train, "probe.py": probe}
LEAST = {train: [], probe: ["x.pt"]}    # the arguments that a program must have


def flags_of(program):
    """Return argparse's action for each flag of a program: a dict."""
    with pytest.MonkeyPatch.context() as patch:
        calls = spy(patch, probe.Parser, "parse_args")
        program.parse_args(LEAST[program])
    actions = calls[0][0][0]._actions
    return {action.option_strings[0]: action for action in actions if action.option_strings}


def is_number(action):
    return getattr(action.type, "__name__", "") in ("int", "float")


@pytest.fixture
def inputs(tmp_path, monkeypatch, few_shapes, teacher_file):
    """The working directory: a teacher, images with and without labels, and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(teacher_file, "teacher.pt")
    Path("notes.txt").write_text("of a user")
    write_images("images", {f"{'ab'[i % 2]}/{i:02d}.png": 6 * i for i in range(40)})
    write_images("flat", {f"{i:02d}.png": 6 * i for i in range(40)})
    return tmp_path


FOLDER = "--dataset folder --image-size 32 --batch-size 8 --data"
BAD_INPUT = [
    ("train.py --arch mobilenet_v3", "did you mean .*mobilenet_v3_large"),
    ("train.py --arch vit_b_16", "vit_b_16 does not turn images of 32 px"),
    ("train.py --arch vgg11 --small-images", "vgg11 has no stem"),
    ("train.py --teacher nothing.pt", "no such file: nothing.pt"),
    ("train.py --teacher notes.txt", "cannot read notes.txt"),
    ("train.py --teacher teacher.pt --dim 8", "--dim 8: the teacher's embeddings have 32"),
    ("train.py --teacher teacher.pt --teacher-std 0 0 0", "--teacher-std: must be from"),
    ("train.py --teacher teacher.pt --teacher-arch resnet18", "no complete resnet18"),
    ("train.py --teacher-arch nothing", "unknown network 'nothing'"),
    ("train.py --dataset folder --data nowhere", "no directory .*nowhere"),
    ("train.py --dataset imagenet --data .", "train/ and val/"),
    (f"train.py {FOLDER} images --out images/run", "is among the images of images"),
    (f"train.py {FOLDER} flat --method supervised", "flat has no labels to train with"),
    (f"train.py {FOLDER} flat --teacher-method supervised", "flat has no labels to train with"),
    (f"train.py {FOLDER} flat --label-fraction 0.5", "have no labels"),
    ("train.py --batch-size 6000", "--batch-size 6000: there are 250 training images"),
    ("train.py --batch-size 1", "--batch-size: must be from 2 to .*, got 1"),
    ("train.py --subset 6000", "--subset 6000: there are 250"),
    ("train.py --label-fraction 0", "--label-fraction: must be from .* to 1, got 0"),
    ("train.py --method sed", "--method: invalid choice: 'sed'"),
    ("train.py --method moco --teacher-cache cache", "--teacher-cache is only for --method seed"),
    ("train.py --method linear", "name its file with --init"),
    ("train.py --teacher=", "value of a flag is empty"), ("train.py --out=", "value of a flag is"),
    ("train.py --method moco --init teacher.pt --arch resnet18", "no complete resnet18"),
    ("train.py --out notes.txt/run", "cannot make the folder notes.txt/run"),
    ("train.py --device cuda:99", "no device 'cuda:99' here; use --device .*cpu"),
    ("probe.py", "required: encoder"),
    ("probe.py nothing.pt", "no such file: nothing.pt"),
    ("probe.py random:vit_b_16", "vit_b_16 does not turn images of 32 px"),
    ("probe.py teacher.pt --arch resnet18", "no complete resnet18"),
    ("probe.py teacher.pt --std 0 0 0", "--std: must be from"),
    ("probe.py teacher.pt --dataset folder --data images --out images", "is among the images"),
    ("probe.py teacher.pt --out notes.txt", "cannot make the folder notes.txt"),
    ("probe.py teacher.pt --device tpu", "no device 'tpu' here")]


@pytest.mark.parametrize("line, words", BAD_INPUT)
def test_bad_input_is_an_error_before_any_work(inputs, line, words):
    """If bad input were found late, hours of training would be lost, or the next run would be
    refused."""
    program, *flags = line.split()
    flags[:0] = ["--device=cpu", "--max-steps=1"] if program == "train.py" else ["--device=cpu"]
    before = set(inputs.rglob("*"))
    assert re.search(words, refusal(PROGRAMS[program].main, flags))
    assert set(inputs.rglob("*")) == before


@pytest.mark.parametrize("program", [train, probe])
@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "x", "", "-1"])
def test_what_is_no_number_or_out_of_range_is_refused(program, text):
    """If `nan` were accepted, a run would diverge at once, and the message would advise another
    --lr."""
    for flag, action in flags_of(program).items():
        if is_number(action) and not (action.nargs and text == "-1"):
            values = [f"{flag}={text}"] if not action.nargs else [flag, text, text, text]
            line = refusal(program.parse_args, [*LEAST[program], *values])
            assert line.startswith(f"argument {flag}: "), line


def test_numbers_that_may_be_zero_may_be_zero():
    """If 0 were refused, nobody could train without weight decay, or without evaluations."""
    names = "weight-decay warmup-epochs hidden-dim workers eval-every seed save-minutes".split()
    cfg = vars(make_cfg(*[f"--{name}=0" for name in names]))
    assert [cfg[name.replace("-", "_")] for name in names] == [0] * len(names)


@pytest.mark.parametrize("program", [train, probe])
def test_help_names_each_flag(capsys, program):
    """If a help text had a bare %, `--help` would be an error."""
    with pytest.raises(SystemExit) as ended:
        program.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and all(flag in printed for flag in flags_of(program))


NUMBERS = ("0 1 2 3 8 16 24 32 48 64 7 33 97 1 2 8 16 32 -1 1e-3 0.05 0.3 1.5 1e9 -1e9 nan 1e-400 "
           "99999999999999999999 18446744073709551616 x 1_0")
WORDS = f"""method seed moco supervised linear finetune byol
    precision fp32 bf16 auto fp64
    device cpu tpu
    dataset shapes folder imagenet cifar
    arch {ARCH} resnet18 mobilenet_v3_small squeezenet1_0 resnet18w2 nothing
    teacher teacher.pt nothing.pt images notes.txt hub:images:x http://localhost:1/x
    teacher-arch {ARCH} nothing
    teacher-method moco supervised seed
    teacher-prefix backbone. x.
    data images flat nothing notes.txt .
    out run notes.txt images/run notes.txt/x
    init teacher.pt nothing.pt notes.txt
    teacher-cache cache notes.txt
    small-images\n no-small-images\n compare\n unknown""".split("\n")


def draw_flags(rng, numbers):
    """Return random arguments of train.py; most of them fit together."""
    flags = [*TINY, *"--max-steps 1 --workers 0 --out run --save-minutes 0".split()]
    flags += ["--arch", ARCH, "--teacher-arch", ARCH]
    for is_word in rng.random(rng.integers(1, 4)) < 0.5:
        name, *values = str(rng.choice(WORDS if is_word else numbers)).split()
        flags.append("=".join([f"--{name}", *rng.choice(values or [""], 1)]).rstrip("="))
    return flags


def test_any_list_of_arguments_runs_or_is_one_line(inputs, monkeypatch, capsys):
    """If some list of arguments gave a traceback, it would tell a user nothing, perhaps after
    hours."""
    monkeypatch.setattr(train, "print_table", lambda *args: None)
    rng = np.random.default_rng(0)
    numbers = [f"{flag[2:]} {NUMBERS}" for flag, action in flags_of(train).items()
               if is_number(action) and not (action.nargs or flag == "--workers")]
    ended = collections.Counter()
    for _ in range(150):
        flags = draw_flags(rng, numbers)
        code = 0
        try:
            probe.run_command(lambda: train.main(flags))
        except SystemExit as e:
            code = e.code
        except Exception as e:
            pytest.fail(f"{' '.join(flags[26:])}: {e!r}")
        ended[code] += 1
        error = capsys.readouterr().err
        assert error.count("\n") == (code > 0) and len(error) < 700, (flags[26:], error)
        shutil.rmtree("run", ignore_errors=True)
    assert min(ended[0], ended[2]) > 30 and set(ended) <= {0, 1, 2}, ended


MAY_CHANGE = ("workers 3, data x, out x, teacher x, init x, eval-every 3, max-steps 3, compare, "
              "compile, profile, teacher-cache x, precision bf16, save-minutes 3, device x")
OTHERS = ("method moco, arch x, dataset cifar10, warmup-epochs 0, image-size 40, teacher-arch x, "
          "label-fraction 0.5, small-images, teacher-prefix x, teacher-method moco, "
          "teacher-mean 0 0 0, teacher-std 2 2 2")


def test_another_setting_is_another_run_unless_it_may_change(few_shapes, tmp_path):
    """If a run resumed with another setting, half of it would be another experiment. If it did not
    resume on a machine with other cores or disks, it would be lost."""
    data = load_data("shapes", subset=8)
    saved = tmp_path / "args.json"
    saved.write_text(json.dumps(train.run_identity(make_cfg(), data)))
    may_change = MAY_CHANGE.split(", ")
    lines = may_change + OTHERS.split(", ")
    named = ["-h", *[line.split()[0] for line in lines]]
    flags = [flag.removeprefix("--") for flag in flags_of(train)]
    for line in [*lines, *[f"{flag} 9" for flag in flags if flag not in named]]:
        args = train.parse_args(f"--{line}".split())
        other = train.run_identity(train.make_config(args, args.method), data)
        assert (train.differences(saved, other) == "") == (line in may_change), line


def test_workers_are_shared_among_the_processes_of_a_node(monkeypatch):
    """If processes did not share the cores, eight of them would start eight times too many
    workers."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    assert make_cfg().workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make_cfg().workers == probe.parse_args(["x"]).workers == 3, "of 12 that may be used"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert make_cfg().workers == 1
    monkeypatch.delattr(os, "sched_getaffinity")                # macOS
    assert make_cfg().workers == 4


def blocks_of_readme(name="README.md"):
    """Return the shell code in README, or in another text."""
    text = (HERE / name).read_text()
    return "".join(block.split("```")[0] for block in text.split("```sh\n")[1:])


def commands_of_tops():
    """Return the shell code at the tops of our programs, with a folder of ImageNet that exists."""
    tops = f"{train.__doc__}\n{probe.__doc__}".replace("\\\n", "").replace("/imagenet", "DIR")
    return "\n" + "\n".join(re.findall("^    ((?:python|torchrun) .*)$", tops, re.M))


def commands_in(text):
    """Return the commands of our programs in shell code: lists of the program and its words."""
    found = []
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and re.match(r"\w+=", words[0]):
            name, _, variables[name] = words[0].partition("=")
        for program in set(words) & set(PROGRAMS):
            words = words[words.index(program):]
            ends = [i for i, word in enumerate(words) if word in ("&&", ";", "|", ">", "&")]
            found.append(words[:min(ends, default=None)])
    return found


def test_each_printed_command_is_understood():
    """If a printed command had a wrong flag, users would copy it."""
    blocks = blocks_of_readme()
    subprocess.run(["bash", "-n"], input=blocks, text=True, check=True)
    for name in re.findall(r"\S+\.(?:py|sh|txt)\b", blocks):
        assert (HERE / name).exists(), name
    tops = commands_of_tops()
    assert len(commands_in(blocks)) >= 8 and len(commands_in(tops)) >= 4
    for program, *words in commands_in(f"{blocks}{tops}\n{blocks_of_readme('assets/LAB.md')}"):
        args = PROGRAMS[program].parse_args(words)
        if program == "train.py":
            train.make_config(args, args.method)


def test_readmes_commands_run(inputs, monkeypatch, capsys):
    """If a command of README, or at the top of a file, failed, the first thing that a user tries
    would fail."""
    for folder in ("DIR/train", "DIR/val", "home/images"):
        write_images(folder, {f"{'ab'[i % 2]}/{i:02d}.png": 6 * i for i in range(24)})
    monkeypatch.setenv("HOME", str(inputs / "home"))
    splits = [draw_all_shapes(100, split) for split in (0, 1)]
    monkeypatch.setattr(probe, "read_cifar", lambda *args: (*splits, probe.SHAPE_CLASSES))
    monkeypatch.setattr(probe, "download", lambda url: "teacher.pt")
    shorter = ("--epochs 1 --teacher-epochs 1 --max-steps 2 --batch-size 8 --image-size 32 "
               "--workers 0 --device cpu").split()
    first = None
    for name in ("encoder.pt", "moco_v2_800ep_pretrain.pth.tar"):
        shutil.copy("teacher.pt", name)
    for program, *words in commands_in(blocks_of_readme() + commands_of_tops()):
        if program == "probe.py":
            probe.main([*words, "--device", "cpu", "--workers", "0"])
            assert "kNN" in capsys.readouterr().out
            continue
        args = train.parse_args([*words, *shorter])
        out = Path(train.make_config(args, args.method).out)
        train.main([*words, *shorter])
        assert (out / "encoder.pt").exists()
        first = first or json.loads((out / "results.json").read_text())
    names = ["mobilenet_v3_large, untrained", "resnet18, the teacher", "mobilenet_v3_large by SEED"]
    assert [row["name"] for row in first] == names
    assert [row["labels"] for row in first] == ["no", "yes", "by its teacher"]


FEW_IMAGES = """
import torchvision
from PIL import Image
class CIFAR10(list):
    classes = ["cat", "dog"]
    def __init__(self, root, train, download):
        super().__init__([(Image.new("RGB", (32, 32)), i % 2) for i in range(4 if train else 2)])
torchvision.datasets.CIFAR10 = CIFAR10
"""


def test_the_images_for_readmes_table_are_written(tmp_path):
    """If this command failed, no row of the table could be reproduced."""
    (tmp_path / "sitecustomize.py").write_text(FEW_IMAGES)              # instead of a download
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(["sh", HERE / "assets/evidence.sh", tmp_path / "DIR", "images"], check=True,
                   env=dict(os.environ, PYTHONPATH=str(tmp_path), PATH=path))
    found = sorted(str(p.relative_to(tmp_path / "DIR")) for p in (tmp_path / "DIR").rglob("*.png"))
    assert found == [*(f"train/{'cat' if i < 2 else 'dog'}/{n:05d}.png" for i, n in
                       enumerate((0, 2, 1, 3))), "val/cat/00000.png", "val/dog/00001.png"]


def test_the_variants_of_the_lab_are_trained(inputs, monkeypatch):
    """If plain SEED were trained instead, the lab would conclude that the variants are as good."""
    variants = runpy.run_path(str(HERE / "assets/variants.py"))
    monkeypatch.setattr(train, "SEED", train.SEED)              # restored afterwards
    monkeypatch.setitem(train.METHODS, "seed", "SEED")
    student = TinyNetwork(hidden=8)
    z_t = F.normalize(torch.randn(4, student.dim), dim=1)
    regression = variants["Regression"](student, TinyNetwork(hidden=8), queue_size=8)
    z_s = regression([torch.randn(4, 32)])
    distance = 2 - 2 * F.cosine_similarity(z_s, z_t).mean()
    torch.testing.assert_close(regression.loss(z_s, z_t), distance)
    student_queue = variants["StudentQueue"](student, TinyNetwork(hidden=8), queue_size=8)
    z_s = student_queue([torch.randn(4, 32)])
    student_queue.after_step(z_t)
    assert torch.equal(student_queue.queue.features[:4], z_s) and z_s.requires_grad
    lab = re.findall(r"^python assets/variants.py (.*)", blocks_of_readme("assets/LAB.md"), re.M)
    assert {line.split()[0] for line in lab} == set(variants["VARIANTS"])
    for name, *flags in map(str.split, lab):
        variants["main"]([name, *flags, *"--teacher teacher.pt --max-steps 1 --subset 48 "
                          "--batch-size 8 --workers 0 --device cpu".split()])
        *_, row = json.loads(Path("runs", name, "results.json").read_text())
        assert row["name"].endswith(f"by {name.replace('_', ' ')}")
        assert train.SEED is variants["VARIANTS"][name]
    assert "regression or student_queue" in refusal(variants["main"], ["regresion"])


def test_seed_py_needs_nothing_but_itself(tmp_path):
    """If seed.py needed another file, nobody could copy it alone."""
    shutil.copy(HERE / "seed.py", tmp_path)
    done = subprocess.run([sys.executable, "seed.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "step 300" in done.stdout
    assert os.listdir(tmp_path) == ["seed.py"]
    modules = set()
    for node in ast.walk(ast.parse(Path(seed.__file__).read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    allowed = {"torch", "torchvision", "numpy", "math", "copy", "difflib", "dataclasses"}
    assert "torch" in modules <= allowed, "nothing that handles files"


def test_the_code_stays_plain():
    """If lines or functions grew long, readers would not find the method among them."""
    for name in ("seed.py", "probe.py", "train.py"):
        source = (HERE / name).read_text()
        for number, line in enumerate(source.splitlines(), 1):
            assert len(line) <= 100, f"{name}:{number}"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{name}: {node.name}"


@pytest.mark.parametrize("words, folder, printed", [
    ("run/encoder.pt --subset 200", "run", f"{ARCH}, a test, matched "),
    (f"random:{ARCH} --subset 200 --out here", "here", f"{ARCH}, random weights, without labels"),
    ("run/encoder.pt --dataset folder --data flat --out no", "no", "no labels, so no accuracy")])
def test_probe_evaluates_a_file_and_an_untrained_network(inputs, capsys, words, folder, printed):
    """If there were no row of an untrained network, nobody could tell what an accuracy means.
    Images without labels must not be an error."""
    os.mkdir("run")
    shutil.move("teacher.pt", "run/encoder.pt")
    probe.main([*words.split(), "--device", "cpu", "--workers", "0"])
    assert printed in capsys.readouterr().out
    found = json.loads(Path(folder, "probe.json").read_text())
    assert found["encoder"] == words.split()[0] and found["used_labels"] is False
    if folder == "no":
        assert found["knn"] is found["linear"] is None
    else:
        assert 0 < found["knn"] < 40 and 0 < found["linear"] < 60
    assert Path(folder, "probe.png").exists()


def test_probe_uses_the_image_size_of_the_training_unless_it_is_given(inputs):
    """If probe.py used 224 px, a network for 32 px would be judged at another size."""
    def size(words):
        return probe.load_encoder(probe.parse_args(words.split())).image_size

    assert size("teacher.pt") == 32
    assert size("teacher.pt --image-size 48") == 48
    assert size(f"random:{ARCH} --dataset folder") == 224


def test_readmes_detector_sees_the_encoders_features(tmp_path, monkeypatch):
    """If batch norm had another epsilon than the student's, the detector would start from other
    feature maps. If its anchors did not fit, the first image would be an error."""
    monkeypatch.chdir(tmp_path)
    encoder = Encoder("mobilenet_v3_large", image_size=64)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1e-4, 1e-2)             # so small that the epsilon counts
    save_encoder("encoder.pt", encoder, "a test", False)
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    [block] = [block.split("```")[0] for block in blocks if "fasterrcnn" in block]
    names = {}
    exec(block, names)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = load_teacher("encoder.pt").backbone.features(x)
        maps = names["detector"].backbone.body.eval()(x)
    found = [value for value in maps.values() if value.shape == expected.shape]
    assert (found[-1] - expected).norm() < 1e-4 * expected.norm()
    target = dict(boxes=torch.tensor([[5.0, 5.0, 50.0, 50.0]]), labels=torch.tensor([1]))
    losses = names["detector"].train()([x[0], x[0]], [target, target])
    sum(losses.values()).backward()
    assert names["detector"].eval()([x[0]])[0].keys() == {"boxes", "labels", "scores"}
