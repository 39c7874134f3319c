#!/usr/bin/env bash
# The whole test suite, a real S3 server included: style, types, tests. No root needed.
# Arguments go to pytest: bash tests/run.sh -k storage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/venv.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if (($#)); then
  exec .venv/bin/python -m pytest "$@"
fi

# Two at a time: what starts clusters waits most of its time. What computes beside it is nicer than Ray's workers (15),
# which have deadlines to keep, and has one thread, as threads that wait for each other on shared cores take many times
# as long.
said=$(mktemp)
set -m  # a job of its own: without, it and what it starts would ignore Ctrl-C, of which some tests are
OMP_NUM_THREADS=1 nice -n 19 .venv/bin/python -m pytest -m "not ray" >"$said" 2>&1 &
beside=$!
set +m
trap 'kill $beside 2>/dev/null || true; rm -f "$said"' EXIT
status=0
.venv/bin/python -m pytest -m ray || status=$?
wait $beside || status=$?
cat "$said"
exit $status
