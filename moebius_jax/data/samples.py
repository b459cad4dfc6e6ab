"""What flows from a data set to the training step: the one description of a sample, alone and in batches."""

from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


class PixelSample(NamedTuple):
    """A picture to be encoded.

    Attributes:
        image: square.
        hole: True where to repaint.
        task: 0 background (category ids 0..9), 1 foreground (10..19).
    """

    image: UInt8[np.ndarray, "*B S S 3"]
    hole: Bool[np.ndarray, "*B S S"]
    task: Int[np.ndarray, "*B"]

    @classmethod
    def blank(cls, size: int) -> Self:
        """A sample that holds nothing: for its shapes and dtypes."""
        return cls(
            image=np.zeros((size, size, 3), np.uint8), hole=np.zeros((size, size), bool), task=np.int32(0)
        )


class LatentSample(NamedTuple):
    """What the networks are trained on.

    Attributes:
        moments: mean and standard deviation of the image's posterior, scaled; fp16 where they are kept on
            disk, fp32 where they come from an encoder.
        masked_moments: those of the image with its hole grey.
        hole: on the latent grid, True where to repaint.
        task: see `PixelSample`.
    """

    moments: Float[np.ndarray, "*B h w 2c"]
    masked_moments: Float[np.ndarray, "*B h w 2c"]
    hole: Bool[np.ndarray, "*B h w"]
    task: Int[np.ndarray, "*B"]

    @classmethod
    def blank(cls, latent_shape: tuple[int, int, int], dtype: type = np.float16) -> Self:
        """A sample of latents [h, w, c] that holds nothing: for its shapes and dtypes."""
        *grid, channels = latent_shape
        moments = np.zeros((*grid, 2 * channels), dtype)
        return cls(moments=moments, masked_moments=moments, hole=np.zeros(grid, bool), task=np.int32(0))


Sample = PixelSample | LatentSample


class Batch(NamedTuple):
    """Samples side by side.

    Attributes:
        samples: every leaf with a first axis B.
        index: each sample's place in the global batch, which its noise is drawn from.
    """

    samples: Sample
    index: Int[np.ndarray, " B"]
