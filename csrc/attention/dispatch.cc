// Which kernels this machine runs.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "task.h"

namespace freshet::attention {
namespace {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

}  // namespace

const Kernels& kernels() {
  static const std::vector<const Kernels*> available = available_kernels();
  const char* wanted = std::getenv("FRESHET_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available.front();
  std::string names;
  for (const Kernels* one : available) {
    if (std::strcmp(one->name, wanted) == 0) return *one;
    names += std::string(names.empty() ? "" : ", ") + one->name;
  }
  throw std::invalid_argument("FRESHET_ISA is '" + std::string(wanted) + "'; this machine has " + names);
}

const char* instruction_set() { return kernels().name; }

}  // namespace freshet::attention
