"""The host module and the roofline: what they say about this machine, without a word on how fast it has to be."""

import math
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dlkernels import _host
from dlkernels.bench import limits

ISAS = ["default", "avx2", "avx512", "avx512_bf16", "avx512_amx"]
REQUIRES = {
    "default": set(),
    "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2"},
    "avx512": {"avx512f", "avx512dq", "avx512vl", "avx512bw"},
    "avx512_bf16": {"avx512_bf16"},
    "avx512_amx": {"amx_tile", "amx_bf16"},
}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MEASURED = {
    "flops": [{"dtype": "float32", "threads": 2, "flops_per_s": 1e11}],
    "bandwidth": [
        {"bytes": 1 << 14, "threads": 2, "bytes_per_s": 16e10, "kind": "read"},
        {"bytes": 1 << 14, "threads": 2, "bytes_per_s": 8e10, "kind": "copy"},
        {"bytes": 1 << 18, "threads": 2, "bytes_per_s": 1e10, "kind": "copy"},
    ],
}


def cpuinfo(field: str) -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field]


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    return done.stdout.strip()


@on_linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has instruction sets to choose from")
def test_features_are_those_the_kernel_reports() -> None:
    known = {"sse4_2", "avx", "f16c", "fma", "avx2", "bmi1", "bmi2", "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
    flags = set(cpuinfo("flags")[0].split())
    features = set(_host.features())
    assert features <= flags
    assert known & flags <= features  # an AMX or BF16 flag may be missing from an old kernel's list or need a permission; these may not


@on_linux
def test_cpu_name() -> None:
    assert _host.cpu_name() == _host.cpu_name().strip() != ""
    if platform.machine() == "x86_64":
        assert _host.cpu_name() == cpuinfo("model name")[0]


def test_isas_ascend_and_have_their_features() -> None:
    supported = _host.supported_isas()
    assert supported == ISAS[: len(supported)] and supported
    features = set(_host.features())
    assert all(REQUIRES[isa] <= features for isa in supported)
    if len(supported) < len(ISAS):
        assert not REQUIRES[ISAS[len(supported)]] <= features


@on_linux
def test_preferred_isa_is_the_last_that_is_fast() -> None:
    expected = _host.supported_isas()[-1]
    if expected == "avx512_bf16" and "GenuineIntel" in cpuinfo("vendor_id"):
        expected = "avx512"
    assert _host.preferred_isa() == expected


def test_amx_permission_and_features_agree() -> None:
    granted = _host.request_amx()
    assert granted is _host.request_amx()  # asking twice changes nothing
    assert granted or not [name for name in _host.features() if name.startswith("amx")]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_cores_follow_the_affinity() -> None:
    cores = _host.cores()
    assert set(cores) == {"logical", "physical"}
    assert 1 <= cores["physical"] <= cores["logical"] <= len(os.sched_getaffinity(0))
    one = run_python(
        "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        f"import sys; sys.path.insert(0, {str(Path(_host.__file__).parent)!r})\n"
        "import _host as host\n"
        "print(host.cores(), host.peak_flops('float32', 3, 0.002) > 0)"  # three threads on one core: they have to take turns
    )
    assert one == "{'logical': 1, 'physical': 1} True"


@on_linux
def test_cache_bytes() -> None:
    caches = _host.cache_bytes()
    assert set(caches) == {"l1d", "l2", "l3"}
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    data = [folder for folder in folders if (folder / "type").read_text().strip() != "Instruction"]
    assert sum(size > 0 for size in caches.values()) == len(data)
    sizes = [size for size in caches.values() if size]
    assert sizes == sorted(sizes) and all(size % 1024 == 0 for size in sizes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_peak_flops_is_a_plausible_number(dtype: str, threads: int) -> None:
    peak = _host.peak_flops(dtype, threads, 0.005)
    assert 0 < peak < threads * 1e15  # a loop that the compiler has removed would be beyond


@pytest.mark.parametrize("kind", ["read", "copy", "triad"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [3 * 2 * 512, 100_003, 1 << 22])
def test_bandwidth_is_a_plausible_number(kind: str, threads: int, size: int) -> None:
    assert 0 < _host.bandwidth(size, threads, 0.002, kind) < threads * 1e14


@pytest.mark.parametrize(
    ("arguments", "named", "got"),
    [
        (("int8", 1, 0.1), "dtype", "int8"),
        (("float32", 0, 0.1), "threads", "0"),
        (("float32", -3, 0.1), "threads", "-3"),
        (("float32", 1 << 20, 0.1), "threads", "1048576"),
        (("float32", 1, 0.0), "seconds", "0.0"),
        (("float32", 1, math.nan), "seconds", "nan"),
        (("float32", 1, math.inf), "seconds", "inf"),
    ],
)
def test_peak_flops_names_a_bad_argument(arguments: tuple[str, int, float], named: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} must be .*, got '?{got}"):
        _host.peak_flops(*arguments)


@pytest.mark.parametrize(
    ("arguments", "named", "got"),
    [
        ((1 << 20, 1, 0.1, "write"), "kind", "write"),
        ((1 << 20, 0, 0.1, "read"), "threads", "0"),
        ((1 << 20, 1, -1.0, "read"), "seconds", "-1.0"),
        ((-5, 1, 0.1, "read"), "bytes", "-5"),
        ((3 * 512 - 1, 1, 0.1, "triad"), "bytes", "1535"),
        ((1 << 60, 1, 0.1, "copy"), "bytes", str(1 << 60)),
    ],
)
def test_bandwidth_names_a_bad_argument(arguments: tuple[int, int, float, str], named: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} must be .*, got '?{got}"):
        _host.bandwidth(*arguments)


def test_wrong_types_raise_type_error() -> None:
    with pytest.raises(TypeError, match="threads: "):
        _host.peak_flops("float32", "two", 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bytes: "):
        _host.bandwidth(1e6, 1, 0.1, "read")  # type: ignore[arg-type]


def test_other_python_threads_run_during_a_measurement() -> None:
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    def ticked_meanwhile() -> bool:
        before = ticks[0]
        _host.peak_flops("float32", 1, 0.02)
        return ticks[0] > before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that this thread gives way only where a call releases the interpreter
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        assert any(ticked_meanwhile() for _ in range(20))
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        ticker.join()


def test_measure_returns_what_the_results_file_holds() -> None:
    seen: list[tuple[int, int, str]] = []
    measured = limits.measure([2, 1, 2], quick=True, progress=lambda *step: seen.append(step))
    assert set(measured) == {"flops", "bandwidth"}
    assert [(row["threads"], row["dtype"]) for row in measured["flops"]] == [(n, dtype) for n in (1, 2) for dtype in limits.DTYPES]
    assert {row["bytes"] for row in measured["bandwidth"]} == set(limits.QUICK_SIZES)
    assert all(set(row) == {"bytes", "threads", "bytes_per_s", "kind"} and row["bytes_per_s"] > 0 for row in measured["bandwidth"])
    assert [done for done, _, _ in seen] == list(range(len(seen))) and seen[-1][0] == seen[-1][1]
    assert limits.measure((1, 2), quick=True) is measured
    for dtype in limits.DTYPES:
        assert limits.attainable(measured, dtype, 2, 1e9, 1e6) > 0


@pytest.mark.parametrize("threads", [[], [0], [1, -1]])
def test_measure_names_bad_threads(threads: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^threads must be "):
        limits.measure(threads, quick=True)


def test_attainable_is_the_roofline() -> None:
    assert limits.attainable(MEASURED, "float32", 2, 1e11, 0) == 1.0  # arithmetic alone decides
    assert limits.attainable(MEASURED, "float32", 2, 0, 1 << 14) == (1 << 14) / 16e10  # memory alone, the best kind of access
    assert limits.attainable(MEASURED, "float32", 2, 0, 1000) == 1000 / 16e10  # below the smallest size
    assert limits.attainable(MEASURED, "float32", 2, 0, 1e10) == 1.0  # beyond the largest
    assert limits.attainable(MEASURED, "float32", 2, 0, 1 << 16) == pytest.approx((1 << 16) / 4e10)  # halfway: the geometric mean
    assert limits.attainable(MEASURED, "float32", 2, 0, 0) == 0.0


def test_attainable_fills_a_dip() -> None:
    noisy = [*MEASURED["bandwidth"], {"bytes": 1 << 16, "threads": 2, "bytes_per_s": 1.0, "kind": "copy"}]
    assert limits.attainable({**MEASURED, "bandwidth": noisy}, "float32", 2, 0, 1 << 16) == (1 << 16) / 1e10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int8", 2, 1.0, 1.0), "dtype 'int8' on threads=2.*float32 x 2"),
        (("float32", 4, 1.0, 1.0), "threads=4.*float32 x 2"),
        (("float32", 2, -1.0, 1.0), "flops and bytes must be at least 0, got -1.0"),
        (("float32", 2, 1.0, math.nan), "flops and bytes must be at least 0, got 1.0 and nan"),
    ],
)
def test_attainable_names_what_was_not_measured(arguments: tuple[str, int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits.attainable(MEASURED, *arguments)
