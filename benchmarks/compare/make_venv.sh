#!/bin/sh
# The peer's own environment: sh benchmarks/compare/make_venv.sh FOLDER
set -eu
python3 -m venv "$1"
"$1/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
