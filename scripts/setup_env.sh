#!/usr/bin/env bash
# Makes the virtual environment, once, and nothing else: scripts/setup_env.sh
#
# Or source it from bash:
#
#   set -euo pipefail
#   source scripts/setup_env.sh
#   setup_env requirements.lock    # Then "$VENV/bin/python" is ready.
#
# Environment variables:
#   PYTHON       the Python interpreter (default: the newest of 3.11 to 3.13 that is installed)
#   VENV         folder of the environment (default: .venv beside train.py)
#   JAX_BACKEND  cpu, cuda12, cuda13 or tpu (default: detected)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV

_fail() {
  echo "error: $*" >&2
  exit 1
}

# Whether $1 is a working Python of a version that the locks were tested with.
_is_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    _is_supported_python "$PYTHON" ||
      _fail "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13."
    echo "$PYTHON"
    return
  fi
  # An existing environment keeps its Python.
  for candidate in "$VENV/bin/python" python3.13 python3.12 python3.11 python3; do
    if _is_supported_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  _fail 'no Python 3.11, 3.12 or 3.13 found: install one, or set PYTHON=/path/to/python3.'
}

# Prints the JAX build for this machine.
jax_backend() {
  local gpus driver capability
  if [[ -n ${JAX_BACKEND:-} ]]; then
    [[ $JAX_BACKEND =~ ^(cpu|cuda12|cuda13|tpu)$ ]] ||
      _fail "JAX_BACKEND must be cpu, cuda12, cuda13 or tpu, got $JAX_BACKEND."
    echo "$JAX_BACKEND"
  elif gpus=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) &&
    [[ $gpus =~ ^([0-9]+)\.[^,]*,\ ([0-9]+)\.([0-9]+) ]]; then
    driver=${BASH_REMATCH[1]} capability=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    if ((driver >= 580 && capability >= 75)); then # CUDA 13 dropped older GPUs.
      echo cuda13
    elif ((driver >= 525)); then
      echo cuda12
    else
      echo "warning: NVIDIA driver $driver is too old for JAX (525 or newer); using the CPU." >&2
      echo cpu
    fi
  elif has_tpu; then
    echo tpu
  else
    echo cpu
  fi
}

has_tpu() {
  compgen -G '/dev/accel[0-9]*' >/dev/null ||
    { [[ -n ${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}${TPU_SKIP_MDS_QUERY:-} ]] &&
      compgen -G '/dev/vfio/[0-9]*' >/dev/null; }
}

# Runs pip install. Prints only large downloads; $VENV/install.log has the whole output.
_pip_install() {
  local log=$VENV/install.log
  "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
    tee "$log" |
    awk '/^  (Downloading|Using cached) .* MB\)/ { sub(/.*\//, ""); sub(/^  [A-Z][a-z ]* /, "")
                                                   print "  " $0; fflush() }
         /^Installing collected/ { print "  unpacking ..."; fflush() }' ||
    {
      grep -E 'ERROR|error' "$log" >&2 || tail -n 20 "$log" >&2
      _fail "pip could not install the requirements; $log has the whole output."
    }
}

# setup_env LOCK: makes the environment of a lock file beside train.py, unless it is up to date.
setup_env() {
  local lock=$1 python backend version stamp want jax
  python=$(find_python)
  backend=$(jax_backend)
  version=$("$python" -c 'import platform; print(platform.python_version())')
  stamp=$VENV/.installed-$lock
  want="python $version, $backend, $(cksum <"$ROOT/$lock")"
  if [[ -f $stamp && $(<"$stamp") = "$want" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
    return
  fi
  echo "Setting up $VENV (Python $version, JAX for $backend); this takes a few minutes the first time."
  if [[ $("$VENV/bin/python" -m pip --version 2>/dev/null) != *"(python ${version%.*})" ]]; then
    "$python" -m venv --clear "$VENV" || _fail "could not make a virtual environment in $VENV."
  fi
  rm -f "$stamp"
  _pip_install -r "$ROOT/$lock"
  if [[ $backend != cpu ]]; then
    jax=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("jax"))')
    _pip_install "jax[$backend]==$jax" -c "$ROOT/$lock"
  fi
  echo "$want" >"$stamp"
}

if [[ ${BASH_SOURCE[0]} = "$0" ]]; then
  set -euo pipefail
  setup_env requirements.lock
  echo "ready: source $VENV/bin/activate"
fi
