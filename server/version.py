"""What this server calls itself."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("headrace")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0+unknown"

SYSTEM_FINGERPRINT = f"headrace-{VERSION}"
