// Lookup, update and insertion, beside the peers on the same batches.
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <utility>

#include "harness.h"
#include "our_table.h"
#include "peers_absl.h"
#include "peers_cuckoo.h"
#include "peers_known_rows.h"

namespace bench {
namespace {

using freshet::OptimizerKind;
constexpr float kLearningRate = 0.05F;

// AbslTable writes on one thread alone.
struct AbslWriter : AbslTable {
  using AbslTable::AbslTable;
  void find_or_insert(const std::int64_t* keys, std::size_t n, float* out, std::size_t) {
    AbslTable::find_or_insert(keys, n, out);
  }
};

// The ceiling of insertion: fresh rows one after the other into new memory, under no key.
class NewRows {
 public:
  static constexpr const char* kName = "new rows";
  explicit NewRows(std::size_t dim) : slab_(dim, 0) {}
  void find_or_insert(const std::int64_t* keys, std::size_t n, float* out, std::size_t) {
    for (std::size_t i = 0; i < n; ++i) {
      std::memcpy(out + i * slab_.dim(), slab_.row(slab_.take(keys[i])), slab_.weight_bytes());
    }
  }

 private:
  PeerSlab slab_;
};

Batches make_batches(const Options& options, bool zipf) {
  Batches batches = zipf ? zipf_batches(options.rows, options.batches, options.batch)
                         : uniform_batches(options.rows, options.batches, options.batch);
  if (options.turns) save_rows(options.directory, &batches);
  return batches;
}

// Seconds of each batch of new keys into an empty table that grows.
template <typename Table>
std::vector<double> insert_times(const Options& options, Table table, std::size_t threads,
                                 const std::vector<std::int64_t>& keys, std::vector<float>& out) {
  std::vector<double> times;
  for (std::size_t at = 0; at < keys.size(); at += options.batch) {
    const std::size_t n = std::min(options.batch, keys.size() - at);
    times.push_back(seconds_of([&] { table->find_or_insert(keys.data() + at, n, out.data(), threads); }));
  }
  return times;
}

}  // namespace

void bench_lookup(const Options& options) {
  OurTable ours(options.dim, OptimizerKind::kSgd);
  CuckooTable cuckoo(options.dim, 0, options.rows);
  AbslWriter absl_table(options.dim, 0, options.rows);
  const KnownRows known(options.rows, options.dim, 0);
  fill(ours, options.rows, options.batch, options.dim);
  fill(cuckoo, options.rows, options.batch, options.dim);
  fill(absl_table, options.rows, options.batch, options.dim);

  std::vector<float> out(options.batch * options.dim);
  std::size_t missing = 0;
  std::vector<Variant> variants;
  const auto add = [&](const auto& table, std::size_t threads) {
    const auto run = [&, threads](const std::int64_t* keys, const std::uint32_t*, std::size_t n) {
      missing += table.lookup(keys, n, out.data(), threads);
    };
    variants.push_back({table.kName, threads, run});
  };
  for (const std::size_t threads : {1, 2}) {
    add(ours, threads);
    add(cuckoo, threads);
    add(absl_table, threads);
    const auto run = [&, threads](const std::int64_t*, const std::uint32_t* rows, std::size_t n) {
      known.gather(rows, n, out.data(), threads);
    };
    variants.push_back({KnownRows::kGather, threads, run});
  }
  for (const bool zipf : {false, true}) interleave(options, "lookup", make_batches(options, zipf), variants);
  if (missing != 0) {
    std::fprintf(stderr, "error: %zu lookups of present keys found nothing\n", missing);
    std::exit(1);
  }
}

void bench_update(const Options& options) {
  OurTable ours(options.dim, OptimizerKind::kAdagrad);
  CuckooTable cuckoo(options.dim, options.dim, options.rows);
  AbslWriter absl_table(options.dim, options.dim, options.rows);
  KnownRows known(options.rows, options.dim, options.dim);
  KnownPlaces places(options.rows);
  fill(ours, options.rows, options.batch, options.dim);
  fill(cuckoo, options.rows, options.batch, options.dim);
  fill(absl_table, options.rows, options.batch, options.dim);

  std::vector<float> gradients(options.batch * options.dim);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> draw(-1, 1);
  for (float& g : gradients) g = draw(random);

  std::vector<Variant> variants;
  const auto add = [&](auto& table, std::size_t threads) {
    const auto run = [&, threads](const std::int64_t* keys, const std::uint32_t*, std::size_t n) {
      table.apply_gradients(keys, n, gradients.data(), kLearningRate, threads);
    };
    variants.push_back({table.kName, threads, run});
  };
  for (const std::size_t threads : {1, 2}) {
    add(ours, threads);
    add(cuckoo, threads);
  }
  variants.push_back({AbslTable::kName, 1, [&](const std::int64_t* keys, const std::uint32_t*, std::size_t n) {
                        absl_table.apply_gradients(keys, n, gradients.data(), kLearningRate);
                      }});
  variants.push_back({KnownRows::kUpdate, 1, [&](const std::int64_t*, const std::uint32_t* rows, std::size_t n) {
                        known.adagrad(rows, n, gradients.data(), kLearningRate);
                      }});
  variants.push_back({KnownRows::kUpdateInPlaces, 1, [&](const std::int64_t*, const std::uint32_t* rows, std::size_t n) {
                        known.adagrad_in(places, rows, n, gradients.data(), kLearningRate);
                      }});
  for (const bool zipf : {false, true}) interleave(options, "update", make_batches(options, zipf), variants);
}

// `insert` is the rate of all batches in each repetition; `insert_least` is one rate, from the least time that each
// batch number took in any repetition, and so without the machine's noise.
void bench_insert(const Options& options) {
  const std::vector<std::int64_t> keys = keys_from(0, options.rows);
  std::vector<float> out(options.batch * options.dim);
  const std::size_t d = options.dim;
  using Times = std::vector<double>;
  const auto insert = [&](auto table, std::size_t threads) {
    return insert_times(options, std::move(table), threads, keys, out);
  };
  const auto ours = [&](std::size_t t) { return insert(std::make_unique<OurTable>(d, OptimizerKind::kSgd), t); };
  const auto cuckoo = [&](std::size_t t) { return insert(std::make_unique<CuckooTable>(d, 0, 4), t); };
  const auto absl_table = [&](std::size_t t) { return insert(std::make_unique<AbslWriter>(d, 0, 0), t); };
  const auto new_rows = [&](std::size_t t) { return insert(std::make_unique<NewRows>(d), t); };
  const struct {
    const char* name;
    std::size_t threads;
    std::function<Times(std::size_t)> run;
  } variants[] = {
      {OurTable::kName, 1, ours}, {CuckooTable::kName, 1, cuckoo}, {AbslTable::kName, 1, absl_table},
      {NewRows::kName, 1, new_rows},
      {OurTable::kName, 2, ours}, {CuckooTable::kName, 2, cuckoo},
  };
  constexpr std::size_t kVariants = std::size(variants);
  const double million_keys = static_cast<double>(keys.size()) * 1e-6;
  Times rates[kVariants], least[kVariants];
  for (std::size_t repetition = 0; repetition < options.repetitions; ++repetition) {
    for (std::size_t v = 0; v < kVariants; ++v) {
      const Times times = variants[v].run(variants[v].threads);
      rates[v].push_back(million_keys / std::accumulate(times.begin(), times.end(), 0.0));
      if (least[v].empty()) least[v] = times;
      for (std::size_t b = 0; b < times.size(); ++b) least[v][b] = std::min(least[v][b], times[b]);
    }
  }
  for (std::size_t v = 0; v < kVariants; ++v) {
    emit("insert", variants[v].name, "new", variants[v].threads, "Mops/s", rates[v]);
    emit("insert_least", variants[v].name, "new", variants[v].threads, "Mops/s",
         {million_keys / std::accumulate(least[v].begin(), least[v].end(), 0.0)});
  }
}

}  // namespace bench
