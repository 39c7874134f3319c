#!/usr/bin/env bash
# The main job on an embedded default: two real classifiers are watermarked, a fleet of their
# checkpoints is audited through a local Ray, and every verdict is compared with the expected one.
# Needs Python 3.11+ and a package index; writes .venv and quickstart-out in this folder only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/venv.sh quickstart
exec .venv/bin/python -m jobs.quickstart "$@"
