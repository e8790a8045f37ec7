#include "core/parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/tensor.h"
#include "megalodon.h"

namespace megalodon {
namespace {

thread_local bool inside_task = false;

// A fixed set of workers that take ranges of one job at a time; the caller works too.
class Pool {
 public:
  explicit Pool(int64_t threads) {
    try {
      for (int64_t i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      // The system gives no more threads; those there are will do.
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int64_t threads() const { return static_cast<int64_t>(workers_.size()) + 1; }

  void run(int64_t count, int64_t grain, Task task, void* context) {
    std::lock_guard<std::mutex> one_job_at_a_time(jobs_);
    const int64_t ranges = std::min((count + grain - 1) / grain, threads());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = {count, ranges, task, context};
      next_.store(0);
      pending_ = ranges;
      ++generation_;
    }
    wake_.notify_all();
    take_ranges();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0 && busy_ == 0; });
  }

 private:
  struct Job {
    int64_t count = 0;
    int64_t ranges = 0;
    Task task = nullptr;
    void* context = nullptr;
  };

  void take_ranges() {
    int64_t finished = 0;
    inside_task = true;
    for (int64_t i; (i = next_.fetch_add(1)) < job_.ranges; ++finished) {
      job_.task(job_.count * i / job_.ranges, job_.count * (i + 1) / job_.ranges, job_.context);
    }
    inside_task = false;
    std::lock_guard<std::mutex> lock(mutex_);
    pending_ -= finished;
    if (pending_ == 0) done_.notify_all();
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      if (pending_ == 0) continue;  // woke after the job had ended
      ++busy_;
      lock.unlock();
      take_ranges();
      lock.lock();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex jobs_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job job_;
  std::atomic<int64_t> next_{0};
  int64_t pending_ = 0;
  int64_t busy_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
};

std::atomic<megalodon_parallel_for> engine{nullptr};
std::mutex pool_mutex;
// Shared with the calls it serves, so that it can be replaced while they run.
// Never destroyed: a call may outlive exit().
std::shared_ptr<Pool>& pool = *new std::shared_ptr<Pool>;
std::atomic<int64_t> wanted_threads{0};  // 0: one per core

int64_t thread_count() {
  if (const int64_t wanted = wanted_threads.load(); wanted > 0) return wanted;
  const unsigned cores = std::thread::hardware_concurrency();
  return cores == 0 ? 1 : cores;
}

// A forked child has none of the parent's threads: it starts with a new pool (the old one's memory is left alone).
void forget_pool_in_child() {
  new (&pool_mutex) std::mutex;
  new (&pool) std::shared_ptr<Pool>;
}

std::shared_ptr<Pool> current_pool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    (void)registered;
    pool = std::make_shared<Pool>(thread_count());
  }
  return pool;
}

}  // namespace

void run_parallel(int64_t count, int64_t grain, Task task, void* context) {
  if (grain < 1) grain = 1;
  if (inside_task) return task(0, count, context);
  if (const megalodon_parallel_for external = engine.load(std::memory_order_relaxed)) {
    external(0, count, grain, task, context);
    return;
  }
  current_pool()->run(count, grain, task, context);
}

}  // namespace megalodon

extern "C" void megalodon_set_parallel_for(megalodon_parallel_for engine) { megalodon::engine.store(engine); }

extern "C" int megalodon_set_num_threads(int64_t count) {
  using namespace megalodon;
  return guarded([&] {
    if (count < 1 || count > 4096) {
      throw Error{MEGALODON_VALUE_ERROR, "set_num_threads: count must be 1 to 4096; got " + std::to_string(count)};
    }
    std::shared_ptr<Pool> old;  // ends, where it is the last to hold it, after the lock is given back
    std::lock_guard<std::mutex> lock(pool_mutex);
    wanted_threads = count;
    old.swap(pool);
  });
}

extern "C" int64_t megalodon_num_threads(void) { return megalodon::thread_count(); }
