# `make test`, `make slow` and `make bench` set up all they need, in .venv, and are quick the second
# time. `make slow` is the rest of the tests: those that build, compile or interpret kernels for
# minutes, run the examples, and generate programs. `make test-frameworks` trains in Accelerate,
# Lightning and others (docs/frameworks.md), and installs them, about 1 GB; `make
# test-frameworks-largest` in the five largest alone, a quarter of it.
#
# TORCH is what to install where .venv has no torch yet, as pip takes it; for a CPU wheel alone,
# which is a tenth of the size, name its index: PIP_EXTRA_INDEX_URL=... make test

# Where there is an nvcc, the tests also build the extension against CUDA_TORCH, in an environment of
# its own: 2.7 GB to download, once. Its CUDA must be of nvcc's major version. To use another that
# is there already, set SHAMPOO_CUDA_TORCH_PYTHON to its interpreter.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
VENV ?= .venv
# Processes of the test run, each with up to four ranks of its own. Files stay whole: the tests of one
# share builds and runs. In alphabetical order, which ends with files of less than a minute.
WORKERS ?= 2

BIN := $(abspath $(VENV))/bin
CUDA := $(abspath $(VENV))/cuda
CLEAN := $(abspath $(VENV))/clean
FRAMEWORKS := $(abspath $(VENV))/frameworks
LARGEST := $(abspath $(VENV))/frameworks-largest
WHEELS := $(abspath $(VENV))/wheels
SOURCES := shampoo kernels tests benchmarks examples tools setup.py docs/conf.py

.PHONY: test slow test-frameworks test-frameworks-largest bench learning lint types pytest wheel sanitize soak docs clean

test: lint pytest types

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python examples/digits.py

# Trains every optimizer on every task, two runs at once; stopped, it goes on where it was.
learning: $(VENV)/installed
	$(BIN)/python -m benchmarks.data fashion-mnist king-james cpython
	$(BIN)/python -m benchmarks.learning

# The kernels under the sanitizers of addresses and undefined behaviour: the tests of the ops, and
# FUZZ generated programs. Needs gcc's runtimes of both.
FUZZ ?= 500
sanitize: $(VENV)/installed
	$(BIN)/python tools/sanitize.py --fuzz $(FUZZ) --workers $(WORKERS)

# Trains for STEPS steps while things go wrong, and compares the bits with those of a quiet run.
STEPS ?= 10000
soak: $(VENV)/installed
	$(BIN)/python tools/soak.py --steps $(STEPS)

# The documents as a site, in site/: begin at site/index.html.
docs: $(VENV)/documenting
	$(BIN)/sphinx-build -q -W --keep-going -c docs . site

lint: $(VENV)/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

ifndef SHAMPOO_CUDA_TORCH_PYTHON
ifneq ($(shell command -v nvcc),)
slow: $(CUDA)/installed
slow: export SHAMPOO_CUDA_TORCH_PYTHON := $(CUDA)/bin/python
endif
endif

slow: $(VENV)/documenting
pytest slow: $(VENV)/installed
	$(BIN)/pytest -q --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m $(if $(filter slow,$@),slow,"not slow and not frameworks")

# What docs/frameworks.md says, with the real packages, in an environment of their own. How it ended
# is left in docs/frameworks.json.
test-frameworks: $(FRAMEWORKS)/installed
	PYTHONPATH=$(CURDIR) $(FRAMEWORKS)/bin/python -m pytest -q --durations=10 \
	  --junitxml=$(FRAMEWORKS)/last.xml -m frameworks \
	  tests/frameworks tests/test_loggers.py tests/commands tests/test_coming_from.py; \
	  status=$$?; \
	  $(FRAMEWORKS)/bin/python tools/frameworks.py $(FRAMEWORKS)/last.xml docs/frameworks.json && \
	  exit $$status

test-frameworks-largest: $(LARGEST)/installed
	PYTHONPATH=$(CURDIR) $(LARGEST)/bin/python -m pytest -q --durations=5 -m frameworks \
	  $(patsubst %,tests/frameworks/test_%.py,accelerate transformers lightning torchtitan timm)

# Builds the wheel and uses it as a stranger would: in an environment of its own, from elsewhere.
# torch is lent to it by a path file, which does not make the development install visible.
wheel: $(VENV)/installed
	rm -rf build $(WHEELS) $(CLEAN)
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w $(WHEELS) .
	rm -rf build
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/pip install -q --no-deps --no-index $(WHEELS)/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(CLEAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
	mkdir -p $(CLEAN)/elsewhere
	cd $(CLEAN)/elsewhere && $(CLEAN)/bin/python -c "$$ONE_STEP"

# By the standard libraries of the oldest and the newest Python that pyproject.toml names.
types: wheel
	cd $(CLEAN)/elsewhere && \
	  for version in 3.10 3.14; do \
	    $(BIN)/mypy --strict --cache-dir=$(CLEAN)/mypy --python-executable=$(CLEAN)/bin/python \
	      --python-version $$version -p shampoo || exit 1; \
	  done

define ONE_STEP
import sys, torch, shampoo
assert shampoo.__file__.startswith(sys.prefix), shampoo.__file__
model = torch.nn.Linear(8, 4)
before = model.weight.detach().clone()
optimizer = shampoo.Shampoo(model.parameters(), lr=0.1)
model(torch.ones(2, 8)).square().sum().backward()
optimizer.step()
assert (model.weight != before).all()
print("the installed wheel takes a step:", shampoo.__file__)
endef
export ONE_STEP

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py
	$(BIN)/pip install -q -e ".[dev,bench]"
	touch $@

# All that .venv has, torch with it, is lent by a path file; PYTHONPATH brings the clone. DeepSpeed is
# built by the setuptools of .venv, which one that comes with a new environment would hide.
$(LARGEST)/installed: tests/frameworks/requirements-largest.txt
$(FRAMEWORKS)/installed: tests/frameworks/requirements.txt tests/frameworks/requirements-largest.txt
$(LARGEST)/installed $(FRAMEWORKS)/installed: | $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
	$(@D)/bin/pip uninstall -q -y setuptools
	DS_BUILD_OPS=0 $(@D)/bin/pip install -q --no-deps --no-build-isolation -r $<
	touch $@

$(VENV)/documenting: $(VENV)/installed
	$(BIN)/pip install -q -e ".[docs]"
	touch $@

$(CUDA)/installed: | $(VENV)/torch
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install --retries 10 "$(CUDA_TORCH)" ninja filelock setuptools
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
