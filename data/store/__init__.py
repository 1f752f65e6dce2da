"""The logits store: what a teacher said of every epoch's images, and the seeds of their
augmentation.
"""

from data.store.format import record_dtype
from data.store.reader import LogitsStoreReader
from data.store.writer import LogitsStoreWriter

__all__ = ["LogitsStoreReader", "LogitsStoreWriter", "record_dtype"]
