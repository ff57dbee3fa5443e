// What a table holds, as plainly as it can be said: rows, candidates, erased keys, and what changed in which epoch.
#pragma once

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "initializer.h"
#include "table_test.h"

namespace freshet::testing {

class ModelRows {
 public:
  explicit ModelRows(const TableConfig& config) : config_(config) { stats_.epoch = 1; }

  std::size_t dim() const { return config_.dim; }

  Epoch advance_epoch() { return static_cast<Epoch>(stats_.epoch++); }

  Delta export_delta(Epoch since) const {
    Delta delta;
    std::vector<std::pair<std::int64_t, const Row*>> rows;
    for (const auto& [key, row] : rows_) {
      if (row.changed > since) rows.emplace_back(key, &row);
    }
    std::sort(rows.begin(), rows.end());
    for (const auto& [key, row] : rows) {
      const auto state = row->floats.begin() + static_cast<std::ptrdiff_t>(dim());
      delta.keys.push_back(key);
      delta.weights.insert(delta.weights.end(), row->floats.begin(), state);
      delta.state.insert(delta.state.end(), state, row->floats.end());
      delta.last_update_us.push_back(to_microseconds(row->seen));
      delta.counts.push_back(static_cast<std::uint16_t>(row->count));
    }
    for (const auto& [key, candidate] : waiting_) {
      if (candidate.changed > since) delta.candidate_keys.push_back(key);
    }
    std::sort(delta.candidate_keys.begin(), delta.candidate_keys.end());
    for (const std::int64_t key : delta.candidate_keys) delta.candidates.push_back(waiting_.at(key).word);
    for (const auto& [epoch, key] : gone_) {
      if (epoch > since && rows_.count(key) == 0) delta.tombstones.push_back(key);
    }
    std::sort(delta.tombstones.begin(), delta.tombstones.end());
    delta.tombstones.erase(std::unique(delta.tombstones.begin(), delta.tombstones.end()), delta.tombstones.end());
    return delta;
  }
  Delta export_all() const {
    Delta all = export_delta(0);
    all.tombstones.clear();
    return all;
  }
  std::size_t drop_tombstones(Epoch up_to) {
    const std::size_t before = gone_.size();
    const auto old = [up_to](const std::pair<Epoch, std::int64_t>& t) { return t.first <= up_to; };
    gone_.erase(std::remove_if(gone_.begin(), gone_.end(), old), gone_.end());
    return before - gone_.size();
  }

  TableStats stats() const {
    TableStats stats = stats_;
    stats.rows = rows_.size();
    stats.candidates = waiting_.size();
    stats.tombstones = gone_.size();
    return stats;
  }

 protected:
  enum class Kind { kNone, kRow, kCandidate };
  struct Row {
    Floats floats;  // weights, then state
    Seconds seen = 0;
    std::uint32_t count = 0;
    Epoch changed = 0;
  };
  struct Waiting {
    std::uint32_t word;
    Epoch changed;
  };
  Epoch epoch() const { return static_cast<Epoch>(stats_.epoch); }

  Row fresh(std::int64_t id) const {
    Row row;
    row.floats.resize(dim() + state_size(config_.optimizer.kind, dim()));
    init_weights(table_key(config_.seed, config_.slot_hash), id, config_.init_scale, dim(), row.floats.data());
    init_state(config_.optimizer, dim(), row.floats.data() + dim());
    return row;
  }

  void insert(std::int64_t id, Row row) {
    const auto candidate = waiting_.find(id);
    if (candidate != waiting_.end()) row.count = Candidate::from(candidate->second.word).count;
    waiting_.erase(id);
    row.changed = epoch();
    rows_[id] = std::move(row);
    ++stats_.inserted;
  }

  Kind erase_id(std::int64_t id) {
    const Kind kind = rows_.erase(id) != 0 ? Kind::kRow : waiting_.erase(id) != 0 ? Kind::kCandidate : Kind::kNone;
    if (kind != Kind::kNone) gone_.emplace_back(epoch(), id);
    return kind;
  }

  TableConfig config_;
  std::unordered_map<std::int64_t, Row> rows_;
  std::unordered_map<std::int64_t, Waiting> waiting_;
  std::vector<std::pair<Epoch, std::int64_t>> gone_;
  TableStats stats_;
};

}  // namespace freshet::testing
