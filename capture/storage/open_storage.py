"""Opens the files of a store, in a folder or behind a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from clt.capture.storage.base import Storage
from clt.capture.storage.local import LocalStorage
from clt.errors import StoreError

REMOTE_SCHEMES = ("memory", "s3", "gs", "az")


def open_storage(location: str | Path | Storage, *, durable: bool = True) -> Storage:
    """Opens the files of a store, which need not exist yet.

    Args:
        location: a folder, or a URL: file://, s3://, gs:// and az:// (bucket or container, then a prefix), or memory://
            with a name (one storage per name and process); an open storage is returned as it is.
        durable: False skips every fsync, for benchmarks; ignored by object stores.

    Returns:
        The storage.

    Raises:
        StoreError: the scheme is unknown, or the extra for object stores is not installed.
    """
    if isinstance(location, Storage):
        return location
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return LocalStorage(Path(location), durable)
    scheme = urlsplit(text).scheme
    if scheme == "file":
        return LocalStorage(Path(unquote(urlsplit(text).path)), durable)
    if scheme not in REMOTE_SCHEMES:
        raise StoreError(f"{text}: unknown kind of location; use a folder or one of {', '.join(REMOTE_SCHEMES)}://")
    try:
        from clt.capture.storage.object_store import ObjectStorage
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise StoreError(f"{text}: object stores need an extra; run pip install 'vlm-clt[remote]'") from None
    return ObjectStorage(text)
