// How the body of a call runs: on a few threads, and without an exception that leaves the library. Threads are made anew
// for each call and end with it, so a process may fork between calls.
#pragma once

#include <stdint.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "hpcloss.h"

namespace hpcloss {

// Calls work(item) for every item in [0, items), on up to `threads` threads. Throws what a call threw.
template <class Work>
void parallel(int64_t threads, int64_t items, const Work& work) {
  if (threads > items) threads = items;
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto run = [&] {
    try {
      for (int64_t item; !failed && (item = next++) < items;) work(item);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(run);
  } catch (...) {
    // No more threads, or no memory for them, to be had: those that are there, at least this one, do the work.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

// What body() returns, or that there was no memory for it.
template <class Body>
int32_t guarded(const Body& body) {
  try {
    return body();
  } catch (...) {  // std::bad_alloc, or std::length_error of a vector
    return HPCLOSS_ERROR_MEMORY;
  }
}

}  // namespace hpcloss
