// xrk._native: the parts of xrk that are compiled ahead of time. Not linked against torch, so that no release of torch
// can break it. Every argument is checked here; nothing below this file checks again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/pixels.h"
#include "cpu/threads.h"
#ifdef XRK_HAVE_CUDA
#include "cuda/pixels.h"
#include "cuda/windows.h"
#endif

namespace py = pybind11;

void bind_layers(py::module_& m);
void bind_scan(py::module_& m);
void bind_tiff_read(py::module_& m);
void bind_tiff_write(py::module_& m);

namespace {

namespace cpu = xrk::cpu;

constexpr std::size_t pixel_bytes[cpu::PIXELS] = {1, 2, 2, 4, 4, 8};
constexpr std::size_t value_bytes[cpu::VALUES] = {4, 8};

std::string describe(const py::handle& object) { return py::str(py::type::handle_of(object).attr("__name__")); }

// A C-contiguous, aligned array in the machine's byte order, or a sentence that says what it is instead.
py::array as_array(const py::object& object, const char* name) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(name) + " is a " + describe(object) + "; expected a numpy array");
  }
  py::array array = py::reinterpret_borrow<py::array>(object);
  // '=' is the machine's order and '|' none: numpy writes neither '<' nor '>' for a dtype in native order.
  const char order = array.dtype().byteorder();
  if (order != '=' && order != '|') {
    throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) +
                         " in the other byte order; expected the machine's");
  }
  constexpr int needed = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & needed) != needed) {
    throw py::value_error(std::string(name) + " is not C-contiguous and aligned; pass numpy.ascontiguousarray of it");
  }
  return array;
}

std::string dtype_of(const py::array& array) { return py::str(array.dtype()); }

cpu::Pixel pixel_of(const py::array& array, const char* name) {
  const char kind = array.dtype().kind();
  const auto bytes = array.itemsize();
  if (kind == 'u' && bytes == 1) return cpu::U8;
  if (kind == 'u' && bytes == 2) return cpu::U16;
  if (kind == 'i' && bytes == 2) return cpu::I16;
  if (kind == 'i' && bytes == 4) return cpu::I32;
  if (kind == 'f' && bytes == 4) return cpu::F32;
  if (kind == 'f' && bytes == 8) return cpu::F64;
  throw py::type_error(std::string(name) + " has dtype " + dtype_of(array) +
                       "; expected uint8, uint16, int16, int32, float32 or float64");
}

cpu::Value value_of(const py::array& array, const char* name) {
  const char kind = array.dtype().kind();
  if (kind == 'f' && array.itemsize() == 4) return cpu::V32;
  if (kind == 'f' && array.itemsize() == 8) return cpu::V64;
  throw py::type_error(std::string(name) + " has dtype " + dtype_of(array) + "; expected float32 or float64");
}

void check_same_shape(const py::array& a, const char* a_name, const py::array& b, const char* b_name) {
  bool same = a.ndim() == b.ndim();
  for (py::ssize_t axis = 0; same && axis < a.ndim(); ++axis) same = a.shape(axis) == b.shape(axis);
  if (!same) {
    throw py::value_error(std::string(b_name) + " has shape " + std::string(py::str(b.attr("shape"))) + "; expected " +
                          a_name + "'s, " + std::string(py::str(a.attr("shape"))));
  }
}

// `out` may be an input (same start, same item size), since each pixel is read before it is written; a shifted overlap
// would read what was already written.
void check_out(const py::array& out, const py::array& input, const char* name) {
  const auto out_first = reinterpret_cast<std::uintptr_t>(out.data());
  const auto input_first = reinterpret_cast<std::uintptr_t>(input.data());
  const bool apart = out_first + static_cast<std::size_t>(out.nbytes()) <= input_first ||
                     input_first + static_cast<std::size_t>(input.nbytes()) <= out_first;
  const bool in_place = out_first == input_first && out.itemsize() == input.itemsize();
  if (!apart && !in_place) {
    throw py::value_error(std::string("out shares memory with ") + name + "; pass an array of its own, or " + name +
                          " itself where the item sizes agree");
  }
}

void* writable(py::array& out) {
  if (!out.writeable()) throw py::value_error("out is read-only; pass an array that can be written to");
  return out.mutable_data();
}

void check_finite(double value, const char* name) {
  if (!std::isfinite(value)) {
    throw py::value_error(std::string(name) + " is " + std::string(py::str(py::float_(value))) +
                          "; expected a finite number");
  }
}

std::size_t check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected 1 or more");
  return static_cast<std::size_t>(threads);
}

