#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace spot {

extern const KernelTable kernels_baseline;
#ifdef SPOT_X86
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;
#endif

namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*usable)();
};

bool always() { return true; }
#ifdef SPOT_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best last.
constexpr Isa kIsas[] = {
    {"baseline", &kernels_baseline, always},
#ifdef SPOT_X86
    {"avx2", &kernels_avx2, has_avx2},
    {"avx512", &kernels_avx512, has_avx512},
    {"avx512_bf16", &kernels_avx512_bf16, has_avx512_bf16},
#endif
};

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0 && isa.usable()) return &isa;
  return nullptr;
}

// What SPOT_ISA asks for, or empty.
const std::string& forced() {
  static const std::string name = [] {
    const char* value = std::getenv("SPOT_ISA");
    return std::string(value ? value : "");
  }();
  return name;
}

// Null where SPOT_ISA names what is unknown, or what this processor cannot run.
const Isa* first_choice() {
  if (!forced().empty()) return find(forced().c_str());
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas)
    if (isa.usable()) best = &isa;
  return best;
}

std::atomic<const Isa*>& active() {
  static std::atomic<const Isa*> isa{first_choice()};
  return isa;
}

std::string names(bool usable_only) {
  std::string all;
  for (const Isa& isa : kIsas)
    if (!usable_only || isa.usable()) all += (all.empty() ? "" : ",") + std::string(isa.name);
  return all;
}

}  // namespace

const KernelTable& kernels() {
  const Isa* isa = active().load(std::memory_order_relaxed);
  if (!isa)
    throw std::runtime_error("SPOT_ISA is '" + forced() + "', but must be one of " + names(true) +
                             " on this processor, or not be set");
  return *isa->table;
}

}  // namespace spot

const char* spot_isa() {
  const spot::Isa* isa = spot::active().load();
  return isa ? isa->name : "none";
}

bool spot_set_isa(const char* name) {
  const spot::Isa* isa = spot::find(name);
  if (isa) spot::active().store(isa);
  return isa != nullptr;
}

const char* spot_isas_built() {
  static const std::string all = spot::names(false);
  return all.c_str();
}

const char* spot_isas_usable() {
  static const std::string all = spot::names(true);
  return all.c_str();
}
