"""Does a MoCo-v2 run recognize images, or does it tell new keys from old ones?

    python assets/key_age.py RUN            # the folder of a run with --method moco

The keys in the queue are up to K/B steps old, and the key encoder has moved since then. A query can
find its own key among them only by its age. This program computes the numbers of the run once more
with the same images in the queue, whose keys today's key encoder computes again. The agreement that
remains is recognition.
"""
import argparse
import copy
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from probe import average_batch_norm, load_data
from seed import info_nce

CPU = torch.device("cpu")


@torch.no_grad()
def measure(method, cfg, data, step, renew):
    """Return the loss and the top-1 agreement (percent) over the next eight batches."""
    views = train.view_plan(cfg)
    if renew:
        before = range(step - cfg.queue_size // cfg.batch_size, step)
        earlier = train.batches(data.train, cfg, CPU, views, before)
        keys = [method.targets(batch.views) for batch in earlier]
        method.queue.features = torch.cat(keys)                 # [K, D], the same images
    found = []
    for batch in train.batches(data.train, cfg, CPU, views, range(step, step + 8)):
        key = method.targets(batch.views)                       # [B, D]
        query = method(batch.views)                             # [B, D]
        loss = info_nce(query, key, method.queue.features, cfg.tau_s)
        found.append([loss, 100 * method.diagnostics(query, key)["top1_agreement"]])
    return torch.tensor(found).mean(0).tolist()


run = Path(sys.argv[1])
cfg = argparse.Namespace(**json.loads((run / "args.json").read_text()))
data = load_data(cfg.dataset, cfg.data, cfg.image_size, cfg.subset, cfg.seed)
_, method = train.build(cfg, data, CPU)
saved = torch.load(run / "last.pt", weights_only=True)
method.load_state_dict(saved["method"])
for mode in ("training", "evaluation"):
    for keys in ("the queue's keys", "keys computed again"):
        copied = copy.deepcopy(method)
        if mode == "evaluation":
            copied.encoder = average_batch_norm(method.encoder, data.train)
            copied.key_encoder = average_batch_norm(method.key_encoder, data.train)
        loss, agreement = measure(copied, cfg, data, saved["step"], keys == "keys computed again")
        print(f"{mode:10s}  {keys}:  loss {loss:.2f}  top-1 agreement {agreement:.1f}%", flush=True)
