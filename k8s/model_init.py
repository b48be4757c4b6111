#!/usr/bin/env python3
"""Makes sure that whole checkpoints lie where a pod's model volume is, before Ray starts: an init container's command.

    shoal-model-init DeepSeek-V2-Lite                             /models/DeepSeek-V2-Lite is checked
    shoal-model-init --from /store DeepSeek-V2-Lite Mixtral-8x7B  what is not there yet is copied from /store first

The check takes every tensor that serving will take, without its bytes: shards that are missing, cut short or of another model are named.
A copy appears under its name when it is whole and checked, so whoever serves never sees half of one. Pods of one node that share a volume
wait for each other; a copy that was interrupted goes on where it was. Files of the same name and size are taken for the same: give other
weights another name. Exit status 1 and one sentence if a checkpoint cannot be had; with --wait the sentence, and another try until it can.
SIGTERM ends it at once with 143, also as a container's first process.
"""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from model.errors import ModelError
from model.loading import check_checkpoint

# What serving reads; a hub's repository has other formats of the same weights beside them.
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
FILES_AT_ONCE = 4
MARGIN = 1.01
RETRY_S = 10.0


class ModelInitError(Exception):
    """A checkpoint cannot be had: says which, why, and what to do."""


def main(arguments: list[str] | None = None, rest: Callable[[float], None] = time.sleep) -> int:
    """Exit status. `rest` is given the seconds between two tries of --wait."""
    parser = argparse.ArgumentParser(prog="shoal-model-init", description="Copies or checks the checkpoints of a model volume.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="directory of a checkpoint below --to, and below --from")
    parser.add_argument("--from", dest="store", type=Path, help="where to copy from what is not there yet [default: nothing is copied]")
    parser.add_argument("--to", dest="models", type=Path, default=Path("/models"), help="the model volume [default: /models]")
    parser.add_argument("--wait", action="store_true", help="try again every 10 s until the checkpoints are there and whole")
    given = parser.parse_args(arguments)
    said = ""
    while True:
        try:
            for name in given.names:
                provide(name, given.models, given.store)
        except (ModelInitError, ModelError, OSError) as error:
            sentence = f"shoal-model-init: {error}"
        else:
            return 0
        if sentence != said:
            print(sentence, file=sys.stderr, flush=True)
        if not given.wait:
            return 1
        said = sentence
        rest(RETRY_S)


def provide(name: str, models: Path, store: Path | None) -> None:
    """The checkpoint `name` below `models` is whole when this returns. ModelInitError, CheckpointError, UnsupportedModel or OSError."""
    if Path(name).name != name or name.startswith("."):
        raise ModelInitError(f"{name!r} is no name of a directory below {models}")
    place = models / name
    if store is not None:
        source = sizes(store / name)
        if not source:
            raise ModelInitError(f"{store / name} has no checkpoint to copy: expected config.json and safetensors files")
        with sole_writer(models, name):
            if sizes(place) != source:
                replace(place, store / name, source)
    check_checkpoint(place)
    print(f"{place} is whole: {sum(sizes(place).values()) / 1e9:.1f} GB", flush=True)


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint by its name; nothing where there is no such directory."""
    if not directory.is_dir():
        return {}
    return {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.suffix in SUFFIXES and file.is_file()}


def replace(place: Path, source: Path, wanted: dict[str, int]) -> None:
    """Copies beside the place, checks, and moves it in; what lay there before, or an older attempt has left over, goes."""
    partial = place.with_name(f".{place.name}.partial")
    partial.mkdir(exist_ok=True)
    present = sizes(partial)
    for name in present.keys() - wanted.keys():
        (partial / name).unlink()
    missing = {name: size for name, size in wanted.items() if present.get(name) != size}
    needed = int(MARGIN * sum(missing.values()))
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ModelInitError(f"{place.parent} has {free / 1e9:.1f} GB free, and {place.name} takes {needed / 1e9:.1f} GB more")
    print(f"copying {len(missing)} files, {sum(missing.values()) / 1e9:.1f} GB, from {source} to {place}", flush=True)
    with ThreadPoolExecutor(FILES_AT_ONCE) as copiers:
        for line in copiers.map(lambda name: copy(source / name, partial / name), missing):
            print(line, flush=True)
    check_checkpoint(partial)
    if place.exists():
        shutil.rmtree(place)
    partial.rename(place)


def copy(source: Path, target: Path) -> str:
    """One file under its name when all of it is on the disk, readable for everyone; a line that says so."""
    began = time.monotonic()
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.copyfile(source, unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.chmod(0o644)
    unfinished.rename(target)
    seconds, size = time.monotonic() - began, target.stat().st_size
    return f"  {target.name}  {size / 1e9:.2f} GB  {seconds:.1f} s  {size / 1e6 / max(seconds, 1e-3):.0f} MB/s"


@contextmanager
def sole_writer(models: Path, name: str) -> Iterator[None]:
    """Others that want the same checkpoint on the same volume wait until this one has it."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stop_at_once(number: int, _frame: object) -> None:
    """A handler. Nothing has to be put in order: a copy has no name before it is whole, and the kernel unlocks."""
    os._exit(128 + number)


if __name__ == "__main__":
    # The kernel keeps a signal without a handler from a container's first process, and a copier's thread would hold up sys.exit.
    signal.signal(signal.SIGTERM, stop_at_once)
    sys.exit(main())
