# Most tables of README, RESULTS.md and ANSWERS.md, from an installed checkout, in the order of RESULTS.md.
#     sh assets/evidence.sh DIR            all of them: an estimated twenty hours on one CPU core
#     sh assets/evidence.sh DIR images     only write the images
# DIR receives CIFAR-10 as image files, train/CLASS and val/CLASS. The tables were made from JPEG files, so expect small
# differences. The script was not run in one go: two processes with one thread each (OMP_NUM_THREADS=1) ran side by side.
# RESULTS.md says what was not run. Not here: small crops, a published teacher, the toy, short runs of MoCo-v2, and on 10,000
# images the labeled teacher and SEED's repetition. Shapes had two threads in section 1, and other teachers in section 4.
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

out=runs/evidence
student="$run --arch mobilenet_v3_large --epochs 8 --eval-every 2"
trained="--teacher $out/teacher/encoder.pt"
random="--teacher $out/random-teacher/encoder.pt"
before="--lr 0.06 --tau-s 0.2"                                  # MoCo-v2's recipe before question 2

# Two teachers: by MoCo-v2, and of random weights.
$run --method moco --arch resnet18 --lr 0.06 --epochs 24 --eval-every 6 --out $out/teacher
$run --method moco --arch resnet18 --max-steps 1 --lr 1e-9 --out $out/random-teacher

# 1. Is it luck? Three seeds, and MoCo-v2 with the epochs of teacher and student together.
for seed in 0 1 2; do
    $student --seed $seed $trained --teacher-cache $out/cache-$seed --out $out/seed-$seed
    $student --seed $seed $random --out $out/from-random-$seed
    $student --seed $seed --method moco --out $out/moco-$seed
    $student --seed $seed --method supervised --out $out/labels-$seed
done
$run --method moco $before --arch mobilenet_v3_large --epochs 32 --eval-every 8 --out $out/moco-32
for seed in 0 1 2; do
    torchrun train.py --arch mobilenet_v3_large --seed $seed --out $out/shapes-$seed/default
done
torchrun train.py --arch mobilenet_v3_large --compare --out $out/shapes-compare

# 2. Were the settings chosen on the test images? A tenth of the training images is held out. The last kNN in log.csv counts.
tune="python train.py --dataset folder --data $1/train --image-size 32 --precision fp32 --arch mobilenet_v3_large"
tune="$tune --epochs 2 --eval-every 1"
for lr in 0.03 0.06 0.12; do
    for tau in 0.1 0.2; do $tune --method moco --lr $lr --tau-s $tau --out $out/tune-moco-$lr-$tau; done
done
for lr in 0.05 0.1 0.2; do
    for tau_t in 0.05 0.1; do
        $tune $trained --teacher-cache $out/cache-tune --lr $lr --tau-t $tau_t --out $out/tune-seed-$lr-$tau_t
    done
done
# Both had their best result at the edge of the learning rates, so each has one more run.
$tune --method moco --lr 0.015 --tau-s 0.1 --out $out/tune-moco-0.015-0.1
$tune $trained --teacher-cache $out/cache-tune --lr 0.4 --out $out/tune-seed-0.4-0.05

# 3. What does the trained teacher add?
long="$run --arch mobilenet_v3_large --epochs 24 --eval-every 4"
$run --method supervised --arch resnet18 --epochs 24 --eval-every 6 --out $out/labeled-teacher
$long $trained --out $out/long-trained
$long $random --out $out/long-random
$long --teacher $out/labeled-teacher/encoder.pt --out $out/long-labeled

# 4. What matters in the loss? On CIFAR-10, then on shapes.
$student $trained --teacher-cache $out/cache-0 --queue-size 16 --out $out/queue-16
for tau_t in 0.0001 0.3; do
    $student $trained --teacher-cache $out/cache-0 --tau-t $tau_t --out $out/tau_t-$tau_t
done
for variant in regression student_queue; do
    python assets/variants.py $variant ${student#python train.py} $trained --teacher-cache $out/cache-0 --out $out/$variant
done
python assets/variants.py student_queue ${student#python train.py} --seed 1 $trained --teacher-cache $out/cache-1 \
    --out $out/student_queue-1
for seed in 0 1 2; do
    shapes="--arch mobilenet_v3_large --seed $seed"
    for queue in 16 256; do python train.py $shapes --queue-size $queue --out $out/shapes-$seed/queue-$queue; done
    for tau_t in 0.0001 0.3; do python train.py $shapes --tau-t $tau_t --out $out/shapes-$seed/tau_t-$tau_t; done
    for variant in regression student_queue; do
        python assets/variants.py $variant $shapes --out $out/shapes-$seed/$variant
    done
    [ $seed = 0 ] || python assets/variants.py student_queue $shapes --tau-t 0.0001 --out $out/shapes-$seed/both
done

# Other runs: 10,000 images. (The rows of untrained networks: probe.py random:ARCH.)
run="$run --subset 10000"
teacher="--teacher $out/teacher-10000/encoder.pt"
$run --method moco $before --arch resnet18 --epochs 60 --eval-every 10 --out $out/teacher-10000
for arch in mobilenet_v3_large efficientnet_b0; do
    few="$run --arch $arch --epochs 20 --eval-every 4"
    [ $arch = efficientnet_b0 ] && few="$run --arch $arch --epochs 10 --eval-every 5"
    $few --lr 0.1 $teacher --out $out/$arch
    $few --method moco $before --out $out/$arch/moco
    $few --method supervised --out $out/$arch/supervised
done

# Ablations: one change at a time. --seed also chooses the 10,000 images, so those of seed 1 are not the teacher's.
# (cifar10-ablation.csv has more rows, at other learning rates.)
for seed in 0 1; do
    short="$run $teacher --lr 0.1 --epochs 4 --eval-every 4 --seed $seed --teacher-cache $out/cache-10000-$seed"
    $short --out $out/ablation-$seed/base
    for tau_t in 0.0001 0.01 0.04 0.1; do $short --tau-t $tau_t --out $out/ablation-$seed/tau_t-$tau_t; done
    [ $seed = 0 ] || continue                                   # K and the head: one seed
    for queue in 256 4096; do $short --queue-size $queue --out $out/ablation-$seed/queue-$queue; done
    $short --hidden-dim 2048 --out $out/ablation-$seed/head-2048
done
