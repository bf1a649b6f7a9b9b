#!/usr/bin/env bash
# RAL on Qwen2.5-VL-7B with low-rank adapters. One node of 8 GPUs (TP=4, DP=2). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_7b_lora "$@"
