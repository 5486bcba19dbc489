#!/usr/bin/env bash
# Lints and tests, two files of tests at a time, in a virtual environment of its own (.venv, made at the first run).
#
#   bash launch/test.sh [arguments for pytest]      for example: bash launch/test.sh tests/test_losses.py
#
#   SLOW=1              also the tests marked slow, as CI does
#   NIGHTLY=1           also the tests marked nightly: more variants, and the warm start made again
#   PYTHON=python3.12   the Python that .venv is made with (3.11 or newer)
#   DRY_RUN=1           print the commands instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_help launch/test.sh; exit; fi
if [[ ${SLOW:-} != 1 ]]; then unset SLOW; fi  # pytest reads it; anything but 1 means no
use_venv requirements.txt requirements-test.txt
run .venv/bin/python -m ruff check --quiet --output-format=concise .
run .venv/bin/python -m ruff format --quiet --check .
run .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@"
