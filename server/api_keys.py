"""API keys: the file that lists them, what a request presents, and making new ones.

Lives on the event loop. The file holds SHA-256 digests only. A fast hash is right here: a key is 256 random bits, which
no dictionary holds and nobody can try out; a slow one would let strangers keep the loop busy. Comparing digests takes
the same time whatever they are, and every entry is compared.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.messages import Tier

logger = logging.getLogger(__name__)

TIERS = tuple(tier.value for tier in Tier)

_Limit = Annotated[int, Field(ge=1)] | None


class ApiKeysError(HeadraceError):
    """The key file cannot be read or is not as it should be. The message repeats nothing that could be a key."""


class ApiKey(BaseModel):
    """An entry: `name` is the tenant, whose streams and tickets are its own.

    `weight` is the tenant's share inside its tier, against those of the tier's others. `tokens_per_minute` counts
    prompt and output alike, `max_concurrent` the answers that run or wait at once; a limit that is None is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tier: Annotated[Tier, Field(strict=False)] = Tier.STANDARD  # in TOML a string
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    max_concurrent: _Limit = None

    def as_toml(self) -> str:
        """Its table, of what is not the default."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        # JSON writes these strings and numbers as TOML does.
        return "[[keys]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


class ApiKeys:
    """The keys of a file, as they were when it was last read well."""

    def __init__(self, path: Path) -> None:
        """Raises: ApiKeysError."""
        self._path = path
        self.reload()

    @property
    def tenants(self) -> frozenset[str]:
        return frozenset(self._keys)

    def reload(self) -> None:
        """Read the file again. Raises: ApiKeysError, and the keys stay as they were."""
        self._keys = {key.name: key for key in read_key_file(self._path)}

    def get(self, tenant: str) -> ApiKey | None:
        """The entry of a tenant, None where there is none any more."""
        return self._keys.get(tenant)

    def find(self, presented: bytes) -> ApiKey | None:
        """The entry of a key as it stands in a header."""
        digest = hashlib.sha256(presented).hexdigest()
        found = None
        for key in self._keys.values():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def reload_keys(keys: ApiKeys | None) -> bool:
    """Read the key file again, if there is one, and log how that went; returns whether it went well."""
    if keys is None:
        logger.info("there is no key file to read again")
        return False
    try:
        keys.reload()
    except ApiKeysError as error:
        logger.error("the keys stay as they were: %s", error)
        return False
    logger.info("read the key file again: %d keys", len(keys.tenants))
    return True


def create_key(name: str, tier: Tier = Tier.STANDARD) -> tuple[str, ApiKey]:
    """A fresh key, which is kept nowhere, and its entry. Raises: ApiKeysError for a name that is none."""
    secret = f"hr-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, _validate({"name": name, "sha256": digest, "tier": tier}, "")


def append_key(path: Path, key: ApiKey) -> None:
    """Add an entry to a file, which is made if need be, for its owner's eyes only. Raises: ApiKeysError."""
    if path.exists() and key.name in {other.name for other in read_key_file(path)}:
        raise ApiKeysError(f"{path} has a key called {key.name!r} already")
    entry = key.as_toml()
    try:
        before = path.read_text() if path.exists() else ""
        tomllib.loads(f"{before}\n{entry}")
    except (OSError, ValueError):
        raise ApiKeysError(f"{path} is not a file of [[keys]] tables that another can be added to") from None
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(("\n" if before else "") + entry)
    except OSError as error:
        raise ApiKeysError(f"cannot write {path}: {error.strerror}") from None


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """Raises: ApiKeysError. A file without keys is a good one: nobody has access."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ApiKeysError(f"cannot read the key file {path}: {error.strerror}") from None
    except ValueError as error:
        # Of the parser's message only the place: the rest may quote the line.
        place = str(error).rpartition("(")[2].rstrip(")") if isinstance(error, tomllib.TOMLDecodeError) else "no text"
        raise ApiKeysError(f"the key file {path} is not valid TOML: {place}") from None
    entries = content.pop("keys", [])
    if content or not isinstance(entries, list):
        raise ApiKeysError(f"the key file {path} must hold [[keys]] tables and nothing else")
    keys = tuple(_validate(entry, f"{path}: keys[{i}]: ") for i, entry in enumerate(entries))
    for field in ("name", "sha256"):
        seen: set[str] = set()
        for i, key in enumerate(keys):
            if getattr(key, field) in seen:
                raise ApiKeysError(f"{path}: keys[{i}]: its {field} is another key's too")
            seen.add(getattr(key, field))
    return keys


_EXPECTED = {
    "name": "name must be 1 to 64 letters, digits and `._-`, a letter or digit first",
    "sha256": "sha256 must be 64 lower-case hexadecimal digits",
    "tier": f"tier must be one of {', '.join(TIERS)}",
    "weight": "weight must be a number above 0 and at most 1000",
    "requests_per_minute": "requests_per_minute must be a whole number, at least 1",
    "tokens_per_minute": "tokens_per_minute must be a whole number, at least 1",
    "max_concurrent": "max_concurrent must be a whole number, at least 1",
}
_TABLE = f"must be a table of nothing but {', '.join(ApiKey.model_fields)}"


def _validate(entry: object, place: str) -> ApiKey:
    try:
        return ApiKey.model_validate(entry)
    except ValidationError as error:
        field = next(iter(error.errors()[0]["loc"]), None)
        raise ApiKeysError(place + _EXPECTED.get(str(field), _TABLE)) from None
