// The TIFF reader of xrk._native. What is read from a file is checked below this file, what a caller gives here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "tiff/libraries.h"
#include "tiff/reader.h"

namespace py = pybind11;

namespace {

namespace tiff = xrk::tiff;

PyObject* failure_type = nullptr;

// Calls what may fail without the interpreter's lock, and turns a Failure into TiffFailure(kind, what, offset or None).
template <typename Work>
auto guarded(const Work& work) {
  try {
    py::gil_scoped_release unlocked;
    return work();
  } catch (const tiff::Failure& failure) {
    constexpr const char* kinds[] = {"damaged", "unsupported", "system", "cancelled"};
    const py::object offset = failure.offset == tiff::Failure::none ? py::object(py::none()) : py::int_(failure.offset);
    const py::tuple arguments = py::make_tuple(kinds[static_cast<int>(failure.kind)], std::string(failure.what()), offset);
    PyErr_SetObject(failure_type, arguments.ptr());
    throw py::error_already_set();
  }
}

constexpr const char* kind_of(tiff::SampleFormat format) {
  return format == tiff::SampleFormat::floating ? "f" : format == tiff::SampleFormat::signed_integer ? "i" : "u";
}

tiff::Border border_of(const std::string& name) {
  if (name == "reflect") return tiff::Border::reflect;
  if (name == "symmetric") return tiff::Border::symmetric;
  if (name == "edge") return tiff::Border::edge;
  if (name == "constant") return tiff::Border::constant;
  throw py::value_error("border is '" + name + "'; expected 'reflect', 'symmetric', 'edge' or 'constant'");
}

std::size_t checked_threads(int threads) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected 1 or more");
  return static_cast<std::size_t>(threads);
}

void check_frame(const tiff::Reader& reader, std::uint64_t frame) {
  if (frame >= reader.frames()) {
    throw py::index_error("frame " + std::to_string(frame) + " of " + std::to_string(reader.frames()));
  }
}

// Sides far beyond any image, so that sums of them cannot overflow.
void check_place(std::int64_t row, std::int64_t column, std::uint64_t rows, std::uint64_t columns) {
  constexpr std::int64_t most = std::int64_t{1} << 40;
  if (row < -most || row > most || column < -most || column > most || rows > static_cast<std::uint64_t>(most) ||
      columns > static_cast<std::uint64_t>(most)) {
    throw py::value_error("a window's place and sides must be below 2**40");
  }
}

std::unique_ptr<tiff::Reader> make_reader(int descriptor, std::uint64_t cache_bytes, std::uint64_t segment_bytes) {
  return guarded([&] {
    tiff::Limits limits;
    limits.segment_bytes = segment_bytes;
    return std::make_unique<tiff::Reader>(std::make_unique<tiff::Input>(descriptor), limits, cache_bytes);
  });
}

py::dict describe_frame(const tiff::Reader& reader, std::uint64_t frame) {
  check_frame(reader, frame);
  const tiff::Page& page = reader.frame(frame);
  const tiff::Geometry& g = page.geometry;
  py::dict d;
  d["offset"] = page.offset;
  d["subfile_type"] = page.subfile_type;
  d["photometric"] = page.photometric;
  d["height"] = g.height;
  d["width"] = g.width;
  d["bits"] = g.bits;
  d["dtype"] = std::string(kind_of(g.format)) + std::to_string(g.pixel_bytes());
  d["compression"] = static_cast<int>(g.compression);
  d["predictor"] = static_cast<int>(g.predictor);
  d["tiled"] = g.tiled;
  d["segment"] = py::make_tuple(g.segment_height, g.segment_width);
  d["segments"] = g.segments();
  return d;
}

// The first frame that has another size or dtype than the first one, or None.
py::object first_odd_frame(const tiff::Reader& reader) {
  const tiff::Geometry& first = reader.frame(0).geometry;
  for (std::uint64_t i = 1; i < reader.frames(); ++i) {
    const tiff::Geometry& g = reader.frame(i).geometry;
    if (g.height != first.height || g.width != first.width || g.bits != first.bits || g.format != first.format) {
      return py::int_(i);
    }
  }
  return py::none();
}

