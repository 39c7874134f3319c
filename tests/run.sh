#!/usr/bin/env bash
# The whole test suite, a real S3 server included: style, types, tests. No root needed.
# Arguments go to pytest: bash tests/run.sh -k storage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/venv.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
