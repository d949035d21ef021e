#!/usr/bin/env bash
# Fuzzes the ops and the mesh tables, compiled with the address and undefined-behaviour sanitizers, in a copy
# of the tree. Needs g++ and the developer's environment (CONTRIBUTING.md). Compiling takes minutes. By
# default it then runs the quick tests; `-m slow` runs 20,000 cases of each.
#   tools/sanitize.sh [PYTEST ARGUMENTS]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r "$root"/{build_tools,csrc,pahm_ops,tests,pyproject.toml,setup.py,README.md,LICENSE,NOTICE} "$work"
rm -f "$work"/pahm_ops/*.so "$work"/pahm_ops/mesh/*.so
cd "$work"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS"
PAHM_CUDA=0 CFLAGS=$flags LDFLAGS=$flags python setup.py --quiet build_ext --inplace

# Python itself is not instrumented, so preload the runtimes and ignore Python's own leaks. pytest must not
# capture what a sanitizer writes before it ends the process.
libraries="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=$work \
  python -m pytest --capture=no tests/pahm_ops/test_fuzz*.py tests/pahm_ops/frozen/test_fuzz_programs.py tests/pahm_ops/mesh/test_fuzz.py tests/pahm_ops/mesh/test_range.py "$@"
