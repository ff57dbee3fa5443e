// Training while a snapshot is taken, and the speed of snapshot and restore beside a plain copy of the file.
#include <atomic>
#include <exception>
#include <thread>

#include "harness.h"
#include "our_table.h"
#include "snapshot_file.h"

namespace bench {
namespace {

using freshet::OptimizerKind;

// One step = lookup of a batch, then the update of its rows.
class Training {
 public:
  Training(OurTable& table, const Options& options, const Batches& batches)
      : table_(table), batches_(batches), rows_(options.batch * options.dim), gradients_(rows_.size(), 0.25F) {}

  void step() {
    const std::int64_t* const keys = batches_.keys_of(next_);
    next_ = (next_ + 1) % batches_.count();
    if (table_.lookup(keys, batches_.size, rows_.data(), 1) != 0) throw std::runtime_error("a row was not found");
    table_.apply_gradients(keys, batches_.size, gradients_.data(), 0.05F, 1);
  }

  // Mean milliseconds of a step.
  double run(std::size_t steps) {
    return 1e3 / static_cast<double>(steps) * seconds_of([&] {
             for (std::size_t i = 0; i < steps; ++i) step();
           });
  }

 private:
  OurTable& table_;
  const Batches& batches_;
  std::vector<float> rows_;
  std::vector<float> gradients_;
  std::size_t next_ = 0;
};

// Mean milliseconds of a step from the start of a snapshot to its end.
double steps_during_snapshot(OurTable& table, Training& training, const std::string& file, std::size_t* steps) {
  std::atomic<bool> done{false};
  std::exception_ptr error;
  const double start = now();
  std::thread snapshot([&] {
    try {
      write_snapshot(table.table(), file);
    } catch (...) {
      error = std::current_exception();
    }
    done = true;
  });
  for (*steps = 0; !done; ++*steps) training.step();
  const double seconds = now() - start;
  snapshot.join();
  if (error) std::rethrow_exception(error);
  return 1e3 * seconds / static_cast<double>(*steps);
}

void check_equal(const Options& options, OurTable& one, OurTable& other) {
  std::vector<float> a(options.batch * options.dim), b(a.size());
  for (std::size_t at = 0; at < options.rows; at += options.batch) {
    const std::vector<std::int64_t> keys = keys_from(at, std::min(options.batch, options.rows - at));
    const std::size_t missing = one.lookup(keys.data(), keys.size(), a.data(), 1) +
                                other.lookup(keys.data(), keys.size(), b.data(), 1);
    if (missing != 0 || a != b) throw std::runtime_error("the restored table differs");
  }
}

}  // namespace

void bench_step(const Options& options) {
  const std::string file = options.directory + "/bench_step.snapshot";
  OurTable table(options.dim, OptimizerKind::kAdagrad);
  fill(table, options.rows, options.batch, options.dim);
  const Batches batches = uniform_batches(options.rows, options.batches, options.batch);
  Training training(table, options, batches);
  training.run(options.steps);
  std::vector<double> without, with, count;
  for (std::size_t repetition = 0; repetition < options.repetitions; ++repetition) {
    const double before = training.run(options.steps / 2);
    std::size_t steps = 0;
    with.push_back(steps_during_snapshot(table, training, file, &steps));
    count.push_back(static_cast<double>(steps));
    unlink(file.c_str());
    without.push_back((before + training.run(options.steps / 2)) / 2);
  }
  emit("step_without_snapshot", OurTable::kName, "uniform", 1, "ms", without);
  emit("step_with_snapshot", OurTable::kName, "uniform", 1, "ms", with);
  emit("steps_in_snapshot", OurTable::kName, "uniform", 1, "steps", count);
}

void bench_files(const Options& options) {
  const std::string file = options.directory + "/bench_files.snapshot", copy = file + ".copy";
  OurTable table(options.dim, OptimizerKind::kAdagrad);
  fill(table, options.rows, options.batch, options.dim);
  std::vector<double> save, restore, plain;
  for (std::size_t repetition = 0; repetition < std::min<std::size_t>(options.repetitions, 3); ++repetition) {
    std::size_t bytes = 0;
    const double saving = seconds_of([&] { bytes = write_snapshot(table.table(), file); });
    const double copying = seconds_of([&] { copy_file(file, copy); });
    unlink(copy.c_str());
    OurTable restored(options.dim, OptimizerKind::kAdagrad);
    const double restoring = seconds_of([&] { restore_snapshot(file, restored.table()); });
    check_equal(options, table, restored);
    unlink(file.c_str());
    const double gigabytes = static_cast<double>(bytes) * 1e-9;
    save.push_back(gigabytes / saving);
    restore.push_back(gigabytes / restoring);
    plain.push_back(gigabytes / copying);
  }
  emit("snapshot", OurTable::kName, "all", 1, "GB/s", save);
  emit("restore", OurTable::kName, "all", 1, "GB/s", restore);
  emit("file_copy", "read and write", "all", 1, "GB/s", plain);
}

}  // namespace bench
