// What all measurements share: options, wall time, one line of JSON per series of samples, interleaved repetitions.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include "workload.h"

namespace bench {

struct Options {
  std::size_t rows = 2000000;
  std::size_t dim = 64;
  std::size_t batch = 8192;
  std::size_t batches = 64;  // of one variant in one repetition
  std::size_t repetitions = 7;
  std::size_t growth_rows = 10000000;
  std::size_t growth_dim = 16;
  std::vector<std::size_t> load_rows = {10000000, 50000000};
  std::vector<std::size_t> delta_tables = {1000000, 10000000};
  std::vector<std::size_t> delta_changes = {1000, 10000, 100000};
  double writer_seconds = 1.0;  // one phase of reading with, or without, the writer
  std::size_t steps = 400;      // of training without a snapshot, in one repetition
  std::string directory = ".";  // for snapshot and batch files
  std::string sections = "lookup,update,insert,writer,step,growth,load,files,delta";
  bool turns = false;  // pause after each repetition of lookup and update: another process measures its part

  bool wants(const std::string& section) const {
    return ("," + sections + ",").find("," + section + ",") != std::string::npos;
  }
};

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename F>
double seconds_of(const F& f) {
  const double start = now();
  f();
  return now() - start;
}

// One line of standard output: samples of one variant, in order of repetition.
inline void emit(const char* measure, const std::string& variant, const std::string& keys, std::size_t threads,
                 const char* unit, const std::vector<double>& values) {
  std::printf("{\"measure\": \"%s\", \"variant\": \"%s\", \"keys\": \"%s\", ", measure, variant.c_str(), keys.c_str());
  std::printf("\"threads\": %zu, \"unit\": \"%s\", \"values\": [", threads, unit);
  for (std::size_t i = 0; i < values.size(); ++i) std::printf("%s%.6g", i == 0 ? "" : ", ", values[i]);
  std::printf("]}\n");
  std::fflush(stdout);
}

// Says that the machine is free for the other process, and waits for its line.
inline void give_turn(const Options& options, const char* measure, const char* keys, const std::string& batches) {
  if (!options.turns) return;
  std::printf("{\"turn\": \"%s\", \"keys\": \"%s\", \"batches\": \"%s\"}\n", measure, keys, batches.c_str());
  std::fflush(stdout);
  std::string line;
  if (!std::getline(std::cin, line)) {
    std::fprintf(stderr, "error: nobody answers the turns; run without --turns\n");
    std::exit(1);
  }
}

struct Variant {
  std::string name;
  std::size_t threads;
  std::function<void(const std::int64_t* keys, const std::uint32_t* rows, std::size_t n)> run;
};

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Every variant runs all batches in every repetition, the order rotating, so that noise of the machine meets all alike.
// A repetition's rate is that of its median batch: a batch during which another process had the CPU does not count.
// The rate over all batches is printed too, as <measure>_mean.
inline void interleave(const Options& options, const std::string& measure, const Batches& batches,
                       const std::vector<Variant>& variants) {
  const auto size = static_cast<double>(batches.size);
  std::vector<std::vector<double>> rates(variants.size()), means(variants.size());
  const auto times_of = [&](const Variant& variant) {
    std::vector<double> times(batches.count());
    for (std::size_t b = 0; b < times.size(); ++b) {
      times[b] = seconds_of([&] { variant.run(batches.keys_of(b), batches.rows_of(b), batches.size); });
    }
    return times;
  };
  for (const Variant& variant : variants) times_of(variant);  // to warm up
  for (std::size_t repetition = 0; repetition < options.repetitions; ++repetition) {
    for (std::size_t i = 0; i < variants.size(); ++i) {
      const std::size_t v = (i + repetition) % variants.size();
      const std::vector<double> times = times_of(variants[v]);
      const double sum = std::accumulate(times.begin(), times.end(), 0.0);
      rates[v].push_back(1e-6 * size / median(times));
      means[v].push_back(1e-6 * size * static_cast<double>(times.size()) / sum);
    }
    give_turn(options, measure.c_str(), batches.name.c_str(), batches.file);
  }
  for (std::size_t v = 0; v < variants.size(); ++v) {
    emit(measure.c_str(), variants[v].name, batches.name, variants[v].threads, "Mops/s", rates[v]);
    emit((measure + "_mean").c_str(), variants[v].name, batches.name, variants[v].threads, "Mops/s", means[v]);
  }
}

// The sections; each prints its series.
void bench_lookup(const Options& options);
void bench_update(const Options& options);
void bench_insert(const Options& options);
void bench_writer(const Options& options);
void bench_step(const Options& options);
void bench_growth(const Options& options);
void bench_load(const Options& options);
void bench_files(const Options& options);
void bench_delta(const Options& options);

}  // namespace bench
