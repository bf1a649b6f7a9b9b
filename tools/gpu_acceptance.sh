#!/usr/bin/env bash
# Show in at most eight minutes what only a GPU can show. docs/results/gpu.md says what the parts are.
#
#   bash tools/gpu_acceptance.sh [--output-dir DIR] [PART ...]    on one GPU
#   bash tools/gpu_acceptance.sh --cpu [PART ...]                 the same, smaller, on the CPU
#
# It prints one table and writes acceptance.json and one log per part into DIR (default outputs/gpu_acceptance). The
# exit status is 1 if a part failed. On a machine without network give MEGATRON_RAL_PYTHON, the interpreter that has the
# packages, and PYTHONPATH, the folder of the rest (tools/gpu_kit.sh).
set -euo pipefail
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch_scripts/setup.sh"
setup_environment
exec "$PYTHON" "$PROJECT/tools/gpu_acceptance.py" "$@"
