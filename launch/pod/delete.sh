#!/usr/bin/env bash
# Deletes a TPU, and its request if it was queued, without asking. What lies on its hosts is lost; buckets are not touched.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=search-1 bash launch/pod/delete.sh
#
#   DRY_RUN=1               print the commands instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_help launch/pod/delete.sh; exit; fi
require PROJECT ZONE NAME
if [[ $# != 0 ]]; then echo "delete.sh takes no arguments ($1): NAME says which TPU; see --help" >&2; exit 2; fi
delete_tpu
