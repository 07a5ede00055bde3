#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The pages of docs/ as a site in build/docs/site, with an environment of its own: the packages of extra `docs`, pinned,
# and nothing of shadowc's. A link that leads nowhere and a page that no menu has end it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v .venv/bin/python || command -v python3)
needs=$("$python" -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))')
venv=build/docs/venv
mkdir -p build/docs
if [ "$needs" != "$(cat build/docs/needs 2>/dev/null)" ] || ! $venv/bin/python -c 'import mkdocs' 2>/dev/null; then
  rm -rf $venv
  "$python" -m venv $venv
  printf '%s\n' "$needs" >build/docs/requirements.txt
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement build/docs/requirements.txt
  printf '%s\n' "$needs" >build/docs/needs
fi
NO_MKDOCS_2_WARNING=1 $venv/bin/python -m mkdocs build --strict --quiet
echo "build/docs/site/index.html"
