#!/usr/bin/env bash
# Make .venv beside the project on first use and install the pinned packages. Meant to be sourced:
# afterwards $PYTHON is the interpreter and $PROJECT the root of the project. From the environment:
#
#   PYTHON_BASE               Python 3.11, 3.12 or 3.13 to make the environment with; default: the one .venv was made
#                             with, else the first found of these versions
#   MEGATRON_RAL_PYTHON       interpreter that has every package already: nothing is made or installed (GPU machines
#                             without network)
#   MEGATRON_RAL_VENV         folder of the environment, default .venv in the project
#   MEGATRON_RAL_CONTAINER    1: use the torch, Triton and numpy that PYTHON_BASE (default python3) has, and never
#                             replace them, as the images of NVIDIA's catalogue (NGC) want it; default: 1 inside one
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MEGATRON_RAL_VENV:-$PROJECT/.venv}"
PYTHON="${MEGATRON_RAL_PYTHON:-$VENV/bin/python}"
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"
# With more threads than free cores small operations become ten times slower. `launch` gives more beside GPUs.
OMP_NUM_THREADS_GIVEN="${OMP_NUM_THREADS:-}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Micro-batches differ in shape; without it the memory of a GPU is fragmented.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"

_version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null
}

_lock_of() {
    case "$1" in
        3.11) echo "$PROJECT/requirements.txt" ;;
        3.12 | 3.13) echo "$PROJECT/requirements-$1.txt" ;;
        *) return 1 ;;
    esac
}

_pip_install() {
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

# _install_packages LOCK CONTAINER: the pinned packages and the project itself with its console script, into $VENV.
_install_packages() {
    local lock="$1" constraints="$VENV/constraints.txt"
    if [ "$2" = true ]; then
        "$PYTHON" - > "$constraints" << 'EOF' || return 1
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "triton", "pytorch-triton", "numpy"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
EOF
        if ! grep -q '^torch==' "$constraints"; then
            echo "error: MEGATRON_RAL_CONTAINER=1 uses the torch of PYTHON_BASE, which has none" >&2
            return 1
        fi
        # Replaces the image's own list, which pins more than torch.
        export PIP_CONSTRAINT="$constraints"
        grep -vE "^($(sed 's/==.*//' "$constraints" | paste -sd'|'))==" "$lock" > "$VENV/requirements.txt"
        lock="$VENV/requirements.txt"
    fi
    _pip_install --requirement "$lock" || return 1
    _pip_install --no-deps --no-build-isolation --editable "$PROJECT"
}

# Nothing is done where it was done before with the same lists.
_install() {
    local base="" version="" lock="" container=false wanted options=(--clear) candidate
    local candidates=("$PYTHON" python3.11 python3.12 python3.13 python3 python)
    if [ "${MEGATRON_RAL_CONTAINER:-${NVIDIA_PYTORCH_VERSION:+1}}" = 1 ]; then
        container=true candidates=(python3)
    fi
    [ -z "${PYTHON_BASE:-}" ] || candidates=("$PYTHON_BASE")
    for candidate in "${candidates[@]}"; do
        if version="$(_version_of "$candidate")" && lock="$(_lock_of "$version")"; then
            base="$candidate"
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "error: Python 3.11, 3.12 or 3.13 is needed (tried: ${candidates[*]}); set PYTHON_BASE" >&2
        return 1
    fi
    wanted="$version $container $(cat "$lock" "$PROJECT/pyproject.toml" | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$VENV/installed" 2> /dev/null)" != "$wanted" ]; then
        echo "installing into $(basename "$VENV") (Python $version; first use, or another list of packages)"
        if [ "$(_version_of "$PYTHON")" != "$version" ] \
            || ! grep -q "^include-system-site-packages = $container" "$VENV/pyvenv.cfg"; then
            base="$("$base" -c 'import sys; print(sys._base_executable)')"
            [ "$container" = false ] || options+=(--system-site-packages)
            "$base" -m venv "${options[@]}" "$VENV" || return 1
        fi
        (_install_packages "$lock" "$container") || return 1
        printf '%s\n' "$wanted" > "$VENV/installed"
    fi
}

_install_development() {
    local wanted
    wanted="$(sha256sum < "$PROJECT/requirements-dev.txt")"
    if [ "$(cat "$VENV/installed-dev" 2> /dev/null)" != "$wanted" ]; then
        _pip_install --requirement "$PROJECT/requirements-dev.txt" || return 1
        printf '%s\n' "$wanted" > "$VENV/installed-dev"
    fi
}

# Two first starts at the same time must not install into one folder.
_in_turn() {
    [ -z "${MEGATRON_RAL_PYTHON:-}" ] || return 0
    (
        flock 9
        "$@"
    ) 9> "$PROJECT/.setup.lock"
}

# What a run needs.
setup_environment() {
    _in_turn _install
}

# What tests and checks need.
setup_development() {
    _in_turn _install && _in_turn _install_development
}

# launch MODULE [ARGUMENT ...]: the module under torchrun, layout from the environment. On one node and without
# MASTER_PORT a free port is taken. Beside GPUs a rank stays on the processors of its GPU's memory, because the host
# starts every kernel, and half of its share of the cores are threads for what runs on the host (offloaded AdamW, image
# resizing).
launch() {
    local rendezvous=(--standalone) placement=() threads
    if [ "$NNODES" != 1 ] || [ -n "${MASTER_PORT:-}" ]; then
        rendezvous=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" --node-rank "$NODE_RANK")
    fi
    if command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus > /dev/null 2>&1; then
        # torchrun binds with numactl, and fails without it. One memory needs no binding.
        if command -v numactl > /dev/null && [ -d /sys/devices/system/node/node1 ]; then
            placement=(--numa-binding node)
        fi
        threads=$(($(nproc) / NPROC_PER_NODE / 2))
        [ -n "$OMP_NUM_THREADS_GIVEN" ] || export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
    fi
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" \
        ${placement[@]+"${placement[@]}"} "${rendezvous[@]}" -m "$@"
}
