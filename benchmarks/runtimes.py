"""Other runtimes on a CPU: the plain PyTorch AST in ONNX Runtime and OpenVINO, in their float and byte formats.

Each builder takes the network and an example input and returns a function of the input. Threads are those of PyTorch.
Byte formats are what each runtime's own tool makes of the model: ONNX Runtime quantises activations as they come, one
scale a tensor, and weights by output; OpenVINO's (through NNCF) fixes all scales beforehand on random inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .case import Skipped
from .peers import need

Infer = Callable[[Tensor], Tensor]
_CALIBRATION_INPUTS = 4


def _onnx(network: nn.Module, x: Tensor, folder: Path) -> Path:
    onnx = need("onnx")
    need("onnxscript")
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    model = program.model_proto
    # shapes noted on the way contradict those that the quantiser infers again
    model.graph.ClearField("value_info")
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def _session(path: Path) -> Infer:
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {entry: given.numpy()})[0])


def onnxruntime(network: nn.Module, x: Tensor) -> Infer:
    """ONNX Runtime in float32."""
    need("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        return _session(_onnx(network, x, Path(folder)))


def onnxruntime_int8(network: nn.Module, x: Tensor) -> Infer:
    """ONNX Runtime with dynamically quantised products."""
    quantization = need("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        source, target = _onnx(network, x, Path(folder)), Path(folder, "int8.onnx")
        quantization.quantize_dynamic(
            source, target, weight_type=quantization.QuantType.QInt8, per_channel=True
        )
        return _session(target)


def _compile(model: Any, precision: str) -> Infer:
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = need("openvino").Core().compile_model(model, "CPU", settings)
    return lambda given: torch.from_numpy(request([given.float().numpy()])[0])


def openvino(network: nn.Module, x: Tensor) -> Infer:
    """OpenVINO in float32."""
    return _compile(need("openvino").convert_model(network, example_input=x), "f32")


def openvino_bf16(network: nn.Module, x: Tensor) -> Infer:
    """OpenVINO in bfloat16."""
    return _compile(need("openvino").convert_model(network, example_input=x), "bf16")


def openvino_int8(network: nn.Module, x: Tensor) -> Infer:
    """OpenVINO with products quantised by NNCF, the rest in bfloat16."""
    nncf = need("nncf")
    if not torch.cpu._is_avx512_bf16_supported():
        raise Skipped("measured beside bfloat16 only, which this CPU lacks")
    draw = torch.Generator().manual_seed(0)
    seen = [torch.randn(x.shape, generator=draw) * 0.5 for _ in range(_CALIBRATION_INPUTS)]
    quantised = nncf.quantize(
        need("openvino").convert_model(network, example_input=x),
        nncf.Dataset([each.numpy() for each in seen]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=_CALIBRATION_INPUTS,
    )
    return _compile(quantised, "bf16")


def torch_int8(network: nn.Module, x: Tensor) -> Infer:
    """PyTorch's own dynamic quantisation of linear layers."""
    quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)

    def infer(given: Tensor) -> Tensor:
        with torch.no_grad():
            return quantised(given)

    return infer


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Infer]] = {
    "onnxruntime": onnxruntime,
    "onnxruntime-int8": onnxruntime_int8,
    "openvino": openvino,
    "openvino-bf16": openvino_bf16,
    "openvino-int8": openvino_int8,
    "torch-int8": torch_int8,
}
