"""Statistics of a study beyond independent seeds: seeds crossed with test images, and overlapping subsets."""

import math

import numpy as np
from scipy import stats

from studies.statistics import CONFIDENCE, NAN, Comparison, Interval, Summary, compare_paired, summarize
from timm_igkd.errors import InputError


def two_level_bootstrap(
    correct_a: np.ndarray, correct_b: np.ndarray, n_resamples: int = 5000, seed: int = 0
) -> Interval:
    """Return a - b of mean accuracy in points, with a percentile interval over seeds and test images.

    Every resample draws seeds and, independently of them, images with replacement; both cells and all seeds get the
    same images, since they were tested on the same ones. So the interval speaks of new seeds *and* new test images,
    where the t interval speaks of new seeds on this test set. It counts the noise of single answers twice, so it is
    slightly too wide; with few seeds it is too narrow, like every bootstrap of few.

    Args:
        correct_a: [seeds, images] bool, whether each image was classified correctly.
        correct_b: [seeds, images] bool, the same seeds and images.
        n_resamples: resamples drawn.
        seed: of the draws.

    Source: the pigeonhole bootstrap for crossed factors, Owen, Ann. Appl. Stat. 1 (2007), arXiv 0712.1111.
    """
    if np.shape(correct_a) != np.shape(correct_b) or np.ndim(correct_a) != 2:
        raise InputError(
            f"the two-level bootstrap needs [seeds, images] of both cells, got shapes {np.shape(correct_a)} and "
            f"{np.shape(correct_b)}; use common seeds only"
        )
    differences = np.asarray(correct_a, np.float32) - np.asarray(correct_b, np.float32)
    seeds, images = differences.shape
    if seeds < 2 or images < 2:
        return Interval(100 * float(differences.mean()) if differences.size else NAN)
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=n_resamples)
    found = np.empty(n_resamples)
    for resample in range(n_resamples):
        image_weights = np.bincount(generator.integers(images, size=images), minlength=images)
        found[resample] = seed_weights[resample] @ (differences @ image_weights.astype(np.float32))
    low, high = np.quantile(100 * found / (seeds * images), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(100 * float(differences.mean(dtype=float)), float(low), float(high))


def summarize_subsets(values: np.ndarray, n_left_out: int, n_train: int) -> Summary:
    """Return mean, sd and interval of J Monte Carlo runs, each trained on a random subset of one training set.

    Subsets overlap, so the runs are no independent samples: the variance of their mean is
    (1 / J + n_left_out / n_train) * sd^2 with n_train the images a run is trained on and n_left_out those of the
    training set that it is not (subsets of 80 %: 0.25), and the t distribution has J - 1 degrees of freedom.

    The ratio comes from the correlation between runs that Nadeau and Bengio assume, n_test / (n_test + n_train), for a
    test part held out from the same resample. Here the test set is fixed and belongs to no resample, so the part left
    out of the training set stands for it. It is a heuristic: were a run's accuracy linear in its training images and
    free of other noise, the ratio would be the drawn over the left-out images, 4. Of draws of less than half, which
    hardly overlap, that is the ratio taken here (of 10 %: 0.11, where the heuristic would say 9).

    Args:
        values: [J] float; NaN is left out.
        n_left_out: images of the training set that a run is not trained on.
        n_train: images that each run is trained on.

    Source: Nadeau and Bengio, Inference for the generalization error, Mach. Learn. 52 (2003); in this form in
    scikit-learn's example "Statistical comparison of models using grid search".
    """
    summary = summarize(values, bootstrap=False)
    if not summary.sd > 0:
        return summary
    low, high = _resampled_interval(summary.mean, summary.sd, summary.n, _ratio(n_left_out, n_train))
    return Summary(summary.n, summary.mean, summary.sd, low, high)


def compare_subsets(a: np.ndarray, b: np.ndarray, n_left_out: int, n_train: int) -> Comparison:
    """Compare two cells on common Monte Carlo subsets: the corrected resampled t test on the differences.

    Welch and the effect size stay NaN, as they would take the runs for independent samples.

    Args:
        a: [J] float, one value a subset.
        b: [J] float, the same subsets in the same order.
        n_left_out: images of the training set that a run is not trained on.
        n_train: images that each run is trained on.
    """
    plain = compare_paired(a, b)
    if not plain.sd > 0:
        return plain
    ratio = _ratio(n_left_out, n_train)
    low, high = _resampled_interval(plain.difference, plain.sd, plain.n, ratio)
    t = plain.difference / _resampled_error(plain.sd, plain.n, ratio)
    return Comparison(plain.n, plain.difference, plain.sd, low, high, float(2 * stats.t.sf(abs(t), plain.n - 1)))


def _ratio(n_left_out: int, n_train: int) -> float:
    """Return the factor of the variance that overlap adds, see `summarize_subsets`."""
    return min(n_left_out / n_train, n_train / n_left_out) if n_left_out else 0.0


def _resampled_error(sd: float, n: int, ratio: float) -> float:
    return sd * math.sqrt(1 / n + ratio)


def _resampled_interval(mean: float, sd: float, n: int, ratio: float) -> tuple[float, float]:
    low, high = stats.t.interval(CONFIDENCE, n - 1, loc=mean, scale=_resampled_error(sd, n, ratio))
    return float(low), float(high)
