#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .cache/lowest: an environment with the lowest versions that pyproject.toml allows, and the operators that .venv
# has compiled. Prints its Python. Made once; again when the versions change. Where PyTorch's CPU index cannot be
# reached torch comes with its CUDA libraries: 7 GB on the disk.
# usage: lowest.sh
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/.cache/lowest
stop() { printf 'lowest: %s\n' "$@" >&2; exit 1; }
[ -x .venv/bin/python ] || stop "no .venv here" "to type: make setup"

wanted=$(.venv/bin/python - <<'PYTHON'
import tomllib
from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))
for need in map(Requirement, project["project"]["dependencies"]):
    if need.marker is None or need.marker.evaluate():
        (bound,) = need.specifier
        assert bound.operator == ">=", f"{need}: expected one lower bound"
        print(f"{need.name}=={bound.version}")
print(*project["dependency-groups"]["test"], sep="\n")
PYTHON
)
stamp=$venv/made-$(printf '%s' "$wanted $PWD" | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  index=$(bash scripts/torch_index.sh .venv/bin/python)
  room=$(df --output=avail -B1G . | tail -1)
  need=$([ -n "$index" ] && echo 3 || echo 10)
  [ "$room" -ge "$need" ] || stop "the lowest versions need $need GB on the disk, $room GB are free"
  rm -rf "$venv"
  .venv/bin/python -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-cache-dir)
  if [ -n "$index" ]; then "${pip[@]}" "$(grep '^torch==' <<<"$wanted")" "$index" >&2; fi
  mapfile -t packages <<<"$wanted"
  "${pip[@]}" "${packages[@]}" >&2
  touch "$stamp"
fi
# The same sources and the same compiled operators as in .venv: only the packages differ.
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
from=$(site .venv)
to=$(site "$venv")
[ -n "$from" ] && [ -n "$to" ] || stop "no site-packages in .venv or in $venv" "to type: rm -r $venv, and again"
rm -rf "$to"/*shadowc*
cp -r "$from"/*shadowc* "$to/"
echo "$venv/bin/python"
