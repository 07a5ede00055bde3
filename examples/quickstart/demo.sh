#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What `make demo` shows: compile the OPT of this repository, generate text dense and sparse, look at what was skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PWD/.venv/bin:$PATH
engine=build/demo/opt-mini.engine
prompt="Once upon a time there was"

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

mkdir -p build/demo
show shadowc compile --model opt-mini --offline --out "$engine"
show shadowc run "$engine" "$prompt" --density 1 --max-new-tokens 48
show shadowc run "$engine" "$prompt" --density 0.5 --max-new-tokens 48
show shadowc run "$engine" "$prompt" --head-density 0.5 --neuron-density 0.2 --max-new-tokens 48
show shadowc inspect "$engine"
printf '\nThe engine is %s. Next: . .venv/bin/activate, shadowc --help, README.md\n' "$engine"
