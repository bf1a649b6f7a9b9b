#!/usr/bin/env bash
# Explored attention on Qwen2.5-VL-7B. One node of 8 GPUs (TP=4, DP=2). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_explored_7b "$@"
