#!/usr/bin/env bash
# Make .venv beside the project on first use and install the pinned packages. Meant to be sourced:
# afterwards $PYTHON is the interpreter and $PROJECT the root of the project.
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$PROJECT/.venv/bin/python"
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"
# With more threads than free cores small operations become ten times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

setup_environment() {
    local wanted base="${PYTHON_BASE:-python3}"
    wanted="$(sha256sum "$PROJECT/requirements.txt" | cut -d' ' -f1)"
    if [ -f "$PROJECT/.venv/installed" ] && [ "$(cat "$PROJECT/.venv/installed")" = "$wanted" ]; then
        return 0
    fi
    "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
        command -v python3.11 >/dev/null || {
            echo "error: Python 3.11 is needed; set PYTHON_BASE to its interpreter" >&2
            return 1
        }
        base=python3.11
    }
    echo "installing into .venv (first use)"
    "$base" -m venv "$PROJECT/.venv" || return 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$PROJECT/requirements.txt" || return 1
    printf '%s\n' "$wanted" > "$PROJECT/.venv/installed"
}

# launch MODULE [ARGUMENT ...]: the module under torchrun, layout from the environment.
launch() {
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m "$@"
}
