#!/usr/bin/env bash
# Explored attention, its controls and GRPO from a start that looks at the wrong place, over seeds.
#
#   bash launch_scripts/study_explored.sh [--seeds 2 3 4 5] [--tasks tokens-9 ...] [--arms ARM ...] [--tune]
#
# Hours on two cores. It can be stopped, and continued on another machine: a run whose line stands in RESULTS is not
# repeated. RESULTS=docs/results/explored.jsonl --report-only writes our table again.
set -euo pipefail

# ---- yours to set (relative paths: to the current folder) -----------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/study_explored in the project
RESULTS="${RESULTS:-}"               # lines of finished runs; default: results.jsonl in OUTPUT_DIR
JOBS="${JOBS:-2}"                    # runs at the same time, one core each
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/study_explored}")"
RESULTS="$(realpath -m "${RESULTS:-$OUTPUT_DIR/results.jsonl}")"
cd "$PROJECT"
setup_environment
"$PYTHON" tools/study_explored.py --output-dir "$OUTPUT_DIR" --results "$RESULTS" --jobs "$JOBS" "$@"
