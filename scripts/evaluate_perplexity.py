"""Perplexity by context length and position: ``hf-asentmax evaluate perplexity`` from a source tree."""

from hf_asentmax.cli import script

if __name__ == "__main__":
    script("evaluate", "perplexity")
