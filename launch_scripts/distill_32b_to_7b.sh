#!/usr/bin/env bash
# Qwen2.5-VL-7B learns from Qwen2.5-VL-32B. One node of 8 GPUs (student TP=4, DP=2; teacher TP=8).
#
#   MODEL_DIR=/path/to/qwen2.5-vl-7b TEACHER_DIR=/path/to/qwen2.5-vl-32b \
#    TRAIN_SHARDS='/path/train-*.tar' bash launch_scripts/distill_32b_to_7b.sh [dotted.key=value ...]
#   bash launch_scripts/distill_32b_to_7b.sh --dry-run
#
# All variables and flags: launch_run in setup.sh. Not run on GPUs yet.
set -euo pipefail
NNODES="${NNODES:-1}"
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
launch_run distill_32b_to_7b qwen2.5-vl-7b "$@"
