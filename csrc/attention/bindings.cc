// The Python module freshet_attention: addresses of contiguous arrays in, the GIL released while the kernels work.
// Only model/attention_cpu.py, model/fused.py, model/softmax.py and model/sampled_softmax.py call it; they have checked
// shapes, types and layout before they pass an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "attention.h"
#include "layer.h"
#include "sampled_softmax.h"
#include "softmax.h"

namespace py = pybind11;

namespace {

using freshet::attention::Finish;
using freshet::attention::Gradients;
using freshet::attention::Inputs;
using freshet::attention::kParts;
using freshet::attention::Project;
using freshet::attention::Storage;

template <typename T>
T* at(const py::dict& arguments, const char* name) {
  return reinterpret_cast<T*>(py::cast<std::uintptr_t>(arguments[name]));  // NOLINT: an address by design
}

std::size_t number(const py::dict& arguments, const char* name) { return py::cast<std::size_t>(arguments[name]); }

Inputs inputs(const py::dict& a) {
  Inputs in;
  in.storage = py::cast<bool>(a["bfloat16"]) ? Storage::kBfloat16 : Storage::kFloat32;
  in.sequences = number(a, "sequences"), in.rows = number(a, "rows"), in.keys = number(a, "keys");
  in.heads = number(a, "heads"), in.dqk = number(a, "dqk"), in.dv = number(a, "dv");
  in.q = at<const void>(a, "q"), in.k = at<const void>(a, "k"), in.v = at<const void>(a, "v");
  in.q_stride = number(a, "q_stride"), in.k_stride = number(a, "k_stride"), in.v_stride = number(a, "v_stride");
  in.offsets = at<const std::int64_t>(a, "offsets"), in.row_offsets = at<const std::int64_t>(a, "row_offsets");
  in.begin = at<const std::int64_t>(a, "begin"), in.end = at<const std::int64_t>(a, "end");
  in.prefix = at<const std::int64_t>(a, "prefix");
  in.alpha = py::cast<float>(a["alpha"]), in.normaliser = py::cast<float>(a["normaliser"]);
  in.position_weights = at<const float>(a, "position_weights"), in.positions = number(a, "positions");
  in.time_weights = at<const float>(a, "time_weights");
  in.boundaries = at<const std::int64_t>(a, "boundaries");
  in.query_time = at<const std::int64_t>(a, "query_time"), in.key_time = at<const std::int64_t>(a, "key_time");
  in.self_gap = at<const std::int64_t>(a, "self_gap");
  return in;
}

void forward(const py::dict& arguments, std::uintptr_t y, std::size_t threads) {
  const Inputs in = inputs(arguments);
  const py::gil_scoped_release release;
  freshet::attention::forward(in, reinterpret_cast<void*>(y), threads);
}

void backward(const py::dict& arguments, const py::dict& gradients, std::size_t threads) {
  const Inputs in = inputs(arguments);
  Gradients out;
  out.y = at<const void>(gradients, "y");
  out.q = at<void>(gradients, "q"), out.k = at<void>(gradients, "k"), out.v = at<void>(gradients, "v");
  out.position_weights = at<float>(gradients, "position_weights");
  out.time_weights = at<float>(gradients, "time_weights");
  const py::gil_scoped_release release;
  freshet::attention::backward(in, out, threads);
}

freshet::attention::LayerNorm norm(const py::dict& a) {
  return {at<const float>(a, "norm_weight"), at<const float>(a, "norm_bias"), py::cast<float>(a["epsilon"])};
}

Project project(const py::dict& a) {
  Project in;
  in.rows = number(a, "rows"), in.dim = number(a, "dim"), in.silu_columns = number(a, "silu_columns");
  const auto parts = py::cast<std::array<std::size_t, kParts>>(a["sizes"]);
  for (std::size_t p = 0; p < kParts; ++p) in.parts[p] = parts[p], in.columns += parts[p];
  in.x = at<const float>(a, "x"), in.weight = at<const float>(a, "weight"), in.bias = at<const float>(a, "bias");
  in.norm = norm(a);
  return in;
}

using Addresses = std::array<std::uintptr_t, kParts>;

void project_forward(const py::dict& arguments, const Addresses& parts, std::size_t threads) {
  const Project in = project(arguments);
  float* to[kParts];
  for (std::size_t p = 0; p < kParts; ++p) to[p] = reinterpret_cast<float*>(parts[p]);
  const py::gil_scoped_release release;
  freshet::attention::project_forward(in, to, threads);
}

void project_backward(const py::dict& arguments, const Addresses& parts, const py::dict& gradients,
                      std::size_t threads) {
  const Project in = project(arguments);
  freshet::attention::ProjectGradients out;
  for (std::size_t p = 0; p < kParts; ++p) out.parts[p] = reinterpret_cast<const float*>(parts[p]);
  out.x = at<float>(gradients, "x"), out.weight = at<float>(gradients, "weight"),
  out.bias = at<float>(gradients, "bias");
  out.norm_weight = at<float>(gradients, "norm_weight"), out.norm_bias = at<float>(gradients, "norm_bias");
  const py::gil_scoped_release release;
  freshet::attention::project_backward(in, out, threads);
}

Finish finish(const py::dict& a) {
  Finish in;
  in.rows = number(a, "rows"), in.dim = number(a, "dim"), in.width = number(a, "width");
  in.gate = static_cast<freshet::attention::Gate>(py::cast<int>(a["gate"]));
  in.x = at<const float>(a, "x"), in.u = at<const float>(a, "u"), in.a = at<const float>(a, "a");
  in.weight = at<const float>(a, "weight"), in.bias = at<const float>(a, "bias");
  in.norm = norm(a);
  in.dropout = py::cast<float>(a["dropout"]), in.seed = py::cast<std::uint64_t>(a["seed"]);
  return in;
}

void finish_forward(const py::dict& arguments, std::uintptr_t y, std::size_t threads) {
  const Finish in = finish(arguments);
  const py::gil_scoped_release release;
  freshet::attention::finish_forward(in, reinterpret_cast<float*>(y), threads);
}

void finish_backward(const py::dict& arguments, const py::dict& gradients, std::size_t threads) {
  const Finish in = finish(arguments);
  freshet::attention::FinishGradients out;
  out.y = at<const float>(gradients, "y"), out.u = at<float>(gradients, "u"), out.a = at<float>(gradients, "a");
  out.weight = at<float>(gradients, "weight"), out.bias = at<float>(gradients, "bias");
  out.norm_weight = at<float>(gradients, "norm_weight"), out.norm_bias = at<float>(gradients, "norm_bias");
  const py::gil_scoped_release release;
  freshet::attention::finish_backward(in, out, threads);
}

double catalogue_softmax(const py::dict& a, const py::dict& gradients, std::size_t threads) {
  freshet::attention::Softmax in;
  in.rows = number(a, "rows"), in.items = number(a, "items"), in.dim = number(a, "dim");
  in.vectors = at<const float>(a, "vectors"), in.item_vectors = at<const float>(a, "item_vectors");
  in.wanted = at<const std::int64_t>(a, "wanted"), in.scale = py::cast<float>(a["scale"]);
  const freshet::attention::SoftmaxGradients out{at<float>(gradients, "vectors"),
                                                 at<float>(gradients, "item_vectors")};
  const py::gil_scoped_release release;
  return freshet::attention::catalogue_softmax(in, out, threads);
}

double sampled_softmax(const py::dict& a, const py::dict& gradients, std::size_t threads) {
  freshet::attention::SampledSoftmax in;
  in.rows = number(a, "rows"), in.items = number(a, "items"), in.dim = number(a, "dim");
  in.samples = number(a, "samples");
  in.vectors = at<const float>(a, "vectors"), in.item_vectors = at<const float>(a, "item_vectors");
  in.wanted = at<const std::int64_t>(a, "wanted"), in.drawn = at<const std::int64_t>(a, "drawn");
  in.scale = py::cast<float>(a["scale"]);
  const freshet::attention::SoftmaxGradients out{at<float>(gradients, "vectors"),
                                                 at<float>(gradients, "item_vectors")};
  const py::gil_scoped_release release;
  return freshet::attention::sampled_softmax(in, out, threads);
}

}  // namespace

PYBIND11_MODULE(freshet_attention, module) {
  module.doc() = "Fused jagged attention, layers and softmax; use model.attention, model.fused and model.softmax.";
  module.def("forward", &forward, py::arg("inputs"), py::arg("y"), py::arg("threads"));
  module.def("backward", &backward, py::arg("inputs"), py::arg("gradients"), py::arg("threads"));
  module.def("project_forward", &project_forward, py::arg("inputs"), py::arg("parts"), py::arg("threads"));
  module.def("project_backward", &project_backward, py::arg("inputs"), py::arg("parts"), py::arg("gradients"),
             py::arg("threads"));
  module.def("finish_forward", &finish_forward, py::arg("inputs"), py::arg("y"), py::arg("threads"));
  module.def("finish_backward", &finish_backward, py::arg("inputs"), py::arg("gradients"), py::arg("threads"));
  module.def("catalogue_softmax", &catalogue_softmax, py::arg("inputs"), py::arg("gradients"), py::arg("threads"));
  module.def("sampled_softmax", &sampled_softmax, py::arg("inputs"), py::arg("gradients"), py::arg("threads"));
  module.def("instruction_set", &freshet::attention::instruction_set);
}
