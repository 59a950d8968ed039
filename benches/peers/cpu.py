"""Times maskinv on the CPU against PyTorch, ONNX Runtime and OpenVINO, interleaved in one run; prints Markdown tables.

    python3 benches/peers/cpu.py --install            # once: makes target/peers/venv from requirements.txt, and runs in it
    python3 benches/peers/cpu.py [--ours PATH]... [--threads 2] [--rounds 15] [--only 'infer r18 *' ...] [--peers torch,openvino]
                                 [--json FILE] [--plain-malloc]

For each work the programs (maskinv's `peers_worker` example, and cpu_worker.py once for each peer) build and warm up one after
the other and then all stay alive, but only one computes at a time: each of the rounds asks each of them for one sample, the
first one being another in every round. A second `--ours` is another build of maskinv, in the column "maskinv 2": with
`--peers none` the two are compared alone. What a work and a sample are, and the protocol, stand in cpu_worker.py. `--only` takes
shell patterns of whole works ("train *").

A cell is "median wall ms / median CPU ms (all threads) / peak resident MB". "best peer / ours" divides the medians: above 1,
maskinv is faster. "by round" is the median of that ratio within each round, with its quartiles.

glibc returns large blocks to the kernel when they are freed and gets them back page by page, which takes PyTorch a good part
of a training step. PyTorch therefore runs with glibc told to keep memory, as maskinv's command line tells its own; that can
cost it some peak memory. `--plain-malloc` leaves the defaults. The other programs have allocators or settings of their own.
torch.compile needs a C++ compiler (g++).
"""

import argparse
import fnmatch
import importlib.metadata
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "target" / "peers"
OURS, OURS_2 = "maskinv", "maskinv 2"
INFER = [f"infer {arch} {batch}" for arch in ("r18", "r50", "r50-se", "r100", "mbf") for batch in (1, 16)]
INT8 = [f"int8 {arch} {batch}" for arch in ("r50", "r100", "mbf") for batch in (1, 16)]
COMPILED = ["torch-compile", "torch-compile-frozen"]
GROUPS = [  # title, works, peers
    ("Inference", INFER, ["torch", "torch-channels-last", *COMPILED, "onnxruntime", "openvino"]),
    ("Inference in 8 bits", INT8, ["onnxruntime", "openvino"]),
    (
        "Training step",
        ["train r18 16 1000", "train r50 8 1000", "train r50-se 8 1000", "train mbf 32 1000"],
        ["torch", "torch-channels-last", "torch-compile"],
    ),
    ("Margin loss", ["margin 64 85742 512"], ["torch", "torch-target"]),
    ("Detection", [], ["opencv", "onnxruntime"]),
    ("From a photo to an embedding", [], ["opencv"]),
]
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
READY_S, SAMPLE_S, PAUSE_S = 600, 120, 0.05


class Failed(Exception):
    pass


def say(text):
    print(text, file=sys.stderr, flush=True)


def last_line(file):
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().split("\n")
    return lines[-1].strip()[:200]


