"""Pictures of what attention does: ``hf-asentmax plot`` from a source tree."""

from hf_asentmax.cli import script

if __name__ == "__main__":
    script("plot")
