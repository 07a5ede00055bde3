#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the named Debian packages that are missing, where that is allowed; else says what to type. The caller has to
# get along without them.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
for package in "$@"; do
  [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) == *'ok installed'* ]] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
log=$(pwd)/build/apt_install.log
mkdir -p build
as_root=(sudo -n)
[ "$(id -u)" != 0 ] || as_root=()
if ! command -v apt-get >/dev/null; then
  printf 'not installed: %s (names of Debian packages)\n' "${missing[*]}"
elif ! { "${as_root[@]}" apt-get update && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y --no-install-recommends "${missing[@]}"; } </dev/null >"$log" 2>&1; then
  printf 'not installed; to type: sudo apt-get install %s (why: %s)\n' "${missing[*]}" "$log"
fi
