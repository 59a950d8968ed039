"""Compares the faces that the example `align` finds with those of OpenCV's FaceDetectorYN and of SCRFD by ONNX Runtime.

    pip install opencv-python-headless onnxruntime
    cargo build --release --example align
    python3 scripts/compare_detectors.py target/release/examples/align DETECTOR.onnx PHOTO...

YuNet is compared at the photos' own sizes, as FaceDetectorYN searches them, with its score and overlap of 0.6 and 0.3.
SCRFD is compared at 640 pixels or the photo's own size, if that is smaller, with the same two, read as insightface's package
reads it: two anchors at each place, distances from it, boxes that count their last pixel. The package scales both sides back
by the rounded height alone; here each side has its own factor, as in maskinv. Photos are scaled as maskinv scales them: one
more than twice as large is first halved by means of squares, where the package passes over pixels, and weights are not
rounded to 11 bits as OpenCV's are, which moves a point by half a pixel in one photo of 620.

Decoders of JPEG differ by a grey level here and there, so both sides read the photos as PNG files that OpenCV decoded.

Prints, for each photo with another number of faces, both numbers, and at the end the largest distance of corners and
points of the others in pixels. Exit code 1 if a number differs or a distance is above half a pixel.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

SCORE, OVERLAP, SIDE = 0.6, 0.3, 640


def yunet(path):
    detector = cv2.FaceDetectorYN.create(path, "", (320, 320), SCORE, OVERLAP, 5000)

    def find(photo):
        detector.setInputSize(photo.shape[1::-1])
        faces = detector.detect(photo)[1]
        faces = np.zeros((0, 15)) if faces is None else faces
        corners = np.concatenate([faces[:, :2], faces[:, :2] + faces[:, 2:4]], 1)
        return np.concatenate([faces[:, 14:], corners, faces[:, 4:14]], 1)

    return find


def scrfd(path):
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name

    def find(photo):
        height, width = photo.shape[:2]
        scale = min(1, SIDE / max(height, width))
        w, h = int(width * scale), int(height * scale)
        side = (max(w, h) + 31) // 32 * 32
        while photo.shape[1] > 2 * w and photo.shape[0] > 2 * h:
            even = photo[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2].astype(np.uint16)
            photo = ((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2] + 2) // 4).astype(np.uint8)
        image = np.zeros((side, side, 3), np.uint8)
        image[:h, :w] = bilinear(photo, w, h)
        blob = ((image[:, :, ::-1].astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None]
        outputs = session.run(None, {name: np.ascontiguousarray(blob)})
        rows = []
        for level, stride in enumerate((8, 16, 32)):
            scores, boxes, points = (outputs[level + 3 * k].reshape(-1, c) for k, c in enumerate((1, 4, 10)))
            places = side // stride
            place = np.arange(places * places).repeat(2)
            at = np.stack([place % places, place // places], 1).astype(np.float32) * stride
            corners = np.concatenate([at - boxes[:, :2] * stride, at + boxes[:, 2:] * stride], 1)
            moved = (points * stride).reshape(-1, 5, 2) + at[:, None]
            rows.append(np.concatenate([scores, corners, moved.reshape(-1, 10)], 1)[scores[:, 0] >= SCORE])
        rows = np.concatenate(rows)
        rows = rows[np.argsort(-rows[:, 0], kind="stable")]
        kept = []
        for row in rows:
            if all(overlap(row[1:5], other[1:5]) <= OVERLAP for other in kept):
                kept.append(row)
        kept = np.array(kept).reshape(-1, 15)
        kept[:, 1:] *= np.tile([width / w, height / h], 7)
        return kept

    return find


def bilinear(photo, width, height):
    def places(size, to):
        at = np.clip((np.arange(to, dtype=np.float32) + 0.5) * np.float32(size / to) - 0.5, 0, size - 1)
        first = at.astype(int)
        return first, np.minimum(first + 1, size - 1), (at - first).astype(np.float32)

    (above, below, v), (left, right, u) = places(photo.shape[0], height), places(photo.shape[1], width)
    photo, u, v = photo.astype(np.float32), u[None, :, None], v[:, None, None]
    rows = photo[above] * (1 - v) + photo[below] * v
    return (rows[:, left] * (1 - u) + rows[:, right] * u + 0.5).astype(np.uint8)


def overlap(a, b):
    def area(box):
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return shared / (area(a) + area(b) - shared)


def main():
    program, model, *photos = sys.argv[1:]
    is_yunet = "yunet" in model
    find = (yunet if is_yunet else scrfd)(model)
    ours = defaultdict(list)
    with tempfile.TemporaryDirectory() as out:
        as_png = {str(Path(out) / f"{number}.png"): photo for number, photo in enumerate(photos)}
        for path, photo in as_png.items():
            cv2.imwrite(path, cv2.imread(photo))
        command = [program, model, str(Path(out) / "crops"), "--as-it-is" if is_yunet else "--once", *as_png]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        for line in lines:
            path, *numbers = line.split("\t")
            ours[as_png[path]].append([float(x) for x in numbers])
    worst, num, differ = 0.0, 0, 0
    for photo in photos:
        expected, found = find(cv2.imread(photo)), np.array(ours[photo]).reshape(-1, 15)
        if len(expected) != len(found):
            differ += 1
            print(f"{photo}: expected {len(expected)} faces, found {len(found)}")
            continue
        num += len(found)
        for row in found:
            # Equal scores may come in another order.
            distance = np.abs(expected[:, 1:] - row[1:]).max(1).min()
            worst = max(worst, distance)
            if distance > 0.5:
                print(f"{photo}: {distance:.2f} pixels from the nearest face")
    print(f"{len(photos)} photos, {num} faces, {differ} photos with another number; largest distance {worst:.3f} pixels")
    sys.exit(bool(differ > 0 or worst > 0.5))


if __name__ == "__main__":
    main()
