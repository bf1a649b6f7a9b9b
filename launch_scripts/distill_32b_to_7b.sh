#!/usr/bin/env bash
# Qwen2.5-VL-7B learns from Qwen2.5-VL-32B (TEACHER_DIR). One node of 8 GPUs (student TP=4, DP=2; teacher TP=8).
# Variables and flags: run.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" distill_32b_to_7b "$@"
