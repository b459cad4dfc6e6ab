"""The paper's eight benchmarks: how many images of which size, which masks, which guidance (section 4.1).

The paper names each benchmark's images and family of masks, not the files. Where it leaves something open,
the choice here is ours and is written into every report.
"""

import dataclasses

from moebius_jax.defaults import DEFAULT_GUIDANCE, PORTRAIT_GUIDANCE
from moebius_jax.evaluation.masks import MaskSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: in the paper.
        dataset: where its images come from.
        count: images; None takes all there are.
        size: side of images and masks in pixels.
        masks: what masks are drawn from where none are given.
        masks_like: whose masks the paper says it used.
        variant: the released weights it is run with.
        guidance_scale: the paper's.
    """

    name: str
    title: str
    dataset: str
    count: int | None
    size: int = 512
    masks: MaskSpec
    masks_like: str
    variant: str | None
    guidance_scale: float | None = DEFAULT_GUIDANCE

    @property
    def is_published(self) -> bool:
        """Whether it is one of the paper's, with settings of its own."""
        return self.count is not None


_HALF = MaskSpec(kind="lama_medium", min_ratio=0.4, max_ratio=0.5)
_LARGE, _SMALL = MaskSpec(kind="mat_large"), MaskSpec(kind="mat_small")
_NATURAL = {"variant": "ft_places2", "guidance_scale": DEFAULT_GUIDANCE}
_PLACES = "Places2 validation (val_large), all 36,500 images"

_ALL = (
    Protocol(
        name="places2_test",
        title="Places2 (Test)",
        dataset="Places2 test, 10,000 images (as PowerPaint)",
        count=10_000,
        masks=_HALF,
        masks_like="PowerPaint, 40-50 % hole; ours are LaMa's medium masks with that share",
        **_NATURAL,
    ),
    Protocol(
        name="places2_large",
        title="Places2 (Large)",
        dataset=_PLACES,
        count=36_500,
        masks=_LARGE,
        masks_like="MAT, large",
        **_NATURAL,
    ),
    Protocol(
        name="places2_small",
        title="Places2 (Small)",
        dataset=_PLACES,
        count=36_500,
        masks=_SMALL,
        masks_like="MAT, small",
        **_NATURAL,
    ),
    Protocol(
        name="places2_256",
        title="Places2 (256)",
        dataset="Places2 validation (val_256), all 36,500 images",
        count=36_500,
        size=256,
        masks=MaskSpec(kind="comodgan", size=256),
        masks_like="MI-GAN, CoModGAN's free-form",
        **_NATURAL,
    ),
    Protocol(
        name="celebahq",
        title="CelebA-HQ (512)",
        dataset="CelebA-HQ, 3,000 held-out images (as MAT)",
        count=3_000,
        masks=_LARGE,
        masks_like="MAT, large",
        variant="ft_celebahq",
        guidance_scale=PORTRAIT_GUIDANCE,
    ),
    Protocol(
        name="ffhq",
        title="FFHQ (256)",
        dataset="FFHQ, 10,000 held-out images (as MI-GAN)",
        count=10_000,
        size=256,
        masks=MaskSpec(kind="lama_thick", size=256),
        masks_like="LaMa; which of its three widths the paper does not say, ours are thick",
        variant="ft_ffhq",
        guidance_scale=PORTRAIT_GUIDANCE,
    ),
    Protocol(
        name="lvis",
        title="OOD natural (LVIS)",
        dataset="10,000 images of LVIS",
        count=10_000,
        masks=_HALF,
        masks_like="as Places2 (Test)",
        **_NATURAL,
    ),
    Protocol(
        name="deepfakeface",
        title="OOD portrait (DeepFakeFace)",
        dataset="3,000 images of DeepFakeFace's wiki subset",
        count=3_000,
        masks=_LARGE,
        masks_like="as CelebA-HQ",
        variant="ft_celebahq",
        guidance_scale=PORTRAIT_GUIDANCE,
    ),
    Protocol(
        name="custom",
        title="Custom evaluation",
        dataset="your images",
        count=None,
        masks=_LARGE,
        masks_like="yours, or drawn",
        variant=None,
        guidance_scale=None,
    ),
)
PROTOCOLS: dict[str, Protocol] = {p.name: p for p in _ALL}
