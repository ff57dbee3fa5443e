// Long seeded random programs of all operations of a table, and their execution on the table or on its model.
#pragma once

#include <algorithm>
#include <random>

#include "table_test.h"

namespace freshet::testing {

struct Operation {
  enum class Kind { kLookup, kPooled, kFindOrInsert, kTrain, kUpsert, kErase, kExpire, kTouch, kExport };

  Kind kind = Kind::kLookup;
  Ids ids;
  Floats values;                     // gradients or weights
  Floats state;                      // of kUpsert
  Floats scale;                      // of kTrain, if not empty
  std::vector<std::uint32_t> row;    // of kTrain, if not empty
  Ids offsets;                       // of kPooled
  Ids times;                         // of kUpsert, kTouch and kTrain
  std::vector<std::uint32_t> events; // of kTrain, if not empty
  std::vector<std::uint16_t> counts; // of kUpsert
  float lr = 0.1F;
  std::int64_t now_us = 0;
  bool choice = false;        // initial weights, or the mean, or state is given; of kExport: it is acknowledged
  std::size_t consumer = 0;   // of kExport
};

struct Answer {
  std::size_t number = 0;
  bool refused = false;
  Floats floats;
  Delta delta;
};

// A table (or its model), and how far each consumer of its deltas is.
template <typename Table>
struct Execution {
  static constexpr std::size_t kConsumers = 3;

  Table* table;
  std::size_t threads = 1;
  std::array<Epoch, kConsumers> since{};

  Answer run(const Operation& op) {
    Answer answer;
    try {
      answer.number = execute(op, &answer);
    } catch (const std::invalid_argument&) {
      answer.refused = true;
    }
    return answer;
  }

 private:
  std::size_t execute(const Operation& op, Answer* answer) {
    const std::size_t n = op.ids.size();
    const std::int64_t* const ids = op.ids.data();
    const Missing missing = op.choice ? Missing::kInitial : Missing::kZeros;
    answer->floats.assign(std::max(n, op.offsets.size()) * table->dim(), 99.0F);
    float* const out = answer->floats.data();
    switch (op.kind) {
      case Operation::Kind::kLookup: return table->lookup(ids, n, out, missing, threads);
      case Operation::Kind::kPooled:
        return table->lookup_pooled(ids, n, op.offsets.data(), op.offsets.size() - 1,
                                    op.choice ? Pooling::kMean : Pooling::kSum, out, missing, threads);
      case Operation::Kind::kFindOrInsert: return table->find_or_insert(ids, n, out, threads);
      case Operation::Kind::kTrain: {
        const EmbeddingTable::Gradients gradients{op.values.data(), op.values.size() / table->dim(),
                                                  op.row.empty() ? nullptr : op.row.data(),
                                                  op.scale.empty() ? nullptr : op.scale.data(),
                                                  op.events.empty() ? nullptr : op.events.data(), op.times.data()};
        return table->apply_gradients(ids, n, gradients, op.lr, op.now_us, threads);
      }
      case Operation::Kind::kUpsert: {
        const EmbeddingTable::Rows given{op.values.data(), nullptr, op.times.data(), op.counts.data()};
        return table->upsert(ids, n, op.choice ? given : EmbeddingTable::Rows{op.values.data()}, threads);
      }
      case Operation::Kind::kErase: return table->erase(ids, n);
      case Operation::Kind::kExpire: return table->expire(op.now_us);
      case Operation::Kind::kTouch: table->touch(ids, n, op.times.data()); return 0;
      case Operation::Kind::kExport: return export_to(op, answer);
    }
    return 0;
  }

  std::size_t export_to(const Operation& op, Answer* answer) {
    const Epoch closed = table->advance_epoch();
    answer->delta = table->export_delta(since[op.consumer]);
    if (!op.choice) return 0;  // the consumer failed, and asks again later
    since[op.consumer] = closed;
    return table->drop_tombstones(*std::min_element(since.begin(), since.end()));
  }
};

class ProgramGenerator {
 public:
  ProgramGenerator(std::uint64_t seed, std::size_t dim) : random_(seed), dim_(dim) {
    universe_ = below(3) == 0 ? 20000 : 1500;
  }

