#!/usr/bin/env bash
# Runs the operators' tests with each minor version of torch from 2.10 on. Builds the wheel once, with the
# newest torch, and installs it with each version in turn, in an environment that is deleted afterwards. Needs
# a network, a C++ compiler and 10 GB. Writes logs and table.md (docs/versions.md has one) to FOLDER.
#   tools/matrix.sh FOLDER [VERSION...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "${1:?usage: tools/matrix.sh FOLDER [VERSION...]}" && cd "$1" && pwd)
shift
unset PYTHONPATH # The tests come from the checkout, the packages from the wheel.
export PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
tests=(tests/pahm_ops/test_{library,torch_internals,backends,op_features,gradient_ops,spiral_conv,mesh_pool}.py
  tests/pahm_ops/test_{vertex_sample,vertex_sample_input,fuzz,triton}.py tests/pahm_ops/mesh/test_sparse.py)

cd "$root"
versions=("$@")
if [ $# = 0 ]; then # The last release of each minor version.
  mapfile -t versions < <(python3 -m pip index versions torch 2>/dev/null | sed -n 's/^Available versions: //p' |
    tr -d ' ' | tr ',' '\n' | grep -E '^[0-9.]+$' | sort -V |
    awk -F. '$1 > 2 || $1 == 2 && $2 >= 10 { last[$1 "." $2] = $0 } END { for (v in last) print last[v] }' | sort -V)
fi
if ! ls "$folder"/pahm-*.whl >/dev/null 2>&1; then
  python3 -m pip wheel --no-deps --wheel-dir "$folder" . >"$folder/build.log" 2>&1
fi

echo "| torch | its CUDA | compiled libraries that load | tests |
|---|---|---|---|" | tee "$folder/table.md"
failed=0
for version in "${versions[@]}"; do
  environment=$folder/torch-$version log=$folder/$version.log
  python3 -m venv --clear "$environment"
  # "===" selects the release itself, not a local build such as 2.13.0+cpu. The oldest Triton's interpreter
  # fails with numpy 2.4.
  "$environment/bin/pip" install --quiet "torch===$version" "numpy<2.4" scipy pytest hypothesis >"$log" 2>&1
  "$environment/bin/pip" install --quiet --no-deps "$folder"/pahm-*.whl >>"$log" 2>&1
  loaded=$(cd "$folder" && "$environment/bin/python" -W ignore -c "
import torch
from pahm_ops import _library
print(torch.version.cuda, '|', 'CPU' * _library.LOADED, 'CUDA' * _library.CUDA_LOADED)")
  "$environment/bin/pytest" -q -rfEs "${tests[@]}" >>"$log" 2>&1 || failed=1
  echo "| $version | $loaded | $(tail -n 1 "$log" | sed 's/ in [0-9.]*s.*//; s/=* *//') |" | tee -a "$folder/table.md"
  rm -rf "$environment"
done
exit $failed
