"""vLLM's side of `rollout.py`, run by the interpreter of its own environment (`servers/make_venv.sh`).

    python rollout_vllm.py MODEL LONGEST [eager]

Each line of its input has a list of prompts, as token ids, and how many tokens each is to be continued by, no row
longer than LONGEST. A line of JSON says what it took, with log-probabilities as TRL asks for them, in float32, prompts
that occur several times shared by its cache; compiled, as vLLM is by default, or `eager`. Its cache has blocks of BLOCK
tokens: with 128, the default on a CPU, of short prompts next to nothing is shared. `VLLM_CPU_KVCACHE_SPACE` says how
many GB it may take for keys and values, 1 unless it is set.
"""

import json
import os
import resource
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams

BLOCK = 32


def main() -> None:
    engine = {
        "dtype": "float32",
        "block_size": BLOCK,
        "enforce_eager": sys.argv[3:] == ["eager"],
        "logprobs_mode": "processed_logprobs",
    }  # the last as TRL has it
    llm = LLM(model=sys.argv[1], max_model_len=int(sys.argv[2]), disable_log_stats=True, **engine)
    print("{}", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        usual = {"temperature": 1.0, "ignore_eos": True, "detokenize": False, "logprobs": 0}
        params = [SamplingParams(max_tokens=n, **usual) for n in job["lengths"]]
        llm.reset_prefix_cache()
        began, busy = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        tokens = [len(output.outputs[0].token_ids) for output in outputs]
        assert tokens == job["lengths"]
        assert all(output.outputs[0].logprobs is not None for output in outputs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**found, "tokens": sum(tokens), "longest": max(tokens), "peak_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
