#!/usr/bin/env bash
# Set up .venv if needed and run the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch_scripts/setup.sh"
cd "$PROJECT"
setup_environment
if [ "$#" -eq 0 ]; then  # all, a file at a time on each of up to four workers; long files come first by name
    workers=$(getconf _NPROCESSORS_ONLN)
    set -- --numprocesses "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder tests
fi
exec "$PYTHON" -m pytest "$@"
