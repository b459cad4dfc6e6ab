"""The kinds of data sets: image files, cached latents, and made-up numbers for measuring speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from moebius_jax.data.augment import AugmentConfig, draw_sample
from moebius_jax.data.latent_cache import LatentCache
from moebius_jax.data.records import read_records
from moebius_jax.data.samples import LatentSample, PixelSample, Sample
from moebius_jax.errors import UserError


class Dataset:
    """Samples by number. To add a kind: docs/extending.md.

    Attributes:
        SAMPLE: what its samples are: pixels, which are encoded on the way to the step, or latents.
        names: of its items, for messages; one per item.
        blank: a sample that holds nothing, for its shapes and dtypes.
    """

    SAMPLE: ClassVar[type[Sample]]
    names: Sequence[str]
    blank: Sample

    @classmethod
    def open(
        cls,
        path: Path | None,
        root: Path | None,
        *,
        augment: AugmentConfig,
        latent_shape: tuple[int, int, int],
    ) -> Self:
        """The data set a configuration names.

        Args:
            path: where it is (`data.path`).
            root: what relative paths in it start from; None is its own folder.
            augment: from file to sample.
            latent_shape: [h, w, c] of what the network is trained on.

        Raises:
            UserError: nothing there, or not of this network's latents.
        """
        raise NotImplementedError

    def draw(self, item: int, rng: np.random.Generator) -> Sample:
        """One sample of an item; all that is random about it comes from `rng`.

        Raises:
            UserError: the item cannot be read.
        """
        raise NotImplementedError


class ImageDataset(Dataset):
    """Image files: a folder, or a JSON-lines file of the release."""

    SAMPLE = PixelSample

    def __init__(self, path: Path, root: Path | None, augment: AugmentConfig) -> None:
        self._records = read_records(path, root)
        self._augment = augment
        self.names = [str(r.image) for r in self._records]
        self.blank = PixelSample.blank(augment.image_size)
        self._foreground: list[Path] = []
        if augment.foreground_masks:
            self._foreground = [r.image for r in read_records(Path(augment.foreground_masks))]

    @classmethod
    def open(
        cls,
        path: Path | None,
        root: Path | None,
        *,
        augment: AugmentConfig,
        latent_shape: tuple[int, int, int],
    ) -> Self:
        del latent_shape  # the encoder's factor decides: see `training.batches.check_images`
        return cls(require_path(path), root, augment)

    def draw(self, item: int, rng: np.random.Generator) -> PixelSample:
        return draw_sample(self._records[item], self._augment, self._foreground, rng)


class LatentDataset(Dataset):
    """Samples encoded once, by `cache_latents.py`."""

    SAMPLE = LatentSample

    def __init__(self, folder: Path) -> None:
        self._cache = LatentCache(folder)
        self.info = self._cache.info
        self.names = [f"{folder} (sample {i})" for i in range(len(self._cache))]
        if not self.names:
            raise UserError(f"{folder}: holds no samples")
        self.blank = LatentSample(*map(np.zeros_like, self._cache[0]))

    @classmethod
    def open(
        cls,
        path: Path | None,
        root: Path | None,
        *,
        augment: AugmentConfig,
        latent_shape: tuple[int, int, int],
    ) -> Self:
        del root, augment  # what is cached is augmented already
        found = cls(require_path(path))
        expected = LatentSample.blank(latent_shape)
        if found.info.side != latent_shape[0]:
            raise UserError(
                f"{path}: latents of side {found.info.side}; the network is trained at {latent_shape[0]}"
            )
        if found.blank.moments.shape != expected.moments.shape:
            raise UserError(
                f"{path}: latents with {found.blank.moments.shape[-1] // 2} channels; the network's have "
                f"{latent_shape[-1]}"
            )
        return found

    def draw(self, item: int, rng: np.random.Generator) -> LatentSample:
        del rng  # what is cached is drawn already
        return self._cache[item]


class SyntheticDataset(Dataset):
    """Noise in the place of latents, for measuring the speed of everything but the data."""

    SAMPLE = LatentSample

    def __init__(self, latent_shape: tuple[int, int, int], items: int = 1 << 20) -> None:
        self._shape = latent_shape
        self.names = [""] * items
        self.blank = LatentSample.blank(latent_shape)

    @classmethod
    def open(
        cls,
        path: Path | None,
        root: Path | None,
        *,
        augment: AugmentConfig,
        latent_shape: tuple[int, int, int],
    ) -> Self:
        del path, root, augment
        return cls(latent_shape)

    def draw(self, item: int, rng: np.random.Generator) -> LatentSample:
        *grid, channels = self._shape
        both = rng.standard_normal((2, *grid, 2 * channels), np.float32).astype(np.float16)
        both[..., channels:] = 0.1
        hole, side = np.zeros(grid, bool), grid[0]
        corner = rng.integers(side // 2, size=2)
        hole[corner[0] :, corner[1] :][: side // 2, : side // 2] = True
        return LatentSample(moments=both[0], masked_moments=both[1], hole=hole, task=np.int32(item % 2))


def require_path(path: Path | None) -> Path:
    """Raises UserError if no `data.path` was given."""
    if path is None:
        raise UserError(
            "no data: pass data.path=FOLDER (or a JSON-lines file), or --dataset synthetic to measure speed"
        )
    return path


DATASETS: dict[str, type[Dataset]] = {
    "images": ImageDataset,
    "latents": LatentDataset,
    "synthetic": SyntheticDataset,
}
