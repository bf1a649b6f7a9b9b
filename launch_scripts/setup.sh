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
