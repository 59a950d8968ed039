"""Measures the activation memory of a training step on the CPU, maskinv's against PyTorch's; prints Markdown tables.

    python3 benches/peers/memory.py --install            # once: cpu.py's environment, target/peers/venv, and runs in it
    python3 benches/peers/memory.py [--ours PATH] [--threads 2] [--rounds 2] [--only 'train r18 *' ...] [--json FILE]
                                    [--peers-only] [--default-malloc] [--no-times]

A work is "train ARCH BATCH CLASSES" of cpu_worker.py. A round runs every program at BATCH and at 2 BATCH, each time in a process
of its own with nothing else alive: warm up, a step or more, the peak of its resident memory. Weights, gradients, the optimiser
and the runtime (0.6 GB of libraries in PyTorch's CUDA build) are in both peaks, so what an image adds is

    (peak at 2 BATCH - peak at BATCH) / BATCH

the activations that a step keeps for its backward pass, and what is held for a moment at the worst of it. It is free of the rest
as long as both peaks are at the same moment of the step. (Torch's in the first table are within 2 % of the storage that
torch.autograd.graph.saved_tensors_hooks sees.)

The first table keeps every activation. In the second each residual block keeps its input and is computed again in the backward
pass: ours with `--recompute`, PyTorch with torch.utils.checkpoint. `--ours` names maskinv's `peers_worker` example (built with
cargo if not given), `--peers-only` leaves maskinv out.

A cell is "MB per image / peak MB at BATCH / at 2 BATCH / median ms of a step at BATCH"; peaks are medians of the rounds. The
ratios are ours / PyTorch's, for each figure of the layout that needs least: below 1, maskinv needs less.

PyTorch's memory is the least that glibc's settings get it to: blocks from 128 KiB go back to the kernel once freed. By default
that is only where glibc begins: the bound grows to 32 MiB with the blocks that are freed, and the heap that larger blocks then
come from has holes (`--default-malloc` measures that). PyTorch's time is from a run of its own, with glibc told to keep what is
freed, as in cpu.py; so no single run of PyTorch has both. Ours runs as it is. The times are rough: few samples, and the programs
alternate by the minute. They show what computing again costs; cpu.py compares speed. `--no-times` leaves them out.
"""

import argparse
import fnmatch
import json
import os
import re
import statistics
from pathlib import Path

import cpu
from cpu import KEEP_MEMORY, OURS, Failed, Worker, build_ours, machine, peer_command, say

WORKS = ["train r18 16 1000", "train r50 8 1000", "train mbf 32 1000", "train r100 8 1000"]
GROUPS = [  # title, ours, peers
    ("Every activation kept", OURS, ["torch", "torch-channels-last"]),
    ("Blocks computed again", f"{OURS} --recompute", ["torch-checkpoint", "torch-checkpoint-channels-last"]),
]
LEAST_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
STEPS = 3  # samples of a timed run


class Program:
    """What the runs of one program gave for one work, an entry for each round."""

    def __init__(self, batch):
        self.batch = batch
        self.peaks, self.twice, self.wall_s = [], [], []  # bytes at BATCH and at 2 BATCH, seconds of each sample

    def image_mb(self):
        return (self.twice_mb() - self.peak_mb()) / self.batch

    def peak_mb(self):
        return statistics.median(self.peaks) / 1e6

    def twice_mb(self):
        return statistics.median(self.twice) / 1e6

    def cell(self):
        ms = f" / {1e3 * statistics.median(self.wall_s):.0f}" if self.wall_s else ""
        return f"{self.image_mb():.1f} / {self.peak_mb():.0f} / {self.twice_mb():.0f}{ms}"

    def record(self):
        return {"peak_bytes": self.peaks, "peak_bytes_of_twice": self.twice, "wall_s": self.wall_s}


def is_ours(name):
    return name.split()[0] == OURS


def command(work, name, args):
    """`name` is a peer, or "maskinv" with what its arguments end in."""
    if is_ours(name):
        return [str(args.ours), *work.split(), "--threads", str(args.threads), *name.split()[1:]]
    return peer_command(work, name, args.threads)


