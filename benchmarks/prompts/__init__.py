"""Benchmarks of prompt learners: a zoo of them, and what vetting, screening and repair make of it."""
