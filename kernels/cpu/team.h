// The kernel's threads: all of them walk through the same phases, and share each phase's units of work.
//
// The calling thread is member 0; the others sleep between steps. In a phase each member takes the units of its own
// range and then those the others have not come to, so a member that the system has put aside delays nobody but by the
// unit it holds. A member that comes late finds the units gone and follows; whatever it still looks at belongs to its
// own step, which lives as long as somebody holds it.
#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

// The books of one step: which units are taken, and how many are done.
class Phases {
 public:
  Phases(int num_phases, int num_members)
      : num_members_(num_members), done_(num_phases), taken_(size_t(num_phases) * num_members) {}

  // Do units 0 .. num_units of phase `phase` together with the other members; returns when all of them are done.
  // `before_waiting` is called when there is no unit left to take.
  template <class Unit, class Callback>
  void share(int phase, int member, int num_units, Unit unit, Callback before_waiting) {
    int num_own = 0;
    for (int i = 0; i < num_members_; ++i) {
      const int owner = (member + i) % num_members_;
      const int begin = int(int64_t(num_units) * owner / num_members_);
      const int end = int(int64_t(num_units) * (owner + 1) / num_members_);
      std::atomic<int>& taken = taken_[size_t(phase) * num_members_ + owner].value;
      while (taken.load(std::memory_order_relaxed) < end - begin) {
        const int next = begin + taken.fetch_add(1, std::memory_order_relaxed);
        if (next >= end) break;
        unit(next);
        ++num_own;
      }
    }
    std::atomic<int>& done = done_[phase].value;
    if (num_own > 0) done.fetch_add(num_own, std::memory_order_release);
    before_waiting();
    for (int spins = 0; done.load(std::memory_order_acquire) < num_units; ++spins) {
      if (spins < 64)
        __builtin_ia32_pause();
      else
        sched_yield();
    }
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  int num_members_;
  std::vector<Counter> done_;
  std::vector<Counter> taken_;
};

// What the members do together. `run` is called once by each member that is in time; what it throws ends the process,
// as the others would wait for ever.
class Job {
 public:
  virtual ~Job() = default;
  virtual void run(int member) noexcept = 0;
};

class Team {
 public:
  explicit Team(int num_members) {
    try {
      for (int member = 1; member < num_members; ++member) threads_.emplace_back([this, member] { work(member); });
    } catch (...) {
      close();
      throw;
    }
  }

  ~Team() { close(); }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(threads_.size()) + 1; }

  // Run a job on all members; returns when the calling thread is through all of its phases.
  void run(const std::shared_ptr<Job>& job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = job;
      ++num_jobs_;
    }
    wake_.notify_all();
    job->run(0);
    const std::lock_guard lock(mutex_);
    job_.reset();
  }

 private:
  void work(int member) {
    int64_t seen = 0;
    while (true) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return is_closing_ || num_jobs_ > seen; });
        if (is_closing_) return;
        seen = num_jobs_;
        job = job_;
      }
      if (job) job->run(member);
    }
  }

  void close() {
    {
      const std::lock_guard lock(mutex_);
      is_closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  int64_t num_jobs_ = 0;
  bool is_closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace headrace
