"""Builds the one extension. Everything else about the package is in pyproject.toml.

IRES_NATIVE=0 installs without it (the reference backend remains); IRES_NATIVE=1 makes a failing build an error.
Otherwise a machine without a C++ compiler gets a working, slower package and `ires_kernels.backends()` says why.
"""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Rounding is part of the contract: no contraction to fma. Without trapping math the conversions vectorise.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
FLAGS += ["-pthread", "-g0", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # the last two: immintrin.h
# loops.cpp is compiled once per entry: name (csrc/cpu.cpp lists the same) -> flags.
ISAS = {"v4": ["-march=x86-64-v4"], "v3": ["-march=x86-64-v3"], "v2": ["-march=x86-64-v2"]}
if platform.machine().lower() not in ("x86_64", "amd64"):
    ISAS = {"portable": []}


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
    return [
        Extension(
            "ires_kernels._native",
            sources=["csrc/cpu.cpp", "csrc/module.cpp"],
            include_dirs=["csrc", pybind11.get_include()],
            depends=["csrc/arith.h", "csrc/cpu.h", "csrc/loops.cpp"],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=os.environ.get("IRES_NATIVE") != "1",
        )
    ]


setup(ext_modules=extension(), cmdclass={"build_ext": BuildNative})
