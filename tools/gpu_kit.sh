#!/usr/bin/env bash
# Wheels for a GPU machine without network, whose Python 3.12 has torch and transformers but not the rest of what this
# project needs.
#
#   bash tools/gpu_kit.sh build [FOLDER]          on a machine with pip: wheels into FOLDER, default .whl
#   bash tools/gpu_kit.sh prove FOLDER PYTHON     there too, by a Python 3.12 that has what the GPU machine has: unpack
#                                                 the wheels, import every module, train on two CPU ranks, resume,
#                                                 compare bit for bit, and simulate a GPU where there is a C++ compiler
#   bash tools/gpu_kit.sh unpack FOLDER [SITE]    on the GPU machine: into SITE, default .site in the project
#
# After `unpack`, MEGATRON_RAL_PYTHON=python3 PYTHONPATH="$PWD/.site" makes every script of the project use them. From
# the environment:
#
#   PYTHON_BASE    Python 3.12 to build with; default python3.12
#   NO_VIDEO       1: leave out PyAV, three quarters of the size; then there is no video task
#
# Versions are those of requirements-3.12.txt. That machine is expected to have torch and Triton, transformers with
# tokenizers and safetensors, numpy, sympy, six, absl-py, pillow, tensorboard, psutil, tqdm, PyYAML, packaging,
# filelock, scikit-learn and pytest.
set -euo pipefail
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Direct needs, whose versions the lock has.
WHEELS=(megatron-core webdataset pydantic jiwer math-verify)
[ -n "${NO_VIDEO:-}" ] || WHEELS+=(av)
SOURCES=(deepspeed rouge-score) # no wheels on the index, but pure Python once built
# What these need, which the lock does not name. pydantic fixes the version of pydantic-core.
MORE_WHEELS=(pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0
    hjson==3.1.0 rapidfuzz==3.14.6 nltk==3.10.4 defusedxml==0.7.1
    latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2)
MORE_SOURCES=(braceexpand==0.1.7)

# pinned NAME ...: NAME==VERSION of each, from the lock.
pinned() {
    local name
    for name in "$@"; do
        grep -m 1 -E "^$name==" "$PROJECT/requirements-3.12.txt" | cut -d' ' -f1
    done
}

build() {
    local folder="${1:-$PROJECT/.whl}" python="${PYTHON_BASE:-python3.12}" platforms=() wheels sources tag
    [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = 3.12 ] || {
        echo "error: PYTHON_BASE = $python is not Python 3.12" >&2
        exit 2
    }
    mapfile -t wheels < <(pinned "${WHEELS[@]}")
    mapfile -t sources < <(pinned "${SOURCES[@]}")
    mkdir -p "$folder"
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest "$folder" "${wheels[@]}" "${MORE_WHEELS[@]}"
    # DS_BUILD_OPS=0: no CUDA operation is compiled, because every part of DeepSpeed that the project uses is Python.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "${sources[@]}" "${MORE_SOURCES[@]}"
    find "$folder" -name '*.whl' -printf '%9s %f\n' | sort -k 2
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $(cat "$folder"/*.whl | wc -c) bytes"
}

unpack() {
    local folder="$1" site="${2:-$PROJECT/.site}" python="${MEGATRON_RAL_PYTHON:-python3}"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
        "$folder"/*.whl
}

prove() {
    local site python
    python="$(command -v "$2")"
    site="$(mktemp -d)"
    MEGATRON_RAL_PYTHON="$python" unpack "$(realpath "$1")" "$site"
    export PYTHONPATH="$site:$PROJECT" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
    cd "$PROJECT"
    "$python" - << 'END'
import importlib
import pkgutil
import platform

import deepspeed
import megatron.core
import torch
import transformers

import megatron_ral

for module in pkgutil.walk_packages(megatron_ral.__path__, "megatron_ral."):
    importlib.import_module(module.name)
print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},",
      f"megatron-core {megatron.core.__version__}, DeepSpeed {deepspeed.__version__}: every module is imported")
END
    "$python" -m pytest -x -q -p no:cacheprovider \
        "tests/integration/test_runs.py::test_resumed_run_equals_straight_run_bit_for_bit[ral-dp2]" \
        "tests/distributed/test_gpu_work.py::test_known_integers_keep_their_device" \
        "tests/distributed/test_gpu_work.py::test_attention_in_float32_is_chosen_without_the_libraries_of_a_gpu" \
        "tests/distributed/test_gpu_work.py::test_a_step_mixes_no_devices_and_waits_for_tokens_alone[reference-tiny]"
    echo "the wheels work; they are unpacked in $site"
}

case "${1:-}" in
    build | unpack | prove) "$@" ;;
    *) echo "error: '${1:-}' is none of build, prove, unpack; the head of this file says what they do" >&2 && exit 2 ;;
esac