py::object normalise(const py::object& x_, double black, double inverse_range, const py::object& out_, int threads_) {
  const py::array x = as_array(x_, "x");
  py::array out = as_array(out_, "out");
  const cpu::Pixel pixel = pixel_of(x, "x");
  const cpu::Value value = value_of(out, "out");
  check_same_shape(x, "x", out, "out");
  check_out(out, x, "x");
  check_finite(black, "black");
  check_finite(inverse_range, "inverse_range");
  const std::size_t threads = check_threads(threads_);
  const char* source = static_cast<const char*>(x.data());
  char* target = static_cast<char*>(writable(out));
  const auto count = static_cast<std::size_t>(x.size());
  const cpu::NormaliseSpan span = cpu::active_path().normalise[pixel][value];
  {
    py::gil_scoped_release unlocked;
    cpu::split(count, threads, [&](std::size_t first, std::size_t last, std::size_t) {
      span(source + first * pixel_bytes[pixel], black, inverse_range, target + first * value_bytes[value],
           last - first);
    });
  }
  return py::none();
}

std::size_t apply_residual(const py::object& x_, const py::object& before_, const py::object& after_, double scale,
                           const py::object& out_, int threads_) {
  const py::array x = as_array(x_, "x");
  const py::array before = as_array(before_, "before");
  const py::array after = as_array(after_, "after");
  py::array out = as_array(out_, "out");
  const cpu::Pixel pixel = pixel_of(x, "x");
  const cpu::Value value = value_of(before, "before");
  if (value_of(after, "after") != value) {
    throw py::type_error("after has dtype " + dtype_of(after) + "; expected before's, " + dtype_of(before));
  }
  if (pixel_of(out, "out") != pixel) {
    throw py::type_error("out has dtype " + dtype_of(out) + "; expected x's, " + dtype_of(x));
  }
  check_same_shape(x, "x", before, "before");
  check_same_shape(x, "x", after, "after");
  check_same_shape(x, "x", out, "out");
  check_out(out, x, "x");
  check_out(out, before, "before");
  check_out(out, after, "after");
  check_finite(scale, "scale");
  const std::size_t threads = check_threads(threads_);
  const char* source = static_cast<const char*>(x.data());
  const char* from = static_cast<const char*>(before.data());
  const char* to = static_cast<const char*>(after.data());
  char* target = static_cast<char*>(writable(out));
  const auto count = static_cast<std::size_t>(x.size());
  const cpu::ApplySpan span = cpu::active_path().apply_residual[pixel][value];
  std::vector<std::size_t> limited(std::min(threads, count / cpu::smallest_share + 1), 0);
  {
    py::gil_scoped_release unlocked;
    cpu::split(count, threads, [&](std::size_t first, std::size_t last, std::size_t part) {
      limited[part] = span(source + first * pixel_bytes[pixel], from + first * value_bytes[value],
                           to + first * value_bytes[value], scale, target + first * pixel_bytes[pixel], last - first);
    });
  }
  std::size_t total = 0;
  for (const std::size_t part : limited) total += part;
  return total;
}

void set_simd(const std::string& name) {
  if (cpu::select_path(name.c_str())) return;
  const char* names[3];
  const std::size_t found = cpu::supported_paths(names);
  std::string list = names[0];
  for (std::size_t i = 1; i < found; ++i) list += std::string(", ") + names[i];
  throw py::value_error("there is no path '" + name + "' on this processor; it runs: " + list);
}

py::list supported_simd() {
  const char* names[3];
  const std::size_t found = cpu::supported_paths(names);
  py::list list;
  for (std::size_t i = 0; i < found; ++i) list.append(names[i]);
  return list;
}

#ifdef XRK_HAVE_CUDA
namespace cuda = xrk::cuda;

cuda::Value cuda_value(const std::string& name) {
  if (name == "float16") return cuda::HALF;
  if (name == "float32") return cuda::FLOAT;
  throw py::value_error("dtype is '" + name + "'; expected 'float16' or 'float32'");
}

const void* device_pointer(std::uintptr_t address, const char* name) {
  if (address == 0) throw py::value_error(std::string(name) + " is a null pointer; expected a device address");
  return reinterpret_cast<const void*>(address);
}

cuda::Border cuda_border(const std::string& name) {
  if (name == "reflect") return cuda::REFLECT;
  if (name == "symmetric") return cuda::SYMMETRIC;
  if (name == "edge") return cuda::EDGE;
  if (name == "constant") return cuda::CONSTANT;
  throw py::value_error("border is '" + name + "'; expected 'reflect', 'symmetric', 'edge' or 'constant'");
}