// (tag, type, count, values' bytes) of a page, without tags that say what its pixels are like and where they lie. Fails
// where the values take more than `most` bytes: pages of a small file may share a large one.
py::list list_entries(const tiff::Reader& reader, std::uint64_t frame, std::uint64_t most) {
  check_frame(reader, frame);
  py::list list;
  std::uint64_t left = most;
  for (const tiff::Entry& entry : guarded([&] { return reader.directory().entries(reader.frame(frame)); })) {
    switch (entry.tag) {
      case tiff::NEW_SUBFILE_TYPE: case tiff::IMAGE_WIDTH: case tiff::IMAGE_LENGTH: case tiff::BITS_PER_SAMPLE:
      case tiff::COMPRESSION: case tiff::PHOTOMETRIC: case tiff::STRIP_OFFSETS: case tiff::SAMPLES_PER_PIXEL:
      case tiff::ROWS_PER_STRIP: case tiff::STRIP_BYTE_COUNTS: case tiff::PREDICTOR: case tiff::TILE_WIDTH:
      case tiff::TILE_LENGTH: case tiff::TILE_OFFSETS: case tiff::TILE_BYTE_COUNTS: case tiff::SAMPLE_FORMAT:
        continue;
    }
    const std::uint64_t bytes = entry.values.bytes();
    guarded([&] {
      if (bytes <= left) return;
      throw tiff::Failure(tiff::Failure::Kind::damaged, "the tags of its pages take more bytes than xrk takes",
                          reader.frame(frame).offset);
    });
    left -= bytes;
    const auto value = py::reinterpret_steal<py::bytes>(
        PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes)));
    if (!value) throw py::error_already_set();
    char* const place = PyBytes_AS_STRING(value.ptr());
    guarded([&] { reader.input().read(entry.values.offset, place, bytes); });
    list.append(py::make_tuple(entry.tag, entry.values.type, entry.values.count, value));
  }
  return list;
}

using Doubles = py::array_t<double, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

// A value for each pixel, or one for all, which `row` then holds.
const double* per_pixel(const py::object& given, const char* name, const tiff::Geometry& g, std::vector<double>& row,
                        std::size_t& stride) {
  if (!py::isinstance<py::array>(given)) {
    row.assign(g.width, given.cast<double>());
    stride = 0;
    return row.data();
  }
  if (!Doubles::check_(given)) throw py::type_error(std::string(name) + " must be a C-contiguous array of float64");
  const auto array = py::reinterpret_borrow<Doubles>(given);
  if (array.ndim() != 2 || static_cast<std::uint64_t>(array.shape(0)) != g.height ||
      static_cast<std::uint64_t>(array.shape(1)) != g.width) {
    throw py::value_error(std::string(name) + " has not the frame's height and width");
  }
  stride = g.width;
  return array.data();
}

