"""A TCP forwarder before a server that can cut a connection in the middle of what the server says, or let nothing through."""

import socket
import threading
from contextlib import suppress


class FragileDoor:
    """Context manager; `address` is where to connect. Threads of its own, gone at the end."""

    def __init__(self, behind: str) -> None:
        host, port = behind.rsplit(":", 1)
        self._behind = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._cut_after_bytes: int | None = None
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.is_shut = False
        self.num_cut = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "FragileDoor":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._listener)
        self._drop_all()
        for thread in self._threads:
            thread.join(5.0)

    def cut_once(self, after_bytes: int) -> None:
        """Whatever is connected is dropped now; the next connection is when the server has said so many bytes on it."""
        with self._lock:
            self._cut_after_bytes = after_bytes
        self._drop_all()

    def _drop_all(self) -> None:
        with self._lock:
            dropped, self._open = self._open, []
        for one in dropped:
            _end(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._behind)
            with self._lock:
                self._open += [client, server]
                limit, self._cut_after_bytes = self._cut_after_bytes, None
            for source, target, most in ((client, server, None), (server, client, limit)):
                thread = threading.Thread(target=self._pump, args=(source, target, most), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        num_bytes = 0
        with suppress(OSError):
            while data := source.recv(4096):
                num_bytes += len(data)
                if most is not None and num_bytes > most:
                    self.num_cut += 1
                    break
                if not self.is_shut:
                    target.sendall(data)
        _end(source)
        _end(target)


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
