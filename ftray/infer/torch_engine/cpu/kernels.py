"""The kernels of kernels.c, compiled once for this machine by its gcc and kept in the user's cache.

Without gcc, without torch's OpenMP library, on a GPU, or in another dtype, there are none: torch's operations do the
same, slower. The kernels share torch's OpenMP threads: a second pool of threads would spin against the first.

Shapes: T tokens, H query heads, K key/value heads, D head dimension, n sequences, P pages of the longest.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm

from ftray.infer.torch_engine.cpu.huge_pages import HugePages
from ftray.infer.torch_engine.lora.slots import Factors
from ftray.storage.cache import cache_directory

SOURCE = Path(__file__).with_name("kernels.c")
# Where a chip has a * b + c as one operation every loop uses it, also where gcc would rather have two: a row's result,
# bit for bit, must not depend on the loop that computes it.
FUSED = ("-ffp-contract=fast", "--param=avoid-fma-max-bits=0")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", *FUSED, "-fPIC")
MAX_OUTPUTS, MAX_SEGMENTS = 2, 8  # as in the source
COLUMNS = 32  # of weights that lie side by side; as in the source
HEAD_LANES, MOST_HEAD_DIM = 16, 512  # attention takes heads of a multiple of so many dimensions, up to so many
COMPILE_TIMEOUT_S = 120


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, tuple(self.weight.shape), self.weight, self.epsilon)


class SegmentStruct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("output", "row", "num_rows", "column", "num_columns")]


class SlotsStruct(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("in_features", "rank", "num_segments", "half")],
        ("a", ctypes.c_void_p),
        ("bt", ctypes.c_void_p * MAX_OUTPUTS),
        ("rows", ctypes.c_int64 * MAX_OUTPUTS),
        ("blocks", ctypes.c_int64 * MAX_OUTPUTS),
        ("segments", SegmentStruct * MAX_SEGMENTS),
    ]


class AdaptersStruct(ctypes.Structure):
    """The adapters of one slab in a multiplication, and whose tokens are whose: spans (slot, first row, rows)."""

    _fields_ = [
        ("slots", ctypes.c_void_p),  # a `SlotsStruct`
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("reduced", ctypes.c_void_p),  # room for A x: a float for each token and row of A
    ]


AdaptersArray = ctypes.Array[AdaptersStruct]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("num_inputs", "num_outputs")],
        *[(name, ctypes.c_void_p) for name in ("weight", "bias")],
    ]


class Layers:
    """Linear layers of one shape, as the kernel reads them: from the first byte to the last, COLUMNS outputs
    at a time."""

    def __init__(self, structs: Sequence[LayerStruct], memory: Sequence[Tensor]):
        self.structs = (LayerStruct * len(structs))(*structs)
        self.in_features: int = self.structs[0].num_inputs
        self.out_features: int = self.structs[0].num_outputs
        self.following: Layers | None = None  # that the model computes next: fetched meanwhile
        self._memory = tuple(memory)

    @classmethod
    def packed(cls, weight_OI: Tensor, bias_O: Tensor | None, memory: HugePages | None = None) -> "Layers":
        """In `memory`, beside other layers."""
        num_outputs, num_inputs = weight_OI.shape
        blocks = -(-num_outputs // COLUMNS)
        memory = memory or HugePages()
        weight, bias = memory.floats(blocks * num_inputs * COLUMNS), memory.floats(blocks * COLUMNS).zero_()
        rows = weight_OI.detach().split(COLUMNS)
        for block_IC, some_CI in zip(weight.view(blocks, num_inputs, COLUMNS), rows, strict=True):
            block_IC[:, len(some_CI) :] = 0
            block_IC[:, : len(some_CI)] = some_CI.t()
        if bias_O is not None:
            bias[:num_outputs] = bias_O.detach()
        struct = LayerStruct(num_inputs, num_outputs, weight.data_ptr(), bias.data_ptr())
        return cls([struct], [weight, bias])

    def beside(self, other: "Layers") -> "Layers":
        return Layers([*self.structs, *other.structs], [*self._memory, *other._memory])


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def kernels_for(weight: Tensor) -> "CpuKernels | None":
    """What computes beside a model of such weights."""
    return compiled() if weight.device.type == "cpu" and weight.dtype == torch.float32 else None


@functools.cache
def compiled() -> "CpuKernels | None":
    gcc, openmp = shutil.which("gcc"), openmp_library()
    if gcc is None or openmp is None:
        return None
    library = library_path(gcc, openmp)
    try:
        if not library.is_file():
            build(gcc, openmp, library)
        return CpuKernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError):  # an old gcc, a full disk: slower, not wrong
        return None


def openmp_library() -> Path | None:
    """The one that torch has loaded (Linux)."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return next((Path(line.split()[-1]) for line in mapped if "/libgomp" in line), None)


