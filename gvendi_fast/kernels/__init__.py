"""The operations on gradients and sketches: definitions, verbs, and the backends that run them."""
