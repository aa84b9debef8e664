"""Attribution graphs of transformer language models in which every step between two tokens is visible."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the sibling folders graph/, kernels/ and replacements/ are our subpackages;
# in an installed copy they already lie beside this file.
if (_checkout := Path(__file__).resolve().parents[1]).joinpath("pyproject.toml").is_file():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from circuits.errors import CircuitsError
    from circuits.estimating import Estimate, estimate
    from circuits.explaining import Explanation, explain
    from circuits.feature_store import FeatureStore
    from circuits.generation import GeneratedText, generate
    from circuits.graph import Graph, GraphError
    from circuits.interventions import Bench, Change, Outcome, PatternChange, intervene
    from circuits.loading import Model, load
    from circuits.replacements.errors import ReplacementError
    from circuits.settings import TraceSettings
    from circuits.targets import Direction, FeatureTarget, TokenDifference, TokenTarget, TopTokens
    from circuits.tracing import trace
    from circuits.verification import verify
    from circuits.virtual_weights import partners

__version__ = "0.1.0"

__all__ = [
    "Bench",
    "Change",
    "CircuitsError",
    "Direction",
    "Estimate",
    "Explanation",
    "FeatureStore",
    "FeatureTarget",
    "GeneratedText",
    "Graph",
    "GraphError",
    "Model",
    "Outcome",
    "PatternChange",
    "ReplacementError",
    "TokenDifference",
    "TokenTarget",
    "TopTokens",
    "TraceSettings",
    "__version__",
    "estimate",
    "explain",
    "generate",
    "intervene",
    "load",
    "partners",
    "trace",
    "verify",
]

# Imported on first use, so that `circuits --help` does not wait for torch.
_HOMES = {
    "Bench": "circuits.interventions",
    "Change": "circuits.interventions",
    "CircuitsError": "circuits.errors",
    "Direction": "circuits.targets",
    "Estimate": "circuits.estimating",
    "Explanation": "circuits.explaining",
    "FeatureStore": "circuits.feature_store",
    "FeatureTarget": "circuits.targets",
    "GeneratedText": "circuits.generation",
    "Graph": "circuits.graph",
    "GraphError": "circuits.graph",
    "Model": "circuits.loading",
    "Outcome": "circuits.interventions",
    "PatternChange": "circuits.interventions",
    "ReplacementError": "circuits.replacements.errors",
    "TokenDifference": "circuits.targets",
    "TokenTarget": "circuits.targets",
    "TopTokens": "circuits.targets",
    "TraceSettings": "circuits.settings",
    "estimate": "circuits.estimating",
    "explain": "circuits.explaining",
    "generate": "circuits.generation",
    "intervene": "circuits.interventions",
    "load": "circuits.loading",
    "partners": "circuits.virtual_weights",
    "trace": "circuits.tracing",
    "verify": "circuits.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
