// The serving table in the Python module: numpy arrays in and out, the GIL released while it works.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "serving_table.h"

namespace freshet {
namespace {

Missing missing_of(bool initial) { return initial ? Missing::kInitial : Missing::kZeros; }

std::unique_ptr<ServingTable> make(std::size_t dim, const std::string& precision, float init_scale, std::uint64_t seed,
                                   std::uint64_t slot_hash) {
  return std::make_unique<ServingTable>(
      ServingConfig{dim, parse_precision(precision), init_scale, seed, slot_hash});
}

Floats lookup(const ServingTable& table, const Ids& ids, bool missing_initial, std::size_t threads) {
  const std::size_t n = length(ids, "ids");
  Floats out({n, table.dim()});
  const std::int64_t* in = ids.data();
  float* to = out.mutable_data();
  const Release release;
  table.lookup(in, n, to, missing_of(missing_initial), threads);
  return out;
}

Floats lookup_pooled(const ServingTable& table, const Ids& ids, const Ids& offsets, bool mean, bool missing_initial,
                     std::size_t threads) {
  const std::size_t n = length(ids, "ids"), ends = length(offsets, "offsets");
  if (ends == 0) throw std::invalid_argument("offsets must have one entry more than there are bags");
  Floats out({ends - 1, table.dim()});
  const std::int64_t* in = ids.data();
  const std::int64_t* at = offsets.data();
  float* to = out.mutable_data();
  const Release release;
  table.lookup_pooled(in, n, at, ends - 1, mean ? freshet::Pooling::kMean : freshet::Pooling::kSum, to,
                      missing_of(missing_initial), threads);
  return out;
}

// (inserted, erased)
py::tuple apply(ServingTable& table, const Ids& keys, const Floats& weights, const Ids& tombstones) {
  const std::size_t n = length(keys, "keys"), m = length(tombstones, "tombstones");
  if (weights.ndim() != 2 || static_cast<std::size_t>(weights.shape(0)) != n ||
      static_cast<std::size_t>(weights.shape(1)) != table.dim()) {
    throw std::invalid_argument("weights must have shape [" + std::to_string(n) + ", " + std::to_string(table.dim()) +
                                "]");
  }
  const std::int64_t* in = keys.data();
  const std::int64_t* gone = tombstones.data();
  const float* w = weights.data();
  ServingTable::Applied applied{};
  {
    const Release release;
    applied = table.apply(in, n, w, gone, m);
  }
  return py::make_tuple(applied.inserted, applied.erased);
}

py::dict stats(const ServingTable& table) {
  const ServingStats s = table.stats();
  using namespace py::literals;
  return py::dict("rows"_a = s.rows, "row_bytes"_a = s.row_bytes, "overhead_bytes"_a = s.overhead_bytes,
                  "looked_up"_a = s.looked_up, "missed"_a = s.missed, "upserted"_a = s.upserted, "erased"_a = s.erased);
}

// What a table of that precision serves of weights[n, dim].
Floats serving_rounding(const Floats& weights, const std::string& precision) {
  if (weights.ndim() != 2) throw std::invalid_argument("weights must have two dimensions");
  const auto rows = static_cast<std::size_t>(weights.shape(0)), dim = static_cast<std::size_t>(weights.shape(1));
  const RowCodec codec(parse_precision(precision), dim);
  if (codec.first_unfit(weights.data(), rows * dim) != rows * dim) {
    throw std::invalid_argument("weights must be finite and fit " + precision);
  }
  Floats out({rows, dim});
  std::copy_n(weights.data(), rows * dim, out.mutable_data());
  for (std::size_t i = 0; i < rows; ++i) codec.round(out.mutable_data() + i * dim);
  return out;
}

}  // namespace

void bind_serving(py::module_& m) {
  py::class_<ServingTable>(m, "ServingTable")
      .def(py::init(&make), py::kw_only(), py::arg("dim"), py::arg("precision"), py::arg("init_scale"), py::arg("seed"),
           py::arg("slot_hash"))
      .def("__len__", &ServingTable::size)
      .def("stats", &stats)
      .def("lookup", &lookup, py::arg("ids").noconvert(), py::arg("missing_initial"), py::arg("threads"))
      .def("lookup_pooled", &lookup_pooled, py::arg("ids").noconvert(), py::arg("offsets").noconvert(), py::arg("mean"),
           py::arg("missing_initial"), py::arg("threads"))
      .def("apply", &apply, py::arg("keys").noconvert(), py::arg("weights").noconvert(),
           py::arg("tombstones").noconvert());
  m.def("serving_rounding", &serving_rounding, py::arg("weights").noconvert(), py::arg("precision"));
}
}  // namespace freshet
