// Growth from empty: the time of every single batch; loading; bytes per row; deltas of few changes in large tables.
#include <malloc.h>
#include <unistd.h>

#include <memory>

#include "harness.h"
#include "our_table.h"
#include "peers_cuckoo.h"

namespace bench {
namespace {

using freshet::OptimizerKind;

template <typename Table>
void grow(const Options& options, Table table) {
  std::vector<float> out(options.batch * options.growth_dim);
  std::vector<double> times;
  for (std::size_t at = 0; at < options.growth_rows; at += options.batch) {
    const std::vector<std::int64_t> keys = keys_from(at, std::min(options.batch, options.growth_rows - at));
    times.push_back(1e3 * seconds_of([&] { table->find_or_insert(keys.data(), keys.size(), out.data(), 1); }));
  }
  emit("growth", table->kName, "new", 1, "ms", times);
}

// Resident bytes of this process, and bytes that it could still have.
double resident_bytes() {
  std::FILE* const file = std::fopen("/proc/self/statm", "r");
  unsigned long size = 0, resident = 0;
  const bool read = file != nullptr && std::fscanf(file, "%lu %lu", &size, &resident) == 2;
  if (file != nullptr) std::fclose(file);
  return read ? static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) : 0;
}
double free_bytes() {
  std::FILE* const file = std::fopen("/proc/meminfo", "r");
  char line[256];
  unsigned long kilobytes = 0;
  while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %lu kB", &kilobytes) == 1) break;
  }
  if (file != nullptr) std::fclose(file);
  return static_cast<double>(kilobytes) * 1024;
}

}  // namespace

void bench_growth(const Options& options) {
  for (int run = 0; run < 3; ++run) {  // per batch number the quickest of three is free of the machine's noise
    grow(options, std::make_unique<OurTable>(options.growth_dim, OptimizerKind::kSgd));
    grow(options, std::make_unique<CuckooTable>(options.growth_dim, 0, 4));
  }
}

void bench_load(const Options& options) {
  const std::vector<float> weights(options.batch * options.growth_dim, 0.5F);
  for (const std::size_t rows : options.load_rows) {
    const std::string name = std::to_string(rows) + " rows";
    const auto count = static_cast<double>(rows);
    const double payload = static_cast<double>(options.growth_dim * sizeof(float));
    if (count * (payload + 48) > 0.8 * free_bytes()) {
      std::fprintf(stderr, "note: %s left out, %.1f GB of memory are free\n", name.c_str(), free_bytes() * 1e-9);
      continue;
    }
    malloc_trim(0);  // else the new table would live in what the old one freed
    const double before = resident_bytes();
    OurTable table(options.growth_dim, OptimizerKind::kSgd);
    double seconds = 0;
    for (std::size_t at = 0; at < rows; at += options.batch) {
      const std::vector<std::int64_t> keys = keys_from(at, std::min(options.batch, rows - at));
      seconds += seconds_of([&] { table.upsert(keys.data(), keys.size(), weights.data(), 1); });
    }
    const auto overhead = static_cast<double>(table.table().stats().overhead_bytes);
    emit("load", OurTable::kName, name, 1, "Mops/s", {count / seconds * 1e-6});
    emit("overhead", OurTable::kName, name, 1, "bytes/row", {overhead / count});
    emit("overhead_resident", OurTable::kName, name, 1, "bytes/row", {(resident_bytes() - before) / count - payload});
  }
}

void bench_delta(const Options& options) {
  for (const std::size_t rows : options.delta_tables) {
    OurTable table(options.growth_dim, OptimizerKind::kSgd);
    fill(table, rows, options.batch, options.growth_dim);
    for (const std::size_t changes : options.delta_changes) {
      if (changes > rows) continue;
      const std::vector<float> gradients(changes * options.growth_dim, 0.5F);
      std::vector<double> times;
      for (std::size_t repetition = 0; repetition < options.repetitions; ++repetition) {
        const freshet::Epoch since = table.table().advance_epoch();
        std::vector<std::int64_t> keys(changes);
        for (std::size_t i = 0; i < changes; ++i) keys[i] = key_at((i * (rows / changes) + repetition) % rows);
        table.apply_gradients(keys.data(), changes, gradients.data(), 0.05F, 1);
        freshet::Delta delta;
        times.push_back(1e3 * seconds_of([&] { delta = table.table().export_delta(since); }));
        if (delta.keys.size() == changes) continue;
        std::fprintf(stderr, "error: a delta of %zu changed rows has %zu\n", changes, delta.keys.size());
        std::exit(1);
      }
      emit("delta", std::to_string(rows) + " rows", std::to_string(changes) + " changed", 1, "ms", times);
    }
  }
}

}  // namespace bench
