#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under 9 minutes: the gpu-marked tests, then every benchmark.
#
#     benchmarks/gpu.sh [OUT]            results and logs go to OUT (default: runs/gpu)
#     WHEELS=folder benchmarks/gpu.sh    first installs the wheels of a folder into OUT/site, without a network
#
# It needs Python with torch. A step that fails or is too slow costs only itself; the table at the end names it.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-runs/gpu}" && cd "${1:-runs/gpu}" && pwd)
python=${PYTHON:-python3}
if [ -x .venv/bin/python ] && [ -z "${WHEELS:-}" ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
unset DS_ACCELERATOR
export PYTHONUNBUFFERED=1 DS_BUILD_OPS=0 TRITON_CACHE_DIR="$out/triton" PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl || exit 1
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here."; exit 1; }

names=() results=()
step() {  # step NAME SECONDS COMMAND...: runs it with a limit and keeps its output and exit code
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  echo "== $name"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  tail -n 25 "$out/$name.log"
  names+=("$name")
  results+=("$( ((status == 0)) && echo passed || echo "FAILED ($status)") in $((SECONDS - begin)) s")
}

"$python" -c 'import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory >> 30, "GiB, torch", torch.__version__)' | tee "$out/device.txt"
step tests 240 "$python" -m pytest -m gpu -q --durations=8
if [ -f benchmarks/kernels.py ]; then
  step kernels 200 "$python" benchmarks/kernels.py --json "$out/kernels.json"
fi

echo
failed=0
for i in "${!names[@]}"; do
  printf '%-12s %s\n' "${names[$i]}" "${results[$i]}"
  case ${results[$i]} in FAILED*) failed=1 ;; esac
done
exit $failed
