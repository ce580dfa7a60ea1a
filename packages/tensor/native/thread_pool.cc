/* The process's CPU threads. One parallel region at a time; a region that finds the pool busy (another worker_thread's region) runs serially on its
 * caller, as does a nested one. Workers are detached and the pool is never destroyed: process exit needs no join, and the addon is never unloaded. */
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "cpu_kernels.h"

namespace lctx::cpu {
namespace {

thread_local bool t_inside = false;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/* CPUs this process may use: affinity, then the cgroup's quota. */
int cpus() {
  if (const char* wish = std::getenv("LCTX_NUM_THREADS")) {
    const long n = std::strtol(wish, nullptr, 10);
    if (n >= 1 && n <= 1024) return static_cast<int>(n);
  }
  int n = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    double quota = 0, period = 0;
    if (std::fscanf(f, "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0) n = std::min(n, static_cast<int>(std::ceil(quota / period)));
    std::fclose(f);
  }
  return std::max(1, n);
}

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool(cpus());
    return *pool;
  }
  int threads() const { return threads_; }

  void run(int64_t begin, int64_t end, int64_t grain, lctx_range_fn fn, void* ctx) {
    const int64_t n = end - begin;
    grain = std::max<int64_t>(1, grain);
    std::unique_lock<std::mutex> lock(caller_, std::defer_lock);
    if (threads_ == 1 || n <= grain || t_inside || !lock.try_lock()) {
      fn(ctx, begin, end);
      return;
    }
    start();
    fn_ = fn;
    ctx_ = ctx;
    end_ = end;
    chunk_ = std::max(grain, (n + threads_ * 4 - 1) / (threads_ * 4));
    next_.store(begin, std::memory_order_relaxed);
    open_.store(true);  // seq_cst, with inside_: see worker()
    generation_.fetch_add(1);
    generation_.notify_all();
    t_inside = true;
    work();
    t_inside = false;
    open_.store(false);
    for (int spins = 0; inside_.load() != 0; spins++) {
      if (spins < 20000) relax();
      else std::this_thread::yield();
    }
  }

 private:
  explicit Pool(int threads) : threads_(threads) {
    // After fork the child has none of the workers and unknown lock state: it goes on with one thread.
    pthread_atfork(nullptr, nullptr, [] { Pool::get().threads_ = 1; });
  }

  void start() {
    if (started_) return;
    started_ = true;
    for (int i = 1; i < threads_; i++) {
      std::thread worker([this] { this->worker(); });
      worker.detach();
    }
  }

  void work() {
    for (;;) {
      const int64_t at = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (at >= end_) return;
      fn_(ctx_, at, std::min(end_, at + chunk_));
    }
  }

  void worker() {
    t_inside = true;
    uint32_t seen = 0;
    for (;;) {
      // Spin for a while (regions follow each other closely inside a step), then sleep.
      uint32_t now = generation_.load();
      for (int spins = 0; now == seen && spins < 4000; spins++) {
        relax();
        now = generation_.load(std::memory_order_acquire);
      }
      while (now == seen) {
        generation_.wait(seen);
        now = generation_.load();
      }
      seen = now;
      // Enter, then look whether the region is open. The caller closes it, then waits until nobody is inside. Both sequentially consistent, so either the
      // worker sees it closed, or the caller sees the worker; the job's fields are stable in between.
      inside_.fetch_add(1);
      if (open_.load()) work();
      inside_.fetch_sub(1);
    }
  }

  int threads_;
  bool started_ = false;
  std::mutex caller_;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<bool> open_{false};
  alignas(64) std::atomic<int32_t> inside_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  lctx_range_fn fn_ = nullptr;
  void* ctx_ = nullptr;
  int64_t end_ = 0, chunk_ = 1;
};

}  // namespace

int32_t num_threads() { return Pool::get().threads(); }
bool inside_parallel() { return t_inside; }
void parallel_for(int64_t begin, int64_t end, int64_t grain, lctx_range_fn fn, void* ctx) {
  if (end > begin) Pool::get().run(begin, end, grain, fn, ctx);
}

}  // namespace lctx::cpu
