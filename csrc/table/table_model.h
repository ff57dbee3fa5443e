// The embedding table as plainly as it can be said: what the tests hold the real one against.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "table_model_rows.h"

namespace freshet::testing {

class TableModel : public ModelRows {
 public:
  using ModelRows::ModelRows;

  std::size_t lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing, std::size_t) {
    const std::size_t absent = read(ids, n, out, missing);
    stats_.looked_up += n;
    stats_.missed += absent;
    return absent;
  }

  std::size_t lookup_pooled(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets, std::size_t bags,
                            Pooling pooling, float* out, Missing missing, std::size_t) {
    Floats rows(n * dim());
    const std::size_t absent = lookup(ids, n, rows.data(), missing, 1);
    for (std::size_t b = 0; b < bags; ++b) {
      const auto first = static_cast<std::size_t>(offsets[b]), last = static_cast<std::size_t>(offsets[b + 1]);
      for (std::size_t j = 0; j < dim(); ++j) {
        float sum = 0.0F;
        for (std::size_t i = first; i < last; ++i) sum += rows[i * dim() + j];
        const bool divide = pooling == Pooling::kMean && last > first;
        out[b * dim() + j] = divide ? sum / static_cast<float>(last - first) : sum;
      }
    }
    return absent;
  }

  std::size_t find_or_insert(const std::int64_t* ids, std::size_t n, float* out, std::size_t) {
    std::size_t inserted = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (rows_.count(ids[i]) != 0) continue;
      insert(ids[i], fresh(ids[i]));
      ++inserted;
    }
    read(ids, n, out, Missing::kInitial);
    return inserted;
  }

  std::size_t apply_gradients(const std::int64_t* ids, std::size_t n, const EmbeddingTable::Gradients& g, float lr,
                              std::int64_t now_us, std::size_t) {
    const auto check = [&](float x) {
      if (std::fabs(x) <= EmbeddingTable::kMaxGradient) return;
      ++stats_.refused_batches;
      throw std::invalid_argument("refused");
    };
    std::for_each(g.grads, g.grads + g.grad_rows * dim(), check);
    std::vector<Update> updates = sum_up(ids, n, g, to_seconds(now_us));
    for (const Update& update : updates) std::for_each(update.gradient.begin(), update.gradient.end(), check);
    const Seconds now = to_seconds(now_us);
    std::size_t updated = 0;
    for (Update& update : updates) {
      const bool is_new = rows_.count(update.id) == 0;
      if (is_new && !admit(update)) continue;
      if (is_new && update.events == 0) update.seen = now;
      Row& row = rows_.at(update.id);
      update_row(config_.optimizer, dim(), lr, update.gradient.data(), row.floats.data());
      row.seen = std::max(row.seen, update.seen);
      row.count = std::min<std::uint32_t>(row.count + update.events, 0xffff);
      row.changed = epoch();
      ++updated;
    }
    stats_.updated += updated;
    ++updates_;
    clock_ = std::max(clock_, now);
    for (const Update& update : updates) clock_ = std::max(clock_, update.events != 0 ? update.seen : 0);
    sweep();
    return updated;
  }

  std::size_t upsert(const std::int64_t* ids, std::size_t n, const EmbeddingTable::Rows& rows, std::size_t) {
    std::size_t inserted = 0;
    for (std::size_t i = 0; i < n; ++i) {
      Row row = fresh(ids[i]);
      std::copy_n(rows.weights + i * dim(), dim(), row.floats.begin());
      if (rows.last_update_us != nullptr) row.seen = to_seconds(rows.last_update_us[i]);
      if (rows.counts != nullptr) row.count = rows.counts[i];
      if (rows_.count(ids[i]) == 0) {
        waiting_.erase(ids[i]);
        insert(ids[i], row);
        ++inserted;
      }
      row.changed = epoch();
      rows_[ids[i]] = row;
    }
    stats_.upserted += n;
    return inserted;
  }

  void put_candidates(const std::int64_t* ids, std::size_t n, const std::uint32_t* words) {
    for (std::size_t i = 0; i < n; ++i) {
      if (rows_.count(ids[i]) == 0) waiting_[ids[i]] = {words[i], epoch()};
    }
  }

  void touch(const std::int64_t* ids, std::size_t n, const std::int64_t* now_us) {
    if (!config_.ttl_on_access) return;
    for (std::size_t i = 0; i < n; ++i) {
      const Seconds now = to_seconds(now_us[i]);
      clock_ = std::max(clock_, now);
      const auto row = rows_.find(ids[i]);
      if (row == rows_.end() || row->second.seen >= now) continue;
      row->second.seen = now;
      row->second.changed = epoch();
    }
  }

  std::size_t erase(const std::int64_t* ids, std::size_t n) {
    std::size_t erased = 0;
    for (std::size_t i = 0; i < n; ++i) erased += erase_id(ids[i]) == Kind::kRow ? 1 : 0;
    stats_.erased += erased;
    return erased;
  }

  std::size_t expire(std::int64_t before_us) {
    const Seconds before = to_seconds(before_us);
    return expire(0, ~std::uint64_t{0}, before, std::max(clock_, before));
  }

 private:
  struct Update {
    std::int64_t id;
    Floats gradient;
    std::uint32_t events;
    Seconds seen;
  };

  std::vector<Update> sum_up(const std::int64_t* ids, std::size_t n, const EmbeddingTable::Gradients& g,
                             Seconds now) const {
    std::vector<Update> updates;  // in order of first occurrence
    std::unordered_map<std::int64_t, std::size_t> number;
    for (std::size_t i = 0; i < n; ++i) {
      const bool first = number.emplace(ids[i], updates.size()).second;
      if (first) updates.push_back({ids[i], Floats(dim()), 0, 0});
      Update& update = updates[number[ids[i]]];
      for (std::size_t j = 0; j < dim(); ++j) {
        const float value = (g.scale ? g.scale[i] : 1.0F) * g.grads[(g.row ? g.row[i] : i) * dim() + j];
        update.gradient[j] = first ? value : update.gradient[j] + value;
      }
      const std::uint32_t events = g.events != nullptr ? g.events[i] : 1;
      update.events += events;
      if (events != 0) update.seen = std::max(update.seen, g.events != nullptr ? to_seconds(g.event_us[i]) : now);
    }
    return updates;
  }

  std::size_t read(const std::int64_t* ids, std::size_t n, float* out, Missing missing) const {
    std::size_t absent = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const auto row = rows_.find(ids[i]);
      absent += row == rows_.end() ? 1 : 0;
      const Floats zeros(dim(), 0.0F), initial = fresh(ids[i]).floats;
      const Floats& source = row != rows_.end() ? row->second.floats : missing == Missing::kInitial ? initial : zeros;
      std::copy_n(source.begin(), dim(), out + i * dim());
    }
    return absent;
  }

  // Whether an id without a row has one now.
  bool admit(const Update& update) {
    const bool expires = config_.ttl_us != 0;
    if (update.events == 0 && (config_.admission != Admission::kAll || expires)) {
      ++stats_.refused_admission;
      return false;
    }
    const auto candidate = waiting_.find(update.id);
    const bool waited = candidate != waiting_.end();
    if (config_.admission == Admission::kThreshold) {
      const std::uint32_t then = Candidate::hour_of(update.seen);
      const Candidate before = waited ? Candidate::from(candidate->second.word) : Candidate{0, then};
      if (before.count + update.events < config_.threshold) {
        const bool newer = then != 0 && (before.hour == 0 || ((then - before.hour) & 0xffffU) < 0x8000U);
        waiting_[update.id] = {Candidate{before.count + update.events, newer ? then : before.hour}.word(), epoch()};
        ++stats_.refused_admission;
        return false;
      }
    } else if (config_.admission == Admission::kProbability && !draw(update)) {
      ++stats_.refused_admission;
      return false;
    }
    const bool bounded = config_.max_rows != 0 && config_.when_full == WhenFull::kRefuse;
    if (bounded && rows_.size() >= config_.max_rows) {
      ++stats_.refused_full;
      return false;
    }
    insert(update.id, fresh(update.id));
    return true;
  }

  bool draw(const Update& update) const {
    const std::uint64_t key = table_key(config_.seed, config_.slot_hash);
    const std::uint64_t bits = mix64(mix64(key ^ hash_id(update.id)) + updates_ * kGolden) >> 11;
    double none = 1.0;
    for (std::uint32_t i = 0; i < update.events; ++i) none *= 1.0 - config_.probability;
    return static_cast<double>(bits) * 0x1p-53 < 1.0 - none;
  }

  static std::uint64_t end_of_step(std::uint64_t from, std::uint64_t steps) {
    const std::uint64_t width = ~std::uint64_t{0} / std::max<std::uint64_t>(steps, 1);
    return from + width < from ? ~std::uint64_t{0} : from + width;
  }

  void sweep() {
    const Seconds ttl = to_seconds(config_.ttl_us);
    if (ttl != 0 && clock_ > ttl) {
      const std::uint64_t last = end_of_step(sweep_at_, config_.sweep_steps);
      expire(sweep_at_, last, clock_ - ttl, clock_);
      sweep_at_ = last + 1;
    }
    if (config_.max_rows == 0 || config_.when_full == WhenFull::kRefuse) return;
    while (rows_.size() > config_.max_rows) evict();
  }

  std::size_t expire(std::uint64_t from, std::uint64_t to, Seconds before, Seconds now) {
    std::vector<std::tuple<Seconds, std::uint64_t, std::int64_t>> stale;
    Ids old;
    for (const auto& [key, row] : rows_) {
      const std::uint64_t hash = hash_id(key);
      if (hash >= from && hash <= to && row.seen != 0 && row.seen < before) stale.emplace_back(row.seen, hash, key);
    }
    for (const auto& [key, candidate] : waiting_) {
      const std::uint64_t hash = hash_id(key);
      const std::uint32_t hour = Candidate::from(candidate.word).hour, age = (Candidate::hour_of(now) - hour) & 0xffffU;
      if (hour == 0 || age >= 0x8000U) continue;  // unknown, or later than now
      if (hash >= from && hash <= to && std::uint64_t{age} * 3600 > std::uint64_t{now} - before + 3600) old.push_back(key);
    }
    std::sort(stale.begin(), stale.end());
    stale.resize(std::min(stale.size(), rows_.size() - std::min(rows_.size(), config_.min_rows)));
    for (const auto& row : stale) erase_id(std::get<2>(row));
    for (const std::int64_t key : old) erase_id(key);
    stats_.expired += stale.size();
    stats_.expired_candidates += old.size();
    return stale.size();
  }

  void evict() {
    const std::uint64_t last = end_of_step(eviction_at_, rows_.size() / 1024);
    std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::int64_t>> neighbours;
    for (const auto& [key, row] : rows_) {
      const std::uint64_t hash = hash_id(key);
      if (hash < eviction_at_ || hash > last) continue;
      const bool rarest = config_.when_full == WhenFull::kEvictRarest;
      neighbours.emplace_back(rarest ? row.count : row.seen, rarest ? row.seen : row.count, hash, key);
    }
    std::sort(neighbours.begin(), neighbours.end());
    neighbours.resize(std::min(rows_.size() - config_.max_rows, (neighbours.size() + 7) / 8));
    for (const auto& victim : neighbours) erase_id(std::get<3>(victim));
    stats_.evicted += neighbours.size();
    eviction_at_ = last + 1;
  }

  std::uint64_t updates_ = 0, sweep_at_ = 0, eviction_at_ = 0;
  Seconds clock_ = 0;
};

}  // namespace freshet::testing
