# Every target makes its own environment (.venv) on first use; `make demo` is the place to start.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
CLIENTS := .venv-clients
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check format bench bench-peers bench-clients gpu clean

help:
	@echo "make demo    train a classifier of handwritten digits (under a minute)"
	@echo "make test    run the tests"
	@echo "make check   lint, format, types, import floors, and the bars of the design"
	@echo "make format  let ruff rewrite what make check would complain about"
	@echo "make bench   compare with a hand-written loop, and with the peers of make bench-peers"
	@echo "make bench-peers  make an environment, .venv-peers, with Lightning, Accelerate and others beside Leyden"
	@echo "make bench-clients  train published libraries on Lightning and on Leyden, and compare the numbers"
	@echo "make gpu     tests and benchmarks that need a GPU, with the python3 that is there; installs nothing"
	@echo "make clean   remove the environment, caches and logs"

# torch first and alone, pinned: an open range would fetch the newest build with its CUDA packages
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev]'
# without what it asks for, which would fetch another build of torch, and in a folder of its own: torchmetrics imports
# it where it finds it, which fails beside a torch of another build. One test uses its MNIST
	$(PIP) --no-deps --target $(VENV)/beside "$$(grep '^torchvision==' constraints.txt)"
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/digits.py

# what is one process runs two at a time; what starts ranks, a cluster or a browser has the machine to itself
ALONE := tests/distributed tests/slurm tests/browser tests/search

test: $(READY)
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(ALONE)) || status=1; \
	$(BIN)/python -m pytest $(ALONE) || status=1; \
	exit $$status

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/bars.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# in the environment with the peers where `make bench-peers` has made one; BENCH="--quick" takes a few minutes
bench: $(READY)
	$(if $(wildcard $(PEERS)/.ready),$(PEERS),$(VENV))/bin/python benchmarks/bench.py $(BENCH)
	$(BIN)/python benchmarks/checkpoint.py

bench-peers: $(PEERS)/.ready

$(PEERS)/.ready: pyproject.toml benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[examples]' -r benchmarks/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps fastai==2.8.12
	@touch $@

# two environments: the libraries of the first need another numpy than those of the second
bench-clients: $(CLIENTS)-a/.ready $(CLIENTS)-b/.ready
	@status=0; for set in a b; do \
	$(CLIENTS)-$$set/bin/python benchmarks/clients/run.py $$(sed -n 's/^# scripts: //p' benchmarks/clients/requirements-$$set.txt) || status=1; \
	done; exit $$status

$(CLIENTS)-%/.ready: benchmarks/clients/requirements-%.txt constraints.txt
	$(PYTHON) -m venv $(CLIENTS)-$*
	$(CLIENTS)-$*/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(CLIENTS)-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

gpu:
	@if ! $(PYTHON) -c "import torch" 2>/dev/null; then \
		echo "make gpu: $(PYTHON) has no torch, so nothing was run."; \
	elif ! $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		echo "make gpu: torch sees no CUDA GPU here, so nothing was run."; \
	else \
		PYTHONPATH=src $(PYTHON) -m pytest tests/gpu && \
		PYTHONPATH=src $(PYTHON) benchmarks/gpu/bench.py --write benchmarks/gpu/RESULTS.md; \
	fi

clean:
	rm -rf $(VENV) $(PEERS) $(CLIENTS)-a $(CLIENTS)-b build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis leyden_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
