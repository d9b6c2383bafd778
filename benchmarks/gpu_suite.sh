#!/usr/bin/env bash
# The GPU tests and the benchmarks in one go; ends with the table. No installation: torch, triton, pytest, hypothesis
# and pytest-benchmark are enough, the package is imported from this tree.
#
#     bash benchmarks/gpu_suite.sh                 writes benchmarks/results/<device>.json
#
# Environment:
#     PYTHON               the interpreter; default .venv/bin/python where there is one, else python3
#     TEST_SECONDS         limit of the tests (220)
#     BENCHMARK_SECONDS    no case is started after this time (230); one in flight has a minute to end
#     MTP_CE_COMMIT        the commit to record where this tree is a copy without git
#
# Exit code: 0 all passed, 1 a test or a case failed or ran out of time, 3 no GPU (or no torch to look for one).
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=.
# The tests choose Triton's interpreter where there is no GPU; here the compiler must run.
unset TRITON_INTERPRET

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$logs/error"; then
    echo "gpu_suite: no GPU that torch can use; nothing was run.$(tail -n 1 "$logs/error" | sed 's/^/ /')"
    exit 3
fi

failed=0

# part NAME SECONDS ARGUMENTS...: pytest under a limit; what failed, and its last line. Interrupted first, so that
# pytest still says what it had found.
part() {
    local name=$1 seconds=$2 code
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --signal=INT --kill-after=15 "$seconds" "$PYTHON" -m pytest -p no:cacheprovider -q "$@" >"$logs/$name" 2>&1
    code=$?
    grep -E '^(FAILED|ERROR|E  )' "$logs/$name" | cut -c 1-200 | head -n 20
    tail -n 1 "$logs/$name"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "$name ran out of its $seconds s"; fi
    if [ "$code" -ne 0 ]; then failed=1; fi
}

# "cpu" is the parameter of the tests that run on the host, which is not what this suite is for.
part tests "${TEST_SECONDS:=220}" tests/kernels tests/mtp_ce -k "not cpu"
part benchmarks "$((${BENCHMARK_SECONDS:=230} + 60))" benchmarks --benchmark-only --benchmark-quiet --results \
    --time-limit "$BENCHMARK_SECONDS"

echo "== results"
"$PYTHON" -m benchmarks.table || failed=1
exit "$failed"
