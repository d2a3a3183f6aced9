"""Exact match on a generated task by length: ``hf-asentmax evaluate synthetic`` from a source tree."""

from hf_asentmax.cli import script

if __name__ == "__main__":
    script("evaluate", "synthetic")
