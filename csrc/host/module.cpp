// dlkernels._host: what the CPU is, and what it can do at most. No torch in here, so it loads before any kernel is chosen.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"
#include "roofline.h"

namespace py = pybind11;
namespace host = dlkernels::host;

PYBIND11_MODULE(_host, m) {
    m.doc() = "The CPU this process runs on: its name, instruction sets, cores and caches, and its measured limits.";

    m.def("cpu_name", &host::cpu_name, "The CPU's product name, or 'unknown'.");
    m.def("features", &host::features,
          "Instruction sets that the CPU has and the operating system lets this process use, named as in /proc/cpuinfo.");
    m.def("cores", [] {
        const host::Cores cores = host::cores();
        return py::dict(py::arg("logical") = cores.logical, py::arg("physical") = cores.physical);
    }, "Hardware threads ('logical') and cores ('physical') this process may use: affinity and cgroup quota count.");
    m.def("cache_bytes", [] {
        const host::Caches caches = host::cache_bytes();
        return py::dict(py::arg("l1d") = caches.l1d, py::arg("l2") = caches.l2, py::arg("l3") = caches.l3);
    }, "Bytes of one instance of each data cache; 0 where there is none or the system does not say.");

    m.def("supported_isas", &host::supported_isas,
          "The CPU libraries that can run here, ascending: of 'default', 'avx2', 'avx512', 'avx512_bf16', 'avx512_amx'.");
    m.def("preferred_isa", &host::preferred_isa,
          "The one of supported_isas() that should run: the last, but not 'avx512_bf16' on Intel, whose bfloat16 product is slower "
          "than its float32 one.");
    m.def("request_amx", &host::request_amx,
          "Ask the operating system for AMX's tile registers, for all threads of this process; True once they are granted.");

    m.def("peak_flops", &host::peak_flops, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
          py::call_guard<py::gil_scoped_release>(),
          "Most flop/s that `threads` threads reach together with operands in registers.\n\n"
          "dtype: 'float16', 'bfloat16', 'float32' or 'float64'; the fastest instruction that sums in float32 or more.\n"
          "seconds: time to spend, in (0, 60].\n"
          "Raises ValueError for an argument out of range.");
    m.def("bandwidth", &host::bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"), py::arg("kind"),
          py::call_guard<py::gil_scoped_release>(),
          "Most byte/s, read and written, that `threads` threads reach together, each passing over its own slice of `bytes` in all.\n\n"
          "kind: 'read' (load x), 'copy' (y = x) or 'triad' (z = x + s y).\n"
          "seconds: time to spend, in (0, 60].\n"
          "Raises ValueError for an argument out of range, MemoryError where the memory is not to be had.");
}
