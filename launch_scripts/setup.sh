#!/usr/bin/env bash
# Make .venv beside the project on first use and install the pinned packages. Meant to be sourced:
# afterwards $PYTHON is the interpreter and $PROJECT the root of the project.
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$PROJECT/.venv/bin/python"
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"
# With more threads than free cores small operations become ten times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Micro-batches differ in shape; without it the memory of a GPU falls into pieces that fit none of them.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"

_is_python_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

_install() {
    local wanted base candidate
    wanted="$(sha256sum "$PROJECT/requirements.txt" | cut -d' ' -f1)"
    if [ -f "$PROJECT/.venv/installed" ] && [ "$(cat "$PROJECT/.venv/installed")" = "$wanted" ]; then
        return 0
    fi
    base=""
    for candidate in ${PYTHON_BASE:-python3.11 python3 python}; do
        if _is_python_311 "$candidate"; then
            base="$candidate"
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "error: Python 3.11 is needed (tried: ${PYTHON_BASE:-python3.11 python3 python}); set PYTHON_BASE" >&2
        return 1
    fi
    echo "installing into .venv (first use)"
    "$base" -m venv "$PROJECT/.venv" || return 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$PROJECT/requirements.txt" || return 1
    printf '%s\n' "$wanted" > "$PROJECT/.venv/installed"
}

# Two first starts at the same time must not install into one folder.
setup_environment() {
    (
        flock 9
        _install
    ) 9> "$PROJECT/.setup.lock"
}

# launch MODULE [ARGUMENT ...]: the module under torchrun, layout from the environment. On one node and without
# MASTER_PORT a free port is taken.
launch() {
    local rendezvous=(--standalone)
    if [ "$NNODES" != 1 ] || [ -n "${MASTER_PORT:-}" ]; then
        rendezvous=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" --node-rank "$NODE_RANK")
    fi
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" "${rendezvous[@]}" -m "$@"
}

# launch_run NAME SHAPE [dotted.key=value ...] [FLAG]: the run pretrained_configs/runs/NAME.yaml, on this node one of
# NNODES. SHAPE is a folder of pretrained_configs/models, whose config.json is all that --dry-run and
# --rehearse need.
#
#   --dry-run      print the resolved configuration, the layout of all ranks and the parameters each holds
#   --rehearse [WORLD_SIZE] [--search]   what every rank would hold, send and take, without GPUs (tools/rehearse.py);
#                  --search tries layouts, --OPTION=VALUE passes other options of the tool
#   --preflight    compare all nodes and what they see, and end; start it on every node
#
# A run without a flag resumes from its newest checkpoint. From the environment (relative paths: to where you stand):
#
#   MODEL_DIR       Hugging Face or Megatron folder
#   TEACHER_DIR     the same of a teacher, where the run has one
#   TRAIN_SHARDS    glob of WebDataset shards
#   EVAL_SHARDS     glob of held-out shards, or empty
#   OUTPUT_DIR      default: outputs/NAME in the project; on a disk that all nodes share
#   NPROC_PER_NODE  GPUs of a node, 8
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    nodes, this one's number (0), the first one's address and port (29500;
#                   on one node a free one)
launch_run() {
    local name="$1" config="pretrained_configs/runs/$1.yaml" shape="pretrained_configs/models/$2" dry_run="" argument
    local settings=() flags=(--resume) variable rehearse="" options=()
    shift 2
    NPROC_PER_NODE="${NPROC_PER_NODE:-8}" NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}"
    MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-}"
    MODEL_DIR="${MODEL_DIR:-}" TRAIN_SHARDS="${TRAIN_SHARDS:-}" EVAL_SHARDS="${EVAL_SHARDS:-}"
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
    [ -z "$MODEL_DIR" ] || MODEL_DIR="$(realpath -m "$MODEL_DIR")"
    [ -z "${TEACHER_DIR:-}" ] || settings=("teacher.path='$(realpath -m "$TEACHER_DIR")'" ${settings[@]+"${settings[@]}"})
    OUTPUT_DIR="$(realpath -m "${OUTPUT_DIR:-$PROJECT/outputs/$name}")"
    cd "$PROJECT" || return 1
    setup_environment || return 1
    if [ -n "$rehearse" ]; then
        "$PYTHON" tools/rehearse.py --config "$config" --world-size "$rehearse" ${options[@]+"${options[@]}"} \
            "model.path='${MODEL_DIR:-$shape}'" ${settings[@]+"${settings[@]}"}
        return
    fi
    if [ -n "$dry_run" ]; then
        RANK=0 WORLD_SIZE=$((NPROC_PER_NODE * NNODES)) "$PYTHON" -m megatron_ral.train --config "$config" \
            "model.path='${MODEL_DIR:-$shape}'" ${settings[@]+"${settings[@]}"} --dry-run
        return
    fi
    if [ -z "$MODEL_DIR" ] || [ -z "$TRAIN_SHARDS" ]; then
        echo "error: set MODEL_DIR (a checkpoint folder) and TRAIN_SHARDS (a glob of tar files)" >&2
        return 2
    fi
    if grep -q '^teacher:' "$config" && [ -z "${TEACHER_DIR:-}" ]; then
        echo "error: set TEACHER_DIR (a checkpoint folder of the teacher)" >&2
        return 2
    fi
    launch megatron_ral.train "${flags[@]}" --config "$config" "model.path='$MODEL_DIR'" "train.output_dir='$OUTPUT_DIR'" \
        "data.train.0.shards='$TRAIN_SHARDS'" "data.eval_shards='$EVAL_SHARDS'" ${options[@]+"${options[@]}"} ${settings[@]+"${settings[@]}"}
}
