# Sourced by quickstart.sh and tests/run.sh: makes or reuses .venv in the repository's root and
# installs what EXTRA (quickstart or test) needs. A stamp of what was asked makes a second call quick.
# shellcheck shell=bash
set -euo pipefail

EXTRA=${1:?extra}
if [[ ! -x .venv/bin/python ]]; then
  for python in python3.11 python3.12 python3.13 python3; do
    if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then break; fi
    python=
  done
  [[ -n "$python" ]] || { echo "fwm-audit needs Python 3.11 or newer on the PATH" >&2; exit 2; }
  "$python" -m venv .venv || { echo "python3 -m venv failed: install your system's venv package (python3-venv)" >&2; exit 2; }
fi
stamp=.venv/.fwm-$EXTRA
want=$(cat pyproject.toml cluster/constraints.txt | cksum)
if [[ ! -f $stamp || $(<"$stamp") != "$want" ]]; then
  echo "installing fwm-audit[$EXTRA] into .venv (a few minutes the first time; PyTorch is large)" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c cluster/constraints.txt -e ".[$EXTRA]"
  echo "$want" >"$stamp"
fi
