// The selective scans of xrk._native, on C-contiguous numpy arrays: maps of float16, bfloat16 (as uint16, which numpy
// has instead), float32 or float64; everything else float32, or float64 beside maps of that. The operators in
// kernels/scan check their arguments in the caller's words; here every array is checked once more against the sizes that
// go with it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "cpu/scan.h"

namespace py = pybind11;

namespace {

namespace cpu = xrk::cpu;

using Shape = std::initializer_list<std::int64_t>;

std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (const std::int64_t side : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(side);
  return text + ")";
}

// A C-contiguous, aligned array of this shape; a side of -1 is any size of 1 or more.
py::array checked_shape(const py::object& object, const char* name, const Shape& shape) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(name) + " is a " +
                         std::string(py::str(py::type::handle_of(object).attr("__name__"))) +
                         "; expected a numpy array");
  }
  py::array array = py::reinterpret_borrow<py::array>(object);
  constexpr int needed = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & needed) != needed) {
    throw py::value_error(std::string(name) + " is not C-contiguous and aligned; pass numpy.ascontiguousarray of it");
  }
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t axis = 0;
  for (const std::int64_t side : shape) {
    if (!fits) break;
    fits = side < 0 ? array.shape(axis) >= 1 : array.shape(axis) == side;
    ++axis;
  }
  if (!fits) {
    throw py::value_error(std::string(name) + " has shape " + std::string(py::str(array.attr("shape"))) +
                          "; expected " + text_of(shape) + " (-1: 1 or more)");
  }
  return array;
}

[[noreturn]] void throw_dtype(const py::array& array, const char* name, const std::string& expected) {
  throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) + "; expected " +
                       expected);
}

template <typename T>
py::array checked(const py::object& object, const char* name, const Shape& shape) {
  const py::array array = checked_shape(object, name, shape);
  if (!py::dtype::of<T>().is(array.dtype())) throw_dtype(array, name, py::str(py::dtype::of<T>()));
  return array;
}

template <typename T>
const T* read(const py::object& object, const char* name, const Shape& shape) {
  return static_cast<const T*>(checked<T>(object, name, shape).data());
}

void* writable(py::array& array, const char* name) {
  if (!array.writeable()) throw py::value_error(std::string(name) + " is read-only; pass an array of its own");
  return array.mutable_data();
}

template <typename T>
T* write(const py::object& object, const char* name, const Shape& shape) {
  py::array array = checked<T>(object, name, shape);
  return static_cast<T*>(writable(array, name));
}

// What the kernels keep of one channel.
void check_states(std::int64_t states, const char* name) {
  if (states > cpu::most_states) {
    throw py::value_error(std::string(name) + " has " + std::to_string(states) + " states; expected 1 to " +
                          std::to_string(cpu::most_states));
  }
}

std::size_t check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected 1 or more");
  return static_cast<std::size_t>(threads);
}

template <typename T>
bool is_of(const py::object& x) {
  return py::isinstance<py::array>(x) && py::dtype::of<T>().is(py::reinterpret_borrow<py::array>(x).dtype());
}

bool is_double(const py::object& x) { return is_of<double>(x); }

// x (B, H, W, D), whose dtype says what else is expected.
template <typename T>
cpu::Map map_of(const py::object& x_, std::int64_t& channels) {
  const py::array x = checked_shape(x_, "x", {-1, -1, -1, -1});
  channels = x.shape(3);
  cpu::Map map{x.data(), cpu::S_F64, x.shape(0), x.shape(1), x.shape(2)};
  if (sizeof(T) == 8) return map;
  const py::dtype dtype = x.dtype();
  if (is_of<float>(x_)) {
    map.storage = cpu::S_F32;
  } else if (dtype.is(py::dtype("float16"))) {
    map.storage = cpu::S_F16;
  } else if (is_of<std::uint16_t>(x_)) {
    map.storage = cpu::S_BF16;
  } else {
    throw_dtype(x, "x", "float16, uint16 (for bfloat16), float32 or float64");
  }
  return map;
}

