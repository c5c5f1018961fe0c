#!/usr/bin/env bash
# Installs what Hestia needs: Debian packages (compiler, libraries, text corpora), a Python environment under
# build/venv with the pinned torch wheel (it carries LibTorch), and, where the system has no CUDA toolkit 13.0, the
# CUDA compiler from PyPI. Running it again skips what is there.
set -euo pipefail
script_name=setup
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/setup.sh [--dev]

Installs Hestia's dependencies; a second run only checks them.
  --dev   also the tools of the format, tidy and script checks (clang-format-14, clang-tidy-14, shellcheck)

Environment:
  HESTIA_HIDE_SYSTEM_CUDA=1   ignore a CUDA toolkit of the system, install the compiler from PyPI
TEXT
}

dev=0
for argument in "$@"; do
  case "$argument" in
    --dev) dev=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      die 2 "unknown argument, got '$argument'; see the usage above"
      ;;
  esac
done

# Package and why it is needed, one a line.
build_packages=(
  "g++            C++20 compiler, also nvcc's host compiler"
  "cmake          build"
  "ninja-build    build"
  "git            version control"
  "ccache         recompiles only what changed"
  "python3        hosts the torch wheel"
  "python3-venv   virtual environment under build/venv"
  "libyaml-cpp-dev        recipes"
  "libhdf5-dev            preference statistics, packed traces"
  "libsentencepiece-dev   tokenizer library"
  "sentencepiece          tokenizer tools"
  "libpcre2-dev           regular expressions of tokenizer.json"
  "libutf8proc-dev        Unicode normalisation"
  "libcli11-dev           command line"
  "libfmt-dev             text formatting"
  "nlohmann-json3-dev     JSON"
  "zlib1g-dev             compressed corpora"
  "catch2                 tests"
)
# Real text to fine-tune and evaluate on. No third-party text is kept in the repository.
text_packages=(
  "linux-doc-6.1             kernel documentation (GPL-2)"
  "libpython3.11-stdlib      Python sources (PSF)"
  "libpython3.11-testsuite   Python sources, tests (PSF)"
  "dict-gcide                dictionary (GPL)"
  "anarchism                 prose (GPL-2)"
  "wordnet-base              dictionary (WordNet licence)"
  "manpages                  manual pages (GPL and others)"
  "manpages-dev              manual pages (GPL and others)"
  "perl-doc                  Perl documentation (Artistic, GPL)"
)
dev_packages=(
  "clang-format-14   format check"
  "clang-tidy-14     static checks"
  "shellcheck        script check"
)

# ---- Debian packages

# missing_packages LINE...: the lines whose package is not installed.
missing_packages() {
  local line installed
  installed=" $(dpkg-query -W -f='${db:Status-Status}:${Package} ' "${@%% *}" 2>/dev/null || true)"
  for line in "$@"; do
    case "$installed" in
      *" installed:${line%% *} "*) ;;
      *) printf '%s\n' "$line" ;;
    esac
  done
}

# Packages of the text corpora with files that dpkg was told to leave out: slim images exclude /usr/share/doc and
# /usr/share/man, where most of the text lies.
excluded_text() {
  local line missing
  for line in "${text_packages[@]}"; do
    # What matters is what ls complains about; grep without a match and ls with a missing file are no errors here.
    missing=$(dpkg-query -L "${line%% *}" 2>/dev/null | grep -E '^/usr/share/(doc|man)/' |
      xargs -r -d '\n' ls -d 2>&1 >/dev/null | head -n 1 || true)
    [ -z "$missing" ] || printf '%s\n' "$line"
  done
}

