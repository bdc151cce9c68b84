// Counts every byte PyTorch's CPU allocator hands out, on any thread, with the peak; beyond a limit, if one is set,
// it raises what a GPU's allocator raises.
//
// torch.profiler's memory events were tried first. They miss Python threads other than the one that
// started the profiler (2.11, 2.13), miss the release of memory allocated before it started, and slow
// the run. This allocator forwards to the default one and keeps a running total.
//
// Not counted: what libraries and generated code take from malloc themselves (packing buffers of a
// matmul, stacks); on a GPU `torch.cuda.max_memory_allocated` does not count their like either.

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace {

// Never destroyed: tensors may be released after static destructors have run.
std::mutex& mutex = *new std::mutex;
std::unordered_map<void*, int64_t>& sizes = *new std::unordered_map<void*, int64_t>;
int64_t live = 0;
int64_t peak = 0;
int64_t limit = -1; // bytes that may be live; -1: as many as there are
c10::Allocator* inner = nullptr;

void forget_and_free(void* pointer) {
  if (pointer == nullptr) {
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = sizes.find(pointer);
    if (found != sizes.end()) {
      live -= found->second;
      sizes.erase(found);
    }
  }
  inner->raw_deleter()(pointer);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    {
      std::lock_guard<std::mutex> lock(mutex);
      TORCH_CHECK_WITH(
          OutOfMemoryError,
          limit < 0 || live + static_cast<int64_t>(bytes) <= limit,
          "out of memory: ", bytes, " bytes asked for, ", live, " of ", limit, " are in use");
    }
    void* pointer = inner->raw_allocate(bytes);
    if (pointer != nullptr) {
      std::lock_guard<std::mutex> lock(mutex);
      sizes[pointer] = static_cast<int64_t>(bytes);
      live += static_cast<int64_t>(bytes);
      peak = live > peak ? live : peak;
    }
    return {pointer, pointer, &forget_and_free, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &forget_and_free;
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    inner->copy_data(to, from, bytes);
  }
};

CountingAllocator& counting = *new CountingAllocator;

} // namespace

extern "C" {

void install() {
  if (inner == nullptr) {
    inner = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&counting, /*priority=*/255);
  }
}

int64_t live_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  return live;
}

int64_t peak_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  return peak;
}

void set_limit(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  limit = bytes;
}

void reset_peak() {
  std::lock_guard<std::mutex> lock(mutex);
  peak = live;
}
}
