#!/usr/bin/env bash
# RAL, its targets and its controls against GRPO on digit search, from the same SFT weights, over seeds and grid sizes.
#
#   bash launch_scripts/study_tiny.sh [--seeds 0 1 2] [--grids 2 3] [--arms ARM ...] [--num-rollouts N]
#
# More than an hour on two cores for the default 96 runs. It can be stopped: finished runs are not repeated.
set -euo pipefail

# ---- yours to set (relative paths: to the current folder) -----------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/study_tiny in the project
JOBS="${JOBS:-2}"                    # runs at the same time, one core each
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/study_tiny}")"
cd "$PROJECT"
setup_environment
"$PYTHON" tools/study.py --output-dir "$OUTPUT_DIR" --jobs "$JOBS" "$@"
