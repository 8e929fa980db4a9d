"""Builds the extensions of l2l_ref from csrc/; the metadata is in pyproject.toml.

l2l_ref._engine runs on the CPU, l2l_ref._engine_cuda on a GPU. Without a C++ compiler or without
torch the package installs all the same and runs on the reference; without a CUDA toolkit, on the
CPU. USE_CUDA=0 leaves the CUDA half out, USE_CUDA=1 builds it even for another version of CUDA than
torch's. TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", chooses its architectures. L2L_VERBOSE=1 shows
what nvcc says.
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
from setuptools.errors import BaseError, CCompilerError

STABLE_ABI = "2.11"  # the oldest torch that one build serves
# Contraction makes a*b + c one rounding. No -ffast-math: infinities and NaN keep their meaning.
OPTIMIZED = (
    "-std=c++17 -O3 -g0 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-pass-failed -fvisibility=hidden".split()
)
SANITIZED = []
if os.environ.get("L2L_SANITIZE"):  # for `make sanitize`: memory errors and undefined behaviour
    OPTIMIZED = [flag for flag in OPTIMIZED if flag not in ("-O3", "-g0")]
    SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
    OPTIMIZED += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZED]
X86 = platform.machine() == "x86_64" and sys.platform == "linux"
INSTRUCTION_SETS = {"baseline": []}  # the kernels, compiled once for each instruction set
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = (
        "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512".split()
    )


# A cubin serves the later GPUs of its generation, 8.0 also 8.6 and 8.9; PTX all that follow, that
# of 9.0 those from 10 to 12 that have no cubin.
ARCHITECTURES = ("7.5", "8.0", "9.0+PTX", "10.0", "12.0")
CPU, CUDA = "l2l_ref._engine", "l2l_ref._engine_cuda"


class NotBuilt(Exception):
    """Part of the engine is left out; the message says why."""


class BuildEngine(build_ext):
    """build_ext for both extensions, with one line of report about each.

    csrc/cpu/kernels.cpp is compiled for every one of INSTRUCTION_SETS, csrc/cuda/kernels.cu by
    nvcc. What cannot be built is left out, and what was built earlier removed: the package then
    runs on what there is.
    """

    def build_extensions(self):
        extensions, self.extensions = self.extensions, []
        for extension in extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # an earlier build
        parts = {CPU: ("fused engine", self.build_cpu), CUDA: ("CUDA engine", self.build_cuda)}
        failed = False
        for extension in extensions:
            what, build = parts[extension.name]
            try:
                if failed:
                    raise NotBuilt("it needs the other half")
                print(f"l2l_ref: the {what} is built with {build(extension)}", file=sys.stderr)
            except (NotBuilt, BaseError, CCompilerError, OSError) as error:
                failed = True
                why = error if isinstance(error, NotBuilt) else f"the C++ compiler failed ({error})"
                print(f"l2l_ref: the {what} is not built: {why}", file=sys.stderr)
        self.extensions = extensions

    def build_cpu(self, extension):
        torch = self.prepare(extension)
        extension.libraries += ["torch_cpu"]
        for name, flags in INSTRUCTION_SETS.items():
            extension.extra_objects += self.compiler.compile(
                ["csrc/cpu/kernels.cpp"],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("L2L_NAMESPACE", name)],
                extra_preargs=OPTIMIZED + flags,
            )
        self.build_extension(extension)
        return f"torch {torch.__version__}, kernels: {', '.join(INSTRUCTION_SETS)}"

    def build_cuda(self, extension):
        wish = os.environ.get("USE_CUDA", "")
        if wish not in ("", "0", "1"):
            raise NotBuilt(f"USE_CUDA is '{wish}', it must be 0, 1 or not set")
        if wish == "0":
            raise NotBuilt("USE_CUDA is 0")
        torch = self.prepare(extension)
        if torch.version.cuda is None and wish != "1":
            raise NotBuilt("this torch is without CUDA (USE_CUDA=1 builds it all the same)")
        nvcc, root = find_nvcc()
        text = run([nvcc, "--version"])
        release = re.search(r"release (\d+\.\d+)", text)
        if release is None:
            raise NotBuilt(f"{nvcc} does not say its version")
        if wish != "1" and release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
            raise NotBuilt(
                f"nvcc is of CUDA {release[1]}, torch of {torch.version.cuda} (USE_CUDA=1 builds "
                "it all the same)"
            )
        names, flags = architectures(run([nvcc, "--list-gpu-code"]))
        target = Path(self.build_temp) / "kernels.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        said = run(
            [nvcc, "-std=c++17", "-O3", "-t0", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
            + ["-diag-suppress=1675", "-DL2L_SCALAR", "-DL2L_NAMESPACE=gpu"]  # 1675: GCC's pragmas
            + [*flags, "-c", "csrc/cuda/kernels.cu", "-o", str(target)]
        )
        if os.environ.get("L2L_VERBOSE"):
            print(said, file=sys.stderr)
        spilled = {}  # what ptxas says of each kernel: its architecture, then its spills
        for architecture, spills in re.findall(r"for 'sm_(\w+)'|(\d+) bytes spill", said):
            if architecture:
                current = architecture
            else:
                spilled[current] = spilled.get(current, 0) + int(spills)
        extension.extra_objects += [str(target)]
        extension.define_macros += [
            ("USE_CUDA", None),
            ("L2L_NVCC", f'"{release[1]}"'),
            ("L2L_ARCHITECTURES", f'"{" ".join(names)}"'),
            ("L2L_SPILLED", f'"{" ".join(f"sm_{k}:{v}" for k, v in spilled.items())}"'),
        ]
        extension.library_dirs += [str(root / "lib64"), str(root / "lib")]
        # CUDA's own runtime goes in, so that torch's may be of another minor version.
        extension.libraries += ["torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
        self.build_extension(extension)
        return f"CUDA {release[1]} for {' '.join(names)}"

    def prepare(self, extension):
        """What both halves are compiled with; returns torch."""
        if sys.platform == "win32":
            raise NotBuilt("it needs GCC or Clang")
        try:
            import torch
        except ImportError as error:
            raise NotBuilt(f"torch is not there at build time ({error})") from None
        extension.optional = False  # else a failure would only be a warning
        major, minor = STABLE_ABI.split(".")
        home = Path(torch.__file__).parent
        extension.include_dirs += [*pybind11_include(), str(home / "include")]
        extension.library_dirs += [str(home / "lib")]
        extension.define_macros += [
            ("TORCH_TARGET_VERSION", f"0x{int(major):02x}{int(minor):02x}000000000000"),
            ("L2L_TORCH_VERSION", f'"{torch.__version__}"'),
            ("L2L_STABLE_ABI", f'"{STABLE_ABI}"'),
            *([("L2L_X86", None)] if X86 else []),
        ]
        extension.extra_compile_args += OPTIMIZED
        extension.extra_link_args += SANITIZED
        if sys.platform == "linux":  # a libstdc++ that is linked in must not mix with torch's
            extension.extra_link_args += ["-Wl,--exclude-libs,ALL"]
        return torch

    def copy_extensions_to_source(self):
        """Copies what was built; of what was not, nothing that was built before stays."""
        everything, self.extensions = self.extensions, []
        for extension in everything:
            if Path(self.build_lib, self.get_ext_filename(extension.name)).exists():
                self.extensions.append(extension)
            else:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        self.extensions = everything


def find_nvcc():
    """nvcc and the root of its toolkit, of which what is on PATH may only be a wrapper."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin"] if home else [*os.get_exec_path(), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(map(str, places)))
    if nvcc is None:
        where = f"in {places[0]}" if home else "on PATH"
        raise NotBuilt(f"no CUDA toolkit: nvcc is not {where}; CUDA_HOME names a toolkit's folder")
    top = re.search(r"#\$ TOP=(.*)", run([nvcc, "--dryrun", "-c", "any.cu"]))
    return nvcc, Path(top[1].strip()) if top else Path(nvcc).resolve().parents[1]


