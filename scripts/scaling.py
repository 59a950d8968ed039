#!/usr/bin/env python3
"""A model of how training on several GPUs scales: nothing here is measured.

    scripts/scaling.py [--images 128] [--step-ms 27] [--parameters 65] [--short]

A step of N GPUs with B images each and C classes takes the network's time on one GPU, the head's, and what of the
exchange is not hidden. Rates are stated ones times a share that is usual. `--short` sends gradients in 16 bits.
"""

import argparse

# An H100: bf16 and memory, with the shares that matrix products and kernels reach.
FLOPS, BANDWIDTH = 0.6 * 989e12, 0.8 * 3.35e12
# Bytes a second of a GPU to others: NVLink within a machine of eight, 400 Gb/s InfiniBand between machines.
NVLINK, INFINIBAND, OF_MACHINE = 450e9, 50e9, 8
# Seconds until a collective operation begins.
LATENCY = 30e-6
# Share of the network's time that its backward pass takes, behind which gradients travel.
BACKWARD = 2 / 3


def head(args, n, classes, rate):
    """Seconds, bytes of memory and bytes sent by a GPU for its shard of the class centres."""
    rows, own, d = n * args.images, classes / n, args.length
    used = own * rate
    # Cosines, once more for the gradient, and the gradients of centres and embeddings.
    products = 4 * 2 * rows * d * used / FLOPS
    # Centres are read twice, their gradient is written, and the update reads and writes centres and velocity.
    passes = (3 + 5) * 4 * d * used / BANDWIDTH
    # Centres, velocity and gradient; of a sample all three besides.
    memory = 4 * d * (2 * own + used * (1 if rate == 1 else 3))
    around = (n - 1) / n
    # Embeddings gathered, their gradients added and scattered; maxima and sums of rows; target cosines.
    sent = 2 * around * 4 * rows * d + around * 8 * rows * n + 2 * around * 4 * rows
    return products + passes, memory, sent


def row(args, n, classes, rate):
    wire = NVLINK if n <= OF_MACHINE else INFINIBAND
    seconds, memory, sent = head(args, n, classes, rate)
    network = args.step_ms / 1e3
    of_gradients = 2 * (n - 1) / n * (2 if args.short else 4) * args.parameters * 1e6
    hidden = BACKWARD * network
    exposed = max(0.0, of_gradients / wire - hidden) + (sent / wire + 4 * LATENCY if n > 1 else 0.0)
    total = network + seconds + exposed
    return [
        f"{n}", f"{classes:,}", f"{rate:g}", f"{memory / 1e9:.1f}", f"{of_gradients / 1e6:.0f}", f"{sent / 1e6:.1f}",
        f"{1e3 * seconds:.1f}", f"{1e3 * exposed:.1f}", f"{1e3 * total:.0f}", f"{n * args.images / total:,.0f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="images of a GPU in a step")
    parser.add_argument("--step-ms", type=float, default=27, help="time of the network's step on one GPU")
    parser.add_argument("--parameters", type=float, default=65, help="parameters of the network in millions")
    parser.add_argument("--length", type=int, default=512, help="length of an embedding")
    parser.add_argument("--short", action="store_true", help="gradients travel in 16 bits")
    args = parser.parse_args()
    titles = ["GPUs", "classes", "sample rate", "head, GB", "gradients, MB", "head's exchange, MB", "head, ms",
              "exchange not hidden, ms", "step, ms", "images/s"]
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for classes in [100_000, 1_000_000, 10_000_000]:
        for n in [1, 8, 64]:
            for rate in [1, 0.1]:
                print("| " + " | ".join(row(args, n, classes, rate)) + " |")


if __name__ == "__main__":
    main()
