// Problems by handle.
#pragma once

#include "describe.h"

#include <mutex>
#include <unordered_map>

#include <pthread.h>

namespace {

// A number that is no problem's can be told, for an operator that takes one can be
// called by anybody. Handles are never used twice.
class Problems {
 public:
  Problems() {
    // A fork while another thread holds the lock must not leave it held for ever.
    pthread_atfork([] { problems().lock_.lock(); }, [] { problems().lock_.unlock(); },
                   [] { problems().lock_.unlock(); });
  }
  static Problems& problems() {
    static Problems* const all =
        new Problems;  // never destroyed: the last problem may go after main
    return *all;
  }
  int64_t add(OwnedProblem* problem) {
    const std::lock_guard<std::mutex> guard(lock_);
    problem->owners = 1;
    by_handle_.emplace(++last_, problem);
    return last_;
  }
  OwnedProblem* find(int64_t handle) {
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
    OwnedProblem* unowned = nullptr;
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
  std::unordered_map<int64_t, OwnedProblem*> by_handle_;
  int64_t last_ = 0;
};

}  // namespace
