#!/usr/bin/env bash
# What needs a GPU, in one go and within 9 minutes: tests, benchmarks, a training step. No installation: torch, triton,
# pytest, hypothesis and pytest-benchmark are enough, the package is imported from this tree; with pytest-xdist the tests
# take every core. The peers (liger-kernel, cut-cross-entropy, quack-kernels) are found on PYTHONPATH, too, after this
# tree. The training step needs transformers, and says so where it is missing.
#
#     bash benchmarks/gpu_suite.sh [part ...]      without a part: all but the sweep
#
# Parts, which run in this order:
#     device       the tests that only a GPU can run, and those of rows that several programs share
#     tests        the other tests of kernels and losses, random cases last
#     benchmarks   pytest benchmarks: writes RESULTS/<device>.json, and goes on where the last call was cut off
#     step         python -m benchmarks.training_step: likewise
#     sweep        python -m benchmarks.sweep: writes RESULTS/tiles/<device>.json
#
# Environment:
#     PYTHON               the interpreter; default .venv/bin/python where there is one, else python3
#     RESULTS              the folder of the results; default benchmarks/results
#     LOGS                 a folder that keeps <part>.log, the whole output of each part, and table.log; default: none
#     DEVICE_SECONDS       limit of the part device (80)
#     TEST_SECONDS         limit of the part tests (150)
#     BENCHMARK_SECONDS    no case is started after this time (80); one in flight has 45 s to end
#     STEP_SECONDS         the training step looks for no larger micro-batch after this time (30), and has 20 s to end
#     SWEEP_SECONDS        limit of the sweep (500)
#     MTP_CE_COMMIT        the commit to record where this tree is a copy without git
#
# A part that is at its limit is interrupted and has 10 s to say what it found. Results are written case by case.
#
# Exit code: 0 all passed, 1 a test or a case failed or ran out of time, 2 no such part, 3 no GPU (or no torch to look for
# one).
set -u
shopt -s extglob

known=(device tests benchmarks step sweep)
parts=" ${*:-device tests benchmarks step} "
for part in $parts; do
    if [[ " ${known[*]} " != *" $part "* ]]; then
        echo "gpu_suite: no part \"$part\"; expected ${known[*]}." >&2
        exit 2
    fi
done

# Where the caller stands.
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

# Torch is imported from a cold disk here. What is printed is the name of this device's results file.
look='import sys, torch
if not torch.cuda.is_available():
    sys.exit(1)
from benchmarks.results import results_path
print(results_path("cuda").name)'
file=$results/$(timeout --kill-after=1 50 "$PYTHON" -c "$look" 2>"$logs/gpu.log")
case $? in
    0) ;;
    124 | 137) echo "gpu_suite: torch has found no GPU in 50 s; nothing was run."; exit 3 ;;
    *) echo "gpu_suite: no GPU that torch can use; nothing was run.$(tail -n 1 "$logs/gpu.log" | sed 's/^/ /')"; exit 3 ;;
esac

failed=0
# Characters that are left for what failed: whoever reads this may see no more than the last 10,000.
room=4000

# failures LOG: the tests that failed, a line for all cases of one, then what they said. Without the summary of a part
# that was killed, the names are those that it gave as it went.
failures() {
    local names
    names=$(grep -E '^(FAILED|ERROR) ' "$1" | sed -E 's/ - .*//')
    [ -n "$names" ] || names=$(grep -oE '(FAILED|ERROR) +tests/[^ ]+|^[^ ]+::[^ ]+ (FAILED|ERROR)' "$1")
    if [ -n "$names" ]; then
        awk '{ test = $0; sub(/\[.*/, "", test); if (!cases[test]++) { first[++tests] = test; line[test] = $0 } }
            END { for (i = 1; i <= tests; i++) { n = cases[first[i]] - 1; more = n ? " and " n " more of it" : ""
                print substr(line[first[i]], 1, 140) more } }' <<<"$names" | head -n 12
        echo "failed: $(wc -l <<<"$names")"
    fi
    grep -E '^(E |!!!)' "$1" | cut -c 1-200 | head -n 10
}

# part NAME SECONDS ARGUMENTS...: python under a limit, where the part is asked for; what failed, and its last line.
part() {
    local name=$1 seconds=$2 code text
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    echo "== $name (at most $seconds s)"
    timeout --signal=INT --kill-after=10 "$seconds" "$PYTHON" "$@" >"$logs/$name.log" 2>&1
    code=$?
    text=$(failures "$logs/$name.log" | head -c "$((room < 2400 ? room : 2400))")
    room=$((room - ${#text}))
    [ -z "$text" ] || echo "$text"
    tail -n 1 "$logs/$name.log" | cut -c 1-200
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "$name ran out of its $seconds s"; fi
    if [ "$code" -ne 0 ]; then failed=1; fi
}

# Each test is named as it runs, for the log of a part that is killed.
pytest=(-m pytest -p no:cacheprovider -v)
# Most of the tests' time goes into compiling kernels, which takes a core each. Dealt in their order.
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n "$(nproc)" --dist load); fi
tests=("${pytest[@]}" "${workers[@]}" tests/kernels/test_!(compiled).py tests/mtp_ce/test_!(random_cases).py
    tests/mtp_ce/test_random_cases.py)
# By file, name and marker. "cpu" is the parameter of the tests that run on the host, which is not what this suite is
# for; nor are the kernels that are compiled for other devices.
part device "${DEVICE_SECONDS:=80}" "${tests[@]}" -k "(gpu or test_splits) and not cpu"
part tests "${TEST_SECONDS:=150}" "${tests[@]}" -k "not gpu and not test_splits and not cpu"
# With "=", or pytest takes the folder for one of tests, and looks for its settings above both.
part benchmarks "$((${BENCHMARK_SECONDS:=80} + 45))" "${pytest[@]}" benchmarks --benchmark-only --benchmark-quiet \
    --results="$results" --resume --time-limit "$BENCHMARK_SECONDS"
part step "$((${STEP_SECONDS:=30} + 20))" -m benchmarks.training_step --results "$results" --resume \
    --time-limit "$STEP_SECONDS"
part sweep "${SWEEP_SECONDS:=500}" -m benchmarks.sweep --results "$results"

if [[ $parts == *" benchmarks "* || $parts == *" step "* ]]; then
    echo "== targets"
    timeout 15 "$PYTHON" -m benchmarks.targets "$file" 2>&1 | cut -c 1-200 | head -c 4300
    timeout 15 "$PYTHON" -m benchmarks.table "$file" >"$logs/table.log" 2>&1
fi
exit "$failed"
