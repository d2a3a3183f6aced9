"""The attention methods of the papers, each as configuration values.

They are points of one grid: the map (softmax, its top k, entmax of a fixed or learned alpha), the query scale, and the
positions, which go with any of them: ``ASEntmaxConfig(**METHODS["ssmax"], positions="nape")``.
"""

from __future__ import annotations

from typing import Any

# top_k's k is a choice, not a law: attention_top_k sets another.
METHODS: dict[str, dict[str, Any]] = {
    "softmax": {"entmax_alpha": 1.0, "query_scaling": "none"},
    "ssmax": {"entmax_alpha": 1.0, "query_scaling": "log"},  # arXiv 2501.19399
    "adaptive_temperature": {"entmax_alpha": 1.0, "query_scaling": "none", "adaptive_temperature": True},  # 2410.01104
    "top_k": {"entmax_alpha": 1.0, "query_scaling": "none", "attention_top_k": 64},
    "entmax": {"entmax_alpha": 1.5, "query_scaling": "none"},  # 1905.05702
    "sparsemax": {"entmax_alpha": 2.0, "query_scaling": "none"},  # 1602.02068
    "learned_alpha": {"entmax_alpha": 1.5, "query_scaling": "none", "entmax_alpha_learned": True},  # 1909.00015
    "asentmax_static": {"entmax_alpha": 1.5, "query_scaling": "static"},
    "asentmax": {"entmax_alpha": 1.5, "query_scaling": "adaptive"},  # 2506.16640
    "asentmax_learned_alpha": {"entmax_alpha": 1.5, "query_scaling": "adaptive", "entmax_alpha_learned": True},
}
_SWITCHES = {"entmax_alpha_learned": False, "adaptive_temperature": False, "attention_top_k": None}


def method_settings(name: str) -> dict[str, Any]:
    """The configuration values of a method, those left out in ``METHODS`` at their defaults.

    Raises:
        ValueError: no method has that name.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return _SWITCHES | METHODS[name]


def method_name(config: Any) -> str:
    """What to call a model's attention: its name in ``METHODS``, else such as "entmax1.3-static" or "top_k8"."""
    if not hasattr(config, "entmax_alpha"):
        return "softmax"
    for name in METHODS:
        settings = method_settings(name)
        alpha = settings.pop("entmax_alpha")
        # A learned alpha's start says little, nor does a scheduled one's present value.
        any_alpha = config.entmax_alpha_learned or (name.startswith("asentmax") and config.entmax_alpha > 1)
        if (any_alpha or config.entmax_alpha == alpha) and all(getattr(config, k) == v for k, v in settings.items()):
            return name
    if config.attention_top_k is not None:
        name = f"top_k{config.attention_top_k}"
    elif config.adaptive_temperature:
        name = "adaptive_temperature"
    elif config.entmax_alpha_learned:
        name = "learned_alpha"
    else:
        name = "softmax" if config.entmax_alpha == 1 else f"entmax{config.entmax_alpha:g}"
    return name if config.query_scaling == "none" else f"{name}-{config.query_scaling}"
