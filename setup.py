"""Builds the engine from csrc/; the metadata is in pyproject.toml.

_C runs on the CPU, _C_cuda on a GPU. USE_CUDA=0 leaves the second out, USE_CUDA=1 builds it even
for another version of CUDA than torch's, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" chooses architectures.
What torch's BuildExtension cannot do: leave out what cannot be built, and say why in a line;
compile the kernels once for each instruction set; use an nvcc that is a wrapper on PATH.
"""

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError as NotBuilt

STABLE_ABI, STABLE_HEX = "2.11", "0x020b000000000000"  # the oldest torch that one build serves
LINUX = sys.platform == "linux"
X86 = LINUX and platform.machine() == "x86_64"
INSTRUCTION_SETS = {"baseline": ""}
if X86:
    avx512 = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512"
    INSTRUCTION_SETS |= {"avx2": "-mavx2 -mfma", "avx512": avx512}
kinds = os.environ.get("L2L_SANITIZE")  # for `make sanitize`: "address,undefined" or "thread"
SANITIZED = f"-fsanitize={kinds} -fno-sanitize-recover=undefined" if kinds else ""
OPTIMIZED = f"-O1 -g1 -fno-omit-frame-pointer {SANITIZED}" if kinds else "-O3 -g0"
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
# A cubin serves the later GPUs of its generation, 8.0 also 8.9; PTX all that follow.
ARCHITECTURES = ("7.5", "8.0", "9.0+PTX", "10.0", "12.0+PTX")
# What a compiler says stays beside its object, for the builds that need not compile it again.
RULE = """rule compile
  command = $line -MMD -MF $out.d -c $in -o $out >$out.log 2>&1; code=$$?; cat $out.log; exit $$code
  depfile = $out.d
  deps = gcc
"""


class BuildEngine(build_ext):
    def run(self):
        self.remove()  # where it is built in place: there
        super().run()

    def remove(self):
        """An earlier build must not pass for one that failed."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    def build_extensions(self):
        self.remove()
        for extension, build in zip(self.extensions, (self.cpu, self.cuda), strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                print(f"{extension.name} is built with {build(target)}", file=sys.stderr)
            except (NotBuilt, ImportError, OSError, ValueError, IndexError) as error:
                print(f"{extension.name} is not built: {error}", file=sys.stderr)
                break  # the GPU's half needs the other

    def cpu(self, target):
        torch, flags, libraries = self.with_torch()
        sources = ("module.cpp", "cpu/cpu.cpp", "cuda/emulated.cpp")
        files = {Path(source).stem: (source, flags) for source in sources}
        for name, options in INSTRUCTION_SETS.items():
            files[name] = ("cpu/kernels.cpp", [f"-DL2L_NAMESPACE={name}", *options.split()])
        linker = [*self.compiler.linker_so_cxx, *SANITIZED.split()]
        linker += ["-Wl,--exclude-libs,ALL"] * LINUX  # keeps a static libstdc++ from torch's
        run([*linker, *self.compile("cpu", files), *libraries, "-ltorch_cpu", "-o", target])
        return f"torch {torch.__version__}, kernels: {', '.join(INSTRUCTION_SETS)}"

    def cuda(self, target):
        if (wish := os.environ.get("USE_CUDA")) == "0":
            raise NotBuilt("USE_CUDA is 0")
        torch, flags, libraries = self.with_torch()
        home = os.environ.get("CUDA_HOME")
        nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        release = run([nvcc, "--version"]).partition("release ")[2].partition(",")[0]
        if wish != "1" and release.split(".")[0] != str(torch.version.cuda).split(".")[0]:
            versions = f"nvcc is of CUDA {release}, torch of {torch.version.cuda}"
            raise NotBuilt(f"{versions}; USE_CUDA=1 builds it all the same")
        names, gencode = architectures(run([nvcc, "--list-gpu-code"]).split())
        compiler = [nvcc, *CUDA_FLAGS.split(), *gencode]
        (kernels,) = self.compile("cuda", {"kernels": ("cuda/kernels.cu", [])}, compiler)
        spilled = Counter()  # bytes by architecture, of what ptxas says of each kernel
        for said in Path(f"{kernels}.log").read_text().split("for 'sm_")[1:]:
            spilled[said.split("'")[0]] += sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        counts = (f"sm_{name}:{count}" for name, count in spilled.items())
        flags += ["-DUSE_CUDA", f'-DL2L_NVCC="{release}"']
        flags += [f'-DL2L_ARCHITECTURES="{names}"', f'-DL2L_SPILLED="{" ".join(counts)}"']
        (module,) = self.compile("cuda_module", {"module": ("cuda/cuda.cpp", flags)})
        # nvcc knows its toolkit's folders; CUDA's runtime goes in, as torch's may be another minor
        linker = [nvcc, "-shared", "-nodlink", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        run([*linker, module, kernels, *libraries, "-ltorch_cpu", "-ltorch_cuda", "-o", target])
        return f"CUDA {release} for {names}"

    def with_torch(self):
        """torch, and the flags of what includes its headers and of what is linked with it."""
        logging.getLogger("torch.utils.cpp_extension").disabled = True  # of CUDA_HOME, unused here
        import pybind11  # torch 2.11's own copy cannot be used beside its stable ABI
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        folders = [pybind11.get_include(), *include_paths(), *self.compiler.include_dirs]
        flags = [f"-DTORCH_TARGET_VERSION={STABLE_HEX}", f'-DL2L_STABLE_ABI="{STABLE_ABI}"']
        flags += [f'-DL2L_TORCH_VERSION="{torch.__version__}"', *["-DL2L_X86"] * X86]
        flags += [f"-I{folder}" for folder in folders]
        return torch, flags, [f"-L{folder}" for folder in library_paths()]

    def compile(self, folder, files, compiler=None):
        """Objects of {name: (source, flags)}, by ninja, which leaves alone what is new enough."""
        compiler = compiler or [*self.compiler.compiler_so_cxx, *CPU_FLAGS.split()]
        folder = Path(self.build_temp, folder)
        folder.mkdir(parents=True, exist_ok=True)
        rules = f"builddir = {folder}\n{RULE}"
        for name, (source, flags) in files.items():
            target = re.sub("[$ :]", r"$\g<0>", f"{folder}/{name}.o")
            line = shlex.join([*compiler, *flags]).replace("$", "$$")
            rules += f"build {target}: compile csrc/{source}\n  line = {line}\n"
        (folder / "build.ninja").write_text(rules)
        ninja = shutil.which("ninja") or Path(sys.executable).with_name("ninja")  # pip's
        run([ninja, "-f", f"{folder}/build.ninja"])
        return [f"{folder}/{name}.o" for name in files]


def architectures(known):
    """The GPU architectures to compile for, of a toolkit, and nvcc's flags for them."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    ours = [name for name in ARCHITECTURES if f"sm_{re.sub('[.]|[+]PTX', '', name)}" in known]
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ours)
    os.environ["TORCH_CUDA_ARCH_LIST"] = names  # or torch asks the GPUs that are here
    return names.replace(";", " "), _get_cuda_arch_flags()


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        error = re.search(r".*(error|fatal|not found|No such).*|\Z", done.stdout)[0].strip()
        raise NotBuilt(f"{command[0]} failed ({error or f'exit status {done.returncode}'})")
    return done.stdout


if __name__ == "__main__":  # the tests import this file
    halves = [Extension(f"l2l_ref.backend.{name}", [], optional=True) for name in ("_C", "_C_cuda")]
    setup(ext_modules=halves, cmdclass={"build_ext": BuildEngine})
