#!/bin/sh
# compute-sanitizer over the GPU tests' small cases: memcheck (out of bounds, misaligned, errors of the API) and racecheck (shared memory). Every CUDA op is
# launched; what takes gigabytes is left out (LCTX_TEST_SMALL). The tests are shared out over several processes per tool, all on one card. cuBLASLt is not used:
# its kernels are not ours to check (racecheck reports some of them), and so every product runs on ours.
#   ./sanitize [FILTER]     SANITIZE_TOOLS="memcheck racecheck" SANITIZE_SHARDS=8 SANITIZE_LOGS=folder; needs the CUDA toolkit's compute-sanitizer
# Exit code 0: all tests passed and no tool had anything to say.
here=$(cd "$(dirname "$0")" && pwd)
command -v compute-sanitizer > /dev/null || { echo 'compute-sanitizer not found: it comes with the CUDA toolkit' >&2; exit 2; }
tools=${SANITIZE_TOOLS:-memcheck racecheck}
shards=${SANITIZE_SHARDS:-8}
logs=${SANITIZE_LOGS:-$(mktemp -d)}
mkdir -p "$logs"
"$here/run" --help > /dev/null # unpacks node once, before several processes would
for tool in $tools; do
  for i in $(seq "$shards"); do
    (
      LCTX_CUBLASLT=off LCTX_TEST_SMALL=1 LCTX_TEST_SHARD=$i/$shards compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
        "$here/run" test "$@" > "$logs/$tool.$i.log" 2>&1
      echo $? > "$logs/$tool.$i.rc"
    ) &
  done
done
wait
code=0
for tool in $tools; do
  for i in $(seq "$shards"); do
    log=$logs/$tool.$i.log
    rc=$(cat "$logs/$tool.$i.rc")
    echo "$tool $i/$shards: exit code $rc; $(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -1); $(grep -E '(ERROR|RACECHECK) SUMMARY' "$log" | tail -1)"
    [ "$rc" = 0 ] && continue
    code=1
    grep -E '^FAIL|^========= (Invalid|Error|Warning|Race|Program hit)|^=========     (at|by|Address)' "$log" | head -40
  done
done
echo "logs: $logs"
exit $code
