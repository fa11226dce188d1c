"""The certificate and key in the settings, as the context of TLS connections.

Runs once on the main thread, before anything is loaded.
"""

import ssl
from pathlib import Path

from headrace.scheduler.errors import HeadraceError
from headrace.server.settings import Settings


class TlsError(HeadraceError):
    """The certificate or its key cannot be used; the message names the setting and the file."""


def load_tls(settings: Settings) -> ssl.SSLContext | None:
    """The context to serve with, None for plain HTTP. Raises: TlsError."""
    cert_file, key_file = settings.tls_cert_file, settings.tls_key_file
    if cert_file is None or key_file is None:
        return None
    _check_pem("tls_cert_file", cert_file, "certificate")
    _check_pem("tls_key_file", key_file, "private key")
    password_file = settings.tls_key_password_file
    password = "" if password_file is None else _read_text("tls_key_password_file", password_file).rstrip("\r\n")
    is_encrypted = False

    def give_password() -> str:  # without this, OpenSSL would ask the terminal
        nonlocal is_encrypted
        is_encrypted = True
        return password

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert_file, key_file, give_password)
    except (ssl.SSLError, ValueError) as error:  # the latter for a password of more than a kilobyte
        # The second reason is what OpenSSL has for a key of another type.
        if getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise TlsError(f"tls_key_file: {key_file} is not the key of the certificate {cert_file}") from None
        if is_encrypted:
            raise TlsError(f"tls_key_password_file: the password of {key_file} is missing or wrong") from None
        raise TlsError(f"tls_cert_file, tls_key_file: {cert_file} or {key_file} is damaged: {error}") from None
    return context


def _check_pem(name: str, path: Path, what: str) -> None:
    if f"{what.upper()}-----" not in _read_text(name, path):
        raise TlsError(f"{name}: {path} holds no {what} in PEM form")


def _read_text(name: str, path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise TlsError(f"{name}: {path} cannot be read: {error.strerror}") from None
