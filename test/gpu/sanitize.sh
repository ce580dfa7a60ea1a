#!/bin/sh
# compute-sanitizer over the GPU tests' small cases, one process per tool at a time on one card: memcheck (out of bounds, misaligned, leaks of errors) and
# racecheck (shared memory). Every CUDA op is launched; what takes gigabytes is left out (LCTX_TEST_SMALL).
#   ./sanitize [FILTER]            needs the CUDA toolkit's compute-sanitizer; SANITIZE_TOOLS and SANITIZE_LOGS choose the tools and where logs go
# Exit code 0: all tests passed and no tool had anything to say.
here=$(cd "$(dirname "$0")" && pwd)
command -v compute-sanitizer > /dev/null || { echo 'compute-sanitizer not found: it comes with the CUDA toolkit' >&2; exit 2; }
logs=${SANITIZE_LOGS:-$(mktemp -d)}
mkdir -p "$logs"
"$here/run" > /dev/null 2>&1 # unpacks node once, before two processes would
for tool in ${SANITIZE_TOOLS:-memcheck racecheck}; do
  (
    LCTX_TEST_SMALL=1 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 "$here/run" test "$@" > "$logs/$tool.log" 2>&1
    echo $? > "$logs/$tool.rc"
  ) &
done
wait
code=0
for tool in ${SANITIZE_TOOLS:-memcheck racecheck}; do
  rc=$(cat "$logs/$tool.rc")
  echo "$tool: exit code $rc; $(grep -E '[0-9]+ passed, [0-9]+ failed' "$logs/$tool.log" | tail -1); $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$tool.log" | tail -1)"
  if [ "$rc" != 0 ]; then
    code=1
    grep -E '^FAIL|^========= (Invalid|Error|Warning|Race|Program hit)|^=========     (at|by|Address)' "$logs/$tool.log" | head -40
  fi
done
echo "logs: $logs"
exit $code
