# Tollgate. `make help` lists what can be done.
#
#   PYTHON=python3.12        the Python that builds the environments (any from 3.11 on)
#   TOLLGATE_PORT=8090       the gateway's port
#   TOLLGATE_STATE=/path     the state directory (default .tollgate); another one is another stack
#   TOLLGATE_MODEL_REPOSITORY=/path   the models (default triton_models), with a prices.toml of its own if it likes
#
# TOLLGATE_* are read from the environment too, and from a file .env (see .env.example).

PYTHON ?= python3
LOCAL := $(PYTHON) -m deploy.local
BIN := .venv/bin
CHECKED := $(wildcard services shared deploy tests bench)
UV_COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 \
	--no-annotate --no-header --no-emit-index-url

.DEFAULT_GOAL := help
.PHONY: help up down status logs reset test torture check lint format types lock stubs chat-mini model environments clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

up: ## Start everything and print a URL, a key and a first request
	@$(LOCAL) up

down: ## Stop everything; the data is kept
	@$(LOCAL) down

status: ## Show each program: state, restarts, memory, ports, health
	@$(LOCAL) status

logs: ## Show the logs: of one program with S=chat, with what comes with F=1
	@$(LOCAL) logs $(S) $(if $(F),--follow)

reset: ## Stop everything and remove the data, after asking (YES=1: without)
	@$(LOCAL) reset $(if $(YES),--yes)

environments: ## Make .venv with the development tools, .venv-triton and Unleash's packages
	@$(LOCAL) environments --dev

test: check ## Run every check and every test, on components of their own
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadscope

torture: environments ## Run the long tests: minutes to hours, where `make test` has the short forms
	$(BIN)/python -m pytest -m torture

check: environments ## Run the linters, types, import rules, stubs and migrations
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy --strict $(CHECKED)
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.checks.size $(CHECKED)
	$(BIN)/python -m deploy.checks.stubs
	$(BIN)/python -m deploy.checks.migrations

lint: ## Run ruff only
	$(BIN)/ruff check $(CHECKED)

types: ## Run mypy only
	$(BIN)/mypy --strict $(CHECKED)

format: ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

lock: ## Compile requirements/*.in and Unleash's package.json into locks with hashes
	$(UV_COMPILE) requirements/services.in -o requirements/services.txt
	$(UV_COMPILE) requirements/dev.in -c requirements/services.txt -o requirements/dev.txt
	$(UV_COMPILE) --no-deps requirements/triton.in -o requirements/triton.txt
	$(UV_COMPILE) requirements/clients.in -o requirements/clients.txt
	$(BIN)/python -m deploy.local.unleash install --package-lock-only --ignore-scripts

stubs: ## Generate the gRPC stubs from shared/rpc/*.proto
	$(BIN)/python -m deploy.checks.stubs --write

bench-serving: ## Two models: bare engine, its own HTTP server, Triton, the whole path (a stack of its own)
bench-ledger: ## The ledger's operations a second beside pgbench, CPU, cost by size (a PostgreSQL of its own)
bench-edge: ## The gateway's CPU a request and a chunk, latency, beside nginx and a bare relay (stores of its own)
bench-auth: ## Sign-in beside bare argon2, a flood of sign-ins, growth and migrations (PostgreSQL and Valkey of its own)
bench-leaving: ## From a client's hang-up to a free slot of the engine (a stack of its own)
bench-%: environments
	$(BIN)/python -m bench.$*

chat-mini: ## Train the demo model anew (an environment of its own, with torch; about half an hour)
	$(PYTHON) -m venv .venv-chat-mini
	.venv-chat-mini/bin/pip install --quiet -r requirements/chat-mini.in
	.venv-chat-mini/bin/python -m deploy.chat_mini build

model: environments ## Serve your own: FROM=<gguf | HF directory | hub id> NAME= [QUANT= KIND= CONTEXT= SLOTS=]
	@$(BIN)/python -m deploy.models --from "$(FROM)" --name "$(NAME)" $(if $(QUANT),--quant $(QUANT)) \
		$(if $(KIND),--kind $(KIND)) $(if $(CONTEXT),--context-tokens $(CONTEXT)) $(if $(SLOTS),--slots $(SLOTS))

clean: ## Remove the environments and caches; the data stays
	rm -rf .venv .venv-triton .venv-chat-mini .venv-models .venv-clients deploy/unleash/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
