# Sourced by the pod scripts: the names that they share, and gcloud with them.

source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"

HOST_FOLDER=stepsearch  # the repository on every host, in the home folder

# Ends the script unless every named variable has a value.
require() {
  local variable meaning
  for variable in "$@"; do
    if [[ -n ${!variable:-} ]]; then continue; fi
    case $variable in
      PROJECT) meaning="the Google Cloud project that pays, for example PROJECT=my-project" ;;
      ZONE) meaning="the TPU's zone, for example ZONE=us-west4-a" ;;
      NAME) meaning="the TPU's name, for example NAME=search-1" ;;
      ACCELERATOR) meaning="the TPU's type, for example ACCELERATOR=v5litepod-16" ;;
      VERSION) meaning="the TPU's software version, for example VERSION=v2-alpha-tpuv5-lite" ;;
    esac
    echo "$variable is missing: $meaning; see --help" >&2
    exit 2
  done
  if [[ ${ACCELERATOR:-} == v5e-* ]]; then
    echo "ACCELERATOR=$ACCELERATOR: Google calls this type v5litepod-${ACCELERATOR#v5e-}" >&2
    exit 2
  fi
}

# Prints what happened; nothing in a dry run, in which nothing happens.
report() { if [[ ${DRY_RUN:-0} != 1 ]]; then echo "$*"; fi; }

# gcloud compute tpus WORDS, in our project and zone; it asks nothing.
tpus() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

# Sets `state` to the state of the TPU (tpu-vm) or of its request (queued-resources), MISSING if there is none. A dry run supposes $2.
# What gcloud cannot tell (no network, for example) is asked again, ten times.
read_state() {
  local format try errors
  if [[ $1 == tpu-vm ]]; then format='value(state)'; else format='value(state.state)'; fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    tpus "$1" describe "$NAME" --format="$format"
    state=$2
    return
  fi
  errors=$(mktemp)
  for try in 1 2 3 4 5 6 7 8 9 10; do
    if state=$(tpus "$1" describe "$NAME" --format="$format" 2>"$errors"); then break; fi
    state=
    if grep -q NOT_FOUND "$errors"; then
      state=MISSING
      break
    fi
    if [[ $try != 10 ]]; then sleep "$POLL_S"; fi
  done
  if [[ -z $state ]]; then
    echo "the state of $NAME cannot be read: $(cat "$errors")" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

# Runs words as a command in the repository on all hosts; further flags of gcloud come before "--". A host that is gone is noticed within minutes.
on_all_hosts() {
  local flags=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=10) command
  while [[ $1 != -- ]]; do
    flags+=("$1")
    shift
  done
  shift
  printf -v command '%q ' "$@"
  tpus tpu-vm ssh "$NAME" --worker=all "${flags[@]}" --command="mkdir -p $HOST_FOLDER && cd $HOST_FOLDER && ${command% }"
}

# Deletes the TPU and its request, whichever there are.
delete_tpu() {
  read_state queued-resources ACTIVE
  if [[ $state != MISSING ]]; then tpus queued-resources delete "$NAME" --force; fi
  read_state tpu-vm READY
  if [[ $state != MISSING ]]; then tpus tpu-vm delete "$NAME"; fi
}

POLL_S=${POLL_S:-30}
