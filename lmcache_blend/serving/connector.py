"""LMCacheBlendConnector: vLLM's connector API on top of the two halves."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from lmcache_blend.errors import ConfigError, LMCacheBlendError, UnsupportedModelError
from lmcache_blend.serving import plugin
from lmcache_blend.serving.config import ServingConfig
from lmcache_blend.serving.identity import fingerprint
from lmcache_blend.serving.messages import Load, Save, shared
from lmcache_blend.serving.runner import VLLMRunner, learn_rotary, paged_layers
from lmcache_blend.serving.scheduler import SchedulerHalf
from lmcache_blend.serving.selftest import self_test
from lmcache_blend.serving.stats import BlendPromMetrics, BlendStats
from lmcache_blend.serving.worker import WorkerHalf

log = logging.getLogger("vllm.lmcache_blend")  # below vLLM's own logger, so that its level and format apply


@dataclass
class StepMetadata(KVConnectorMetadata):
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class Ready(KVConnectorHandshakeMetadata):
    """What a worker found at start-up: why blend mode is refused there, "" where it is not."""

    blend_refused: str = ""


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """Breakdowns of requests, from workers in other processes."""

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Reports":
        assert isinstance(other, Reports)
        return Reports({**other.reports, **self.reports})


class LMCacheBlendConnector(KVConnectorBase_V1):
    """Offload and blend mode; settings in ServingConfig."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        plugin.check_version(plugin.installed())
        self.config = ServingConfig.read(self._kv_transfer_config.kv_connector_extra_config)
        parallel = vllm_config.parallel_config
        _check_setup(vllm_config)
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            # A chunk may be evicted or damaged at any time: that must cost a recomputation, not the request.
            log.warning('kv_load_failure_policy is set to "recompute": KV that cannot be loaded is computed')
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self.ranks = parallel.tensor_parallel_size
        self.fingerprint = fingerprint(vllm_config)
        self.here: SchedulerHalf | None = None
        self.there: WorkerHalf | None = None
        self.refused = ""
        # vLLM for CPU puts even a single worker into a process of its own.
        self.one_process = parallel.world_size == 1 and parallel.distributed_executor_backend not in ("mp", "ray")
        exact = self.config.exact

        def layout(rank: int) -> str:
            order = "post_rope" if exact else "pre_rope"
            return f"{order}/tp{rank}of{self.ranks}"

        self._layout = layout
        if role == KVConnectorRole.SCHEDULER:
            self.engine = shared.acquire(self.config.engine(without_memory=not self.one_process))
            self.here = SchedulerHalf(self.config, self.engine, self.fingerprint, layout, self._load_tokenizer)
        else:
            self.engine = shared.acquire(self.config.engine())

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._vllm_config.model_config.tokenizer)

    # ------------------------------------------------------------------ worker
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not plugin.runners:
            raise ConfigError("the plugin lmcache_blend did not run: allow it in VLLM_PLUGINS and install this package")
        from vllm.distributed.parallel_state import get_tp_group

        model_runner, rank = plugin.runners[-1], get_tp_group().rank_in_group
        try:
            self._start(model_runner, kv_caches, rank)
        except LMCacheBlendError as error:
            raise ConfigError(f"{plugin.installed()}: this model cannot be offloaded: {error}") from error

    def _start(self, model_runner: Any, caches: dict[str, torch.Tensor], rank: int) -> None:
        groups = [
            (gid, list(group.layer_names), None, group.kv_cache_spec.block_size)
            for gid, members in enumerate(model_runner.attn_groups)
            for group in members
        ]
        segments = f"{self.fingerprint}/{self._layout(rank).partition('/')[2]}"
        runner = None
        if self.config.blend is not None:
            try:
                if self._vllm_config.lora_config is not None:
                    raise UnsupportedModelError(
                        "LoRA is on, and a blend's own forwards know nothing of a request's adapter; "
                        "start without --enable-lora"
                    )
                reduce = _sum_over_ranks if self.ranks > 1 else None
                runner = VLLMRunner(model_runner, self._vllm_config, caches, segments, reduce, self.ranks)
            except LMCacheBlendError as error:
                self._refuse(str(error))
        layers = runner.layers if runner is not None else paged_layers(self._vllm_config, caches, groups)
        rotary = None if self.config.exact else learn_rotary(model_runner.model, layers)
        assert self.engine is not None
        self.there = WorkerHalf(self.config, self.engine, layers, rotary, runner, rank)
        if self.one_process:
            self.there.reports = shared.reports
        if runner is not None:
            plugin.after_warm_up.append(self._test)

    def _test(self) -> None:
        assert self.there is not None
        try:
            worst = self_test(self.there.runner)
            log.info("blend mode passed its self-test: logits differ by %.1e at most", worst)
        except Exception as error:  # whatever a model's code raises when it is run this way
            self._refuse(f"{type(error).__name__}: {error}")

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        if self.there is not None:
            self.there.runner = None
        log.error("blend mode is refused, prefixes are served all the same: %s", reason)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return Ready(self.refused)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """KV comes and goes layer by layer, which a replayed graph of the whole forward would skip."""
        return True

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.there is not None
        if self.has_connector_metadata() and not self.there.busy:
            metadata = self._get_connector_metadata()
            assert isinstance(metadata, StepMetadata)
            loads, metadata.loads = metadata.loads, []
            self.there.load(loads)
            self.there.begin(metadata.saves)

    def wait_for_layer_load(self, layer_name: str) -> None:
        assert self.there is not None
        self.there.wait(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        assert self.there is not None
        self.there.save_layer(layer_name)

    def wait_for_save(self) -> None:
        assert self.there is not None
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        saves, metadata.saves = metadata.saves, []
        self.there.save(saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self.there is not None
        self.there.forget(finished_req_ids)
        return None, self.there.arrived() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.there.bad_blocks() if self.there is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self.there is None or self.one_process or not self.there.reports:
            return None
        reports, self.there.reports = self.there.reports, {}
        return Reports(reports)

    # ------------------------------------------------------------------ scheduler
    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        for ready in metadata.values():
            if self.here is not None and isinstance(ready, Ready) and ready.blend_refused:
                self.here.blend_refused = ready.blend_refused

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self.here is not None
        self.here.manager = kv_cache_manager

    def on_new_request(self, request: Any) -> None:
        assert self.here is not None
        self.here.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.here is not None
        return self.here.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.here is not None
        self.here.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self.here is not None
        return StepMetadata(*self.here.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, Reports):
            shared.reports.update(meta.reports)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self.here is not None
        return False, self.here.finished(request, shared.reports.pop(request.request_id, {}))

    def reset_cache(self) -> bool:
        """Chunks stay: they are right for as long as the model is the same. Use `lmcache-blend store clear`."""
        return True

    # ------------------------------------------------------------------ both
    def get_kv_connector_stats(self) -> BlendStats | None:
        half = self.here or self.there
        if half is None or not half.counts:
            return None
        counts, half.counts = half.counts, {}
        return BlendStats(data=counts)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> BlendStats:
        return BlendStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        return BlendPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[Any]:
        return ()

    def shutdown(self) -> None:
        if self.there is not None:
            self.there.close()
        engine, self.engine = self.engine, None
        if engine is not None:
            shared.release(engine)


def _check_setup(vllm_config: Any) -> None:
    """Raises ConfigError for what a chunk cannot hold."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size = {parallel.pipeline_parallel_size}: a stage holds some layers, and chunks "
            "hold all of them; start with --pipeline-parallel-size 1"
        )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(
                f"{name} = {getattr(parallel, name)}: a rank holds some tokens, and chunks hold all of theirs; "
                f"start with --{name.replace('_', '-')} 1"
            )
    if speculative is not None and (speculative.use_eagle() or speculative.uses_draft_model()):
        raise ConfigError(
            f"speculative method {speculative.method!r} keeps KV of a draft model, which is computed after the "
            "forward that a chunk is taken from; choose ngram, or start without --speculative-config"
        )


def _sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Sum over the tensor-parallel ranks; the result lies on the CPU."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return group.all_reduce(x.to(group.device)).cpu()
