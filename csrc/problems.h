// Plans by handle.
#pragma once

#include "describe.h"

#include <mutex>
#include <unordered_map>

#include <pthread.h>

namespace {

// A number that is no plan's can be told, for an operator that takes one can be
// called by anybody. Handles are never used twice.
class Plans {
 public:
  Plans() {
    // A fork while another thread holds the lock must not leave it held for ever.
    pthread_atfork([] { plans().lock_.lock(); }, [] { plans().lock_.unlock(); },
                   [] { plans().lock_.unlock(); });
  }
  static Plans& plans() {
    static Plans* const all = new Plans;  // never destroyed: the last plan may go after main
    return *all;
  }
  int64_t add(OwnedPlan* plan) {
    const std::lock_guard<std::mutex> guard(lock_);
    plan->owners = 1;
    by_handle_.emplace(++last_, plan);
    return last_;
  }
  OwnedPlan* find(int64_t handle) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = by_handle_.find(handle);
    return found == by_handle_.end() ? nullptr : found->second;
  }
  bool keep(int64_t handle) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = by_handle_.find(handle);
    if (found == by_handle_.end()) return false;
    ++found->second->owners;
    return true;
  }
  void drop(int64_t handle) {
    OwnedPlan* unowned = nullptr;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      const auto found = by_handle_.find(handle);
      if (found == by_handle_.end() || --found->second->owners) return;
      unowned = found->second;
      by_handle_.erase(found);
    }
    delete unowned;
  }

 private:
  std::mutex lock_;
  std::unordered_map<int64_t, OwnedPlan*> by_handle_;
  int64_t last_ = 0;
};

}  // namespace
