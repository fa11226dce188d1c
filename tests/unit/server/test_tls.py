"""TLS settings: what loads, and what is refused with the setting's name."""

from pathlib import Path

import pytest

from certificates import Certificate, make_certificate, openssl
from headrace.server.settings import SettingsError, load_settings
from headrace.server.tls import TlsError, load_tls

PASSWORD = "to the wheel"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def encrypted_key_file(certificate: Certificate) -> Path:
    encrypted = certificate.key_file.with_name("encrypted.key")
    openssl(
        *("pkcs8", "-topk8", "-passout", f"pass:{PASSWORD}"),
        *("-in", str(certificate.key_file), "-out", str(encrypted)),
    )
    return encrypted


def load(cert_file: Path, key_file: Path, password_file: Path | None = None) -> object:
    flags = ["--tls-cert-file", str(cert_file), "--tls-key-file", str(key_file)]
    if password_file is not None:
        flags += ["--tls-key-password-file", str(password_file)]
    return load_tls(load_settings(flags, {}))


def test_without_a_certificate_there_is_no_tls() -> None:
    assert load_tls(load_settings([], {})) is None


def test_a_certificate_and_its_key_load(certificate: Certificate) -> None:
    assert load(certificate.cert_file, certificate.key_file) is not None


def test_an_encrypted_key_opens_with_its_password_only(
    certificate: Certificate, encrypted_key_file: Path, tmp_path: Path
) -> None:
    password_file = tmp_path / "password"
    password_file.write_text(f"{PASSWORD}\n")
    assert load(certificate.cert_file, encrypted_key_file, password_file) is not None
    for wrong in ("guess", "", "x" * 2000):
        password_file.write_text(wrong)
        with pytest.raises(TlsError, match="tls_key_password_file"):
            load(certificate.cert_file, encrypted_key_file, password_file)
    with pytest.raises(TlsError, match="tls_key_password_file"):
        load(certificate.cert_file, encrypted_key_file)


@pytest.mark.parametrize("flag", ["--tls-cert-file", "--tls-key-file", "--tls-key-password-file"])
def test_half_a_pair_is_refused(flag: str) -> None:
    with pytest.raises(SettingsError, match=flag.removeprefix("--").replace("-", "_")):
        load_settings([flag, "file"], {})


@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file", "tls_key_password_file"])
@pytest.mark.parametrize("kind", ["missing", "a directory"])
def test_a_file_that_cannot_be_read_is_named(certificate: Certificate, tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path if kind == "a directory" else tmp_path / "missing.pem"
    files = {"tls_cert_file": certificate.cert_file, "tls_key_file": certificate.key_file, name: path}
    with pytest.raises(TlsError, match=f"^{name}: {path} cannot be read"):
        load(files["tls_cert_file"], files["tls_key_file"], files.get("tls_key_password_file"))


@pytest.mark.parametrize("algorithm", [["EC", "-pkeyopt", "ec_paramgen_curve:prime256v1"], ["ED25519"]])
def test_a_key_of_another_certificate_is_refused(
    certificate: Certificate, tmp_path: Path, algorithm: list[str]
) -> None:
    other = tmp_path / "other.key"
    openssl("genpkey", "-algorithm", *algorithm, "-out", str(other))
    with pytest.raises(TlsError, match=r"tls_key_file: .*other\.key is not the key of"):
        load(certificate.cert_file, other)


def test_files_that_hold_something_else_are_named(certificate: Certificate, tmp_path: Path) -> None:
    cert_file, key_file = certificate.cert_file, certificate.key_file
    with pytest.raises(TlsError, match=r"tls_cert_file: .* holds no certificate"):
        load(key_file, key_file)
    with pytest.raises(TlsError, match=r"tls_key_file: .* holds no private key"):
        load(cert_file, cert_file)
    damaged = tmp_path / "damaged.pem"
    damaged.write_text(cert_file.read_text().replace("MI", "!!", 1))
    with pytest.raises(TlsError, match="damaged"):
        load(damaged, key_file)
