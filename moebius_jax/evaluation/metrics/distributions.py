"""Distances of two sets of features: FID, and how well a linear classifier tells them apart."""

import numpy as np
from jaxtyping import Float
from scipy import linalg

from moebius_jax.errors import UserError

Features = Float[np.ndarray, "N C"]

# Below it the covariance of 2048 features is singular, and FID mostly measures that.
ENOUGH_FOR_FID = 2048


def frechet_distance(a: Features, b: Features) -> float:
    """FID: the Fréchet distance of the normal distributions of two sets (Heusel et al. 2017).

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), in float64. With Σ = AᵀA, A the centred features over
    √(N - 1), the trace of the root is the nuclear norm of A Bᵀ. No root of a matrix is taken, so nothing goes
    wrong where there are fewer items than features and Σ is singular.

    Raises:
        UserError: fewer than two items in a set.
    """
    for features in (a, b):
        if len(features) < 2:
            raise UserError(f"FID of {len(features)} images; expected 2 or more")
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    factor_a, factor_b = _factor(a), _factor(b)
    overlap = linalg.svdvals(factor_a @ factor_b.T).sum()
    traces = np.square(factor_a).sum() + np.square(factor_b).sum()
    return float(max(0.0, difference @ difference + traces - 2 * overlap))


def _factor(features: Features) -> Float[np.ndarray, "M C"]:
    """Some A with AᵀA the covariance, and no more rows than columns."""
    values = features.astype(np.float64)
    centred = (values - values.mean(0)) / np.sqrt(len(values) - 1)
    return linalg.qr(centred, mode="r")[0][: values.shape[1]] if len(values) > values.shape[1] else centred


def inception_discriminative_scores(real: Features, fake: Features) -> tuple[float, float]:
    """P-IDS and U-IDS (Zhao et al. 2021) of results and their originals, in the same order.

    A linear support vector machine is fitted to tell them apart. P-IDS is the share of results it finds
    more real than their own original, U-IDS its share of errors; both from 0 (told apart) to about 0.5.

    Raises:
        UserError: the sets differ in number, or have fewer than two items.
    """
    from sklearn.svm import LinearSVC

    if len(real) != len(fake) or len(real) < 2:
        raise UserError(f"P-IDS of {len(fake)} results and {len(real)} originals; expected pairs, 2 or more")
    inputs = np.concatenate([real, fake])
    targets = np.repeat([1, 0], len(real))
    machine = LinearSVC(dual=False).fit(inputs, targets)
    paired = np.mean(machine.decision_function(fake) > machine.decision_function(real))
    return float(paired), float(1 - machine.score(inputs, targets))
