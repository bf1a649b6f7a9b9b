#!/usr/bin/env bash
# Explored attention against GRPO on a bare CPU machine, from a start that looks at the wrong cell: data, supervised
# start, both runs side by side, table and pictures. About 8 minutes on two cores.
#
#   bash launch_scripts/explore_tiny.sh [seed=N]
#
# A phase whose result is already in OUTPUT_DIR is skipped.
set -euo pipefail

# ---- yours to set (relative paths: to the current folder) -----------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-}"         # default: outputs/explore_tiny in the project, one folder per seed
DATA_DIR="${DATA_DIR:-}"             # default: data/wrong_search in the project
NPROC_PER_NODE="${NPROC_PER_NODE:-2}"  # processes of the supervised start; the two runs have one each
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export NNODES=1 NODE_RANK=0 MASTER_PORT=""

seed=0
for argument in "$@"; do
    case "$argument" in
        seed=*) seed="${argument#seed=}" ;;
        *) echo "error: $argument is not seed=N" >&2 && exit 2 ;;
    esac
done
OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/explore_tiny-$seed}")"
DATA_DIR="$(realpath -m "${DATA_DIR:-$PROJECT/data/wrong_search}")"
cd "$PROJECT"
setup_environment
mkdir -p "$OUTPUT_DIR"

heldout="$DATA_DIR/heldout-*.tar"
if [ ! -f "$DATA_DIR/dataset_info.json" ]; then
    "$PYTHON" tools/make_digit_search.py --output "$DATA_DIR" --distinct --bias 0.99
fi
[ -f "$OUTPUT_DIR/model/config.json" ] \
    || "$PYTHON" tools/make_tiny_model.py --output "$OUTPUT_DIR/model" --seed "$seed"

# The start: read single cells, search, then 99 % wrong lessons. It ends sure of the wrong cell.
train() { # train LAUNCHER RUN CONFIG MODEL SETTING...: unless it is done
    local launcher="$1" run="$2" config="$3" model="$4"
    shift 4
    [ -d "$OUTPUT_DIR/$run/hf" ] || $launcher megatron_ral.train --config "pretrained_configs/runs/$config.yaml" \
        "model.path='$OUTPUT_DIR/$model'" "train.output_dir='$OUTPUT_DIR/$run'" "data.eval_shards='$heldout'" \
        "seed=$seed" --resume "$@"
}
train launch start sft_tiny model train.num_steps=650 train.checkpoint_interval=0 logging.probe_interval=0 \
    "data.train=[{shards: '$DATA_DIR/single-*.tar', num_samples: 4800}, {shards: '$DATA_DIR/search-*.tar',
        num_samples: 6400}, {shards: '$DATA_DIR/biased-*.tar', num_samples: 9600}]"

rl=("data.train=[{shards: '$DATA_DIR/rl-*.tar'}]")
alone() { "$PYTHON" -m "$@"; }
echo "30 rollouts of GRPO and of contrast side by side; their output is in $OUTPUT_DIR/*.log"
train alone grpo explore_tiny start/hf "${rl[@]}" loss.attention_coef=0 rollout.attention_noise.sigma=0 \
    > "$OUTPUT_DIR/grpo.log" 2>&1 &
train alone contrast explore_tiny start/hf "${rl[@]}" > "$OUTPUT_DIR/contrast.log" 2>&1 \
    || { cat "$OUTPUT_DIR/contrast.log" >&2 && exit 1; }
wait "$!" || { cat "$OUTPUT_DIR/grpo.log" >&2 && exit 1; }

"$PYTHON" -m tools.explore_tiny "$OUTPUT_DIR" "$heldout" --runs grpo contrast
