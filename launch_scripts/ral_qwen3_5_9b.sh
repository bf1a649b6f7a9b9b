#!/usr/bin/env bash
# RAL on Qwen3.5-9B. One node of 8 GPUs (TP=4, DP=2). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_qwen3_5_9b "$@"
