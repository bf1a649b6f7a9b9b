#!/usr/bin/env bash
# RAL on Qwen3-VL-8B, Instruct or Thinking. One node of 8 GPUs (TP=4, DP=2). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_qwen3vl_8b "$@"
