"""What every room builds on: errors, files, progress, seeded draws. Nothing here knows of models, data or sketches."""
