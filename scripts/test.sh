#!/usr/bin/env bash
# Sets everything up, builds everything and runs every test. Tests that need a GPU say so and pass where there is none.
set -euo pipefail
script_name="test"
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  echo "Usage: scripts/test.sh [CTEST ARGUMENT...]     for example: scripts/test.sh -R routing"
  exit 0
fi

scripts/setup.sh
build all
say "run the tests"
ctest --test-dir build --output-on-failure --no-tests=error -j "$(build_jobs)" "$@"
