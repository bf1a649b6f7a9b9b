#!/usr/bin/env bash
# The whole pipeline at 1.4 million parameters on a bare CPU machine: shards, SFT, RL with RAL, evaluation, export.
#
#   bash launch_scripts/ral_tiny.sh [dotted.key=value ...]
#
# Overrides go to both training runs; settings of one of them by prefix: sft:train.num_steps=100, rl:loss.kl_coef=0.1.
# A phase whose result is in OUTPUT_DIR already is not run again; a training run that was cut off is resumed.
set -euo pipefail

# ---- yours to set -------------------------------------------------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-outputs/ral_tiny}"
NPROC_PER_NODE="${NPROC_PER_NODE:-2}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"
DATA_DIR="${DATA_DIR:-data/digit_search}"
# -------------------------------------------------------------------------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$PROJECT"

sft_overrides=() rl_overrides=() seed=0
for argument in "$@"; do
    case "$argument" in
        sft:*) sft_overrides+=("${argument#sft:}") ;;
        rl:*) rl_overrides+=("${argument#rl:}") ;;
        --dry-run) dry_run=1 ;;
        *) sft_overrides+=("$argument") rl_overrides+=("$argument") ;;
    esac
    case "$argument" in seed=*) seed="${argument#seed=}" ;; esac
done

phases=()
run_phase() { # run_phase NAME COMMAND...: run it and keep the wall seconds
    local name="$1" start seconds
    shift
    start=$(date +%s)
    "$@"
    seconds=$(($(date +%s) - start))
    echo "$seconds" > "$OUTPUT_DIR/seconds/$name"
}

start=$(date +%s)
setup_environment
mkdir -p "$OUTPUT_DIR/seconds"
echo $(($(date +%s) - start)) > "$OUTPUT_DIR/seconds/setup"

model="$OUTPUT_DIR/model"
[ -f "$DATA_DIR/dataset_info.json" ] ||
    run_phase data "$PYTHON" tools/make_digit_search.py --output "$DATA_DIR"
[ -f "$model/config.json" ] ||
    run_phase model "$PYTHON" tools/make_tiny_model.py --output "$model" --seed "$seed"

config=pretrained_configs/runs
sft=(--config "$config/sft_tiny.yaml" "model.path=$model" "train.output_dir=$OUTPUT_DIR/sft"
    "data.train.0.shards=$DATA_DIR/single-*.tar" "data.train.1.shards=$DATA_DIR/search-*.tar"
    "data.train.2.shards=$DATA_DIR/biased-*.tar" "data.eval_shards=$DATA_DIR/heldout-*.tar" "${sft_overrides[@]}")
rl=(--config "$config/ral_tiny.yaml" "model.path=$OUTPUT_DIR/sft/hf" "train.output_dir=$OUTPUT_DIR/rl"
    "data.train.0.shards=$DATA_DIR/rl-*.tar" "data.eval_shards=$DATA_DIR/heldout-*.tar" "${rl_overrides[@]}")

if [ -n "${dry_run:-}" ]; then
    launch megatron_ral.train "${sft[@]}" --dry-run
    launch megatron_ral.train "${rl[@]}" "model.path=$model" --dry-run
    exit 0
fi

[ -d "$OUTPUT_DIR/sft/hf" ] || run_phase sft launch megatron_ral.train --resume "${sft[@]}"
[ -f "$OUTPUT_DIR/sft/evaluation.json" ] || run_phase sft_evaluation \
    launch megatron_ral.evaluate --model "$OUTPUT_DIR/sft/hf" --output "$OUTPUT_DIR/sft/evaluation.json" "${rl[@]}"
[ -d "$OUTPUT_DIR/rl/hf" ] || run_phase rl launch megatron_ral.train --resume "${rl[@]}"
[ -f "$OUTPUT_DIR/rl/evaluation.json" ] || run_phase rl_evaluation \
    launch megatron_ral.evaluate --model "$OUTPUT_DIR/rl/hf" --output "$OUTPUT_DIR/rl/evaluation.json" "${rl[@]}"

for name in setup data model sft sft_evaluation rl rl_evaluation; do
    [ ! -f "$OUTPUT_DIR/seconds/$name" ] || phases+=(--phase "$name=$(cat "$OUTPUT_DIR/seconds/$name")")
done
"$PYTHON" tools/report.py --output-dir "$OUTPUT_DIR" "${phases[@]}"
