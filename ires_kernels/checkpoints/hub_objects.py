"""Files of weights on the Hub, read where they are: each is resolved once to the address of its bytes, and on expiry.

The Hub tells for a name at a commit what its bytes are, their hash and size, and an address for them, most often signed
and at another host. The token goes to the Hub alone.
"""

from __future__ import annotations

from typing import Any

from ires_kernels.checkpoints.addresses import Address, Changed, Unreachable
from ires_kernels.checkpoints.objects import Object, Pin, store_at


class HubObject(Object):
    """A file at a commit."""

    expires = True

    def __init__(self, library: Any, repo: str, commit: str, name: str) -> None:
        super().__init__(f"hf+stream://{repo}@{commit}/{name}")
        self._library = library
        self._url = library.hf_hub_url(repo, name, revision=commit)
        self._commit = commit
        self._resolved: Pin | None = None

    def asked(self) -> tuple[Any, str]:
        try:
            found = self._library.get_hf_file_metadata(self._url)
        except Exception as error:  # of the library, or of what it asks with
            raise Unreachable(self.where, f"the Hub does not tell where it is ({type(error).__name__})") from None
        if found.size is None or not found.etag or found.commit_hash not in (None, self._commit):
            raise Unreachable(self.where, "the Hub does not tell what it is")
        pin = Pin(found.size, found.etag, "")
        if self._resolved not in (None, pin):
            raise Changed(self.where)
        self._resolved = pin
        address, hub = Address.of(found.location), Address.of(self._url)
        headers = {}
        if (address.scheme, address.host) == (hub.scheme, hub.host):
            known = {key.lower(): value for key, value in self._library.utils.build_hf_headers().items()}
            headers = {"Authorization": known["authorization"]} if "authorization" in known else {}
        return store_at(address, **headers), ""

    def match(self, pin: Pin | None) -> dict[str, str]:  # noqa: ARG002
        """The name is pinned; where the bytes are they have another tag."""
        return {}

    def check(self, now: Pin, pin: Pin | None) -> Pin:  # noqa: ARG002
        assert self._resolved is not None
        if now.size != self._resolved.size:
            raise Changed(self.where)
        return self._resolved
