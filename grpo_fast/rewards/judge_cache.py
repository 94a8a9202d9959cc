"""Replies that need not be asked for again, by the content of the question: in memory and, if wanted, in files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any


def key_of(question: dict[str, Any]) -> str:
    """A name for a question, the same for the same content; 64 hexadecimal digits."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class ReplyCache:
    """Keeps the replies that were read last, and all of them where there is a folder.

    Processes may share a folder: a file is written under another name first, and one that cannot be read is as if it
    were not there.
    """

    def __init__(self, folder: str | Path | None, size: int) -> None:
        """Nothing is read.

        Args:
            folder: Made at the first reply; None keeps nothing beyond the process.
            size: Replies kept in memory.
        """
        self._folder, self._size = None if folder is None else Path(folder), size
        self._replies: OrderedDict[str, str] = OrderedDict()

    def get(self, key: str) -> str | None:
        """The reply, or None."""
        if key not in self._replies:
            reply = self._read(key)
            if reply is None:
                return None
            self._keep(key, reply)
        self._replies.move_to_end(key)
        return self._replies[key]

    def put(self, key: str, reply: str) -> None:
        """Keep a reply.

        Raises:
            OSError: If the folder cannot be written.
        """
        self._keep(key, reply)
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"reply": reply}, file)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise

    def _keep(self, key: str, reply: str) -> None:
        self._replies[key] = reply
        self._replies.move_to_end(key)
        while len(self._replies) > self._size:
            self._replies.popitem(last=False)

    def _read(self, key: str) -> str | None:
        if self._folder is None:
            return None
        try:
            reply = json.loads(self._path(self._folder, key).read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reply if isinstance(reply, str) else None

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"
