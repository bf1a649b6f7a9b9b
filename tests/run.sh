#!/usr/bin/env bash
# Set up the environment if needed and run tests:
#
#   bash tests/run.sh                      all of them, as CI does
#   bash tests/run.sh --fast               some of every folder, within four minutes
#   bash tests/run.sh --second-end         what depends most on the libraries' versions, in an environment of its own with
#                                          the newest that were tried: PYTHON_BASE, python3.12 if unset, in .venv-3.12
#   bash tests/run.sh ARGUMENT ...         arguments of pytest, for instance a file; behind --fast and --second-end too
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
second_end=(
    tests/unit/test_compat.py tests/unit/test_versions.py tests/unit/test_conversion.py tests/unit/test_resharding.py
    tests/distributed/test_layouts.py tests/distributed/test_group_layout.py tests/distributed/test_parity.py
    tests/integration/test_runs.py
)
tests=(tests)
case "${1:-}" in
    --fast)
        shift
        tests=(-m fast tests)
        ;;
    --second-end)
        shift
        tests=("${second_end[@]}")
        export PYTHON_BASE="${PYTHON_BASE:-python3.12}"
        export MEGATRON_RAL_VENV="${MEGATRON_RAL_VENV:-${here%/*}/.venv-$("$PYTHON_BASE" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
        ;;
    "") ;;
    *) tests=() ;;
esac
# shellcheck source=launch_scripts/setup.sh
source "$here/../launch_scripts/setup.sh"
cd "$PROJECT"
setup_development
if [ "${#tests[@]}" -gt 0 ]; then  # a file at a time on each of up to four workers; long files come first by name
    workers=$(getconf _NPROCESSORS_ONLN)
    tests=(--numprocesses "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder "${tests[@]}")
fi
exec "$PYTHON" -m pytest ${tests[@]+"${tests[@]}"} "$@"
