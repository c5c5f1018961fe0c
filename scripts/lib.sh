# shellcheck shell=bash
# What the scripts share; sourced, not run. Sets `root` to the repository and goes there, so every script works from
# any folder.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1

say() { printf '[%s] %s\n' "${script_name:-hestia}" "$*"; }

# die CODE MESSAGE...: the one closing line of a script that fails.
die() {
  local code=$1
  shift
  printf '[%s] FAILED: %s\n' "${script_name:-hestia}" "$*" >&2
  exit "$code"
}

# Memory this process may still take, in MiB: of the machine, or of the container when that has less.
available_mib() {
  local mib limit used
  mib=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
  if [ -r /sys/fs/cgroup/memory.max ] && [ -r /sys/fs/cgroup/memory.current ]; then
    limit=$(cat /sys/fs/cgroup/memory.max)
    used=$(cat /sys/fs/cgroup/memory.current)
    if [ "$limit" != max ] && [ $(((limit - used) / 1048576)) -lt "$mib" ]; then
      mib=$(((limit - used) / 1048576))
    fi
  fi
  echo "$mib"
}

# One compiler per core, but no more than memory carries: a torch source takes up to 2 GiB.
build_jobs() {
  local cores fitting
  cores=$(nproc)
  fitting=$(($(available_mib) / 2048))
  [ "$fitting" -ge 1 ] || fitting=1
  echo $((cores < fitting ? cores : fitting))
}

# build TARGET...: configures build/ with the preset the scripts use and builds the targets.
build() {
  local jobs log=build/configure.log
  jobs=$(build_jobs)
  mkdir -p build
  say "configure build/ (preset cuda; full output in $log)"
  if ! cmake --preset cuda >"$log" 2>&1; then
    cat "$log" >&2
    die 1 "configuring build/ failed, see above"
  fi
  grep -- '-- Hestia:' "$log" || true
  say "build $* with $jobs jobs"
  cmake --build build -j "$jobs" --target "$@" || die 1 "the build failed, see above"
}
