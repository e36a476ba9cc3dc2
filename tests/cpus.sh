#!/usr/bin/env bash
# Runs tests under settings in which PyTorch, oneDNN and MKL compute as other processors do: make test-cpus.
# usage: tests/cpus.sh "SETTING ..." PYTEST-ARGUMENT ...
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
settings=$1
shift

failed=""
for setting in $settings; do
  variables=(OMP_NUM_THREADS=1)
  options=()
  case $setting in
    native) ;;
    avx2) variables+=(ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2) ;;
    sse4) variables+=(ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2) ;;
    threads) variables=(OMP_NUM_THREADS=2) ;;
    # Other last bits in every inexact matrix product: see tests/rounding.py.
    perturbed-*) options=(--perturb-products="${setting#perturbed-}") ;;
    *)
      echo "a setting is native, avx2, sse4, threads or perturbed-SEED, got $setting" >&2
      exit 2
      ;;
  esac
  echo "$setting: ${variables[*]} ${options[*]}"
  env "${variables[@]}" "$python" -m pytest -q "${options[@]}" "$@" || failed+=" $setting"
done
if [ -n "$failed" ]; then
  echo "Failed under:$failed" >&2
  exit 1
fi
