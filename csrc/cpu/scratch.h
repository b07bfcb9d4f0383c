// Scratch memory that belongs to the calling thread and is kept between calls.
#pragma once

#include <cstddef>

namespace spot {

// At least `bytes` bytes, aligned to 64; valid until the next call on this thread.
void* thread_scratch(std::size_t bytes);

}  // namespace spot
