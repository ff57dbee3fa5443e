// parallel_for over a pool of threads that the process keeps.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace freshet {

inline void cpu_pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Invariants:
//  * one job runs at a time; a second caller does its own job alone instead of waiting;
//  * a worker touches a job only while that job's caller waits for it, so a job may live on the caller's stack;
//  * after fork() the child starts with a pool without threads (the parent's threads do not exist there).
class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool* const pool = [] {
      pthread_atfork(nullptr, nullptr, [] {
        (void)holder().release();  // not destroyed: that would wait for threads which do not exist here
        holder().reset(new ThreadPool);
      });
      holder().reset(new ThreadPool);
      return holder().get();
    }();
    (void)pool;
    return *holder();
  }

  // Calls f(task) for every task in [0, tasks), on at most `threads` threads, this one among them. Which thread does
  // which task is not defined. The first exception of a task is thrown here, after all others have ended.
  template <typename F>
  void run(std::size_t tasks, std::size_t threads, const F& f) {
    const std::unique_lock<std::mutex> owner(one_job_, std::try_to_lock);
    const std::size_t helpers = owner.owns_lock() ? recruit(std::min({threads, tasks, kMaxThreads})) : 0;
    if (helpers == 0) {
      for (std::size_t task = 0; task < tasks; ++task) f(task);
      return;
    }
    Job job{tasks, [](const void* body, std::size_t task) { (*static_cast<const F*>(body))(task); }, &f};
    start(job, helpers);
    work(job);
    while (job.active.load(std::memory_order_acquire) != 0) cpu_pause();
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  static constexpr std::size_t kMaxThreads = 256;
  static constexpr auto kSpin = std::chrono::microseconds(50);  // a batch is usually followed by the next one

  struct Job {
    std::size_t tasks;
    void (*call)(const void*, std::size_t);
    const void* body;
    std::atomic<std::size_t> next{0};
    std::atomic<std::size_t> active{0};  // workers that have not left the job
    std::mutex error_lock{};
    std::exception_ptr error{};
  };

  static std::unique_ptr<ThreadPool>& holder() {
    static auto* const pool = new std::unique_ptr<ThreadPool>;  // never destroyed: workers may outlive static objects
    return *pool;
  }

  // Makes sure of workers for a job of that many threads, the caller among them; fewer where the system refuses.
  std::size_t recruit(std::size_t threads) {
    const std::size_t wanted = threads == 0 ? 0 : threads - 1;
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; workers_ < wanted; ++workers_) {
        std::thread([this, index = workers_, seen = generation_.load()] { serve(index, seen); }).detach();
      }
    } catch (const std::system_error&) {
      return workers_;  // a limit on threads makes the job slower, not wrong
    }
    return wanted;
  }

  void start(Job& job, std::size_t helpers) {
    job.active.store(helpers, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void serve(std::size_t index, std::uint64_t seen) {
    for (;;) {
      Job* const job = wait(index, &seen);
      if (job == nullptr) continue;
      work(*job);
      job->active.fetch_sub(1, std::memory_order_release);  // the last touch of the job
    }
  }

  // The next job that wants worker `index`, or nullptr if this one does not.
  Job* wait(std::size_t index, std::uint64_t* seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (generation_.load(std::memory_order_acquire) == *seen && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32; ++i) cpu_pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != *seen; });
    *seen = generation_.load(std::memory_order_relaxed);
    return index < wanted_ ? job_ : nullptr;  // a job that does not want this worker may be gone
  }

  static void work(Job& job) {
    for (std::size_t task = job.next.fetch_add(1); task < job.tasks; task = job.next.fetch_add(1)) {
      try {
        job.call(job.body, task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(job.error_lock);
        if (!job.error) job.error = std::current_exception();
      }
    }
  }

  std::mutex one_job_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  Job* job_ = nullptr;
  std::size_t wanted_ = 0;   // workers [0, wanted_) take part in job_
  std::size_t workers_ = 0;
};

template <typename F>
void parallel_for(std::size_t tasks, std::size_t threads, const F& f) {
  if (threads <= 1 || tasks <= 1) {
    for (std::size_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  ThreadPool::instance().run(tasks, threads, f);
}

}  // namespace freshet