def library_path(gcc: str, openmp: Path) -> Path:
    """Named by all that its content depends on: a home directory may be shared by unlike machines."""
    version = subprocess.run([gcc, "--version"], capture_output=True, text=True, check=False).stdout
    chip = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "model name"))]
    parts = [SOURCE.read_text(), *FLAGS, version, str(openmp), *chip[:2]]
    return cache_directory() / "kernels" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"


def build(gcc: str, openmp: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made, shared = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        # Compiled with OpenMP, linked without: -fopenmp would link the compiler's own library.
        compile_ = [gcc, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(made)]
        link = [gcc, "-shared", str(made), str(openmp), "-lm", "-o", str(shared)]
        for command in (compile_, link):
            subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(shared, library)


class CpuKernels:
    """Every tensor is float32 (indices int64, factors also bfloat16) and contiguous."""

    def __init__(self, library: Any):
        pointer, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

        def function(name: str, *types: Any) -> Any:
            found = getattr(library, name)
            found.argtypes, found.restype = types, None
            return found

        self._rms_norm = function("rms_norm", *[pointer] * 3, count, count, real)
        self._rotate_and_write_kv = function("rotate_and_write_kv", *[pointer] * 3, *[count] * 4, pointer, pointer)
        self._attend = function("attend_to_pages", *[pointer] * 5, *[count] * 7, real)
        self._attend_to_prompts = function("attend_to_prompts", *[pointer] * 5, *[count] * 7, real)
        self._linear = function(
            "linear", *[pointer, count] * 3, count, *[pointer, count] * 2, pointer, real, *[pointer] * 3
        )

    def rms_norm(self, x_TE: Tensor, norm: RmsNorm) -> Tensor:
        out = torch.empty_like(x_TE)
        rows, width = x_TE.shape
        self._rms_norm(x_TE.data_ptr(), norm.weight.data_ptr(), out.data_ptr(), rows, width, norm.epsilon)
        return out

    def rotate_and_write_kv_(
        self, heads: Tensor, cosine_TD: Tensor, sine_TD: Tensor, num_kv_heads: int, *, layer: Tensor | None, slots: Any
    ) -> None:
        """Rotary positions for the queries and keys of `heads` [T, H + 2K, D], in place; `sine_TD` has its first half
        negated. Keys and values go to places `slots` [T] of the cache's `layer`, if there is one."""
        tokens, num_heads, width = heads.shape
        kept = (0, 0) if layer is None else (layer.data_ptr(), slots.data_ptr())
        self._rotate_and_write_kv(
            *(heads.data_ptr(), cosine_TD.data_ptr(), sine_TD.data_ptr(), tokens),
            *(num_heads - 2 * num_kv_heads, num_kv_heads, width, *kept),
        )

    def attend_to_pages(
        self, query_nHD: Tensor, layer: Tensor, pages_nP: Tensor, lengths_n: Tensor, *, scaling: float
    ) -> Tensor:
        """[n, H, D]. `query_nHD` may lie among other heads. `layer`: [pages, tokens of a page, 2, K, D]."""
        return self._attention(self._attend, query_nHD, layer, pages_nP, lengths_n, scaling)

    def attend_to_prompts(
        self, query_THD: Tensor, layer: Tensor, pages_nP: Tensor, prompts_n3: Tensor, *, scaling: float
    ) -> Tensor:
        """[T, H, D]: tokens of n prompts, each of which sees what the cache has of its sequence up to itself.
        `prompts_n3`: first row, number of rows, tokens before them. The rest as for `attend_to_pages`."""
        return self._attention(self._attend_to_prompts, query_THD, layer, pages_nP, prompts_n3, scaling)

    def _attention(
        self, kernel: Any, query_THD: Tensor, layer: Tensor, pages_nP: Tensor, sequences_n: Tensor, scaling: float
    ) -> Tensor:
        _, num_heads, width = query_THD.shape
        assert query_THD.stride()[1:] == (width, 1)
        assert query_THD.dtype == layer.dtype == torch.float32
        out = floats(*query_THD.shape)
        kernel(
            *(query_THD.data_ptr(), layer.data_ptr(), pages_nP.data_ptr(), sequences_n.data_ptr(), out.data_ptr()),
            *(len(sequences_n), query_THD.stride(0), pages_nP.shape[1], layer.shape[1]),
            *(num_heads, layer.shape[3], width, scaling),
        )
        return out

    def linear(
        self,
        layers: "Layers",
        x: Tensor,
        *,
        norm: RmsNorm | None = None,
        residual: Tensor | None = None,
        adapters: "AdaptersArray | None" = None,
        output: int = 0,
        next_adapters: "AdaptersArray | None" = None,
    ) -> Tensor:
        """W x + b + B A x + residual, [..., O]; with a norm norm(x) in place of x. With two layers silu(of the first) *
        of the second. `output`: what the adapters' group calls the (first) layer's output. `next_adapters`: those of
        what is computed next, to be fetched."""
        x = x.contiguous()
        out = floats(*x.shape[:-1], layers.out_features)
        residual = residual.contiguous() if residual is not None else None
        assert x.dtype == torch.float32
        assert x.shape[-1] == layers.in_features
        assert norm is None or (norm.weight.dtype == torch.float32 and norm.weight.shape == x.shape[-1:])
        assert residual is None or (residual.dtype == torch.float32 and residual.shape == out.shape)
        normed = x if norm is None else torch.empty_like(x)
        norming = (None, 0.0, None) if norm is None else (norm.weight.data_ptr(), norm.epsilon, normed.data_ptr())
        following = () if layers.following is None else layers.following.structs
        self._linear(
            *(layers.structs, len(layers.structs), following or None, len(following)),
            *(next_adapters, 0 if next_adapters is None else len(next_adapters)),
            *(output, adapters, 0 if adapters is None else len(adapters)),
            *(x.data_ptr(), x.numel() // x.shape[-1]),
            *norming,
            *(None if residual is None else residual.data_ptr(), out.data_ptr()),
        )
        return out


def in_blocks(bt_RO: Tensor) -> Tensor:
    """[R, O] as the kernel reads it: [blocks of COLUMNS outputs, R, COLUMNS], zero behind the last output."""
    rank, num_outputs = bt_RO.shape
    padded = pad(bt_RO, (0, -num_outputs % COLUMNS))
    return padded.view(rank, padded.shape[1] // COLUMNS, COLUMNS).transpose(0, 1).contiguous()


def slots_struct(factors: Factors) -> SlotsStruct:
    """A slab's factors of one group, as the kernels take them. Valid while the slab lives."""
    struct = SlotsStruct(
        in_features=factors.a.shape[2],
        rank=factors.a.shape[1],
        num_segments=len(factors.segments),
        half=factors.a.dtype == torch.bfloat16,
        a=factors.a.data_ptr(),
    )
    for index, bt in enumerate(factors.bt):
        struct.bt[index], struct.blocks[index], struct.rows[index] = bt.data_ptr(), bt.shape[1], bt.shape[2]
    for index, segment in enumerate(factors.segments):
        struct.segments[index] = SegmentStruct(*segment)
    return struct
