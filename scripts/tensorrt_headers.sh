#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tensorrt_headers.sh PYTHON
# The headers that the TensorRT plugin is built with come with TensorRT itself, not with its Python wheels. Where nvcc
# is and they are not, takes a set (10.14) from PyPI: the package kernel-lens (MIT) carries NVIDIA's Apache-2.0 headers.
# They go to build/tensorrt_headers/<version>, where CMake looks last. One line says what came; nothing is an error,
# since everything but the plugin builds without them.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: tensorrt_headers.sh PYTHON}
package=kernel-lens==2.0.1
sha256=07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0
folder=build/tensorrt_headers/10.14

command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || exit 0
[ -z "${TENSORRT_INCLUDE_DIR:-}" ] || exit 0
for place in /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu /usr/include /usr/local/tensorrt/include \
             "${TRT_ROOT:-/nowhere}/include" "$folder"; do
  [ ! -e "$place/NvInferRuntime.h" ] || exit 0
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '%s --hash=sha256:%s\n' "$package" "$sha256" >"$work/requirements.txt"
if ! "$python" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary :all: --require-hashes \
     --retries 1 --timeout 10 --dest "$work" --requirement "$work/requirements.txt" >"$work/log" 2>&1; then
  echo "no TensorRT headers: $package could not be had ($(tail -n 1 "$work/log")); its plugin is not built"
  exit 0
fi
"$python" -m zipfile -e "$work"/kernel_lens-*.whl "$work/wheel"
mkdir -p "$(dirname "$folder")"
rm -rf "$folder"
mv "$work/wheel/kernel_lens/include/tensorrt" "$folder"
echo "TensorRT headers 10.14 from $package"
