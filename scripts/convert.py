"""Turn a softmax checkpoint into an ASEntmax one, file by file: ``hf-asentmax convert`` from a source tree."""

from hf_asentmax.cli import script

if __name__ == "__main__":
    script("convert")
