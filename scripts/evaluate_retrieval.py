"""Facts hidden in text, by length and depth: ``hf-asentmax evaluate retrieval`` from a source tree."""

from hf_asentmax.cli import script

if __name__ == "__main__":
    script("evaluate", "retrieval")
