#!/usr/bin/env bash
# Builds, tests and measures the CUDA engine on a machine with a GPU. Needs no network; writes all it
# finds into one folder, first what machine it is.
#
#   OUT=results bash bench/gpu.sh
#   PARTS="build tests" bash bench/gpu.sh
#
# OUT           the folder (gpu-results)
# PARTS         which, in this order: all of those below
# PYTHON        the interpreter, with torch and pytest (python3)
# L2L_DATA_DIR  real images for the runs; without it the stand-in is drawn
#
# Each part has a log of its own and a limit on its time. One that fails stops no other, is listed at
# the end, and makes the exit code 1. Without a GPU the exit code is 2.
set -uo pipefail

ALL="build tests memcheck racecheck operators robust kernels counters mnist cifar10"
declare -A LIMITS=([build]=240 [tests]=120 [memcheck]=60 [racecheck]=60 [operators]=180 [robust]=60
  [kernels]=40 [counters]=60 [mnist]=40 [cifar10]=190) # seconds; then ten more to stop

export PARTS=${PARTS:-$ALL} PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu-results} PYTHONUNBUFFERED=1

give_up() {
  echo "gpu.sh: $1" >&2
  exit 2
}

for part in $PARTS; do
  [[ " $ALL " == *" $part "* ]] || give_up "PARTS has '$part': choose among $ALL"
done
"$PYTHON" -c "import torch" 2>/dev/null || give_up "$PYTHON has no torch: name another, PYTHON=..."
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null ||
  give_up "$PYTHON's torch sees no GPU here: run it on a machine that has one"

mkdir -p "$OUT" || give_up "OUT=$OUT cannot be made: name a folder you may write to"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
for tools in {"${CUDA_HOME:-}",/usr/local/cuda,/usr/local/cuda-*}/{bin,compute-sanitizer} \
  /opt/nvidia/nsight-compute/*; do # where they may be
  [ ! -d "$tools" ] || PATH+=":$tools"
done

machine() {
  date -u +"%Y-%m-%dT%H:%M:%SZ"
  git describe --always --abbrev=40 --exclude='*' --dirty || echo "not a checkout"
  echo "$(uname -srm), $(nproc) cores"
  "$PYTHON" -m torch.utils.collect_env
  for tool in nvcc g++ ncu compute-sanitizer cuobjdump; do
    echo "$tool: $(command -v "$tool" || echo none)"
  done
  nvidia-smi
}

build() { # setup.py says why it built nothing, and succeeds: so ask for the engine afterwards
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c \
    "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")
  export TORCH_CUDA_ARCH_LIST USE_CUDA=1 L2L_VERBOSE=1
  "$PYTHON" setup.py build_ext --inplace --force
  "$PYTHON" -c "from l2l_ref.backend import build_info, resolve
print(resolve('fused', 'cuda'), 'on cuda:', build_info())"
}

tests() {
  local workers=()
  if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n auto); fi
  "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" \
    -k "(cuda or gpu) and not emulated and not test_a_run" \
    --ignore tests/backend/test_build.py tests/backend tests/bench/test_bench*.py
}

sanitize() { # our kernels alone; without PyTorch's pool each tensor's end is known
  command -v compute-sanitizer || return 77
  local options=(--tool "$1" --error-exitcode 1)
  [[ $(compute-sanitizer --help) != *--kernel-name* ]] || options+=(--kernel-name kns=l2l)
  [ "$1" != memcheck ] || options+=(--report-api-errors no) # torch's start-up makes harmless ones
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer "${options[@]}" "$PYTHON" -m bench.kernels --every-form
  compute-sanitizer "${options[@]}" \
    "$PYTHON" -m bench.kernels --every-form --operators step --tensor-cores
}

memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

operators() { "$PYTHON" -m bench.operators --device cuda --seconds 2 --out "$OUT"; }

robust() {
  "$PYTHON" -m bench.operators --device cuda --seconds 2 --sizes 1e4 1e6 1e7 --odd --theta-input \
    --no-compile --no-memory --out "$OUT/robust"
}

kernels() {
  "$PYTHON" -m bench.kernels --sizes 1e4 1e6 --times
  "$PYTHON" -m bench.kernels --sizes 1e6 --operators step --tensor-cores --times
  "$PYTHON" -m bench.kernels --sizes 1e6 --operators differentiable_step --times
  if command -v cuobjdump; then cuobjdump -res-usage l2l_ref/backend/_C_cuda*.so 2>&1; fi
}

counters() { # the clocks stay as they are; the log says where a program may not read the counters
  command -v ncu || return 77
  local sections=(SpeedOfLight Occupancy WarpStateStats MemoryWorkloadAnalysis LaunchStats)
  ncu --clock-control none --profile-from-start off "${sections[@]/#/--section=}" \
    "$PYTHON" -m bench.kernels --sizes 1e6
}

experiment() { # NAME OPTION...: run.py, into a new folder
  local out
  out=$OUT/$1-$(date +%Y%m%d-%H%M%S)
  time "$PYTHON" run.py "${@:2}" --out "$out" ${L2L_DATA_DIR:+--data-dir "$L2L_DATA_DIR"}
}

mnist() { experiment mnist; }
cifar10() { experiment cifar10 --dataset cifar10 --attack pgd --eps 0.03; }

export -f machine build tests sanitize memcheck racecheck operators robust kernels counters \
  experiment mnist cifar10

timeout 60 bash -c machine >"$OUT/machine.txt" 2>&1
echo "$OUT: machine.txt, and a log of each part"
: >"$OUT/parts.txt"
failed=()
for part in $PARTS; do
  begin=$SECONDS
  timeout --signal=INT --kill-after=10 "${LIMITS[$part]}" env --default-signal=INT \
    bash -euo pipefail -c "$part" >"$OUT/$part.log" 2>&1
  case $? in
    0) state="done" ;;
    77) state="left out: there is no such tool" ;;
    124 | 137) state="stopped after ${LIMITS[$part]} s" && failed+=("$part") ;;
    *) state="failed with exit code $?" && failed+=("$part") ;;
  esac
  printf '%-10s %4d s  %s\n' "$part" $((SECONDS - begin)) "$state" | tee -a "$OUT/parts.txt"
done
if ((${#failed[@]})); then
  echo "not done: ${failed[*]}; see their logs in $OUT" | tee -a "$OUT/parts.txt"
  exit 1
fi
