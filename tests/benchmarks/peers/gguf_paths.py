"""Where a checkpoint's GGUF files are, and how they come there: llama.cpp's Python writes them."""

from pathlib import Path

from tests.benchmarks.peers.environments import PEERS_DIRECTORY, run_logged

CONVERT_TIMEOUT_S = 600.0


def gguf_of(checkpoint: Path, storage: str, python: Path) -> Path:
    """The file of this storage type, written if it is not there, whole or not at all. Raises PeerFailed."""
    path = PEERS_DIRECTORY / "gguf" / f"{checkpoint.name}-{storage}.gguf"
    if not path.exists():
        print(f"llama.cpp: {checkpoint.name} as {storage}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        command = [str(python), "-m", "tests.benchmarks.peers.gguf_file", str(checkpoint), str(partial), storage]
        run_logged(command, path.with_suffix(".log"), CONVERT_TIMEOUT_S, f"writing {path.name}")
        partial.rename(path)
    return path