def architectures(known):
    """Names of the GPU architectures to compile for, and nvcc's flags for them."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    names = wish
    if not wish:
        numbers = {line.removeprefix("sm_") for line in known.splitlines()}
        names = [n for n in ARCHITECTURES if n.removesuffix("+PTX").replace(".", "") in numbers]
        if not names:
            raise NotBuilt(f"the toolkit knows none of {', '.join(ARCHITECTURES)}")
        names[-1] = names[-1].removesuffix("+PTX") + "+PTX"
    flags = []
    for name in names:
        if not (match := re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", name)):
            raise NotBuilt(f"TORCH_CUDA_ARCH_LIST has '{name}', it takes names such as 8.0 9.0+PTX")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return names, flags


def run(command):
    """What a program of the toolkit says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"{command[0]} does not run ({error})") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in lines if "error" in line or "fatal" in line] or lines
        raise NotBuilt(f"{command[0]} failed ({errors[0].strip()})")
    return done.stdout + done.stderr


def pybind11_include():
    """pybind11's own headers, to be found before torch's copy: that of torch 2.11 cannot be used
    beside its stable ABI, those of later versions can."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


HEADERS = list(map(str, sorted(Path("csrc").rglob("*.h"))))

if __name__ == "__main__":  # the tests import this file
    setup(
        ext_modules=[
            Extension(
                CPU,
                ["csrc/module.cpp", "csrc/cpu/cpu.cpp", "csrc/cuda/emulated.cpp"],
                depends=["csrc/cpu/kernels.cpp", *HEADERS],
                language="c++",
                optional=True,
            ),
            Extension(
                CUDA,
                ["csrc/cuda/cuda.cpp"],
                depends=["csrc/cuda/kernels.cu", *HEADERS],
                language="c++",
                optional=True,
            ),
        ],
        cmdclass={"build_ext": BuildEngine},
    )
