"""The machine code of the GPU kernels, read without a GPU.

Rounding: no multiplication is fused with an addition. Speed: no register is spilled to memory, and where addresses
allow it a kernel with fixed types moves each operand by accesses as wide as csrc/kernel.h says.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from typing import NamedTuple

import cuda_toolkit
import pytest

from ires_kernels.backends import native

pytestmark = pytest.mark.xdist_group("sass")  # the kernels are read once
TARGETS = (80, 90, 100)
SIZES = {"bf16": 2, "f16": 2, "e4m3": 1, "f": 4}
INPUTS = {"Subtract": 2, "AddOne": 2, "Scale": 1, "AddDifference": 3}
FIXED = 18  # mixes of types with a kernel each; csrc/kernel.h lists them


class Kernel(NamedTuple):
    target: int
    name: str
    code: list[str]  # an instruction each, without its predicate

    def opcodes(self) -> Counter[str]:
        return Counter(instruction.split()[0] for instruction in self.code)


def test_the_extension_was_built_for_what_nvcc_knows() -> None:
    nvcc = cuda_toolkit.nvcc()
    if not nvcc:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    if os.environ.get("IRES_CUDA") == "0" or not native.isas():
        pytest.skip("the extension was to be built without GPU kernels, or not at all")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [number for number in TARGETS if f"sm_{number}" in listed.split()]
    assert native.cuda_built(), "nvcc is here and the extension has no GPU kernels; IRES_CUDA=1 pip install . says why"
    assert native._native.cuda_targets == ", ".join(f"sm_{number}" for number in known) + " and PTX"


def dump(option: str) -> str:
    tool = cuda_toolkit.cuobjdump()
    if not tool:
        pytest.skip("no cuobjdump on PATH, in the CUDA toolkit or in a Triton wheel")
    if not native.cuda_built():
        pytest.skip("the extension has no GPU kernels")
    done = subprocess.run([tool, option, native._native.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def all_kernels() -> list[Kernel]:
    found: list[Kernel] = []
    target = 0
    for line in dump("--dump-sass").splitlines():
        if head := re.match(r"\s*code for sm_(\d+)", line):
            target = int(head.group(1))
        elif head := re.match(r"\s*Function : (\S+)", line):
            found.append(Kernel(target, head.group(1), []))
        elif found and (code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ )?(.*?)\s*;", line)):
            found[-1].code.append(code.group(1))
    return found


@pytest.fixture(scope="module")
def kernels(all_kernels: list[Kernel]) -> list[Kernel]:
    """Those of the operations, without the one that decodes, in which a division is made of fused instructions."""
    return [kernel for kernel in all_kernels if "decoding" not in kernel.name]


def kind(name: str) -> str:
    found = re.search(r"(fixed|mixed|strided)_(nearest|stochastic)", name)
    assert found, name
    return found.group()


def types(name: str) -> tuple[str, list[str]]:
    """The operation of a kernel with fixed types, and the types of its operands, the output first."""
    found = re.search(r"MixINS_\d+(Subtract|AddOne|Scale|AddDifference)E((?:f|NS_\d\w+?_tE|S\d?_)+)E", name)
    assert found, name
    op, rest = found.groups()
    operands: list[str] = []
    struct = ""  # what the first S._ stands for
    for token in re.findall(r"f|NS_\d(\w+?)_tE|(S\d?_)", rest):
        struct = struct or token[0]
        operands.append(token[0] or (struct if token[1] else "f"))
    return op, operands[: INPUTS[op] + 1]


def shape(out: str, inputs: list[str]) -> tuple[int, int]:
    """How many neighbours a thread takes at a time, and how many times."""
    vector = min(16 // SIZES[out], 16 // min(SIZES[x] for x in inputs))
    return vector, 2 if vector * sum(SIZES[x] for x in inputs) >= 32 else 4


def test_every_kernel_is_there_for_every_target(kernels: list[Kernel]) -> None:
    targets = {kernel.target for kernel in kernels}
    tables = len({size for kernel in kernels for size in re.findall(r"TableILi(\d+)E", kernel.name)})
    assert tables in (1, 2)  # kernels take larger ones since CUDA 12.1
    assert {f"sm_{target}" for target in targets} == set(re.findall(r"sm_\d+", native._native.cuda_targets))
    for target in targets:
        counts = Counter(kind(kernel.name) for kernel in kernels if kernel.target == target)
        assert counts["fixed_nearest"] == FIXED * tables
        narrowing = [k for k in kernels if kind(k.name) == "fixed_nearest" and types(k.name)[1][0] != "f"]
        assert counts["fixed_stochastic"] * len(targets) == len(narrowing)
        others = [count for name, count in counts.items() if not name.startswith("fixed")]
        assert others == [2 * tables] * 4  # float and double
    assert len({(k.target, k.name) for k in kernels}) == len(kernels)


def test_nothing_is_fused(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        for instruction in kernel.code:
            name = instruction.split(".")[0].split()[0]
            assert name not in ("FFMA", "FFMA2", "DFMA", "FMAD"), f"sm_{kernel.target} {kernel.name}: {instruction}"
            # Half-precision ones load constants: -0 * 0 + constant.
            if name in ("HFMA2", "HFMA", "BFMA2"):
                assert re.search(r"R\d+, -RZ, RZ, ", instruction), f"sm_{kernel.target} {kernel.name}: {instruction}"


def test_the_ptx_holds_no_fma() -> None:
    ptx = dump("--dump-ptx")
    assert len(re.findall(r"\.entry\b", ptx)) >= FIXED
    assert not re.findall(r"\b(?:fma|mad)\.(?!lo|hi|wide|24)\S*", ptx)


def test_nothing_is_spilled(all_kernels: list[Kernel]) -> None:
    for kernel in all_kernels:
        spills = {opcode for opcode in kernel.opcodes() if opcode.startswith(("LDL", "STL"))}
        assert not spills, f"sm_{kernel.target} {kernel.name}"


def test_accesses_are_as_wide_as_they_can_be(kernels: list[Kernel]) -> None:
    """A thread takes as many neighbours as make 16 bytes of the output or of the narrowest operand, `unroll` times."""
    seen = set()
    for kernel in kernels:
        if not kind(kernel.name).startswith("fixed"):
            continue
        op, (out, *inputs) = types(kernel.name)
        seen.add((kernel.target, op, out, *inputs))
        vector, unroll = shape(out, inputs)
        wanted: Counter[str] = Counter()
        for where, operand in [("STG", out), *(("LDG", x) for x in inputs)]:
            size = vector * SIZES[operand]
            wanted[f"{where}.E.{min(size * 8, 128)}"] += unroll * max(1, size // 16)
        got = {name: n for name, n in kernel.opcodes().items() if re.fullmatch(r"(LDG|STG)\.E\.\S*(64|128|256)", name)}
        assert got == wanted, f"sm_{kernel.target} {op} {out} <- {inputs}"
        assert got["STG.E.128"] == unroll
    assert len(seen) == FIXED * len({kernel.target for kernel in kernels})


def test_mixed_types_go_by_wide_accesses_too(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kind(kernel.name).startswith("mixed"):
            assert kernel.opcodes()["LDG.E.128"] >= 3
            assert kernel.opcodes()["STG.E.128"] >= 2 or kind(kernel.name) == "mixed_stochastic"


def test_conversions_are_those_of_the_hardware(kernels: list[Kernel]) -> None:
    """Two neighbours by one instruction; one more for the elements that go one by one."""
    for kernel in kernels:
        if kind(kernel.name) != "fixed_nearest":
            continue
        _, (out, *inputs) = types(kernel.name)
        vector, unroll = shape(out, inputs)
        pairs = vector * unroll // 2 + 1
        opcodes = kernel.opcodes()
        stores = sum(n for name, n in opcodes.items() if re.fullmatch(r"F2FP\.(BF16|F16)?.*PACK_AB", name))
        assert stores == (pairs if SIZES[out] == 2 else 0), f"sm_{kernel.target} {kernel.name}"
        loads = sum(n for name, n in opcodes.items() if "E4M3" in name)
        assert loads == (pairs if "e4m3" in inputs and kernel.target >= 89 else 0), f"sm_{kernel.target} {kernel.name}"
