#!/usr/bin/env bash
# kill -9 of a random rank at COUNT random moments of a small training run. Each time the job must end in time and name
# rank, phase and sample. Resumed from the newest complete checkpoint, it must end bit-identical to an undisturbed run.
#
#   bash tests/faults/kill_and_resume.sh [COUNT]          # default 20; about 40 s each on two cores
#
# SEED=N repeats the moments of an earlier call (it prints its seed); NPROC ranks (default 2); SETTINGS are further
# settings of the run ("parallel.pipeline_model_parallel_size=2"). The last line is "N passed, N failed".
set -euo pipefail
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch_scripts/setup.sh"
cd "$PROJECT"
setup_environment
exec "$PYTHON" -m tests.faults.kill_and_resume "${1:-20}"
