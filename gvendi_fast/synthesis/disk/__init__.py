"""What a synthesis run keeps on disk."""
