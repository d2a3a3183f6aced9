"""The benchmark behind ``scripts/benchmark_attention.py``: attention against its peers, and whole models.

``inputs`` makes queries and keys of a chosen sparsity and measures it, ``implementations`` holds the peers and their
check, ``timing`` times one function, ``cases``, ``models`` and ``generation`` measure one case, ``report`` draws,
``command`` runs all.
"""
