"""Compares what `maskinv embed` makes of photos with the same steps by OpenCV, NumPy and ONNX Runtime.

    pip install opencv-python-headless onnxruntime
    cargo build --release
    python3 scripts/compare_photos.py DATA DETECTOR.onnx NETWORK.onnx target/release/maskinv

DATA is a folder with images/PERSON/PERSON_0001.jpg and pairs.txt in LFW's format (its first line has the number of
folds, one if it has a single number, and of pairs of each kind in a fold). DETECTOR is YuNet; NETWORK takes RGB as
(x - 127.5) / 127.5 in 112x112.

Both sides read the photos as PNG files that OpenCV has decoded, as decoders of JPEG differ by a grey level. Here a face
is found by OpenCV's FaceDetectorYN at 640 pixels at most; a search at 320 adds those that overlap none of them, and one
with a border is made if both find nothing. The largest is aligned as by insightface's norm_crop, and embedded together
with its mirror image.

Prints the cosines of both embeddings of each photo, the distances of the faces' points, and the accuracies over the
pairs at the best threshold. For each photo whose cosine is too low it prints how far the boxes' centres are apart and
the cosine when this script aligns maskinv's points, of which it knows hundredths of pixels: that tells a difference in
the search from one in alignment or network. Exit code 1 unless 99% of the photos have a cosine of 0.999 and the
accuracies differ by one pair at most.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

SCORE, OVERLAP, SIDE, CROP = 0.6, 0.3, 640, 112
BORDER, BORDERED = 0.3, 0.75
LEAST_COSINE, LEAST_SHARE, MOST_PAIRS = 0.999, 0.99, 1
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)


def scaled(photo, scale):
    """The photo at a scale; halved by means of squares first where it is more than twice as large."""
    height, width = photo.shape[:2]
    w, h = max(int(width * scale), 1), max(int(height * scale), 1)
    while photo.shape[1] > 2 * w and photo.shape[0] > 2 * h:
        rows, columns = photo.shape[0] // 2, photo.shape[1] // 2
        photo = cv2.resize(photo[: 2 * rows, : 2 * columns], (columns, rows), interpolation=cv2.INTER_AREA)
    return photo if photo.shape[:2] == (h, w) else cv2.resize(photo, (w, h))


def look(detector, photo, scale, border=0.0):
    """Faces in one size of a photo, in its pixels: left, top, width, height, five points, score."""
    image = scaled(photo, scale)
    height, width = image.shape[:2]
    edge = int(border * max(height, width) + 0.5)
    image = cv2.copyMakeBorder(image, edge, edge, edge, edge, cv2.BORDER_CONSTANT, value=0)
    detector.setInputSize(image.shape[1::-1])
    faces = detector.detect(image)[1]
    faces = np.zeros((0, 15)) if faces is None else faces.astype(np.float64)
    faces[:, :2] -= edge
    faces[:, 4:14] -= edge
    faces[:, :14] *= np.tile([photo.shape[1] / width, photo.shape[0] / height], 7)
    return faces


def overlap(a, b):
    """Shared part of two boxes in whole pixels, cut off as OpenCV's Rect2i is made of floats."""
    a, b = np.trunc(a[:4]), np.trunc(b[:4])
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    shared = sides.clip(0).prod()
    union = a[2:].clip(0).prod() + b[2:].clip(0).prod() - shared
    return shared / union if union > 0 else 0.0


def largest(detector, photo):
    """The largest face of a photo, or none."""
    whole = SIDE / max(photo.shape[:2])
    faces = list(look(detector, photo, min(whole, 1.0)))
    for face in look(detector, photo, whole / 2):
        if all(overlap(known, face) <= OVERLAP for known in faces):
            faces.append(face)
    if not faces:
        faces = look(detector, photo, BORDERED * whole / (1 + 2 * BORDER), BORDER)
    faces = np.array(faces).reshape(-1, 15)
    return faces[np.argmax(faces[:, 2] * faces[:, 3])] if len(faces) else None


def aligned(photo, points):
    """insightface's norm_crop: the similarity transform of least squares (Umeyama, PAMI 1991)."""
    from_mean, to_mean = points.mean(0), TEMPLATE.mean(0)
    start, end = points - from_mean, TEMPLATE - to_mean
    u, sizes, v = np.linalg.svd(end.T @ start / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(u @ v))])
    turn = u @ np.diag(signs) @ v
    matrix = (sizes * signs).sum() / (start**2).sum(1).mean() * turn
    matrix = np.column_stack([matrix, to_mean - matrix @ from_mean])
    return cv2.warpAffine(photo, matrix, (CROP, CROP), flags=cv2.INTER_LINEAR, borderValue=0)


