#!/usr/bin/env bash
# Ends the training on all hosts of a TPU, and leaves the TPU as it is.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=search-1 [WAIT_S=1800] bash launch/pod/stop.sh
#
#   WAIT_S=600              kill it after so many seconds; a training that has time enough ends its iteration and saves it first
#   DRY_RUN=1               print the command instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_help launch/pod/stop.sh; exit; fi
require PROJECT ZONE NAME
if [[ $# != 0 ]]; then echo "stop.sh takes no arguments ($1): NAME says which TPU; see --help" >&2; exit 2; fi
if [[ ! ${WAIT_S:=600} =~ ^[0-9]+$ ]]; then echo "WAIT_S=$WAIT_S is no number of seconds" >&2; exit 2; fi
on_all_hosts -- bash launch/pod/host.sh stop "$WAIT_S"
