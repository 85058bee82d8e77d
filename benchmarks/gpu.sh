#!/usr/bin/env bash
# All that a GPU has to show, in under 9 minutes of an H100: correctness, speed, memory; see gpu.py. Needs no network.
# Where the machine has several, the last parts share the evaluation and a model in shards among all of them.
#
#     benchmarks/gpu.sh --dataset_path personachat.json.xz --tokenizer openai-gpt     # a GPU
#     benchmarks/gpu.sh --dry-run                                                     # all of it on a CPU, tiny sizes
#
# It takes the torch (2.11 or newer) and the transformers (5.17 or newer) that it finds. The rest of requirements.txt
# may come as wheels, next to the code:
#     here:   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels pytorch-ignite tensorboardX ...
#     there:  pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site
# A tokenizer is a folder with vocab.json, merges.txt and a config.json of {"model_type": "openai-gpt", ...}.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -u benchmarks/gpu.py "$@"
