#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace gvendi {
namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*runs_here)();
};

const Isa kIsas[] = {
    {"baseline", &kernels_baseline, [] { return true; }},
#ifdef GVENDI_HAVE_X86_ISAS
    {"avx2", &kernels_avx2, [] { return __builtin_cpu_supports("avx2") != 0; }},
    {"avx512", &kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#endif
};

const Isa* widest() {
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) best = &isa;
  return best;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{widest()};
  return isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) names.emplace_back(isa.name);
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") {
    chosen() = widest();
    return;
  }
  for (const Isa& isa : kIsas)
    if (name == isa.name && isa.runs_here()) {
      chosen() = &isa;
      return;
    }
  std::string list = "auto";
  for (const std::string& here : available_isas()) list += ", " + here;
  throw std::invalid_argument("the instruction set must be one of " + list + " on this CPU, got '" + name + "'");
}

std::string current_isa() { return chosen().load()->name; }

const Kernels& kernels() { return *chosen().load()->table; }

}  // namespace gvendi
