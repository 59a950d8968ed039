#!/usr/bin/env python3
"""How well drawn masks can be told from real ones: the AUC of a small classifier, on photos it has not seen.

    python3 scripts/mask_gap.py --maskinv target/release/maskinv --detector yunet.onnx mask_worn

MASK_WORN has the folders with_mask/ and without_mask/ of photos whose names are numbers. Masks are drawn on the photos
without one, and both kinds of photo are then cropped alike, by the detector. A classifier learns from photos with even
numbers and is measured on those with odd ones. It sees the crop below the eyes. The two folders show other people in
other places; what that alone gives away is measured too, as the AUC of a classifier that sees the crops above the eyes
only. 0.5 is a guess, 1 is no doubt. PyTorch 2.15, OpenCV 5.0.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

BELOW, ABOVE = slice(46, 112), slice(0, 42)


def crops(folder):
    """Crops and numbers of the photos of a folder that `align` has written."""
    files = sorted(folder.rglob("*.jpg"))
    images = np.stack([cv2.imread(str(f)) for f in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, np.array([int(f.stem) for f in files])


def network():
    sizes = [3, 24, 48, 64, 64]
    blocks = []
    for a, b in zip(sizes, sizes[1:]):
        blocks += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(sizes[-1], 1))


def auc(scores, labels):
    order = torch.argsort(scores)
    ranks = torch.empty_like(scores)
    ranks[order] = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    p = int(labels.sum())
    return float((ranks[labels == 1].sum() - p * (p + 1) / 2) / (p * (len(labels) - p)))


def measure(a, b, rows, seed, epochs=40):
    """AUC on odd photos of a classifier of `b` against `a`, trained on even ones."""
    torch.manual_seed(seed)
    x = torch.cat([a[0], b[0]])[:, :, rows]
    y = torch.cat([torch.zeros(len(a[0])), torch.ones(len(b[0]))])
    is_even = torch.from_numpy(np.concatenate([a[1], b[1]]) % 2 == 0)
    train, test = is_even.nonzero()[:, 0], (~is_even).nonzero()[:, 0]
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * (len(train) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (32,))]
        images = x[batch]
        flip = torch.rand(len(batch)) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        images = torch.roll(images, (int(torch.randint(-3, 4, ())), int(torch.randint(-3, 4, ()))), (2, 3))
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(images)[:, 0], y[batch]).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        scores = net(x[test])[:, 0] + net(x[test].flip(3))[:, 0]
    return auc(scores, y[test])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--maskinv", default="target/release/maskinv")
    parser.add_argument("--detector", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for the crops, to look at them")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        folder = args.keep or Path(folder)

        def run(*words):
            words = [args.maskinv, *map(str, words), "--detector", args.detector]
            subprocess.run(words, check=True, stderr=subprocess.DEVNULL)

        real, clean = args.photos / "with_mask", args.photos / "without_mask"
        run("mask", clean, folder / "drawn_photos", "--skip-unusable")
        sets = {}
        for name, source in {"real": real, "clean": clean, "drawn": folder / "drawn_photos"}.items():
            run("align", source, folder / name)
            sets[name] = crops(folder / name)
    print("crops:", ", ".join(f"{len(images)} {name}" for name, (images, _) in sets.items()))
    for title, a, rows in [
        ("drawn against real masks, below the eyes", "drawn", BELOW),
        ("the same photos above the eyes", "drawn", ABOVE),
        ("no mask against real masks, below the eyes", "clean", BELOW),
    ]:
        found = [measure(sets[a], sets["real"], rows, seed) for seed in range(args.seeds)]
        print(f"{title}: AUC {np.mean(found):.3f} (standard deviation over {args.seeds} seeds {np.std(found):.3f})")


if __name__ == "__main__":
    main()