class Worker:
    """A program that speaks cpu_worker.py's protocol. Every method raises `Failed` with a reason for the table."""

    def __init__(self, command, environment):
        self.samples, self.peak = [], None
        self.stderr = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True, bufsize=1,
                env=environment, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise Failed(str(error)) from error
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.split())
        self.lines.put(None)

    def expect(self, count, timeout):
        try:
            words = self.lines.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise Failed(f"no answer in {timeout} s, killed; {last_line(self.stderr) or 'nothing on stderr'}") from None
        if words is None:
            code = self.process.wait()
            raise Failed(f"{last_line(self.stderr) or 'nothing on stderr'} (exit code {code})")
        if len(words) != count:
            self.kill()
            raise Failed(f"unexpected answer {' '.join(words)!r}")
        return words

    def wait_ready(self):
        words = self.expect(1, READY_S)
        if words != ["ready"]:
            self.kill()
            raise Failed(f"unexpected answer {words[0]!r}")

    def go(self):
        try:
            self.process.stdin.write("go\n")
        except BrokenPipeError:
            pass  # it has left: `expect` finds out why
        self.samples.append([float(word) for word in self.expect(2, SAMPLE_S)])

    def finish(self):
        self.process.stdin.close()
        self.peak = int(self.expect(2, SAMPLE_S)[1])
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self):
        """Its children too: torch.compile starts some."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def median_ms(self, column):
        return 1e3 * statistics.median(sample[column] for sample in self.samples)

    def cell(self):
        wall, cpu = (f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}" for ms in (self.median_ms(0), self.median_ms(1)))
        return f"{wall} / {cpu} / {self.peak / 1e6:.0f}"


def peer_command(work, peer, threads):
    script = [sys.executable, str(HERE / "cpu_worker.py"), *work.split()]
    return [*script, "--peer", peer, "--threads", str(threads), "--cache", str(CACHE)]


def ours_of(args):
    return [OURS, OURS_2][: len(args.ours)]


def export(work):
    """Writes the ONNX file of an `infer` or `int8` work in a process of its own; returns why it failed, or None."""
    command = [sys.executable, str(HERE / "cpu_worker.py"), "export", *work.split()[1:], "--cache", str(CACHE)]
    with tempfile.TemporaryFile() as stderr:
        code = subprocess.run(command, stdout=stderr, stderr=stderr, cwd=ROOT).returncode
        return f"export: {last_line(stderr)} (exit code {code})" if code else None


def measure(work, peers, args):
    """The workers that went through, and why the others failed, both by name."""
    workers, failed = {}, {}
    needs_export = {"onnxruntime", "openvino"} & set(peers) if work.startswith(("infer ", "int8 ")) else set()
    export_failure = export(work) if needs_export else None

    def attempt(name, action):
        try:
            action()
        except Failed as error:
            failed[name] = re.sub(r"\s+", " ", str(error)).replace("|", "\\|")
            say(f"  {name} failed: {error}")
            if name in workers:
                workers.pop(name).kill()

    def start(name):
        if name in needs_export and export_failure:
            raise Failed(export_failure)
        program = args.ours[1] if name == OURS_2 else args.ours[0]
        ours = [str(program), *work.split(), "--threads", str(args.threads)]
        environment = KEEP_MEMORY if name.startswith("torch") and not args.plain_malloc else {}
        workers[name] = Worker(
            ours if name in (OURS, OURS_2) else peer_command(work, name, args.threads), os.environ | environment
        )
        workers[name].wait_ready()

    try:
        for name in [*ours_of(args), *peers]:
            say(f"{work}: starting {name}")
            attempt(name, lambda: start(name))
        names = list(workers)
        for turn in range(args.rounds if names else 0):
            say(f"{work}: round {turn + 1} of {args.rounds}")
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if name in workers:
                    time.sleep(PAUSE_S)  # the threads of the one before stop spinning
                    attempt(name, workers[name].go)
        for name in list(workers):
            attempt(name, workers[name].finish)
    finally:
        for worker in workers.values():
            worker.kill()
    return workers, failed


def ratios(workers):
    """The fastest peer, its median over ours, and quartiles of that ratio within a round; None without both of them."""
    peers = [name for name in workers if name != OURS]
    if OURS not in workers or not peers:
        return None
    best = min(peers, key=lambda name: workers[name].median_ms(0))
    rounds = [b[0] / a[0] for a, b in zip(workers[OURS].samples, workers[best].samples)]
    quartiles = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    return {"best": best, "ratio": workers[best].median_ms(0) / workers[OURS].median_ms(0), "quartiles": quartiles}


def row(work, names, workers, failed, found):
    cells = [workers[name].cell() if name in workers else f"failed: {failed[name]}" for name in names]
    if found:
        low, middle, high = found["quartiles"]
        cells += [f"{found['ratio']:.2f} ({found['best']})", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
    else:
        cells += ["", ""]
    return "| " + " | ".join([work, *cells]) + " |"


def versions():
    found = {OURS: re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]}
    for line in (HERE / "requirements.txt").read_text().split():
        name = line.split("==")[0]
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    for name, command in {"rustc": ["rustc", "-V"], "g++": ["g++", "-dumpfullversion"]}.items():
        try:
            output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
            found[name] = output.removeprefix("rustc ").strip()
        except OSError:
            found[name] = "not installed"
    return found | {"python": sys.version.split()[0]}


def machine(args):
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else "unknown CPU",
        "cores": len(os.sched_getaffinity(0)),
        "threads": args.threads,
        "rounds": args.rounds,
        "malloc": "glibc's defaults" if args.plain_malloc else "told to keep freed memory",
        "versions": versions(),
    }


def build_ours():
    command = ["cargo", "build", "--profile", "dist", "--example", "peers_worker"]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"`{' '.join(command)}` failed; --ours PATH names another program")
    return ROOT / "target" / "dist" / "examples" / "peers_worker"


def install():
    """Makes the virtual environment and starts this script in it."""
    python = CACHE / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(CACHE / "venv")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "requirements.txt")], check=True)
    os.execv(python, [str(python), __file__, *(arg for arg in sys.argv[1:] if arg != "--install")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make target/peers/venv first and run in it")
    parser.add_argument(
        "--ours", type=Path, action="append",
        help="a program that speaks the protocol (built by cargo with the profile dist if not given)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="works to run, as shell patterns")
    parser.add_argument("--peers", help="peers to run, separated by commas, or none (default: all)")
    parser.add_argument(
        "--data", metavar="DIR", help="folder with models/ and raw_photos/ for `detect` and `photo`, as cpu_worker.py says"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--plain-malloc", action="store_true", help="leave the peers' glibc at its defaults")
    args = parser.parse_args()
    chosen = [] if args.peers == "none" else args.peers.split(",") if args.peers else sorted({peer for group in GROUPS for peer in group[2]})
    if args.data:
        path = Path(args.data).resolve()
        GROUPS[-2][1].append(f"detect {path}")
        GROUPS[-1][1].append(f"photo {path}")
    unknown = set(chosen) - {peer for group in GROUPS for peer in group[2]}
    groups = [
        (title, [w for w in works if any(fnmatch.fnmatchcase(w, p) for p in args.only)], [p for p in peers if p in chosen])
        for title, works, peers in GROUPS
    ]
    is_alone = len(args.ours or []) == 2
    if len(args.ours or []) > 2:
        parser.error("expected at most two --ours")
    if unknown or args.rounds < 1 or not any(works and (peers or is_alone) for _, works, peers in groups):
        parser.error(f"no such peer: {', '.join(unknown)}" if unknown else "nothing to run")
    if args.install:
        install()
    args.ours = [path.resolve() for path in args.ours] if args.ours else [build_ours()]
    about = machine(args)
    print(f"{about['cpu']}, {about['cores']} cores; {args.threads} threads, {args.rounds} rounds.", end=" ")
    print(f"PyTorch's allocator: {about['malloc']}.")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".\n")
    print("Median wall ms / median CPU ms / peak MB.")
    record = {"machine": about, "works": {}}
    for title, works, peers in groups:
        if not works or not (peers or is_alone):
            continue
        names = [*ours_of(args), *peers]
        print(f"\n### {title}\n\n| work | {' | '.join(names)} | best peer / ours | by round |")
        print("|---" * (len(names) + 3) + "|", flush=True)
        for work in works:
            workers, failed = measure(work, peers, args)
            found = ratios(workers)
            print(row(work, names, workers, failed, found), flush=True)
            programs = {name: {"wall_cpu_s": w.samples, "peak_bytes": w.peak} for name, w in workers.items()}
            record["works"][work] = {"programs": programs, "failed": failed, "ratio": found}
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
