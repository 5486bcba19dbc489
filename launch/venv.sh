# Sourced by the launch scripts: puts them into the repository's root, and holds the help, the virtual environment and the dry run that they share.

unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the header of a script, without its comment signs.
print_help() { sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p;}' "$1"; }

# Runs a command; with DRY_RUN=1 prints it instead.
run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Prints the Python to build .venv with: $PYTHON, or the first good one of the usual names.
find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed, and ${candidates[*]} is not: install one, or name it as PYTHON=/path/to/python3.12 bash launch/…" >&2
  return 1
}

# Makes .venv and installs the given requirement files into it. What stands there already, for this Python and these very files, is kept.
use_venv() {
  local python version file wanted
  python=$(find_python)
  version=$("$python" -c 'import sys; print(sys.version)' | head -n 1)
  if [[ ! -x .venv/bin/python || $(cat .venv/made-with 2>/dev/null) != "$version" ]]; then
    echo "making .venv with $version"
    run "$python" -m venv --clear .venv
    if [[ ${DRY_RUN:-0} != 1 ]]; then echo "$version" >.venv/made-with; fi
  fi
  for file in "$@"; do
    wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
    if [[ $(cat ".venv/installed-$file" 2>/dev/null) != "$wanted" ]]; then
      echo "installing $file into .venv (once)"
      # Python compiles a module when it is first imported; compiling all of them here takes a minute longer.
      run .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r "$file"
      if [[ ${DRY_RUN:-0} != 1 ]]; then echo "$wanted" >".venv/installed-$file"; fi
    fi
  done
}
