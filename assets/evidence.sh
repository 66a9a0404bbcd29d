# The CIFAR-10 tables of README and RESULTS.md, from an installed checkout:  sh assets/evidence.sh DIR
# DIR is to hold CIFAR-10 as image files, train/CLASS and val/CLASS; it is made if it is not there (the tables were made
# from JPEG files, so expect small differences).  Two CPU cores need some three hours (an estimate; it was not run in one go).
# With a GPU: drop `--subset 10000` and `--precision fp32`, and give the teacher 200 epochs and the students 100, with --small-images.
set -e
[ -d "$1" ] || { rm -rf "$1.part"; python - "$1.part" <<'END'
import pathlib, sys
from torchvision.datasets import CIFAR10
for split in ("train", "val"):
    data = CIFAR10("data", train=split == "train", download=True)
    for i, (image, label) in enumerate(data):
        folder = pathlib.Path(sys.argv[1], split, data.classes[label])
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:05d}.png")
END
mv "$1.part" "$1"; }
run="python train.py --dataset folder --data $1 --image-size 32 --subset 10000 --precision fp32"
teacher="--teacher runs/evidence/teacher/encoder.pt"

# a teacher without labels; then two students, each by SEED, by MoCo-v2 and with labels
$run --method moco --arch resnet18 --epochs 60 --eval-every 10 --out runs/evidence/teacher
$run $teacher --arch mobilenet_v3_large --epochs 20 --compare --eval-every 4 --out runs/evidence/mobilenet_v3_large
$run $teacher --arch efficientnet_b0 --epochs 10 --compare --eval-every 5 --out runs/evidence/efficientnet_b0

# ablations: one thing changed at a time.  --seed also chooses the 10,000 images, so for 1 and 2 they are not those of
# the teacher.  Of these, K and the head were run with seed 0 alone, seed 2 not at all; the temperatures once more with
# --lr 0.4 and all three seeds; all without the closing table.
for seed in 0 1 2; do
    short="$run $teacher --epochs 4 --eval-every 4 --seed $seed --teacher-cache runs/evidence/cache-$seed"
    $short --out runs/evidence/ablation-$seed/base
    for tau_t in 0.0001 0.01 0.04 0.1; do $short --tau-t $tau_t --out runs/evidence/ablation-$seed/tau_t-$tau_t; done
    for queue in 256 4096; do $short --queue-size $queue --out runs/evidence/ablation-$seed/queue-$queue; done
    $short --hidden-dim 2048 --out runs/evidence/ablation-$seed/head-2048
done
