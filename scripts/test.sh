#!/usr/bin/env bash
# Runs the tests in two processes of one thread each. Usage: bash scripts/test.sh [--slow] [pytest arguments]
# In one process, for a debugger or on a single GPU: bash scripts/test.sh -n 0
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

started=$SECONDS
say "Testing: pytest $*"
status=0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two processes with two threads each would only wait for each other
# A file stays in one process: what its tests share is made once.
python -m pytest -n 2 --dist loadfile "$@" || status=$?
printf '\n== Tests took %s s\n' "$((SECONDS - started))"
exit $status
