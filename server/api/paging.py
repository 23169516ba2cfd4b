"""Pages of a list by name: the token is the last name of the page before, so pages survive changes."""

import base64
import binascii

from millrace.server.errors import InvalidRequest


def page_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def page_name(token: str) -> str:
    """Raises InvalidRequest."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidRequest.at("page_token", "take next_page_token of the page before as it is") from None
