"""Builds the one compiled module, ``xrk._native``, from ``csrc/``, and maps the folder ``kernels/`` to ``xrk.kernels``.

The rest of the package's description is in pyproject.toml.

The objects are compiled by ninja where it is found, one after the other where it is not, with the same commands.
The environment variable ``XRK_CUDA`` says what becomes of ``csrc/cuda``: ``0`` leaves it out, ``1`` insists on it;
without the variable it is compiled in where nvcc is found and works. zlib, libdeflate and libzstd are bound where their
headers are; ``XRK_BIND=0`` leaves them all to be loaded at run time, as those without headers are.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in {"x86_64", "amd64"}

# Bit equality with numpy needs each operation rounded on its own: no contraction into fused multiply-adds. Giving up
# floating-point exceptions changes no result; comparisons are vectorised only then.
CXX_FLAGS = [
    *["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
    *["-ffp-contract=off", "-fno-trapping-math"],
]

# Sources named for an instruction set are compiled for it, and called only where the processor has it.
PATH_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}

# The libraries that csrc/tiff can be bound to: header, a function in it, and the linker's name.
LIBRARIES = {
    "zlib": ("zlib.h", "zlibVersion", "z"),
    "libdeflate": ("libdeflate.h", "libdeflate_alloc_decompressor", "deflate"),
    "libzstd": ("zstd.h", "ZSTD_versionNumber", "zstd"),
}

# Machine code for two generations of data-centre devices; all newer devices compile the PTX of the last one.
NVCC_FLAGS = [
    *["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"],
    *["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"],
]


def path_of(source: Path) -> str | None:
    """The instruction set that a source is named for, or None for those compiled for every processor."""
    return next((path for path in PATH_FLAGS if source.stem.endswith(f"_{path}")), None)


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME or of PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which(str(Path(home, "bin", "nvcc")))):
            return found
    return shutil.which("nvcc")


def cuda_library_folder(nvcc: str) -> str:
    """Where this nvcc links its runtime from, in its own words: it may be a wrapper far from its libraries."""
    answer = subprocess.run([nvcc, "--dryrun", "-cudart", "static", "x.o"], capture_output=True, text=True, check=True)
    libraries = next((line for line in answer.stderr.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    for folder in re.findall(r'"-L([^"]+)"', libraries):
        if Path(folder, "libcudart_static.a").exists():
            return folder
    raise FileNotFoundError(f"{nvcc} comes without libcudart_static.a")


class BuildNative(build_ext):
    """Compiles each source with its own flags, and CUDA sources with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"xrk builds with gcc or clang, not with {self.compiler.compiler_type} compilers")
        self.objects = Path(self.build_temp, ext.name).absolute()
        cuda_objects, cuda_folders = self.compile_cuda()
        defines = ["-DXRK_X86"] if X86 else []
        defines += ["-DXRK_HAVE_CUDA"] if cuda_objects else []
        bound = self.find_libraries()
        defines += [f"-DXRK_HAVE_{name.upper()}" for name in bound]
        commands = {}
        for source in sorted(CSRC.rglob("*.cpp")):
            path = path_of(source)
            if path and not X86:
                continue
            target = self.object_for(source)
            commands[target] = [
                *self.cxx(),
                *(f"-I{folder}" for folder in [pybind11.get_include(), *self.include_dirs]),
                *CXX_FLAGS,
                *defines,
                *(PATH_FLAGS[path] if path else []),
                *["-MMD", "-MF", f"{target}.d", "-c", str(source.absolute()), "-o", str(target)],
            ]
        self.run_all(commands, "build.ninja")
        linux = sys.platform.startswith("linux")
        libraries = [LIBRARIES[name][2] for name in bound]
        libraries += ["cudart_static", "rt"] if cuda_objects else []
        libraries += ["dl", "pthread"] if linux else ["pthread"]
        self.compiler.link_shared_object(
            [str(target) for target in [*commands, *cuda_objects]],
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            library_dirs=cuda_folders,
            # torch brings a CUDA runtime of its own into the process: the static one's names stay in here.
            extra_postargs=["-Wl,--exclude-libs,ALL"] if linux else [],
            target_lang="c++",
        )

    def find_libraries(self) -> list[str]:
        """Those of `LIBRARIES` that can be compiled and linked against here."""
        wish = os.environ.get("XRK_BIND", "")
        if wish not in {"", "0"}:
            raise RuntimeError(f"XRK_BIND is {wish!r}; expected 0 (bind no library) or nothing")
        found = []
        self.objects.mkdir(parents=True, exist_ok=True)
        for name, (header, function, library) in LIBRARIES.items() if not wish else ():
            source = self.objects / f"has_{name}.cpp"
            source.write_text(f"#include <{header}>\nint main() {{ return {function}() == 0; }}\n")
            command = [*self.cxx(), str(source), "-o", str(source.with_suffix("")), f"-l{library}"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                found.append(name)
        return found

    def compile_cuda(self) -> tuple[list[Path], list[str]]:
        """The objects of csrc/cuda and where their libraries lie; none where it is left out or does not compile."""
        wish = os.environ.get("XRK_CUDA", "")
        if wish not in {"", "0", "1"}:
            raise RuntimeError(f"XRK_CUDA is {wish!r}; expected 0 (leave CUDA out), 1 (insist on it) or nothing")
        nvcc = None if wish == "0" else find_nvcc()
        if nvcc is None:
            if wish == "1":
                raise RuntimeError("XRK_CUDA=1 asks for CUDA, but there is no nvcc in CUDA_HOME or on PATH")
            return [], []
        commands = {}
        for source in sorted(CSRC.rglob("*.cu")):
            target = self.object_for(source)
            dependencies = ["-MD", "-MF", f"{target}.d"]
            commands[target] = [nvcc, *NVCC_FLAGS, *dependencies, "-c", str(source.absolute()), "-o", str(target)]
        try:
            folder = cuda_library_folder(nvcc)
            self.run_all(commands, "cuda.ninja")
        except (OSError, subprocess.CalledProcessError) as error:
            if wish == "1":
                raise
            warnings.warn(f"xrk is built without CUDA: {nvcc} failed ({error})", stacklevel=1)
            return [], []
        return list(commands), [folder]

    def object_for(self, source: Path) -> Path:
        return self.objects / source.relative_to(CSRC).with_suffix(f"{source.suffix}.o")

    def cxx(self) -> list[str]:
        """The C++ compiler with Python's own flags for extensions, among them position-independent code."""
        return list(getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)

    def run_all(self, commands: dict[Path, list[str]], script: str) -> None:
        """Runs the compile commands, given by the object that each makes."""
        for target in commands:
            target.parent.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        if ninja is None:
            for command in commands.values():
                print(shlex.join(command), flush=True)
                subprocess.run(command, check=True)
            return
        lines = []
        for number, (target, command) in enumerate(commands.items()):
            source = command[command.index("-c") + 1]
            lines += [
                f"rule compile{number}",
                "  command = " + shlex.join(command).replace("$", "$$"),
                f"  depfile = {ninja_path(target, in_value=True)}.d",
                "  deps = gcc",
                f"build {ninja_path(target)}: compile{number} {ninja_path(source)}",
            ]
        file = self.objects / script
        file.write_text("\n".join([*lines, ""]))
        subprocess.run([ninja, "-f", str(file), "-C", str(self.objects), "-v"], check=True)


def ninja_path(path: Path | str, in_value: bool = False) -> str:
    """A path as ninja's own language writes it: a variable's value needs the dollar escaped, a list of paths more."""
    text = str(path).replace("$", "$$")
    return text if in_value else text.replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[
        Extension(
            "xrk._native",
            sources=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.c*"))],
            depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.h"))],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildNative},
    packages=[
        *find_packages(str(ROOT), include=["xrk", "xrk.*"]),
        "xrk.kernels",
        *(f"xrk.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
    ],
    package_dir={"xrk": "xrk", "xrk.kernels": "kernels"},
)
