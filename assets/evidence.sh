# The CIFAR-10 tables of the README, from an installed checkout:  sh assets/evidence.sh DIR
# DIR holds CIFAR-10 as picture files, train/CLASS and val/CLASS.  Two CPU cores need about two hours.
# With a GPU take the rest of the pictures too: drop --subset, and 200 epochs for the teacher and 100 for the students.
set -e
run="python train.py --dataset folder --data $1 --image-size 32 --subset 10000"

# the teacher, without labels; then two students, each by SEED, by MoCo-v2 and with labels
$run --method moco --arch resnet18 --epochs 60 --eval-every 10 --out runs/evidence/teacher
for arch in mobilenet_v3_large efficientnet_b0; do
    $run --arch $arch --teacher runs/evidence/teacher/encoder.pt --compare --eval-every 4 --out runs/evidence/$arch
done

# ablations at 6 epochs: one thing changed at a time, three seeds
for seed in 0 1 2; do
    short="$run --epochs 6 --eval-every 6 --seed $seed --teacher runs/evidence/teacher/encoder.pt
           --teacher-cache runs/evidence/cache-$seed --out runs/evidence/ablation-$seed"
    for tau_t in 0.0001 0.01 0.04 0.1; do $short/tau_t-$tau_t --tau-t $tau_t; done
    for queue in 256 4096; do $short/queue-$queue --queue-size $queue; done
    $short/head-2048 --hidden-dim 2048
done
