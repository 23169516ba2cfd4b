#!/usr/bin/env bash
# Everything that needs a GPU, in one go: bench/gpu_check.sh [FOLDER FOR RESULTS]
#
# On a machine with PyTorch and Triton and no package index: modules are seen through a view of links. Without a GPU it is
# a dry run in Triton's interpreter. Lines come as they are measured; a run that is cut off has told what it knows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-build/gpu}"
mkdir -p "$out" build/view/millrace
for root in kernels bench; do ln -sfn "$PWD/$root" "build/view/millrace/$root"; done
export PYTHONPATH="$PWD/build/view" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  "$python" -m millrace.bench.gpu --seconds "${SECONDS_IN_ALL:-480}" --json "$out/gpu.json" 2>&1 | tee "$out/gpu.txt"
else
  echo "no GPU: a dry run, nothing is measured"
  TRITON_INTERPRET=1 "$python" -m millrace.bench.gpu --dry-run --json "$out/gpu.json" 2>&1 | tee "$out/gpu.txt"
fi
