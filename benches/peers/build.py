"""Builds our benchmarks for the scripts that run them beside others."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(name):
    """Builds the benchmark of this name and returns its path."""
    command = ["cargo", "bench", "--bench", name, "--no-run", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    built = (json.loads(line) for line in lines)
    return next(b["executable"] for b in built if b.get("executable") and b["target"]["name"] == name)
