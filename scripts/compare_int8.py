#!/usr/bin/env python3
"""Compares a quantised network in maskinv and, from the ONNX file, in onnxruntime: cosines of the embeddings of crops.

    python3 scripts/compare_int8.py MODEL CROPS [--maskinv target/release/maskinv] [--images 20]

Needs numpy, onnxruntime and pillow (benches/peers/requirements.txt). The crops are decoded once and given to both as PNG:
decoders of JPEG differ by more than the two programs. First each of a few layers is quantised alone, then all of them.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("crops", type=Path)
    parser.add_argument("--maskinv", default="target/release/maskinv")
    parser.add_argument("--images", type=int, default=20)
    args = parser.parse_args()
    crops = sorted(path for path in args.crops.rglob("*") if path.suffix in (".jpg", ".png"))[: args.images]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pixels = [np.asarray(Image.open(path).convert("RGB")) for path in crops]
        (folder / "crops").mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / "crops" / f"{i:04}.png")

        def run(*words):
            return subprocess.run([args.maskinv, *map(str, words)], check=True, capture_output=True, text=True).stdout

        def facts(path):
            return json.loads(run("info", path, "--json"))[0]

        def compare(name, keep):
            named, graph, rows = (folder / f"{name}.{end}" for end in ("safetensors", "onnx", "npy"))
            kept = [word for path in keep for word in ("--keep", path)]
            run("quantize", args.model, named, "--data", args.crops, "--images", 64, *kept)
            run("convert", named, graph)
            run("embed", named, folder / "crops", "--aligned", "--no-flip", "--out", rows)
            stated = facts(named)["preprocessing"]
            x = (np.stack(pixels).astype(np.float32) - stated["mean"]) / stated["std"]
            x = np.ascontiguousarray((x[..., ::-1] if stated["channels"] == "bgr" else x).transpose(0, 3, 1, 2))
            levels = onnxruntime.GraphOptimizationLevel
            found = [np.load(rows)]
            for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL):
                options = onnxruntime.SessionOptions()
                options.graph_optimization_level = level
                session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
                y = session.run(None, {session.get_inputs()[0].name: x})[0]
                found.append(y / np.linalg.norm(y, axis=1, keepdims=True))
            ours, optimised, plain = found
            least, itself = (ours * optimised).sum(1).min(), (optimised * plain).sum(1).min()
            print(f"{name}: least cosine {least:.7f}; of onnxruntime to itself without optimisations {itself:.7f}")

        everything = folder / "layers.safetensors"
        run("quantize", args.model, everything, "--data", args.crops, "--images", 8)
        layers = facts(everything)["quantised"]["layers"]
        for alone in layers[:: max(1, len(layers) // 5)]:
            compare(alone, [path for path in layers if path != alone])
        compare(f"all {len(layers)} layers", [])


if __name__ == "__main__":
    main()
