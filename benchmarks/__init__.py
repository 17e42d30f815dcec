"""One script per claim; what they printed lies in `results/`."""