template <typename T>
cpu::Ss2dWeights<T> weights_of(std::int64_t channels, const py::object& projection_, const py::object& dt_weight_,
                               const py::object& dt_bias, const py::object& a_logs_, const py::object& skip) {
  const py::array dt_weight = checked<T>(dt_weight_, "dt_projs_weight", {4, channels, -1});
  const py::array a_logs = checked<T>(a_logs_, "A_logs", {4 * channels, -1});
  const std::int64_t rank = dt_weight.shape(2);
  const std::int64_t states = a_logs.shape(1);
  check_states(states, "A_logs");
  return {read<T>(projection_, "x_proj_weight", {4, rank + 2 * states, channels}),
          static_cast<const T*>(dt_weight.data()),
          read<T>(dt_bias, "dt_projs_bias", {4, channels}),
          static_cast<const T*>(a_logs.data()),
          read<T>(skip, "Ds", {4 * channels}),
          channels,
          rank,
          states};
}

template <typename T>
void selective_scan_2d(const py::object& x_, const py::object& projection, const py::object& dt_weight,
                       const py::object& dt_bias, const py::object& a_logs, const py::object& skip,
                       const py::object& out_, int threads_) {
  std::int64_t channels;
  const cpu::Map x = map_of<T>(x_, channels);
  const auto weights = weights_of<T>(channels, projection, dt_weight, dt_bias, a_logs, skip);
  py::array out = checked_shape(out_, "out", {x.batch, x.height, x.width, channels});
  const py::dtype expected = py::reinterpret_borrow<py::array>(x_).dtype();
  if (!out.dtype().is(expected)) throw_dtype(out, "out", "x's, " + std::string(py::str(expected)));
  void* y = writable(out, "out");
  if (x.values == y) throw py::value_error("out is x itself; pass an array of its own");
  const std::size_t threads = check_threads(threads_);
  py::gil_scoped_release unlocked;
  cpu::selective_scan_2d(x, weights, y, threads);
}

std::int64_t lines_of(int direction, const cpu::Map& x) {
  if (direction < 0 || direction > 3) {
    throw py::value_error("direction is " + std::to_string(direction) + "; expected 0, 1, 2 or 3");
  }
  return direction % 2 == 0 ? x.height : x.width;
}

template <typename T>
void summarise_lines(const py::object& x_, const py::object& projection, const py::object& dt_weight,
                     const py::object& dt_bias, const py::object& a_logs, const py::object& skip, int direction,
                     const py::object& sums_, const py::object& ends_, int threads_) {
  std::int64_t channels;
  const cpu::Map x = map_of<T>(x_, channels);
  const auto weights = weights_of<T>(channels, projection, dt_weight, dt_bias, a_logs, skip);
  const std::int64_t lines = lines_of(direction, x);
  T* sums = write<T>(sums_, "sums", {x.batch, lines, channels});
  T* ends = write<T>(ends_, "ends", {x.batch, lines, channels, weights.states});
  const std::size_t threads = check_threads(threads_);
  py::gil_scoped_release unlocked;
  cpu::summarise_lines(x, weights, direction, sums, ends, threads);
}

template <typename T>
void scan_lines(const py::object& x_, const py::object& projection, const py::object& dt_weight,
                const py::object& dt_bias, const py::object& a_logs, const py::object& skip, int direction,
                const py::object& states_, const py::object& out, int threads_) {
  std::int64_t channels;
  const cpu::Map x = map_of<T>(x_, channels);
  const auto weights = weights_of<T>(channels, projection, dt_weight, dt_bias, a_logs, skip);
  const std::int64_t lines = lines_of(direction, x);
  T* states = write<T>(states_, "states", {x.batch, lines, channels, weights.states});
  T* y = write<T>(out, "out", {x.batch, x.height, x.width, channels});
  if (x.values == y) throw py::value_error("out is x itself; pass an array of its own");
  const std::size_t threads = check_threads(threads_);
  py::gil_scoped_release unlocked;
  cpu::scan_lines(x, weights, direction, states, y, threads);
}

