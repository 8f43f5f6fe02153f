"""What every room stands on: progress, seeded draws; nothing here knows of models, data or sketches."""
