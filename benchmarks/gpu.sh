#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under 9 minutes: the gpu-marked tests, then every benchmark.
#
#     benchmarks/gpu.sh [OUT]            results and logs go to OUT (default: runs/gpu)
#     WHEELS=folder benchmarks/gpu.sh    first installs the wheels of a folder into OUT/site, without a network
#     WRITE=1 benchmarks/gpu.sh          also writes what was the fastest into megatron/ops/measured.json
#     DEEPY_TEST_DEVICE=cpu ...          runs without a GPU, to try the script itself
#
# It needs bash, coreutils and Python with torch. A step that fails or is too slow costs only itself; the table at the
# end names it, OUT/summary.json has it, and OUT/<step>.log its output. All of it ends within 535 seconds: each step has a
# limit, the tests come first, and what the last ones are left is what the others and the installation did not take.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
mkdir -p "${1:-runs/gpu}" || exit 1
out=$(cd "${1:-runs/gpu}" && pwd)
python=${PYTHON:-python3}
if [ -x .venv/bin/python ] && [ -z "${WHEELS:-}" ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
budget=535
if [ "${DEEPY_TEST_DEVICE:-cuda}" = cpu ]; then export DS_ACCELERATOR=cpu; else unset DS_ACCELERATOR; fi
export PYTHONUNBUFFERED=1 DS_BUILD_OPS=0 TRITON_CACHE_DIR="$out/triton" TORCHINDUCTOR_CACHE_DIR="$out/inductor"
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}"

names=() results=() seconds=()
step() {  # step NAME SECONDS COMMAND...: runs it with a limit and keeps its output and exit code
  local name=$1 limit=$2 begin=$SECONDS status left=$((budget - SECONDS))
  shift 2
  if ((limit > left)); then limit=$left; fi
  echo "== $name (at most $limit s)"
  if ((limit < 5)); then
    status=124
    echo "no time was left" > "$out/$name.log"
  else
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
  fi
  tail -n "${SHOWN:-15}" "$out/$name.log"
  names+=("$name")
  seconds+=("$((SECONDS - begin))")
  case $status in
    0) results+=("passed") ;;
    124) results+=("FAILED: stopped after $limit s") ;;
    137) results+=("FAILED: killed") ;;
    *) results+=("FAILED: exit code $status") ;;
  esac
}

summary() {  # writes OUT/summary.json
  local i
  {
    printf '{"device": "%s", "seconds": %d, "steps": [' "$(head -n 1 "$out/device.txt" 2>/dev/null | tr -d '\042\134')" "$SECONDS"
    for i in "${!names[@]}"; do
      ((i)) && printf ', '
      printf '{"step": "%s", "result": "%s", "seconds": %d}' "${names[$i]}" "${results[$i]}" "${seconds[$i]}"
    done
    printf ']}\n'
  } > "$out/summary.json"
}

if [ -n "${WHEELS:-}" ]; then
  step install 120 "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl
fi
if [ "${DEEPY_TEST_DEVICE:-cuda}" != cpu ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here."; exit 1; }
  "$python" -c 'import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory >> 30, "GiB, torch", torch.__version__)' | tee "$out/device.txt"
else
  echo "no GPU: DEEPY_TEST_DEVICE=cpu" | tee "$out/device.txt"
fi

step tests 150 "$python" -m pytest -m gpu -q --maxfail=20 --durations=8 -p no:cacheprovider --junitxml "$out/tests.xml"
kernels=(--limit 110 --json "$out/kernels.json")
if [ "${DEEPY_TEST_DEVICE:-cuda}" = cpu ]; then kernels+=(--quick); fi
if [ -n "${WRITE:-}" ]; then kernels+=(--write); fi
SHOWN=40 step kernels 140 "$python" benchmarks/kernels.py "${kernels[@]}"
attention=(--json "$out/attention.json")
if [ "${DEEPY_TEST_DEVICE:-cuda}" = cpu ]; then attention+=(--quick); fi
if [ -n "${WRITE:-}" ]; then attention+=(--write); fi
SHOWN=60 step attention 80 "$python" benchmarks/attention.py "${attention[@]}"
step train 120 "$python" benchmarks/train.py --quick --json "$out/train.json"
step fp8 30 "$python" benchmarks/fp8.py --quick --json "$out/fp8.json"
step startup 40 "$python" benchmarks/startup.py --quick --json "$out/startup.json"
step data 45 "$python" benchmarks/data.py --quick --json "$out/data.json"

summary
echo
cat "$out/device.txt"
failed=0
for i in "${!names[@]}"; do
  printf '%-9s %4d s  %s\n' "${names[$i]}" "${seconds[$i]}" "${results[$i]}"
  case ${results[$i]} in FAILED*) failed=1 ;; esac
done
echo "$SECONDS s in all; logs and results: $out"
exit $failed
