#!/usr/bin/env bash
# Runs the tests that take too long for CI, about half an hour on two cores. Meant to run on a schedule.
#
#   scripts/hammer.sh                          # some 26,000 damaged inputs, 200 killed training runs
#   FUZZ_CASES=600 KILLS=20 scripts/hammer.sh  # a short one
#
# Killed runs are resumed and compared bit for bit with an uninterrupted run. Every run draws new
# cases. Prints the counts at the end; exits with 1 if anything failed. hammer.log, in the current
# folder or at $HAMMER_LOG, has the output.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" || exit 1
(set -e; setup_env requirements-dev.lock) || exit 1
log=$(realpath "${HAMMER_LOG:-hammer.log}") || exit 1
cd "$ROOT" || exit 1
export FUZZ_CASES=${FUZZ_CASES:-12000} KILLS=${KILLS:-200} KILL_SEED=${KILL_SEED:-$RANDOM}
: >"$log" || exit 1

# run_tests ARGUMENTS: prints pytest's last line; the log gets everything.
run_tests() {
  "$VENV/bin/python" -m pytest "$@" >"$log.part" 2>&1
  local code=$?
  cat "$log.part" >>"$log"
  tail -n 1 "$log.part"
  rm "$log.part"
  ((code == 0)) || failed=1
}

failed=0
echo "Killing training runs $KILLS times (KILL_SEED=$KILL_SEED)."
run_tests tests/resume_test.py -k TestKills -rP -n0
echo 'Several processes, killed and resumed; scaling measured over processes.'
HAMMER=1 run_tests -m hammer -n0
echo "Reading damaged inputs, FUZZ_CASES=$FUZZ_CASES."
run_tests tests/fuzz_test.py -n logical --maxprocesses=4 --dist=load --hypothesis-show-statistics

echo
grep -E '^[0-9]+ kills' "$log"
awk '/^ +- [0-9]+ passing/ { good += $2; bad += $4 }
     END { printf "%d damaged inputs handled, %d not\n", good, bad }' "$log"
((failed == 0)) || echo "FAILED: see $log"
exit $failed
