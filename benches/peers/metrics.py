"""Times maskinv's ten-fold evaluation and its searches in a gallery beside the published Python ones, in turns; prints medians and
their ratios.

    pip install numpy scipy scikit-learn
    python3 benches/peers/metrics.py [--rounds 5]

The Python side follows the facts of insightface's `verification.py`, on which ElasticFace's and MaskInv's evaluations are built: for each
of ten folds all 400 (accuracy) and 4000 (TAR at FAR) thresholds, each counted with NumPy on the training folds and, for the accuracy,
on the test fold as well; SciPy interpolates the threshold at FAR 1e-3. Both sides get distances and labels, not embeddings.
The searches are those of IJB-C in one gallery, as `ijb_evals.py` does them: one product of all embeddings, and every probe's scores
sorted in a loop.
"""

import argparse
import statistics
import subprocess
import time

import numpy as np
from build import bench
from scipy import interpolate
from sklearn.model_selection import KFold


def counts(threshold, distances, same):
    predicted = distances < threshold
    tp = np.sum(np.logical_and(predicted, same))
    fp = np.sum(np.logical_and(predicted, np.logical_not(same)))
    tn = np.sum(np.logical_and(np.logical_not(predicted), np.logical_not(same)))
    return tp, fp, tn


def accuracy(threshold, distances, same):
    tp, _, tn = counts(threshold, distances, same)
    return (tp + tn) / distances.size


def evaluate(distances, same):
    folds = KFold(n_splits=10, shuffle=False)
    accuracies, tars = [], []
    thresholds, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    for train, test in folds.split(distances):
        best = np.argmax([accuracy(t, distances[train], same[train]) for t in thresholds])
        # The published ROC: every threshold on the test fold too.
        on_test = [accuracy(t, distances[test], same[test]) for t in thresholds]
        accuracies.append(on_test[best])
        impostors = np.sum(np.logical_not(same[train]))
        far = np.array([counts(t, distances[train], same[train])[1] / impostors for t in fine])
        far, first = np.unique(far, return_index=True)
        threshold = interpolate.interp1d(far, fine[first], kind="slinear")(1e-3) if far[-1] >= 1e-3 else 0.0
        tars.append(counts(threshold, distances[test], same[test])[0] / np.sum(same[test]))
    return np.mean(accuracies), np.mean(tars)


def search(probes, gallery, people, known):
    similarity = np.dot(probes, gallery.T)
    first, mates, others, strangers = 0, [], [], []
    for scores, person in zip(similarity, people):
        if person in known:
            mate = np.argwhere(known == person)[0, 0]
            order = np.argsort(scores)[::-1]
            first += mate in order[:1]
            mate in order[:5], mate in order[:10]
            mates.append(scores[known == person][0])
            others.append(scores[known != person])
        else:
            strangers.append(scores)
    mates = np.array(mates)
    is_first = mates > np.array(others).max(1)
    strangers = np.sort(np.array(strangers).max(1))[::-1]
    for target in (0.1, 0.01, 0.001):
        threshold = strangers[max(int(len(strangers) * target) - 1, 0)]
        np.logical_and(is_first, mates > threshold).sum()
    return first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    program = bench("metrics")
    rng = np.random.default_rng(0)
    same = (np.arange(6000) // 300 % 2) == 0
    distances = np.where(same, rng.uniform(0.2, 1.6, 6000), rng.uniform(1.2, 2.4, 6000))
    probes, gallery = (rng.uniform(-0.07, 0.07, (n, 512)).astype(np.float32) for n in (19593, 1772))
    people, known = np.arange(19593) % 3531, np.arange(1772)
    mine, published, mine_search, published_search = [], [], [], []
    for _ in range(args.rounds):
        output = subprocess.run([program, "1000"], check=True, capture_output=True, text=True).stdout
        figures = [float(line.rsplit(":", 1)[1].removesuffix("ms")) for line in output.splitlines()[:2]]
        mine.append(figures[0])
        mine_search.append(figures[1])
        began = time.perf_counter()
        evaluate(distances, same)
        published.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        search(probes, gallery, people, known)
        published_search.append(1e3 * (time.perf_counter() - began))
    for what, a, b in [("ten folds of 600 pairs", mine, published), ("19593 searches", mine_search, published_search)]:
        ratio = statistics.median(p / m for p, m in zip(b, a))
        print(f"{what}, medians of {args.rounds} rounds: maskinv {statistics.median(a):.3f} ms, "
              f"published {statistics.median(b):.0f} ms, {ratio:.0f} times")


if __name__ == "__main__":
    main()
