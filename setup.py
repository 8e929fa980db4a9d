"""Builds the extensions of l2l_ref from csrc/; the metadata is in pyproject.toml.

l2l_ref.backend._C runs on the CPU, l2l_ref.backend._C_cuda on a GPU. Without a C++ compiler or
without torch the package installs all the same and runs on the reference; without a CUDA toolkit,
on the CPU. USE_CUDA=0 leaves the CUDA half out, USE_CUDA=1 builds it even for another version of
CUDA than torch's. TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", chooses its architectures.
L2L_VERBOSE=1 shows what the compilers say.
"""

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = ["csrc/module.cpp", "csrc/cpu/cpu.cpp", "csrc/cuda/emulated.cpp"]
CPU_KERNELS = "csrc/cpu/kernels.cpp"  # compiled once for each of INSTRUCTION_SETS
CUDA_MODULE, CUDA_KERNELS = "csrc/cuda/cuda.cpp", "csrc/cuda/kernels.cu"

STABLE_ABI, STABLE_HEX = "2.11", "0x020b000000000000"  # the oldest torch that one build serves
X86 = platform.machine() == "x86_64" and sys.platform == "linux"
INSTRUCTION_SETS = {"baseline": ""}
if X86:
    avx512 = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512"
    INSTRUCTION_SETS |= {"avx2": "-mavx2 -mfma", "avx512": avx512}
OPTIMIZED, SANITIZED = "-O3 -g0", ""
if kinds := os.environ.get("L2L_SANITIZE"):  # for `make sanitize`: "address,undefined" or "thread"
    SANITIZED = f"-fsanitize={kinds} -fno-sanitize-recover=undefined"
    OPTIMIZED = f"-O1 -g1 -fno-omit-frame-pointer {SANITIZED}"
# Contraction makes a*b + c one rounding. No -ffast-math: infinities and NaN keep their meaning.
CPU_FLAGS = (
    f"-std=c++17 {OPTIMIZED} -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-pass-failed -fvisibility=hidden"
)
# -t0: all architectures at once. 1675: GCC's pragmas.
CUDA_FLAGS = (
    "-std=c++17 -O3 -t0 -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v -diag-suppress=1675 "
    "-DL2L_SCALAR -DL2L_NAMESPACE=gpu"
)
# A cubin serves the later GPUs of its generation, 8.0 also 8.6 and 8.9; PTX all that follow, that
# of 9.0 those from 10 to 12 that have no cubin.
ARCHITECTURES = ("7.5", "8.0", "9.0+PTX", "10.0", "12.0")
# What a compiler says stays beside its object, for the builds that need not compile it again.
RULE = """rule compile
  command = $line -MMD -MF $out.d -c $in -o $out >$out.log 2>&1; code=$$?; cat $out.log; exit $$code
  depfile = $out.d
  deps = gcc
"""


class NotBuilt(Exception):
    """Part of the engine is left out; the message says why."""


