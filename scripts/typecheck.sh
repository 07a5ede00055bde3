#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# mypy over the package as it is installed: passes/ is shadowc.passes, plugins/ is shadowc.plugins. mypy does not see
# the mapping in pyproject.toml, so build/types/ shows it the same tree through links.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=build/types
rm -rf "$tree"
mkdir -p "$tree/shadowc"
for entry in shadowc/*; do ln -s "../../../$entry" "$tree/shadowc/"; done
ln -s ../../../passes ../../../plugins "$tree/shadowc/"
MYPYPATH=$tree .venv/bin/mypy --config-file pyproject.toml --cache-dir build/mypy_cache -p shadowc
MYPYPATH=$tree:. .venv/bin/mypy --config-file pyproject.toml --cache-dir build/mypy_cache -p benchmarks
for folder in scripts $(find examples -name '*.py' -exec dirname {} + | sort -u); do # its files import each other by name
  MYPYPATH=$tree:$folder .venv/bin/mypy --config-file pyproject.toml --cache-dir build/mypy_cache "$folder"/*.py
done
