// The layers' functions of xrk._native, on raw addresses: xrk.kernels has checked its tensors, whose dtypes numpy does
// not all know (bfloat16), before it calls them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "cpu/convolution.h"
#include "cpu/deform.h"
#include "cpu/layers.h"
#include "cpu/wavelet.h"

namespace py = pybind11;

namespace {

namespace cpu = xrk::cpu;

cpu::Storage storage_of(const std::string& dtype) {
  if (dtype == "float32") return cpu::S_F32;
  if (dtype == "float64") return cpu::S_F64;
  if (dtype == "float16") return cpu::S_F16;
  if (dtype == "bfloat16") return cpu::S_BF16;
  throw py::value_error("dtype is '" + dtype + "'; expected 'float16', 'bfloat16', 'float32' or 'float64'");
}

void* optional(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void* needed(std::uintptr_t address, const char* name) {
  if (address == 0) throw py::value_error(std::string(name) + " is a null pointer; expected an address");
  return reinterpret_cast<void*>(address);
}

std::size_t positive(std::size_t value, const char* name) {
  if (value == 0) throw py::value_error(std::string(name) + " is 0; expected 1 or more");
  return value;
}

template <typename Work>
void run(const Work& work) {
  bool done = false;
  {
    py::gil_scoped_release unlocked;
    done = work();
  }
  if (!done) throw std::bad_alloc();
}

void layer_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t gate, std::uintptr_t out,
                std::size_t pixels, std::size_t channels, std::size_t x_stride, std::size_t gate_stride, double eps,
                const std::string& dtype, std::size_t threads) {
  const cpu::Storage storage = storage_of(dtype);
  const cpu::LayerNormTask task{needed(x, "x"), optional(weight), optional(bias), optional(gate), needed(out, "out"),
                                positive(channels, "channels"), x_stride, gate_stride, eps};
  positive(threads, "threads");
  run([&] { return cpu::layer_norm(task, storage, pixels, threads); });
}

void depthwise_conv2d(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out,
                      std::size_t images, std::size_t height, std::size_t width, std::size_t channels,
                      std::size_t padded_channels, std::size_t kernel, std::size_t dilation, bool silu,
                      const std::string& dtype, std::size_t threads) {
  const cpu::Storage storage = storage_of(dtype);
  if (kernel != 3 && kernel != 5) throw py::value_error("kernel is " + std::to_string(kernel) + "; expected 3 or 5");
  if (padded_channels < channels || padded_channels % cpu::channel_padding != 0) {
    throw py::value_error("padded_channels is " + std::to_string(padded_channels) + "; expected channels rounded up to " +
                          std::to_string(cpu::channel_padding));
  }
  const cpu::DepthwiseTask task{needed(x, "x"),
                                needed(weight, "weight"),
                                needed(bias, "bias"),
                                needed(out, "out"),
                                positive(height, "height"),
                                positive(width, "width"),
                                positive(channels, "channels"),
                                padded_channels,
                                kernel,
                                positive(dilation, "dilation"),
                                silu};
  positive(threads, "threads");
  run([&] { return cpu::depthwise(task, storage, images, threads); });
}

void group_norm_summarise(std::uintptr_t x, std::uintptr_t state, std::size_t images, std::size_t pixels,
                          std::size_t channels, std::size_t groups, const std::string& dtype, std::size_t threads) {
  const cpu::Storage storage = storage_of(dtype);
  positive(groups, "groups");
  if (channels == 0 || channels % groups != 0) {
    throw py::value_error("channels is " + std::to_string(channels) + "; expected a multiple of groups, " +
                          std::to_string(groups));
  }
  positive(pixels, "pixels");
  positive(threads, "threads");
  cpu::GroupTask task{};
  task.x = needed(x, "x");
  task.channels = channels;
  task.groups = groups;
  auto* target = static_cast<double*>(needed(state, "state"));
  run([&] { return cpu::group_summarise(task, storage, images, pixels, target, threads); });
}

void group_norm_apply(std::uintptr_t x, std::uintptr_t scale, std::uintptr_t mean, std::uintptr_t mean_rest,
                      std::uintptr_t shift, std::uintptr_t out, std::size_t images, std::size_t pixels,
                      std::size_t channels, bool silu, const std::string& dtype, std::size_t threads) {
  const cpu::Storage storage = storage_of(dtype);
  positive(threads, "threads");
  cpu::GroupTask task{};
  task.x = needed(x, "x");
  task.out = needed(out, "out");
  task.scale = needed(scale, "scale");
  task.mean = needed(mean, "mean");
  task.mean_rest = needed(mean_rest, "mean_rest");
  task.shift = needed(shift, "shift");
  task.channels = positive(channels, "channels");
  task.groups = 1;
  task.silu = silu;
  positive(pixels, "pixels");
  run([&] { return cpu::group_apply(task, storage, images, pixels, threads); });
}

template <bool (*function)(const cpu::WaveletTask&, bool, std::size_t, std::size_t)>
void wavelet(std::uintptr_t x, std::uintptr_t out, std::uintptr_t low, std::uintptr_t high, std::size_t taps,
             std::size_t images, std::size_t height, std::size_t width, const std::string& dtype, std::size_t threads) {
  const cpu::Storage storage = storage_of(dtype);
  if (storage != cpu::S_F32 && storage != cpu::S_F64) {
    throw py::value_error("dtype is '" + dtype + "'; expected 'float32' or 'float64'");
  }
  if (taps < 2 || taps % 2 != 0 || taps > cpu::most_taps) {
    throw py::value_error("taps is " + std::to_string(taps) + "; expected an even number from 2 to " +
                          std::to_string(cpu::most_taps));
  }
  const cpu::WaveletTask task{needed(x, "x"),
                              needed(out, "out"),
                              static_cast<const double*>(needed(low, "low")),
                              static_cast<const double*>(needed(high, "high")),
                              taps,
                              positive(height, "height"),
                              positive(width, "width")};
  positive(threads, "threads");
  run([&] { return function(task, storage == cpu::S_F64, images, threads); });
}

void synthesise(std::uintptr_t x, std::uintptr_t out, std::uintptr_t low, std::uintptr_t high, std::size_t taps,
                std::size_t images, std::size_t height, std::size_t width, const std::string& dtype,
                std::size_t threads) {
  if (2 * std::min(height, width) < taps) {
    throw py::value_error("height and width are " + std::to_string(height) + " and " + std::to_string(width) +
                          "; expected half of the " + std::to_string(taps) + " taps or more");
  }
  wavelet<cpu::wavelet_synthesise>(x, out, low, high, taps, images, height, width, dtype, threads);
}

cpu::PixelStrides pixel_strides(const std::array<std::ptrdiff_t, 3>& strides) {
  return {strides[0], strides[1], strides[2]};
}

std::size_t divisor(std::size_t value, const char* name, std::size_t number) {
  if (value == 0 || number % value != 0) {
    throw py::value_error(std::string(name) + " is " + std::to_string(value) + "; expected a divisor of " +
                          std::to_string(number));
  }
  return value;
}

void deform_conv2d(std::uintptr_t x, std::uintptr_t offset, std::uintptr_t mask, std::uintptr_t weight,
                   std::uintptr_t bias, std::uintptr_t out, std::size_t images, std::size_t height, std::size_t width,
                   std::size_t channels, std::size_t out_height, std::size_t out_width, std::size_t outputs,
                   const std::array<std::size_t, 2>& kernel, std::size_t groups, std::size_t deformable_groups,
                   const std::array<std::ptrdiff_t, 3>& offset_strides,
                   const std::array<std::ptrdiff_t, 3>& mask_strides, std::size_t stride, std::size_t padding,
                   std::size_t dilation, std::ptrdiff_t first, const std::string& dtype, std::size_t threads) {
  const cpu::Storage storage = storage_of(dtype);
  positive(channels, "channels");
  positive(outputs, "outputs");
  divisor(groups, "groups", outputs);
  const cpu::DeformTask task{needed(x, "x"),
                             needed(offset, "offset"),
                             optional(mask),
                             needed(weight, "weight"),
                             optional(bias),
                             needed(out, "out"),
                             images,
                             positive(height, "height"),
                             positive(width, "width"),
                             channels,
                             positive(out_height, "out_height"),
                             positive(out_width, "out_width"),
                             outputs,
                             positive(kernel[0], "kernel height"),
                             positive(kernel[1], "kernel width"),
                             divisor(groups, "groups", channels),
                             divisor(deformable_groups, "deformable_groups", channels),
                             pixel_strides(offset_strides),
                             pixel_strides(mask_strides),
                             static_cast<std::ptrdiff_t>(positive(stride, "stride")),
                             static_cast<std::ptrdiff_t>(padding),
                             static_cast<std::ptrdiff_t>(positive(dilation, "dilation")),
                             first};
  positive(threads, "threads");
  run([&] { return cpu::deform_conv2d(task, storage, threads); });
}

using Pair = std::array<std::size_t, 2>;

void packed_conv2d(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                   std::uintptr_t out, std::size_t channels, std::size_t outputs, std::size_t width, std::size_t rows,
                   std::size_t columns, const Pair& kernel, const Pair& stride, const Pair& dilation, std::size_t left,
                   std::size_t x_row, const Pair& out_strides, const Pair& residual_strides, bool relu,
                   bool transformed, std::size_t threads) {
  cpu::ConvTask task{};
  task.x = static_cast<const float*>(needed(x, "x"));
  task.weight = static_cast<const float*>(needed(weight, "weight"));
  task.bias = static_cast<const float*>(needed(bias, "bias"));
  task.residual = static_cast<const float*>(optional(residual));
  task.out = static_cast<float*>(needed(out, "out"));
  task.channels = positive(channels, "channels");
  task.outputs = positive(outputs, "outputs");
  task.width = positive(width, "width");
  task.rows = rows;
  task.columns = columns;
  task.kernel_rows = positive(kernel[0], "kernel height");
  task.kernel_columns = positive(kernel[1], "kernel width");
  task.row_step = positive(stride[0], "stride");
  task.column_step = positive(stride[1], "stride");
  task.row_dilation = positive(dilation[0], "dilation");
  task.column_dilation = positive(dilation[1], "dilation");
  task.left = left;
  task.x_row = x_row;
  task.out_row = out_strides[0];
  task.out_pixel = out_strides[1];
  task.residual_row = residual_strides[0];
  task.residual_pixel = residual_strides[1];
  task.relu = relu;
  task.transformed = transformed;
  positive(threads, "threads");
  run([&] { return cpu::convolution(task, threads); });
}

void packed_doubled_conv2d(std::uintptr_t doubled, std::uintptr_t doubled_weight, std::uintptr_t x,
                           std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out, std::size_t doubled_channels,
                           std::size_t channels, std::size_t outputs, const Pair& doubled_size, std::size_t rows,
                           std::size_t cut, std::size_t doubled_row, std::size_t x_row, const Pair& out_strides,
                           bool relu, std::size_t threads) {
  cpu::ConvTask task{};
  task.doubled = static_cast<const float*>(needed(doubled, "doubled"));
  task.doubled_weight = static_cast<const float*>(needed(doubled_weight, "doubled_weight"));
  task.x = static_cast<const float*>(optional(x));
  task.weight = static_cast<const float*>(x == 0 ? nullptr : needed(weight, "weight"));
  task.bias = static_cast<const float*>(needed(bias, "bias"));
  task.out = static_cast<float*>(needed(out, "out"));
  task.doubled_channels = positive(doubled_channels, "doubled_channels");
  task.channels = x == 0 ? 0 : positive(channels, "channels");
  task.outputs = positive(outputs, "outputs");
  task.doubled_height = positive(doubled_size[0], "doubled height");
  task.doubled_width = positive(doubled_size[1], "doubled width");
  task.doubled_row = doubled_row;
  task.width = task.columns = 2 * task.doubled_width;
  task.rows = rows;
  if (cut > 1) throw py::value_error("cut is " + std::to_string(cut) + "; expected 0 or 1");
  task.cut = cut;
  task.kernel_rows = task.kernel_columns = 3;
  task.row_step = task.column_step = task.row_dilation = task.column_dilation = task.left = 1;
  task.x_row = x_row;
  task.out_row = out_strides[0];
  task.out_pixel = out_strides[1];
  task.relu = relu;
  task.transformed = true;
  positive(threads, "threads");
  run([&] { return cpu::convolution(task, threads); });
}

}  // namespace

