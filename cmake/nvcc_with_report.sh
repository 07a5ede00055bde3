#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiler launcher: runs nvcc with `-Xptxas -v` and keeps what ptxas says about registers, spills and shared memory
# in OBJECT.ptxas, where the tests read it. Warnings and errors go on to the terminal.
set -uo pipefail
object=
previous=
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
"$@" -Xptxas -v 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' -e '^$' "$object.ptxas" >&2
exit $status
