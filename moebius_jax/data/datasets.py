"""The kinds of data sets: image files, cached latents, and made-up numbers for measuring speed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from moebius_jax.buckets import location
from moebius_jax.data.augment import OWN_MASKS, AugmentConfig, draw_sample
from moebius_jax.data.latent_cache import LatentCache
from moebius_jax.data.records import FolderRecords, ForegroundMasks, ImagePaths, read_records
from moebius_jax.data.samples import LatentSample, PixelSample, Sample
from moebius_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a run says of its data.

    Attributes:
        path: where they are (`data.path`).
        root: what relative paths in them start from; None is their own folder.
        augment: from file to sample.
        latent_shape: [h, w, c] of what the network is trained on.
    """

    path: Path | None = None
    root: Path | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    latent_shape: tuple[int, int, int] = (64, 64, 4)

    def require_path(self) -> Path:
        """`path`; raises UserError if none was given."""
        if self.path is None:
            raise UserError(
                "no data: pass data.path=FOLDER (or a JSON-lines file), or --dataset synthetic to measure "
                "speed"
            )
        return self.path


class SampleNames(Sequence[str]):
    """Names of samples that have none but their number, made when they are asked for."""

    def __init__(self, where: str, count: int) -> None:
        self._where, self._count = where, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> str:
        return f"{self._where} (sample {range(self._count)[i]})"


class Dataset:
    """Samples by number. To add a kind: docs/extending.md.

    Args:
        source: what the run says of it.

    Attributes:
        SAMPLE: what its samples are: pixels, which are encoded on the way to the step, or latents.
        names: of its items, for messages; one per item.
        blank: a sample that holds nothing, for its shapes and dtypes.
        encoder: digest of what latents were made with, where that is known.

    Raises:
        UserError: nothing there, or not of this network's latents.
    """

    SAMPLE: ClassVar[type[Sample]]
    names: Sequence[str | Path]
    blank: Sample
    encoder: str | None = None

    def __init__(self, source: Source) -> None:
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

    def __init__(self, source: Source) -> None:
        path, augment = source.require_path(), source.augment
        self._records = read_records(path, source.root)
        self._augment = augment
        self.names = ImagePaths(self._records)
        # The latents' size is the encoder's business: see `training.batches.check_encoder`.
        self.blank = PixelSample.blank(source.augment.image_size)
        self._objects: Sequence[Path] = ()
        if augment.foreground_masks == OWN_MASKS:
            self._objects = ForegroundMasks(self._records, path)
        elif augment.foreground_masks:
            file = location(augment.foreground_masks)
            masks = read_records(file)
            is_folder = isinstance(masks, FolderRecords)
            self._objects = ImagePaths(masks) if is_folder else ForegroundMasks(masks, file)

    def draw(self, item: int, rng: np.random.Generator) -> PixelSample:
        return draw_sample(self._records[item], self._augment, self._objects, rng)


class LatentDataset(Dataset):
    """Samples encoded once, by `cache_latents.py`."""

    SAMPLE = LatentSample

    def __init__(self, source: Source) -> None:
        folder = source.require_path()
        self._cache = LatentCache(folder)
        self.names = SampleNames(str(folder), len(self._cache))
        if not len(self._cache):
            raise UserError(f"{folder}: holds no samples")
        self.blank, self.encoder = LatentSample(*map(np.zeros_like, self._cache[0])), self._cache.info.vae
        side, channels = source.latent_shape[0], source.latent_shape[-1]
        if self._cache.info.side != side:
            raise UserError(
                f"{folder}: latents of side {self._cache.info.side}; the network is trained at {side}"
            )
        if (found := self.blank.moments.shape[-1] // 2) != channels:
            raise UserError(f"{folder}: latents with {found} channels; the network's have {channels}")

    def draw(self, item: int, rng: np.random.Generator) -> LatentSample:
        del rng  # what is cached is drawn already
        return self._cache[item]


class SyntheticDataset(Dataset):
    """Noise in the place of latents, for measuring the speed of everything but the data."""

    SAMPLE = LatentSample

    def __init__(self, source: Source) -> None:
        self._shape = source.latent_shape
        self.names = SampleNames("synthetic", 1 << 20)
        self.blank = LatentSample.blank(self._shape)

    def draw(self, item: int, rng: np.random.Generator) -> LatentSample:
        *grid, channels = self._shape
        both = rng.standard_normal((2, *grid, 2 * channels), np.float32).astype(np.float16)
        both[..., channels:] = 0.1
        hole, side = np.zeros(grid, bool), grid[0]
        corner = rng.integers(side // 2, size=2)
        hole[corner[0] :, corner[1] :][: side // 2, : side // 2] = True
        return LatentSample(moments=both[0], masked_moments=both[1], hole=hole, task=np.int32(item % 2))


DATASETS: dict[str, type[Dataset]] = {
    "images": ImageDataset,
    "latents": LatentDataset,
    "synthetic": SyntheticDataset,
}
