"""Everything a training run depends on, in one frozen tree of values."""

import dataclasses
import math
from dataclasses import field
from typing import Literal

from moebius_jax.data.config import DataConfig
from moebius_jax.distillation.balance import LossConfig
from moebius_jax.distillation.noising import TimestepSampling
from moebius_jax.distillation.perceptual import PerceptualConfig
from moebius_jax.models import ELatentLPIPSConfig, UNetConfig, VAEConfig
from moebius_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is saved.

    Attributes:
        every: steps between checkpoints; one is written at the end and on SIGTERM in any case.
        keep: newest ones kept.
        keep_every: those at multiples of it are kept for good; None keeps none.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int | None = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down, and how often.

    Attributes:
        every: steps between lines of losses, norms and weights (TensorBoard).
        grid_every: steps between sample grids (TensorBoard and PNG); 0 makes none.
        grid_images: samples in a grid.
        grid_steps: denoising steps of a grid's samples.
        validation: images (folder or JSON lines) or cached latents, of the data's kind, the grids are made
            of; by default the first samples of the training data.
    """

    every: int = 50
    grid_every: int = 2000
    grid_images: int = 8
    grid_steps: int = 20
    validation: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    A network is a converted folder, or an architecture to be drawn at random (for trying out and measuring).

    Attributes:
        student: architecture of what is trained.
        init: folder of weights to start from (a converted release checkpoint, an earlier run's model).
        teacher: what the coarse and fine losses imitate; not needed without them.
        metric: converted E-LatentLPIPS folder, for the perceptual loss.
        vae: encodes images, and decodes sample grids; not needed for cached latents without grids.
        loss, perceptual: what is minimised.
        optimizer: and schedule.
        data: what is trained on.
        batch_size: global, over all devices and processes.
        accumulation: equal parts of a batch whose gradients are added up; each has BatchNorm statistics
            and adaptive weights of its own.
        steps: of the run.
        seed: of initial weights, noise, and data.
        ema_decay: upper limit of the moving average's; 0 keeps none.
        noise_offset: weight of the per-channel constant in the noise.
        timestep_sampling: "logit_normal" as the release, or "uniform".
        batch_norm: statistics of the "global" batch, or of each "device" as the release.
        dtype: compute dtype of student, teacher and metric; weights and optimiser are fp32.
        stream_dtype: see `moebius_jax.models.precision`.
        vae_dtype: compute dtype of the VAE.
        fsdp: devices that share one copy of weights and optimiser state; the other axis is `data`.
        checkpoint, log: see there.

    Raises:
        ValueError: a field is out of range or two contradict each other.
    """

    student: UNetConfig = field(default_factory=UNetConfig.student)
    init: str | None = None
    teacher: str | UNetConfig | None = None
    metric: str | ELatentLPIPSConfig | None = None
    vae: str | VAEConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 768
    accumulation: int = 1
    steps: int = 138_000
    seed: int = 0
    ema_decay: float = 0.9999
    noise_offset: float = 0.0357
    timestep_sampling: TimestepSampling = "logit_normal"
    batch_norm: Literal["global", "device"] = "global"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    stream_dtype: Literal["bfloat16", "float32"] = "float32"
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    fsdp: int = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        positive = {
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "steps": self.steps,
            "fsdp": self.fsdp,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
            "log.every": self.log.every,
            "log.grid_images": self.log.grid_images,
        }
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of accumulation = {self.accumulation}"
            )
        if self.checkpoint.keep_every is not None and self.checkpoint.keep_every < 1:
            raise ValueError(
                f"checkpoint.keep_every is {self.checkpoint.keep_every}; expected 1 or more, or none"
            )
        if not math.isfinite(self.noise_offset):
            raise ValueError(f"noise_offset is {self.noise_offset}; expected a finite number")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected 0 up to, not including, 1")
        if self.timestep_sampling not in ("logit_normal", "uniform"):
            raise ValueError(
                f"timestep_sampling is {self.timestep_sampling!r}; expected logit_normal or uniform"
            )
        if self.loss.needs_teacher and self.teacher is None:
            terms = " and ".join(t for t in self.loss.terms if t in ("coarse", "fine"))
            raise ValueError(
                f"the {terms} loss needs a teacher: pass teacher=FOLDER (converted), or loss.terms=task"
            )
        if "perceptual" in self.loss.terms and self.metric is None:
            raise ValueError(
                "the perceptual loss needs E-LatentLPIPS weights, which are CC-BY-NC and not ours to bundle: "
                "convert them (convert_weights.py) and pass metric=FOLDER, or train without: "
                "loss.terms=coarse,fine,task"
            )

    def replace(self, **changes: object) -> "TrainConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)
