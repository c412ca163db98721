"""Settings that name a transcoder: a folder, or a model repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from clt.config import STRICT
from clt.errors import ConfigError
from clt.hub.pretrained import is_hub_name, open_pretrained
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TranscoderChoice:
    """A transcoder by name; base class of jobs that load one."""

    clt: str
    """Transcoder: folder written by training or `save_pretrained`, or OWNER/NAME or OWNER/NAME@REVISION on the hub."""
    clt_revision: str | None = None
    """Branch, tag or commit of the hub repository; default: main."""
    clt_lazy: bool = False
    """Keep the decoders in their files, memory-mapped, and read the rows that are used; saves memory."""

    def load_transcoder(self, **how: Any) -> CrossLayerTranscoder:
        """Loads the transcoder that the settings name.

        Args:
            how: `layers`, `averaged`, `device` and `dtype`, as for `CrossLayerTranscoder.from_pretrained`.

        Returns:
            The transcoder, without gradients.

        Raises:
            ConfigError: `clt` is neither a folder nor of the form OWNER/NAME, or a revision of a folder is requested.
            CheckpointError, HubError: as for `CrossLayerTranscoder.from_pretrained`.
        """
        is_folder = Path(self.clt).is_dir()
        if not is_folder and not is_hub_name(self.clt):
            raise ConfigError(
                f"clt={self.clt}: no such folder, and not a repository name; give a folder or OWNER/NAME on the hub"
            )
        if is_folder and self.clt_revision is not None:
            raise ConfigError(
                f"clt_revision={self.clt_revision}: clt={self.clt} is a folder, which has no revisions; remove the key"
            )
        return open_pretrained(self.clt, revision=self.clt_revision, lazy=self.clt_lazy, **how)