class BuildEngine(build_ext):
    """Builds both halves at the same time, with one line of report about each.

    What cannot be built is left out, and what was built earlier removed: the package then runs on
    what there is. torch's BuildExtension would end the installation there, compile the kernels with
    the same flags for every instruction set, want the CUDA_HOME that a wrapper of nvcc hides, and
    not pass on what nvcc says of spilled registers. Of its module, what does none of this is used:
    the folders of headers and libraries, and the flags of GPU architectures.
    """

    def build_extensions(self):
        targets = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            jobs = list(map(pool.submit, (self.build_cpu, self.build_cuda), targets))
        failed = False
        for what, target, job in zip(("fused", "CUDA"), targets, jobs, strict=True):
            try:
                if failed:
                    raise NotBuilt("it needs the other half")
                print(f"l2l_ref: the {what} engine is built with {job.result()}", file=sys.stderr)
            except (NotBuilt, ImportError, OSError) as error:
                failed = True
                target.unlink(missing_ok=True)
                print(f"l2l_ref: the {what} engine is not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """Of what was not built, nothing that was built before stays."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_cpu(self, target):
        torch, flags, libraries = self.with_torch()
        files = {Path(source).stem: (source, flags) for source in CPU_SOURCES}
        for name, options in INSTRUCTION_SETS.items():
            files[name] = (CPU_KERNELS, [f"-DL2L_NAMESPACE={name}", *options.split()])
        linker = [*self.compiler.linker_so_cxx, *SANITIZED.split()]
        if sys.platform == "linux":  # a libstdc++ that is linked in must not mix with torch's
            linker += ["-Wl,--exclude-libs,ALL"]
        run([*linker, *self.compile("cpu", files), *libraries, "-ltorch_cpu", "-o", target])
        return f"torch {torch.__version__}, kernels: {', '.join(INSTRUCTION_SETS)}"

    def build_cuda(self, target):
        wish = os.environ.get("USE_CUDA", "")
        if wish not in ("", "0", "1"):
            raise NotBuilt(f"USE_CUDA is '{wish}', it must be 0, 1 or not set")
        if wish == "0":
            raise NotBuilt("USE_CUDA is 0")
        torch, flags, libraries = self.with_torch()
        if torch.version.cuda is None and wish != "1":
            raise NotBuilt("this torch is without CUDA (USE_CUDA=1 builds it all the same)")
        nvcc = find_nvcc()
        release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
        if release is None:
            raise NotBuilt(f"{nvcc} does not say its version")
        if wish != "1" and release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
            raise NotBuilt(
                f"nvcc is of CUDA {release[1]}, torch of {torch.version.cuda} (USE_CUDA=1 builds "
                "it all the same)"
            )
        names, gencode = architectures(run([nvcc, "--list-gpu-code"]))
        files = {"kernels": (CUDA_KERNELS, CUDA_FLAGS.split() + gencode)}
        (kernels,) = self.compile("cuda", files, [nvcc])
        spilled = Counter()  # bytes by architecture, of what ptxas says of each kernel
        for said in Path(f"{kernels}.log").read_text().split("for 'sm_")[1:]:
            numbers = map(int, re.findall(r"(\d+) bytes spill", said))
            spilled["sm_" + said.split("'")[0]] += sum(numbers)
        flags += [
            "-DUSE_CUDA",
            f'-DL2L_NVCC="{release[1]}"',
            f'-DL2L_ARCHITECTURES="{" ".join(names)}"',
            f'-DL2L_SPILLED="{" ".join(f"{name}:{count}" for name, count in spilled.items())}"',
        ]
        (module,) = self.compile("cuda_module", {"module": (CUDA_MODULE, flags)})
        # nvcc knows its toolkit's folders, also behind a wrapper on PATH, which misleads torch's
        # CUDA_HOME. CUDA's runtime goes in, so that torch's may be of another minor version.
        linker = [nvcc, "-shared", "-nodlink", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        libraries += ["-ltorch_cpu", "-ltorch_cuda"]
        run([*linker, module, kernels, *libraries, "-o", target])
        return f"CUDA {release[1]} for {' '.join(names)}"

    def with_torch(self):
        """torch, and the flags of what includes its headers and of what is linked with it."""
        if sys.platform == "win32":
            raise NotBuilt("it needs GCC or Clang")
        # It would warn where there is no GPU, and of a CUDA_HOME that is not used here.
        logging.getLogger("torch.utils.cpp_extension").disabled = True
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise NotBuilt(f"torch is not there at build time ({error})") from None
        folders = include_paths() + self.compiler.include_dirs
        with suppress(ImportError):  # torch 2.11's own copy cannot be used beside its stable ABI
            import pybind11

            folders = [pybind11.get_include(), *folders]
        flags = [
            f"-DTORCH_TARGET_VERSION={STABLE_HEX}",
            f'-DL2L_TORCH_VERSION="{torch.__version__}"',
            f'-DL2L_STABLE_ABI="{STABLE_ABI}"',
            *["-DL2L_X86"] * X86,
            *(f"-I{folder}" for folder in folders),
        ]
        return torch, flags, [f"-L{folder}" for folder in library_paths()]

    def compile(self, folder, files, compiler=None):
        """Objects of {name: (source, flags)}, by ninja, which leaves alone what is new enough."""
        compiler = compiler or [*self.compiler.compiler_so_cxx, *CPU_FLAGS.split()]
        folder = Path(self.build_temp, folder)
        if self.force:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        rules = f"builddir = {folder}\n{RULE}"
        for name, (source, flags) in files.items():
            target = re.sub("[$ :]", r"$\g<0>", f"{folder}/{name}.o")
            line = shlex.join([*compiler, *flags]).replace("$", "$$")
            rules += f"build {target}: compile {source}\n  line = {line}\n"
        (folder / "build.ninja").write_text(rules)
        scripts = sysconfig.get_path("scripts")  # pip's ninja is there, and maybe not on PATH
        ninja = shutil.which("ninja") or f"{scripts}/ninja"
        run([ninja, "-f", f"{folder}/build.ninja"])
        return [f"{folder}/{name}.o" for name in files]


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [*os.get_exec_path(), "/usr/local/cuda/bin"]
    if nvcc := shutil.which("nvcc", path=os.pathsep.join(places)):
        return nvcc
    where = f"in {places[0]}" if home else "on PATH"
    raise NotBuilt(f"no CUDA toolkit: nvcc is not {where}; CUDA_HOME names a toolkit's folder")


def architectures(known):
    """Names of the GPU architectures to compile for, and nvcc's flags for them."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names:  # torch would ask the GPUs that are here, and fail without one
        numbers = {line.removeprefix("sm_") for line in known.splitlines()}
        names = [n for n in ARCHITECTURES if n.removesuffix("+PTX").replace(".", "") in numbers]
        if not names:
            raise NotBuilt(f"the toolkit knows none of {', '.join(ARCHITECTURES)}")
        names[-1] = names[-1].removesuffix("+PTX") + "+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names)
    try:
        return names, _get_cuda_arch_flags()
    except (ValueError, IndexError) as error:
        raise NotBuilt(f"TORCH_CUDA_ARCH_LIST is '{' '.join(names)}': {error}") from None


def run(command):
    """What a program says; L2L_VERBOSE shows it."""
    try:
        done = subprocess.run(command, stdout=PIPE, stderr=STDOUT, text=True)
    except OSError as error:
        raise NotBuilt(f"{command[0]} does not run ({error})") from None
    if os.environ.get("L2L_VERBOSE"):
        print(done.stdout, file=sys.stderr)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no message"]
        errors = [line for line in lines if re.search("error|fatal|not found|No such", line)]
        raise NotBuilt(f"{command[0]} failed ({(errors or lines)[0].strip()})")
    return done.stdout


if __name__ == "__main__":  # the tests import this file
    setup(
        ext_modules=[
            Extension("l2l_ref.backend._C", [*CPU_SOURCES, CPU_KERNELS], optional=True),
            Extension("l2l_ref.backend._C_cuda", [CUDA_MODULE, CUDA_KERNELS], optional=True),
        ],
        cmdclass={"build_ext": BuildEngine},
    )
