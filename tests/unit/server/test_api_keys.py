"""The key file: what it may hold, what is said where it is wrong, and never a key in what is said."""

import hashlib
import stat
from pathlib import Path

import pytest

from headrace.scheduler.messages import Tier
from headrace.server.api_keys import ApiKeys, ApiKeysError, append_key, create_key, read_key_file
from headrace.server.cli import main

SECRET = "hr-what-nobody-may-see"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
ENTRY = f'[[keys]]\nname = "alice"\nsha256 = "{DIGEST}"\n'


def write(path: Path, text: str) -> Path:
    file = path / "keys.toml"
    file.write_text(text)
    return file


def test_a_key_is_found_by_what_was_handed_out_and_by_nothing_else(tmp_path: Path) -> None:
    secret, bob = create_key("bob", Tier.PREMIUM)
    keys = ApiKeys(write(tmp_path, ENTRY + bob.as_toml()))
    alice = keys.find(SECRET.encode())
    assert alice is not None
    assert (alice.name, alice.tier) == ("alice", "standard")
    assert keys.find(secret.encode()) == bob
    for wrong in (b"", DIGEST.encode(), SECRET.encode() + b" ", SECRET.upper().encode(), b"\xff\x00", b"x" * 100_000):
        assert keys.find(wrong) is None
    assert keys.tenants == {"alice", "bob"}
    assert (keys.get("alice"), keys.get("bob"), keys.get("carol")) == (alice, bob, None)


def test_an_entry_that_says_no_more_has_the_usual_share_and_no_limits(tmp_path: Path) -> None:
    (alice,) = read_key_file(write(tmp_path, ENTRY))
    assert (alice.tier, alice.weight) == (Tier.STANDARD, 1.0)
    assert (alice.requests_per_minute, alice.tokens_per_minute, alice.max_concurrent) == (None, None, None)
    assert alice.as_toml() == ENTRY, "only what is not the default"


def test_what_an_entry_says_is_what_it_says_when_it_is_written_again(tmp_path: Path) -> None:
    limits = 'tier = "batch"\nweight = 2.5\nrequests_per_minute = 60\ntokens_per_minute = 100000\nmax_concurrent = 4\n'
    (alice,) = read_key_file(write(tmp_path, ENTRY + limits))
    assert (alice.tier, alice.weight) == (Tier.BATCH, 2.5)
    assert (alice.requests_per_minute, alice.tokens_per_minute, alice.max_concurrent) == (60, 100_000, 4)
    assert alice.as_toml() == ENTRY + limits
    assert read_key_file(write(tmp_path, alice.as_toml())) == (alice,)


@pytest.mark.parametrize(("weight", "read"), [("2", 2.0), ("1000", 1000.0), ("0.001", 0.001), ("1e-9", 1e-9)])
def test_a_weight_is_any_number_above_zero(tmp_path: Path, weight: str, read: float) -> None:
    (alice,) = read_key_file(write(tmp_path, f"{ENTRY}weight = {weight}"))
    assert alice.weight == read
    assert read_key_file(write(tmp_path, alice.as_toml())) == (alice,)


@pytest.mark.parametrize("weight", ["0", "-1", "1000.1", "inf", "nan", "true", '"1"'])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, weight: str) -> None:
    with pytest.raises(ApiKeysError, match=r"keys\[0\]: weight must be a number above 0 and at most 1000$"):
        read_key_file(write(tmp_path, f"{ENTRY}weight = {weight}"))


@pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute", "max_concurrent"])
@pytest.mark.parametrize("limit", ["0", "-1", "1.0", "inf", "true", '"1"', "[]"])
def test_a_limit_that_is_no_whole_number_is_refused(tmp_path: Path, field: str, limit: str) -> None:
    with pytest.raises(ApiKeysError, match=rf"keys\[0\]: {field} must be a whole number, at least 1$"):
        read_key_file(write(tmp_path, f"{ENTRY}{field} = {limit}"))


def test_fresh_keys_are_256_random_bits_and_all_different() -> None:
    secrets = {create_key("x")[0] for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret.removeprefix("hr-")) for secret in secrets} == {43}  # 32 bytes in base64


