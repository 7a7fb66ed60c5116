"""Builds the one extension. Everything else about the package is in pyproject.toml.

IRES_NATIVE=0 installs without it (the reference backend remains); IRES_NATIVE=1 makes a failing build an error.
Otherwise a machine without a C++ compiler gets a working, slower package and `ires_kernels.backends()` says why.

The extension has GPU kernels where nvcc is found: in CUDA_HOME, on PATH, or in /usr/local/cuda. IRES_CUDA=0 leaves them
out, IRES_CUDA=1 makes their absence an error.

IRES_SANITIZE=address,undefined builds with these sanitizers, for tests/sanitize.py.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Rounding is part of the contract: no contraction to fma. Without trapping math the conversions vectorise.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
# The last two are for immintrin.h.
FLAGS += ["-pthread", "-g0", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SANITIZE = [f"-fsanitize={os.environ['IRES_SANITIZE']}"] if os.environ.get("IRES_SANITIZE") else []
if SANITIZE:
    FLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
# loops.cpp is compiled once per entry: name (csrc/cpu.cpp lists the same) -> flags.
ISAS = {"v4": ["-march=x86-64-v4"], "v3": ["-march=x86-64-v3"], "v2": ["-march=x86-64-v2"]}
if platform.machine().lower() not in ("x86_64", "amd64"):
    ISAS = {"portable": []}

NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
# Machine code for each of these that nvcc knows, and PTX of the last one for what comes after.
ARCHITECTURES = ("80", "90", "100")


class NoCuda(Exception):
    """Why there are no GPU kernels."""


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(path) for path in [shutil.which("nvcc")] if path]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    raise NoCuda("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")


def nvcc_output(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCuda(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def architectures(nvcc):
    """What to compile for, as nvcc's options and in words."""
    known = set(re.findall(r"sm_(\d+)", nvcc_output(nvcc, "--list-gpu-code")))
    chosen = [number for number in ARCHITECTURES if number in known]
    if not chosen:
        raise NoCuda(f"{nvcc} compiles for none of the architectures {', '.join(ARCHITECTURES)}")
    options = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in chosen]
    options.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    return options, ", ".join(f"sm_{n}" for n in chosen) + " and PTX"


def static_runtime(nvcc, folder):
    """libcudart_static.a of the toolkit that nvcc belongs to; the nvcc on PATH can be a wrapper."""
    empty = Path(folder, "empty.cu")
    empty.write_text("")
    top = re.search(r"^#\$ TOP=(.*)$", nvcc_output(nvcc, "--dryrun", "-c", str(empty)), re.MULTILINE)
    root = Path(top.group(1).strip()) if top else Path(nvcc).parent.parent
    for place in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = root / place / "libcudart_static.a"
        if library.is_file():
            return str(library)
    raise NoCuda(f"no libcudart_static.a in {root}")


def compile_cuda(folder):
    """The object with the GPU kernels, the library it needs, and the architectures in it."""
    if os.environ.get("IRES_CUDA") == "0":
        raise NoCuda("IRES_CUDA=0")
    os.makedirs(folder, exist_ok=True)
    nvcc = find_nvcc()
    options, words = architectures(nvcc)
    library = static_runtime(nvcc, folder)
    made = os.path.join(folder, "cuda.o")
    command = [nvcc, *NVCC_FLAGS, *options, "--threads=0", "-Icsrc", "-c", "csrc/cuda.cu", "-o", made]
    print(" ".join(command))
    nvcc_output(*command)
    return made, library, words


class BuildNative(build_ext):
    def build_extension(self, ext):
        for name, flags in ISAS.items():
            # One object per instruction set: the source is the same, so the object needs a folder of its own.
            ext.extra_objects += self.compiler.compile(
                ["csrc/loops.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("IRES_ISA", name)],
                include_dirs=["csrc"],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        try:
            made, library, words = compile_cuda(os.path.join(self.build_temp, "cuda"))
        except NoCuda as reason:
            if os.environ.get("IRES_CUDA") == "1":
                raise RuntimeError(f"IRES_CUDA=1, but {reason}") from None
            print(f"ires_kernels: no GPU kernels: {reason}", file=sys.stderr)
        else:
            ext.extra_objects += [made, library]
            ext.extra_link_args += ["-ldl", "-lrt"]
            ext.define_macros.append(("IRES_CUDA", f'"{words}"'))
        super().build_extension(ext)


def extension():
    if os.environ.get("IRES_NATIVE") == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if os.environ.get("IRES_NATIVE") == "1":
            raise
        print("ires_kernels: pybind11 is missing, installing without native kernels", file=sys.stderr)
        return []
    headers = [
        "arith",
        "call",
        "coded",
        "cpu",
        "cuda",
        "decode",
        "encode",
        "fit",
        "fit16",
        "kernel",
        "lanes",
        "look",
        "pack",
        "scaled",
        "schedule",
        "tile",
        "words",
    ]
    return [
        Extension(
            "ires_kernels._native",
            sources=["csrc/cpu.cpp", "csrc/module.cpp"],
            include_dirs=["csrc", pybind11.get_include()],
            depends=[*(f"csrc/{name}.h" for name in headers), "csrc/loops.cpp", "csrc/cuda.cu"],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", *SANITIZE],
            language="c++",
            optional=os.environ.get("IRES_NATIVE") != "1",
        )
    ]


setup(ext_modules=extension(), cmdclass={"build_ext": BuildNative})
