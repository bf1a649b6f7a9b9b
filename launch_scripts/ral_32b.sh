#!/usr/bin/env bash
# RAL on Qwen2.5-VL-32B. 4 nodes of 8 GPUs (TP=8, DP=4). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_32b "$@"
