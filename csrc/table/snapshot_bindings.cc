// Snapshots in the Python module.
#include <memory>

#include "bindings.h"
#include "snapshot_scan.h"

namespace freshet {
namespace {

py::dict to_dict(const EmbeddingTable& table, Block block) {
  const auto n = static_cast<py::ssize_t>(block.keys.size()), c = static_cast<py::ssize_t>(block.candidates.size());
  const auto dim = static_cast<py::ssize_t>(table.dim()), state_dim = static_cast<py::ssize_t>(table.state_dim());
  using namespace py::literals;
  return py::dict("first_bucket"_a = block.first_bucket, "last_bucket"_a = block.last_bucket,
                  "keys"_a = to_numpy(std::move(block.keys), {n}),
                  "weights"_a = to_numpy(std::move(block.weights), {n, dim}),
                  "state"_a = to_numpy(std::move(block.state), {n, state_dim}),
                  "last_seen"_a = to_numpy(std::move(block.last_seen), {n}),
                  "dirty_epoch"_a = to_numpy(std::move(block.dirty_epoch), {n}),
                  "counts"_a = to_numpy(std::move(block.counts), {n}),
                  "candidate_keys"_a = to_numpy(std::move(block.candidate_keys), {c}),
                  "candidates"_a = to_numpy(std::move(block.candidates), {c}));
}

// A scan and the table it reads.
class Scan {
 public:
  explicit Scan(EmbeddingTable& table) : table_(table) {
    const Release release;
    scan_ = std::make_unique<SnapshotScan>(table);
  }
  ~Scan() { close(); }
  Scan(const Scan&) = delete;
  Scan& operator=(const Scan&) = delete;

  py::object next() {
    if (!scan_) throw std::invalid_argument("the snapshot is closed");
    Block block;
    bool more = false;
    {
      const Release release;
      more = scan_->next(&block);
    }
    return more ? py::object(to_dict(table_, std::move(block))) : py::none();
  }

  void give_way() {
    if (!scan_) throw std::invalid_argument("the snapshot is closed");
    const Release release;
    scan_->give_way();
  }

  void close() {
    const Release release;
    scan_.reset();
  }

  const SnapshotScan& scan() const {
    if (!scan_) throw std::invalid_argument("the snapshot is closed");
    return *scan_;
  }

  py::dict progress() const {
    const EmbeddingTable::Progress p = scan().progress();
    using namespace py::literals;
    return py::dict("epoch"_a = p.epoch, "updates"_a = p.updates, "sweep_at"_a = p.sweep_at,
                    "eviction_at"_a = p.eviction_at, "clock"_a = p.clock, "dropped_to"_a = scan().dropped_to(),
                    "rows"_a = scan().rows());
  }

  py::tuple tombstones() const {
    std::vector<std::int64_t> keys = scan().tombstone_keys();
    std::vector<Epoch> epochs = scan().tombstone_epochs();
    const auto m = static_cast<py::ssize_t>(keys.size());
    return py::make_tuple(to_numpy(std::move(keys), {m}), to_numpy(std::move(epochs), {m}));
  }

 private:
  EmbeddingTable& table_;
  std::unique_ptr<SnapshotScan> scan_;
};

void begin_restore(EmbeddingTable& table, const py::dict& progress, const Ids& tombstones, const Array<Epoch>& epochs) {
  const std::size_t n = length(tombstones, "tombstones");
  if (length(epochs, "epochs") != n) throw std::invalid_argument("epochs must have one entry per tombstone");
  const EmbeddingTable::Progress p{progress["epoch"].cast<Epoch>(), progress["updates"].cast<std::uint64_t>(),
                                   progress["sweep_at"].cast<std::uint64_t>(),
                                   progress["eviction_at"].cast<std::uint64_t>(), progress["clock"].cast<Seconds>()};
  table.begin_restore(p, progress["dropped_to"].cast<Epoch>(), tombstones.data(), epochs.data(), n);
}

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Scan>(m, "SnapshotScan")
      .def(py::init<EmbeddingTable&>(), py::arg("table"), py::keep_alive<1, 2>())
      .def("next", &Scan::next)
      .def("give_way", &Scan::give_way)
      .def("close", &Scan::close)
      .def("progress", &Scan::progress)
      .def("tombstones", &Scan::tombstones);
  m.def("begin_restore", &begin_restore, py::arg("table"), py::arg("progress"), py::arg("tombstones").noconvert(),
        py::arg("epochs").noconvert());
}

}  // namespace freshet
