// The Python module freshet_table: numpy arrays in and out, the GIL released while the table works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "embedding_table.h"

namespace py = pybind11;

namespace {

using freshet::EmbeddingTable;
using Ids = py::array_t<std::int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Release = py::gil_scoped_release;

// Hands a vector to numpy without copying it.
template <typename T>
py::array_t<T> to_numpy(std::vector<T> values, std::vector<py::ssize_t> shape) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  py::capsule free(owner.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owner.release();
  return py::array_t<T>(std::move(shape), data, free);
}

std::size_t count(const Ids& ids) {
  if (ids.ndim() != 1) throw std::invalid_argument("ids must have one dimension");
  return static_cast<std::size_t>(ids.shape(0));
}

void check_rows(const Floats& values, std::size_t n, std::size_t width, const char* name) {
  if (values.ndim() != 2 || static_cast<std::size_t>(values.shape(0)) != n ||
      static_cast<std::size_t>(values.shape(1)) != width) {
    throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(n) + ", " +
                                std::to_string(width) + "]");
  }
}

std::unique_ptr<EmbeddingTable> make(std::size_t dim, const std::string& optimizer, float init_scale,
                                     std::uint64_t seed, std::uint64_t slot_hash, float initial_accumulator,
                                     float epsilon, float beta1, float beta2) {
  freshet::TableConfig config;
  config.dim = dim;
  config.optimizer = {freshet::parse_optimizer(optimizer), initial_accumulator, epsilon, beta1, beta2};
  config.init_scale = init_scale;
  config.seed = seed;
  config.slot_hash = slot_hash;
  return std::make_unique<EmbeddingTable>(config);
}

Floats lookup(const EmbeddingTable& table, const Ids& ids, bool missing_initial) {
  const std::size_t n = count(ids);
  Floats out({n, table.dim()});
  const std::int64_t* in = ids.data();
  float* to = out.mutable_data();
  const Release release;
  table.lookup(in, n, to, missing_initial ? freshet::Missing::kInitial : freshet::Missing::kZeros);
  return out;
}

Floats find_or_insert(EmbeddingTable& table, const Ids& ids) {
  const std::size_t n = count(ids);
  Floats out({n, table.dim()});
  const std::int64_t* in = ids.data();
  float* to = out.mutable_data();
  const Release release;
  table.find_or_insert(in, n, to);
  return out;
}

std::size_t apply_gradients(EmbeddingTable& table, const Ids& ids, const Floats& grads, float lr,
                            std::int64_t now_us) {
  const std::size_t n = count(ids);
  check_rows(grads, n, table.dim(), "grads");
  const std::int64_t* in = ids.data();
  const float* g = grads.data();
  const Release release;
  return table.apply_gradients(in, n, g, lr, now_us);
}

std::size_t upsert(EmbeddingTable& table, const Ids& ids, const Floats& weights, const std::optional<Floats>& state,
                   const std::optional<Ids>& last_update_us) {
  const std::size_t n = count(ids);
  check_rows(weights, n, table.dim(), "weights");
  if (state) check_rows(*state, n, table.state_dim(), "state");
  if (last_update_us && count(*last_update_us) != n) {
    throw std::invalid_argument("last_update_us must have one entry per id");
  }
  const std::int64_t* in = ids.data();
  const float* w = weights.data();
  const float* s = state ? state->data() : nullptr;
  const std::int64_t* t = last_update_us ? last_update_us->data() : nullptr;
  const Release release;
  return table.upsert(in, n, w, s, t);
}

std::size_t erase(EmbeddingTable& table, const Ids& ids) {
  const std::size_t n = count(ids);
  const std::int64_t* in = ids.data();
  const Release release;
  return table.erase(in, n);
}

// (keys, weights, state, last_update_us, tombstones)
py::tuple to_tuple(const EmbeddingTable& table, freshet::Delta delta) {
  const auto n = static_cast<py::ssize_t>(delta.keys.size());
  const auto m = static_cast<py::ssize_t>(delta.tombstones.size());
  const auto dim = static_cast<py::ssize_t>(table.dim());
  const auto state_dim = static_cast<py::ssize_t>(table.state_dim());
  return py::make_tuple(to_numpy(std::move(delta.keys), {n}), to_numpy(std::move(delta.weights), {n, dim}),
                        to_numpy(std::move(delta.state), {n, state_dim}),
                        to_numpy(std::move(delta.last_update_us), {n}), to_numpy(std::move(delta.tombstones), {m}));
}

py::tuple export_delta(const EmbeddingTable& table, std::uint64_t since_epoch) {
  freshet::Delta delta;
  {
    const Release release;
    delta = table.export_delta(since_epoch);
  }
  return to_tuple(table, std::move(delta));
}

py::tuple export_all(const EmbeddingTable& table) {
  freshet::Delta delta;
  {
    const Release release;
    delta = table.export_all();
  }
  return to_tuple(table, std::move(delta));
}

py::dict stats(const EmbeddingTable& table) {
  freshet::TableStats s;
  {
    const Release release;
    s = table.stats();
  }
  using namespace py::literals;
  return py::dict("rows"_a = s.rows, "tombstones"_a = s.tombstones, "epoch"_a = s.epoch,
                  "memory_bytes"_a = s.memory_bytes, "looked_up"_a = s.looked_up, "missed"_a = s.missed,
                  "inserted"_a = s.inserted, "updated"_a = s.updated, "upserted"_a = s.upserted,
                  "erased"_a = s.erased, "expired"_a = s.expired);
}

}  // namespace

PYBIND11_MODULE(freshet_table, m) {
  m.doc() = "Collisionless embedding table; use model.table.EmbeddingTable.";
  const auto release = py::call_guard<Release>();
  py::class_<EmbeddingTable>(m, "Table")
      .def(py::init(&make), py::kw_only(), py::arg("dim"), py::arg("optimizer"), py::arg("init_scale"),
           py::arg("seed"), py::arg("slot_hash"), py::arg("initial_accumulator"), py::arg("epsilon"),
           py::arg("beta1"), py::arg("beta2"))
      .def_property_readonly("dim", &EmbeddingTable::dim)
      .def_property_readonly("state_dim", &EmbeddingTable::state_dim)
      .def("__len__", &EmbeddingTable::size, release)
      .def("epoch", &EmbeddingTable::epoch, release)
      .def("stats", &stats)
      .def("lookup", &lookup, py::arg("ids").noconvert(), py::arg("missing_initial"))
      .def("find_or_insert", &find_or_insert, py::arg("ids").noconvert())
      .def("apply_gradients", &apply_gradients, py::arg("ids").noconvert(), py::arg("grads").noconvert(),
           py::arg("lr"), py::arg("now_us"))
      .def("upsert", &upsert, py::arg("ids").noconvert(), py::arg("weights").noconvert(),
           py::arg("state").noconvert().none(true), py::arg("last_update_us").noconvert().none(true))
      .def("erase", &erase, py::arg("ids").noconvert())
      .def("expire", &EmbeddingTable::expire, py::arg("before_us"), release)
      .def("advance_epoch", &EmbeddingTable::advance_epoch, release)
      .def("export_delta", &export_delta, py::arg("since_epoch"))
      .def("export_all", &export_all)
      .def("drop_tombstones", &EmbeddingTable::drop_tombstones, py::arg("up_to_epoch"), release);
}
