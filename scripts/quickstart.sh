#!/usr/bin/env bash
# Sets everything up, builds the program, then does what Hestia is for on the shipped model and real text, on the CPU:
# fine-tune the router, export it, compare it with the baseline.
set -euo pipefail
script_name=quickstart
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  cat <<'TEXT'
Usage: scripts/quickstart.sh [KEY=VALUE...]

Each KEY=VALUE overrides one key of recipes/quickstart.yaml. Paths are relative to the repository.
Running it again starts afresh in runs/quickstart; another run_dir=... is never overwritten.
TEXT
  exit 0
fi
recipe=recipes/quickstart.yaml
[ -f "$recipe" ] || die 3 "$recipe: not found; is this a complete clone?"

scripts/setup.sh
build hestia_cli
overwrite=(--overwrite)
for argument in "$@"; do
  [[ $argument != run_dir=* ]] || overwrite=()
done
for verb in finetune export evaluate; do
  flags=()
  [ "$verb" != finetune ] || flags=("${overwrite[@]+"${overwrite[@]}"}")
  say "hestia $verb $recipe $*"
  code=0
  build/bin/hestia "$verb" "$recipe" "$@" "${flags[@]+"${flags[@]}"}" || code=$?
  [ $code -eq 0 ] || die $code "hestia $verb exited with $code, see above"
done
say "done: the table above compares the tuned router with the baseline"
