"""Every picture's own scores as comma-separated values."""

import csv
import io
import math

from moebius_jax.evaluation.metrics.scores import Scores


def render_csv(scores: Scores) -> str:
    """One line for each picture: name, hole's share, each metric over the whole and inside the hole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(scores.values)
    writer.writerow(["name", "hole_ratio", *(f"{key}{end}" for key in keys for end in ("", "_hole"))])
    for i, name in enumerate(scores.names):
        numbers = [scores.ratios[i], *(scores.values[key][i, part] for key in keys for part in (0, 1))]
        writer.writerow([name, *("" if math.isnan(n) else f"{n:.6g}" for n in numbers)])
    return text.getvalue()
