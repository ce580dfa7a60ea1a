/* The process's CPU threads. One parallel region at a time; a region that finds the pool busy (another worker_thread's region) runs serially on its
 * caller, as does a nested one. Workers are detached and the pool is never destroyed: process exit needs no join, and the addon is never unloaded. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <system_error>
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

/* A cgroup's CPU quota in CPUs, or 0 for none. In a container its own cgroup is at the root of the mount. */
double quota() {
  double limit = 0, period = 0;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {  // v2: "max 100000" when there is none
    if (std::fscanf(f, "%lf %lf", &limit, &period) != 2) limit = 0;
    std::fclose(f);
  } else {
    const auto number = [](const char* path) {
      double value = 0;
      if (FILE* g = std::fopen(path, "r")) {
        if (std::fscanf(g, "%lf", &value) != 1) value = 0;
        std::fclose(g);
      }
      return value;
    };
    limit = number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");  // v1: -1 when there is none
    period = number("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  }
  return limit > 0 && period > 0 ? limit / period : 0;
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
  if (const double limit = quota(); limit > 0) n = std::min(n, static_cast<int>(std::ceil(limit)));
  return std::max(1, n);
}

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool(cpus());
    return *pool;
  }
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void run(int64_t begin, int64_t end, int64_t grain, lctx_range_fn fn, void* ctx) {
    const int64_t n = end - begin;
    grain = std::max<int64_t>(1, grain);
    std::unique_lock<std::mutex> lock(caller_, std::defer_lock);
    if (n <= grain || t_inside || threads() == 1 || !lock.try_lock() || !start()) {
      fn(ctx, begin, end);
      return;
    }
    // Several ranges per thread, each claimed when a thread is free, so that one slow thread (another process's time slice) does not hold up the rest.
    const int64_t pieces = std::min<int64_t>(n / grain, threads() * 4);
    fn_ = fn;
    ctx_ = ctx;
    begin_ = begin;
    size_ = n;
    pieces_ = pieces;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);  // seq_cst, with inside_: see worker()
    generation_.fetch_add(1);
    generation_.notify_all();
    t_inside = true;
    work();
    t_inside = false;
    open_.store(false);
    const auto late = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1; inside_.load() != 0; spins++) {
      relax();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > late) std::this_thread::yield();
    }
  }

 private:
  static constexpr std::chrono::microseconds kSpin{50};

  explicit Pool(int threads) : threads_(threads) {
    // A forked child has none of the workers and unknown lock state: it goes on with one thread.
    pthread_atfork(nullptr, nullptr, [] {
      Pool::get().threads_.store(1);
      t_inside = false;
    });
  }

  /* False when no worker could be started. */
  bool start() {
    if (started_) return true;
    // Signals belong to the host's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int running = 1;
    try {
      for (; running < threads(); running++) std::thread([this] { worker(); }).detach();
    } catch (const std::system_error&) {  // a limit on threads: use those there are
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    threads_.store(running);
    started_ = true;
    return running > 1;
  }

  void work() {
    for (;;) {
      const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces_) return;
      // base + remainder spread over the first pieces: no product of sizes, and none smaller than the grain
      const int64_t base = size_ / pieces_, extra = size_ % pieces_;
      const int64_t at = begin_ + piece * base + std::min(piece, extra);
      fn_(ctx_, at, at + base + (piece < extra ? 1 : 0));
    }
  }

  void worker() {
    t_inside = true;
    uint32_t seen = 0;
    for (;;) {
      // Spin for a while (regions follow each other closely inside a step), then sleep.
      uint32_t now = generation_.load();
      if (now == seen) {
        const auto late = std::chrono::steady_clock::now() + kSpin;
        for (int spins = 1; now == seen; spins++) {
          relax();
          now = generation_.load();
          if (spins % 64 == 0 && std::chrono::steady_clock::now() > late) break;
        }
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

  std::atomic<int> threads_;
  bool started_ = false;  // under caller_
  std::mutex caller_;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<bool> open_{false};
  alignas(64) std::atomic<int32_t> inside_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) lctx_range_fn fn_ = nullptr;
  void* ctx_ = nullptr;
  int64_t begin_ = 0, size_ = 0, pieces_ = 0;
};

}  // namespace

int32_t num_threads() { return Pool::get().threads(); }
bool inside_parallel() { return t_inside; }
void parallel_for(int64_t begin, int64_t end, int64_t grain, lctx_range_fn fn, void* ctx) {
  if (end > begin) Pool::get().run(begin, end, grain, fn, ctx);
}

}  // namespace lctx::cpu
