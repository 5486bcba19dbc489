#!/usr/bin/env bash
# What the pod scripts run on every host of a TPU, in the repository there.
#
#   bash launch/pod/host.sh install                make the Python environment
#   bash launch/pod/host.sh copy gs://… FOLDER     fetch what FOLDER does not have yet
#   bash launch/pod/host.sh train ATTEMPT FLAGS    run the training command, or follow the one that runs; exits as it does
#   bash launch/pod/host.sh stop SECONDS           ask it to end, and end it after so long
#
# The training does not depend on the connection: gcloud runs a command again where the connection broke, and then the training is only followed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

place=$HOME/.stepsearch-training  # of the training on this host: attempt, command, pid, log and, at its end, status

running() { [[ -f $place/pid ]] && kill -0 "$(cat "$place/pid")" 2>/dev/null; }

case ${1:-}:$# in
  install:1)
    if ! find_python >/dev/null 2>&1; then  # the TPU images come with Python 3.10
      run python3 -m pip install --quiet --user uv
      run python3 -m uv python install --quiet 3.12
      PYTHON=$(python3 -m uv python find 3.12)
    fi
    use_venv requirements.txt requirements-tpu.txt
    ;;
  copy:3)
    run mkdir -p "$3"
    run gcloud storage rsync --recursive "$2" "$3"
    ;;
  train:[3-9] | train:[1-9][0-9])
    attempt=$2
    shift 2
    printf -v command '%q ' "$@"
    if running; then
      if [[ $(cat "$place/command") != "$command" ]]; then
        echo "another training runs on this TPU (bash launch/pod/stop.sh ends it): $(cat "$place/command")" >&2
        exit 3
      fi
      echo "following the training that runs here"
    elif [[ $(cat "$place/attempt" 2>/dev/null) != "$attempt" ]]; then
      rm -rf "$place"
      mkdir -p "$place"
      echo "$command" >"$place/command"
      # A session of its own, so that it can be ended as a whole. The trap: at SIGTERM the shell stays until the training has ended, and notes how.
      setsid bash -c 'trap : TERM; "${@:2}" >"$1/log" 2>&1; echo $? >"$1/status"' \
        _ "$place" .venv/bin/python -u -m stepsearch_jax.train "$@" </dev/null >/dev/null 2>&1 &
      echo $! >"$place/pid"
      echo "$attempt" >"$place/attempt"
    fi
    touch "$place/log"
    tail -n +1 -f -s 0.2 --pid="$(cat "$place/pid")" "$place/log"
    exit "$(cat "$place/status" 2>/dev/null || echo 137)"  # no status: the shell around it was killed, too
    ;;
  stop:2)
    if running; then
      pid=$(cat "$place/pid")
      kill -TERM -- "-$pid" 2>/dev/null || true
      for ((look = 0; look < 5 * $2; look++)); do
        if ! running; then exit; fi
        sleep 0.2
      done
      kill -KILL -- "-$pid" 2>/dev/null || true
    fi
    ;;
  *)
    print_help launch/pod/host.sh
    if [[ ${1:-} != -h && ${1:-} != --help ]]; then exit 2; fi
    ;;
esac
