"""Builds driver.cpp and segments.cpp with csrc/cpu and csrc/tiff under AddressSanitizer and UndefinedBehaviorSanitizer,
then under ThreadSanitizer, and runs both: `python tests/sanitize/run.py`. Fails where a sanitizer reports anything or a
result differs.

Needs g++ (or another GCC in CXX) with libasan, libubsan and libtsan. The kernels for AVX-512 run only on a processor
that has it, and are instrumented there alone.
"""

import concurrent.futures
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# The instruction sets' flags, as in setup.py.
PATH_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra"]
SANITIZERS = {
    # AddressSanitizer sees bad pointers where they are used, so that UBSan need not look at each; calls in place of its
    # code at each access compile in a sixth of the time.
    "address and undefined behaviour": [
        *["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow"],
        *["-fno-sanitize-recover=all", "--param=asan-instrumentation-with-call-threshold=0"],
    ],
    "threads": ["-fsanitize=thread"],
}
REPORTS = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "TSAN_OPTIONS": "halt_on_error=1"}


def main() -> None:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    sources = [HERE / "driver.cpp", HERE / "segments.cpp"]
    sources += [*sorted((CSRC / "cpu").glob("*.cpp")), *sorted((CSRC / "tiff").glob("*.cpp"))]
    with tempfile.TemporaryDirectory() as folder:
        for name, sanitizer in SANITIZERS.items():
            commands, objects = [], []
            for source in sources:
                path = next((p for p in PATH_FLAGS if source.stem.endswith(f"_{p}")), None)
                if path and not x86:
                    continue
                target = Path(folder, f"{source.stem}.o")
                flags = [*FLAGS, *(["-DXRK_X86"] if x86 else []), *(PATH_FLAGS[path] if path else [])]
                flags += sanitizer if path != "avx512" or has_avx512() else []
                commands.append([*compiler, *flags, "-c", str(source), "-o", str(target)])
                objects.append(str(target))
            with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(run, commands))
            program = str(Path(folder, "driver"))
            run([*compiler, *sanitizer, *objects, "-ldl", "-pthread", "-o", program])
            print(f"{name}: ", end="", flush=True)
            run([program])


def has_avx512() -> bool:
    file = Path("/proc/cpuinfo")
    return file.exists() and "avx512f" in file.read_text()


def run(command: list[str]) -> None:
    if subprocess.run(command, env={**os.environ, **REPORTS}).returncode != 0:
        sys.exit(f"failed: {shlex.join(command)}")


if __name__ == "__main__":
    main()
