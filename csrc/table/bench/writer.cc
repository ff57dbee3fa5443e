// Reading while another thread upserts 100 k rows/s: how much slower, and does every read find its rows whole.
#include <atomic>
#include <thread>

#include "harness.h"
#include "our_table.h"
#include "peers_cuckoo.h"

namespace bench {
namespace {

constexpr std::size_t kUpserts = 1000;  // rows of one call
constexpr auto kPeriod = std::chrono::milliseconds(10);
constexpr int kSlices = 5;  // of a repetition, without and with the writer in turn

struct Reads {
  std::size_t keys = 0;
  double seconds = 0;
  std::size_t missing = 0;  // present keys that were not found
  std::size_t torn = 0;     // rows not of one key and one version

  double rate() const { return static_cast<double>(keys) / seconds * 1e-6; }
};

// Half of the keys of each call are of the first `rows`, half are new; the version rises with each call.
template <typename Table>
class Writer {
 public:
  Writer(Table& table, const Options& options) : table_(table), rows_(options.rows), dim_(options.dim), end_(rows_) {}

  // Keys key_at(0 .. end - 1) have been upserted, by calls that returned.
  std::size_t end() const { return end_.load(std::memory_order_acquire); }
  std::size_t written() const { return written_; }

  void start() {
    stop_ = false;
    thread_ = std::thread([this] { run(); });
  }
  void stop() {
    stop_ = true;
    thread_.join();
  }

 private:
  void run() {
    std::vector<std::int64_t> keys(kUpserts);
    std::vector<float> weights(kUpserts * dim_);
    auto next = std::chrono::steady_clock::now();
    while (!stop_) {
      const std::size_t end = end_.load(std::memory_order_relaxed);
      ++version_;
      for (std::size_t i = 0; i < kUpserts; ++i) {
        keys[i] = key_at(i < kUpserts / 2 ? random_() % rows_ : end + i - kUpserts / 2);
        fill_tagged(keys[i], version_, dim_, weights.data() + i * dim_);
      }
      table_.upsert(keys.data(), kUpserts, weights.data(), 1);
      end_.store(end + kUpserts - kUpserts / 2, std::memory_order_release);
      written_ += kUpserts;
      next += kPeriod;
      std::this_thread::sleep_until(next);
    }
  }

  Table& table_;
  const std::size_t rows_;
  const std::size_t dim_;
  std::atomic<std::size_t> end_;
  std::atomic<bool> stop_{false};
  std::uint32_t version_ = 0;
  std::size_t written_ = 0;  // read when the thread has ended
  std::mt19937_64 random_{11};
  std::thread thread_;
};

template <typename Table>
void read_batch(const Table& table, const std::int64_t* keys, std::size_t n, std::size_t dim, std::vector<float>& out,
                Reads* reads) {
  std::size_t said = 0;
  const double seconds = seconds_of([&] { said = table.lookup(keys, n, out.data(), 1); });
  reads->keys += n;
  reads->seconds += seconds;
  std::size_t missing = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const Row row = check_tagged(keys[i], dim, out.data() + i * dim);
    missing += row == Row::kMissing;
    reads->torn += row == Row::kTorn;
  }
  reads->missing += std::max(said, missing);
}

// Times lookups of the first `rows` keys; between them looks, untimed, for the keys inserted last.
template <typename Table>
void read_for(const Options& options, const Table& table, const Writer<Table>& writer, const Batches& batches,
              Reads* reads) {
  constexpr std::size_t kNewest = 256;
  std::vector<float> out(options.batch * options.dim);
  Reads newest_reads;
  const double until = now() + options.writer_seconds / kSlices;
  for (std::size_t b = 0; now() < until; b = (b + 1) % batches.count()) {
    read_batch(table, batches.keys_of(b), batches.size, options.dim, out, reads);
    const std::size_t end = writer.end();
    const std::vector<std::int64_t> newest = keys_from(end - std::min(kNewest, end), std::min(kNewest, end));
    read_batch(table, newest.data(), newest.size(), options.dim, out, &newest_reads);
  }
  reads->missing += newest_reads.missing;
  reads->torn += newest_reads.torn;
}

template <typename Table>
void measure(const Options& options, Table& table, const Batches& batches) {
  std::vector<float> weights(options.batch * options.dim);
  for (std::size_t at = 0; at < options.rows; at += options.batch) {
    const std::vector<std::int64_t> keys = keys_from(at, std::min(options.batch, options.rows - at));
    for (std::size_t i = 0; i < keys.size(); ++i) {
      fill_tagged(keys[i], 0, options.dim, weights.data() + i * options.dim);
    }
    table.upsert(keys.data(), keys.size(), weights.data(), 1);
  }
  Writer<Table> writer(table, options);
  std::vector<double> without, with, missing, torn, written;
  for (std::size_t repetition = 0; repetition < options.repetitions; ++repetition) {
    Reads alone, beside;
    const std::size_t before = writer.written();
    double writing = 0;
    for (int slice = 0; slice < kSlices; ++slice) {
      read_for(options, table, writer, batches, &alone);
      writing += seconds_of([&] {
        writer.start();
        read_for(options, table, writer, batches, &beside);
        writer.stop();
      });
    }
    written.push_back(static_cast<double>(writer.written() - before) / writing);
    without.push_back(alone.rate());
    with.push_back(beside.rate());
    missing.push_back(static_cast<double>(alone.missing + beside.missing));
    torn.push_back(static_cast<double>(alone.torn + beside.torn));
  }
  emit("lookup_without_writer", Table::kName, "uniform", 1, "Mops/s", without);
  emit("lookup_with_writer", Table::kName, "uniform", 1, "Mops/s", with);
  emit("misses_with_writer", Table::kName, "uniform", 1, "keys", missing);
  emit("torn_with_writer", Table::kName, "uniform", 1, "rows", torn);
  emit("written", Table::kName, "uniform", 1, "rows/s", written);
}

}  // namespace

void bench_writer(const Options& options) {
  const Batches batches = uniform_batches(options.rows, options.batches, options.batch);
  {
    OurTable ours(options.dim, freshet::OptimizerKind::kSgd);
    measure(options, ours, batches);
  }
  CuckooTable cuckoo(options.dim, 0, 2 * options.rows);
  measure(options, cuckoo, batches);
}

}  // namespace bench
