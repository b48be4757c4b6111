"""`shoal keys new`: an entry more in a keys file."""

import os
import tempfile
from pathlib import Path

from cluster.errors import ConfigError
from cluster.guard.keys import ApiKey, entry_text, parse_keys

HEAD = "# API keys of Shoal: hashes, not the keys. Gateways read this again when it changes; to revoke a key, take out its entry.\nkeys:\n"


def add_key(file: Path, entry: ApiKey) -> None:
    """Adds it to the file, which is made if need be. Never half written: a gateway may read it at any time.

    Raises ConfigError for a file that cannot be read or written, and for an id that is taken.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else HEAD
        if any(key.id == entry.id for key in parse_keys(text, str(file))):
            raise ConfigError(f"{file} has a key {entry.id} already: choose another name, or take its entry out first")
        text = (text if text.endswith("\n") else text + "\n") + entry_text(entry)
        parse_keys(text, str(file))
        _replace(file, text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read and written: {error}") from error


def _replace(file: Path, text: str) -> None:
    file = file.resolve()
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}-", delete=False, encoding="utf-8") as new:
        new.write(text)
    os.chmod(new.name, mode)
    os.replace(new.name, file)
