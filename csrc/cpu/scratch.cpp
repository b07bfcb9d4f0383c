#include "scratch.h"

#include <cstdlib>
#include <new>

namespace spot {
namespace {

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* thread_scratch(std::size_t bytes) {
  static thread_local Buffer buffer;
  if (bytes > buffer.size || !buffer.data) {
    const std::size_t size = bytes / 64 * 64 + 64;  // some, so that it is never null
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, size);
    buffer.size = buffer.data ? size : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace spot