std::uint64_t read_window(tiff::Reader& reader, std::uint64_t frame, std::int64_t row, std::int64_t column,
                          py::array out, const std::string& border, const py::object& levels, int threads_,
                          const py::object& correction_) {
  check_frame(reader, frame);
  const tiff::Geometry& g = reader.frame(frame).geometry;
  const char order = out.dtype().byteorder();
  if (out.ndim() != 2 || out.shape(0) < 1 || out.shape(1) < 1 || !out.writeable() || (order != '=' && order != '|')) {
    throw py::value_error("out must be a writable array of two dimensions, in the machine's byte order, not empty");
  }
  if ((out.shape(1) > 1 && out.strides(1) != out.itemsize()) || out.strides(0) < 0) {
    throw py::value_error("the pixels of a row of out must be adjacent, and its rows in ascending order");
  }
  tiff::Window window;
  window.page = frame;
  window.row = row;
  window.column = column;
  window.rows = static_cast<std::uint64_t>(out.shape(0));
  window.columns = static_cast<std::uint64_t>(out.shape(1));
  check_place(row, column, window.rows, window.columns);
  window.border = border_of(border);
  window.out = static_cast<unsigned char*>(out.mutable_data());
  window.row_stride = static_cast<std::size_t>(out.strides(0));
  const char kind = out.dtype().kind();
  const auto bytes = static_cast<std::size_t>(out.itemsize());
  if (levels.is_none()) {
    if (kind != kind_of(g.format)[0] || bytes != g.pixel_bytes()) throw py::type_error("out has not the frame's dtype");
  } else {
    if (kind != 'f' || (bytes != 2 && bytes != 4 && bytes != 8)) {
      throw py::type_error("out has dtype " + std::string(py::str(out.dtype())) +
                           "; expected float16, float32 or float64");
    }
    const auto pair = levels.cast<std::pair<double, double>>();
    if (!std::isfinite(pair.first) || !std::isfinite(pair.second)) {
      throw py::value_error("black and inverse_range must be finite");
    }
    window.values = true;
    window.value = bytes == 2 ? tiff::V16 : bytes == 4 ? tiff::V32 : tiff::V64;
    window.black = pair.first;
    window.inverse_range = pair.second;
  }
  tiff::Correction correction;
  std::vector<double> dark, gain;
  std::atomic<std::uint64_t> limited{0};
  if (!correction_.is_none()) {
    const auto parts = correction_.cast<py::tuple>();
    if (parts.size() != 4) throw py::value_error("correction is (dark, gain, pedestal, invalid)");
    correction.dark = per_pixel(parts[0], "dark", g, dark, correction.dark_stride);
    correction.gain = per_pixel(parts[1], "gain", g, gain, correction.gain_stride);
    correction.pedestal = parts[2].cast<double>();
    if (!parts[3].is_none()) {
      if (!Flags::check_(parts[3])) throw py::type_error("invalid must be a C-contiguous array of bool");
      const auto invalid = py::reinterpret_borrow<Flags>(parts[3]);
      if (invalid.ndim() != 2 || static_cast<std::uint64_t>(invalid.shape(0)) != g.height ||
          static_cast<std::uint64_t>(invalid.shape(1)) != g.width) {
        throw py::value_error("invalid has not the frame's height and width");
      }
      correction.invalid = reinterpret_cast<const unsigned char*>(invalid.data());
    }
    window.correction = &correction;
    window.limited = &limited;
  }
  const std::size_t threads = checked_threads(threads_);
  guarded([&] {
    reader.read(window, threads);
    return 0;
  });
  return limited;
}

void load_window(tiff::Reader& reader, std::uint64_t frame, std::int64_t row, std::int64_t column, std::uint64_t rows,
                 std::uint64_t columns, int threads_) {
  check_frame(reader, frame);
  check_place(row, column, rows, columns);
  tiff::Window window;
  window.page = frame;
  window.row = row;
  window.column = column;
  window.rows = rows;
  window.columns = columns;
  const std::size_t threads = checked_threads(threads_);
  guarded([&] {
    reader.load(window, threads);
    return 0;
  });
}

}  // namespace

