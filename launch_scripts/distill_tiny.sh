#!/usr/bin/env bash
# Distillation at 1.4 million parameters on a bare CPU machine: trains a larger tiny teacher and students that cannot
# search yet, then compares ways to learn from the teacher, with reinforcement learning and without.
#
#   bash launch_scripts/distill_tiny.sh [--seeds 0 1 2 3 4] [--arms ARM ...] [--num-rollouts N]
#
# It can be stopped at any time: finished runs are not repeated. One arm and one seed: --seeds 0 --arms tokens_all
set -euo pipefail

# ---- yours to set (relative paths: to the current folder) -----------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/distill_tiny in the project
JOBS="${JOBS:-2}"                    # runs at the same time, one core each
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/distill_tiny}")"
cd "$PROJECT"
setup_environment
"$PYTHON" tools/distill_study.py --output-dir "$OUTPUT_DIR" --jobs "$JOBS" "$@"
