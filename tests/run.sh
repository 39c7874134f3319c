#!/usr/bin/env bash
# The whole test suite, a real S3 server included: style, types, tests. No root needed.
# Arguments go to pytest: bash tests/run.sh -k storage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/venv.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if (($#)); then
  .venv/bin/mypy
  exec .venv/bin/python -m pytest "$@"
fi

# Two at a time, as what starts clusters waits most of its time. Of clusters, too, there are two at most, and one at a time
# on which Ray Train runs. What computes is nicer than Ray's workers (15), which have deadlines to keep, and has one
# thread: threads that wait for each other on cores that others use take many times as long.
said=$(mktemp)
set -m  # a job of its own: without, it and what it starts would ignore Ctrl-C, of which some tests are
(
  status=0
  folder=$(mktemp -d /tmp/fwm-XXX)
  RAY_TMPDIR=$folder .venv/bin/python -m pytest tests/test_fleet.py || status=$?
  rm -rf "$folder"
  OMP_NUM_THREADS=1 nice -n 19 .venv/bin/python -m pytest -m "not ray" || status=$?
  exit $status
) >"$said" 2>&1 &
beside=$!
set +m
trap 'kill -- -$beside 2>/dev/null || true; rm -f "$said"' EXIT
status=0
.venv/bin/python -m pytest -m ray --ignore=tests/test_fleet.py || status=$?
.venv/bin/mypy || status=$?
wait $beside || status=$?
cat "$said"
exit $status
