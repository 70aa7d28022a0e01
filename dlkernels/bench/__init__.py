"""Measuring: interleaved timing, the machine and its limits, correctness against float64, and the suite over OPS."""
