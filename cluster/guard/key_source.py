"""Where keys come from: those given at the start, and a file that is read again whenever it changes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ConfigError
from cluster.guard.keys import ApiKey, KeyRing, check_keys, parse_keys

logger = logging.getLogger("shoal")
MAX_FILE_BYTES = 1 << 24


class KeySource:
    """`ring` is what holds now. Raises ConfigError at the start for a file that cannot be used.

    Later a file that is gone or wrong changes nothing: the last keys hold, and `problem` says why.
    """

    def __init__(self, fixed: Sequence[ApiKey] = (), file: Path | None = None) -> None:
        self._fixed = tuple(fixed)
        self._file = file
        self._seen: tuple[int, ...] = ()
        self.problem: str | None = None
        self.ring = KeyRing(self._read())

    def refresh(self) -> bool:
        """Reads the file if it is another than before; whether the ring has changed."""
        if self._file is None:
            return False
        try:
            if self._stamp() == self._seen:
                return False
            ring = KeyRing(self._read())
        except ConfigError as error:
            if str(error) != self.problem:
                logger.error("the API keys stay as they are: %s", error)
            self.problem = str(error)
            return False
        self.problem = None
        self.ring = ring
        logger.info("read %d API keys", len(ring.keys))
        return True

    def _read(self) -> tuple[ApiKey, ...]:
        if self._file is None:
            return self._fixed
        stamp = self._stamp()
        try:
            with self._file.open("rb") as file:
                text = file.read(MAX_FILE_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._file} (security.keys_file): cannot be read: {type(error).__name__}") from error
        keys = check_keys((*self._fixed, *parse_keys(text, str(self._file))), f"{self._file}: ")
        self._seen = stamp
        return keys

    def _stamp(self) -> tuple[int, ...]:
        """Changes with the content: a mounted Secret is a link to another file each time."""
        assert self._file is not None
        try:
            status = os.stat(self._file)
        except OSError as error:
            raise ConfigError(f"{self._file} (security.keys_file): cannot be read: {error.strerror}") from error
        return status.st_ino, status.st_mtime_ns, status.st_size
