# The tables of README, RESULTS.md and ANSWERS.md, from an installed checkout.
#     sh assets/evidence.sh DIR            all of them: an estimated eight hours on two CPU cores
#     sh assets/evidence.sh DIR images     only write the images
# DIR receives CIFAR-10 as image files, train/CLASS and val/CLASS. The tables were made from JPEG files, so expect small
# differences. The script was not run in one go: the first part ran as two processes with one thread each.
# With a GPU, omit `--precision fp32`, give the teacher 200 epochs and the students 100, and add --small-images.
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
[ "$2" = images ] && exit
run="python train.py --dataset folder --data $1 --image-size 32 --precision fp32"

# README's table: a teacher without labels; students by SEED, by MoCo-v2 and with labels; MoCo-v2 with the epochs of
# teacher and student together.
student="$run --arch mobilenet_v3_large --epochs 8 --eval-every 2"
teacher="--teacher runs/evidence/teacher/encoder.pt"
$run --method moco --arch resnet18 --tau-s 0.1 --epochs 24 --eval-every 6 --out runs/evidence/teacher
$student $teacher --compare --teacher-cache runs/evidence/cache --out runs/evidence/seed
$run --method moco --arch mobilenet_v3_large --epochs 32 --eval-every 8 --out runs/evidence/moco-32

# Two ablations: a queue of 16, and a teacher with random weights.
$student $teacher --teacher-cache runs/evidence/cache --queue-size 16 --out runs/evidence/queue-16
$run --method moco --arch resnet18 --max-steps 1 --lr 1e-9 --out runs/evidence/random
$student --teacher runs/evidence/random/encoder.pt --out runs/evidence/random-teacher

# Shapes: the default run, and one change at a time (README, RESULTS.md, ANSWERS.md).
for seed in 0 1 2; do
    shapes="--arch mobilenet_v3_large --seed $seed"
    torchrun train.py $shapes --out runs/evidence/shapes-$seed/default
    for queue in 16 256; do python train.py $shapes --queue-size $queue --out runs/evidence/shapes-$seed/queue-$queue; done
    for tau_t in 0.0001 0.3; do python train.py $shapes --tau-t $tau_t --out runs/evidence/shapes-$seed/tau_t-$tau_t; done
    for variant in regression student_queue; do
        python assets/variants.py $variant $shapes --out runs/evidence/shapes-$seed/$variant
    done
    python assets/variants.py student_queue $shapes --tau-t 0.0001 --out runs/evidence/shapes-$seed/both
done

# RESULTS.md's tables of 10,000 images. (The rows of untrained networks: probe.py random:ARCH.)
run="$run --subset 10000"
teacher="--teacher runs/evidence/teacher-10000/encoder.pt"
$run --method moco --arch resnet18 --epochs 60 --eval-every 10 --out runs/evidence/teacher-10000
$run $teacher --arch mobilenet_v3_large --epochs 20 --compare --eval-every 4 --out runs/evidence/mobilenet_v3_large
$run $teacher --arch efficientnet_b0 --epochs 10 --compare --eval-every 5 --out runs/evidence/efficientnet_b0

# Ablations: one change at a time. --seed also chooses the 10,000 images, so those of seeds 1 and 2 are not the teacher's.
# Not all of these were run: K and the head only with seed 0, and seed 2 only with --lr 0.4, for the temperatures.
for seed in 0 1 2; do
    short="$run $teacher --epochs 4 --eval-every 4 --seed $seed --teacher-cache runs/evidence/cache-$seed"
    $short --out runs/evidence/ablation-$seed/base
    for tau_t in 0.0001 0.01 0.04 0.1; do $short --tau-t $tau_t --out runs/evidence/ablation-$seed/tau_t-$tau_t; done
    for queue in 256 4096; do $short --queue-size $queue --out runs/evidence/ablation-$seed/queue-$queue; done
    $short --hidden-dim 2048 --out runs/evidence/ablation-$seed/head-2048
done