// The arguments that a 1-D scan and its gradients read.
template <typename T>
cpu::Scan1d<T> scan_of(const py::object& u_, const py::object& delta, const py::object& a_, const py::object& b_,
                       const py::object& c, const py::object& bias, bool softplus, const py::object& order_) {
  const py::array u = checked<T>(u_, "u", {-1, -1, -1});
  const std::int64_t batch = u.shape(0), length = u.shape(1), channels = u.shape(2);
  const py::array a = checked<T>(a_, "A", {channels, -1});
  const std::int64_t states = a.shape(1);
  check_states(states, "A");
  const py::array b = checked<T>(b_, "B", {batch, -1, length, states});
  const std::int64_t groups = b.shape(1);
  if (channels % groups != 0) {
    throw py::value_error("B has " + std::to_string(groups) + " groups; expected a divisor of u's " +
                          std::to_string(channels) + " channels");
  }
  cpu::Scan1d<T> scan{};
  scan.u = static_cast<const T*>(u.data());
  scan.delta = read<T>(delta, "delta", {batch, length, channels});
  scan.a = static_cast<const T*>(a.data());
  scan.b = static_cast<const T*>(b.data());
  scan.c = read<T>(c, "C", {batch, groups, length, states});
  scan.bias = bias.is_none() ? nullptr : read<T>(bias, "delta_bias", {channels});
  if (!order_.is_none()) {
    const bool per_image = py::isinstance<py::array>(order_) && py::reinterpret_borrow<py::array>(order_).ndim() == 2;
    const py::array order = per_image ? checked<std::int64_t>(order_, "order", {batch, length})
                                      : checked<std::int64_t>(order_, "order", {length});
    scan.order = static_cast<const std::int64_t*>(order.data());
    scan.order_per_image = per_image;
    for (py::ssize_t i = 0; i < order.size(); ++i) {
      if (scan.order[i] < 0 || scan.order[i] >= length) {
        throw py::value_error("order holds " + std::to_string(scan.order[i]) + "; expected positions from 0 to " +
                              std::to_string(length - 1));
      }
    }
  }
  scan.softplus = softplus;
  scan.batch = batch;
  scan.length = length;
  scan.channels = channels;
  scan.groups = groups;
  scan.states = states;
  return scan;
}

template <typename T>
void selective_scan(const py::object& u, const py::object& delta, const py::object& a, const py::object& b,
                    const py::object& c, const py::object& skip, const py::object& bias, bool softplus,
                    const py::object& order, const py::object& state, const py::object& out, int threads_) {
  cpu::Scan1d<T> scan = scan_of<T>(u, delta, a, b, c, bias, softplus, order);
  scan.skip = skip.is_none() ? nullptr : read<T>(skip, "D", {scan.channels});
  scan.state = write<T>(state, "state", {scan.batch, scan.channels, scan.states});
  scan.y = write<T>(out, "out", {scan.batch, scan.length, scan.channels});
  const std::size_t threads = check_threads(threads_);
  py::gil_scoped_release unlocked;
  cpu::selective_scan(scan, threads);
}

template <typename T>
void selective_scan_backward(const py::object& out_grad, const py::object& u, const py::object& delta,
                             const py::object& a, const py::object& b, const py::object& c, const py::object& bias,
                             bool softplus, const py::object& order, const py::object& state,
                             const py::object& state_grad, const py::object& u_grad, const py::object& delta_grad,
                             const py::object& a_grad, const py::object& b_grad, const py::object& c_grad,
                             int threads_) {
  cpu::Scan1d<T> scan = scan_of<T>(u, delta, a, b, c, bias, softplus, order);
  scan.start = read<T>(state, "state", {scan.batch, scan.channels, scan.states});
  cpu::Scan1dGradients<T> gradients{};
  gradients.y_grad = read<T>(out_grad, "out_grad", {scan.batch, scan.length, scan.channels});
  gradients.state_grad = write<T>(state_grad, "state_grad", {scan.batch, scan.channels, scan.states});
  gradients.u_grad = write<T>(u_grad, "u_grad", {scan.batch, scan.length, scan.channels});
  gradients.delta_grad = write<T>(delta_grad, "delta_grad", {scan.batch, scan.length, scan.channels});
  gradients.a_grad = write<T>(a_grad, "A_grad", {scan.channels, scan.states});
  gradients.b_grad = write<T>(b_grad, "B_grad", {scan.batch, scan.groups, scan.length, scan.states});
  gradients.c_grad = write<T>(c_grad, "C_grad", {scan.batch, scan.groups, scan.length, scan.states});
  const std::size_t threads = check_threads(threads_);
  py::gil_scoped_release unlocked;
  cpu::selective_scan_backward(scan, gradients, threads);
}

