"""Google's storage in memory, as `gs://` paths ask etils and fsspec for it."""

from etils.epath.backend import _FileSystemSpecBackend
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def glob(self, path, **how):
        return [found.lstrip("/") for found in super().glob(path, **how)]


def use_bucket(monkeypatch) -> Bucket:
    """An empty one, for all that a test asks of `gs://`."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    bucket = Bucket()
    monkeypatch.setattr(_FileSystemSpecBackend, "_get_filesystem", lambda *_: bucket)
    return bucket
