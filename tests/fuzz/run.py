"""Builds this folder's fuzz targets with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, and runs them:

    python tests/fuzz/run.py [--seconds 300] [--corpus FOLDER] [TARGET ...]

--seconds is for all targets together: half of it goes to the reader. --corpus keeps what was found for the next run.
Fails where a target crashes, takes more than 5 s or 512 MB over one input, or a sanitizer reports anything; the input
then lies in the corpus' folder (or this one) as crash-*, timeout-* or oom-*.

Needs clang++ (or another clang in CXX_FUZZ) with libFuzzer's runtime, as distributions' packages have it.
"""

import argparse
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
SANITIZERS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-pass-failed"]
LARGEST = 8192  # bytes of an input
SOURCES = {
    "reader": [
        *["tiff/reader.cpp", "tiff/directory.cpp", "tiff/input.cpp", "tiff/codecs.cpp", "tiff/libraries.cpp"],
        *["tiff/rows.cpp", "tiff/rows_baseline.cpp", "cpu/dispatch.cpp", "cpu/pixels_baseline.cpp"],
    ],
    "lzw": ["tiff/codecs.cpp", "tiff/libraries.cpp", "tiff/encode_lzw.cpp"],
    "packbits": ["tiff/codecs.cpp", "tiff/libraries.cpp", "tiff/encode_packbits.cpp"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes the TIFF reader and its codecs.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARES)}; default: all")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    if set(arguments.targets) - set(SHARES):
        parser.error(f"there are the targets {', '.join(SHARES)}")
    compiler = shlex.split(os.environ.get("CXX_FUZZ", "")) or [shutil.which("clang++")]
    if compiler == [None]:
        sys.exit("there is no clang++, which libFuzzer comes with; name one in CXX_FUZZ")
    chosen = arguments.targets or list(SHARES)
    total = sum(SHARES[name] for name in chosen)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            program = build(compiler, name, Path(folder))
            corpus = arguments.corpus / name if arguments.corpus else Path(folder, f"{name}-corpus")
            corpus.mkdir(parents=True, exist_ok=True)
            write_seeds(name, corpus)
            run(name, program, corpus, max(1, round(arguments.seconds * SHARES[name] / total)))


def build(compiler: list[str], name: str, folder: Path) -> Path:
    program = folder / name
    sources = [str(HERE / f"{name}.cpp"), *(str(CSRC / source) for source in SOURCES[name])]
    command = [*compiler, *FLAGS, *SANITIZERS, *sources, "-ldl", "-pthread", "-o", str(program)]
    if subprocess.run(command).returncode != 0:
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


def run(name: str, program: Path, corpus: Path, seconds: int) -> None:
    options = [
        *[f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", "-malloc_limit_mb=512"],
        *[f"-max_len={LARGEST}", "-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={corpus}/"],
    ]
    answer = subprocess.run([str(program), *options, str(corpus)], capture_output=True, text=True)
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
