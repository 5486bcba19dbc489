#!/usr/bin/env bash
# Trains on all hosts of a TPU that has been set up, until the training is complete: after a preemption or a crash it starts again, and the run resumes.
#
#   PROJECT=… ZONE=… NAME=… ACCELERATOR=… VERSION=… [CAPACITY=spot] \
#     bash launch/pod/train_pod.sh --config=FILE[:WORD] --workdir=FOLDER [--copy=SOURCE=FOLDER …] [--config.key=value …]
#
# The logs of the hosts are runs/pods/NAME/ATTEMPT/0.log, 1.log, … here. Ctrl-C leaves the training running on the TPU: the same command follows it again,
# launch/pod/stop.sh ends it. A TPU that is gone is created and set up again, with the variables of create.sh and setup.sh, which are needed here as well.
#
#   --workdir=FOLDER        gs://… or a folder on a disk that all hosts share: it holds the checkpoints, and must outlive the TPU
#   --copy=SOURCE=FOLDER    data that a new TPU gets (see setup.sh); as often as needed
#   RESTARTS=3              give up after so many attempts in a row that did not bring the run a checkpoint further
#   CREATE_TRIES=100        how often to ask for a new TPU, RETRY_S=300 seconds apart
#   DRY_RUN=1               print the commands instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

flags=(--config.distributed.processes=0) copies=() config= workdir=
for argument in "$@"; do
  case $argument in
    -h | --help) print_help launch/pod/train_pod.sh; exit ;;
    --copy=?*=?*) copies+=("${argument#--copy=}") ;;
    --config=?*) config=$argument ;;
    --workdir=gs://[!/]* | --workdir=/?*) workdir=$argument ;;
    --config.*=*) flags+=("$argument") ;;
    *) echo "train_pod.sh does not know the argument $argument; see --help (a --workdir begins with gs:// or /)" >&2; exit 2 ;;
  esac
done
require PROJECT ZONE NAME ACCELERATOR VERSION
if [[ -z $config || -z $workdir ]]; then echo "--config and --workdir are needed; see --help" >&2; exit 2; fi
logs=runs/pods/$NAME

create() {
  local try
  for ((try = 1; try <= ${CREATE_TRIES:-100}; try++)); do
    if bash launch/pod/create.sh; then return; fi
    echo "no TPU yet; next try in ${RETRY_S:-300} s" >&2
    sleep "${RETRY_S:-300}"
  done
  echo "there was no TPU in ${CREATE_TRIES:-100} tries" >&2
  exit 1
}

set_up() { bash launch/pod/setup.sh ${copies[@]+"${copies[@]}"}; }

# What these two would refuse hours from now, after a preemption, they refuse at once.
(export DRY_RUN=1; bash launch/pod/create.sh; set_up) >/dev/null

# Runs the training on all hosts and waits -> its exit status.
train() {
  if [[ ${DRY_RUN:-0} != 1 ]]; then mkdir -p "$logs/$attempt"; fi
  report "training on $NAME; logs: $logs/$attempt"
  set -m  # a process group of its own, which the trap can end
  on_all_hosts --output-directory="$logs/$attempt" -- bash launch/pod/host.sh train "$attempt" "$config" "$workdir" "${flags[@]}" &
  child=$!
  set +m
  wait "$child"
}
child=
trap 'if [[ -n $child ]] && kill -- "-$child" 2>/dev/null; then echo "the training continues on $NAME" >&2; fi; exit 130' INT TERM HUP

# From where the run was resumed last: nothing, if it never was.
read_progress() { cat "$logs"/*/0.log 2>/dev/null | grep -o 'resumed from .*' | tail -n 1 || true; }

futile=0
for ((number = 1; ; number++)); do
  before=$(read_progress) status=0
  attempt=$(date -u +%Y%m%d-%H%M%S)-$number-$$  # with the process: two points of a sweep can begin on a TPU in the same second
  read_state tpu-vm READY
  if [[ $state != READY ]]; then
    echo "$NAME is $state: creating it and setting it up"
    create
    set_up || status=$?
  fi
  if [[ $status == 0 ]]; then train || status=$?; fi

  if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "# after a crash, before the next attempt:"
    WAIT_S=10 bash launch/pod/stop.sh
    echo "# after a preemption:"
    create
    set_up
    exit
  fi
  if [[ $status == 0 ]]; then
    echo "the training is complete"
    exit
  fi

  if [[ $(read_progress) != "$before" ]]; then futile=0; fi
  futile=$((futile + 1))
  read_state tpu-vm READY
  echo "ended with status $status; $NAME is $state; attempts in a row without a new checkpoint: $futile of ${RESTARTS:-3}" >&2
  if [[ $state == READY && $status != 3 ]]; then WAIT_S=10 bash launch/pod/stop.sh || true; fi
  if [[ $futile -ge ${RESTARTS:-3} || $status == 3 ]]; then  # 3: another training has the TPU
    for log in "$logs/$attempt"/*.log; do
      if [[ -f $log ]]; then echo "--- the end of $log" && tail -n 5 "$log"; fi
    done >&2
    exit "$status"
  fi
done
