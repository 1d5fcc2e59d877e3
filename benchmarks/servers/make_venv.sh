#!/bin/sh
# An environment of its own for vLLM's CPU build: sh benchmarks/servers/make_venv.sh FOLDER
# Python 3.11, Linux on x86-64, 3 GB. Every file is pinned by its hash. What is left out on purpose (torchvision,
# torchaudio, torchcodec) has no build without CUDA there, and vLLM does not start where it finds one with it.
set -eu
here=$(dirname "$0")
"${PYTHON:-python3.11}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --no-deps --require-hashes --requirement "$here/vllm.txt"
"$1/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
echo "export PREFOPT_VLLM_PYTHON=$(cd "$1" && pwd)/bin/python"
