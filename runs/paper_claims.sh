#!/usr/bin/env bash
# The paper's claims on the packaged SmolLM2 and on other models: predicted, measured, pass or fail.
#
#   runs/paper_claims.sh OUT [MODEL ...] [-- tappa verify options, such as --device cuda --tokens 1024]
#
# Each model gets a folder below OUT with verification.json, tables.md and figures. Ends with code 1 when a claim fails.
set -euo pipefail
if [ $# -lt 1 ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
out=$1
shift
models=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do models+=("$1"); shift; done
[ $# -gt 0 ] && shift
here=$(cd "$(dirname "$0")" && pwd)
tappa=${TAPPA:-$here/../.venv/bin/tappa}
failed=0
run() { # name, then the model and options
  mkdir -p "$out/$1"
  "$tappa" verify "${@:2}" --out "$out/$1" | tee "$out/$1/tables.md" || failed=1
}
run smollm2 "$@"
for model in "${models[@]}"; do run "$(basename "$model")" "$model" "$@"; done
exit $failed
