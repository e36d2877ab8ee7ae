// The TIFF writer's functions of xrk._native. Where segments lie and what the directories say is left to xrk.io.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "tiff/encode.h"

namespace py = pybind11;

namespace {

namespace tiff = xrk::tiff;

std::string dtype_of(const py::array& array) { return py::str(array.dtype()); }

// numpy may spell the machine's own order '<' or '>', too.
bool is_native(const py::array& array) { return array.dtype().attr("isnative").cast<bool>(); }

// Rows whose pixels lie side by side, at any distance from each other.
py::array checked_rows(const py::object& object, std::uint64_t width) {
  if (!py::isinstance<py::array>(object)) throw py::type_error("pixels is no numpy array");
  py::array array = py::reinterpret_borrow<py::array>(object);
  if (!is_native(array)) throw py::type_error("pixels are in the other byte order; expected the machine's");
  if (array.ndim() != 2 || array.shape(0) < 1 || static_cast<std::uint64_t>(array.shape(1)) != width) {
    throw py::value_error("pixels have shape " + std::string(py::str(array.attr("shape"))) + "; expected (rows, " +
                          std::to_string(width) + ")");
  }
  const bool aligned = (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
  const bool dense = array.shape(1) == 1 || array.strides(1) == array.itemsize();
  if (!aligned || !dense || array.strides(0) < 0) {
    throw py::value_error("pixels do not lie side by side in their rows; pass numpy.ascontiguousarray of them");
  }
  return array;
}

tiff::Pixels pixels_of(const py::array& array, const tiff::Geometry& geometry) {
  const char kind = array.dtype().kind();
  const auto bytes = static_cast<std::size_t>(array.itemsize());
  const char own = geometry.format == tiff::SampleFormat::floating        ? 'f'
                   : geometry.format == tiff::SampleFormat::signed_integer ? 'i'
                                                                           : 'u';
  if (kind == own && bytes == geometry.pixel_bytes()) return tiff::Pixels::stored;
  if (own != 'f' && kind == 'f' && bytes == 4) return tiff::Pixels::float32;
  if (own != 'f' && kind == 'f' && bytes == 8) return tiff::Pixels::float64;
  throw py::type_error("pixels have dtype " + dtype_of(array) + "; expected the file's, " + std::string(1, own) +
                       std::to_string(geometry.pixel_bytes()) + ", or for integers float32 or float64");
}

tiff::Geometry checked_geometry(std::uint64_t width, std::uint64_t height, std::uint64_t segment_width,
                                std::uint64_t segment_height, bool tiled, int bits, int format, int compression,
                                int predictor, bool big_endian) {
  constexpr std::uint64_t most = std::uint64_t{1} << 31;
  for (const std::uint64_t side : {width, height, segment_width, segment_height}) {
    if (side < 1 || side > most) throw py::value_error("a side is " + std::to_string(side) + "; expected 1 to 2**31");
  }
  if (!tiled && segment_width != width) throw py::value_error("a strip must be as wide as the image");
  const bool integer = format == 1 || format == 2;
  const bool known = (integer && (bits == 8 || bits == 16 || bits == 32)) ||
                     (format == 3 && (bits == 16 || bits == 32 || bits == 64));
  if (!known) {
    throw py::value_error("pixels of " + std::to_string(bits) + " bits and format " + std::to_string(format) +
                          " are not written; expected integers of 8 to 32 bits or floats of 16 to 64");
  }
  if (predictor < 1 || predictor > 3 || (predictor == 2 && !integer) || (predictor == 3 && integer)) {
    throw py::value_error("predictor " + std::to_string(predictor) + " does not fit these pixels");
  }
  tiff::Geometry geometry;
  geometry.width = width;
  geometry.height = height;
  geometry.segment_width = segment_width;
  geometry.segment_height = segment_height;
  geometry.tiled = tiled;
  geometry.bits = static_cast<std::uint16_t>(bits);
  geometry.format = static_cast<tiff::SampleFormat>(format);
  geometry.compression = static_cast<tiff::Compression>(compression);
  geometry.predictor = static_cast<tiff::Predictor>(predictor);
  geometry.order = big_endian ? tiff::ByteOrder::big : tiff::ByteOrder::little;
  return geometry;
}

double finite(double value, const char* name) {
  if (!std::isfinite(value)) throw py::value_error(std::string(name) + " is not finite");
  return value;
}

py::tuple write_segments(tiff::Encoders& encoders, int file, std::uint64_t position, std::uint64_t alignment,
                         const py::object& pixels_, std::uint64_t first, const tiff::Geometry& geometry, int level,
                         double scale, double offset, std::size_t threads) {
  const py::array pixels = checked_rows(pixels_, geometry.width);
  const auto count = static_cast<std::uint64_t>(pixels.shape(0));
  if (first % geometry.segment_height != 0 || first >= geometry.height || count > geometry.height - first ||
      ((first + count) % geometry.segment_height != 0 && first + count != geometry.height)) {
    throw py::value_error("rows " + std::to_string(first) + " to " + std::to_string(first + count) +
                          " are no whole segments of " + std::to_string(geometry.segment_height) + " rows");
  }
  if (alignment < 1 || threads < 1 || level < 1) throw py::value_error("alignment, threads and level must be 1 or more");
  const tiff::Rows rows{static_cast<const char*>(pixels.data()),
                        static_cast<std::size_t>(pixels.strides(0)),
                        first,
                        count,
                        pixels_of(pixels, geometry),
                        finite(scale, "scale"),
                        finite(offset, "offset")};
  std::vector<tiff::Place> places;
  tiff::Misfits misfits;
  std::string problem;
  {
    py::gil_scoped_release unlocked;
    try {
      places = tiff::write_segments(encoders, file, position, alignment, geometry, level, rows, threads, misfits);
    } catch (const tiff::Failure& failure) {
      problem = failure.what();
    }
  }
  if (!problem.empty()) {
    PyErr_SetString(PyExc_OSError, problem.c_str());
    throw py::error_already_set();
  }
  py::array_t<std::uint64_t> offsets(static_cast<py::ssize_t>(places.size()));
  py::array_t<std::uint64_t> bytes(static_cast<py::ssize_t>(places.size()));
  for (std::size_t i = 0; i < places.size(); ++i) {
    offsets.mutable_data()[i] = places[i].offset;
    bytes.mutable_data()[i] = places[i].bytes;
  }
  return py::make_tuple(offsets, bytes, misfits.limited, misfits.not_numbers);
}

py::tuple convert(const py::object& pixels_, const py::object& out_, const tiff::Geometry& geometry, double scale,
                  double offset) {
  const py::array pixels = checked_rows(pixels_, geometry.width);
  py::array out = checked_rows(out_, geometry.width);
  if (out.shape(0) != pixels.shape(0)) throw py::value_error("out has another number of rows than pixels");
  if (!out.writeable()) throw py::value_error("out is read-only");
  if (pixels_of(out, geometry) != tiff::Pixels::stored) throw py::type_error("out has not the file's dtype");
  const tiff::Pixels kind = pixels_of(pixels, geometry);
  if (kind == tiff::Pixels::stored) throw py::type_error("pixels have the file's dtype already");
  finite(scale, "scale");
  finite(offset, "offset");
  tiff::Misfits total;
  const char* source = static_cast<const char*>(pixels.data());
  char* target = static_cast<char*>(out.mutable_data());
  {
    py::gil_scoped_release unlocked;
    for (py::ssize_t row = 0; row < pixels.shape(0); ++row) {
      const tiff::Misfits found = tiff::convert(source + row * pixels.strides(0), kind, scale, offset, geometry,
                                                target + row * out.strides(0), geometry.width);
      total.limited += found.limited;
      total.not_numbers += found.not_numbers;
    }
  }
  return py::make_tuple(total.limited, total.not_numbers);
}

}  // namespace

void bind_tiff_write(py::module_& m) {
  py::class_<tiff::Geometry>(m, "TiffGeometry", "How the pixels of one page of a TIFF file are to be stored.")
      .def(py::init(&checked_geometry), py::kw_only(), py::arg("width"), py::arg("height"), py::arg("segment_width"),
           py::arg("segment_height"), py::arg("tiled"), py::arg("bits"), py::arg("format"), py::arg("compression"),
           py::arg("predictor"), py::arg("big_endian"),
           "format: 1 unsigned, 2 signed, 3 float; compression and predictor: the numbers of the tags.\n"
           "Raises ValueError for what cannot be written.");
  m.def(
      "tiff_can_encode",
      [](int compression) { return tiff::can_encode(static_cast<tiff::Compression>(compression)); },
      py::arg("compression"), "Whether there is an encoder for this number of the tag Compression.");
  py::class_<tiff::Encoders>(m, "TiffEncoders", "What tiff_write_segments keeps from one call to the next.")
      .def(py::init());
  m.def("tiff_write_segments", &write_segments, py::arg("encoders"), py::arg("file"), py::arg("position"),
        py::arg("alignment"), py::arg("pixels"), py::arg("first"), py::arg("geometry"), py::arg("level") = 1,
        py::arg("scale") = 1.0, py::arg("offset") = 0.0, py::arg("threads") = 1,
        "Encodes whole segments and writes them to a file one behind the other.\n\n"
        "encoders: one TiffEncoders for all calls of a file.\n"
        "file: a descriptor, open for writing. position: where the first one goes; alignment: each begins at a multiple.\n"
        "pixels: (rows, width) of the file's dtype in the machine's byte order, or for integers float32 or float64, of\n"
        "which pixels * scale + offset is rounded half to even and limited to the dtype's range.\n"
        "first: the image's row that pixels begin at, the first of a segment; they end with one, or with the image.\n"
        "threads: at most; the bytes written do not depend on it.\n"
        "Returns (offsets, byte counts, pixels limited, pixels that were no number); with any of the last, segments are\n"
        "missing. Raises OSError, ValueError, TypeError.");
  m.def("tiff_convert", &convert, py::arg("pixels"), py::arg("out"), py::arg("geometry"), py::arg("scale") = 1.0,
        py::arg("offset") = 0.0,
        "The same conversion of float32 or float64 (rows, width) to integers alone; returns (limited, not numbers).");
}
