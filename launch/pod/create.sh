#!/usr/bin/env bash
# Creates a TPU and waits until it is ready. One that was preempted, or failed, is deleted first and created again; one that is ready is left as it is.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=search-1 ACCELERATOR=v5litepod-16 VERSION=v2-alpha-tpuv5-lite [CAPACITY=spot] bash launch/pod/create.sh
#
#   CAPACITY=on-demand      at once, or an error when there is no capacity (default)
#   CAPACITY=spot           the same at the spot price: may be taken away at any time
#   CAPACITY=queued         a queued resource: waits until there is capacity
#   CAPACITY=queued-spot    the same at the spot price
#   CREATE_FLAGS="…"        further flags of gcloud, for example "--network=my-net --service-account=me@my-project.iam.gserviceaccount.com"
#   POLL_S=30               seconds between two looks at its state
#   DRY_RUN=1               print the commands instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_help launch/pod/create.sh; exit; fi
require PROJECT ZONE NAME ACCELERATOR VERSION
if [[ $# != 0 ]]; then echo "create.sh takes no arguments ($1); see --help" >&2; exit 2; fi

read -r -a flags <<<"${CREATE_FLAGS:-}"
case ${CAPACITY:=on-demand} in
  *spot) flags+=(--spot) ;;
esac
case $CAPACITY in
  on-demand | spot) kind=tpu-vm command=(tpu-vm create "$NAME" --version="$VERSION") ;;
  queued | queued-spot) kind=queued-resources command=(queued-resources create "$NAME" --node-id="$NAME" --runtime-version="$VERSION" --async) ;;
  *) echo "CAPACITY=$CAPACITY is not known: on-demand, spot, queued or queued-spot" >&2; exit 2 ;;
esac

# What is there already?
read_state tpu-vm MISSING
found=$state
if [[ $found == READY ]]; then
  report "$NAME is ready"
  exit
fi
case $found in
  CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) make=0 ;;
  MISSING)
    make=1
    if [[ $kind == queued-resources ]]; then
      read_state queued-resources MISSING
      case $state in
        ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING) make=0 ;;
        MISSING) ;;
        *) delete_tpu ;;
      esac
    fi
    ;;
  *)
    make=1
    delete_tpu
    ;;
esac
if [[ $make == 1 ]]; then tpus "${command[@]}" --accelerator-type="$ACCELERATOR" ${flags[@]+"${flags[@]}"}; fi

# Wait.
while true; do
  read_state tpu-vm READY
  case $kind-$state in
    *-READY) break ;;
    *-PREEMPTED | *-TERMINATED | *-STOPPED | tpu-vm-MISSING) echo "$NAME is $state already: start this script again" >&2; exit 1 ;;
  esac
  if [[ $kind == queued-resources ]]; then
    read_state queued-resources ACTIVE
    case $state in
      FAILED | SUSPENDING | SUSPENDED | MISSING)
        echo "the request for $NAME is $state: gcloud compute tpus queued-resources describe $NAME --project=$PROJECT --zone=$ZONE says why" >&2
        exit 1 ;;
    esac
  fi
  sleep "$POLL_S"
done
report "$NAME is ready"