  Operation next() {
    using Kind = Operation::Kind;
    constexpr Kind kKinds[] = {Kind::kTrain, Kind::kTrain,  Kind::kTrain,        Kind::kTrain,  Kind::kTrain,
                               Kind::kTrain, Kind::kLookup, Kind::kPooled,       Kind::kUpsert, Kind::kErase,
                               Kind::kTouch, Kind::kExport, Kind::kFindOrInsert, Kind::kExpire};
    Operation op;
    op.kind = kKinds[below(std::size(kKinds))];
    op.choice = below(2) == 0;
    op.consumer = below(Execution<EmbeddingTable>::kConsumers);
    now_ += kHour / 4;
    const std::uint64_t late = below(8);
    op.now_us = late == 0 ? 0 : late == 1 ? now_ - 9 * kHour : now_ + static_cast<std::int64_t>(below(1000000));
    if (op.kind == Kind::kExpire) op.now_us = now_ - 40 * kHour;
    const std::size_t n = below(10) == 0 ? 2000 + below(2500) : below(20) == 0 ? 0 : 1 + below(300);
    for (std::size_t i = 0; i < (op.kind == Kind::kErase ? n / 4 : n); ++i) op.ids.push_back(id());
    if (op.kind == Kind::kTrain) add_gradients(&op);
    if (op.kind == Kind::kTouch) add_times(&op);
    if (op.kind == Kind::kUpsert) add_rows(&op);
    if (op.kind == Kind::kPooled) add_offsets(&op);
    return op;
  }

 private:
  std::uint64_t below(std::uint64_t n) { return random_() % n; }
  float value() { return static_cast<float>(static_cast<std::int64_t>(below(2000001)) - 1000000) * 1e-6F; }

  std::int64_t id() {
    constexpr std::int64_t kExtremes[] = {0, -1, 1, kMin, kMin + 1, kMax, kMax - 1};
    if (below(100) == 0) return kExtremes[below(std::size(kExtremes))];
    const std::uint64_t rare = below(universe_) * below(universe_) / universe_;  // small numbers often
    return (static_cast<std::int64_t>(rare) - 100) * (below(2) == 0 ? 1 : std::int64_t{1} << 40);
  }

  void add_gradients(Operation* op) {
    std::size_t rows = op->ids.size();
    if (below(3) == 0) {
      rows = 1 + below(50);
      for (std::size_t i = 0; i < op->ids.size(); ++i) op->row.push_back(static_cast<std::uint32_t>(below(rows)));
    }
    if (below(3) == 0) {
      for (std::size_t i = 0; i < op->ids.size(); ++i) op->scale.push_back(value());
    }
    if (below(2) == 0) {
      for (std::size_t i = 0; i < op->ids.size(); ++i) op->events.push_back(static_cast<std::uint32_t>(below(3)));
      add_times(op);
    }
    op->values.resize(rows * dim_);
    std::generate(op->values.begin(), op->values.end(), [this] { return value(); });
    constexpr float kBad[] = {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 2e15F};
    if (below(20) == 0 && rows != 0) op->values[below(op->values.size())] = kBad[below(3)];
    op->lr = below(10) == 0 ? 0.0F : 0.05F * static_cast<float>(1 + below(4));
  }

  void add_times(Operation* op) {
    for (std::size_t i = 0; i < op->ids.size(); ++i) {
      op->times.push_back(below(8) == 0 ? 0 : now_ - static_cast<std::int64_t>(below(9)) * kHour);
    }
  }

  void add_rows(Operation* op) {
    for (std::size_t i = 0; i < op->ids.size(); ++i) {
      op->times.push_back(now_);
      op->counts.push_back(static_cast<std::uint16_t>(below(0x10000)));
      for (std::size_t j = 0; j < dim_; ++j) op->values.push_back(value());
    }
  }

  void add_offsets(Operation* op) {
    op->offsets = {0};
    const auto n = static_cast<std::int64_t>(op->ids.size());
    for (std::int64_t at = 0; at < n; op->offsets.push_back(at)) {
      at = std::min(n, at + static_cast<std::int64_t>(below(10) == 0 ? below(200) : below(4)));
    }
  }

  std::mt19937_64 random_;
  std::size_t dim_;
  std::uint64_t universe_;
  std::int64_t now_ = 400000 * kHour;
};

}  // namespace freshet::testing
