"""The registry and the settings: what third parties add by, and what users set."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest

from lmcache_blend.config import BlendConfig, Config, cache_dir
from lmcache_blend.errors import ConfigError, DuplicateNameError, LMCacheBlendError, UnknownNameError, nearest
from lmcache_blend.registry import Registry


@pytest.fixture
def colours() -> Registry:
    registry = Registry("colour", "lmcache_blend.test_colours")
    registry.register("red")(dict)
    registry.register("green")(list)
    return registry


def test_names_come_back_sorted_and_objects_unchanged(colours):
    assert colours.names() == ["green", "red"] == list(colours)
    assert colours.get("red") is dict
    assert "red" in colours
    assert "blue" not in colours


def test_an_unknown_name_suggests_the_nearest(colours):
    with pytest.raises(UnknownNameError, match="unknown colour 'gren': did you mean 'green'") as caught:
        colours.get("gren")
    assert "green, red" in str(caught.value)
    with pytest.raises(KeyError, match=r"unknown colour 'xyzzy': known: green, red"):
        colours.get("xyzzy")


def test_two_objects_cannot_share_a_name(colours):
    with pytest.raises(DuplicateNameError, match=r"'red' is already registered by builtins\.dict"):
        colours.register("red")(list)
    assert colours.get("red") is dict
    colours.register("red")(dict)


CELL = """
@colours.register("mine")
class Mine:
    value = {value}
"""


def test_a_notebook_cell_run_twice_replaces_its_class(colours):
    notebook = {"colours": colours, "__name__": "__main__"}
    exec(CELL.format(value=1), notebook)
    exec(CELL.format(value=2), notebook)
    assert colours.get("mine").value == 2
    with pytest.raises(DuplicateNameError):
        exec(CELL.format(value=3), {"colours": colours, "__name__": "another_module"})


def install(folder: Path, name: str, code: str, points: dict[str, str]) -> None:
    """A package as pip leaves it: a module and a dist-info folder with entry points."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{point} = {target}" for point, target in points.items())
    (info / "entry_points.txt").write_text(f"[lmcache_blend.test_colours]\n{lines}\n")


def test_entry_points_of_installed_packages_are_found_at_the_first_look_up(colours, tmp_path, monkeypatch):
    code = "class Blue:\n    shade = 'navy'\n\nclass Red:\n    pass\n"
    points = {"blue": "colours_plugin:Blue", "red": "colours_plugin:Red"}
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "colours_plugin", code, points)
    assert "colours_plugin" not in sys.modules
    assert colours.names() == ["blue", "green", "red"]
    assert colours.get("blue").shade == "navy"
    assert colours.get("red") is dict, "a name that was registered in code wins over an entry point"


def test_an_entry_point_that_cannot_be_loaded_harms_nobody_else(colours, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    points = {"blue": "broken_plugin:Blue", "grey": "no_such_module:Grey"}
    install(tmp_path, "broken_plugin", "raise RuntimeError('no such GPU')", points)
    assert colours.names() == ["green", "red"]
    with pytest.raises(ConfigError, match="'blue': broken_plugin:Blue cannot be loaded: RuntimeError: no such GPU"):
        colours.get("blue")


OURS = {
    "policies": "lmcache_blend.blend.policies",
    "codecs": "lmcache_blend.codecs",
    "tiers": "lmcache_blend.engine",
    "tasks": "lmcache_blend.eval.tasks.base",
}


@pytest.mark.parametrize("kind", OURS)
def test_every_group_of_ours_takes_third_parties(kind):
    registry = getattr(importlib.import_module(OURS[kind]), kind)
    assert registry.group == f"lmcache_blend.{kind}"
    assert len(registry.names()) > 0


def test_settings_refuse_unknown_keys_and_suggest():
    with pytest.raises(ConfigError, match="unknown setting 'recompute_rato': did you mean 'recompute_ratio'"):
        BlendConfig(recompute_rato=0.1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute_ratio": 1.5}, "recompute_ratio = 1.5: .* 1"),
        ({"recompute_ratio": -0.1}, "recompute_ratio = -0.1: .* 0"),
        ({"recompute_ratio": "much"}, "recompute_ratio = 'much'"),
        ({"encode": "behind"}, "encode = 'behind': .*'alone'"),
    ],
)
def test_settings_out_of_range_name_the_value_and_the_limit_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        BlendConfig(**settings)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LMCacheBlendError)


def test_settings_come_from_the_environment_and_arguments_win(monkeypatch):
    monkeypatch.setenv("LMCACHE_BLEND_POLICY", "epic")
    monkeypatch.setenv("LMCACHE_BLEND_RECOMPUTE_RATIO", "0.3")
    monkeypatch.setenv("LMCACHE_BLEND_STORE_MISSES", "false")
    config = BlendConfig.from_env(recompute_ratio=0.05)
    assert (config.policy, config.recompute_ratio, config.store_misses) == ("epic", 0.05, False)
    monkeypatch.setenv("LMCACHE_BLEND_RECOMPUTE_RATIO", "3")
    with pytest.raises(ConfigError, match="recompute_ratio = '3'"):
        BlendConfig.from_env()


def test_settings_are_frozen_and_replaced_by_a_validated_copy():
    config = BlendConfig(policy="epic")
    with pytest.raises(ValueError, match="frozen"):
        config.policy = "random"  # pyright: ignore[reportAttributeAccessIssue]
    assert config.replace(policy="random").policy == "random"
    assert config.policy == "epic"
    with pytest.raises(ConfigError, match="recompute_ratio = 2"):
        config.replace(recompute_ratio=2)


def test_a_settings_model_of_ones_own_has_the_same_manners():
    class Mine(Config):
        window: int = 4

    assert Mine(window=8).model_dump() == {"window": 8}
    with pytest.raises(ConfigError, match="'windw': did you mean 'window'"):
        Mine(windw=8)  # pyright: ignore[reportCallIssue]


def test_the_cache_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("LMCACHE_BLEND_CACHE", raising=False)
    assert cache_dir().name == "lmcache_blend"
    monkeypatch.setenv("LMCACHE_BLEND_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_nearest_names_everything_where_nothing_is_near():
    assert nearest("q", ["b", "a"]) == "known: a, b"
    assert nearest("epik", ["epic", "random"]).startswith("did you mean 'epic'?")


@pytest.mark.parametrize("module", ["registry", "config", "codecs.base"])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(f"lmcache_blend.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
