"""Addresses of tracking servers: which are allowed, and how to show them without a password."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
HIDDEN = "***"
# MLflow's own and those that its clients read.
SECRET_VARIABLES = (
    *VARIABLES[1:],
    "MLFLOW_TRACKING_URI",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY",
    "DATABRICKS_TOKEN",
    "PGPASSWORD",
    "MYSQL_PWD",
)
SHORTEST_SECRET = 4  # hiding a shorter one would hide half of every text
NAMES_OF_KEYS = (
    r"passw|passphrase|\bpass\b|pwd|token(?!s)|secret|credential|api_?key|access_?key|"
    r"\bauth(orization)?\b|signature|\bsig\b"
)
KEY_NAME = re.compile(NAMES_OF_KEYS, re.IGNORECASE)
# A user alone may be a token in an address of a server; a database's user is no secret.
USER_INFO = re.compile(
    r"(\bhttps?:/{2,4})[^\s'\"<>]*@|"
    r"(\b(?!sqlite:|file:)[a-z][a-z0-9+.-]*:/{2,4})[^\s'\"<>]*:[^\s'\"<>]*@",
    re.IGNORECASE,
)
WITHOUT_SCHEME = re.compile(r"(?<![\w.:/@-])[\w.+-]+:[^\s:/@'\"<>]+@(?=[\w\[])")
KEY_AND_VALUE = re.compile(
    rf"(\b[\w.%-]*(?:{NAMES_OF_KEYS})[\w.-]*(?:=|%3D))[^\s&;'\"<>]+", re.IGNORECASE
)
ABSOLUTE = re.compile(r"https?://|sqlite:////|(postgresql|mysql|mssql)\S*://", re.IGNORECASE)
HINT = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, "
    "in the environment instead"
)
DATABASE_HINT = "let the database's client read it, such as from PGPASSWORD or ~/.pgpass"


def check_address(address: str, name: str = "tracking_uri") -> str:
    """Return an address that is safe to keep and show: absolute, and without a password.

    Args:
        address: Of an MLflow server or database.
        name: What the user calls it.

    Raises:
        ValueError: If it is not. The message shows no password.

    Example:
        >>> check_address("http://127.0.0.1:5000")
        'http://127.0.0.1:5000'
    """
    if holds_secret(address):
        is_database = re.match(r"(postgresql|mysql|mssql|sqlite)", address, re.IGNORECASE)
        hint = DATABASE_HINT if is_database else HINT
        raise ValueError(
            f"{name} must hold no user or password, got {shown_address(address)!r}; {hint}"
        )
    # MLflow's default and relative files depend on the working directory; it refuses plain folders.
    if not ABSOLUTE.match(address):
        raise ValueError(
            f"{name} must be an absolute address, got {shown_address(address)!r}; "
            "give http://host:port or sqlite:////folder/file.db"
        )
    return address


def holds_secret(address: str) -> bool:
    """Say whether an address holds a password or a token, or what may be one.

    Example:
        >>> holds_secret("https://me:word@host"), holds_secret("http://host?token=word")
        (True, True)
        >>> holds_secret("postgresql://me@host/runs")
        False
        >>> holds_secret("sqlite:////data/me@work/runs.db")
        False
    """
    scheme, _, rest = address.partition(":")
    if scheme.lower() == "sqlite" and "?" not in rest:
        return False
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - a password with a slash in it is read as a port
    except ValueError:
        return "@" in address
    if scheme.lower().startswith("http") and "@" in address:
        return True  # a user alone may be a token
    outside = f"{parts.path}{parts.query}{parts.fragment}"
    if parts.password is not None or (scheme.lower() != "sqlite" and "@" in outside):
        return True
    given = [*parse_qsl(parts.query, keep_blank_values=True), *parse_qsl(parts.fragment)]
    return any(KEY_NAME.search(key) or KEY_AND_VALUE.search(unquote(value)) for key, value in given)


def shown_address(address: str) -> str:
    """Return an address in a form that is safe to show: without user, password, query and fragment.

    Example:
        >>> shown_address("https://me:word@host:5000/path?token=word")
        'https://***@host:5000/path?***'
    """
    bare, mark, _ = without_secrets(address).partition("#")[0].partition("?")
    return f"{bare}?{HIDDEN}" if mark else bare


def without_secrets(text: str) -> str:
    """Return a text, such as a traceback, without the passwords of addresses and environment.

    Example:
        >>> without_secrets("no answer from http://me:word@host/?token=word")
        'no answer from http://***@host/?token=***'
    """
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    text = WITHOUT_SCHEME.sub(f"{HIDDEN}@", text)
    text = USER_INFO.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}@", text)
    return KEY_AND_VALUE.sub(rf"\1{HIDDEN}", text)


def _secrets_of_environment() -> list[str]:
    """Return the passwords that the environment holds, the longest first."""
    found = set[str]()
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if name != "MLFLOW_TRACKING_URI":
            found.add(value)
        elif "://" in value and "@" in value:
            user_info = value.partition("://")[2].rpartition("@")[0]
            found |= {user_info, user_info.partition(":")[2]}
    found |= {unquote(value) for value in found}
    secrets = [value for value in found if len(value) >= SHORTEST_SECRET]
    return sorted(secrets, key=len, reverse=True)
