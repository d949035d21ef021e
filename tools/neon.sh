#!/usr/bin/env bash
# Checks the aarch64 kernels (NEON) on another kind of machine: cross-compiles the checks in tests/neon and
# runs them in an emulator. Needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian's
# g++-aarch64-linux-gnu and qemu-user-static), and the developer's environment for torch's headers.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

include=$(python -c "import os, torch; print(os.path.join(os.path.dirname(torch.__file__), 'include'))")
for op in spiral_conv mesh_pool vertex_sample frozen; do
  # The ops call torch's library, but only the kernels run, and they do not.
  aarch64-linux-gnu-g++ -O3 -std=c++20 -ffp-contract=fast -Wno-psabi -fvisibility=hidden -static -Wl,--unresolved-symbols=ignore-all \
    -DTORCH_TARGET_VERSION=0x020a000000000000 -I"$root/csrc" -I"$root/tests/neon" -I"$include" \
    "$root/tests/neon/check_$op.cpp" -o "$work/check"
  qemu-aarch64-static "$work/check"
done
