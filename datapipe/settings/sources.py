"""Where settings come from: a file, variables, files that variables name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from datapipe.errors import ConfigError
from datapipe.settings.nats import NATS_FILES
from datapipe.settings.values import SECRETS, wrong

SYSTEM_FILE = Path("/etc/datapipe.json")

PLATFORM = {
    "PORT": "port",
    "DATABASE_URL": "database_url",
    "IRON_MQ_PROJECT_ID": "ironmq_project_id",
    "IRON_MQ_TOKEN": "ironmq_token",
    "IRON_MQ_HOST": "ironmq_host",
    "NATS_URL": "nats_url",
    "NATS_CREDS": "nats_creds",
}

_PREFIX = "DATAPIPE_"
FILE_VARIABLE = "DATAPIPE_CNF"  # names the settings file; `--config` goes before it


class Source(msgspec.Struct, frozen=True):
    """One source and what it gives.

    Attributes: typed: its values have types; else they are text or, for lists and objects, JSON.
    """

    name: str
    values: Mapping[str, Any]
    typed: bool = True


def named_file(env: Mapping[str, str]) -> Path | None:
    """The settings file that somebody named: relative paths start from its folder."""
    named = env.get(FILE_VARIABLE)
    return Path(named) if named else None


def file_sources(env: Mapping[str, str]) -> Iterator[Source]:
    """The file that is named, or the system's, if there is one. Raises: ConfigError."""
    path = named_file(env)
    if path or SYSTEM_FILE.exists():
        path = path or SYSTEM_FILE
        yield Source(f"file {path}", _content(path))


def variable_sources(env: Mapping[str, str], types: Mapping[str, inspect.Type]) -> Iterator[Source]:
    """The variables that are not empty, lowest first: each a source of its own.

    Args: types: of all settings, by their keys.
    Raises: ConfigError: a file that one names can't be read, or there are two for one key.
    """
    given = [(variable, key) for variable, key in PLATFORM.items() if env.get(variable)]
    ours = [
        (name, name.removeprefix(_PREFIX).lower())
        for name, text in env.items()
        if name.startswith(_PREFIX) and name != FILE_VARIABLE and text
    ]
    plain = {key for _, key in ours}
    for variable, key in (*given, *ours):
        source, text = f"variable {variable}", env[variable]
        of = key.removesuffix("_file")
        if key not in types and of in types:
            if of in plain:
                raise wrong(of, f"{_PREFIX}{of.upper()} is set, too: leave one of them", source)
            key, text = of, _held(of, text, source)
            source += f", file {env[variable]}"
        yield Source(source, {key: _decoded(types.get(key), key, text, source)}, typed=False)


def _held(key: str, file: str, source: str) -> str:
    """What a file holds, as mounted secrets come: text, without the end of its last line."""
    if key in NATS_FILES:  # as text it would be taken for a path, and shown
        raise wrong(key, f"it names a file already: set {_PREFIX}{key.upper()}", source)
    try:
        text = Path(file).read_bytes().decode().rstrip("\r\n")
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not text in UTF-8"
        raise wrong(key, f"the file {file!r} can't be read: {why}", source) from None
    if not text:  # not "unset": an empty list of keys would let anybody in
        raise wrong(key, f"the file {file!r} is empty", source)
    return text


def _content(path: Path) -> dict[str, Any]:
    decode, form = msgspec.json.decode, "JSON"
    if path.name.endswith(".toml"):
        decode, form = msgspec.toml.decode, "TOML"
    try:
        content = decode(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"the settings file {path} can't be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"the settings file {path} is not {form}: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"the settings file {path} must hold one JSON object")
    return content


def _decoded(kind: inspect.Type | None, key: str, text: str, source: str) -> Any:
    if key in SECRETS and re.search("[\udc80-\udcff]", text):  # as os.environ has other bytes
        raise wrong(key, "it is not text in UTF-8", source)
    if not isinstance(kind, inspect.ListType | inspect.DictType):
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        form = '["a", "b"]' if isinstance(kind, inspect.ListType) else '{"a": ...}'
        raise wrong(key, f"must be JSON, like {form}", source) from None
