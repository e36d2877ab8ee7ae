"""Builds this folder's fuzz targets with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, and runs them:

    python tests/fuzz/run.py [--seconds 300] [--corpus FOLDER] [TARGET ...]

--seconds is for all targets together: half of it goes to the reader. --corpus keeps what was found for the next run.
Fails where a target crashes, takes more than 5 s or 512 MB over one input, or a sanitizer reports anything; the input
then lies in the corpus' folder (or this one) as crash-*, timeout-* or oom-*.

libFuzzer comes with clang (Debian: clang and libclang-rt-*-dev; CXX_FUZZ names another). Without it g++ (or CXX)
builds the same targets with without_libfuzzer.cpp in its place, which is less clever; the output says which it is.
"""

import argparse
import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
sys.path.insert(0, str(HERE.parent / "io"))
from malformed import PIXELS, File, files, lzw, packbits  # noqa: E402

SHARES = {"reader": 0.5, "lzw": 0.3, "packbits": 0.2}
LIBFUZZER = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-Wno-pass-failed"]
WITHOUT = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra"]
LARGEST = 8192  # bytes of an input
CODECS = ["tiff/codecs.cpp", "tiff/stream.cpp", "tiff/input.cpp", "tiff/libraries.cpp"]
SOURCES = {
    "reader": [
        *[*CODECS, "tiff/reader.cpp", "tiff/directory.cpp", "tiff/pool.cpp", "tiff/rows.cpp", "tiff/rows_baseline.cpp"],
        *["cpu/dispatch.cpp", "cpu/pixels_baseline.cpp"],
    ],
    "lzw": [*CODECS, "tiff/encode_lzw.cpp"],
    "packbits": [*CODECS, "tiff/encode_packbits.cpp"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes the TIFF reader and its codecs.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARES)}; default: all")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    if set(arguments.targets) - set(SHARES):
        parser.error(f"there are the targets {', '.join(SHARES)}")
    chosen = arguments.targets or list(SHARES)
    total = sum(SHARES[name] for name in chosen)
    with tempfile.TemporaryDirectory() as folder:
        clang = find_libfuzzer(Path(folder))
        print("libFuzzer" if clang else "without libFuzzer, which no compiler here comes with", flush=True)
        for name in chosen:
            program = build(clang, name, Path(folder))
            corpus = arguments.corpus / name if arguments.corpus else Path(folder, f"{name}-corpus")
            corpus.mkdir(parents=True, exist_ok=True)
            write_seeds(name, corpus)
            run(name, program, corpus, max(1, round(arguments.seconds * SHARES[name] / total)), clang is not None)


def find_libfuzzer(folder: Path) -> list[str] | None:
    """The clang that links libFuzzer and the sanitizers, or None."""
    compiler = shlex.split(os.environ.get("CXX_FUZZ", "")) or [shutil.which("clang++") or ""]
    source = folder / "empty.cpp"
    source.write_text('extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n')
    if not compiler[0]:
        return None
    command = [*compiler, *LIBFUZZER, str(source), "-o", str(folder / "empty")]
    return compiler if subprocess.run(command, capture_output=True).returncode == 0 else None


def build(clang: list[str] | None, name: str, folder: Path) -> Path:
    program = folder / name
    sources = [HERE / f"{name}.cpp", *(CSRC / source for source in SOURCES[name])]
    compiler = [*(clang or shlex.split(os.environ.get("CXX", "g++"))), *FLAGS]
    steps = {source: [*(LIBFUZZER if clang else [*WITHOUT, "-fsanitize-coverage=trace-pc"])] for source in sources}
    if clang is None:
        steps[HERE / "without_libfuzzer.cpp"] = WITHOUT
    steps = {source: [*compiler, *flags, "-c", str(source)] for source, flags in steps.items()}
    objects = [str(folder / f"{name}-{number}.o") for number in range(len(steps))]
    commands = [[*command, "-o", target] for command, target in zip(steps.values(), objects, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        built = all(answer.returncode == 0 for answer in pool.map(subprocess.run, commands))
    link = [*compiler, *(LIBFUZZER if clang else WITHOUT), *objects, "-ldl", "-pthread", "-o", str(program)]
    if not built or subprocess.run(link).returncode != 0:
        sys.exit(f"the target {name} does not build")
    return program


def write_seeds(name: str, corpus: Path) -> None:
    if name == "reader":
        for seed, content in files():
            if len(content) <= LARGEST:
                (corpus / seed).write_bytes(content)
        for order in "<>":
            for big in (False, True):
                for tile in (False, True):
                    f = File(order, big)
                    content = f.build(f.page(tile=tile))
                    (corpus / f"sound-{f.word}-{'be' if order == '>' else 'le'}-{tile}").write_bytes(content)
        return
    encode = lzw if name == "lzw" else packbits
    head = bytes([len(PIXELS) // 64, 0, 63])[: 2 if name == "lzw" else 3]
    (corpus / "sound").write_bytes(head + encode(PIXELS))
    (corpus / "zeros").write_bytes(head + encode(bytes(len(PIXELS))))


def run(name: str, program: Path, corpus: Path, seconds: int, libfuzzer: bool) -> None:
    options = [
        *[f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", "-malloc_limit_mb=512"],
        *[f"-max_len={LARGEST}", "-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={corpus}/"],
    ]
    command = [str(program), *(options if libfuzzer else [str(seconds)]), str(corpus)]
    limits = {} if libfuzzer else {"ASAN_OPTIONS": "max_allocation_size_mb=512:hard_rss_limit_mb=2048:handle_abort=0"}
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limits})
    log = answer.stderr
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    covered = re.findall(r"cov: (\d+)", log)
    reached = f"{runs[1] if runs else '?'} inputs in {seconds} s, {covered[-1] if covered else '?'} edges"
    print(f"{name}: {reached}", flush=True)
    if answer.returncode != 0:
        kept = [str(path) for path in corpus.glob("*-*") if path.name.startswith(("crash", "timeout", "oom", "leak"))]
        for path in kept:  # a corpus in a temporary folder goes with it
            shutil.copy(path, HERE)
        sys.exit(f"{log[-6000:]}\n{name} failed: {', '.join(kept)}")


if __name__ == "__main__":
    main()
