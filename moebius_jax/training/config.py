"""Everything a training run depends on, in one frozen tree of values."""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from moebius_jax.data.augment import OWN_MASKS
from moebius_jax.data.config import DataConfig
from moebius_jax.diffusion.noising import TimestepSampling
from moebius_jax.distillation.config import LossConfig
from moebius_jax.errors import UserError
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.models import UNetConfig, VAEConfig
from moebius_jax.schema import AtLeast0, AtLeastOne, AtLeastZero, Below1, Location, Seed, checked
from moebius_jax.training.optimizer import OptimizerConfig

Compute = Literal["bfloat16", "float32"]


@checked
class CheckpointConfig:
    """When the run's state is saved.

    Attributes:
        every: steps between checkpoints; one is written at the end and on SIGTERM in any case.
        keep: newest ones kept.
        keep_every: those at multiples of it are kept for good; None keeps none.

    Raises:
        ValueError: a field is out of range.
    """

    every: AtLeastOne = 1000
    keep: AtLeastOne = 3
    keep_every: AtLeastOne | None = 20_000


@checked
class LogConfig:
    """What is written down, and how often.

    Attributes:
        every: steps between lines of losses, norms and weights (TensorBoard).
        grid_every: steps between sample grids (TensorBoard and PNG); 0 makes none.
        grid_images: samples in a grid.
        grid_steps: denoising steps of a grid's samples; None takes the model's own.
        validation: held-out data, of the data's kind: what the task loss is measured on, and what the grids
            are made of. Without it there is no such measurement, and grids show the first samples of the
            training data.
        validate_every: steps between measurements of the task loss on `validation`; 0 makes none.
        validation_samples: measured each time, with the same noise; rounded up to whole batches.

    Raises:
        ValueError: a field is out of range.
    """

    every: AtLeastOne = 50
    grid_every: AtLeastZero = 2000
    grid_images: Annotated[int, Field(ge=1, le=1024)] = 8
    grid_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    validation: Location | None = None
    validate_every: AtLeastZero = 1000
    validation_samples: Annotated[int, Field(ge=1, le=2**20)] = 512


@checked
class TrainConfig:
    """One run.

    A network is a converted folder, or an architecture to be drawn at random (for trying out and measuring).

    Attributes:
        student: architecture of what is trained.
        init: folder of weights to start from (a converted release checkpoint, an earlier run's model).
        teacher: what the coarse and fine losses imitate; not needed without them.
        vae: encodes images, and decodes sample grids; not needed for cached latents without grids.
        loss: what is minimised.
        optimizer: and schedule.
        data: what is trained on.
        batch_size: global, over all devices and processes.
        accumulation: equal parts of a batch whose gradients are added up; each has BatchNorm statistics
            and adaptive weights of its own.
        steps: of the run.
        seed: of initial weights, noise, and data; 0 to 2³² - 1.
        ema_decay: upper limit of the moving average's; 0 keeps none.
        noise_offset: weight of the per-channel constant in the noise.
        timestep_sampling: "logit_normal" as the release, "uniform", or the timesteps to draw from (one listed
            twice comes twice as often), such as those of the few steps a network is meant to take.
        batch_norm: statistics of the "global" batch, or of each "device" as the release.
        dtype: compute dtype of student, teacher and the losses' networks; weights and optimiser are fp32.
        stream_dtype: see `moebius_jax.models.precision`.
        teacher_dtype: of the whole teacher. "auto" is float16 on GPUs where the student is in half precision,
            which is nearer to float32 than the student's two; elsewhere those.
        vae_dtype: compute dtype of the VAE.
        fsdp: devices that share one copy of weights and optimiser state; the other axis is `data`.
        sampling: how the finished model is meant to be sampled, its defaults; `sampling.guidance_scale` is 1
            where all data are background samples.
        verify: compare networks' folders and the run's checkpoints with their checksums before they are used.
        checkpoint, log: see there.

    Raises:
        ValueError: a field is out of range or two contradict each other.
    """

    student: UNetConfig = field(default_factory=UNetConfig.student)
    init: Location | None = None
    teacher: Location | UNetConfig | None = None
    vae: Location | VAEConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 768
    accumulation: AtLeastOne = 1
    steps: AtLeastOne = 138_000
    seed: Seed = 0
    ema_decay: Below1 = 0.9999
    noise_offset: AtLeast0 = 0.0357
    timestep_sampling: TimestepSampling = "logit_normal"
    batch_norm: Literal["global", "device"] = "global"
    dtype: Compute = "bfloat16"
    stream_dtype: Compute = "float32"
    teacher_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    vae_dtype: Compute = "bfloat16"
    fsdp: AtLeastOne = 1
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    verify: bool = True
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of accumulation = {self.accumulation}"
            )
        if self.loss.needs_teacher and self.teacher is None:
            terms = " and ".join(loss.name for loss in self.loss.losses if loss.needs_teacher)
            raise ValueError(
                f"the {terms} loss needs a teacher: pass teacher=FOLDER (converted), or loss.terms=task"
            )
        if self.loss.bottleneck_losses and not self.student.transformers[-1]:
            raise ValueError(
                f"student.transformers is {self.student.transformers}; the gradient norm of a loss at the "
                "bottleneck is taken at a transformer of the last level"
            )
        if self.loss.balance_over == "device" and self.batch_norm != "device":
            raise ValueError(
                f"loss.balance_over is device and batch_norm is {self.batch_norm}; a device that balances by "
                "itself has statistics of its own samples: batch_norm=device"
            )
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; expected no more than steps = "
                f"{self.steps}"
            )
        if not isinstance(self.sampling.scheduler, str):
            raise ValueError(
                f"sampling.scheduler is {self.sampling.scheduler}; expected a name, for pipeline.json"
            )
        if self.sampling.truncate:
            raise ValueError("sampling.truncate goes with mode=release of a call; a model cannot keep it")
        if self.log.grid_every:
            try:
                self.sampling.changed(num_inference_steps=self.log.grid_steps)
            except UserError as error:
                raise ValueError(f"log.grid_steps is {self.log.grid_steps}; {error}") from None
        for loss in self.loss.losses:
            loss.require_network()

    @property
    def held_out_data(self) -> DataConfig:
        """The data `log.validation` names; objects of the training data's own stay theirs."""
        augment = self.data.augment
        if augment.foreground_masks == OWN_MASKS:
            augment = dataclasses.replace(augment, foreground_masks=self.data.path)
        return dataclasses.replace(self.data, path=self.log.validation, augment=augment)

    def replace(self, **changes: object) -> "TrainConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)
