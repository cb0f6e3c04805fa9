"""Finds the folders of choices: Graft's own ``conf``, and beside it those of the user.

Graft's own come first, so that no file that lies about changes what a run computes: of two files of one name
the user's is refused where it is chosen, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from moe.errors import Mistake
from recipes.runtime.source_root import SOURCE_ROOT

CONF = SOURCE_ROOT / "conf"
SEARCH_PATH = "hydra.searchpath"
_FILE = "file://"


def search_path(overrides: Sequence[str] = ()) -> list[str]:
    """Returns what follows Graft's ``conf``: ``conf`` of the working folder, then ``hydra.searchpath``.

    Args:
        overrides: Readable ones of the command line.
    """
    own = Path.cwd() / "conf"
    found = [f"{_FILE}{own}"] if own.is_dir() and not own.samefile(CONF) else []
    for override in overrides:
        if override.lstrip("+").startswith(f"{SEARCH_PATH}="):
            value = OverridesParser.create().parse_override(override).value()
            entries = [str(entry) for entry in (value if isinstance(value, list) else [value])]
            found += [e if "://" in e else f"{_FILE}{Path(e).expanduser().absolute()}" for e in entries]
    return found


def conf_folders(overrides: Sequence[str] = ()) -> list[Path]:
    """Returns every folder of choices, Graft's first."""
    added = [Path(entry.removeprefix(_FILE)) for entry in search_path(overrides) if entry.startswith(_FILE)]
    return [CONF, *added]


def choices_of(group: str, overrides: Sequence[str] = ()) -> dict[str, Path]:
    """Returns the files of a group by their names, in order."""
    if not group or Path(group).is_absolute():
        return {}
    files = [file for folder in reversed(conf_folders(overrides)) for file in (folder / group).glob("*.yaml")]
    return dict(sorted((file.stem, file) for file in files))


def check_search_path(overrides: Sequence[str]) -> list[Mistake]:
    """Checks that folders of ``hydra.searchpath`` exist."""
    remedy = "Create it, or name another."
    return [
        Mistake(SEARCH_PATH, str(folder), "there is no such folder", remedy)
        for folder in conf_folders(overrides)[1:]
        if not folder.is_dir()
    ]


def check_shadows(
    choices: Mapping[str, str | Sequence[str] | None], overrides: Sequence[str]
) -> list[Mistake]:
    """Rejects choices of the user's that have the name of one of Graft's, and other content.

    Args:
        choices: What was chosen, by group.
        overrides: Those of the command line.
    """
    mistakes = []
    for group, chosen in choices.items():
        for name in [chosen] if isinstance(chosen, str) else chosen or ():
            own = CONF / group / f"{name}.yaml"
            for folder in conf_folders(overrides)[1:]:
                file = folder / group / f"{name}.yaml"
                if file.is_file() and own.is_file() and file.read_bytes() != own.read_bytes():
                    rule = f"{file} has the name of one of Graft's own, which would be taken"
                    mistakes.append(Mistake(group, name, rule, "Rename it."))
    return mistakes
