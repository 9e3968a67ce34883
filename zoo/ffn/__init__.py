"""Techniques that act on the feed-forward layers of any model, one a file."""
