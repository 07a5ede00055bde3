#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prints the pip option that takes torch from PyTorch's CPU index, or nothing: torch's default Linux build carries
# gigabytes of CUDA libraries, which a machine without an NVIDIA GPU does not need.
# usage: torch_index.sh PYTHON
set -euo pipefail
index=https://download.pytorch.org/whl/cpu

if [ -e /dev/nvidia0 ] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then exit 0; fi
if timeout 3 "$1" -c "import urllib.request; urllib.request.urlopen('$index/torch/', timeout=3).read(1)" 2>/dev/null; then
  echo "--index-url=$index"
fi
