"""One short file a model family: its attention class with ASEntmax mixed in. Installed as ``hf_asentmax.patches``."""
