"""Train by one of two variants of SEED. The other flags are those of train.py.

    python assets/variants.py regression
    python assets/variants.py student_queue

The run is in runs/regression or runs/student_queue, unless --out names another folder. The results
are in RESULTS.md, section 4.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from probe import run_command
from seed import SEED, InputError


class Regression(SEED):
    """The loss is the squared distance between z_s and z_t: neither queue nor temperatures."""

    def loss(self, z_s, z_t):
        return (z_s - z_t).square().sum(dim=1).mean()


class StudentQueue(SEED):
    """The queue contains the student's earlier embeddings. The own entry is still z_t."""

    def forward(self, views):
        self.z_s = super().forward(views)
        return self.z_s

    def after_step(self, z_t):
        self.queue.enqueue(self.z_s.detach())


VARIANTS = dict(regression=Regression, student_queue=StudentQueue)


def main(argv):
    if not argv or argv[0] not in VARIANTS:
        raise InputError(f"name a variant first: {' or '.join(VARIANTS)}")
    name, *flags = argv
    train.SEED = VARIANTS[name]
    train.METHODS["seed"] = name.replace("_", " ")              # in the table
    train.main(["--out", f"runs/{name}", *flags])               # not the folder of a run of SEED


if __name__ == "__main__":                      # a worker process imports this file
    run_command(lambda: main(sys.argv[1:]))
