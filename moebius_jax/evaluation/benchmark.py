"""What a benchmark is run with: a protocol, and whatever departs from it."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from moebius_jax.defaults import PORTRAIT_GUIDANCE
from moebius_jax.diffusion.solvers import SOLVERS
from moebius_jax.errors import UserError
from moebius_jax.evaluation.masks import KINDS, MaskSpec
from moebius_jax.evaluation.protocols import Protocol
from moebius_jax.evaluation.published import GUIDANCE
from moebius_jax.evaluation.settings import ScoringSettings
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import UNMATCHED_BLUR, InpaintOptions
from moebius_jax.schema import AtLeastOne, File, Seed, checked, one_of

PAPER = {"num_inference_steps": 20, "scheduler": "ddim"}


@checked
class BenchmarkSettings(ScoringSettings):
    """What is painted and scored.

    Attributes:
        protocol: the benchmark.
        images: folder of originals.
        output: folder for results, masks and report.
        count: the first so many images by name; None is the protocol's number.
        mask_kind, mask_ratio, mask_seed: what masks are drawn from where no set is given.
        guidance_scale, num_inference_steps, scheduler, strength: None is the protocol's, or the paper's (of
            strength, where it says nothing, the release's); of one's own images, the model's.
        mask_blur, seed: see `InpaintOptions` and the pipeline. Colours are not matched: the paper
            speaks of no such step.
        guidance_sweep, steps_sweep: values of a sweep, empty for the usual ones; None for no sweep.
        scheduler_sweep: every scheduler.

    Raises:
        UserError: a value is out of range, or two contradict each other.
    """

    protocol: Protocol
    images: File
    output: File
    count: AtLeastOne | None = None
    mask_kind: Annotated[str, one_of(KINDS)] | None = None
    mask_ratio: tuple[float, float] | None = None
    mask_seed: Seed = 0
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    scheduler: str | None = None
    strength: float | None = None
    mask_blur: float = UNMATCHED_BLUR
    seed: Seed = 0
    guidance_sweep: Sequence[float] | None = None
    steps_sweep: Sequence[int] | None = None
    scheduler_sweep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        InpaintOptions(mask_blur=self.mask_blur)
        if self.size is None and self.masks is None:
            raise UserError("--size original needs --masks: those that are drawn are square")
        if self.masks is None:
            self.mask_spec  # noqa: B018 (whether they can be drawn)
        elif self.masks.exists() and self.images.exists() and self.masks.samefile(self.images):
            raise UserError(f"{self.masks}: holds images and masks; give masks a folder of their own")
        if self.masks is None and (self.invert_masks or self.pair_by != "name"):
            raise UserError("--invert-masks and --pair-by are for --masks; drawn masks are white = hole")
        if self.masks is not None and (self.mask_kind or self.mask_ratio or self.mask_seed):
            raise UserError(
                "--mask-kind, --mask-ratio and --mask-seed are for drawing masks; leave out --masks"
            )
        if sum((self.guidance_sweep is not None, self.steps_sweep is not None, self.scheduler_sweep)) > 1:
            raise UserError("guidance_sweep, steps_sweep and scheduler_sweep are one at a time")
        if self.sweep and getattr(self, self.sweep) is not None:
            raise UserError(f"--{self.sweep.replace('_', '-')} has no place in a sweep over it; leave it out")
        self.variations(SamplingOptions(strength=1.0))  # whether a model can run them at all

    @property
    def mask_spec(self) -> MaskSpec:
        """What masks are drawn from."""
        spec = dataclasses.replace(self.protocol.masks, size=self.size, seed=self.mask_seed)
        if self.mask_kind:
            spec = dataclasses.replace(spec, kind=self.mask_kind, min_ratio=0.0, max_ratio=1.0)
        if self.mask_ratio:
            spec = dataclasses.replace(spec, min_ratio=self.mask_ratio[0], max_ratio=self.mask_ratio[1])
        return spec

    @property
    def sweep(self) -> str | None:
        """The setting that is swept."""
        if self.guidance_sweep is not None:
            return "guidance_scale"
        if self.steps_sweep is not None:
            return "num_inference_steps"
        return "scheduler" if self.scheduler_sweep else None

    def usual_sampling(self, own: SamplingOptions) -> SamplingOptions:
        """The settings without a sweep, of a model whose own are `own`: a published protocol has others."""
        if self.protocol.is_published:
            own = SamplingOptions(**PAPER, guidance_scale=self.protocol.guidance_scale)
        names = ("guidance_scale", "num_inference_steps", "scheduler", "strength")
        return own.changed(**{name: getattr(self, name) for name in names})

    def variations(self, own: SamplingOptions) -> list[tuple[str, SamplingOptions]]:
        """The settings to run, each with a label that is a folder's name; "" where there is no sweep."""
        usual = self.usual_sampling(own)
        if self.sweep is None:
            return [("", usual)]
        scales = GUIDANCE["celebahq" if usual.guidance_scale == PORTRAIT_GUIDANCE else "places2_test"]
        values: Sequence[Any] = {
            "guidance_scale": self.guidance_sweep or tuple(scales),
            "num_inference_steps": self.steps_sweep or (5, 10, 20, 50),
            "scheduler": tuple(SOLVERS),
        }[self.sweep]
        short = {"guidance_scale": "guidance", "num_inference_steps": "steps"}.get(self.sweep, self.sweep)
        return [
            (f"{short}_{value}", dataclasses.replace(usual, **{self.sweep: value}))
            for value in dict.fromkeys(values)
        ]
