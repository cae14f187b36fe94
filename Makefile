# make demo    the bundled bag through the node, over DDS: out/demo/
# make test    every test, in an environment of its own
# make weights a training recipe, CONFIG: out/recipes/NAME
# make docs    the documentation as a site: out/site/
# make lint    ruff
# make clean   remove what these made
#
# PYTHON picks the interpreter (3.10 to 3.13). Where ROS 2 is installed and sourced it is used; elsewhere its wheels are.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
DEMO_BAG ?= test/data/city
DEMO_OUT ?= out/demo
# In-between frames need flow both ways: for that in real time on two cores it takes the fast model.
DEMO_MODEL ?= qpwc_fast
DEMO_OPTIONS ?=
TEST_OPTIONS ?=
# How many tests run side by side, of those that may.
TEST_JOBS ?= 2
CONFIG ?= config/recipes/qpwc_fast.yaml

# ROS 2 counts as sourced when ROS_DISTRO is set and rclpy can be imported. Its messages are compiled against
# one major version of numpy, and that is the one to stay with.
SYSTEM_ROS := $(shell [ -n "$${ROS_DISTRO:-}" ] && $(PYTHON) -c 'import rclpy' 2>/dev/null && echo yes)
ifeq ($(SYSTEM_ROS),yes)
  NUMPY := $(shell $(PYTHON) -c 'import numpy; print(numpy.__version__.split(".")[0])' 2>/dev/null)
  VENV_OPTIONS := --system-site-packages
  ifeq ($(NUMPY),1)
    DEMO_REQUIREMENTS := build system-ros
    TEST_REQUIREMENTS := build system-ros system-ros-test
  else
    DEMO_REQUIREMENTS := build runtime replay
    TEST_REQUIREMENTS := build runtime replay train test docs
  endif
  ENV :=
else
  VENV_OPTIONS :=
  DEMO_REQUIREMENTS := build runtime ros replay
  TEST_REQUIREMENTS := build runtime ros replay train test docs
  # The wheels set up LD_LIBRARY_PATH for one environment and mark that as done; here it is another one's turn.
  ENV := env -u PYTHONPATH -u PYTHONHOME -u AMENT_PREFIX_PATH -u _ROS_WHEELS_BOOTSTRAP_COMPLETE \
    $(if $(_ROS_WHEELS_BOOTSTRAP_COMPLETE),-u LD_LIBRARY_PATH)
endif

# What TensorFlow needs and other groups have pinned before it is in build and replay.
WEIGHTS_REQUIREMENTS := build runtime replay train

# With as many processes as cores, TensorFlow's threads would only wait for each other. Status 5: no tests chosen.
PYTEST = $(ENV) TF_USE_LEGACY_KERAS=1 .venv-test/bin/python -m pytest

.PHONY: demo test weights docs lint clean

demo: .venv/installed
	@$(ENV) .venv/bin/qpwc replay $(DEMO_BAG) --live --model $(DEMO_MODEL) --report $(DEMO_OUT) $(DEMO_OPTIONS)

test: .venv-test/installed
	@failed=; \
	$(PYTEST) -n $(TEST_JOBS) --dist loadfile $(TEST_OPTIONS) -m 'not serial' || [ $$? -eq 5 ] || failed=yes; \
	$(PYTEST) $(TEST_OPTIONS) -m serial || [ $$? -eq 5 ] || failed=yes; \
	[ -z "$$failed" ]

weights: .venv-weights/ready
	@$(ENV) TF_USE_LEGACY_KERAS=1 .venv-weights/bin/python training/recipe.py $(CONFIG)

docs: .venv-docs/ready
	@$(ENV) NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@echo out/site/index.html

lint: .venv-test/installed
	@$(ENV) .venv-test/bin/ruff check .

clean:
	rm -rf .venv .venv-test .venv-weights .venv-docs out build .pytest_cache .ruff_cache qpwc_ros.egg-info

# The package itself is installed anew when a file of it is newer; the rest of an environment when a pin is.
SOURCES := setup.py setup.cfg package.xml \
  $(shell find qpwc_core qpwc_ros launch config models resource -type f -not -path '*/__pycache__/*')

.venv/ready: $(DEMO_REQUIREMENTS:%=requirements/%.txt)
	$(call environment,.venv,$(DEMO_REQUIREMENTS))

.venv-test/ready: $(TEST_REQUIREMENTS:%=requirements/%.txt)
	$(call environment,.venv-test,$(TEST_REQUIREMENTS))

# Without this package: training/'s programs run from this directory.
.venv-weights/ready: $(WEIGHTS_REQUIREMENTS:%=requirements/%.txt)
	$(call environment,.venv-weights,$(WEIGHTS_REQUIREMENTS))

# Of its own, since nothing but the site needs it, and the site nothing else.
.venv-docs/ready: requirements/docs.txt
	$(call environment,.venv-docs,docs)

.venv/installed .venv-test/installed: %/installed: %/ready $(SOURCES)
	$(call install,$*)

PIP = $(ENV) PIP_DISABLE_PIP_VERSION_CHECK=1 $(1)/bin/python -m pip install --quiet --no-deps

# $(call environment,DIRECTORY,REQUIREMENTS): a new virtual environment with exactly these.
define environment
@$(ENV) $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
  || { echo "make: Python 3.10 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=python3.12" >&2; exit 1; }
@echo 'making the environment $(1) from requirements/: $(2)'
@rm -rf $(1)
@$(ENV) $(PYTHON) -m venv $(VENV_OPTIONS) $(1)
@$(PIP) $(foreach name,$(2),-r requirements/$(name).txt)
@touch $(1)/ready
endef

# $(call install,DIRECTORY): this package. setuptools would take files deleted since from an earlier build/lib.
define install
@echo 'installing this package into $(1)'
@rm -rf build/lib build/bdist.*
@$(PIP) --no-build-isolation --force-reinstall .
@rm -rf build/lib build/bdist.*
@rmdir build 2>/dev/null || true
@touch $(1)/installed
endef
