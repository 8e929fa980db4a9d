"""Builds the extension l2l_ref._engine from csrc/; the metadata is in pyproject.toml.

Without a C++ compiler or without torch the package installs all the same and runs on the reference.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

STABLE_ABI = "2.11"  # the oldest torch that one build serves
# Contraction makes a*b + c one rounding. No -ffast-math: infinities and NaN keep their meaning.
OPTIMIZED = (
    "-std=c++17 -O3 -g0 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-unknown-pragmas -fvisibility=hidden".split()
)
SANITIZED = []
if os.environ.get("L2L_SANITIZE"):  # for `make sanitize`: memory errors and undefined behaviour
    OPTIMIZED = [flag for flag in OPTIMIZED if flag not in ("-O3", "-g0")]
    SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
    OPTIMIZED += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZED]
X86 = platform.machine() == "x86_64" and sys.platform == "linux"
LEVELS = {"baseline": []}  # the kernels, compiled once for each instruction set
if X86:
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = (
        "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512".split()
    )


class BuildEngine(build_ext):
    """build_ext, with csrc/kernels.cpp compiled for every one of LEVELS and one line of report."""

    def build_extensions(self):
        (extension,) = self.extensions
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # of an earlier build
        if sys.platform == "win32":
            return self.report("not built, it needs GCC or Clang")
        try:
            import torch
        except ImportError as error:
            return self.report(f"not built, torch is not there at build time ({error})")
        extension.optional = False  # else what fails below would only be a warning
        major, minor = STABLE_ABI.split(".")
        home = Path(torch.__file__).parent
        extension.include_dirs += [str(home / "include"), *pybind11_include()]
        extension.library_dirs += [str(home / "lib")]
        extension.libraries += ["torch_cpu"]
        extension.define_macros += [
            ("TORCH_TARGET_VERSION", f"0x{int(major):02x}{int(minor):02x}000000000000"),
            ("L2L_TORCH_VERSION", f'"{torch.__version__}"'),
            ("L2L_STABLE_ABI", f'"{STABLE_ABI}"'),
            *([("L2L_X86", None)] if X86 else []),
        ]
        extension.extra_compile_args += OPTIMIZED
        extension.extra_link_args += SANITIZED
        try:
            for level, flags in LEVELS.items():
                extension.extra_objects += self.compiler.compile(
                    ["csrc/kernels.cpp"],
                    output_dir=str(Path(self.build_temp) / level),
                    macros=[("L2L_LEVEL", level)],
                    extra_preargs=OPTIMIZED + flags,
                )
            super().build_extensions()
        except (BaseError, CCompilerError, OSError) as error:
            return self.report(f"not built, the C++ compiler failed ({error})")
        finally:
            extension.optional = True
        self.report(f"built with torch {torch.__version__}, kernels: {', '.join(LEVELS)}")

    def copy_extensions_to_source(self):
        """Where nothing was built, nothing that was built before stays."""
        (extension,) = self.extensions
        if not Path(self.build_lib, self.get_ext_filename(extension.name)).exists():
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def report(self, what):
        print(f"l2l_ref: the fused engine is {what}", file=sys.stderr)


def pybind11_include():
    """pybind11's own headers; torch brings a copy, found without this."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


setup(
    ext_modules=[
        Extension(
            "l2l_ref._engine",
            ["csrc/module.cpp", "csrc/cpu.cpp", "csrc/emulated.cpp"],
            depends=["csrc/kernels.cpp", *map(str, sorted(Path("csrc").glob("*.h")))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildEngine},
)
