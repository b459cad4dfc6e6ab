"""The network that comes with the package: the student's four switches, small, at 128 px; see docs/tiny.md.

    sh examples/train_tiny.sh WORK                 # photographs, autoencoder, latents, all stages
    python train.py configs/tiny.py:crops …        # the first: crops of 64 px, a quarter of the work a sample
    python train.py configs/tiny.py:whole …        # the second: from the first one's weights, grown

The third and fourth are examples/tiny/sharpen.py and one_step.py. Hardware and time: two CPU cores, four
hours.
"""

from moebius_jax.data.augment import AugmentConfig
from moebius_jax.data.config import DataConfig
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.distillation.config import LossConfig
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.models import UNetConfig
from moebius_jax.training.config import CheckpointConfig, LogConfig, TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig


def get_config(stage: str = "whole") -> TrainConfig:
    """`stage` is "crops" or "whole"."""
    if stage not in ("crops", "whole"):
        raise ValueError(f"stage is {stage!r}; expected crops or whole, as in configs/tiny.py:whole")
    is_first = stage == "crops"
    return TrainConfig(
        student=UNetConfig.student(
            channels=(64, 128, 256),
            transformers=(False, True, True),  # at the first level they would double the time
            layers_per_block=1,
            latent_size=16 if is_first else 32,
            embedding_dim=64,
            context_dim=64,
            prediction_type="v_prediction",  # colours are learnt much sooner than from the noise
        ),
        data=DataConfig(
            kind="latents",
            augment=AugmentConfig(
                image_size=128, masks=("thick_256", "medium_256", "thick_512", "medium_512")
            ),
            loader=LoaderConfig(threads=1, prefetch=2, max_bad_fraction=0.0),
        ),
        loss=LossConfig(terms=("task",)),
        optimizer=OptimizerConfig(
            learning_rate=3e-3 if is_first else 1.5e-3,
            warmup_steps=50,
            schedule="cosine",
            newton_schulz_dtype="float32",
        ),
        batch_size=32 if is_first else 16,
        steps=1200 if is_first else 420,
        timestep_sampling="uniform",  # colours and shapes are decided at the noisy end
        ema_decay=0.995,
        dtype="float32",
        vae_dtype="float32",
        # The photographs have no foreground samples; and what predicts the velocity can begin at pure noise.
        sampling=SamplingOptions(
            guidance_scale=1.0, num_inference_steps=1, strength=1.0, scheduler="ddim_trailing", refine=0.5
        ),
        checkpoint=CheckpointConfig(every=100, keep=2, keep_every=None),
        log=LogConfig(every=25, grid_every=400, grid_images=8, validate_every=200, validation_samples=128),
    )
