"""Models and data of the Hugging Face hub, ``hf://org/name@revision``, in the hub's own cache.

huggingface_hub downloads, resumes, locks and caches; without a network (``HF_HUB_OFFLINE=1``) it takes what
the cache has. Of a model only what transformers reads is fetched: weights as safetensors, code where trusted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, Mistake

HUB = "hf://"
_FORM = re.compile(
    r"hf://(?P<data>datasets/)?(?P<name>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(pr|convert)/[\w.-]+|[^/@]+))?(/(?P<inside>[^/].*))?"
)
# Needs no quotes in an override.
_PLAIN = re.compile(r"[\w./@+-]+")
# Options and flags of data.
_DATA = ("path", "--text")
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
# What a model has beside its weights; other formats of the same weights lie in folders.
_SMALL = ("*.json", "*.txt", "*.jinja", "*.model", "tokenizer*")
_OTHER_FORMATS = ("original/*", "onnx/*", "openvino/*", "gguf/*", "coreml/*", "*/*.safetensors")


@dataclass(frozen=True)
class HubAddress:
    """Place on the hub.

    Attributes:
        name: ``org/name``.
        revision: Branch, tag or commit; None for the newest.
        inside: File or pattern inside; empty for all.
        is_data: Whether it is a dataset.
    """

    name: str
    revision: str | None
    inside: str
    is_data: bool


@dataclass
class Fetched:
    """Files that were fetched for a command.

    Attributes:
        code: Whether code of models is trusted, and fetched.
        places: Address -> folder, or pattern of files, in the cache.
        models: Address of each model -> the option that has it.
    """

    code: bool = False
    places: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def local(self, value: Any, path: str = "") -> Any:
        """Returns a value with what its addresses name, fetched but for the weights of models.

        Args:
            value: Value of an option, or of all options.
            path: The option.

        Raises:
            ConfigError: An address is wrong, or cannot be fetched.
        """
        if isinstance(value, Mapping):
            return {key: self.local(own, f"{path}.{key}" if path else str(key)) for key, own in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.local(own, f"{path}[{i}]") for i, own in enumerate(value)]
        if not isinstance(value, str) or not value.startswith(HUB):
            return value
        if value not in self.places:
            if path.endswith(_DATA) or read_address(value, path).is_data:
                self.places[value] = fetch_data(value, path)
            else:
                self.places[value] = str(fetch_config(value, path, code=self.code))
                self.models[value] = path
        return self.places[value]

    def override(self, text: str, quote: Callable[[str], str]) -> str:
        """Returns an override ``OPTION=VALUE`` with the place of the address that it has, if it has one.

        Args:
            text: The override.
            quote: Writes a place so that an override has it as it stands.
        """
        option, _, value = text.partition("=")
        if not value.startswith(HUB):
            return text
        place = self.local(value, option)
        return f"{option}={place if _PLAIN.fullmatch(place) else quote(place)}"

    def fetch_weights(self) -> None:
        """Fetches the weights of all models.

        Raises:
            ConfigError: They cannot be fetched.
        """
        for address, path in self.models.items():
            fetch_weights(address, path, Path(self.places[address]))

    @property
    def lines(self) -> list[str]:
        """A line for each address: where it lies, and so which commit it is."""
        return [f"hub: {address} is {place}" for address, place in self.places.items()]


def read_address(text: str, path: str) -> HubAddress:
    """Reads an address.

    Args:
        text: ``hf://org/name``, ``hf://org/name@revision`` or ``hf://datasets/org/name/*.parquet``.
        path: Option that has it.

    Raises:
        ConfigError: It has another form.
    """
    if (found := _FORM.fullmatch(text)) is None:
        remedy = "Write hf://ORG/NAME[@REVISION], or hf://datasets/ORG/NAME[@REVISION]/FILES for data."
        raise ConfigError.one(path, text, "it is no address on the Hugging Face hub", remedy)
    return HubAddress(found["name"], found["revision"], found["inside"] or "", bool(found["data"]))


def fetch_config(text: str, path: str, *, code: bool = False) -> Path:
    """Fetches a model's config, tokenizer and other small files; returns its folder in the cache.

    Args:
        text: Address of a model.
        path: Option that has it.
        code: Whether to fetch its code as well, which somebody has trusted.

    Raises:
        ConfigError: It is no model's address, or it cannot be fetched.
    """
    address = read_address(text, path)
    if address.is_data or address.inside:
        remedy = "Give hf://ORG/NAME[@REVISION] alone."
        raise ConfigError.one(path, text, "a model is a whole repository of models", remedy)
    folder = _fetch(address, text, path, [*_SMALL, *(["*.py"] if code else [])], _OTHER_FORMATS)
    if not (folder / "config.json").is_file():
        rule = "it has no config.json, so transformers cannot load it"
        raise ConfigError.one(path, text, rule, "Name a repository in the format of transformers.")
    return folder


def fetch_weights(text: str, path: str, folder: Path) -> None:
    """Fetches the weights of a model into the folder that `fetch_config` has returned.

    Raises:
        ConfigError: It has none as safetensors, or they cannot be fetched.
    """
    index = folder / _INDEX
    try:
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [_WHOLE]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError.one(
            path, text, f"its {_INDEX} is damaged ({error})", "Name another revision."
        ) from error
    address = read_address(text, path)
    # The commit that the folder is of, whatever its branch has become meanwhile.
    _fetch(HubAddress(address.name, folder.name, "", False), text, path, names)
    if missing := [name for name in names if not (folder / name).is_file()]:
        rule = f"it has no {missing[0]}: Graft reads weights as safetensors alone"
        raise ConfigError.one(
            path, text, rule, "Name a revision that has it, or convert it and give the folder."
        )


def fetch_data(text: str, path: str) -> str:
    """Fetches files of a dataset; returns the pattern of their places in the cache.

    Raises:
        ConfigError: It is no dataset's address, names no files, or cannot be fetched.
    """
    address = read_address(text, path)
    if not address.is_data or not address.inside:
        remedy = "Name the files: hf://datasets/ORG/NAME[@REVISION]/*.parquet."
        raise ConfigError.one(path, text, "data are files of a repository of datasets", remedy)
    folder = _fetch(address, text, path, [address.inside])
    if not any(folder.glob(address.inside)):
        raise ConfigError.one(path, text, "it has no such file", "See its files on its page of the hub.")
    return str(folder / address.inside)


def _fetch(
    address: HubAddress, text: str, path: str, wanted: Sequence[str], left: Sequence[str] = ()
) -> Path:
    """Fetches files of a repository into the hub's cache; returns the folder of the commit."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(
            address.name,
            repo_type="dataset" if address.is_data else "model",
            revision=address.revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(left) or None,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise ConfigError([_refusal(error, address, text, path)]) from error
    return Path(folder)


def _refusal(error: Exception, address: HubAddress, text: str, path: str) -> Mistake:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return Mistake(
            path, text, "its owner asks who reads it", "Accept on its page, then run: hf auth login."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        rule = "the hub has no such repository, or it is private"
        return Mistake(path, text, rule, "Check the name; for private ones run: hf auth login.")
    if isinstance(error, errors.RevisionNotFoundError):
        rule = f"it has no revision {address.revision}"
        return Mistake(path, text, rule, "Name a branch, a tag or a commit, or leave @REVISION out.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        rule = "it is not in the cache, and the hub cannot be reached"
        return Mistake(path, text, rule, "Fetch it where there is a network (hf download), or give a folder.")
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return Mistake(
        path, text, f"it cannot be fetched ({said})", "Try again, or give a folder of this machine."
    )
