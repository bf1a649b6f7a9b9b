#!/usr/bin/env bash
# The whole pipeline at 1.4 million parameters on a bare CPU machine: shards, SFT, RL with RAL, evaluation, export.
#
#   bash launch_scripts/ral_tiny.sh [dotted.key=value ...] [--dry-run]
#   TASK=video-search bash launch_scripts/ral_tiny.sh      # the same on clips (mp4) instead of images
#   FAMILY=qwen3_vl bash launch_scripts/ral_tiny.sh        # the same with a tiny model of another family
#   SAMPLER=vllm bash launch_scripts/ral_tiny.sh           # RL samples with vLLM, in an environment of its own
#
# Overrides go to both training runs; settings of one of them by prefix: sft:train.num_steps=100, rl:loss.kl_coef=0.1.
# Adapters (adapter.rank=8) are for RL alone, because SFT starts from random weights, which leave nothing to adapt.
# Their learning rate is 1e-3 (full training: 3e-4) unless another one is given.
# A phase whose result is already in OUTPUT_DIR is skipped, and an interrupted training run is resumed. Other settings
# need another OUTPUT_DIR.
set -euo pipefail

# ---- yours to set (relative paths: to the current folder) -----------------------------------------------------------
TASK="${TASK:-digit-search}"         # or video-search
FAMILY="${FAMILY:-qwen2_5_vl}"       # or another family of tools/make_tiny_model.py: qwen3_vl, qwen3_5, internvl
SAMPLER="${SAMPLER:-native}"         # or vllm (docs/sampler.md)
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/ral_tiny in the project, one folder per task, family, overrides
DATA_DIR="${DATA_DIR:-}"             # default: data/digit_search or data/video_search in the project
NPROC_PER_NODE="${NPROC_PER_NODE:-2}"
NNODES="${NNODES:-1}"                # more than 1: OUTPUT_DIR and DATA_DIR must be on a shared disk
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-}"       # default: a free port on one node, 29500 on several
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

case "$TASK" in
    digit-search) suffix="" ;;
    video-search) suffix="-video-search" ;;
    *) echo "error: TASK = $TASK is neither digit-search nor video-search" >&2 && exit 2 ;;
esac
task_name="${TASK/-/_}"
family=() sft_defaults=()
[ "$FAMILY" = qwen2_5_vl ] || { suffix+="-${FAMILY//_/-}" && family=("family=$FAMILY"); }

# Reading takes a model with linear attention twice as many steps. Each part of the curriculum is 32 samples per step.
[ "$FAMILY" != qwen3_5 ] \
    || sft_defaults=("train.num_steps=950" "data.train.0.num_samples=12800" "data.train.1.num_samples=12800")

sampler=()
case "$SAMPLER" in
    native) ;;
    vllm)
        suffix+="-vllm"
        vllm_python="$(bash "$(dirname "${BASH_SOURCE[0]}")/setup_vllm.sh")"
        sampler=("rollout.sampler=vllm" "rollout.vllm.python='$vllm_python'" "rollout.vllm.probe_bound=1.0e-3"
            "rollout.vllm.memory_share=0.05" "loss.sampler_correction=token_truncate")
        ;;
    *) echo "error: SAMPLER = $SAMPLER is neither native nor vllm" >&2 && exit 2 ;;
esac

overrides=() sft_overrides=() rl_overrides=() rl_defaults=() seed=0 dry_run=""
for argument in "$@"; do
    case "$argument" in
        --dry-run) dry_run=1 && continue ;;
        sft:*) sft_overrides+=("${argument#sft:}") ;;
        rl:*) rl_overrides+=("${argument#rl:}") ;;
        adapter.*)
            rl_defaults=("optimizer.learning_rate=1.0e-3")
            rl_overrides+=("$argument")
            ;;
        seed=*) seed="${argument#seed=}" sft_overrides+=("$argument") rl_overrides+=("$argument") ;;
        *) sft_overrides+=("$argument") rl_overrides+=("$argument") ;;
    esac
    overrides+=("$argument")
done
if [ -z "$OUTPUT_DIR" ]; then
    OUTPUT_DIR="$PROJECT/outputs/ral_tiny$suffix"
    if [ "${#overrides[@]}" -gt 0 ]; then
        OUTPUT_DIR+="-$(printf '%s\n' "${overrides[@]}" | sha256sum | cut -c1-8)"
    fi
fi
OUTPUT_DIR="$(realpath -m "$OUTPUT_DIR")"
DATA_DIR="$(realpath -m "${DATA_DIR:-$PROJECT/data/$task_name}")"
model="$OUTPUT_DIR/model"
cd "$PROJECT"

started=$(date +%s)
setup_environment
setup_seconds=$(($(date +%s) - started))

