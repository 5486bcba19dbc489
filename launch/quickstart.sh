#!/usr/bin/env bash
# A small language model learns to search, on this machine's CPU.
#
#   bash launch/quickstart.sh [VARIANT] [--fresh] [--workdir=DIR] [--config.key=value …]
#
# Makes .venv and trains with configs/atlas_quickstart.py into DIR (relative to the repository; runs/quickstart unless named, with -VARIANT behind it),
# which ends by printing how well questions of an unseen world are answered before and after reinforcement learning, and where the report is.
# Rerun the same command to resume an interrupted run.
#
#   VARIANT                 anew, continued, shuffled or one_search: see configs/atlas_quickstart.py
#   --fresh                 remove DIR first; without it, a DIR whose run has other settings is refused
#   --config.seed=1         another seed, in another --workdir; any key of configs/base.py can be set like this
#   PYTHON=python3.12       the Python that .venv is made with (3.11 or newer)
#   DRY_RUN=1               print the commands instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

variant= workdir= fresh=0 arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help) print_help launch/quickstart.sh; exit ;;
    --fresh) fresh=1 ;;
    --workdir=?*) workdir=${argument#--workdir=} ;;
    --config.*=*) arguments+=("$argument") ;;
    anew | continued | shuffled | one_search)
      if [[ -n $variant ]]; then echo "quickstart.sh takes one variant, not $variant and $argument" >&2; exit 2; fi
      variant=$argument ;;
    *) echo "quickstart.sh does not know the argument $argument; see bash launch/quickstart.sh --help" >&2; exit 2 ;;
  esac
done

workdir=${workdir:-runs/quickstart${variant:+-$variant}}

if [[ -e $workdir && $fresh == 1 ]]; then
  if [[ ! -f $workdir/config.json ]]; then
    echo "$workdir is not the folder of a run (it holds no config.json): not removed" >&2
    exit 2
  fi
  if [[ -e $workdir/.lock ]] && command -v flock >/dev/null && ! flock --nonblock "$workdir/.lock" true; then
    echo "a run is using $workdir: end it first" >&2
    exit 2
  fi
  echo "removing the earlier run in $workdir"
  run rm -r -- "$workdir"
elif [[ -e $workdir ]]; then
  echo "resuming the run in $workdir (--fresh removes it first)"
fi

use_venv requirements.txt
run .venv/bin/python -m stepsearch_jax.train --config="configs/atlas_quickstart.py${variant:+:$variant}" --workdir="$workdir" ${arguments[@]+"${arguments[@]}"}
if [[ ${DRY_RUN:-0} != 1 ]]; then echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"; fi
