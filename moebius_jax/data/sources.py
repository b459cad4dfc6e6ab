"""The kinds of data sets: image files, cached latents, and made-up numbers for measuring speed."""

from pathlib import Path

import numpy as np

from moebius_jax.data.latent_cache import LatentCache
from moebius_jax.data.loader import Element, Source
from moebius_jax.data.records import read_records
from moebius_jax.data.samples import AugmentConfig, draw_sample
from moebius_jax.errors import UserError


class ImageSource(Source):
    """Samples of image files: `image` uint8 [S, S, 3], `hole` bool [S, S], `task`."""

    def __init__(self, path: Path, root: Path | None, config: AugmentConfig) -> None:
        self._records = read_records(path, root)
        self._config = config
        self.names = [str(r.image) for r in self._records]
        self._foreground: list[Path] = []
        if config.foreground_masks:
            self._foreground = [r.image for r in read_records(Path(config.foreground_masks))]

    def draw(self, item: int, rng: np.random.Generator) -> Element:
        sample = draw_sample(self._records[item], self._config, self._foreground, rng)
        return {"image": sample.image, "hole": sample.hole, "task": np.int32(sample.task)}

    def blank(self) -> Element:
        size = self._config.image_size
        return {
            "image": np.zeros((size, size, 3), np.uint8),
            "hole": np.zeros((size, size), bool),
            "task": np.int32(0),
        }


class SyntheticSource(Source):
    """Noise in the place of latents, for measuring the speed of everything but the data.

    Elements are as those of `LatentSource`, for maps of side `side`.
    """

    def __init__(self, side: int, items: int = 1 << 20) -> None:
        self._side = side
        self.names = [""] * items

    def draw(self, item: int, rng: np.random.Generator) -> Element:
        moments = rng.standard_normal((2, self._side, self._side, 8), np.float32).astype(np.float16)
        moments[..., 4:] = 0.1
        hole = np.zeros((self._side, self._side), bool)
        corner = rng.integers(self._side // 2, size=2)
        hole[corner[0] :, corner[1] :][: self._side // 2, : self._side // 2] = True
        return {"moments": moments[0], "masked_moments": moments[1], "hole": hole, "task": np.int32(item % 2)}


class LatentSource(Source):
    """Samples encoded once by `cache_latents`: posterior moments (mean 4, std 4; scaled) of image and masked
    image, fp16 [h, w, 8], and the hole on the latent grid."""

    def __init__(self, folder: Path) -> None:
        self._cache = LatentCache(folder)
        self.info = self._cache.info
        self.names = [f"{folder} (sample {i})" for i in range(len(self._cache))]
        if not self.names:
            raise UserError(f"{folder}: holds no samples")

    def draw(self, item: int, rng: np.random.Generator) -> Element:
        del rng  # what is cached is drawn already
        return self._cache[item]

    def blank(self) -> Element:
        raise AssertionError("reading an item of a cache never fails alone")
