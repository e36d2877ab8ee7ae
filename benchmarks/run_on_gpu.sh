#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first, inside a time limit.
#
#     benchmarks/run_on_gpu.sh [--cpu] [--parts NAME,NAME...] [SECONDS] [FOLDER]
#
# SECONDS: for all of it (default 540). FOLDER: where the results go (default benchmarks/results): ops_<device>.json,
# gpu_<part>.log for each part and gpu_summary.txt, a line for each part with its exit status and its seconds.
# --parts: these alone, for a second run that goes on where the time of the first was over; the build is always made.
# --cpu runs such parts on the CPU at their smallest: it checks this script where there is no GPU.
#
# Each part has a slice of the time, or what is left of the whole. A part that fails, or is stopped at the end of its
# slice, does not keep the next from running; what it had stored stays. The exit status is 0 where every part's is.
# It needs torch, triton, pytest, pytest-benchmark, hypothesis, pybind11 and ninja, nvcc for the CUDA part of the
# extension, and no network. XRK_COMMIT names the sources in the results where they lie outside a git repository.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

device=cuda
chosen=
parts=
while :; do
    case ${1:-} in
        --cpu) device=cpu ;;
        --parts)
            chosen=${2:-}
            shift
            ;;
        *) break ;;
    esac
    shift
done
limit=${1:-540}
folder=${2:-benchmarks/results}
case $limit in
    '' | *[!0-9]*)
        echo "SECONDS is '$limit'; expected a whole number of seconds" >&2
        exit 2
        ;;
esac
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
summary=$folder/gpu_summary.txt
python=${PYTHON:-python3}
started=$SECONDS
failed=0
export PYTHONUNBUFFERED=1

# A CUDA toolkit that is not on PATH.
if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
    export PATH=$PATH:/usr/local/cuda/bin
fi

say() {
    printf '%s\n' "$*" | tee -a "$summary"
}

wanted() {
    parts+=",$1,"
    [ -z "$chosen" ] || [ "$1" = build ] || [[ ,$chosen, == *,$1,* ]]
}

left() {
    echo $((limit - (SECONDS - started)))
}

# part NAME SLICE COMMAND...: runs it for at most SLICE seconds of what is left; its output goes to gpu_NAME.log.
part() {
    local name=$1 slice=$2 begun=$SECONDS status=0
    shift 2
    if ! wanted "$name"; then return; fi
    if [ "$(left)" -lt 10 ]; then
        say "$name: not run, the time is over"
        failed=1
        return
    fi
    if [ "$slice" -gt "$(left)" ]; then slice=$(left); fi
    echo "== $name (at most $slice s): $*"
    # An interrupt lets pytest print what it has; a process that ignores it is killed.
    timeout --signal=INT --kill-after=10 "$slice" "$@" >"$folder/gpu_$name.log" 2>&1 || status=$?
    tail -n 12 "$folder/gpu_$name.log"
    if [ "$status" -ne 0 ]; then failed=1; fi
    say "$name: exit status $status after $((SECONDS - begun)) s, slice $slice s"
}

# Several processes compile Triton kernels at a time, where pytest-xdist is there.
workers=()
if "$python" -c 'import xdist' 2>/dev/null && [ "$device" = cuda ]; then
    workers=(-n 6 --dist worksteal)
fi

[ -n "$chosen" ] || : >"$summary"
say "$(date -u '+%Y-%m-%d %H:%M:%S') UTC, device $device, $limit s"
if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$summary"
fi

# Without pytest-benchmark everything is checked and nothing is timed.
timed=part
plain=()
if "$python" -c 'import pytest_benchmark' 2>/dev/null; then
    plain=(--benchmark-disable)
else
    timed=untimed
fi
untimed() {
    if ! wanted "$1"; then return; fi
    say "$1: not run, pytest-benchmark is not here"
    failed=1
}

tests=tests/kernels/gpu
# Warnings of other packages' versions say nothing about this one; an operator that runs as its reference does.
check=("$python" -m pytest -q -rfE --tb=short -W default -W error::xrk.kernels.dispatch.FallbackWarning "${plain[@]}")
measure=("$python" -m pytest -q --device "$device" --results "$folder")
install=("$python" -m pip install --quiet --no-build-isolation --no-deps -e .)
scans=(benchmarks/bench_selective_scan{_2d,,_2d_backward}.py)
layers=(benchmarks/bench_{deform_conv2d,conv2d_pair,conv2d,group_norm,layer_norm,depthwise_conv2d,wavelet2d,pixels}.py)
if [ "$device" = cuda ]; then
    part build 150 "${install[@]}"
    part numerics 150 "${check[@]}" "${workers[@]}" "$tests/test_numerics.py" "$tests/test_gradients.py" \
        "$tests/test_pixels.py" "$tests/test_windows.py"
    "$timed" scans 100 "${measure[@]}" "${scans[@]}"
    "$timed" layers 120 "${measure[@]}" "${layers[@]}"
    part networks 90 "${check[@]}" -s tests/models/gpu
    part runtime 120 "${check[@]}" -s tests/runtime/gpu
    part video 90 "$python" benchmarks/bench_video.py windows --device cuda --output "$folder/video_windows_cuda.json"
    part large 60 "${check[@]}" "$tests/test_large.py"
    part torch 60 "${check[@]}" "${workers[@]}" "$tests/test_torch.py"
    # From here on with what time is left.
    "$timed" full_scans 300 "${measure[@]}" --full "${scans[@]}"
    "$timed" full_layers 300 "${measure[@]}" --full "${layers[@]}"
    if sanitizer=$(command -v compute-sanitizer); then
        part sanitizer 300 "$sanitizer" --error-exitcode 9 "${check[@]}" -x "$tests/test_numerics.py" \
            -k 'test_every_dtype and float16'
    fi
else
    export XRK_GPU_TESTS_DEVICE=cpu
    part build 150 env XRK_CUDA=0 "${install[@]}"
    part numerics 120 "${check[@]}" "$tests/test_numerics.py" -k 'layer_norm and not size'
    "$timed" layers 120 "${measure[@]}" --tiny benchmarks/bench_layer_norm.py benchmarks/bench_pixels.py
    part networks 90 "${check[@]}" -s tests/models/gpu
    part video 90 "$python" benchmarks/bench_video.py windows --size 64 --targets 2 --output "$folder/video_windows_cpu.json"
    part large 60 "${check[@]}" "$tests/test_large.py"
fi

for name in ${chosen//,/ }; do
    if [[ $parts != *,$name,* ]]; then
        say "$name: there is no such part"
        failed=1
    fi
done
if compgen -G "$folder/ops_*.json" >/dev/null; then
    "$python" benchmarks/report.py "$folder"/ops_*.json
fi
cat "$summary"
exit "$failed"
