#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares .venv: system packages where that is allowed, torch, the project (editable, with its compiled operators),
# test and lint tools. Safe to repeat. Downloads come from apt and pip only. The full log is build/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$(pwd)
mkdir -p build
log=$here/build/setup.log
: >"$log"
note() { printf 'setup: %s\n' "$*"; }
stop() { printf 'setup: %s\n' "$@" >&2; exit 1; }
logged() { # what, command...: runs the command into the log; shows the log's tail if it fails
  local what=$1 start=$SECONDS
  shift
  printf '\n+ %s\n' "$*" >>"$log"
  if "$@" >>"$log" 2>&1 </dev/null; then
    note "$what ($((SECONDS - start)) s)"
  else
    tail -n 25 "$log" | sed 's/^/    /' >&2
    stop "$what failed; the whole log is $log" ${advice:+"$advice"}
  fi
}
advice=

# --- Python ---------------------------------------------------------------------------------------------------------
# 3.11 to 3.14: what torch has wheels for. A Python without ensurepip (Debian's, before python3-venv) cannot make a .venv.
usable='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
python=
bare=
for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
  "$candidate" -c "$usable" >/dev/null 2>&1 || continue
  if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then python=$candidate && break; fi
  bare=${bare:-$candidate}
done

# --- system packages ------------------------------------------------------------------------------------------------
missing=()
if command -v apt-get >/dev/null; then
  installed() { [[ $(dpkg-query -W -f='${Status}' "$1" 2>/dev/null) == *'ok installed'* ]]; }
  installed libonnxruntime-dev || missing+=(libonnxruntime-dev)
  installed libhwy-dev || missing+=(libhwy-dev)
  command -v c++ >/dev/null || command -v g++ >/dev/null || missing+=(g++)
  command -v cmake >/dev/null || missing+=(cmake)
  command -v ninja >/dev/null || missing+=(ninja-build)
  if [ -z "$python" ]; then
    if [ -n "$bare" ]; then
      missing+=("$("$bare" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
    else
      missing+=(python3 python3-venv)
    fi
  fi
fi
as_root=()
may_install=no
if [ "$(id -u)" = 0 ]; then
  may_install=yes
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  may_install=yes
  as_root=(sudo -n)
fi
if [ ${#missing[@]} -gt 0 ]; then
  to_type="to type: ${as_root[*]:-sudo} apt-get install ${missing[*]}"
  if [ $may_install = yes ]; then
    logged "apt-get update" "${as_root[@]}" apt-get update
    found=()
    for package in "${missing[@]}"; do # an older release may lack a header package; CMake fetches those itself
      policy=$(apt-cache policy "$package") # not into grep -q: with pipefail its early exit fails the pipe now and then
      if [[ $policy =~ Candidate:\ [^\(] ]]; then found+=("$package"); else note "no apt package $package here"; fi
    done
    if [ ${#found[@]} -gt 0 ]; then
      logged "apt-get install ${found[*]}" "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${found[@]}"
    fi
  else
    note "these system packages are missing, and apt-get needs a password here: ${missing[*]}"
    note "$to_type"
    advice=$to_type
  fi
fi
command -v c++ >/dev/null || command -v g++ >/dev/null || stop "no C++ compiler found; install one and run make again" ${advice:+"$advice"}
if [ -z "$python" ]; then
  for candidate in "$bare" python3; do
    if [ -n "$candidate" ] && "$candidate" -c "$usable; import ensurepip, venv" >/dev/null 2>&1; then python=$candidate && break; fi
  done
fi
[ -n "$python" ] || stop "no Python 3.11 to 3.14 with the venv module found; install one and run make again" ${advice:+"$advice"}

# --- virtual environment --------------------------------------------------------------------------------------------
venv=$here/.venv
if [ -e "$venv" ] && ! grep -qF "$venv/" "$venv/bin/pip" 2>/dev/null; then
  note "this folder was moved or .venv is broken: making it anew"
  rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
  logged "virtual environment with $("$python" -V) ($python)" "$python" -m venv "$venv"
fi
py=$venv/bin/python
pip=("$py" -m pip install --disable-pip-version-check --quiet)
if ! "$py" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' 2>/dev/null; then
  logged "pip that knows dependency groups" "${pip[@]}" --upgrade 'pip>=25.1'
fi

# --- packages -------------------------------------------------------------------------------------------------------
if ! "$py" -c 'import importlib.metadata as m, sys; sys.exit(tuple(map(int, m.version("torch").split(".")[:2])) < (2, 10))' 2>/dev/null; then
  index=$(bash scripts/torch_index.sh "$py")
  source="the configured package index"
  [ -z "$index" ] || source="PyTorch's CPU index"
  logged "torch from ${source}" "${pip[@]}" 'torch>=2.10' $index
fi
tools=()
if ! cmake --version 2>/dev/null | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 24) }'; then
  tools+=('cmake>=3.24')
fi
command -v ninja >/dev/null || tools+=(ninja)
logged "tools for building, testing and linting" "${pip[@]}" --group dev "${tools[@]}"
headers=$(bash scripts/tensorrt_headers.sh "$py")
[ -z "$headers" ] || note "$headers"
PATH=$venv/bin:$PATH logged "shadowc and its packages, operators compiled" "${pip[@]}" --no-build-isolation --editable .
logged "shadowc answers" "$venv/bin/shadowc" --help