template <typename T>
void projected_scan_backward(const py::object& out_grad, const py::object& u_, const py::object& rows,
                             const py::object& dt_weight_, const py::object& bias, const py::object& a_, bool reversed,
                             const py::object& u_grad, const py::object& rows_grad, const py::object& dt_weight_grad,
                             const py::object& bias_grad, const py::object& a_grad, int threads_) {
  const py::array u = checked<T>(u_, "u", {-1, -1, -1});
  cpu::Scan1d<T> scan{};
  scan.batch = u.shape(0);
  scan.length = u.shape(1);
  scan.channels = u.shape(2);
  scan.groups = 1;
  const py::array a = checked<T>(a_, "A", {scan.channels, -1});
  scan.states = a.shape(1);
  check_states(scan.states, "A");
  const py::array dt_weight = checked<T>(dt_weight_, "dt_weight", {scan.channels, -1});
  scan.u = static_cast<const T*>(u.data());
  scan.a = static_cast<const T*>(a.data());
  scan.bias = read<T>(bias, "bias", {scan.channels});
  scan.softplus = true;
  scan.reversed = reversed;
  cpu::Scan1dGradients<T> gradients{};
  gradients.rank = dt_weight.shape(1);
  gradients.dt_weight = static_cast<const T*>(dt_weight.data());
  const std::int64_t row = gradients.rank + 2 * scan.states;
  gradients.rows = read<T>(rows, "rows", {scan.batch, scan.length, row});
  gradients.y_grad = read<T>(out_grad, "out_grad", {scan.batch, scan.length, scan.channels});
  gradients.u_grad = write<T>(u_grad, "u_grad", {scan.batch, scan.length, scan.channels});
  gradients.rows_grad = write<T>(rows_grad, "rows_grad", {scan.batch, scan.length, row});
  gradients.dt_weight_grad = write<T>(dt_weight_grad, "dt_weight_grad", {scan.channels, gradients.rank});
  gradients.bias_grad = write<T>(bias_grad, "bias_grad", {scan.channels});
  gradients.a_grad = write<T>(a_grad, "A_grad", {scan.channels, scan.states});
  const std::size_t threads = check_threads(threads_);
  py::gil_scoped_release unlocked;
  cpu::selective_scan_backward(scan, gradients, threads);
}

}  // namespace