void check_rows(const cuda::PackedRows& x, std::int64_t top, std::int64_t left, std::int64_t out_rows,
                std::int64_t out_columns) {
  constexpr std::int64_t most = std::int64_t{1} << 30;
  const bool inside = x.first >= 0 && x.rows > 0 && x.height <= most && x.first <= x.height - x.rows;
  if (!inside || x.width < 1 || x.width > most) throw py::value_error("the rows given lie outside the image");
  if (x.bits != 10 && x.bits != 12 && x.bits != 14 && x.bits != 16) {
    throw py::value_error("bits is " + std::to_string(x.bits) + "; expected 10, 12, 14 or 16");
  }
  if (x.stride < static_cast<std::size_t>((x.width * x.bits + 7) / 8)) {
    throw py::value_error("stride is less than a row takes");
  }
  if (top < -most || top > most || left < -most || left > most || out_rows < 1 || out_rows > most || out_columns < 1 ||
      out_columns > most) {
    throw py::value_error("a window's place and sides must be below 2**30");
  }
}

void bind_windows(py::module_& m) {
  m.def(
      "read_window",
      [](std::uintptr_t x, std::size_t stride, std::int64_t first, std::int64_t rows, std::int64_t height,
         std::int64_t width, int bits, std::int64_t top, std::int64_t left, const std::string& border, double black,
         double inverse_range, std::uintptr_t out, std::int64_t out_rows, std::int64_t out_columns,
         const std::string& dtype, std::uintptr_t stream) {
        const cuda::PackedRows given{device_pointer(x, "x"), stride, first, rows, height, width, bits};
        check_rows(given, top, left, out_rows, out_columns);
        const cuda::Border beyond = cuda_border(border);
        const cuda::Value value = cuda_value(dtype);
        check_finite(black, "black");
        check_finite(inverse_range, "inverse_range");
        void* target = const_cast<void*>(device_pointer(out, "out"));
        py::gil_scoped_release unlocked;
        cuda::read_window(given, top, left, beyond, black, inverse_range, target, out_rows, out_columns, value, stream);
      },
      py::kw_only(), py::arg("x"), py::arg("stride"), py::arg("first"), py::arg("rows"), py::arg("height"),
      py::arg("width"), py::arg("bits"), py::arg("top"), py::arg("left"), py::arg("border"), py::arg("black"),
      py::arg("inverse_range"), py::arg("out"), py::arg("out_rows"), py::arg("out_columns"), py::arg("dtype"),
      py::arg("stream"),
      "The window of out_rows x out_columns pixels at (top, left) of an image of height x width pixels, which may reach\n"
      "beyond it, as (count - black) * inverse_range in double precision, stored as dtype 'float16' or 'float32' at\n"
      "device address out. x: device address of the rows [first, first + rows), `stride` bytes apart, of uint16 pixels\n"
      "or of 10, 12 or 14 bits packed as in TIFF; every row that the window shows must be among them. border: what\n"
      "numpy.pad calls so, 'constant' being 0 in the output. Queued on the stream of the current device.");
  m.def(
      "round_counts",
      [](std::uintptr_t v, double scale, double offset, std::uintptr_t out, std::size_t count,
         const std::string& dtype, std::uintptr_t misfits, std::uintptr_t stream) {
        const cuda::Value value = cuda_value(dtype);
        check_finite(scale, "scale");
        check_finite(offset, "offset");
        if (count == 0) return;
        const void* source = device_pointer(v, "v");
        void* target = const_cast<void*>(device_pointer(out, "out"));
        void* counters = const_cast<void*>(device_pointer(misfits, "misfits"));
        py::gil_scoped_release unlocked;
        cuda::round_counts(source, scale, offset, target, count, value, counters, stream);
      },
      py::arg("v"), py::arg("scale"), py::arg("offset"), py::arg("out"), py::arg("count"), py::arg("dtype"),
      py::arg("misfits"), py::arg("stream"),
      "v * scale + offset for `count` values of dtype 'float16' or 'float32', rounded half to even and limited to uint16\n"
      "at device address out, as tiff_convert on the CPU. Adds to the two uint64 at device address `misfits` how many\n"
      "were limited, and how many were no numbers (they become 0). Queued on `stream` of the current device.");
}

