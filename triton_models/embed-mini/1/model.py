"""A build for embeddings; the code is services/inference/backend (its docstring says how it is found)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

from services.inference.backend.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