config=pretrained_configs/runs
sft=(--config "$config/sft_tiny.yaml" "model.path='$model'" "train.output_dir='$OUTPUT_DIR/sft'"
    "data.train.0.shards='$DATA_DIR/single-*.tar'" "data.train.1.shards='$DATA_DIR/search-*.tar'"
    "data.train.2.shards='$DATA_DIR/biased-*.tar'" "data.eval_shards='$DATA_DIR/heldout-*.tar'"
    ${sft_defaults[@]+"${sft_defaults[@]}"} ${sft_overrides[@]+"${sft_overrides[@]}"})
rl=(--config "$config/ral_tiny.yaml" "model.path='$OUTPUT_DIR/sft/hf'" "train.output_dir='$OUTPUT_DIR/rl'"
    "data.train.0.shards='$DATA_DIR/rl-*.tar'" "data.eval_shards='$DATA_DIR/heldout-*.tar'"
    ${sampler[@]+"${sampler[@]}"} ${rl_defaults[@]+"${rl_defaults[@]}"} ${rl_overrides[@]+"${rl_overrides[@]}"})

if [ -n "$dry_run" ]; then
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    "$PYTHON" tools/make_tiny_model.py --family "$FAMILY" --task "$TASK" --output "$scratch/model" \
        > /dev/null 2> "$scratch/error" || { tail -1 "$scratch/error" >&2 && exit 2; }
    launch megatron_ral.train "${sft[@]}" "model.path='$scratch/model'" --dry-run
    launch megatron_ral.train "${rl[@]}" "model.path='$scratch/model'" --dry-run
    exit 0
fi

mkdir -p "$OUTPUT_DIR/seconds"
printf '%s\n' "processes=$NPROC_PER_NODE*$NNODES" "data=$DATA_DIR" ${family[@]+"${family[@]}"} \
    ${sampler[@]+"${sampler[@]}"} \
    ${overrides[@]+"${overrides[@]}"} > "$OUTPUT_DIR/arguments.new.$NODE_RANK"
if [ -f "$OUTPUT_DIR/arguments" ] && ! cmp -s "$OUTPUT_DIR/arguments" "$OUTPUT_DIR/arguments.new.$NODE_RANK"; then
    rm "$OUTPUT_DIR/arguments.new.$NODE_RANK"
    echo "error: OUTPUT_DIR = $OUTPUT_DIR was made with other arguments ($(tr '\n' ' ' < "$OUTPUT_DIR/arguments")); " \
        "give another OUTPUT_DIR or remove it" >&2
    exit 2
fi
mv "$OUTPUT_DIR/arguments.new.$NODE_RANK" "$OUTPUT_DIR/arguments"
echo "$setup_seconds" > "$OUTPUT_DIR/seconds/setup"

run_phase() { # run_phase NAME COMMAND...: run it and write its wall seconds to a file
    local name="$1" start
    shift
    start=$(date +%s)
    "$@"
    echo $(($(date +%s) - start)) > "$OUTPUT_DIR/seconds/$name"
}

# make_once NAME FILE COMMAND...: on the first node, unless FILE is there; other nodes wait for it. Two starts at the
# same time wait for each other.
make_once() {
    local name="$1" file="$2"
    shift 2
    if [ "$NODE_RANK" != 0 ]; then
        until [ -f "$file" ]; do sleep 2; done
        return
    fi
    mkdir -p "$(dirname "$(dirname "$file")")"
    {
        flock 8
        [ -f "$file" ] || run_phase "$name" "$@"
    } 8> "$(dirname "$file").lock"
}

make_once data "$DATA_DIR/dataset_info.json" "$PYTHON" "tools/make_$task_name.py" --output "$DATA_DIR"
make_once model "$model/config.json" "$PYTHON" tools/make_tiny_model.py --family "$FAMILY" --task "$TASK" \
    --output "$model" --seed "$seed"

[ -d "$OUTPUT_DIR/sft/hf" ] || run_phase sft launch megatron_ral.train --resume "${sft[@]}"
[ -f "$OUTPUT_DIR/sft/evaluation.json" ] || run_phase sft_evaluation \
    launch megatron_ral.evaluate --model "$OUTPUT_DIR/sft/hf" --output "$OUTPUT_DIR/sft/evaluation.json" "${rl[@]}"
[ -d "$OUTPUT_DIR/rl/hf" ] || run_phase rl launch megatron_ral.train --resume "${rl[@]}"
[ -f "$OUTPUT_DIR/rl/evaluation.json" ] || run_phase rl_evaluation \
    launch megatron_ral.evaluate --model "$OUTPUT_DIR/rl/hf" --output "$OUTPUT_DIR/rl/evaluation.json" "${rl[@]}"

if [ "$NODE_RANK" = 0 ]; then
    phases=()
    for name in setup data model sft sft_evaluation rl rl_evaluation; do
        [ ! -f "$OUTPUT_DIR/seconds/$name" ] || phases+=(--phase "$name=$(cat "$OUTPUT_DIR/seconds/$name")")
    done
    "$PYTHON" tools/report.py --output-dir "$OUTPUT_DIR" "${phases[@]}"
fi
