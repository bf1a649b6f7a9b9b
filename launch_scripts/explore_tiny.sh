#!/usr/bin/env bash
# GRPO and explored attention side by side on a bare CPU machine, from a start that looks at the wrong place: ends with
# a table and a picture. Takes about 10 minutes on two free cores (18 minutes of processor time). All seeds share a base
# model, which is made once.
#
#   bash launch_scripts/explore_tiny.sh
#   SEED=7 bash launch_scripts/explore_tiny.sh
#
# A phase whose result is already in OUTPUT_DIR is skipped. Options go to tools/explore_tiny.py.
set -euo pipefail

# ---- yours to set (relative paths: to the current folder) -----------------------------------------------------------
SEED="${SEED:-6}"                    # of the wrong lessons, the order of the prompts and the noise
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/explore_tiny in the project; all seeds share its base model
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/explore_tiny}")"
cd "$PROJECT"
setup_environment
"$PYTHON" tools/explore_tiny.py --output-dir "$OUTPUT_DIR" --seed "$SEED" "$@"