void bind_tiff_read(py::module_& m) {
  failure_type = PyErr_NewExceptionWithDoc(
      "xrk._native.TiffFailure",
      "What is wrong with a TIFF file: (kind, what, offset). kind: 'damaged', 'unsupported', 'system' or 'cancelled';\n"
      "what: words; offset: the byte that it was seen at, or None.",
      nullptr, nullptr);
  if (failure_type == nullptr) throw py::error_already_set();
  m.attr("TiffFailure") = py::reinterpret_borrow<py::object>(failure_type);

  py::class_<tiff::Reader>(m, "TiffReader",
                           "One TIFF file: its frames, the pages at full resolution, by their place in the file.\n\n"
                           "All methods may be called from several threads at once.")
      .def(py::init(&make_reader), py::arg("descriptor"), py::arg("cache_bytes"), py::arg("segment_bytes"),
           "Reads the directories. descriptor: of a file open for reading, which is the reader's own from here on.\n"
           "cache_bytes: of decoded segments that are kept. segment_bytes: of the largest one that is decoded at once; larger\n"
           "ones come in parts, from their first row on.\n"
           "Raises TiffFailure where the file is damaged.")
      .def_property_readonly("size", [](const tiff::Reader& r) { return r.input().size(); }, "Bytes of the file.")
      .def_property_readonly("byteorder", [](const tiff::Reader& r) {
        return r.directory().variant().order == tiff::ByteOrder::little ? "<" : ">";
      })
      .def_property_readonly("bigtiff", [](const tiff::Reader& r) { return r.directory().variant().big; })
      .def_property_readonly("pages", [](const tiff::Reader& r) { return r.directory().pages().size(); },
                             "How many there are, reduced copies and masks among them.")
      .def_property_readonly("frames", &tiff::Reader::frames)
      .def_property_readonly("unsupported", [](const tiff::Reader& r) { return r.directory().unsupported(); },
                             "What the first page is that this reader does not read; '' where it reads all.")
      .def_property_readonly("cached_bytes", &tiff::Reader::cached_bytes)
      .def_property_readonly("decoded_segments", &tiff::Reader::decoded_segments, "How many were decoded so far.")
      .def("frame", &describe_frame, py::arg("frame"), "Size, dtype and layout of a frame.")
      .def("first_odd_frame", &first_odd_frame,
           "The first frame that has another size or dtype than the first one, or None.")
      .def("can_decode", [](const tiff::Reader& r, std::uint64_t frame) {
        check_frame(r, frame);
        return tiff::can_decode(r.frame(frame).geometry.compression);
      }, py::arg("frame"), "Whether there is a library for its compression.")
      .def("check_segments", [](const tiff::Reader& r) {
        guarded([&] {
          r.directory().check_segments();
          return 0;
        });
      }, "Raises TiffFailure where a segment of any frame does not lie inside the file or cannot hold its pixels.")
      .def("contiguous_start", [](tiff::Reader& r) -> py::object {
        const std::uint64_t start = guarded([&] { return r.contiguous_start(); });
        return start == tiff::Failure::none ? py::object(py::none()) : py::object(py::int_(start));
      }, "Where the first frame's pixels start, if they are uncompressed and without a gap.")
      .def("set_hidden", [](tiff::Reader& r, std::uint64_t frames) {
        return guarded([&] { return r.set_hidden(frames); });
      }, py::arg("frames"),
           "Takes the only frame for the first of so many, which follow it without directories (ImageJ's large stacks).\n"
           "False, and no change, where the file does not hold them.")
      .def("entries", &list_entries, py::arg("frame"), py::arg("most"),
           "(tag, type, count, values as stored) of a frame's directory, but for tags that `frame` tells of.\n"
           "Raises TiffFailure where the values take more than `most` bytes.")
      .def("read", &read_window, py::arg("frame"), py::arg("row"), py::arg("column"), py::arg("out"),
           py::arg("border") = "reflect", py::arg("levels") = py::none(), py::arg("threads") = 1,
           py::arg("correction") = py::none(),
           "Writes the window of out's shape whose first pixel is at (row, column), which may lie outside the frame.\n\n"
           "out: (rows, columns) with adjacent pixels; of the frame's dtype, or with levels = (black, inverse_range) of\n"
           "float16, float32 or float64: (count - black) * inverse_range in double precision, rounded once.\n"
           "border: what stands outside the frame, as numpy.pad names it: 'reflect', 'symmetric', 'edge', 'constant'\n"
           "(0 in out); the first three repeat pixels that must lie in the window too.\n"
           "correction: (dark, gain, pedestal, invalid): counts first become (count - dark) * gain + pedestal, integers\n"
           "rounded half to even and limited to their range; dark and gain are float64 arrays of the frame's shape, or one\n"
           "number each; invalid is a bool array of that shape, or None: these pixels stay as they are.\n"
           "Returns how many pixels the correction limited.\n"
           "Raises TiffFailure where the file is damaged; ValueError and TypeError for an out that does not fit.")
      .def("load", &load_window, py::arg("frame"), py::arg("row"), py::arg("column"), py::arg("rows"),
           py::arg("columns"), py::arg("threads") = 1, "Decodes what `read` will need, as far as the cache holds it.")
      .def("cancel", &tiff::Reader::cancel, "Ends what runs in other threads, and all that is asked for later.");

  m.def("tiff_library", &tiff::describe_library, py::arg("name"),
        "What 'zlib', 'libdeflate' or 'libzstd' is here: its version, and whether bound at build; '' without it.");
  m.def("allow_tiff_library", [](const std::string& name, bool allowed) {
    if (!tiff::allow_library(name, allowed)) {
      throw py::value_error("there is no library '" + name + "'; expected 'zlib', 'libdeflate' or 'libzstd'");
    }
  }, py::arg("name"), py::arg("allowed"),
        "Whether a library may be used, in the whole process: for tests and benchmarks, while no file is open.");
}
