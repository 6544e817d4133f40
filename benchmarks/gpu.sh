#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under 9 minutes: the gpu-marked tests, then every benchmark.
#
#     benchmarks/gpu.sh [OUT [STEP...]]  results and logs go to OUT (default: runs/gpu). STEP: only these, with more time
#     WHEELS=folder benchmarks/gpu.sh    first installs the wheels of a folder into OUT/site, without a network
#     WRITE=1 benchmarks/gpu.sh          also writes what was the fastest into megatron/ops/measured.json
#     PACK=file.tar.gz benchmarks/gpu.sh keeps all results, logs and measured.json in one file too, as of the last step
#     BUDGET=seconds benchmarks/gpu.sh   another limit for all of it than 535 seconds
#     DEEPY_TEST_DEVICE=cpu ...          runs without a GPU, to try the script itself
#
# It needs bash, coreutils, tar and Python with torch. A step that fails or is too slow costs only itself; the table at the
# end names it, OUT/summary.json has it, and OUT/<step>.log its output. Both are written anew after each step, so that a
# run that is killed keeps what it has. Each step has a limit, the tests come first, and what the last ones are left is
# what the others and the installation did not take. Tests run side by side where pytest-xdist is installed; one that
# needs the GPU's memory for itself runs by itself. Nothing but the modules that have gpu tests is imported, so that a
# package that other tests need may be missing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
mkdir -p "${1:-runs/gpu}" || exit 1
out=$(cd "${1:-runs/gpu}" && pwd)
chosen=" ${*:2} "
python=${PYTHON:-python3}
if [ -x .venv/bin/python ] && [ -z "${WHEELS:-}" ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
budget=${BUDGET:-535}
device=${DEEPY_TEST_DEVICE:-cuda}
export DS_ACCELERATOR=$device PYTHONUNBUFFERED=1 DS_BUILD_OPS=0
export TRITON_CACHE_DIR="$out/triton" TORCHINDUCTOR_CACHE_DIR="$out/inductor"
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}"

names=() results=() seconds=()
step() {  # step NAME SECONDS COMMAND...: runs it with a limit and keeps its output and exit code
  local name=$1 limit=$2 begin=$SECONDS status left=$((budget - SECONDS))
  shift 2
  if [ "$chosen" != "  " ] && [ "$name" != install ]; then
    case $chosen in *" $name "*) limit=$((4 * limit)) ;; *) return ;; esac
  fi
  if ((limit > left)); then limit=$left; fi
  echo "== $name (at most $limit s)"
  if ((limit < 5)); then
    status=124
    echo "no time was left" > "$out/$name.log"
  else
    timeout --signal=INT --kill-after=8 "$limit" "$@" > "$out/$name.log" 2>&1
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
  summary
}

summary() {  # writes OUT/summary.json, and packs
  local i
  {
    printf '{"device": "%s", "seconds": %d, "steps": [' "$(head -n 1 "$out/device.txt" 2>/dev/null | tr -d '\042\134')" "$SECONDS"
    for i in "${!names[@]}"; do
      ((i)) && printf ', '
      printf '{"step": "%s", "result": "%s", "seconds": %d}' "${names[$i]}" "${results[$i]}" "${seconds[$i]}"
    done
    printf ']}\n'
  } > "$out/summary.json"
  if [ -n "${PACK:-}" ]; then
    cp megatron/ops/measured.json "$out/measured.json"
    (cd "$out" && tar -czf pack.part -- $(ls -- *.json *.log *.txt *.xml 2>/dev/null)) && mv "$out/pack.part" "$PACK"
  fi
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

if [ -n "${WHEELS:-}" ]; then
  step install 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/site" "$WHEELS"/*.whl
fi
if [ "$device" != cpu ]; then
  "$python" -c '
import platform, sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here.")
p = torch.cuda.get_device_properties(0)
print(p.name, p.total_memory >> 30, "GiB, torch", torch.__version__, "triton", triton.__version__, "Python", platform.python_version())
' | tee "$out/device.txt" || exit 1
  { nvidia-smi; command -v nvcc && nvcc --version; nproc; free -g; } >> "$out/device.txt" 2>&1
else
  echo "no GPU: DEEPY_TEST_DEVICE=cpu" | tee "$out/device.txt"
fi

mapfile -t modules < <({ grep -rl --include='test_*.py' 'mark\.gpu' tests; ls tests/ops/triton/test_*.py; } | sort -u)
pytest=("$python" -m pytest -v --tb=short --continue-on-collection-errors -p no:cacheprovider -o faulthandler_timeout=100)
beside=()
if has xdist; then beside=(-n "$(($(nproc) > 13 ? 12 : $(nproc)))" --dist worksteal); fi
step tests 165 "${pytest[@]}" -m 'gpu and not alone' "${beside[@]}" --maxfail=60 --durations=12 --junitxml "$out/tests.xml" "${modules[@]}"
mapfile -t modules < <(grep -rl --include='test_*.py' 'mark\.alone' tests)
step alone 40 "${pytest[@]}" -m 'gpu and alone' --junitxml "$out/alone.xml" "${modules[@]}"
kernels=(--limit 95 --json "$out/kernels.json")
if [ "$device" = cpu ]; then kernels+=(--quick); fi
if [ -n "${WRITE:-}" ]; then kernels+=(--write); fi
SHOWN=40 step kernels 120 "$python" benchmarks/kernels.py "${kernels[@]}"
attention=(--json "$out/attention.json")
if [ "$device" = cpu ]; then attention+=(--quick); fi
if [ -n "${WRITE:-}" ]; then attention+=(--write); fi
SHOWN=60 step attention 70 "$python" benchmarks/attention.py "${attention[@]}"
step fp8 30 "$python" benchmarks/fp8.py --quick --json "$out/fp8.json"
SHOWN=30 step train 150 "$python" benchmarks/train.py --quick --json "$out/train.json"
step startup 40 "$python" benchmarks/startup.py --quick --json "$out/startup.json"
step data 45 "$python" benchmarks/data.py --quick --json "$out/data.json"

summary
echo
head -n 1 "$out/device.txt"
failed=0
for i in "${!names[@]}"; do
  printf '%-9s %4d s  %s\n' "${names[$i]}" "${seconds[$i]}" "${results[$i]}"
  case ${results[$i]} in FAILED*) failed=1 ;; esac
done
echo "$SECONDS s in all; logs and results: $out"
exit $failed
