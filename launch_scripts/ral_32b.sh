#!/usr/bin/env bash
# RAL on Qwen2.5-VL-32B. 4 nodes of 8 GPUs (TP=8, DP=4).
#
#   MODEL_DIR=/path/to/qwen2.5-vl-32b TRAIN_SHARDS='/path/train-*.tar' bash launch_scripts/ral_32b.sh [dotted.key=value ...]
#   bash launch_scripts/ral_32b.sh --dry-run
#
# Start it on every node with its NODE_RANK and one MASTER_ADDR, or by slurm.sbatch.
# All variables and flags: launch_run in setup.sh. Not run on GPUs yet.
set -euo pipefail
NNODES="${NNODES:-4}"
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
launch_run ral_32b qwen2.5-vl-32b "$@"
