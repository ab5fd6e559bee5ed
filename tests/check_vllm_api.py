"""Whether a vLLM has what lmcache_blend.serving uses: python tests/check_vllm_api.py FOLDER, without importing it.

FOLDER: site-packages, or an unzipped wheel. Prints a line for each need and leaves with status 1 where one is missing.
Reads sources only, so a CUDA wheel can be checked on any machine. What our classes override is read off our own
sources: an override that vLLM no longer has, takes other arguments for, or a new abstract method, is missing too.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OURS = Path(__file__).parents[1] / "lmcache_blend" / "serving"
CONNECTOR = "distributed/kv_transfer/kv_connector"
BACKEND, BASE, RUNNER = "v1/attention/backend.py", f"{CONNECTOR}/v1/base.py", "v1/worker/gpu_model_runner.py"
RUNNER_2, LAYER = "v1/worker/gpu/model_runner.py", "model_executor/layers/attention/attention.py"
CPU, SCHEDULER, REQUEST = "v1/attention/backends/cpu_attn.py", "v1/core/sched/scheduler.py", "v1/request.py"
FLASH, ROTARY = "v1/attention/backends/flash_attn.py", "model_executor/layers/rotary_embedding/base.py"


@dataclass(frozen=True)
class Need:
    """kind "takes": function or method `name` with parameters `what`; "has": class `name` with attributes, methods or
    fields `what`; "calls": function `name` (all of the file if "") calls methods or functions `what`."""

    kind: str
    file: str
    name: str
    what: str

    def missing(self, package: Path) -> list[str]:
        """What is not there."""
        path = package / self.file
        if not path.is_file():
            return [f"{self.file} itself"]
        node = find(parsed(path), self.name)
        if node is None:
            return [f"{self.name} itself"]
        there = {"takes": parameters, "has": attributes, "calls": called}[self.kind](node)
        return [word for word in self.what.split() if word not in there]


NEEDS = (
    Need("has", f"{CONNECTOR}/factory.py", "KVConnectorFactory", "_registry register_connector"),
    Need("takes", f"{CONNECTOR}/factory.py", "KVConnectorFactory.register_connector", "name module_path class_name"),
    Need("takes", BASE, "KVConnectorBase_V1.__init__", "vllm_config role kv_cache_config"),
    Need("has", BASE, "KVConnectorBase_V1", "_vllm_config _kv_transfer_config has_connector_metadata "
         "_get_connector_metadata bind_kv_cache_manager"),
    Need("has", BASE, "KVConnectorRole", "SCHEDULER WORKER"),
    Need("has", BASE, "KVConnectorWorkerMetadata", "aggregate"),
    Need("has", BASE, "", "KVConnectorHandshakeMetadata KVConnectorMetadata"),
    Need("has", "config/kv_transfer.py", "KVTransferConfig", "kv_connector kv_role kv_connector_extra_config "
         "kv_load_failure_policy kv_connector_module_path"),
    Need("takes", "v1/worker/worker_base.py", "WorkerWrapperBase.initialize_from_config", "kv_cache_configs"),
    Need("has", "v1/worker/worker_base.py", "WorkerBase", "model_runner compile_or_warm_up_model"),
    *(Need("has", file, "", "model_runner compile_or_warm_up_model initialize_from_config")
      for file in ("v1/worker/gpu_worker.py",)),
    Need("has", "v1/worker/cpu_worker.py", "CPUWorker", "model_runner compile_or_warm_up_model"),
    Need("calls", "v1/worker/gpu_worker.py", "Worker.initialize_from_config", "initialize_kv_cache"),
    Need("has", RUNNER, "GPUModelRunner", "model device attn_groups _kernel_block_sizes"),
    Need("has", RUNNER_2, "GPUModelRunner", "model device attn_groups kernel_block_sizes"),
    Need("has", "v1/worker/utils.py", "AttentionGroup", "backend layer_names kv_cache_spec"),
    Need("has", "v1/kv_cache_interface.py", "KVCacheSpec", "block_size"),
    Need("calls", RUNNER, "", "register_kv_caches"),
    Need("takes", BACKEND, "AttentionMetadataBuilder.__init__", "kv_cache_spec layer_names vllm_config device"),
    Need("takes", BACKEND, "AttentionMetadataBuilder.build", "common_prefix_len common_attn_metadata"),
    Need("has", BACKEND, "AttentionBackend", "get_builder_cls forward_includes_kv_cache_update"),
    Need("has", BACKEND, "CommonAttentionMetadata", "query_start_loc query_start_loc_cpu seq_lens num_reqs "
         "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping causal positions"),
    Need("takes", BACKEND, "AttentionImpl.forward", "layer query key value kv_cache attn_metadata output output_scale"),
    *(Need("takes", file, f"{impl}.do_kv_cache_update", "layer key value kv_cache slot_mapping")
      for file, impl in ((CPU, "CPUAttentionBackendImpl"), (FLASH, "FlashAttentionImpl"),
                         ("v1/attention/backends/triton_attn.py", "TritonAttentionImpl"),
                         ("v1/attention/backends/flashinfer.py", "FlashInferImpl"))),
    *(Need("has", file, impl, "scale sliding_window logits_soft_cap alibi_slopes sinks kv_sharing_target_layer_name")
      for file, impl in ((CPU, "CPUAttentionBackendImpl"), (FLASH, "FlashAttentionImpl"))),
    Need("has", LAYER, "Attention", "impl num_heads num_kv_heads head_size attn_type attn_backend"),
    Need("calls", LAYER, "unified_kv_cache_update", "do_kv_cache_update"),
    Need("calls", LAYER, "unified_attention_with_output", "forward"),
    Need("has", "model_executor/layers/attention/chunked_local_attention.py", "", "ChunkedLocalAttention"),
    Need("calls", "model_executor/layers/attention/kv_transfer_utils.py", "maybe_transfer_kv_layer",
         "wait_for_layer_load save_kv_layer"),
    Need("takes", "forward_context.py", "set_forward_context", "attn_metadata vllm_config num_tokens slot_mapping"),
    Need("takes", "config/vllm.py", "set_current_vllm_config", "vllm_config"),
    Need("has", "config/compilation.py", "CompilationConfig", "static_forward_context"),
    Need("has", "config/scheduler.py", "SchedulerConfig", "max_num_batched_tokens"),
    Need("has", "config/model.py", "ModelConfig", "max_model_len get_vocab_size dtype quantization seed hf_config "
         "tokenizer model revision"),
    Need("has", ROTARY, "RotaryEmbeddingBase", "is_neox_style rotary_dim cos_sin_cache"),
    Need("takes", ROTARY, "RotaryEmbedding.forward_native", "positions query key"),
    *(Need("calls", file, "", "start_load_kv wait_for_save get_transfer_results get_block_ids_with_load_errors "
           "get_kv_connector_stats build_connector_worker_meta")
      for file in ("v1/worker/kv_connector_model_runner_mixin.py", "v1/worker/gpu/kv_connector.py")),
    Need("calls", BASE, "KVConnectorBase_V1.get_transfer_results", "get_finished"),
    Need("calls", SCHEDULER, "", "get_num_new_matched_tokens update_state_after_alloc build_connector_meta "
         "request_finished on_new_request bind_kv_cache_manager update_connector_output"),
    Need("calls", "v1/engine/core.py", "", "set_xfer_handshake_metadata_pp_aware"),
    Need("calls", BASE, "KVConnectorBase_V1.set_xfer_handshake_metadata_pp_aware", "set_xfer_handshake_metadata"),
    Need("has", "v1/core/sched/output.py", "SchedulerOutput", "num_scheduled_tokens has_sync_kv_loads"),
    Need("has", REQUEST, "Request", "request_id kv_transfer_params lora_request cache_salt mm_features "
         "prompt_token_ids prompt_embeds skip_reading_prefix_cache all_token_ids num_prompt_tokens num_tokens "
         "num_computed_tokens block_hashes _block_hasher update_block_hashes"),
    Need("has", "v1/core/kv_cache_manager.py", "KVCacheManager", "block_pool get_block_ids"),
    Need("has", "v1/core/kv_cache_manager.py", "KVCacheBlocks", "get_block_ids"),
    Need("has", "v1/core/block_pool.py", "BlockPool", "hash_block_size"),
    Need("takes", f"{CONNECTOR}/v1/metrics.py", "KVConnectorPromMetrics.__init__",
         "vllm_config metric_types labelnames per_engine_labelvalues"),
    Need("has", f"{CONNECTOR}/v1/metrics.py", "KVConnectorPromMetrics", "_counter_cls"),
    Need("has", f"{CONNECTOR}/v1/metrics.py", "KVConnectorStats", "data"),
    Need("has", "distributed/parallel_state.py", "", "get_tp_group"),
    Need("has", "v1/sample/logits_processor/__init__.py", "", "AdapterLogitsProcessor"),
    Need("has", "sampling_params.py", "SamplingParams", "extra_args"),
)  # fmt: skip

OVERRIDES = (
    ("connector.py", "LMCacheBlendConnector", BASE, "KVConnectorBase_V1"),
    ("stats.py", "BlendStats", f"{CONNECTOR}/v1/metrics.py", "KVConnectorStats"),
    ("stats.py", "BlendPromMetrics", f"{CONNECTOR}/v1/metrics.py", "KVConnectorPromMetrics"),
    ("forced.py", "ForcedTokens", "v1/sample/logits_processor/__init__.py", "AdapterLogitsProcessor"),
)
"""(our file, our class, its file in vLLM, its base)."""
INHERITED = {"AdapterLogitsProcessor": ("v1/sample/logits_processor/interface.py", "LogitsProcessor")}
"""Bases of bases that have methods that we override."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find(tree: ast.AST, name: str) -> ast.AST | None:
    """The class or function of a dotted name, the tree itself for ""; of overloads the last."""
    for part in name.split(".") if name else ():
        body = getattr(tree, "body", [])
        found = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            return None
        tree = found[-1]
    return tree


