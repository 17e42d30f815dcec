"""Detection, speed and cost of the scan of training sets."""
