// Stands in for csrc/cuda/ptx.cuh: its instructions, written out from the layouts stated there.
#pragma once

#include "device.h"

namespace spot {

inline void check_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::give_up(what);
}

template <typename V>
inline V read(const void* from, int64_t bytes) {
  V value;
  std::memcpy(&value, static_cast<const char*>(from) + bytes, sizeof(value));
  return value;
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  check_aligned(row, "rows of a matrix that are not aligned");
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  emulator::exchange(row, [&](auto&& of) {
    for (int i = 0; i < 4; ++i) r[i] = read<uint32_t>(of(8 * i + g), 4 * t);
    return 0;
  });
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  check_aligned(row, "rows of a matrix that are not aligned");
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  emulator::exchange(row, [&](auto&& of) {
    for (int i = 0; i < 4; ++i)
      r[i] = read<uint16_t>(of(8 * i + 2 * t), 2 * g) |
             static_cast<uint32_t>(read<uint16_t>(of(8 * i + 2 * t + 1), 2 * g)) << 16;
    return 0;
  });
}

// One of the two values in a register.
template <typename T>
inline float value_of(uint32_t both, int which) {
  return static_cast<float>(read<T>(&both, 2 * which));
}

template <typename T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  emulator::exchange(mine, [&](auto&& of) {
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 8; ++k) {  // along the depth, 8 half + k
        const Operands rows = of(4 * g + k / 2);
        const float upper = value_of<T>(rows.a[2 * half], k % 2),
                    lower = value_of<T>(rows.a[2 * half + 1], k % 2);
        for (int j = 0; j < 2; ++j) {
          const float b = value_of<T>(of(4 * (2 * t + j) + k / 2).b[half], k % 2);
          d[j] += upper * b;
          d[2 + j] += lower * b;
        }
      }
    return 0;
  });
}

// Nothing is there before it was waited for.
inline void copy_async(void* shared, const void* global, bool valid) {
  check_aligned(shared, "a copy to what is not aligned");
  if (valid) check_aligned(global, "a copy of what is not aligned");
  emulator::self().copies.push_back({shared, global, valid});
}
inline void copy_async_wait() {
  for (const emulator::AsyncCopy& copy : emulator::self().copies) {
    if (copy.valid)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  emulator::self().copies.clear();
}

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace spot
