"""Images: which there are, and how one is opened.

listing.py, scans.py: which images there are; layout.py: where they lie; reading.py, archives.py:
how one is opened; shards.py: both, for webdataset's tars and parquet; datasets.py: the data sets of
DATA.DATASET; shapes.py: the one that is drawn.
"""

from data.images.datasets import build_dataset

__all__ = ["build_dataset"]
