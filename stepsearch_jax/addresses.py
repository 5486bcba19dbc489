"""Addresses of servers, http://USER:PASSWORD@HOST, without the user and the password in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")


def hide_login(text: str) -> str:
    """The text; its addresses have no user and no password."""
    return _LOGIN.sub("", text)


def hide_logins(value: Any) -> Any:
    """A nested value of JSON; `hide_login` is applied to all of its strings but keys."""
    if isinstance(value, str):
        return hide_login(value)
    if isinstance(value, Mapping):
        return {key: hide_logins(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_logins(of_place) for of_place in value]
    return value
