# Shared by quickstart.sh and test.sh (sourced, not run): go to the project, make .venv, install what is missing.
# Nothing is installed, and no network used, when the environment already matches pyproject.toml and constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: needs Python 3.11 or 3.12 on PATH (or name one in the variable PYTHON)" >&2
  return 1
}

set_up() {
  local stamp wanted started=$SECONDS python
  stamp=.venv/.seqlit-installed
  wanted=$(cat pyproject.toml constraints.txt | cksum)-$PWD
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "Environment .venv is up to date"
    return
  fi
  python=$(find_python)
  say "Installing into .venv with $("$python" --version)"
  if [ -e .venv ] && ! .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
    echo "setup: .venv holds no Python 3.11 or 3.12; remove it and call again" >&2
    return 1
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # torch first and pinned: left to the resolver, the newest release would come, whatever was tested.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tda,timeseries,events,wandb,search]'
  printf '%s' "$wanted" > "$stamp"
  say "Installed in $((SECONDS - started)) s"
}

set_up
# Idle OpenMP threads that spin slow the others down on small machines.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PATH="$PWD/.venv/bin:$PATH"
