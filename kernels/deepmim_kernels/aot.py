"""Compile every kernel for NVIDIA GPUs without having one, and report what the compiler made.

    python -m deepmim_kernels.aot [--arch 80 90] [--json FILE]

The calls compiled are the launchers' own, made on meta tensors, so the report shows what training
would run: registers, stack and spilled bytes per thread, shared memory, access widths in bits.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepmim_kernels import _common
from deepmim_kernels.assemble import GRADIENT_ROWS, launch_assemble, launch_assemble_gradient
from deepmim_kernels.cosine import launch_masked_cosine
from deepmim_kernels.mse import launch_masked_mse
from deepmim_kernels.patches import launch_gather_patches

ARCHS = (70, 75, 80, 90, 100)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
}
MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.4), (0.229, 0.224, 0.225, 0.2, 0.2)


@dataclass(frozen=True)
class Row:
    """One compiled kernel; `loads` and `stores` count global accesses by width in bits."""

    kernel: str
    variant: str
    dtype: str
    arch: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


@dataclass(frozen=True)
class Compilation:
    """What a launch asks the compiler for."""

    source: ASTSource
    num_warps: int

    def run(self, arch: int) -> Any:
        """Compile for compute capability `arch`, as 70 for V100."""
        options = {"num_warps": self.num_warps}
        return triton.compile(self.source, target=GPUTarget("cuda", arch, 32), options=options)


def compilation(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any
) -> Compilation:
    """Specialize a launch as Triton does at run time: null, 1 and multiples of 16 are constants."""
    del grid
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = dict(constants)
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        # Triton compiles another kernel for each of these, so the report must follow its rules.
        if value is None or (isinstance(value, int) and value == 1):
            constexprs[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                # Without this promise the compiler emits no 128-bit accesses.
                attrs[(i,)] = [["tt.divisibility", 16]]
    ordered = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Compilation(ASTSource(kernel, ordered, constexprs, attrs), num_warps)


def compilation_of(call: Callable[[], None]) -> Compilation:
    """The compilation that one launcher call would trigger on a GPU."""
    launches: list[Compilation] = []
    # The launchers run as in training, up to the launch itself.
    _common.recorder = lambda *args, **kwargs: launches.append(compilation(*args, **kwargs))
    try:
        call()
    finally:
        _common.recorder = None
    # A call that made two launches would be reported by half.
    (launch,) = launches
    return launch


def mse_call(
    dtype: torch.dtype,
    *,
    patch: int = 16,
    packed: bool = True,
    pair: bool = False,
    image: torch.dtype = torch.uint8,
    channels: int = 3,
    rows: bool = True,
    grad: bool = True,
) -> None:
    """A `masked_mse` launch on 224 x 224 images: 147 of 196 patches at P = 16."""
    batch, side = 128, 224 // patch
    tokens, dim = (side**2 * 3 // 4 if packed else side**2 + 1), channels * patch**2
    mean, std = ((), ()) if image.is_floating_point else (MEAN[:channels], STD[:channels])
    empty = partial(torch.empty, device="meta")
    pred = empty(batch, tokens, dim, dtype=dtype)
    launch_masked_mse(
        empty(batch, tokens) if rows else None,
        torch.empty_like(pred) if grad else None,
        pred,
        # The values do not matter on meta tensors, only dtypes and null pointers.
        pred if pair else None,
        pred if pair else None,
        empty(batch, channels, 224, 224, dtype=image),
        None if packed else empty(batch, side**2),
        empty(batch, tokens, dtype=torch.int64) if packed else None,
        empty(()),
        None if packed else empty(()),
        patch_size=patch,
        prefix_tokens=0 if packed else 1,
        norm_pix=True,
        mix_alpha=0.5,
        mean=mean,
        std=std,
    )


def cosine_call(dtype: torch.dtype, *, packed: bool = True) -> None:
    """A `masked_cosine` launch against 197 tokens of 512 features."""
    batch, tokens = 128, 147 if packed else 197
    empty = partial(torch.empty, device="meta")
    pred = empty(batch, tokens, 512, dtype=dtype)
    launch_masked_cosine(
        empty(batch, tokens),
        torch.empty_like(pred),
        pred,
        empty(batch, 197, 512, dtype=dtype),
        None if packed else empty(batch, 196),
        empty(batch, tokens, dtype=torch.int64) if packed else None,
        empty(()),
        None if packed else empty(()),
        prefix_tokens=0 if packed else 1,
        teacher_prefix_tokens=1,
    )


def assemble_call(dtype: torch.dtype, *, backward: bool) -> None:
    """A `decoder_assemble` launch: 49 of 196 patches visible, 512 features."""
    empty = partial(torch.empty, device="meta")
    tokens, out = empty(128, 50, 512, dtype=dtype), empty(128, 197, 512, dtype=dtype)
    restore = empty(128, 196, dtype=torch.int64)
    if backward:
        partial_sums = empty(128, triton.cdiv(197, GRADIENT_ROWS), 512)
        launch_assemble_gradient(tokens, partial_sums, out, restore)
    else:
        launch_assemble(
            out, tokens, empty(1, 1, 512, dtype=dtype), empty(1, 197, 512, dtype=dtype), restore
        )


def gather_call(dtype: torch.dtype, *, uint8: bool = False) -> None:
    """A `gather_patches` launch: 49 patches of 16 x 16; `dtype` is that of the output."""
    empty = partial(torch.empty, device="meta")
    launch_gather_patches(
        empty(128, 49, 768, dtype=dtype),
        empty(128, 3, 224, 224, dtype=torch.uint8 if uint8 else dtype),
        empty(128, 49, dtype=torch.int64),
        patch_size=16,
        mean=MEAN[:3] if uint8 else (),
        std=STD[:3] if uint8 else (),
    )


def rescale_call(dtype: torch.dtype) -> None:
    """The late rescale of a one-pass gradient."""
    scalar = torch.empty((), device="meta")
    grad = torch.empty(128, 147, 768, dtype=dtype, device="meta")
    # The function beneath the custom op, which would not run on meta tensors.
    _common.rescale_._init_fn(grad, scalar, scalar)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "onepass p16 packed uint8": mse_call,
    "onepass p16 packed fp32 image": partial(mse_call, image=torch.float32),
    "onepass p16 packed uint16, 5 channels": partial(mse_call, image=torch.uint16, channels=5),
    "onepass p16 dense": partial(mse_call, packed=False),
    "onepass p16 pair hybrid": partial(mse_call, pair=True),
    "loss only p16": partial(mse_call, grad=False),
    "gradient only p16": partial(mse_call, rows=False),
    "onepass p8": partial(mse_call, patch=8),
    "onepass p14": partial(mse_call, patch=14),
    "onepass p32": partial(mse_call, patch=32),
    "packed d512": cosine_call,
    "dense d512": partial(cosine_call, packed=False),
    "forward d512": partial(assemble_call, backward=False),
    "backward d512": partial(assemble_call, backward=True),
    "gather p16": gather_call,
    "gather p16 uint8": partial(gather_call, uint8=True),
    "rescale": rescale_call,
}


def report(archs: tuple[int, ...] = ARCHS) -> Iterator[Row]:
    """Compile every case for every architecture; bf16 from compute capability 8.0 on."""
    for variant, call in CASES.items():
        for name, dtype in DTYPES.items():
            compilation = compilation_of(partial(call, dtype))
            for arch in archs:
                # No such instructions: the dispatcher sends these calls to the reference.
                if dtype == torch.bfloat16 and arch < 80:
                    continue
                compiled = compilation.run(arch)
                ptx = compiled.asm["ptx"]
                yield Row(
                    kernel=compilation.source.name.removesuffix("_kernel"),
                    variant=variant,
                    dtype=name,
                    arch=arch,
                    warps=compilation.num_warps,
                    shared=compiled.metadata.shared,
                    loads=access_widths("ld", ptx),
                    stores=access_widths("st", ptx),
                    **resources(compiled.asm["cubin"]),
                )


def access_widths(instruction: str, ptx: str) -> dict[int, int]:
    """How many global loads (`ld`) or stores (`st`) there are of each width in bits."""
    # e.g. `ld.global.L1::evict_last.v4.b32`: the vector length times the element.
    found = re.findall(rf"\b{instruction}\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return dict(sorted(Counter(int(n or 1) * int(bits) for n, bits in found).items()))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and spilled bytes per thread, as the bundled cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Asked of the binary itself, which is what would run.
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "spills": int(usage["LOCAL"]),
    }


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    header = [*Row.__dataclass_fields__]
    lines = [header]
    for row in rows:
        values = asdict(row)
        for key in ("loads", "stores"):
            values[key] = " ".join(f"{n}x{bits}" for bits, n in values[key].items())
        lines.append([str(values[key]) for key in header])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """Compile what the arguments ask for, print a table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args(argv)
    # Under the interpreter kernels are Python functions, of which nothing can be compiled.
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler; unset it", file=sys.stderr)
        return 2
    rows = list(report(tuple(args.arch)))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
