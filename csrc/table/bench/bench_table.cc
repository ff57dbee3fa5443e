// Measures the embedding table beside its peers; prints one line of JSON per series of samples.
// Run by model/experiments/bench_table.py, which does the arithmetic; alone: csrc/build/bench_table --quick
#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>

#include "../arena.h"
#include "harness.h"

namespace {

using freshet::kHugePage;
constexpr std::size_t kPage = 4096;

[[noreturn]] void usage(const char* wrong) {
  std::fprintf(stderr,
               "error: %s\n"
               "options: --quick  --rows N  --batches N  --repetitions N  --sections a,b  --directory PATH  --turns\n"
               "sections: %s\n",
               wrong, bench::Options{}.sections.c_str());
  std::exit(2);
}

std::size_t number(const char* text) {
  char* end = nullptr;
  const unsigned long long value = std::strtoull(text, &end, 10);
  if (end == text || *end != '\0' || value == 0 || value > 4000000000ULL) usage("a number from 1 to 4e9 is needed");
  return static_cast<std::size_t>(value);
}

void make_quick(bench::Options* options) {
  options->rows = 100000;
  options->batches = 12;
  options->repetitions = 5;
  options->growth_rows = 500000;
  options->load_rows = {500000};
  options->delta_tables = {50000, 500000};
  options->delta_changes = {1000, 10000};
  options->writer_seconds = 0.3;
  options->steps = 50;
}

bench::Options parse(int argc, char** argv) {
  bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const auto is = [&](const char* name) { return std::strcmp(argv[i], name) == 0; };
    const auto value = [&]() -> const char* {
      if (i + 1 == argc) usage("the last option needs a value");
      return argv[++i];
    };
    if (is("--quick")) {
      make_quick(&options);
    } else if (is("--turns")) {
      options.turns = true;
    } else if (is("--rows")) {
      options.rows = number(value());
    } else if (is("--batches")) {
      options.batches = number(value());
    } else if (is("--repetitions")) {
      options.repetitions = number(value());
    } else if (is("--sections")) {
      options.sections = value();
    } else if (is("--directory")) {
      options.directory = value();
    } else {
      usage((std::string("unknown option ") + argv[i]).c_str());
    }
  }
  return options;
}

const struct {
  const char* name;
  void (*run)(const bench::Options&);
} kSections[] = {
    {"lookup", bench::bench_lookup}, {"update", bench::bench_update}, {"insert", bench::bench_insert},
    {"writer", bench::bench_writer}, {"step", bench::bench_step},     {"growth", bench::bench_growth},
    {"load", bench::bench_load},     {"files", bench::bench_files},   {"delta", bench::bench_delta},
};

// Touches as much memory as the largest variant holds, in huge pages, and keeps it in the process: what is measured is the
// tables, for all of them alike, and not how fast this machine hands out pages (in a virtual machine, often slower than
// any table).
void warm_memory(const bench::Options& options) {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  const std::size_t bytes = 4 * options.rows * 2 * options.dim * sizeof(float);
  void* const memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  const auto start = (reinterpret_cast<std::uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(start), bytes - kHugePage, MADV_HUGEPAGE);
  // Through volatile: a memset before free is a dead store, which the compiler leaves out.
  for (std::size_t at = 0; at < bytes; at += kPage) static_cast<volatile char*>(memory)[at] = 1;
  std::free(memory);
}

void check_sections(const std::string& sections) {
  std::stringstream names(sections);
  for (std::string name; std::getline(names, name, ',');) {
    const auto same = [&](const auto& section) { return name == section.name; };
    if (std::none_of(std::begin(kSections), std::end(kSections), same)) usage(("unknown section " + name).c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options = parse(argc, argv);
  check_sections(options.sections);
  warm_memory(options);
  try {
    for (const auto& section : kSections) {
      if (options.wants(section.name)) section.run(options);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