def run(work, name, args, num_samples, environment):
    """The finished worker."""
    say(f"{work}: {name}")
    worker = Worker(command(work, name, args), os.environ | ({} if is_ours(name) else environment))
    try:
        worker.wait_ready()
        for _ in range(num_samples):
            worker.go()
        worker.finish()
    finally:
        worker.kill()
    return worker


def run_round(work, name, args, program):
    kind, arch, batch, classes = work.split()
    least = {} if args.default_malloc else LEAST_MEMORY
    program.peaks.append(run(work, name, args, 1, least).peak)
    program.twice.append(run(f"{kind} {arch} {2 * int(batch)} {classes}", name, args, 1, least).peak)
    if not args.no_times:
        program.wall_s += [wall for wall, _ in run(work, name, args, STEPS, KEEP_MEMORY).samples]


def measure(work, names, args):
    """The programs that went through, and why the others failed, both by name."""
    programs, failed = {name: Program(int(work.split()[2])) for name in names}, {}
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name not in programs:
                continue
            try:
                run_round(work, name, args, programs[name])
            except Failed as error:
                failed[name] = re.sub(r"\s+", " ", str(error)).replace("|", "\\|")
                say(f"  {name} failed: {error}")
                del programs[name]
    return programs, failed


def ratio(programs, figure):
    """Ours over the least of PyTorch's, and whose that is; nothing without both."""
    figures = {name: figure(program) for name, program in programs.items()}
    ours = [figures.pop(name) for name in programs if is_ours(name)]
    if not ours or not figures:
        return ""
    best = min(figures, key=figures.get)
    return f"{ours[0] / figures[best]:.2f} ({best})"


def row(work, names, programs, failed):
    cells = [programs[name].cell() if name in programs else f"failed: {failed[name]}" for name in names]
    ratios = [ratio(programs, figure) for figure in (Program.image_mb, Program.peak_mb, Program.twice_mb)]
    return "| " + " | ".join([work, *cells, *ratios]) + " |"


def install():
    cpu.__file__ = __file__  # what `cpu.install` starts in the environment
    cpu.install()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make target/peers/venv first and run in it")
    parser.add_argument("--ours", type=Path, help="a program that speaks the protocol (built with cargo if not given)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="works to run, as shell patterns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every peak and sample there")
    parser.add_argument("--peers-only", action="store_true", help="leave maskinv out")
    parser.add_argument("--default-malloc", action="store_true", help="measure memory with glibc at its defaults")
    parser.add_argument("--no-times", action="store_true", help="leave out the runs that are timed")
    parser.set_defaults(plain_malloc=False)  # of `machine`: how the times are taken
    args = parser.parse_args()
    works = [work for work in WORKS if any(fnmatch.fnmatchcase(work, pattern) for pattern in args.only)]
    if args.rounds < 1 or not works:
        parser.error("nothing to run")
    if args.install:
        install()
    if not args.peers_only:
        args.ours = args.ours.resolve() if args.ours else build_ours()
    about = machine(args) | {"malloc_of_memory": {} if args.default_malloc else LEAST_MEMORY}
    print(f"{about['cpu']}, {about['cores']} cores; {args.threads} threads, {args.rounds} rounds.", end=" ")
    print(f"PyTorch's memory with glibc {'at its defaults' if args.default_malloc else 'returning blocks from 128 KiB'}.")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".\n")
    ms = "" if args.no_times else " / median ms at BATCH"
    print(f"MB per image / peak MB at BATCH / peak MB at 2 BATCH{ms}; ratios are ours / PyTorch's least.")
    record = {"machine": about, "works": {work: {} for work in works}}
    for title, ours, peers in GROUPS:
        names = peers if args.peers_only else [ours, *peers]
        print(f"\n### {title}\n\n| work | {' | '.join(names)} | per image | peak at BATCH | at 2 BATCH |")
        print("|---" * (len(names) + 4) + "|", flush=True)
        for work in works:
            programs, failed = measure(work, names, args)
            print(row(work, names, programs, failed), flush=True)
            found = {name: program.record() for name, program in programs.items()}
            record["works"][work][title] = {"programs": found, "failed": failed}
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
