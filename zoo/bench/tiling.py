"""Whether restoration stays within its memory budget."""
