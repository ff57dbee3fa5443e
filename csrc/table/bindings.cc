// The Python module freshet_table: numpy arrays in and out, the GIL released while the table works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "embedding_table.h"

namespace py = pybind11;

namespace freshet {
namespace {

Admission parse_admission(const std::string& name) {
  if (name == "all") return Admission::kAll;
  if (name == "threshold") return Admission::kThreshold;
  if (name == "probability") return Admission::kProbability;
  throw std::invalid_argument("unknown admission '" + name + "'; use all, threshold or probability");
}

WhenFull parse_when_full(const std::string& name) {
  if (name == "refuse") return WhenFull::kRefuse;
  if (name == "evict_stalest") return WhenFull::kEvictStalest;
  if (name == "evict_rarest") return WhenFull::kEvictRarest;
  throw std::invalid_argument("unknown when_full '" + name + "'; use refuse, evict_stalest or evict_rarest");
}

// Every setting is given by name; model.table.EmbeddingTable has the defaults.
std::unique_ptr<EmbeddingTable> make(const py::kwargs& given) {
  py::dict settings(given);
  const auto take = [&](const char* name, auto& value) {
    if (!settings.contains(name)) throw std::invalid_argument(std::string("missing setting ") + name);
    try {
      value = settings[name].cast<std::decay_t<decltype(value)>>();
    } catch (const py::cast_error&) {
      throw std::invalid_argument(std::string(name) + " cannot be " + py::repr(settings[name]).cast<std::string>() +
                                  ": it has another type, or is out of range");
    }
    settings.attr("pop")(name);
  };
  TableConfig c;
  std::string optimizer, admission, when_full;
  take("dim", c.dim);
  take("optimizer", optimizer);
  take("initial_accumulator", c.optimizer.initial_accumulator);
  take("epsilon", c.optimizer.epsilon);
  take("beta1", c.optimizer.beta1);
  take("beta2", c.optimizer.beta2);
  take("l1", c.optimizer.l1);
  take("l2", c.optimizer.l2);
  take("ftrl_beta", c.optimizer.ftrl_beta);
  take("init_scale", c.init_scale);
  take("seed", c.seed);
  take("slot_hash", c.slot_hash);
  take("admission", admission);
  take("admission_threshold", c.threshold);
  take("admission_probability", c.probability);
  take("ttl_us", c.ttl_us);
  take("ttl_on_access", c.ttl_on_access);
  take("min_rows", c.min_rows);
  take("sweep_steps", c.sweep_steps);
  take("max_rows", c.max_rows);
  take("when_full", when_full);
  take("shards", c.shards);
  if (!settings.empty()) throw std::invalid_argument("unknown settings: " + py::str(settings).cast<std::string>());
  c.optimizer.kind = parse_optimizer(optimizer);
  c.admission = parse_admission(admission);
  c.when_full = parse_when_full(when_full);
  return std::make_unique<EmbeddingTable>(c);
}

Missing missing_of(bool initial) noexcept { return initial ? Missing::kInitial : Missing::kZeros; }

Floats lookup(const EmbeddingTable& table, const Ids& ids, bool missing_initial, std::size_t threads) {
  const std::size_t n = length(ids, "ids");
  Floats out({n, table.dim()});
  const std::int64_t* in = ids.data();
  float* to = out.mutable_data();
  const Release release;
  table.lookup(in, n, to, missing_of(missing_initial), threads);
  return out;
}

Floats lookup_pooled(const EmbeddingTable& table, const Ids& ids, const Ids& offsets, bool mean, bool missing_initial,
                     std::size_t threads) {
  const std::size_t n = length(ids, "ids"), ends = length(offsets, "offsets");
  if (ends == 0) throw std::invalid_argument("offsets need at least one entry, 0");
  Floats out({ends - 1, table.dim()});
  const std::int64_t *in = ids.data(), *bags = offsets.data();
  float* to = out.mutable_data();
  const Release release;
  table.lookup_pooled(in, n, bags, ends - 1, mean ? Pooling::kMean : Pooling::kSum, to, missing_of(missing_initial),
                      threads);
  return out;
}

Floats find_or_insert(EmbeddingTable& table, const Ids& ids, std::size_t threads) {
  const std::size_t n = length(ids, "ids");
  Floats out({n, table.dim()});
  const std::int64_t* in = ids.data();
  float* to = out.mutable_data();
  const Release release;
  table.find_or_insert(in, n, to, threads);
  return out;
}

std::size_t apply_gradients(EmbeddingTable& table, const Ids& ids, const Floats& grads,
                            const std::optional<Array<std::uint32_t>>& row, const std::optional<Floats>& scale,
                            const std::optional<Array<std::uint32_t>>& events, const std::optional<Ids>& event_us,
                            const std::optional<Ids>& read_ids, const std::optional<Ids>& read_us, float lr,
                            std::int64_t now_us, std::size_t threads) {
  const std::size_t n = length(ids, "ids");
  if (grads.ndim() != 2) throw std::invalid_argument("grads must have two dimensions");
  const auto grad_rows = static_cast<std::size_t>(grads.shape(0));
  check_shape(grads, row ? grad_rows : n, table.dim(), "grads");
  EmbeddingTable::Gradients gradients{grads.data(), grad_rows};
  if (row) {
    if (length(*row, "row") != n) throw std::invalid_argument("row must have one entry per id");
    gradients.row = row->data();
    for (std::size_t i = 0; i < n; ++i) {
      if (gradients.row[i] >= grad_rows) throw std::invalid_argument("row names a gradient that is not there");
    }
  }
  if (scale) {
    if (length(*scale, "scale") != n) throw std::invalid_argument("scale must have one entry per id");
    gradients.scale = scale->data();
  }
  if (events) {
    if (!event_us || length(*events, "events") != n || length(*event_us, "event_us") != n) {
      throw std::invalid_argument("events and event_us must have one entry per id");
    }
    gradients.events = events->data();
    gradients.event_us = event_us->data();
  }
  if (read_ids) {
    gradients.reads = length(*read_ids, "read_ids");
    if (!read_us || length(*read_us, "read_us") != gradients.reads) {
      throw std::invalid_argument("read_us must have one entry per read id");
    }
    gradients.read_ids = read_ids->data();
    gradients.read_us = read_us->data();
  }
  const std::int64_t* in = ids.data();
  const Release release;
  return table.apply_gradients(in, n, gradients, lr, now_us, threads);
}

EmbeddingTable::Rows rows_of(const EmbeddingTable& table, const Ids& ids, const Floats& weights,
                             const std::optional<Floats>& state, const std::optional<Ids>& last_update_us,
                             const std::optional<Array<std::uint16_t>>& counts,
                             const std::optional<Array<std::uint32_t>>& dirty_epochs) {
  const std::size_t n = length(ids, "ids");
  check_shape(weights, n, table.dim(), "weights");
  if (state) check_shape(*state, n, table.state_dim(), "state");
  const auto check_length = [n](const auto& array, const char* name) {
    if (array && length(*array, name) != n) throw std::invalid_argument(std::string(name) + " must have one entry per id");
  };
  check_length(last_update_us, "last_update_us");
  check_length(counts, "counts");
  check_length(dirty_epochs, "dirty_epochs");
  return {weights.data(), state ? state->data() : nullptr, last_update_us ? last_update_us->data() : nullptr,
          counts ? counts->data() : nullptr, dirty_epochs ? dirty_epochs->data() : nullptr};
}

std::size_t upsert(EmbeddingTable& table, const Ids& ids, const Floats& weights, const std::optional<Floats>& state,
                   const std::optional<Ids>& last_update_us, const std::optional<Array<std::uint16_t>>& counts,
                   const std::optional<Array<std::uint32_t>>& dirty_epochs, std::size_t threads) {
  const EmbeddingTable::Rows rows = rows_of(table, ids, weights, state, last_update_us, counts, dirty_epochs);
  const std::size_t n = length(ids, "ids");
  const std::int64_t* in = ids.data();
  const Release release;
  return table.upsert(in, n, rows, threads);
}

// All is checked before anything is changed.
void apply_delta(EmbeddingTable& table, const Ids& tombstones, const Ids& keys, const Floats& weights,
                 const std::optional<Floats>& state, const std::optional<Ids>& last_update_us,
                 const std::optional<Array<std::uint16_t>>& counts, const Ids& candidate_keys,
                 const Array<std::uint32_t>& candidates, std::size_t threads) {
  const EmbeddingTable::Rows rows = rows_of(table, keys, weights, state, last_update_us, counts, std::nullopt);
  const std::size_t n = length(keys, "keys"), c = length(candidate_keys, "candidate_keys"),
                    m = length(tombstones, "tombstones");
  if (length(candidates, "candidates") != c) throw std::invalid_argument("candidates must have one entry per key");
  const std::int64_t *gone = tombstones.data(), *in = keys.data(), *waiting = candidate_keys.data();
  const std::uint32_t* words = candidates.data();
  const Release release;
  table.check_rows(n, rows);
  table.check_candidates(c);
  table.erase(gone, m);
  table.upsert(in, n, rows, threads);
  table.put_candidates(waiting, c, words);
}

void put_candidates(EmbeddingTable& table, const Ids& ids, const Array<std::uint32_t>& words) {
  const std::size_t n = length(ids, "ids");
  if (length(words, "words") != n) throw std::invalid_argument("words must have one entry per id");
  const std::int64_t* in = ids.data();
  const std::uint32_t* w = words.data();
  const Release release;
  table.put_candidates(in, n, w);
}

void touch(EmbeddingTable& table, const Ids& ids, const Ids& now_us) {
  const std::size_t n = length(ids, "ids");
  if (length(now_us, "now_us") != n) throw std::invalid_argument("now_us must have one entry per id");
  const std::int64_t *in = ids.data(), *times = now_us.data();
  const Release release;
  table.touch(in, n, times);
}

std::size_t erase(EmbeddingTable& table, const Ids& ids) {
  const std::size_t n = length(ids, "ids");
  const std::int64_t* in = ids.data();
  const Release release;
  return table.erase(in, n);
}

// (keys, weights, state, last_update_us, counts, candidate_keys, candidates, tombstones)
py::tuple to_tuple(const EmbeddingTable& table, Delta delta) {
  const auto n = static_cast<py::ssize_t>(delta.keys.size()), c = static_cast<py::ssize_t>(delta.candidates.size()),
             m = static_cast<py::ssize_t>(delta.tombstones.size());
  const auto dim = static_cast<py::ssize_t>(table.dim()), state_dim = static_cast<py::ssize_t>(table.state_dim());
  return py::make_tuple(to_numpy(std::move(delta.keys), {n}), to_numpy(std::move(delta.weights), {n, dim}),
                        to_numpy(std::move(delta.state), {n, state_dim}),
                        to_numpy(std::move(delta.last_update_us), {n}), to_numpy(std::move(delta.counts), {n}),
                        to_numpy(std::move(delta.candidate_keys), {c}), to_numpy(std::move(delta.candidates), {c}),
                        to_numpy(std::move(delta.tombstones), {m}));
}

py::tuple export_delta(const EmbeddingTable& table, Epoch since_epoch) {
  Delta delta;
  {
    const Release release;
    delta = table.export_delta(since_epoch);
  }
  return to_tuple(table, std::move(delta));
}

py::tuple export_all(const EmbeddingTable& table) {
  Delta delta;
  {
    const Release release;
    delta = table.export_all();
  }
  return to_tuple(table, std::move(delta));
}

// What training on from here depends on, beside rows and candidates.
py::dict progress(const EmbeddingTable& table) {
  const EmbeddingTable::Progress p = [&] {
    const Release release;
    return table.progress();
  }();
  using namespace py::literals;
  return py::dict("updates"_a = p.updates, "sweep_at"_a = p.sweep_at, "eviction_at"_a = p.eviction_at,
                  "clock"_a = p.clock);
}

py::dict stats(const EmbeddingTable& table) {
  TableStats s;
  {
    const Release release;
    s = table.stats();
  }
  using namespace py::literals;
  return py::dict("rows"_a = s.rows, "candidates"_a = s.candidates, "tombstones"_a = s.tombstones, "epoch"_a = s.epoch,
                  "row_bytes"_a = s.row_bytes, "overhead_bytes"_a = s.overhead_bytes, "looked_up"_a = s.looked_up,
                  "missed"_a = s.missed, "inserted"_a = s.inserted, "updated"_a = s.updated,
                  "upserted"_a = s.upserted, "erased"_a = s.erased, "expired"_a = s.expired,
                  "expired_candidates"_a = s.expired_candidates, "evicted"_a = s.evicted,
                  "refused_admission"_a = s.refused_admission, "refused_full"_a = s.refused_full,
                  "refused_batches"_a = s.refused_batches, "postponed_sweeps"_a = s.postponed_sweeps);
}

}  // namespace
}  // namespace freshet

