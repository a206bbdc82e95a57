// Memory that is kept from call to call.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Blocks of memory are kept from call to call. A fresh one costs a page fault for each 4 KiB, which
// for what forward saves at 8192 rows of width 128 is longer than the whole forward. A block serves a
// request of at least half its size; what is kept is bounded in number and bytes. The lock is held
// for a few instructions; who does not get it (another thread has it, or had it in the process that
// was forked) goes to the system's allocator instead, so nothing waits and nothing can hang.
class Pool {
 public:
  void* take(size_t bytes) {
    bytes = round_up(bytes + header, page);
    Block found{nullptr, 0};
    {
      const Guard guard(*this);
      for (int i = 0; guard.held && i < count_; ++i) {
        if (kept_[i].bytes < bytes || kept_[i].bytes > 2 * bytes) continue;
        if (found.memory && found.bytes <= kept_[i].bytes) continue;
        found = kept_[i];
      }
      if (found.memory) remove(found.memory);
    }
    if (!found.memory) found = {allocate(bytes), bytes};
    if (!found.memory) return nullptr;
#ifdef MK_POISON
    std::memset(found.memory, 0xff, found.bytes);  // NaN: whatever is read must have been written
#endif
    std::memcpy(found.memory, &found.bytes, sizeof(found.bytes));
    return static_cast<char*>(found.memory) + header;
  }

  void give_back(void* given) {
    if (!given) return;
    Block block{static_cast<char*>(given) - header, 0};
    std::memcpy(&block.bytes, block.memory, sizeof(block.bytes));
    Block evicted[slots + 1];
    int evictions = 0;
    {
      const Guard guard(*this);
      while (guard.held && count_ && (count_ == slots || kept_bytes_ + block.bytes > most_bytes)) {
        evicted[evictions++] = kept_[0];  // the oldest
        remove(kept_[0].memory);
      }
      if (guard.held && block.bytes <= most_bytes) {
        kept_[count_++] = block;
        kept_bytes_ += block.bytes;
      } else {
        evicted[evictions++] = block;
      }
    }
    for (int i = 0; i < evictions; ++i) std::free(evicted[i].memory);
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };
  struct Guard {
    explicit Guard(Pool& pool) : busy(pool.busy_) {
      for (int tries = 0; tries < 100 && !held; ++tries) {
        held = !busy.test_and_set(std::memory_order_acquire);
      }
    }
    ~Guard() {
      if (held) busy.clear(std::memory_order_release);
    }
    std::atomic_flag& busy;
    bool held = false;
  };

  static constexpr size_t header = 64;  // in front of each block: its size
  static constexpr size_t page = 4096, huge_page = size_t(2) << 20;
  static constexpr int slots = 16;
  static constexpr size_t most_bytes = size_t(256) << 20;

  static void* allocate(size_t bytes) {
    const bool huge = bytes >= 2 * huge_page;
    void* memory =
        std::aligned_alloc(huge ? huge_page : 64, huge ? round_up(bytes, huge_page) : bytes);
#if defined(__linux__)
    if (memory && huge) madvise(memory, bytes, MADV_HUGEPAGE);  // one fault for 512 pages
#endif
    return memory;
  }
  static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

  void remove(void* memory) {
    int i = 0;
    while (kept_[i].memory != memory) ++i;
    kept_bytes_ -= kept_[i].bytes;
    for (--count_; i < count_; ++i) kept_[i] = kept_[i + 1];
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  Block kept_[slots];
  int count_ = 0;
  size_t kept_bytes_ = 0;
};

}  // namespace