void bind_layers(py::module_& m) {
  m.attr("CHANNEL_PADDING") = cpu::channel_padding;
  m.attr("CONV_PANEL") = cpu::conv_panel;
  m.attr("CONV_FEW") = cpu::conv_few;
  m.def("layer_norm", &layer_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("gate"), py::arg("out"),
        py::arg("pixels"), py::arg("channels"), py::arg("x_stride"), py::arg("gate_stride"), py::arg("eps"),
        py::arg("dtype"), py::arg("threads"),
        "xrk.kernels.layer_norm on addresses. x, gate: `pixels` rows of `channels` values, their starts the strides (in\n"
        "values) apart; out without gaps; all of `dtype`. weight, bias: `channels` values of float32 (float64 for\n"
        "float64). weight, bias and gate may be 0: none.");
  m.def("depthwise_conv2d", &depthwise_conv2d, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("images"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("padded_channels"),
        py::arg("kernel"), py::arg("dilation"), py::arg("silu"), py::arg("dtype"), py::arg("threads"),
        "xrk.kernels.depthwise_conv2d on addresses. x, out: (images, height, width, channels) of `dtype`. weight:\n"
        "(kernel * kernel, padded_channels) and bias: (padded_channels), of float32 (float64 for float64), zero beyond\n"
        "the channels; padded_channels is a multiple of CHANNEL_PADDING.");
  m.def("group_norm_summarise", &group_norm_summarise, py::arg("x"), py::arg("state"), py::arg("images"),
        py::arg("pixels"), py::arg("channels"), py::arg("groups"), py::arg("dtype"), py::arg("threads"),
        "xrk.kernels.group_norm_summarise on addresses. x: (images, pixels, channels) of `dtype`. state: (images, groups,\n"
        "3) of float64: count, mean, sum of squared deviations.");
  m.def("group_norm_apply", &group_norm_apply, py::arg("x"), py::arg("scale"), py::arg("mean"), py::arg("mean_rest"),
        py::arg("shift"), py::arg("out"), py::arg("images"), py::arg("pixels"), py::arg("channels"), py::arg("silu"),
        py::arg("dtype"), py::arg("threads"),
        "out = ((x - mean) - mean_rest) * scale + shift, then SiLU where asked for. x, out: (images, pixels, channels) of\n"
        "`dtype`; the others (images, channels) of float32 (float64 for float64).");
  m.def("wavelet2d", &wavelet<cpu::wavelet_analyse>, py::arg("x"), py::arg("out"), py::arg("low"), py::arg("high"),
        py::arg("taps"), py::arg("images"), py::arg("height"), py::arg("width"), py::arg("dtype"), py::arg("threads"),
        "xrk.kernels.wavelet2d on addresses. x: (images, height, width), out: (images, 4, (height + taps - 1) // 2,\n"
        "(width + taps - 1) // 2), both of `dtype`, float32 or float64. low, high: `taps` values of float64.");
  m.def("wavelet2d_inverse", &synthesise, py::arg("x"), py::arg("out"), py::arg("low"), py::arg("high"),
        py::arg("taps"), py::arg("images"), py::arg("height"), py::arg("width"), py::arg("dtype"), py::arg("threads"),
        "xrk.kernels.wavelet2d_inverse on addresses. x: (images, 4, height, width), out: (images, 2 height - taps + 2,\n"
        "2 width - taps + 2), both of `dtype`, float32 or float64. low, high: `taps` values of float64, the analysis's.");
  m.def("deform_conv2d", &deform_conv2d, py::arg("x"), py::arg("offset"), py::arg("mask"), py::arg("weight"),
        py::arg("bias"), py::arg("out"), py::arg("images"), py::arg("height"), py::arg("width"), py::arg("channels"),
        py::arg("out_height"), py::arg("out_width"), py::arg("outputs"), py::arg("kernel"), py::arg("groups"),
        py::arg("deformable_groups"), py::arg("offset_strides"), py::arg("mask_strides"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("first"), py::arg("dtype"), py::arg("threads"),
        "xrk.kernels.deform_conv2d on addresses. x: (images, height, width, channels), out: (images, out_height,\n"
        "out_width, outputs), both of `dtype`. offset: for every output pixel (deformable_groups, taps, 2) values, mask:\n"
        "(deformable_groups, taps), their images, rows and pixels the strides (in values) apart; weight: (outputs,\n"
        "channels / groups, *kernel); bias: (outputs); all four of float32 (float64 for float64). mask and bias may be 0:\n"
        "none. first: the row of x, before padding, at which the taps of output row 0 begin.");
  m.def("packed_conv2d", &packed_conv2d, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("out"), py::arg("channels"), py::arg("outputs"), py::arg("width"), py::arg("rows"), py::arg("columns"),
        py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("left"), py::arg("x_row"),
        py::arg("out_strides"), py::arg("residual_strides"), py::arg("relu"),
        py::arg("transformed"), py::arg("threads"),
        "xrk.kernels.PackedConv2d on addresses, all of float32. x: rows of (width, channels), x_row values apart, beginning\n"
        "with the first that the first row of the result looks at; `left` columns of zeros lie beside them, and as many as\n"
        "are looked at to the right. weight: (panels, *kernel, channels, CONV_PANEL), zeros beyond the outputs, with\n"
        "`transformed` of a 4 x 4 kernel in place of the 3 x 3, else up to CONV_FEW outputs as (outputs, *kernel, channels);\n"
        "bias: (panels, CONV_PANEL). residual and out: (rows, columns, outputs), the strides are those of rows and pixels, in\n"
        "values; residual may be 0: none, or out.");
  m.def("packed_doubled_conv2d", &packed_doubled_conv2d, py::arg("doubled"), py::arg("doubled_weight"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("doubled_channels"), py::arg("channels"),
        py::arg("outputs"), py::arg("doubled_size"), py::arg("rows"), py::arg("cut"), py::arg("doubled_row"),
        py::arg("x_row"), py::arg("out_strides"), py::arg("relu"), py::arg("threads"),
        "xrk.kernels.PackedDoubledConv2d on addresses, all of float32. doubled: (*doubled_size, doubled_channels), its rows\n"
        "doubled_row values apart. x: (rows + 2, 2 width, channels), beginning with the row above the result, or 0: none.\n"
        "doubled_weight: (panels, 9, doubled_channels, CONV_PANEL); weight: (panels, 16, channels, CONV_PANEL); bias:\n"
        "(panels, CONV_PANEL). out: (rows, 2 width, outputs). cut: 1 where the result begins with an odd row.");
}
