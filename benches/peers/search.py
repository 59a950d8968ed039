"""Times exact searches beside FAISS's exact index, in turns; prints medians, their ratios, memory, and how often the five best rows are
those of f32.

    pip install -r benches/peers/requirements.txt
    python3 benches/peers/search.py [--rows 1000000] [--rounds 5] [--huge 10000000]

Both sides search the same rows with the same queries: half of them are a row with noise, as a photo of an enrolled person is, half are of
nobody. FAISS's 8-bit index is `IndexScalarQuantizer` with `QT_8bit`, without a second look; ours ranks its best 72 rows again in f32. The
huge set is of 8 bits alone and random on both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from build import bench

DIM, TOP = 512, 5


class Ours:
    def __init__(self, program, source):
        self.process = subprocess.Popen([program, "--serve", str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def search(self, kind, queries):
        with tempfile.NamedTemporaryFile(suffix=".f32") as file:
            file.write(queries.tobytes())
            file.flush()
            self.process.stdin.write(f"{kind} {file.name}\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], answer["rows"]

    def megabytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1e3


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def timed(index, queries):
    began = time.perf_counter()
    rows = index.search(queries, TOP)[1]
    return time.perf_counter() - began, rows.tolist()


def compare(what, ours, kind, index, queries, rounds):
    a, b = [], []
    for round in range(rounds + 1):
        (x, mine), (y, theirs) = ours.search(kind, queries), timed(index, queries)
        # The first round reads the rows into memory.
        if round > 0:
            a.append(x)
            b.append(y)
    ratio = statistics.median(y / x for x, y in zip(a, b))
    per_query = [1e3 * statistics.median(times) / len(queries) for times in (a, b)]
    print(f"{what}, {len(queries)} at a time: maskinv {per_query[0]:.2f} ms a query, FAISS {per_query[1]:.2f} ms, {ratio:.2f} times", flush=True)
    return mine, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--huge", type=int, default=0, help="rows of a second set, of 8 bits alone")
    args = parser.parse_args()
    program = bench("search")
    faiss.omp_set_num_threads(os.cpu_count())
    rng = np.random.default_rng(0)
    print(f"{os.cpu_count()} threads, FAISS {faiss.__version__}, medians of {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f32"
        rows = np.memmap(path, np.float32, "w+", shape=(args.rows, DIM))
        for first in range(0, args.rows, 100_000):
            part = rows[first:first + 100_000]
            part[:] = unit(rng.standard_normal(part.shape, np.float32))
        rows.flush()
        known = rng.choice(args.rows, 512, replace=False)
        mated = unit(rows[known] + 0.05 * rng.standard_normal((512, DIM), np.float32))
        queries = np.ascontiguousarray(np.stack([mated, unit(rng.standard_normal((512, DIM), np.float32))], 1).reshape(-1, DIM))
        for kind in ("f32", "int8"):
            ours = Ours(program, path)
            index = faiss.IndexFlatIP(DIM) if kind == "f32" else faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
            if kind == "int8":
                index.train(rows[:100_000])
            for first in range(0, args.rows, 100_000):
                index.add(rows[first:first + 100_000])
            for num in (1, 16, 256):
                compare(f"{args.rows} rows, {kind}", ours, kind, index, queries[:num], args.rounds)
            mine, theirs = ours.search(kind, queries)[1], index.search(queries, TOP)[1].tolist()
            if kind == "f32":
                exact = mine
                same = sum(a == b for a, b in zip(mine, theirs))
                print(f"f32: the five best rows are FAISS's for {same} of {len(queries)} queries")
            else:
                for name, found in (("maskinv", mine), ("FAISS", theirs)):
                    same = sum(a == b for a, b in zip(found, exact))
                    print(f"int8: {name}'s five best rows are those of f32 for {same} of {len(queries)} queries")
            size = index.sa_code_size() * args.rows / 1e6
            print(f"{kind}: maskinv {ours.megabytes():.0f} MB resident with the f32 file mapped, FAISS's codes {size:.0f} MB", flush=True)
            ours.process.kill()
            del index
    if args.huge:
        ours = Ours(program, args.huge)
        index = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(rng.uniform(-1, 1, (10_000, DIM)).astype(np.float32))
        block = rng.random((100_000, DIM), np.float32) * 2 - 1
        for _ in range(0, args.huge, 100_000):
            index.add(block)
        for num in (1, 16):
            compare(f"{args.huge} rows, int8", ours, "int8", index, queries[:num], args.rounds)
        print(f"maskinv {ours.megabytes():.0f} MB resident, FAISS's codes {index.sa_code_size() * args.huge / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
