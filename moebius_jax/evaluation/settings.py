"""What is scored, and how: the settings that painting and scoring share. Names as on the command line."""

from typing import Annotated, Any

import jax
from pydantic import Field

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import PairBy
from moebius_jax.evaluation.metrics.distributions import ENOUGH_FOR_FID
from moebius_jax.evaluation.metrics.lpips import require_size
from moebius_jax.evaluation.metrics.names import (
    INCEPTION_FILE,
    INCEPTION_URL,
    METRICS,
    NEEDS_INCEPTION,
    Metric,
)
from moebius_jax.evaluation.metrics.scorer import Scorer
from moebius_jax.schema import File, checked
from moebius_jax.sharding import make_mesh
from moebius_jax.weights.folder import read_config
from moebius_jax.weights.load import load_inception


@checked
class ScoringSettings:
    """Which metrics, of which pictures.

    Attributes:
        metrics: of `METRICS`.
        inception: folder of FID's converted network; needed by "fid" and "ids".
        small_fid: give FID, P-IDS and U-IDS of fewer than 2048 images too.
        size: originals are brought to size x size; None leaves them as they are.
        masks: a stored set.
        invert_masks: black is the hole.
        pair_by: which mask goes with which image.
        batch_size: pictures scored (and painted) at a time.

    Raises:
        UserError: a value is out of range.
    """

    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = METRICS
    inception: File | None = None
    small_fid: bool = False
    size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    masks: File | None = None
    invert_masks: bool = False
    pair_by: PairBy = "name"
    batch_size: Annotated[int, Field(ge=1, le=2**12)] = 8

    def __post_init__(self) -> None:
        if self.size is not None and "lpips" in self.metrics:
            require_size((self.size, self.size), "--size")

    @property
    def set_metrics(self) -> tuple[Metric, ...]:
        """Those that compare sets, with Inception's help."""
        return tuple(m for m in self.metrics if m in NEEDS_INCEPTION)

    def fewest_images(self, count: int) -> int:
        """The fewest images FID, P-IDS and U-IDS are given for.

        Raises:
            UserError: they are asked for and there are fewer images than that, or no weights.
        """
        asked, enough = self.set_metrics, 2 if self.small_fid else ENOUGH_FOR_FID
        if asked and self.inception is None:
            others = " ".join(m for m in self.metrics if m not in asked) or "lpips"
            raise UserError(
                f"{' and '.join(asked)} need{'s' * (len(asked) == 1)} --inception DIR, made by: "
                f"python convert_weights.py {INCEPTION_FILE} DIR ({INCEPTION_URL}); or leave them out: "
                f"--metrics {others}"
            )
        if asked and count < enough:
            hint = (
                "" if self.small_fid else "; --small-fid gives them all the same, or choose other --metrics"
            )
            raise UserError(f"{' and '.join(asked)} of {count} images: expected {enough} or more{hint}")
        return enough

    def small_set_note(self, count: int) -> list[str]:
        """A line for the report if set metrics are given for few images."""
        if not self.set_metrics or count >= ENOUGH_FOR_FID:
            return []
        return [f"FID, P-IDS and U-IDS of {count:,} images are far from those of many: compare with equals"]

    def make_scorer(self, *, keep_truths: bool = False) -> Scorer:
        """The scorer of these metrics on this process's devices; for `keep_truths` see there.

        Raises:
            UserError: no Inception network in `inception`.
        """
        return Scorer(
            self.metrics,
            make_mesh(jax.local_devices()),
            inception=load_inception(self.inception) if self.set_metrics else None,
            batch_size=self.batch_size,
            keep_truths=keep_truths,
        )

    def inception_facts(self) -> dict[str, Any]:
        """Where Inception's weights came from, for the report."""
        if not self.set_metrics:
            return {}
        source = read_config(self.inception).source
        origin = {key: source[key] for key in ("file", "sha256") if key in source}
        return {"inception": {"folder": str(self.inception), **origin}}
