"""vLLM: prefix offload and blend mode in a stock `vllm serve`; the only part that imports vllm.

    plugin      vllm.general_plugins entry point: version check, registers the connector, finds the model runner
    config      settings from kv_connector_extra_config or one YAML file
    connector   LMCacheBlendConnector: hands vLLM's calls to the two halves
    scheduler   what to load, blend and store; spans and content matching (matching)
    worker      loads, blends (runner, kv) and stores; self-test (selftest)

Importing lmcache_blend.serving itself needs no vllm.
"""

from lmcache_blend.serving.config import BlendSettings, ServingConfig

CONNECTOR = "LMCacheBlendConnector"
"""Name of the connector in --kv-transfer-config."""

__all__ = ["CONNECTOR", "BlendSettings", "ServingConfig"]
