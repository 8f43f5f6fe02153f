# make demo · make test · make soak · make lint · make docs · make bench · make report · make sanitize
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test soak lint docs bench report sanitize clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.corpora.made_up demo --rows 400
	@echo "A varied corpus:"
	$(BIN)/gvendi score demo/varied.jsonl --proxy tiny --by family
	@echo "A narrow one, as many rows:"
	$(BIN)/gvendi score demo/narrow.jsonl --proxy tiny

test: $(VENV)/.installed
	@# A process for each of two cores, with one thread each: two that spin for the same core take many times as long.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Random attacks on real runs for MINUTES, behind the tests that take too long for every day; 'make soak SEED=7' draws
# others. A fault ends it with an error and keeps its folder.
MINUTES ?= 30
SEED ?= 0
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m soak
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/ as pages in build/docs; a broken link or a name that the reference lacks is an error. (Not --quiet: that keeps
# warnings from --strict too.)
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/docs/index.html"

# Ratios of runs in one process; nothing else should run on the machine meanwhile.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed

# The tables of docs/results.md and the README, from benchmarks/results.
report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.report

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with odd sizes.
sanitize:
	cmake -S . -B build/sanitize -DGVENDI_PYTHON=OFF -DGVENDI_SANITIZE=ON
	cmake --build build/sanitize
	build/sanitize/sanitize

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with 'make PYTHON=python3.12 ...'"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
# PyTorch for CUDA brings the Triton that fits it; next to its CPU build, tests use this one.
	@test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) build demo gvendi_fast/_cpu*.so