PYBIND11_MODULE(freshet_table, m) {
  using namespace freshet;
  m.doc() = "Collisionless embedding tables; use model.table and model.serving_table.";
  const auto release = py::call_guard<Release>();
  py::class_<EmbeddingTable>(m, "Table")
      .def(py::init(&make))
      .def_property_readonly("dim", &EmbeddingTable::dim)
      .def_property_readonly("state_dim", &EmbeddingTable::state_dim)
      .def("__len__", &EmbeddingTable::size)
      .def("epoch", &EmbeddingTable::epoch)
      .def("stats", &stats)
      .def("lookup", &lookup, py::arg("ids").noconvert(), py::arg("missing_initial"), py::arg("threads"))
      .def("lookup_pooled", &lookup_pooled, py::arg("ids").noconvert(), py::arg("offsets").noconvert(), py::arg("mean"),
           py::arg("missing_initial"), py::arg("threads"))
      .def("find_or_insert", &find_or_insert, py::arg("ids").noconvert(), py::arg("threads"))
      .def("apply_gradients", &apply_gradients, py::arg("ids").noconvert(), py::arg("grads").noconvert(),
           py::arg("row").noconvert().none(true), py::arg("scale").noconvert().none(true),
           py::arg("events").noconvert().none(true), py::arg("event_us").noconvert().none(true),
           py::arg("read_ids").noconvert().none(true), py::arg("read_us").noconvert().none(true), py::arg("lr"),
           py::arg("now_us"), py::arg("threads"))
      .def("upsert", &upsert, py::arg("ids").noconvert(), py::arg("weights").noconvert(),
           py::arg("state").noconvert().none(true), py::arg("last_update_us").noconvert().none(true),
           py::arg("counts").noconvert().none(true), py::arg("dirty_epochs").noconvert().none(true), py::arg("threads"))
      .def("put_candidates", &put_candidates, py::arg("ids").noconvert(), py::arg("words").noconvert())
      .def("apply_delta", &apply_delta, py::arg("tombstones").noconvert(), py::arg("keys").noconvert(),
           py::arg("weights").noconvert(), py::arg("state").noconvert().none(true),
           py::arg("last_update_us").noconvert().none(true), py::arg("counts").noconvert().none(true),
           py::arg("candidate_keys").noconvert(), py::arg("candidates").noconvert(), py::arg("threads"))
      .def("touch", &touch, py::arg("ids").noconvert(), py::arg("now_us").noconvert())
      .def("erase", &erase, py::arg("ids").noconvert())
      .def("expire", &EmbeddingTable::expire, py::arg("before_us"), release)
      .def("expire_stale", &EmbeddingTable::expire_stale, release)
      .def("progress", &progress)
      .def("advance_epoch", &EmbeddingTable::advance_epoch, release)
      .def("export_delta", &export_delta, py::arg("since_epoch"))
      .def("export_all", &export_all)
      .def("drop_tombstones", &EmbeddingTable::drop_tombstones, py::arg("up_to_epoch"), release);
  bind_snapshot(m);
  bind_checksum(m);
  bind_serving(m);
}
