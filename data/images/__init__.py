"""Images: which there are, and how one is opened."""
