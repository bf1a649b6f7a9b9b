#!/usr/bin/env bash
# RAL on Qwen2.5-VL-7B: one node of 8 GPUs by default (TP=4, PP=1, DP=2).
#
#   MODEL_DIR=/path/to/qwen2.5-vl-7b TRAIN_SHARDS='/path/train-*.tar' bash launch_scripts/ral_7b.sh [dotted.key=value ...]
#   bash launch_scripts/ral_7b.sh --dry-run       # resolved configuration, layout of 8 ranks, parameters each holds
#   bash launch_scripts/ral_7b.sh --rehearse [WORLD_SIZE] [--search]   # memory, traffic, seconds of every rank, no GPU
#
# Start it on every node with NODE_RANK=0..0 and one MASTER_ADDR; --resume is on, so a restart goes on from the
# newest checkpoint. Not run on GPUs yet.
set -euo pipefail

# ---- yours to set ---------------------------------------------------------------------------------------------------
MODEL_DIR="${MODEL_DIR:-}"           # Hugging Face or Megatron folder; --dry-run and --rehearse work without
TRAIN_SHARDS="${TRAIN_SHARDS:-}"     # glob of WebDataset shards
EVAL_SHARDS="${EVAL_SHARDS:-}"       # glob of held-out shards, or empty
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/ral_7b in the project; on a shared disk
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
launch_run pretrained_configs/runs/ral_7b.yaml pretrained_configs/models/qwen2.5-vl-7b "$@"
