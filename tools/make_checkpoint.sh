#!/usr/bin/env bash
# Makes pahm/assets/tiny.safetensors: renders the data set, trains preset `tiny` on it with one process a core, and
# puts the exported network in its place. Goes on where it was stopped. About an hour on two busy CPU cores.
#   tools/make_checkpoint.sh FOLDER
set -euo pipefail
work=${1:?usage: tools/make_checkpoint.sh FOLDER}
cores=2

pahm synth --out "$work/data" --train 20000 --eval 1000 --seed 0
OMP_NUM_THREADS=1 \
  pahm train --data "$work/data" --out "$work/run" --preset tiny --accelerator cpu --devices "$cores" \
  --strategy ddp --set train.workers=1
cp "$work/run/model.safetensors" "$(dirname "$0")/../pahm/assets/tiny.safetensors"
