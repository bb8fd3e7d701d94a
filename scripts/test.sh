#!/usr/bin/env bash
# Runs the tests. Usage: bash scripts/test.sh [--slow] [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

started=$SECONDS
say "Testing: pytest $*"
status=0
python -m pytest "$@" || status=$?
printf '\n== Tests took %s s\n' "$((SECONDS - started))"
exit $status
