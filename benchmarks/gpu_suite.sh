#!/usr/bin/env bash
# What needs a GPU: tests, then benchmarks. Needs torch, triton, pytest, hypothesis and pytest-benchmark, and installs
# nothing: the package is imported from this tree. With pytest-xdist the tests use every core. The peers (liger-kernel,
# cut-cross-entropy, quack-kernels) are found on PYTHONPATH, after this tree; one that is missing is absent.
#
#     bash benchmarks/gpu_suite.sh [part ...]      without a part: all of them
#
# Parts, which run in this order:
#     device       the tests that only a GPU can run, and those of rows that several programs share
#     tests        the other tests of kernels and losses, random cases last
#     benchmarks   pytest benchmarks --full: writes RESULTS/<device>.json, and resumes the last call if it was cut off
#
# Environment:
#     PYTHON               the interpreter; default .venv/bin/python where there is one, else python3
#     RESULTS              the folder of the results; default benchmarks/results
#     LOGS                 a folder that keeps <part>.log, the whole output of each part; default: none
#     DEVICE_SECONDS       limit of the part device (100)
#     TEST_SECONDS         limit of the part tests (150)
#     BENCHMARK_SECONDS    no case is started after this time (150); one that runs has 45 s to end
#     MTP_CE_COMMIT        the commit to record where this tree is a copy without git
#
# A part at its limit is interrupted, and has 10 s to report. Results are written case by case.
#
# Exit code: 0 all passed, 1 a test or a case failed or ran out of time, 2 no such part, 3 no GPU (or no torch to find
# one).
set -u
shopt -s extglob

known=(device tests benchmarks)
parts=" ${*:-${known[*]}} "
for part in $parts; do
    if [[ " ${known[*]} " != *" $part "* ]]; then
        echo "gpu_suite: no part \"$part\"; expected ${known[*]}." >&2
        exit 2
    fi
done

# Relative folders are the caller's.
results=$(realpath -m "${RESULTS:-$(dirname "$0")/results}")
logs=${LOGS:+$(realpath -m "$LOGS")}
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# So that the log of a part that is killed is whole.
export PYTHONUNBUFFERED=1
# The tests choose Triton's interpreter where there is no GPU; here the compiler must run.
unset TRITON_INTERPRET

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if [ -z "$logs" ]; then
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"' EXIT
fi
mkdir -p "$logs" || exit

# Torch is imported from a cold disk here.
timeout --kill-after=1 50 "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$logs/gpu.log"
case $? in
    0) ;;
    124 | 137) echo "gpu_suite: torch has found no GPU in 50 s; nothing was run."; exit 3 ;;
    *) echo "gpu_suite: no GPU that torch can use; nothing was run.$(tail -n 1 "$logs/gpu.log" | sed 's/^/ /')"; exit 3 ;;
esac

failed=0

# part NAME SECONDS ARGUMENTS...: pytest under a limit, if the part was asked for. Prints the failed tests and the last
# lines; a killed part has no summary, so the names come from its -v output.
part() {
    local name=$1 seconds=$2 code
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    echo "== $name (at most $seconds s)"
    timeout --signal=INT --kill-after=10 "$seconds" "$PYTHON" -m pytest -p no:cacheprovider -v "$@" >"$logs/$name.log" 2>&1
    code=$?
    grep -E '^(FAILED|ERROR) |^E  |^!!!' "$logs/$name.log" | cut -c 1-200 | head -n 20
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        grep -oE '(FAILED|ERROR) +tests/[^ ]+|^[^ ]+::[^ ]+ (FAILED|ERROR)' "$logs/$name.log" | head -n 20
        echo "$name ran out of its $seconds s"
    fi
    tail -n "${LINES_SHOWN:-1}" "$logs/$name.log" | cut -c 1-200
    if [ "$code" -ne 0 ]; then failed=1; fi
}

# Most of the tests' time goes into compiling kernels, which takes a core each.
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n "$(nproc)" --dist load); fi
tests=("${workers[@]}" tests/kernels/test_!(compiled).py tests/mtp_ce/{,*/}test_!(random_cases).py
    tests/mtp_ce/loss/test_random_cases.py)
# "cpu" is the parameter of the tests that run on the host, which this suite is not for.
part device "${DEVICE_SECONDS:=100}" "${tests[@]}" -k "(gpu or test_splits) and not cpu"
part tests "${TEST_SECONDS:=150}" "${tests[@]}" -k "not gpu and not test_splits and not cpu"
# With "=", or pytest takes the folder for one of tests, and looks for its settings above both.
LINES_SHOWN=60 part benchmarks "$((${BENCHMARK_SECONDS:=150} + 45))" benchmarks --benchmark-only --benchmark-quiet \
    --full --results="$results" --resume --time-limit "$BENCHMARK_SECONDS"
exit "$failed"