void bind_cuda(py::module_& parent) {
  py::module_ m = parent.def_submodule(
      "cuda", "The pixel conversions of uint16 frames on an NVIDIA device, on raw device addresses and a stream.");
  m.attr("RUNTIME_VERSION") = cuda::runtime_version();
  m.def("device_count", &cuda::device_count, "How many CUDA devices the driver offers; 0 without a driver.");
  m.def(
      "normalise",
      [](std::uintptr_t x, double black, double inverse_range, std::uintptr_t out, std::size_t count,
         const std::string& dtype, std::uintptr_t stream) {
        const cuda::Value value = cuda_value(dtype);
        check_finite(black, "black");
        check_finite(inverse_range, "inverse_range");
        if (count == 0) return;
        const void* source = device_pointer(x, "x");
        void* target = const_cast<void*>(device_pointer(out, "out"));
        py::gil_scoped_release unlocked;
        cuda::normalise(source, black, inverse_range, target, count, value, stream);
      },
      py::arg("x"), py::arg("black"), py::arg("inverse_range"), py::arg("out"), py::arg("count"), py::arg("dtype"),
      py::arg("stream"),
      "out = (x - black) * inverse_range for `count` uint16 pixels at device address x, in double precision, stored as\n"
      "dtype 'float16' or 'float32' at device address out. Queued on `stream` of the current device.");
  m.def(
      "apply_residual",
      [](std::uintptr_t x, std::uintptr_t before, std::uintptr_t after, double scale, std::uintptr_t out,
         std::size_t count, const std::string& dtype, std::uintptr_t limited, std::uintptr_t stream) {
        const cuda::Value value = cuda_value(dtype);
        check_finite(scale, "scale");
        if (count == 0) return;
        const void* source = device_pointer(x, "x");
        const void* from = device_pointer(before, "before");
        const void* to = device_pointer(after, "after");
        void* target = const_cast<void*>(device_pointer(out, "out"));
        void* counter = const_cast<void*>(device_pointer(limited, "limited"));
        py::gil_scoped_release unlocked;
        cuda::apply_residual(source, from, to, scale, target, count, value, counter, stream);
      },
      py::arg("x"), py::arg("before"), py::arg("after"), py::arg("scale"), py::arg("out"), py::arg("count"),
      py::arg("dtype"), py::arg("limited"), py::arg("stream"),
      "out = x + (after - before) * scale for `count` uint16 pixels, as the function of this name on the CPU; before and\n"
      "after have dtype 'float16' or 'float32'. Adds the number of limited pixels to the uint64 at device address\n"
      "`limited`. Queued on `stream` of the current device.");
  bind_windows(m);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled part of xrk: pixel conversions, layers and scans, with run-time dispatch over vector units.";
#ifdef XRK_HAVE_CUDA
  m.attr("HAVE_CUDA") = true;
  bind_cuda(m);
#else
  m.attr("HAVE_CUDA") = false;
#endif
  m.def("normalise", &normalise, py::arg("x"), py::arg("black"), py::arg("inverse_range"), py::arg("out"),
        py::arg("threads") = 1,
        "out = (x - black) * inverse_range, computed in float64 and stored as out's dtype.\n\n"
        "x: C-contiguous array of uint8, uint16, int16, int32, float32 or float64, of any shape.\n"
        "out: C-contiguous float32 or float64 array of the same shape; it may be x itself, not overlap it otherwise.\n"
        "threads: how many threads at most share the work. The result does not depend on it.\n"
        "Raises TypeError for another kind or dtype, ValueError for another layout, shape or a value that is not finite.");
  m.def("apply_residual", &apply_residual, py::arg("x"), py::arg("before"), py::arg("after"), py::arg("scale"),
        py::arg("out"), py::arg("threads") = 1,
        "out = x + (after - before) * scale, computed in float64; returns how many pixels were limited.\n\n"
        "x: C-contiguous array of uint8, uint16, int16, int32, float32 or float64, of any shape.\n"
        "before, after: C-contiguous float32 or float64 arrays, both of one dtype, of x's shape.\n"
        "out: C-contiguous array of x's dtype and shape; it may be an input with the same item size, not overlap one\n"
        "otherwise.\n"
        "Integers are rounded half to even and limited to the dtype's range, and those limited are counted; where the\n"
        "sum is not a number, the pixel keeps x's value and is not counted. Floats are neither rounded nor limited.\n"
        "threads: how many threads at most share the work. The result does not depend on it.\n"
        "Raises TypeError for another kind or dtype, ValueError for another layout, shape or a scale that is not finite.");
  m.def(
      "simd", [] { return std::string(cpu::active_path().name); },
      "The path that all kernels on the CPU take: 'avx512', 'avx2' or 'baseline'.");
  m.def("supported_simd", &supported_simd, "The paths that run on this processor, widest first.");
  m.def("set_simd", &set_simd, py::arg("name"),
        "Makes all kernels take the path of this name, for the whole process: for tests and benchmarks. The pixel\n"
        "conversions give the same bits on every path; scans and layers differ by roundings, within their tolerances.\n"
        "Raises ValueError for a name that supported_simd() does not list.");
  bind_layers(m);
  bind_scan(m);
  bind_tiff_read(m);
  bind_tiff_write(m);
}
