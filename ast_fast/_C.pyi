from typing import Any

F32: int
BF16: int
I16: int
openmp: bool

def isa() -> str: ...
def isas() -> list[str]: ...

class LogMelTables:
    def __init__(self, *arguments: Any) -> None: ...

# the kernels: addresses, strides, sizes and dtype codes in the order of csrc/bindings.cpp
def __getattr__(name: str) -> Any: ...
