#!/usr/bin/env bash
# RAL on Qwen2.5-VL-7B. One node of 8 GPUs (TP=4, DP=2).
#
#   MODEL_DIR=/path/to/qwen2.5-vl-7b TRAIN_SHARDS='/path/train-*.tar' bash launch_scripts/ral_7b.sh [dotted.key=value ...]
#   bash launch_scripts/ral_7b.sh --dry-run
#
# All variables and flags: launch_run in setup.sh. Not run on GPUs yet.
set -euo pipefail
NNODES="${NNODES:-1}"
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
launch_run ral_7b qwen2.5-vl-7b "$@"
