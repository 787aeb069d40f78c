"""The names that boards made for vLLM ask for, each with a value after one request."""

from __future__ import annotations

import asyncio

from tests.router.harness import Harness, endless, eventually, router
from wire.fleet_messages import Heartbeat
from wire.types import NodeLoad

# What the boards in vLLM's own examples query, `iteration_tokens_total` aside: nodes export that.
HISTOGRAMS = [
    "e2e_request_latency_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
]
OTHERS = [
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
]


async def values(harness: Harness) -> dict[str, float]:
    """Samples of /metrics by name and labels."""
    lines = (await harness.get("/metrics")).body.decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_boards_made_for_vllm_find_what_they_ask_for() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.num_cached_tokens = 1
            await harness.complete(max_tokens=4, n=2)
            found = await values(harness)
            for name in HISTOGRAMS:
                assert found[f'vllm:{name}_count{{model_name="stub"}}'] >= 1, name
                assert f'vllm:{name}_sum{{model_name="stub"}}' in found
                assert f'vllm:{name}_bucket{{le="+Inf",model_name="stub"}}' in found
            for name in OTHERS:
                assert any(sample.startswith(f"vllm:{name}{{") for sample in found), name
            assert found['vllm:request_max_num_generation_tokens_sum{model_name="stub"}'] == 4
            assert found['vllm:request_generation_tokens_sum{model_name="stub"}'] == 8
            assert found['vllm:request_prefill_kv_computed_tokens_sum{model_name="stub"}'] == 2
            http = 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'
            assert found[http] == 1
            assert found["baton_router_grant_wait_seconds_count"] == 2

    asyncio.run(scenario())


def test_the_caches_use_is_the_decode_nodes() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            load = NodeLoad(blocks_total=10, blocks_free=4)
            harness.pair.decode.set_load(load)
            harness.pair.decode.send(Heartbeat(load))
            await eventually(lambda: harness.server.control.fleet.kv_usage > 0)
            name = 'vllm:kv_cache_usage_perc{model_name="stub"}'
            assert (await values(harness))[name] == 0.6

    asyncio.run(scenario())


def test_only_known_methods_are_labels() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for method in ("PURGE", "PROPFIND", "PURGE"):
                async with harness.session.request(method, harness.url + "/v1/models"):
                    pass
            found = await values(harness)
            answers = [s for s in found if s.startswith("http_requests_total")]
            other = [sample for sample in answers if 'method="OTHER"' in sample]
            assert [found[sample] for sample in other] == [3]

    asyncio.run(scenario())
