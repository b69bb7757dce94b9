#!/usr/bin/env bash
# tests/gpu/run.sh [--small] STEP...: run steps (check, step, feed, icons) one after another; README.md says what they are.
#
#   $OUT      folder for the tables, a file STEP.md each; default gpu-tables
#   $DEVICE   default cuda; cpu with --small, the form for a machine without a GPU
#   $PYTHON   default python3
#
# Wheels in .whl/ are installed into a temporary folder. A step that fails does not stop the next; the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
small=
[[ ${1-} == --small ]] && small=--small && shift
if [[ $# == 0 ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
python=${PYTHON:-python3} out=${OUT:-gpu-tables} device=${DEVICE:-$([[ $small ]] && echo cpu || echo cuda)}
path=$PWD status=0
if compgen -G '.whl/*.whl' > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit
    path=$path:$site
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg
for step in "$@"; do
    printf '\n== %s (%s s)\n' "$step" "$SECONDS"
    # a step ends by itself before that
    timeout --kill-after=10 540 "$python" -m "tests.gpu.$step" --device "$device" --out "$out" $small
    ended=$?
    if [[ $ended != 0 ]]; then
        echo "$step ended with status $ended" >&2
        status=1
    fi
done
exit "$status"
