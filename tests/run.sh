#!/usr/bin/env bash
# Set up .venv if needed and run the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
# shellcheck source=launch_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch_scripts/setup.sh"
cd "$PROJECT"
setup_environment
exec "$PYTHON" -m pytest "${@:-tests}"
