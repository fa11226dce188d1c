"""Debian's nginx with the site in configs/nginx.conf, in front of a server under test."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from certificates import Certificate, make_certificate
from requirements import need_program
from waiting import until

SITE = Path(__file__).parents[2] / "configs" / "nginx.conf"
SERVER_NAME = "chat.example.org"

# What Debian's own nginx.conf puts around a site, with gzip more eager than there.
_MAIN = """
{user}
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 768; }}
http {{
    access_log off;
    gzip on;
    gzip_min_length 1;
    gzip_types *;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


@dataclass(frozen=True)
class Nginx:
    """Where it listens, and the certificate it shows."""

    url: str
    plain_url: str
    certificate: Certificate


@contextmanager
def nginx(folder: Path, upstream_port: int) -> Iterator[Nginx]:
    """Run nginx in front of a port; only addresses and paths of the committed site are changed."""
    program = need_program("nginx")
    certificate = make_certificate(folder)
    ports = {"80": _free_port(), "443": _free_port()}
    site = SITE.read_text()
    site = re.sub(r"^ *listen \[::\].*\n", "", site, flags=re.MULTILINE)
    site, num_listens = re.subn(r"listen (80|443)", lambda found: f"listen 127.0.0.1:{ports[found[1]]}", site)
    site, num_upstreams = re.subn(r"server 127\.0\.0\.1:8000;", f"server 127.0.0.1:{upstream_port};", site)
    site, num_keys = re.subn(r"/etc/ssl/private/\S+\.key", str(certificate.key_file), site)
    site, num_certificates = re.subn(r"/etc/ssl/private/\S+\.pem", str(certificate.cert_file), site)
    assert (num_listens, num_upstreams, num_keys, num_certificates) == (2, 1, 1, 1)
    (folder / "site.conf").write_text(site)
    user = "user root;" if os.geteuid() == 0 else ""  # the workers' temporary files lie in the test's folder
    (folder / "main.conf").write_text(_MAIN.format(user=user, folder=folder))
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "main.conf")])
    try:
        until(lambda: process.poll() is not None or _is_open(ports["443"]), "nginx listens")
        assert process.poll() is None, "nginx ended"
        yield Nginx(f"https://127.0.0.1:{ports['443']}", f"http://127.0.0.1:{ports['80']}", certificate)
    finally:
        process.terminate()
        process.wait(10)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
