"""The paper's distillation: 138k steps of batch 768, all four losses, adaptive weights of Eqs 4 and 5.

    python train.py configs/distill.py data.path=train.jsonl
    python train.py configs/distill.py data.kind=latents data.path=latents/
    python train.py configs/distill.py --aot v5e:4x8

Needs, converted by convert_weights.py: the PixelHacker teacher, its VAE, the E-LatentLPIPS network (or
loss.terms=coarse,fine,task without it).

Hardware: the paper took 16 L40S. Time: not measured by us yet; benchmarks/RESULTS.md says what fits a TPU
slice and what a step costs.
"""

from moebius_jax.data.config import DataConfig
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.models import UNetConfig
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        student=UNetConfig.student(remat=True),
        teacher="converted/teacher",
        loss=LossConfig(perceptual=Perceptual(network="converted/elatentlpips")),
        vae="converted/vae",
        data=DataConfig(loader=LoaderConfig(workers=8)),
        # Paper, section 4.1: Muon at 2e-4 with decay 0.1, a tenth at 111k and 129k (OptimizerConfig's own),
        # balance of Eqs 4 and 5 (LossConfig's own), and these two. Of noise offset, timesteps, masks and
        # moving average it says nothing: the first two are the released configuration's, the others guesses.
        batch_size=768,
        steps=138_000,
    )