# need_root PACKAGE...: makes sure that apt() runs as root, or says what an administrator has to run.
root_prefix=()
need_root() {
  [ "$(id -u)" -ne 0 ] || return 0
  if command -v sudo >/dev/null; then
    if sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; then
      root_prefix=(sudo -n)
      return 0
    fi
  fi
  {
    echo
    echo "These packages need an administrator (no root, and sudo is not available without a password). Ask for:"
    echo
    echo "    apt-get update"
    # Quoted, because the include patterns hold an asterisk.
    printf '   '
    printf ' %q' apt-get install --yes --no-install-recommends "${path_include[@]}" "$@"
    echo
    echo
  } >&2
  die 1 "Debian packages are missing; run scripts/setup.sh again when they are installed"
}
apt() {
  "${root_prefix[@]+"${root_prefix[@]}"}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"
}
path_include=(-o 'Dpkg::Options::=--path-include=/usr/share/doc/*' -o 'Dpkg::Options::=--path-include=/usr/share/man/*')
update_done=0
apt_update() {
  [ $update_done -eq 0 ] || return 0
  say "apt-get update"
  apt update || die 1 "apt-get update failed; is the network there, and are the package sources right?"
  update_done=1
}

setup_packages() {
  local wanted=("${build_packages[@]}") build_missing text_missing available absent line
  [ $dev -eq 0 ] || wanted+=("${dev_packages[@]}")
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    say "this is not a Debian system: these Debian packages, or what they are called here, must be installed by hand:"
    printf '    %s\n' "${wanted[@]}"
    say "and, for the recipes that train on text of Debian packages (other text works too, see README.md):"
    printf '    %s\n' "${text_packages[@]}"
    packages_said="Debian packages not checked"
    return 0
  fi
  mapfile -t build_missing < <(missing_packages "${wanted[@]}")
  mapfile -t text_missing < <(missing_packages "${text_packages[@]}")
  if [ ${#build_missing[@]} -gt 0 ] || [ ${#text_missing[@]} -gt 0 ]; then
    say "Debian packages to install:"
    printf '    %s\n' "${build_missing[@]+"${build_missing[@]}"}" "${text_missing[@]+"${text_missing[@]}"}" | grep .
    need_root "${build_missing[@]%% *}" "${text_missing[@]%% *}"
    apt_update
  fi
  if [ ${#build_missing[@]} -gt 0 ]; then
    apt install --yes --no-install-recommends "${build_missing[@]%% *}" ||
      die 1 "apt-get could not install the build packages, see above"
  fi
  if [ ${#text_missing[@]} -gt 0 ]; then
    available=()
    absent=()
    for line in "${text_missing[@]}"; do
      if apt-cache show --no-all-versions "${line%% *}" >/dev/null 2>&1; then
        available+=("${line%% *}")
      else
        absent+=("${line%% *}")
      fi
    done
    if [ ${#available[@]} -gt 0 ]; then
      apt install --yes --no-install-recommends "${path_include[@]}" "${available[@]}" ||
        die 1 "apt-get could not install the text packages, see above"
    fi
    if [ ${#absent[@]} -gt 0 ]; then
      say "WARNING: this system has no package ${absent[*]}; recipes that read its text need another path"
    fi
  fi
  mapfile -t text_missing < <(excluded_text)
  if [ ${#text_missing[@]} -gt 0 ]; then
    say "dpkg left out the text of: ${text_missing[*]%% *} (path-exclude, see /etc/dpkg/dpkg.cfg.d); installing it again with the text"
    need_root --reinstall "${text_missing[@]%% *}"
    apt_update
    apt install --yes --no-install-recommends --reinstall "${path_include[@]}" "${text_missing[@]%% *}" ||
      die 1 "apt-get could not install the text packages again, see above"
    mapfile -t text_missing < <(excluded_text)
    [ ${#text_missing[@]} -eq 0 ] ||
      say "WARNING: files of ${text_missing[*]%% *} are still missing; recipes that read them need another path"
  fi
  packages_said="$((${#wanted[@]} + ${#text_packages[@]})) Debian packages"
}

# ---- CUDA compiler

# Prints the nvcc of a system toolkit 13.0, if there is one. CMake chooses by the same rule (HestiaDependencies.cmake).
system_nvcc() {
  local nvcc
  [ "${HESTIA_HIDE_SYSTEM_CUDA:-0}" != 1 ] || return 0
  for nvcc in /usr/local/cuda-13.0/bin/nvcc /usr/local/cuda/bin/nvcc "$(command -v nvcc || true)"; do
    if [ -x "$nvcc" ] && "$nvcc" --version 2>/dev/null | grep -q 'release 13\.0,'; then
      echo "$nvcc"
      return 0
    fi
  done
}

# nvcc looks for its folders beside the folder it was called from, and PyPI's layout is not the one it expects: a view
# with a real bin/ and a lib64/ that also has the unversioned names the linker asks for. Links are relative, so the
# view moves with the environment.
make_toolkit_view() {
  local venv=$1 view=$1/cuda-toolkit source file name
  source=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)
  [ -x "$source/bin/nvcc" ] || die 1 "$source/bin/nvcc: not there after installing the CUDA compiler; remove $venv and run scripts/setup.sh again"
  rm -rf "$view"
  mkdir -p "$view/bin" "$view/lib64"
  for file in "$source"/bin/*; do
    ln -sr "$file" "$view/bin/"
  done
  for name in include nvvm; do
    ln -sr "$source/$name" "$view/$name"
  done
  for file in "$source"/lib/*; do
    ln -sr "$file" "$view/lib64/"
  done
  for file in "$source"/lib/lib*.so.*; do
    name=$(basename "$file")
    name=${name%%.so.*}.so
    [ -e "$view/lib64/$name" ] || ln -sr "$file" "$view/lib64/$name"
  done
}

# ---- Python environment

# The system's own Python first: a version manager's python3 may come and go, and the environment with it.
find_python() {
  local python
  for python in /usr/bin/python3 "$(command -v python3 || true)"; do
    if [ -x "$python" ] && "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return 0
    fi
  done
  return 1
}

setup_python() {
  local venv=build/venv python nvcc stamp wanted free_mib pins=scripts/requirements.txt
  unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER
  nvcc=$(system_nvcc)
  # Once installed, the compiler from PyPI stays: a build folder may use it.
  if [ -n "$nvcc" ]; then
    wanted=$(cat $pins)
  else
    wanted=$(cat $pins scripts/requirements-cuda.txt)
  fi
  wanted=$(printf '%s\n' "$wanted" | grep -v '^#')
  # A stamp holds the pins, one a line: what is wanted must be among them.
  stamp=$venv/hestia-installed.txt
  toolkit_said=${nvcc:-$venv/cuda-toolkit/bin/nvcc}
  if [ -x $venv/bin/python ] && [ -f $stamp ] && ! printf '%s\n' "$wanted" | grep -qvxFf $stamp &&
    $venv/bin/python -c 'import sys' 2>/dev/null && { [ -n "$nvcc" ] || [ -x $venv/cuda-toolkit/bin/nvcc ]; }; then
    return 0
  fi
  if ! [ -x $venv/bin/python ] || ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || die 1 "python3: needs version 3.11 or later with venv; install python3 and python3-venv"
    mkdir -p build
    free_mib=$(df -Pm build | awk 'NR == 2 {print $4}')
    [ "$free_mib" -ge 8192 ] || die 1 "build/: torch and the build take 8 GiB, got $free_mib MiB free; make room"
    say "Python environment $venv with $python"
    rm -rf $venv
    "$python" -m venv $venv || die 1 "$venv: could not be made, see above"
  fi
  rm -f $stamp
  say "Python packages into $venv, about 3 GB to download the first time:"
  printf '%s\n' "$wanted" | sed 's/^/    /'
  $venv/bin/python -m pip install --disable-pip-version-check --no-input -r $pins ||
    die 1 "pip could not install the packages, see above; is the network there?"
  if [ -z "$nvcc" ]; then
    say "no CUDA toolkit 13.0 on this system: its compiler from PyPI"
    $venv/bin/python -m pip install --disable-pip-version-check --no-input --no-deps -r scripts/requirements-cuda.txt ||
      die 1 "pip could not install the CUDA compiler, see above; is the network there?"
    make_toolkit_view $venv
    $venv/cuda-toolkit/bin/nvcc --version | grep -q 'release 13\.0,' ||
      die 1 "$venv/cuda-toolkit/bin/nvcc: does not run; remove $venv and run scripts/setup.sh again"
  fi
  printf '%s\n' "$wanted" >$stamp
}

setup_packages
setup_python
say "ready: $packages_said, torch $(sed -n 's/^torch==//p' scripts/requirements.txt) in build/venv, nvcc $toolkit_said"
