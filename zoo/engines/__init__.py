"""Run a model in another runtime with its own call: ONNX Runtime, OpenVINO, PyTorch's inductor.

`zoo.accelerate(model, engine="onnxruntime")` is what users call. Engines are built through `zoo.export`, kept on disk
by the digest of what the model computes, and compared with the model before their results are used.
"""

from zoo.engines.call import EngineCall, attach, detach, engine_of
from zoo.engines.runtimes import ENGINE_NAMES, ENGINES, EngineError, EngineName, check_engine, installed

__all__ = [
    "ENGINES",
    "ENGINE_NAMES",
    "EngineCall",
    "EngineError",
    "EngineName",
    "attach",
    "check_engine",
    "detach",
    "engine_of",
    "installed",
]
