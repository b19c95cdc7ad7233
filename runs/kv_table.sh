#!/usr/bin/env bash
# The table of KV cache compression: methods x budgets x tasks on one model, with intervals.
#
#   runs/kv_table.sh MODEL OUT [FOLDER_OF_TEXTS] [tappa eval options, such as --device cuda --dtype bfloat16]
#
# Contexts of 4096 and 8192 tokens: fidelity (n = 64, the half of the text that nothing was chosen on), RULER (n = 100
# a task) and the local suite (n = 50 a task). Resumable: run it again after an interrupt. TAPPA names another tappa;
# LENGTHS, LIMIT_RULER and LIMIT_LOCAL make it smaller.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; fi
model=$1 out=$2 texts=${3:-}
shift $(($# < 3 ? $# : 3))
here=$(cd "$(dirname "$0")" && pwd)
tappa=${TAPPA:-$here/../.venv/bin/tappa}
data=()
if [ -n "$texts" ]; then data=(--data "$texts"); fi
for length in ${LENGTHS:-4096 8192}; do
  common=(--budgets 128,256,512,1024 --lengths "$length" "${data[@]}" "$@")
  "$tappa" eval "$model" --tasks fidelity --limit 128 --half report -o "$out/fidelity-$length" "${common[@]}"
  "$tappa" eval "$model" --tasks ruler --limit "${LIMIT_RULER:-100}" -o "$out/ruler-$length" "${common[@]}"
  "$tappa" eval "$model" --tasks local --limit "${LIMIT_LOCAL:-50}" -o "$out/local-$length" "${common[@]}"
done
