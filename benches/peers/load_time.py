"""Times loading an IResNet-100 (261 MB, f32): maskinv, PyTorch and the safetensors package, interleaved in one run.

    pip install torch==2.8.0 safetensors==0.8.0 numpy
    python3 benches/peers/load_time.py [--rounds 7] [--folder /tmp/maskinv-load]

Makes the same random weights as .pth (torch.save) and .safetensors first. Every round starts each program anew, with the
files in the page cache, and takes the best of three loads in it. "tensors" ends with named tensors in memory (safetensors
in Python maps lazily: the bytes are read by summing each tensor's storage into a copy), "model" with a network that is
ready to run: for PyTorch, load_state_dict into a network built before the clock starts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))


def best(load, rounds=3):
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = load()
        times.append(1e3 * (time.perf_counter() - began))
        del result
    return min(times)


def network():
    from models import IResNet

    return IResNet([3, 13, 30, 3], 1, 512, False).eval()


def measure(what, folder):
    """Runs in a process of its own; prints milliseconds."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(2)
    pth, safetensors = folder / "r100.pth", folder / "r100.safetensors"
    loads = {
        "torch.load": lambda: torch.load(pth, weights_only=True),
        "torch.load(mmap=True), copied": lambda: {k: v.clone() for k, v in torch.load(pth, weights_only=True, mmap=True).items()},
        "safetensors.torch, copied": lambda: {k: v.clone() for k, v in load_file(safetensors).items()},
    }
    times = {name: best(load) for name, load in loads.items()}
    net = network()
    times["torch.load + load_state_dict"] = best(lambda: net.load_state_dict(torch.load(pth, weights_only=True)))
    times["safetensors.torch + load_state_dict"] = best(lambda: net.load_state_dict(load_file(safetensors)))
    print(json.dumps(times))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/maskinv-load"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(None, args.folder)
    import torch
    from safetensors.torch import save_file

    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = network().state_dict()
    torch.save(state, args.folder / "r100.pth")
    save_file(state, args.folder / "r100.safetensors")
    bench = ["cargo", "bench", "--quiet", "--bench", "load", "--"]
    subprocess.run(bench, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    times = {}
    for _ in range(args.rounds):
        command = bench + [str(args.folder / "r100.safetensors"), "3"]
        lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
        rows = [line.split() for line in lines if line.startswith("tensors")]
        times.setdefault("maskinv, tensors", []).append(min(float(row[1]) for row in rows))
        times.setdefault("maskinv, model", []).append(min(float(row[3]) for row in rows))
        command = [sys.executable, __file__, "--measure", "--folder", str(args.folder)]
        for name, ms in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout).items():
            times.setdefault(name, []).append(ms)
    ours = {kind: statistics.median(times[f"maskinv, {kind}"]) for kind in ("tensors", "model")}
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, medians of {args.rounds} rounds, ms (times ours)")
    for name, values in times.items():
        kind = "model" if "model" in name or "load_state_dict" in name else "tensors"
        median = statistics.median(values)
        print(f"{kind:8} {name:38} {median:8.1f}  {median / ours[kind]:.2f}x")


if __name__ == "__main__":
    main()
