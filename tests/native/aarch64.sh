#!/usr/bin/env bash
# Cross-compiles the kernel for aarch64 and runs its self-check under emulation, to see that the NEON
# path is right where no such machine is at hand. Needs (Debian) g++-12-aarch64-linux-gnu, qemu-user.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${CXX:-aarch64-linux-gnu-g++-12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$cxx" -std=c++17 -O2 -static -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi \
  csrc/binding.cpp csrc/describe.cpp csrc/isa_baseline.cpp tests/native/selfcheck.cpp -o "$work/selfcheck"
qemu-aarch64 "$work/selfcheck"
