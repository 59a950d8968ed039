"""Compares two ranks of one thread with one rank of two threads: images per second of the same training.

    cargo build --release --features mpi
    python3 benches/peers/ranks.py target/release/maskinv [--rounds 5] [--width 0.5] [--batch 32]

Trains MobileFaceNet on drawn faces, in rounds that take turns, and prints the ratio of each round and their median, and the share
of the time that a rank waits for the other, with gradients in buckets and with all of them sent after the backward pass. Ranks are not bound to cores: on two cores the threads that send share them with those that compute.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

SETTINGS = """train.arms=["aug"] train.epochs=1 train.mask_head=0 train.teacher=none data.procedural_teacher=none train.batch_norm="batch" ranks.bucket_kib=512
model.arch="mbf" model.embedding_size=128 model.input_size=112 data.procedural.num_identities=40 data.procedural.images_per_identity=16
data.procedural_test.num_identities=4 data.procedural_test.images_per_identity=4 eval.bootstrap.replicates=0"""


def speed(program, size, threads, settings, out):
    launcher = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-n", str(size)]
    command = [*(launcher if size > 1 else []), program, "train", "--quiet", "--threads", str(threads), "--out", str(out)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    last = json.loads((out / "aug" / "steps.jsonl").read_text().splitlines()[-1])
    return last["images_per_s"], last["ranks_wait_share"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    settings = SETTINGS.split() + [f"model.width={args.width}", f"loader.batch_size={args.batch}"]
    ratios, waits = [], {"buckets": [], "at the end": []}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            one, _ = speed(args.program, 1, 2, settings, Path(folder) / "one")
            two, wait = speed(args.program, 2, 1, settings, Path(folder) / "two")
            # A bucket that is never full is sent once the backward pass is over.
            _, at_the_end = speed(args.program, 2, 1, [*settings, "ranks.bucket_kib=1048576"], Path(folder) / "end")
        ratios.append(two / one)
        waits["buckets"].append(wait)
        waits["at the end"].append(at_the_end)
        print(f"round {number + 1}: one rank {one:.1f}, two ranks {two:.1f} images/s, ratio {ratios[-1]:.2f}; waiting "
              f"{100 * wait:.1f} %, {100 * at_the_end:.1f} % without buckets", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]; waiting for the other rank "
          + ", ".join(f"{name} {100 * statistics.median(shares):.1f} %" for name, shares in waits.items()))


main()