void bind_scan(py::module_& m) {
  using Object = const py::object&;
  m.def(
      "selective_scan_2d",
      [](Object x, Object projection, Object dt_weight, Object dt_bias, Object a_logs, Object skip, Object out,
         int threads) {
        (is_double(x) ? selective_scan_2d<double> : selective_scan_2d<float>)(x, projection, dt_weight, dt_bias, a_logs,
                                                                              skip, out, threads);
      },
      py::arg("x"), py::arg("x_proj_weight"), py::arg("dt_projs_weight"), py::arg("dt_projs_bias"), py::arg("A_logs"),
      py::arg("Ds"), py::arg("out"), py::arg("threads") = 1,
      "out (B, H, W, D) = the sum of the four directions of SS2D over x (B, H, W, D); see xrk.kernels.selective_scan_2d.\n"
      "All arrays C-contiguous; x and out of one dtype, float16, uint16 (the bits of bfloat16), float32 or float64; the\n"
      "others float64 where x is, else float32. The result does not depend on threads.");
  m.def(
      "summarise_lines",
      [](Object x, Object projection, Object dt_weight, Object dt_bias, Object a_logs, Object skip, int direction,
         Object sums, Object ends, int threads) {
        (is_double(x) ? summarise_lines<double> : summarise_lines<float>)(x, projection, dt_weight, dt_bias, a_logs,
                                                                          skip, direction, sums, ends, threads);
      },
      py::arg("x"), py::arg("x_proj_weight"), py::arg("dt_projs_weight"), py::arg("dt_projs_bias"), py::arg("A_logs"),
      py::arg("Ds"), py::arg("direction"), py::arg("sums"), py::arg("ends"), py::arg("threads") = 1,
      "sums (B, lines, D) and ends (B, lines, D, N) of one direction's lines; see xrk.kernels.summarise_lines.");
  m.def(
      "scan_lines",
      [](Object x, Object projection, Object dt_weight, Object dt_bias, Object a_logs, Object skip, int direction,
         Object states, Object out, int threads) {
        (is_double(x) ? scan_lines<double> : scan_lines<float>)(x, projection, dt_weight, dt_bias, a_logs, skip,
                                                                direction, states, out, threads);
      },
      py::arg("x"), py::arg("x_proj_weight"), py::arg("dt_projs_weight"), py::arg("dt_projs_bias"), py::arg("A_logs"),
      py::arg("Ds"), py::arg("direction"), py::arg("states"), py::arg("out"), py::arg("threads") = 1,
      "Adds one direction to out, each line from its own of states (B, lines, D, N), which become the lines' ends.");
  m.def(
      "selective_scan",
      [](Object u, Object delta, Object a, Object b, Object c, Object skip, Object bias, bool softplus, Object order,
         Object state, Object out, int threads) {
        (is_double(u) ? selective_scan<double> : selective_scan<float>)(u, delta, a, b, c, skip, bias, softplus, order,
                                                                        state, out, threads);
      },
      py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("delta_bias"),
      py::arg("delta_softplus"), py::arg("order"), py::arg("state"), py::arg("out"), py::arg("threads") = 1,
      "The 1-D scan over u (B, L, D), with B and C (B, groups, L, N); state (B, D, N) is the start and becomes the end.");
  m.def(
      "selective_scan_backward",
      [](Object out_grad, Object u, Object delta, Object a, Object b, Object c, Object bias, bool softplus,
         Object order, Object state, Object state_grad, Object u_grad, Object delta_grad, Object a_grad, Object b_grad,
         Object c_grad, int threads) {
        (is_double(u) ? selective_scan_backward<double> : selective_scan_backward<float>)(
            out_grad, u, delta, a, b, c, bias, softplus, order, state, state_grad, u_grad, delta_grad, a_grad, b_grad,
            c_grad, threads);
      },
      py::arg("out_grad"), py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"),
      py::arg("delta_bias"), py::arg("delta_softplus"), py::arg("order"), py::arg("state"), py::arg("state_grad"),
      py::arg("u_grad"), py::arg("delta_grad"), py::arg("A_grad"), py::arg("B_grad"), py::arg("C_grad"),
      py::arg("threads") = 1,
      "The gradients of selective_scan without D: out_grad and state_grad are those of out and of the last state. Adds to\n"
      "u_grad, writes the others; state_grad becomes that of the start, state. The result does not depend on threads.");
  m.def(
      "projected_scan_backward",
      [](Object out_grad, Object u, Object rows, Object dt_weight, Object bias, Object a, bool reversed, Object u_grad,
         Object rows_grad, Object dt_weight_grad, Object bias_grad, Object a_grad, int threads) {
        (is_double(u) ? projected_scan_backward<double> : projected_scan_backward<float>)(
            out_grad, u, rows, dt_weight, bias, a, reversed, u_grad, rows_grad, dt_weight_grad, bias_grad, a_grad,
            threads);
      },
      py::arg("out_grad"), py::arg("u"), py::arg("rows"), py::arg("dt_weight"), py::arg("bias"), py::arg("A"),
      py::arg("reversed"), py::arg("u_grad"), py::arg("rows_grad"), py::arg("dt_weight_grad"), py::arg("bias_grad"),
      py::arg("A_grad"), py::arg("threads") = 1,
      "The gradients of one direction of SS2D along sequences u (B, L, D), forwards or from the last to the first: rows\n"
      "(B, L, R + 2N) are the low-rank dt, B and C. Adds to u_grad, writes the others. The result does not depend on\n"
      "threads.");
}
