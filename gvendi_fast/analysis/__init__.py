"""From sketches to answers: scores, equal-n comparisons, neighbours, mixtures and other measures."""
