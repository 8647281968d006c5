"""LoRA adapters in a folder, as `peft` writes them: recognised, checked, merged into a model's weights.

Only safetensors is read. A folder of ours also says which model it was trained on (`base.json`), and is refused on another.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base.json"
# What an adapter's configuration says of where and with what it was made, not of what it does.
_NOT_THE_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}


def peft() -> ModuleType:
    """The package, which only users of adapters need.

    Raises:
        ModuleNotFoundError: it is missing, in one sentence.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: LoRA needs it, install it with `pip install 'qprobe[lora]'`.") from error
    return peft


def digest(folder: str) -> str:
    """What decides an adapter: its weights and the settings that they are read with.

    Raises:
        OSError: there is no adapter in safetensors.
        ValueError: it is not a LoRA adapter.
    """
    content = hashlib.sha256((_checked(folder) / WEIGHTS_FILE).read_bytes())
    settings = {key: value for key, value in _config(folder).items() if key not in _NOT_THE_ADAPTER}
    # peft writes sets in any order.
    settings = {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in settings.items()}
    content.update(json.dumps(settings, sort_keys=True).encode())
    return content.hexdigest()[:16]


def merge(model: Any, folder: str, base: Mapping[str, Any]) -> Any:
    """A model with an adapter added to its weights, which are changed in place.

    Args:
        model: of transformers, with dense weights.
        base: the identity of the model without the adapter.

    Raises:
        OSError: there is no adapter in safetensors.
        ValueError: it belongs to another model, or is no LoRA adapter.
        ModuleNotFoundError: peft is missing.
    """
    library, path = peft(), _checked(folder)
    _check_base(path, base)
    try:
        # The weights that peft makes up first are replaced; the random numbers are the process's.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # what peft says of a model that was not on the hub
            adapted = library.get_peft_model(model, library.LoraConfig.from_pretrained(str(path)))
            weights = tensors_from_bytes((path / WEIGHTS_FILE).read_bytes())
            result = library.set_peft_model_state_dict(adapted, weights)
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".: ")
        raise ValueError(f"The adapter {folder} does not fit the model {base['name']!r} ({first}).") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if amiss := sorted([*missing, *result.unexpected_keys]):
        raise ValueError(
            f"The adapter {folder} does not fit the model {base['name']!r}: {len(amiss)} of its weights have no counterpart, "
            f"{amiss[0]} among them; use the model that it was trained on."
        )
    return adapted.merge_and_unload()


def write_base(folder: Path, base: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Note in the folder of an adapter which model it was trained on, and how."""
    (folder / BASE_FILE).write_text(json.dumps({"base": dict(base), **more}, indent=2) + "\n")


def _checked(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"model adapter {folder!r}: no folder with an {CONFIG_FILE} is there.")
    if not (path / WEIGHTS_FILE).is_file():
        found = " (a .bin file can hide a program, and is not read)" if any(path.glob("*.bin")) else ""
        raise FileNotFoundError(f"model adapter {folder!r} has no {WEIGHTS_FILE}{found}: save it as safetensors.")
    if (kind := _config(folder).get("peft_type")) != "LORA":
        raise ValueError(f"model adapter {folder!r} is of the kind {kind}: only LoRA can be merged into the weights.")
    return path


def _config(folder: str) -> dict[str, Any]:
    path = Path(folder).expanduser() / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): save the adapter anew.") from error
    return config


def _check_base(path: Path, base: Mapping[str, Any]) -> None:
    """An adapter of ours fits one model; of others only the shapes are known."""
    if not (path / BASE_FILE).is_file():
        return
    trained_on = json.loads((path / BASE_FILE).read_text())["base"]
    # A file is known by its content wherever it lies; of the hub's models name and revision are all there is.
    known_by = ("content",) if trained_on["content"] and base["content"] else ("name", "revision")
    if any(trained_on[key] != base[key] for key in known_by):
        raise ValueError(
            f"The adapter {path} was trained on the model {trained_on['name']!r}, not on {base['name']!r} as it is here: use "
            "the model that it was trained on, or train it anew."
        )
