#!/usr/bin/env bash
# Explored attention on Qwen2.5-VL-72B. 8 nodes of 8 GPUs (TP=8, PP=2, DP=4). Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ral_explored_70b "$@"
