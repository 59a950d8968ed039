"""Compares embeddings written by maskinv with those of onnxruntime on the same pixels.

    pip install onnxruntime==1.32.0 numpy opencv-python-headless
    maskinv embed MODEL.onnx FOLDER --no-flip --out e.npy
    python3 scripts/compare_onnxruntime.py MODEL.onnx e.npy

FOLDER should contain PNGs: JPEG decoders differ by a grey level in some pixels, which alone lowers the cosine of two
embeddings of one photo to 0.9995. Prints the number of images and the lowest cosine; the exit code is 1 if that is
below 0.99999. The model must take RGB, (x - 127.5) / 127.5.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def main():
    model, npy = sys.argv[1:3]
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    ours, paths = np.load(npy).astype(np.float64), Path(npy).with_suffix(".txt").read_text().splitlines()
    assert len(ours) == len(paths), f"{len(ours)} embeddings, {len(paths)} names"
    least = 1.0
    for embedding, path in zip(ours, paths):
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB).astype(np.float32)
        x = ((image - 127.5) / 127.5).transpose(2, 0, 1)[None]
        y = session.run(None, {name: np.ascontiguousarray(x)})[0][0].astype(np.float64)
        least = min(least, float(y @ embedding / np.linalg.norm(y) / np.linalg.norm(embedding)))
    print(f"{len(paths)} images, lowest cosine {least:.8f}")
    sys.exit(least < 0.99999)


if __name__ == "__main__":
    main()
