#!/usr/bin/env bash
# Brings the repository, its Python environment and data onto every host of a TPU.
#
#   PROJECT=my-project ZONE=us-west4-a NAME=search-1 bash launch/pod/setup.sh [SOURCE=FOLDER …]
#
# For example: … bash launch/pod/setup.sh gs://my-bucket/musique=data/musique models/Qwen2.5-3B=models/Qwen2.5-3B
#
#   SOURCE=FOLDER           copy SOURCE, a gs:// folder (every host fetches it) or a folder here, to FOLDER (relative to the repository)
#   REPOSITORY=URL          clone this repository; otherwise this working tree is copied as it is, but for what git ignores
#   COMMIT=…                which commit of it (needed with REPOSITORY)
#   DRY_RUN=1               print the commands instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_help launch/pod/setup.sh; exit; fi
require PROJECT ZONE NAME
for pair in "$@"; do
  source=${pair%=*} folder=${pair##*=}
  if [[ $pair != ?*=?* ]]; then echo "setup.sh: $pair is not SOURCE=FOLDER; see --help" >&2; exit 2; fi
  if [[ $source == gs:* && $source != gs://[!/]* ]]; then echo "setup.sh: $pair names no bucket" >&2; exit 2; fi
  if [[ $source != gs://* && ! -d $source ]]; then echo "setup.sh: there is no folder $source" >&2; exit 2; fi
done
if [[ -n ${REPOSITORY:-} && -z ${COMMIT:-} ]]; then echo "COMMIT is missing: which commit of $REPOSITORY; see --help" >&2; exit 2; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Sends a packed folder to every host and unpacks it there.
send() {
  run tar -C "$1" -czf "$scratch/$2.tar.gz" "${@:4}"
  tpus tpu-vm scp "$scratch/$2.tar.gz" "$NAME:$2.tar.gz" --worker=all
  on_all_hosts -- mkdir -p "$3"
  on_all_hosts -- tar -xzf "../$2.tar.gz" -C "$3"
}

if [[ -n ${REPOSITORY:-} ]]; then
  on_all_hosts -- git init --quiet
  on_all_hosts -- git fetch --quiet "$REPOSITORY" "$COMMIT"
  on_all_hosts -- git checkout --quiet --force FETCH_HEAD
else
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e $file ]]; then printf '%s\0' "$file"; fi  # deleted ones are still listed
  done >"$scratch/files"
  send . repository . --null -T "$scratch/files"
fi
on_all_hosts -- bash launch/pod/host.sh install
number=0
for pair in "$@"; do
  source=${pair%=*} folder=${pair##*=}
  if [[ $source == gs://* ]]; then
    on_all_hosts -- bash launch/pod/host.sh copy "$source" "$folder"
  else
    number=$((number + 1))
    send "$source" "data-$number" "$folder" .
  fi
done
