#!/usr/bin/env python3
"""Measures open-set identification on LFW with drawn masks on the probes: one threshold against thresholds by who wears a mask.

    scripts/identification.py MASKINV LFW OUT MODEL...

MASKINV is the program with the feature gallery, LFW a folder of aligned crops `images/PERSON/IMAGE.jpg` with `people.txt`, OUT a new
folder. Each MODEL was calibrated on other folds (`maskinv calibrate MODEL OUT --all-pairs --set 'data.test_folds=[1,2,3,4,5]'`).
People of the test folds with two images or more are enrolled by their first, and their others are the mated probes; those with one image
are strangers. Intervals are 95 % bootstrap intervals over people.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

FPIR = 0.01
REPLICATES = 2000


def folds(path):
    lines = path.read_text().split("\n")
    count, at, found = int(lines[0]), 1, []
    for _ in range(count):
        size = int(lines[at])
        found.append([line.split("\t")[0] for line in lines[at + 1:at + 1 + size]])
        at += 1 + size
    return found


def run(*args):
    return subprocess.run([str(arg) for arg in args], check=True, capture_output=True, text=True).stdout


def link(images, folder):
    for image in images:
        to = folder / image.parent.name / image.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(image.resolve())


def interval(hits):
    """Share of hits, and its interval; `hits` are lists by person."""
    people, rng = list(hits.values()), random.Random(0)
    share = lambda people: sum(map(sum, people)) / sum(map(len, people))
    drawn = sorted(share(rng.choices(people, k=len(people))) for _ in range(REPLICATES))
    low, high = drawn[int(0.025 * REPLICATES)], drawn[int(0.975 * REPLICATES)]
    return f"{100 * share(people):5.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maskinv", type=Path)
    parser.add_argument("lfw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--folds", type=int, nargs="+", default=[6, 7])
    args = parser.parse_args()
    program, out = args.maskinv.resolve(), args.out
    out.mkdir()
    people = [person for fold in args.folds for person in folds(args.lfw / "people.txt")[fold - 1]]
    by_person = {person: sorted((args.lfw / "images" / person).iterdir()) for person in people}
    known = {person: images for person, images in by_person.items() if len(images) > 1}
    strangers = {person: images for person, images in by_person.items() if len(images) == 1}
    link([images[0] for images in known.values()], out / "known")
    probes = out / "probes"
    link([image for images in known.values() for image in images[1:]] + [images[0] for images in strangers.values()], probes)
    masked = out / "masked"
    run(program, "mask", probes, masked, "--aligned", "--kind", "ffp2,respirator,gaiter", "--colour", "green,pink,red", "--seed", 1)
    num = sum(len(images) - 1 for images in known.values())
    print(f"{len(known)} people enrolled, {num} probes of theirs, {len(strangers)} strangers; FPIR {FPIR} by calibration on other people")
    for number, model in enumerate(args.models):
        gallery = out / f"{number}.gallery"
        run(program, "enrol", gallery, out / "known", "--aligned", "--model", model)
        print(f"{model}:")
        for kind, folder in (("without masks", probes), ("with masks", masked)):
            for what, flags in (("one threshold (U-U)", ["--setting", "U-U"]), ("the threshold that fits", [])):
                found = json.loads(run(program, "search", gallery, folder, "--aligned", "--top", 1, "--fpir", FPIR, "--json", *flags))
                missed, mistaken = {}, {}
                for face in found:
                    person, best = Path(face["image"]).parent.name, face["candidates"][0]
                    if person in known:
                        missed.setdefault(person, []).append(not (best["is_match"] and best["person"] == person))
                    else:
                        mistaken.setdefault(person, []).append(best["is_match"])
                print(f"  probes {kind:13}, {what:23}: FNIR {interval(missed)}, FPIR {interval(mistaken)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
