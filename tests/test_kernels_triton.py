"""The Triton kernels: the bits of the reference in the interpreter, and code for a real GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(("dtype", "formats"), [("float32", 17), ("bfloat16", 9), ("float16", 9)])
def test_same_bits_as_the_reference(dtype: str, formats: int) -> None:
    script = Path(__file__).with_name("triton_interpreted.py")
    run = subprocess.run([sys.executable, script, dtype], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{formats} formats equal\n"


@pytest.mark.parametrize(
    ("bits", "layout", "stochastic", "pointer"),
    [(3, 0, False, "*i16"), (5, 1, True, "*i32"), (4, 2, True, "*i32")],
)
def test_compiles_for_a_gpu_without_fused_or_approximate_arithmetic(
    bits: int, layout: int, stochastic: bool, pointer: str
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dropit_fx.kernels import triton as kernels

    constants = {
        "DTYPE": 0 if pointer == "*i32" else 1,
        "BITS": bits,
        "LAYOUT": layout,
        "STOCHASTIC": stochastic,
        "SAMPLE": False,
        "FULL_": False,
        "COLUMNS": kernels.scale_columns(bits, layout),
        "LANES": 256,
    }
    pointers = {"x_ptr": pointer, "values_ptr": "*u8", "scale_ptr": "*i16", "mask_ptr": "*u8"}
    pointers |= {"seed_ptr": "*i64", "weight_full": "fp32", "weight_tail": "fp32"}
    names = kernels._sparsify_kernel.arg_names
    source = ASTSource(
        fn=kernels._sparsify_kernel,
        signature={n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    target, options = GPUTarget("cuda", 80, 32), {"enable_fp_fusion": False}
    ptx = triton.compile(source, target=target, options=options).asm["ptx"]
    assert ("sqrt.rn.f32" if layout < 2 else "div.rn.f32") in ptx
    assert "fma.rn" not in ptx
    for approximate in ("div.full", "div.approx", "sqrt.approx"):
        assert approximate not in ptx
