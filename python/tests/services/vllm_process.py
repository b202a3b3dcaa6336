"""One vLLM process that answers prompts: told what to do by JSON, it says what it did in its last line."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    # Once the environment is set; whoever collects tests has no vLLM.
    from vllm import LLM, SamplingParams, TokensPrompt

    told = json.load(sys.stdin)
    config = told.get("config", {})
    if told.get("tier"):
        config["kv_transfer_config"] = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "spec_name": "CpuTieringSpec",
                "spec_module_path": "kvlathe.plugins.vllm",
                "cpu_bytes_to_use": 1 << 30,
                "secondary_tiers": [told["tier"]],
                **told.get("extra", {}),
            },
        }
    model = LLM(
        told["model"],
        dtype=told.get("dtype", "bfloat16"),
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        max_logprobs=-1,
        disable_log_stats=False,
        block_size=128,
        **config,
    )
    if told.get("warm_up"):
        model.generate(
            [TokensPrompt(prompt_token_ids=[1] * 200)], SamplingParams(max_tokens=2), use_tqdm=False
        )
    if told.get("wait_for"):
        # Until somebody has done something to the store.
        print("ready", flush=True)
        while not os.path.exists(told["wait_for"]):
            time.sleep(0.05)
    answers = [answer(model, ids, told) for ids in told["prompts"]]
    counters = {
        f"{metric.name}{metric.labels.get('tier', '')}": metric.value
        for metric in model.get_metrics()
        if hasattr(metric, "value") and ("offload" in metric.name or "prefix_cache" in metric.name)
    }
    # What is still on its way to the store is to arrive.
    time.sleep(told.get("linger_s", 1.0))
    print("\nanswers " + json.dumps({"answers": answers, "counters": counters}), flush=True)


def answer(model: Any, ids: list[int], told: dict[str, Any]) -> dict[str, Any]:
    """One prompt's greedy continuation."""
    from vllm import SamplingParams, TokensPrompt

    if told.get("forget"):
        # Nothing is in vLLM's own cache, nor in its first tier.
        model.reset_prefix_cache(reset_connector=True)
    n_logprobs = told.get("n_logprobs", 0)
    parameters = SamplingParams(
        temperature=0, max_tokens=told.get("max_tokens", 16), logprobs=n_logprobs or None
    )
    started = time.perf_counter()
    said = model.generate([TokensPrompt(prompt_token_ids=ids)], parameters, use_tqdm=False)[0]
    took = time.perf_counter() - started
    first = said.outputs[0].logprobs[0] if n_logprobs else {}
    return {
        "token_ids": list(said.outputs[0].token_ids),
        "text": said.outputs[0].text,
        "n_cached": said.num_cached_tokens,
        "took_s": took,
        "first_token_s": said.metrics.first_token_latency,
        "first_logprobs": {token: given.logprob for token, given in first.items()},
    }


if __name__ == "__main__":
    main()
