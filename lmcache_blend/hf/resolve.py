"""From the name of a model to something that `from_pretrained` loads, with or without a hub."""

import json
import threading
from pathlib import Path

from lmcache_blend.config import cache_dir
from lmcache_blend.errors import ModelNotFoundError, nearest
from lmcache_blend.hf import packaged

ALIASES = {"smollm2-135m": packaged.HUB_ID}
REMEDY = "give a local folder, or smollm2-135m, which needs no hub"
HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model, name resolution included."""


def resolve_model(name: str) -> str:
    """A local folder, or a hub id that the hub was just seen to have; never a name that will fail much later.

    In turn: a folder (used as it is), a model that the hub's cache holds whole (its folder there, so that
    loading it asks no network), and the hub. SmolLM2-135M-Instruct, under its hub id or as `smollm2-135m`,
    needs no hub: `packaged` converts it once. Raises ModelNotFoundError in one line with the remedies.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    repo = ALIASES.get(name, name)
    if folder.is_dir() and repo == name:
        raise ModelNotFoundError(f"folder {name!r} holds no config.json, so it is no Hugging Face model")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"no folder {name!r}; {REMEDY}")
    if cached := _cached(repo):
        return cached
    converted = cache_dir() / "models" / "smollm2-135m"
    if repo == packaged.HUB_ID and is_complete(converted):
        return str(converted)
    trouble = _ask_hub(repo)
    if trouble is None:
        return repo
    if repo == packaged.HUB_ID:
        packaged.convert(converted, is_complete)
        return str(converted)
    hint = "" if "/" in name else f"; {nearest(name, ALIASES)}"
    raise ModelNotFoundError(f"model {name!r} is not in the local cache and {trouble}; {REMEDY}{hint}")


def is_complete(folder: Path) -> bool:
    """Whether config, tokenizer and all weights lie in the folder."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return (
        (folder / "config.json").is_file()
        and (folder / "tokenizer_config.json").is_file()
        and any((folder / file).is_file() for file in vocabularies)
        and any(_has_weights(folder, file) for file in ("model.safetensors", "pytorch_model.bin"))
    )


def _has_weights(folder: Path, file: str) -> bool:
    if (folder / file).is_file():
        return True
    try:
        shards = json.loads((folder / f"{file}.index.json").read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / shard).is_file() for shard in set(shards))


def _cached(repo: str) -> str | None:
    """The folder of a repository that the hub's local cache holds whole."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        raise ModelNotFoundError(f"{repo!r} is neither a folder nor a hub id; {REMEDY}") from None
    return str(Path(config).parent) if isinstance(config, str) and is_complete(Path(config).parent) else None


def _ask_hub(repo: str) -> str | None:
    """None where the hub has the model, else what is wrong, after HUB_SECONDS at most."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = ["the hub does not answer"]

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=HUB_SECONDS / 2)
            answer[0] = None
        except GatedRepoError:
            answer[0] = "the hub has it behind a licence: accept it there and set HF_TOKEN"
        except RepositoryNotFoundError:
            answer[0] = "the hub has no such model (a private one needs HF_TOKEN)"
        except EntryNotFoundError:
            answer[0] = "the hub's repository holds no config.json"
        except Exception as error:
            # Whatever the HTTP stack raises here, the meaning is the same: no answer.
            answer[0] = f"the hub does not answer ({type(error).__name__})"

    # A thread, because a dead name server can block far longer than the request's own timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return answer[0]
