"""``python -m hf_asentmax``: the same as ``hf-asentmax``."""

from .cli import main

if __name__ == "__main__":
    main()
