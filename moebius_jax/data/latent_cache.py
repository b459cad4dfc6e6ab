"""A folder of encoded samples, so that training does not run the encoder again in every epoch.

What is cached is whole samples: image, crop, flip and hole as they were drawn, `draws` of them per image. The
encoder's posterior is kept, so its sampling stays random in training. 130 KB a sample at 512 pixels.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moebius_jax.data.samples import LatentSample
from moebius_jax.errors import UserError
from moebius_jax.schema import AtLeastOne, checked, read_json

INDEX = "latents.json"
FILES = tuple(f"{name}.npy" for name in LatentSample._fields)


@checked
class CacheInfo:
    """What the folder's index says.

    Attributes:
        format: of the folder.
        samples: in it.
        side: of the latent map.
        vae: digest of the encoder; a run with another one is refused.
        made_of: images, draws per image, seed and configuration of the data; for the reader.
    """

    format: Literal["moebius-jax latents 1"] = "moebius-jax latents 1"
    samples: AtLeastOne
    side: AtLeastOne
    vae: str
    made_of: dict[str, Any]


class CacheWriter:
    """Fills a folder with a known number of samples; the index is written last, so half a cache is none."""

    def __init__(self, folder: Path, info: CacheInfo, blank: LatentSample) -> None:
        """`blank` is a sample's shapes and dtypes."""
        self._folder, self._info, self._next = folder, info, 0
        self._arrays = [
            np.lib.format.open_memmap(folder / file, "w+", leaf.dtype, (info.samples, *leaf.shape))
            for file, leaf in zip(FILES, blank, strict=True)
        ]

    def add(self, samples: LatentSample) -> None:
        """Appends a batch."""
        count = len(samples.task)
        for array, values in zip(self._arrays, samples, strict=True):
            array[self._next : self._next + count] = values
        self._next += count

    def close(self) -> None:
        """Writes everything out.

        Raises:
            ValueError: fewer or more samples were added than announced.
        """
        if self._next != self._info.samples:
            raise ValueError(f"{self._next} samples were added, {self._info.samples} announced")
        for array in self._arrays:
            array.flush()
        (self._folder / INDEX).write_text(json.dumps(dataclasses.asdict(self._info), indent=2) + "\n")


class LatentCache:
    """Reads a folder `CacheWriter` filled; the arrays stay on disk until they are used.

    Raises:
        UserError: not such a folder, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.info = read_json(folder / INDEX, CacheInfo)
            self._arrays = LatentSample(*(np.load(folder / file, mmap_mode="r") for file in FILES))
            self._check()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{folder}: not a folder of cached latents ({error.filename} is missing)"
            ) from None
        except UserError:
            raise
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{folder}: damaged cache of latents ({error})") from None

    def _check(self) -> None:
        channels = self._arrays.moments.shape[-1] // 2
        expected = LatentSample.blank((self.info.side, self.info.side, channels))
        for name, array, one in zip(LatentSample._fields, self._arrays, expected, strict=True):
            if array.shape != (self.info.samples, *one.shape) or array.dtype.kind != one.dtype.kind:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")

    def __getstate__(self) -> Path:
        return self._folder  # not the arrays: a worker that is sent a mapped file is sent its contents

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, item: int) -> LatentSample:
        return LatentSample(*(np.array(array[item]) for array in self._arrays))
