#!/usr/bin/env bash
# RAL on Qwen2.5-VL-7B without thinking. One node of 8 GPUs (TP=4, DP=2). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_zero_7b "$@"
