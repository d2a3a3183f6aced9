"""`evaluate.Metric` modules; each loads from its file with `evaluate.load(path)`."""
