#!/bin/sh
# The pictures of docs/gallery: six photographs that tiny was not trained on, each by one command.
set -eu
cd "$(dirname "$0")/.."
for case in coffee gallery/rocket gallery/peaks gallery/dandelion gallery/astronaut gallery/cat; do
  name=$(basename "$case")
  python sample.py --model tiny --image "examples/$case.jpg" --mask "examples/${case}_mask.png" \
    --output "outputs/gallery/$name.png" --mask-dilation 13 --grid --overwrite
done
