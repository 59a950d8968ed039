"""Times maskinv on a GPU against PyTorch on the same one, alternating; prints a Markdown table.

    cargo build --release --features cudnn --example gpu_worker
    python3 benches/peers/gpu_torch.py [--ours target/release/examples/gpu_worker] [--rounds 5] [--cycles 2]
                                       [--only 'train *' ...] [--json FILE]
    python3 benches/peers/gpu_torch.py --suite SECONDS --compare OURS.json [--small]      (of scripts/gpu-suite)

Needs PyTorch with CUDA, and its libraries where maskinv finds them (LD_LIBRARY_PATH: cuBLAS 12 or 13, cuDNN 9). Works:

`infer ARCH BATCH`            forward of random images in eval mode; ours reads 8-bit images from the host and returns embeddings to it
`train ARCH BATCH CLASSES`    a step as cpu_worker.py describes it
`kd ARCH BATCH CLASSES`       the same with a frozen teacher's forward and 3000 times the mean squared difference of unit embeddings
`margin N CLASSES D`          forward and backward of the margin loss alone

PyTorch runs as `fp32` (as published: f32, TF32 off, NCHW), `amp` (autocast to bf16, channels last, cudnn.benchmark) and `compile`
(amp and torch.compile); the margin loss as `amp` (eager, product in bf16) and `compile`. Each program has a process of its own, one
after the other, `--cycles` times over; each takes `--rounds` samples of at least a second. A cell is "median ms / peak MB"
(PyTorch: max_memory_allocated, ours: what was asked of the driver). The last column divides the best of PyTorch by ours: above 1, maskinv is faster.
"""

import argparse
import fnmatch
import json
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = "maskinv"
NETWORK_PEERS, MARGIN_PEERS = ["fp32", "amp", "compile"], ["amp", "compile"]
WORKS = [
    *(f"{kind} r100 {batch} 85742" for kind in ("train", "kd") for batch in (128, 256)),
    *(f"margin {n} {classes} 512" for n in (512, 1024) for classes in (85742, 1000000)),
    "infer r100 1",
    "infer r100 256",
]
SAMPLE_S = 1.0
# What scripts/gpu-suite compares, the most telling first; the first row is of the machine, the second of a rehearsal.
SUITE = ["kd r100 128 85742", "infer r100 128", "train r100 128 85742", "margin 512 85742 512", "infer r100 1"]
SMALL = ["kd mbf 2 64", "infer mbf 2", "train mbf 2 64", "margin 8 64 512", "infer mbf 1"]


def device():
    """The GPU; the CPU in a rehearsal without one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()


def build(work, peer):
    import torch
    from torch.nn import functional as F

    sys.path.insert(0, str(HERE))
    from cpu_worker import margin_loss, network

    is_fast = peer != "fp32"
    torch.backends.cudnn.benchmark = is_fast
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_fast
    torch.set_default_device(device())
    compiled = torch.compile if peer == "compile" else lambda x, **_: x

    def autocast():
        return torch.autocast(device(), torch.bfloat16, enabled=is_fast)

    def net(arch):
        made = network(arch).to(device())
        return made.to(memory_format=torch.channels_last) if is_fast else made

    def images(batch):
        x = torch.rand(batch, 3, 112, 112) * 2 - 1
        return x.contiguous(memory_format=torch.channels_last) if is_fast else x

    kind, *sizes = work
    if kind == "infer":
        model, x = net(sizes[0]).eval(), images(int(sizes[1]))
        model = compiled(model, dynamic=False)

        @torch.inference_mode()
        def step():
            with autocast():
                return model(x)

        return step
    if kind == "margin":
        n, classes, size = map(int, sizes)
        x = torch.randn(n, size).requires_grad_()
        w, labels = torch.nn.Parameter(torch.randn(size, classes) * 0.01), torch.randint(classes, (n,))
        loss_of = compiled(margin_loss)

        def step():
            x.grad = w.grad = None
            with autocast():
                loss = loss_of(x, w, labels)
            loss.backward()

        return step
    arch, batch, classes = sizes[0], int(sizes[1]), int(sizes[2])
    model, x = net(arch).train(), images(batch)
    teacher = net(arch).eval() if kind == "kd" else None
    w = torch.nn.Parameter(torch.randn(512, classes) * 0.01)
    backbone = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=device() == "cuda") for p in (backbone, [w])]
    forward, loss_of = compiled(model, dynamic=False), compiled(margin_loss)
    target_of = compiled(teacher, dynamic=False) if teacher else None

    def step():
        with autocast():
            y = forward(x)
            loss = loss_of(y, w, torch.randint(classes, (batch,)))
            if teacher:
                with torch.no_grad():
                    target = F.normalize(target_of(x).float())
                loss = loss + 3000 * F.mse_loss(F.normalize(y.float()), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone, 5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def work_as_peer(work, peer):
    import torch

    step = build(work, peer)
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    print("ready", flush=True)
    for _ in sys.stdin:
        began, num = time.perf_counter(), 0
        while num == 0 or time.perf_counter() - began < SAMPLE_S:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
            num += 10
        print((time.perf_counter() - began) / num, 0, flush=True)
    print("peak", torch.cuda.max_memory_allocated(), flush=True)


def suite(args):
    """Times PyTorch as amp and compile in this process until the time is up, and prints a table beside ours."""
    import torch

    ours = json.loads(args.compare.read_text()) if args.compare and args.compare.exists() else {}
    name = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}. Median ms / peak MB.\n")
    print("| work | maskinv | amp | compile | best / ours |\n|---|---|---|---|---|", flush=True)
    end = time.perf_counter() + args.suite
    for work in SMALL if args.small else SUITE:
        cells, medians = [], {}
        for peer in ("amp", "compile"):
            if time.perf_counter() > end:
                cells.append("no time left")
                continue
            try:
                torch.compiler.reset()
                step = build(work.split(), peer)
                for _ in range(3):
                    step()
                wait()
                samples, began = [], time.perf_counter()
                while len(samples) < 3 or (len(samples) < 50 and time.perf_counter() - began < 3):
                    start = time.perf_counter()
                    step()
                    wait()
                    samples.append(time.perf_counter() - start)
                medians[peer] = statistics.median(samples)
                peak = torch.cuda.max_memory_allocated() if device() == "cuda" else 0
                cells.append(f"{1e3 * medians[peer]:.2f} / {peak / 1e6:.0f}")
                if device() == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            except Exception as error:  # what PyTorch raises differs by version; the table says it
                cells.append("failed: " + " ".join(str(error).replace("|", "\\|").split())[:200])
            step = None
        own = ours.get(work)
        cell = f"{own['median_ms']:.2f} / {own['peak_bytes'] / 1e6:.0f}" if own else ""
        ratio = f"{1e3 * min(medians.values()) / own['median_ms']:.2f} ({min(medians, key=medians.get)})" if own and medians else ""
        print("| " + " | ".join([work, cell, *cells, ratio]) + " |", flush=True)


def warm(args):
    """Compiles what `suite` compiles, so that it finds the code in inductor's cache."""
    for work in SMALL if args.small else SUITE:
        step = build(work.split(), "compile")
        for _ in range(2):
            step()
        wait()


