"""Numbers of a model: accuracy, calibration, agreement, corruption, latency."""
