#!/usr/bin/env bash
# Runs the native tests under AddressSanitizer and UndefinedBehaviorSanitizer, with the kernel's own
# scratch memory filled with NaN before every call:  bash tests/native/sanitize.sh
# PYTHON chooses the interpreter (with torch, pytest, hypothesis, setuptools), CXX the compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

MONOKERNEL_CXXFLAGS="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined \
  -fno-sanitize-recover=undefined -DMK_POISON"
export MONOKERNEL_CXXFLAGS
"$python" setup.py -q build_ext --build-lib "$work" --build-temp "$work/temp"
library=$work/monokernel/_native.so
if [ ! -f "$library" ]; then
  cat "$work/monokernel/_native_build.txt" >&2
  exit 1
fi

# Python itself is not instrumented: its allocations at exit are not ours to report.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
export MONOKERNEL_LIBRARY=$library
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
  "$python" -m pytest -q -p no:cacheprovider tests/test_cpu.py tests/test_operands.py \
  tests/test_programs.py tests/test_zoo.py::test_value_penalty_and_gradients \
  tests/test_columns.py::test_the_zoo \
  tests/test_monotone.py::test_the_native_bound_is_that_of_the_intervals \
  tests/test_monotone.py::test_the_native_step_is_that_of_pytorch \
  tests/test_monotone.py::test_parameters_of_any_node_that_are_no_numbers_prove_nothing \
  tests/test_certify.py::test_the_native_forms_are_those_of_pytorch \
  tests/test_certify.py::test_quadratic_forms_of_weights_that_are_no_numbers_bound_nothing \
  tests/test_certify.py::test_a_search_of_several_layers_leaves_no_piece_out \
  -k "not second_derivative" "$@"
