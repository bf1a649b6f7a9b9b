#!/usr/bin/env bash
# Start the run pretrained_configs/runs/NAME.yaml on this node, one of NNODES.
#
#   MODEL_DIR=/path/to/qwen2.5-vl-7b TRAIN_SHARDS='/path/train-*.tar' \
#       bash launch_scripts/run.sh NAME [dotted.key=value ...] [FLAG]
#
# On several nodes start it on each with its NODE_RANK and one MASTER_ADDR, or submit slurm.sbatch. A run without a flag
# resumes from its newest checkpoint. Flags:
#
#   --dry-run      print the resolved configuration, the layout of all ranks and the parameters that each holds
#   --rehearse [WORLD_SIZE] [--search]   show what every rank would hold, send and take, without GPUs (megatron-ral
#                  rehearse); --search tries layouts, --OPTION=VALUE passes other options of that command
#   --preflight    compare all nodes and what they see, and end; start it on every node
#
# --dry-run and --rehearse need no weights: without MODEL_DIR they read the config.json that model.path of the run
# names. From the environment (relative paths: to the current folder):
#
#   MODEL_DIR       Hugging Face or Megatron folder of the model
#   TEACHER_DIR     folder of the teacher, for a run that has one
#   TRAIN_SHARDS    glob of WebDataset shards
#   EVAL_SHARDS     glob of held-out shards, or empty
#   OUTPUT_DIR      default: outputs/NAME in the project; on a disk that all nodes share
#   NPROC_PER_NODE  GPUs of a node, 8
#   NNODES          number of nodes; default: 8 for ral_70b and ral_explored_70b, 4 for ral_32b, else 1
#   NODE_RANK       number of this node, 0
#   MASTER_ADDR, MASTER_PORT    address of the first node, and a port on it (29500; on one node a free one)
#
# Not run on GPUs yet.
set -euo pipefail
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name="${1:-}"
config="pretrained_configs/runs/$name.yaml"
if [ -z "$name" ] || [ ! -f "$PROJECT/$config" ]; then
    echo "error: NAME = '$name' is not a run; pretrained_configs/runs has" \
        "$(cd "$PROJECT/pretrained_configs/runs" && printf '%s ' *.yaml | sed 's/\.yaml//g')" >&2
    exit 2
fi
shift
case "$name" in
    ral_70b | ral_explored_70b) nodes=8 ;;
    ral_32b) nodes=4 ;;
    *) nodes=1 ;;
esac
NPROC_PER_NODE="${NPROC_PER_NODE:-8}" NNODES="${NNODES:-$nodes}" NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-}"
MODEL_DIR="${MODEL_DIR:-}" TEACHER_DIR="${TEACHER_DIR:-}" TRAIN_SHARDS="${TRAIN_SHARDS:-}" EVAL_SHARDS="${EVAL_SHARDS:-}"

settings=() options=() flags=(--resume) dry_run="" rehearse=""
while [ $# -gt 0 ]; do
    argument="$1"
    shift
    case "$argument" in
        --dry-run) dry_run=1 ;;
        --preflight) flags+=(--preflight) ;;
        --rehearse)
            rehearse=$((NPROC_PER_NODE * NNODES))
            if [[ "${1:-}" =~ ^[0-9]+$ ]]; then rehearse="$1" && shift; fi ;;
        --*) options+=("$argument") ;;
        *) settings+=("$argument") ;;
    esac
done
for variable in TRAIN_SHARDS EVAL_SHARDS; do
    [ -z "${!variable}" ] || [[ "${!variable}" = /* ]] || printf -v "$variable" '%s/%s' "$PWD" "${!variable}"
done
# the environment first, so that a setting of the same key replaces it
[ -z "$TEACHER_DIR" ] || settings=("teacher.path='$(realpath -m "$TEACHER_DIR")'" ${settings[@]+"${settings[@]}"})
[ -z "$MODEL_DIR" ] || settings=("model.path='$(realpath -m "$MODEL_DIR")'" ${settings[@]+"${settings[@]}"})
OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/$name}")"
cd "$PROJECT"
setup_environment

if [ -n "$rehearse" ]; then
    exec "$PYTHON" -m megatron_ral rehearse --config "$config" --world-size "$rehearse" \
        ${options[@]+"${options[@]}"} ${settings[@]+"${settings[@]}"}
fi
if [ -n "$dry_run" ]; then
    export RANK=0 WORLD_SIZE=$((NPROC_PER_NODE * NNODES))
    exec "$PYTHON" -m megatron_ral.train --config "$config" ${settings[@]+"${settings[@]}"} --dry-run
fi
if [ -z "$MODEL_DIR" ] || [ -z "$TRAIN_SHARDS" ]; then
    echo "error: set MODEL_DIR (a checkpoint folder) and TRAIN_SHARDS (a glob of tar files)" >&2
    exit 2
fi
if [ -z "$TEACHER_DIR" ]; then
    teacher="$("$PYTHON" -c 'import sys
from megatron_ral.config import load_config
print(load_config(sys.argv[1]).teacher.path)' "$config")"
    if [ -n "$teacher" ]; then
        echo "error: set TEACHER_DIR (a checkpoint folder of the teacher)" >&2
        exit 2
    fi
fi
launch megatron_ral.train "${flags[@]}" --config "$config" "train.output_dir='$OUTPUT_DIR'" \
    "data.train.0.shards='$TRAIN_SHARDS'" "data.eval_shards='$EVAL_SHARDS'" \
    ${options[@]+"${options[@]}"} ${settings[@]+"${settings[@]}"}
