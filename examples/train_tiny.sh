#!/bin/sh
# Trains a network like the one that comes with the package (docs/tiny.md), from nothing, and leaves it in WORK/tiny,
# which `sample.py --model` takes; run again, it goes on.
#
#   pip install -e ".[train,eval]"
#   sh examples/train_tiny.sh WORK        # about 1 GB; four hours on two CPU cores
set -eu
work=$1
cd "$(dirname "$0")/.."
python examples/tiny/photographs.py "$work"
test -d "$work/vae" || python examples/tiny/autoencoder.py "$work"
for split in train held_out; do
  test -d "$work/latents_$split" || python cache_latents.py configs/tiny.py "$work/latents_$split" \
    vae="$work/vae" data.path="$work/$split" --draws 1
  test -d "$work/crops_$split" || python examples/tiny/crops.py "$work/latents_$split" "$work/crops_$split"
done
test -d "$work/small/model" || python train.py configs/tiny.py:crops --workdir "$work/small" vae="$work/vae" \
  data.path="$work/crops_train" log.validation="$work/crops_held_out"
test -d "$work/grown" || python examples/tiny/grow.py "$work/small/model/unet" "$work/grown"
python train.py configs/tiny.py:whole --workdir "$work/run" vae="$work/vae" init="$work/grown" \
  data.path="$work/latents_train" log.validation="$work/latents_held_out"
test -d "$work/sharpened/model" || python train.py "examples/tiny/sharpen.py:$work/vae" --workdir "$work/sharpened" \
  init="$work/run/model" data.path="$work/latents_train" log.validation="$work/latents_held_out"
test -d "$work/one_step/model" || python train.py "examples/tiny/one_step.py:$work/vae" --workdir "$work/one_step" \
  init="$work/sharpened/model" data.path="$work/latents_train" log.validation="$work/latents_held_out"
test -d "$work/mean" || python examples/tiny/average.py "$work/sharpened/model" "$work/one_step/model" "$work/mean"
python examples/tiny/package.py "$work/mean" "$work/tiny"
