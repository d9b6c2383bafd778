#!/usr/bin/env bash
# The GPU tests, the benchmarks and the training step in one go, within 9 minutes; ends with the table. No installation:
# torch, triton, pytest, hypothesis and pytest-benchmark are enough, the package is imported from this tree; with
# pytest-xdist the tests take every core. The training step needs transformers, and says so where it is missing.
#
#     bash benchmarks/gpu_suite.sh                 writes benchmarks/results/<device>.json
#
# Environment:
#     PYTHON               the interpreter; default .venv/bin/python where there is one, else python3
#     TEST_SECONDS         limit of the tests (200)
#     BENCHMARK_SECONDS    no case is started after this time (200); one in flight has 45 s to end
#     STEP_SECONDS         the training step looks for no larger micro-batch after this time (60), and has 15 s to end
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

# part NAME SECONDS ARGUMENTS...: python under a limit; what failed, and its last line. Interrupted first, so that it
# still says what it had found.
part() {
    local name=$1 seconds=$2 code
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --signal=INT --kill-after=15 "$seconds" "$PYTHON" "$@" >"$logs/$name" 2>&1
    code=$?
    grep -E '^(FAILED|ERROR|E  )' "$logs/$name" | cut -c 1-200 | head -n 20
    tail -n 1 "$logs/$name"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "$name ran out of its $seconds s"; fi
    if [ "$code" -ne 0 ]; then failed=1; fi
}

pytest=(-m pytest -p no:cacheprovider -q)
# Most of the tests' time goes into compiling kernels, which takes a core each.
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n "$(nproc)" --dist worksteal); fi
# "cpu" is the parameter of the tests that run on the host, which is not what this suite is for; nor are the kernels that
# are compiled for other devices.
part tests "${TEST_SECONDS:=200}" "${pytest[@]}" "${workers[@]}" tests/kernels tests/mtp_ce -k "not cpu" \
    --ignore tests/kernels/test_compiled.py
part benchmarks "$((${BENCHMARK_SECONDS:=200} + 45))" "${pytest[@]}" benchmarks --benchmark-only --benchmark-quiet \
    --results --time-limit "$BENCHMARK_SECONDS"
part training_step "$((${STEP_SECONDS:=60} + 15))" -m benchmarks.training_step --results --time-limit "$STEP_SECONDS"

echo "== results"
"$PYTHON" -m benchmarks.table || failed=1
exit "$failed"
