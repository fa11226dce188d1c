"""Certificates for tests, made on the spot."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from requirements import need_program


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate of localhost and 127.0.0.1, and its key."""

    cert_file: Path
    key_file: Path

    def trusted(self) -> ssl.SSLContext:
        """A client's context that trusts this certificate and no other."""
        return ssl.create_default_context(cafile=str(self.cert_file))


def make_certificate(folder: Path) -> Certificate:
    folder.mkdir(parents=True, exist_ok=True)
    certificate = Certificate(folder / "server.pem", folder / "server.key")
    openssl(
        *("req", "-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        *("-keyout", str(certificate.key_file), "-out", str(certificate.cert_file)),
    )
    return certificate


def openssl(*args: str) -> None:
    subprocess.run([need_program("openssl"), *args], capture_output=True, check=True)