def embedder(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def embed(crop):
        blob = ((crop[:, :, ::-1].astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)
        both = [np.ascontiguousarray(image)[None] for image in (blob, blob[:, :, ::-1])]
        total = sum(session.run(None, {name: image})[0][0] for image in both)
        return total / np.linalg.norm(total)

    return embed


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")


def by_maskinv(args, photos, out):
    """Embeddings, and boxes with points, by photo."""
    run(args.maskinv, "embed", args.network, photos, "--detector", args.detector, "--detect", "--skip-unusable",
        "--out", out / "ours.npy")  # fmt: skip
    rows = np.load(out / "ours.npy").astype(np.float64)
    names = (out / "ours.txt").read_text().splitlines()
    if len(names) != len(rows):
        sys.exit(f"expected a name for each of {len(rows)} rows, found {len(names)}")
    # The names may begin with the folder.
    at = {Path(name).relative_to(photos) if Path(name).is_absolute() else Path(name): i for i, name in enumerate(names)}
    run(args.maskinv, "align", photos, out / "crops", "--detector", args.detector, "--detect")
    faces = {}
    with open(out / "crops" / "faces.csv", newline="") as file:
        for row in csv.DictReader(file):
            left, top, right, bottom = (float(row[key]) for key in ("left", "top", "right", "bottom"))
            points = [float(row[part + axis]) for part in ("le", "re", "n", "lm", "rm") for axis in "xy"]
            faces[Path(row["photo"])] = np.array([left, top, right - left, bottom - top, *points])
    return {name: rows[i] for name, i in at.items()}, faces


def read_pairs(path):
    """The pairs' photos, and whether they are of one person."""
    lines = path.read_text().splitlines()
    numbers = [int(x) for x in lines[0].split()]
    num_folds, num = numbers if len(numbers) == 2 else (1, numbers[0])
    pairs = []
    for line in lines[1 : 1 + 2 * num_folds * num]:
        parts = line.split()
        is_same = len(parts) == 3
        ends = [(parts[0], parts[1]), (parts[0], parts[2])] if is_same else [parts[:2], parts[2:]]
        pairs.append(([Path(name) / f"{name}_{int(i):04d}.png" for name, i in ends], is_same))
    return pairs


def num_right(pairs, embeddings):
    """The largest number of pairs that one threshold tells right; a photo without a face is like no other."""
    have = [all(photo in embeddings for photo in photos) for photos, _ in pairs]
    cosines = [embeddings[a] @ embeddings[b] if both else -2.0 for ((a, b), _), both in zip(pairs, have)]
    cosines, same = np.array(cosines), np.array([is_same for _, is_same in pairs])
    return max(int(((cosines >= limit) == same).sum()) for limit in [*np.unique(cosines), 2.0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "detector", "network", "maskinv"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    detector = cv2.FaceDetectorYN.create(str(args.detector), "", (320, 320), SCORE, OVERLAP, 1_000_000)
    embed = embedder(str(args.network))
    expected, faces, with_ours, names = {}, {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder).resolve() / "photos", Path(folder).resolve() / "out"
        out.mkdir()
        for path in sorted((args.data / "images").glob("*/*.jpg")):
            name = Path(path.parent.name) / f"{path.stem}.png"
            (photos / name).parent.mkdir(parents=True, exist_ok=True)
            photo = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if photo is None or not cv2.imwrite(str(photos / name), photo):
                sys.exit(f"{path}: cannot be read or written as PNG")
            names.append(name)
        if not names:
            sys.exit(f"{args.data}: no images/PERSON/*.jpg")
        found, found_faces = by_maskinv(args, photos, out)
        for name in names:
            photo = cv2.imread(str(photos / name), cv2.IMREAD_COLOR)
            face = largest(detector, photo)
            if face is not None:
                faces[name] = face
                expected[name] = embed(aligned(photo, face[4:14].reshape(5, 2)))
            if name in found_faces:
                with_ours[name] = embed(aligned(photo, found_faces[name][4:14].reshape(5, 2)))
    strangers = [str(name) for name in {**found, **found_faces} if name not in names]
    if strangers or found.keys() != found_faces.keys():
        sys.exit(f"embed and align of maskinv name other photos than expected, such as {strangers[:3]}")

    both = [name for name in names if name in expected and name in found]
    neither = sum(name not in expected and name not in found for name in names)
    cosines = {name: float(expected[name] @ found[name]) for name in both}
    distances = {
        name: np.linalg.norm((faces[name][4:14] - found_faces[name][4:14]).reshape(5, 2), axis=1).max() for name in both
    }
    for name in names:
        if (name in expected) != (name in found):
            print(f"{name}: a face {'here' if name in expected else 'in maskinv'} alone")
        elif name in both and cosines[name] < LEAST_COSINE:
            centres = [face[:2] + face[2:4] / 2 for face in (faces[name], found_faces[name])]
            apart = np.linalg.norm(centres[0] - centres[1])
            print(
                f"{name}: cosine {cosines[name]:.6f}; centres {apart:.2f} pixels apart, points {distances[name]:.2f}; "
                f"cosine with maskinv's points {with_ours[name] @ found[name]:.6f}"
            )
    if not both:
        sys.exit("no photo has a face on both sides")
    # A photo without a face on both sides is no difference.
    share = (sum(cosine >= LEAST_COSINE for cosine in cosines.values()) + neither) / len(names)
    values = np.array(list(cosines.values()))
    given = np.array([with_ours[name] @ found[name] for name in both])
    far = np.array(list(distances.values()))
    print(
        f"{len(names)} photos, {len(both)} with a face on both sides, {neither} on neither; "
        f"{share:.2%} with a cosine of {LEAST_COSINE} or more"
    )
    print(f"cosines: lowest {values.min():.6f}, 1st percentile {np.percentile(values, 1):.6f}")
    print(f"cosines with maskinv's points: lowest {given.min():.6f}, 1st percentile {np.percentile(given, 1):.6f}")
    print(f"points: largest distance {far.max():.3f} pixels, 99th percentile {np.percentile(far, 99):.3f}")
    pairs = read_pairs(args.data / "pairs.txt")
    right = [num_right(pairs, embeddings) for embeddings in (expected, found)]
    apart = abs(right[0] - right[1])
    print(
        f"{len(pairs)} pairs: {right[0]} right here ({right[0] / len(pairs):.2%}), {right[1]} by maskinv "
        f"({right[1] / len(pairs):.2%}), {apart} apart"
    )
    sys.exit(bool(share < LEAST_SHARE or apart > MOST_PAIRS))


if __name__ == "__main__":
    main()
