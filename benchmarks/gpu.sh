#!/usr/bin/env bash
# Everything worth knowing about a CUDA machine, in nine minutes and without network: build, GPU tests, tuned configurations, the
# benchmark suite and the models. Each phase has its own limit, a failing one does not stop the next, and a summary comes last.
#
#   OUT=folder     where the results go (default benchmarks/results)
#   PYTHON=python  the interpreter that has torch and triton (default python3)
#   LIMIT=seconds  for everything together (default 530)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD

machine=$("$PYTHON" -c '
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch.cuda.is_available() is False")
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || exit 2

rows=()
failures=0

phase() { # phase NAME SECONDS COMMAND...: run it for at most SECONDS, or what is left of LIMIT; SIGINT first, so it can save its results
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) started=$SECONDS status outcome
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        rows+=("$(printf '%-8s %-12s' "$name" "no time left")")
        ((failures++))
        return
    fi
    printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*"
    timeout --signal=INT --kill-after=10 "$limit" "$@"
    status=$?
    case $status in
        0) outcome=ok ;;
        124 | 137) outcome="out of time" ;;
        *) outcome="exit $status" ;;
    esac
    ((status == 0)) || ((failures++))
    rows+=("$(printf '%-8s %-12s %4s s' "$name" "$outcome" $((SECONDS - started)))")
}

run() {
    "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())'
    nvidia-smi --query-gpu=name,driver_version,memory.used,utilization.gpu,clocks.sm --format=csv 2>/dev/null

    phase build 120 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
    phase tests 150 "$PYTHON" -m pytest tests -m gpu -q --maxfail=20 -p no:cacheprovider --junit-xml="$OUT/$machine-tests.xml"
    phase tune 90 "$PYTHON" -m dlkernels.cli tune --seconds 75 --json "$OUT/$machine-tuned.json"
    phase bench 130 "$PYTHON" -m dlkernels.cli bench --device cuda --json "$OUT/$machine.json"
    phase models 60 "$PYTHON" -m dlkernels.cli train mlp --device cuda --nn both --json "$OUT/$machine-models.json"

    printf '\n== %s, %s s\n' "$machine" "$SECONDS"
    printf '%s\n' "${rows[@]}"
    if [ -s "$OUT/$machine.json" ]; then "$PYTHON" benchmarks/summary.py "$OUT/$machine.json"; fi
    ((failures == 0))
}

run 2>&1 | tee "$OUT/$machine.log"
exit "${PIPESTATUS[0]}"
