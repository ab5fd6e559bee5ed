"""The check of vLLM's API against the vLLM that is installed, and that it would notice what is gone."""

import importlib.util
import shutil
from pathlib import Path

import check_vllm_api
import pytest
from check_vllm_api import BASE, Need, check

SPEC = importlib.util.find_spec("vllm")
if SPEC is None or not SPEC.submodule_search_locations:
    pytest.skip("vLLM is not installed", allow_module_level=True)
INSTALLED = Path(SPEC.submodule_search_locations[0]).parent


def test_the_installed_vllm_has_what_serving_uses():
    assert {need: missing for need, missing in check(INSTALLED) if missing} == {}


def test_what_is_gone_is_named(tmp_path):
    for file in {n.file for n in check_vllm_api.NEEDS} | {"v1/sample/logits_processor/interface.py"}:
        path = tmp_path / "vllm" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSTALLED / "vllm" / file, path)
    assert not any(missing for _, missing in check(tmp_path))
    base = tmp_path / "vllm" / BASE
    text = base.read_text()
    base.write_text(text.replace("def request_finished(", "def request_ended(").replace("num_external_tokens", "n"))
    check_vllm_api.parsed.cache_clear()
    (wrong,) = [missing for need, missing in check(tmp_path) if need == "LMCacheBlendConnector overrides"]
    assert wrong == ["update_state_after_alloc(self, request, blocks, n)", "request_finished of the base"]


def test_kinds_of_needs():
    assert Need("has", "config/scheduler.py", "SchedulerConfig", "max_num_batched_tokens no_such").missing(
        INSTALLED / "vllm"
    ) == ["no_such"]
    assert Need("takes", "forward_context.py", "set_forward_context", "attn_metadata rows").missing(
        INSTALLED / "vllm"
    ) == ["rows"]
    assert Need("calls", "no/such/file.py", "", "x").missing(INSTALLED / "vllm") == ["no/such/file.py itself"]
    assert Need("calls", BASE, "NoClass", "x").missing(INSTALLED / "vllm") == ["NoClass itself"]
