"""Times maskinv's ten-fold evaluation beside the published Python one, in turns; prints medians and their ratio.

    pip install numpy scipy scikit-learn
    python3 benches/peers/metrics.py [--rounds 5]

The Python side follows the facts of insightface's `verification.py`, on which ElasticFace's and MaskInv's evaluations are built: for each
of ten folds all 400 (accuracy) and 4000 (TAR at FAR) thresholds, each counted with NumPy on the training folds and, for the accuracy,
on the test fold as well; SciPy interpolates the threshold at FAR 1e-3. Both sides get distances and labels, not embeddings.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    program = bench("metrics")
    rng = np.random.default_rng(0)
    same = (np.arange(6000) // 300 % 2) == 0
    distances = np.where(same, rng.uniform(0.2, 1.6, 6000), rng.uniform(1.2, 2.4, 6000))
    mine, published = [], []
    for _ in range(args.rounds):
        output = subprocess.run([program, "1000"], check=True, capture_output=True, text=True).stdout
        mine.append(float(output.splitlines()[0].rsplit(":", 1)[1].removesuffix("ms")))
        began = time.perf_counter()
        evaluate(distances, same)
        published.append(1e3 * (time.perf_counter() - began))
    ratio = statistics.median(p / m for p, m in zip(published, mine))
    print(f"ten folds of 600 pairs, medians of {args.rounds} rounds: maskinv {statistics.median(mine):.3f} ms, "
          f"published {statistics.median(published):.0f} ms, {ratio:.0f} times")


if __name__ == "__main__":
    main()
