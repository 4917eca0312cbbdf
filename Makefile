# Needs only make and python3 >= 3.11 with venv: every target installs what it lacks into .venv first.
PYTHON ?= python3
# Two workers with one torch thread each; for one test alone: make test PYTEST_ARGS="tests/test_crop_tool.py -x"
PYTEST_ARGS ?= -n 2 --dist loadfile
TEST_THREADS ?= 1

VENV_PYTHON := .venv/bin/python
# A stamp is written only after a complete install, so an interrupted one is done again.
RUN_STAMP := .venv/.installed-requirements
DEV_STAMP := .venv/.installed-requirements-dev
# A .venv whose Python is gone or another version now has lost its packages: forget that it was complete.
$(shell $(VENV_PYTHON) -c "import pip" 2>/dev/null || rm -f $(RUN_STAMP) $(DEV_STAMP))
PYTEST := OMP_NUM_THREADS=$(TEST_THREADS) $(VENV_PYTHON) -m pytest

.PHONY: help demo demo-full test test-all lint clean distclean .venv

help:
	@echo "make demo       train a tiny Qwen2.5-VL in both stages and show that it looks"
	@echo "make demo-full  the same for longer, up to an hour"
	@echo "make test       the tests that CI runs; PYTEST_ARGS is passed on to pytest"
	@echo "make test-all   the slow tests as well"
	@echo "make lint       ruff: rules and format"
	@echo "make .venv      install what training and inference need"
	@echo "make clean      remove outputs/demo and caches; make distclean removes .venv too"

demo: $(RUN_STAMP)
	$(VENV_PYTHON) demo.py

demo-full: $(RUN_STAMP)
	$(VENV_PYTHON) demo.py --full

test: $(DEV_STAMP)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(DEV_STAMP)
	$(PYTEST) $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

clean:
	rm -rf outputs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

.venv: $(RUN_STAMP)

$(RUN_STAMP): requirements.txt
	$(install)

$(DEV_STAMP): requirements-dev.txt $(RUN_STAMP)
	$(install)

# Without pip there is no environment, or it was interrupted while it was made: make it anew.
define install
@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || { $(create); }
@echo "Installing $< into .venv (the first time: about 6 GB, a few minutes)"
@rm -f $@
@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r $<
@touch $@
endef

create = $(check_python) && echo "Creating .venv with $(PYTHON)" && $(PYTHON) -m venv --clear .venv

check_python = \
	command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) was not found: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is `$(PYTHON) --version`, but 3.11 or newer is needed: make PYTHON=python3.11" >&2; \
		exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) lacks its venv module: install it (on Debian and Ubuntu: python3-venv)" >&2; \
		exit 1; }