def measure(work, args):
    """Samples in seconds and peaks in bytes by program, and why others failed."""
    from cpu import Failed, Worker, say

    peers = MARGIN_PEERS if work.startswith("margin") else NETWORK_PEERS
    samples, peaks, failed = {}, {}, {}
    for cycle in range(args.cycles):
        for name in [OURS, *peers]:
            if name in failed:
                continue
            say(f"{work}: {name}, cycle {cycle + 1} of {args.cycles}")
            script = [sys.executable, __file__, "--as-peer", name, *work.split()]
            worker = None
            try:
                worker = Worker([str(args.ours), *work.split()] if name == OURS else script, os.environ)
                worker.wait_ready()
                for _ in range(args.rounds):
                    worker.go()
                worker.finish()
                samples.setdefault(name, []).extend(wall for wall, _ in worker.samples)
                peaks[name] = max(peaks.get(name, 0), worker.peak)
            except Failed as error:
                failed[name] = " ".join(str(error).replace("|", "\\|").split())
                say(f"  failed: {error}")
            finally:
                if worker:
                    worker.kill()
    return samples, peaks, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, default=ROOT / "target/release/examples/gpu_worker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="works to run, as shell patterns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--suite", type=float, metavar="SECONDS", help="time amp and compile in this process, that long")
    parser.add_argument("--compare", type=Path, metavar="OURS.json", help="what gpu_worker suite measured")
    parser.add_argument("--small", action="store_true", help="with --suite or --warm: small networks, for a rehearsal")
    parser.add_argument("--warm", action="store_true", help="compile what --suite compiles")
    parser.add_argument("--as-peer", nargs="+", metavar="PEER WORK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        return work_as_peer(args.as_peer[1:], args.as_peer[0])
    if args.warm:
        return warm(args)
    if args.suite:
        return suite(args)
    works = [work for work in WORKS if any(fnmatch.fnmatchcase(work, pattern) for pattern in args.only)]
    if not works:
        parser.error("nothing to run")
    sys.path.insert(0, str(HERE))
    import torch

    args.ours = args.ours.resolve()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.cycles} x {args.rounds} samples. Median ms / peak MB.\n")
    print("| work | maskinv | fp32 | amp | compile | best / ours |\n|---|---|---|---|---|---|", flush=True)
    record = {}
    for work in works:
        samples, peaks, failed = measure(work, args)
        medians = {name: statistics.median(values) for name, values in samples.items()}

        def cell(name):
            if name in medians:
                return f"{1e3 * medians[name]:.2f} / {peaks[name] / 1e6:.0f}"
            return f"failed: {failed[name]}" if name in failed else ""

        others = {name: median for name, median in medians.items() if name != OURS}
        best = min(others, key=others.get) if others else None
        ratio = f"{others[best] / medians[OURS]:.2f} ({best})" if best and OURS in medians else ""
        print("| " + " | ".join([work, *map(cell, [OURS, "fp32", "amp", "compile"]), ratio]) + " |", flush=True)
        record[work] = {"samples_s": samples, "peak_bytes": peaks, "failed": failed}
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