def test_a_file_without_keys_is_good_and_lets_nobody_in(tmp_path: Path) -> None:
    keys = ApiKeys(write(tmp_path, "# all revoked\n"))
    assert keys.tenants == set()
    assert keys.find(b"") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys = 1", r"\[\[keys\]\]"),
        ("keys = [1]", r"keys\[0\]: must be a table"),
        ("[keys]\nname = 'alice'", r"\[\[keys\]\]"),
        (f'{ENTRY}\n["{SECRET}"]', r"\[\[keys\]\] tables and nothing else"),
        (f'[["{SECRET}"]]\n["{SECRET}"]', "line 2"),
        (f'"{SECRET}" = "{SECRET}"\n"{SECRET}" = 1', "not valid TOML: at end of document"),
        (f"{SECRET}", "not valid TOML"),
        (f'[[keys]]\nname = "alice"\nsha256 = "{SECRET}"', r"keys\[0\]: sha256 must be 64"),
        (f'[[keys]]\nname = "alice"\nsha256 = "{DIGEST.upper()}x"', r"keys\[0\]: sha256 must be 64"),
        (f'[[keys]]\nname = "{SECRET}\\n"\nsha256 = "{DIGEST}"', r"keys\[0\]: name must be"),
        (f'[[keys]]\nsha256 = "{DIGEST}"', r"keys\[0\]: name must be"),
        ('[[keys]]\nname = "alice"', r"keys\[0\]: sha256 must be"),
        (f'{ENTRY}tier = "{SECRET}"', r"keys\[0\]: tier must be one of premium, standard, batch"),
        (f'{ENTRY}"{SECRET}" = 1', r"keys\[0\]: must be a table of nothing but name, sha256, tier, weight, "),
        (f'{ENTRY}[[keys]]\nname = "alice"\nsha256 = "{"0" * 64}"', r"keys\[1\]: its name is another key's"),
        (f'{ENTRY}[[keys]]\nname = "bob"\nsha256 = "{DIGEST}"', r"keys\[1\]: its sha256 is another key's"),
    ],
)
def test_a_file_that_is_wrong_says_where_and_repeats_no_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ApiKeysError, match=said) as wrong:
        read_key_file(write(tmp_path, text))
    assert SECRET not in str(wrong.value)
    assert "keys.toml" in str(wrong.value)
    assert wrong.value.__cause__ is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + SECRET.encode())
    for name in ("absent", "binary", "."):
        with pytest.raises(ApiKeysError, match="key file") as wrong:
            read_key_file(tmp_path / name)
        assert SECRET not in str(wrong.value)


def test_a_reload_takes_the_new_keys_or_keeps_all_the_old_ones(tmp_path: Path) -> None:
    file = write(tmp_path, ENTRY)
    keys = ApiKeys(file)
    secret, bob = create_key("bob")
    file.write_text(bob.as_toml())
    keys.reload()
    assert (keys.find(SECRET.encode()), keys.find(secret.encode())) == (None, bob)
    assert (keys.get("alice"), keys.get("bob")) == (None, bob)
    file.write_text(bob.as_toml() + "[[keys")
    with pytest.raises(ApiKeysError):
        keys.reload()
    assert keys.find(secret.encode()) == bob


def test_create_key_shows_the_key_and_the_lines_for_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["create-key", "alice", "--tier", "batch"]) == 0
    secret, _, lines = capsys.readouterr().out.partition("\n")
    found = ApiKeys(write(tmp_path, lines)).find(secret.encode())
    assert found is not None
    assert (found.name, found.tier) == ("alice", "batch")
    assert secret not in lines


def test_create_key_appends_to_a_file_of_its_owners_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    secrets = []
    for name in ("alice", "bob"):
        assert main(["create-key", name, "--file", str(file)]) == 0
        secrets.append(capsys.readouterr().out.strip())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = [ApiKeys(file).find(secret.encode()) for secret in secrets]
    assert [key and key.name for key in found] == ["alice", "bob"]
    assert not any(secret in file.read_text() for secret in secrets)


def test_create_key_leaves_a_file_alone_that_it_cannot_add_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, name in ((ENTRY, "alice"), ("keys = 1", "bob"), (ENTRY, "two words"), (ENTRY, "")):
        file = write(tmp_path, text)
        assert main(["create-key", name, "--file", str(file)]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("headrace: ")
        assert file.read_text() == text
    assert main(["create-key", "bob", "--file", str(tmp_path / "no" / "keys.toml")]) == 1
    with pytest.raises(ApiKeysError, match="letters"):
        append_key(file, create_key("a\nb")[1])


def test_a_file_that_does_not_end_its_last_line_can_be_added_to(tmp_path: Path) -> None:
    file = write(tmp_path, ENTRY.rstrip("\n"))
    append_key(file, create_key("bob")[1])
    assert ApiKeys(file).tenants == {"alice", "bob"}
