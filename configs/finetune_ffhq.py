"""Fine-tuning on FFHQ: the task loss, from the distilled student (paper, section 4.1).

    python train.py configs/finetune_ffhq.py data.path=ffhq/

Starts from the released weights, converted to converted/pretrained; init=FOLDER
takes others. Needs converted/vae too. From the paper are devices, batch and steps. The rest it does not say
and is guessed: the task loss alone; learning rate, where it falls (as shares of the run), masks and moving
average as in distill.py.

Hardware: the paper took 4 RTX 3090 for 117k steps of batch 88 on 60 k images. Time: not measured by us yet.
"""

from configs.distill import get_config as distill
from moebius_jax.defaults import PORTRAIT_GUIDANCE
from moebius_jax.distillation.config import LossConfig
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return distill().replace(
        init="converted/pretrained",
        loss=LossConfig(terms=("task",)),
        batch_size=88,
        steps=117_000,
        sampling=SamplingOptions(guidance_scale=PORTRAIT_GUIDANCE),
    )
