"""Times maskinv's loader beside the published pipeline (data.py), in turns; prints medians and ratios for each work.

    pip install -r benches/peers/requirements.txt
    python3 benches/peers/loader.py --data lfw112 --template mask_img.png [--rounds 5] [--threads 2] [--seconds 3]

Both do the same to the same crops of DATA/images on as many threads or processes: decode, flip, the published mask. maskinv
hands over 8-bit batches, as it does in training, the pipeline normalised float32 ones, as PyTorch wants them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from build import ROOT, bench

# Our names of the works, and the share of masked images that they have in the published pipeline.
WORKS = {
    "decode, flip": 0.0,
    "decode, flip, the template on half": 0.5,
    "decode, flip, the template on all": 1.0,
    "decode, flip, drawn masks on half": 0.5,
}


def ours(program, args):
    command = [program, args.data, "--template", args.template, "--threads", args.threads, "--seconds", args.seconds]
    lines = subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout.splitlines()
    rates = {}
    for line in lines:
        for name in WORKS:
            if line.startswith(f"{name}  "):
                rates[name] = float(line[len(name) :].split()[0])
    return rates


def peer(mask, args):
    command = [sys.executable, ROOT / "benches/peers/data.py", "--images", Path(args.data) / "images"]
    command += ["--template", args.template, "--mask", mask, "--processes", args.threads, "--seconds", args.seconds]
    output = subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout
    return json.loads(output)["images_per_s_per_core"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--template", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3)
    args = parser.parse_args()
    program = bench("loader")
    rounds = []
    for _ in range(args.rounds):
        published = {mask: peer(mask, args) for mask in sorted(set(WORKS.values()))}
        rounds.append((ours(program, args), published))
    print(f"images/s and core, medians of {args.rounds} rounds, {args.threads} threads or processes")
    for name, mask in WORKS.items():
        mine = statistics.median(r[0][name] for r in rounds)
        published = statistics.median(r[1][mask] for r in rounds)
        ratio = statistics.median(r[0][name] / r[1][mask] for r in rounds)
        print(f"{name:40} maskinv {mine:7.0f}   published {published:7.0f}   {ratio:5.2f} times")


if __name__ == "__main__":
    main()
