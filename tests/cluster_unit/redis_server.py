"""A real redis-server of the test's own: on a free port, in a directory of its own, ended by its pid."""

import datetime
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.free_ports import free_port

BINARY = shutil.which("redis-server")
START_TIMEOUT_S = 10.0


@dataclass
class RedisServer:
    """`url` is what a user would configure. With `tls` it listens for TLS only, with a certificate made for the occasion.

    On another `host` than this machine's own loopback it wants a password.
    """

    directory: Path
    password: str | None = None
    tls: bool = False
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        login = f":{self.password}@" if self.password else ""
        scheme, query = ("rediss", f"?ssl_ca_certs={self.directory}/cert.pem") if self.tls else ("redis", "")
        return f"{scheme}://{login}{self.host}:{self.port}/0{query}"

    def start(self) -> "RedisServer":
        assert BINARY is not None
        ports = ["--port", str(self.port)]
        if self.tls:
            write_certificate(self.directory)
            files = [
                "--tls-cert-file",
                "cert.pem",
                "--tls-key-file",
                "key.pem",
                "--tls-ca-cert-file",
                "cert.pem",
                "--tls-auth-clients",
                "no",
            ]
            ports = ["--port", "0", "--tls-port", str(self.port), *files]
        login = ["--requirepass", self.password] if self.password else []
        command = [BINARY, "--bind", self.host, "--save", "", "--appendonly", "no", "--dir", str(self.directory), *ports, *login]
        self.process = subprocess.Popen(command, cwd=self.directory, stdout=subprocess.DEVNULL)
        until = time.monotonic() + START_TIMEOUT_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                except redis.ConnectionError:
                    assert self.process.poll() is None, "redis-server ended"
                    assert time.monotonic() < until, "redis-server did not start in time"
                    time.sleep(0.01)
                else:
                    return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> "RedisServer":
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def write_certificate(directory: Path) -> None:
    """cert.pem, which is its own authority, for 127.0.0.1, and key.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(private)
