"""Inside other people's training: what measures, chooses and rewards by the diversity of what a model learns from."""