def parameters(node: ast.AST) -> set[str]:
    assert isinstance(node, ast.FunctionDef)
    given = node.args
    return {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


def attributes(node: ast.AST) -> set[str]:
    """Names that are defined, imported, annotated or assigned anywhere in a class or module, also on self."""
    out: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.ClassDef | ast.FunctionDef):
            out.add(n.name)
        elif isinstance(n, ast.Attribute | ast.Name) and isinstance(n.ctx, ast.Store):
            out.add(n.attr if isinstance(n, ast.Attribute) else n.id)
        elif isinstance(n, ast.ImportFrom):
            out |= {a.asname or a.name for a in n.names}
    return out


def called(node: ast.AST) -> set[str]:
    """Also methods that are only named, since some are handed on as callbacks."""
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def methods(node: ast.AST | None) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)}


def overrides(package: Path) -> Iterator[tuple[str, list[str]]]:
    """(our class, what does not fit its base)."""
    for file, name, base_file, base_name in OVERRIDES:
        ours, base = find(parsed(OURS / file), name), find(parsed(package / base_file), base_name)
        assert ours is not None
        if base is None:
            yield name, [f"{base_name} itself"]
            continue
        far = INHERITED.get(base_name)
        wrong: list[str] = []
        there = {**(methods(find(parsed(package / far[0]), far[1])) if far else {}), **methods(base)}
        for method, own in methods(ours).items():
            if method.startswith("_"):
                continue
            if method not in there:
                wrong.append(f"{method} of the base")
                continue
            theirs = there[method].args
            wanted = [a.arg for a in (*theirs.posonlyargs, *theirs.args)]
            takes = [a.arg for a in (*own.args.posonlyargs, *own.args.args)]
            if takes != wanted and own.args.kwarg is None:
                wrong.append(f"{method}({', '.join(wanted)})")
        for method, theirs in there.items():
            abstract = any("abstractmethod" in ast.unparse(d) for d in theirs.decorator_list)
            if abstract and method not in methods(ours):
                wrong.append(f"our {method}, which is abstract")
        yield name, wrong


def check(folder: Path) -> list[tuple[str, list[str]]]:
    """(need, what of it is missing) for a folder that holds vllm/."""
    package = folder / "vllm"
    found = [(f"{n.file}: {n.name or 'file'} {n.kind} {n.what}", n.missing(package)) for n in NEEDS]
    return found + [(f"{name} overrides", wrong) for name, wrong in overrides(package)]


def main() -> int:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "vllm").is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    found = check(Path(sys.argv[1]))
    for need, missing in found:
        print(
            f"{'MISSING' if missing else 'ok':8}{need}"
            + (f"\n        not there: {', '.join(missing)}" if missing else "")
        )
    print(f"{sum(not m for _, m in found)} of {len(found)} needs are met")
    return int(any(missing for _, missing in found))


if __name__ == "__main__":
    sys.exit(main())
