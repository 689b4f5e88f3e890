#!/usr/bin/env bash
# Sets up the environment (once) and runs the tests on up to four cores. Arguments go to pytest:
# scripts/test.sh -k coord -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env requirements-dev.lock
cd "$ROOT"
exec "$VENV/bin/python" -m pytest -n logical --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder "$@"
