#!/usr/bin/env bash
# pins.sh PIP: writes what PIP has installed into constraints.txt, but torch, which the Makefile names.
set -euo pipefail
cd "$(dirname "$0")/.."
pins=$("$1" freeze --exclude-editable | grep == | grep -v '^torch==' | sed 's/$/; python_version >= "3.11"/')
head=$(grep '^#' constraints.txt)
printf '%s\n' "$head" "$pins" > constraints.txt
