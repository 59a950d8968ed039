"""Times the data pipeline of the published MaskInv training code on the CPU, re-implemented from its facts; prints JSON.

    pip install -r benches/peers/requirements.txt
    python3 benches/peers/data.py --images DIR --template mask_img.png [--mask 0.5] [--processes 2] [--seconds 5]

DIR holds aligned 112x112 JPEG crops; the first 2000 are read into memory, and process i of N works through every Nth of
them, over and over, with OpenCV on one thread. A sample is decoded, masked with probability `--mask`, flipped and
normalised to float32 CHW, and 128 samples are stacked for the teacher and for the student. The rate counts samples, not
views. `--mask 0` is the variant "clean", which needs no template, all else is "published".

As published, a mask is put on before the flips and in place, so a masked sample gives two tensors, flipped independently,
while a mask-free one gives the same tensor to both networks. What the facts leave open is chosen for speed: the template is
warped first and its colours converted on the 112x112 result, not on all of its 1627x1085 pixels, the blend works on planes,
every batch goes into the same memory, and glibc is told to keep what is freed (see cpu.py).
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

BATCH, NUM_IMAGES, SIZE = 128, 2000, 112
# Left eye, right eye, nose, left and right mouth corner, on the template and on every crop (8 px left, as published).
TEMPLATE_POINTS = np.float32([[557, 64], [1009, 64], [678, 464], [548, 614], [991, 664]])
FACE_POINTS = np.trunc(
    np.float32([[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655], [62.7299, 92.2041]])
)
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
READY_S = 120
barrier = None


def decode(data):
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def warp(template):
    shift = np.float32([random.randrange(-10, 10), random.randrange(-40, 40)])
    homography, _ = cv2.findHomography(TEMPLATE_POINTS + shift, FACE_POINTS, 0)
    return cv2.warpPerspective(template, homography, (SIZE, SIZE))


def blend(image, warped):
    """Reads the warped RGBA as CMYK plus a random colour; negative values wrap modulo 256."""
    colour = np.float32([random.randrange(150) for _ in range(3)]).reshape(3, 1, 1)
    warped = np.float32(cv2.split(warped))
    alpha = warped[3]
    mask = 255 - (warped[:3] + alpha) + colour
    blended = (alpha * mask + (255 - alpha) * np.array(cv2.split(image))) / 255
    return cv2.merge(list(blended.astype(np.int32).astype(np.uint8)))


def flip(image):
    return cv2.flip(image, 1) if random.random() < 0.5 else image


def normalise(image):
    tensor = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    tensor /= 255
    tensor -= 0.5
    tensor /= 0.5
    return tensor


def sample(data, template, mask):
    """The teacher's and the student's view."""
    image = decode(data)
    if random.random() < mask:
        image = blend(image, warp(template))
        return normalise(flip(image)), normalise(flip(image))
    tensor = normalise(flip(image))
    return tensor, tensor


def fill(batch, images, start, template, mask):
    views = [sample(images[(start + i) % len(images)], template, mask) for i in range(BATCH)]
    for view, out in zip(zip(*views), batch):
        np.stack(view, out=out)


def share_barrier(shared):
    global barrier
    barrier = shared


def measure(paths, template, mask, seconds):
    """Samples per second of this process, the others measuring at the same time."""
    cv2.setNumThreads(0)
    images = [np.fromfile(path, np.uint8) for path in paths]
    template = np.asarray(Image.open(template).convert("RGBA")) if mask else None
    batch = np.empty((2, BATCH, 3, SIZE, SIZE), np.float32)
    fill(batch, images, 0, template, mask)
    barrier.wait(READY_S)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        fill(batch, images, count, template, mask)
        count += BATCH
    return count / elapsed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="JPEG crops, at any depth")
    parser.add_argument("--template", type=Path, metavar="FILE", help="the published RGBA mask")
    parser.add_argument("--mask", type=float, default=0.5, help="probability of a mask (default: 0.5)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(default: one per core)")
    parser.add_argument("--seconds", type=float, default=5, help="(default: 5)")
    args = parser.parse_args()
    if args.mask and not args.template:
        parser.error("--template is needed for masks")
    paths = sorted(args.images.glob("**/*.jpg"))[:NUM_IMAGES]
    if len(paths) < args.processes:
        parser.error(f"{args.images}: {len(paths)} JPEG files for {args.processes} processes")
    os.environ |= KEEP_MEMORY  # for the processes started below
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, share_barrier, (context.Barrier(args.processes),)) as pool:
        shares = [(paths[i :: args.processes], args.template, args.mask, args.seconds) for i in range(args.processes)]
        rates = pool.starmap(measure, shares, chunksize=1)
    result = {
        "variant": "published" if args.mask else "clean",
        "mask": args.mask,
        "processes": args.processes,
        "images_per_s_per_core": round(sum(rates) / len(rates), 1),
        "versions": {"cv2": cv2.__version__, "numpy": np.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
