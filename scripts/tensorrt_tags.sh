#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tensorrt_tags.sh CLONE
# Compiles the plugin's sources against the headers of every known tag of a clone of NVIDIA/TensorRT, and compares the
# headers of the oldest and the newest one with their hashes. CI cannot: PyPI has one set of headers.
set -euo pipefail
clone=$(realpath "${1:?usage: tensorrt_tags.sh CLONE}")
cd "$(dirname "$0")/.."
folders=
for tag in $(sed -n 's/^shadowc_tensorrt_tag(\(v[0-9.]*\) .*/\1/p' cmake/tensorrt_header_hashes.cmake); do
  mkdir -p "build/tensorrt_tags/$tag"
  git -C "$clone" archive "$tag" include | tar -x -C "build/tensorrt_tags/$tag"
  folders=$folders:$PWD/build/tensorrt_tags/$tag/include
done
TENSORRT_INCLUDE_DIR=${folders#:} .venv/bin/pytest -n0 -q tests/tensorrt_plugin/test_headers.py \
  -k 'headers_that_are_here or match_their_hash'
