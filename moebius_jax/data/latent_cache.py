"""A folder of encoded samples, so that training does not run the encoder again in every epoch.

What is cached is whole samples: image, crop, flip and hole as they were drawn, `draws` of them per image. The
encoder's posterior is kept, so its sampling stays random in training. 130 KB a sample at 512 pixels.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from moebius_jax.buckets import ArrayInBucket, fetched, is_bucket
from moebius_jax.data.records import TASKS
from moebius_jax.data.samples import LatentSample
from moebius_jax.errors import UserError, first_line
from moebius_jax.schema import AtLeastOne, checked, read_json

INDEX = "latents.json"
CHECKSUMS = "crc32.npy"  # of each sample
_LOOKED_AT = 8  # samples of which a fault of all is told at the start
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
        self._checksums = np.zeros(info.samples, np.uint32)

    def add(self, samples: LatentSample) -> None:
        """Appends a batch."""
        count = len(samples.task)
        for array, values in zip(self._arrays, samples, strict=True):
            array[self._next : self._next + count] = values
        for i in range(self._next, self._next + count):
            self._checksums[i] = _crc32(LatentSample(*(array[i] for array in self._arrays)))
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
        np.save(self._folder / CHECKSUMS, self._checksums)
        (self._folder / INDEX).write_text(json.dumps(dataclasses.asdict(self._info), indent=2) + "\n")


class LatentCache:
    """Reads a folder `CacheWriter` filled; the arrays stay on disk until they are used.

    Raises:
        UserError: not such a folder, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.info = read_json(fetched(folder / INDEX), CacheInfo)
            self._arrays = LatentSample(*(self._load(file) for file in FILES))
            # Caches of version 0.1 have none.
            self._checksums = self._load(CHECKSUMS) if (folder / CHECKSUMS).exists() else None
            self._check()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{folder}: not a folder of cached latents ({error.filename} is missing)"
            ) from None
        except UserError:
            raise
        except Exception as error:  # NumPy's readers raise whatever a header leads them to
            raise UserError(f"{folder}: damaged cache of latents ({first_line(error)})") from None

    def _load(self, file: str) -> np.ndarray | ArrayInBucket:
        path = self._folder / file
        if is_bucket(path):
            array = ArrayInBucket(path)
            return array if len(array.shape) > 1 else array.whole()
        if path.exists() and not path.is_file():
            raise ValueError(f"{file} is no ordinary file")
        array = np.load(path, mmap_mode="r")
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise ValueError(f"{file} holds no array")
        return array

    def _check(self) -> None:
        """Raises ValueError unless all arrays belong together."""
        moments = self._arrays.moments
        if moments.dtype not in (np.float16, np.float32):
            raise ValueError(f"moments are {moments.dtype}; expected float16 or float32")
        blank = LatentSample.blank((self.info.side, self.info.side, moments.shape[-1] // 2), moments.dtype)
        for name, array, one in zip(LatentSample._fields, self._arrays, blank, strict=True):
            expected = (self.info.samples, *one.shape)
            if array.shape != expected or array.dtype != one.dtype:
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)}; expected {one.dtype}{list(expected)}"
                )
        if self._checksums is not None and self._checksums.shape != (self.info.samples,):
            raise ValueError(f"{CHECKSUMS} is {list(self._checksums.shape)}; expected [{self.info.samples}]")
        tasks = self._arrays.task
        if wrong := sorted(set(np.unique(tasks).tolist()) - set(range(len(TASKS)))):
            raise ValueError(f"task holds {wrong[0]}; expected 0 to {len(TASKS) - 1}")
        for item in range(min(len(self), _LOOKED_AT)):
            self._require_grey_hole(item, np.array(self._arrays.hole[item]))

    def __getstate__(self) -> Path:
        return self._folder  # not the arrays: a worker that is sent a mapped file is sent its contents

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, item: int) -> LatentSample:
        """A sample.

        Raises:
            UserError: it is not what was written.
        """
        sample = LatentSample(*(np.array(array[item]) for array in self._arrays))
        if self._checksums is not None and self._checksums[item] != _crc32(sample):
            raise UserError(f"{self._folder} (sample {item}): not what was written, its checksum is another")
        self._require_grey_hole(item, sample.hole)
        return sample

    def _require_grey_hole(self, item: int, hole: Bool[np.ndarray, "h w"]) -> None:
        # Until 2026-11-30 holes of strokes came as bytes of 255 (see `sharding.plain_bools`), and were not
        # grey in what was encoded.
        if hole.view(np.uint8).max(initial=0) > 1:
            raise UserError(
                f"{self._folder} (sample {item}): encoded with the picture in its hole, by a fault of an "
                "earlier version; expected grey: encode again (cache_latents.py --overwrite)"
            )


def _crc32(sample: LatentSample) -> int:
    total = 0
    for leaf in sample:
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total
