#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What cross-compiling for 64-bit Arm and running the result needs: the cross compiler and qemu from apt, where that is
# allowed, and arm64 packages of Highway and of ONNX Runtime's headers, unpacked into build/aarch64/root. apt reads the
# lists of arm64 in a folder of its own: the system's architectures stay as they are. What cannot be had is named, and
# left to the tests, which say why they are skipped. Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(pwd)/build/aarch64
log=$folder/packages.log

missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
[ ${#missing[@]} -eq 0 ] || bash scripts/apt_install.sh "${missing[@]}"

if [ -e "$folder/root" ] || ! command -v apt-get >/dev/null || [ "$(dpkg --print-architecture)" = arm64 ]; then
  exit 0
fi
rm -rf "$folder"
mkdir -p "$folder/apt/lists/partial" "$folder/apt/archives/partial"
options=(-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt" -o Dir::Cache="$folder/apt"
  -o Dir::State::status=/dev/null)
if (cd "$folder/apt" && apt-get "${options[@]}" update &&
  apt-get "${options[@]}" download libhwy-dev libhwy1t64 libonnxruntime-dev) </dev/null >"$log" 2>&1; then
  for package in "$folder"/apt/*.deb; do dpkg -x "$package" "$folder/part"; done
  mv "$folder/part" "$folder/root"
else
  printf 'no arm64 packages from apt (why: %s): the tests for Arm are skipped\n' "$log"
fi
rm -rf "$folder/apt"
