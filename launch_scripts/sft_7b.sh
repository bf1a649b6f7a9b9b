#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-VL-7B, the start of the other 7B runs. One node of 8 GPUs (TP=4, DP=2). Variables
# and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" sft_7b "$@"
