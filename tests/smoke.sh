#!/usr/bin/env bash
# What a plain `pip install .` can do, in an empty folder: smoke.sh BIN_OF_AN_ENVIRONMENT
# Evaluation needs an extra: without it one line says so, with it a task is answered.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export TAPPA_CACHE=$work/cache PYTHONWARNINGS=error::FutureWarning
"$bin/tappa" analyze --tokens 128 --out analysis
test -s analysis/analysis.json
"$bin/tappa" generate --budget 64 --max-new-tokens 3
if "$bin/tappa" eval --tasks fidelity -o results 2> refused; then
	echo "tappa eval ran without its extra: this is no plain installation" >&2
	exit 1
fi
test "$(wc -l < refused)" = 1
grep -q "tappa\[eval\]" refused
"$bin/python" -m pip install --quiet "$repository[eval]"
"$bin/tappa" eval --methods full,tappa --budgets 64 --tasks fidelity --lengths 256 --limit 1 -o results
test -s results/tables.md
