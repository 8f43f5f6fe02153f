"""Candidates that are left out: known test sets, paraphrases."""
