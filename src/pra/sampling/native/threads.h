// Threads that share a piece of work.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace pra {

// Threads that wait for a job, first spinning, then asleep. The pool does one job at a time: while it is busy, another
// caller works alone.
class Pool {
   public:
    static Pool& here() {
        // A fork does not copy threads: make a new pool, and leak the old one.
        static std::mutex guard;
        static Pool* pool = nullptr;
        std::lock_guard<std::mutex> lock(guard);
        if (!pool || pool->process_ != getpid()) pool = new Pool();
        return *pool;
    }

    // Calls work(k) for every k below count, on up to count threads. The caller's thread is one of them.
    void run(int count, const std::function<void(int)>& work) {
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        const int helpers = only.owns_lock() ? started(count - 1) : 0;
        if (helpers) {
            {
                std::lock_guard<std::mutex> lock(state_);
                work_ = &work;
                helpers_ = helpers;
                left_.store(helpers, std::memory_order_relaxed);
                round_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        work(0);
        for (int k = helpers + 1; k < count; k++) work(k);
        while (helpers && left_.load(std::memory_order_acquire)) std::this_thread::yield();
    }

   private:
    // Starts missing threads, and returns how many of the wanted threads there are.
    int started(int wanted) {
        try {
            for (; threads_ < wanted; threads_++)
                std::thread([this, number = threads_ + 1, seen = round_.load()] { serve(number, seen); }).detach();
        } catch (const std::system_error&) {
        }
        return std::min(wanted, threads_);
    }

    void serve(int number, uint32_t seen) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
            while (round_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {}
            const std::function<void(int)>* work = nullptr;
            {
                std::unique_lock<std::mutex> lock(state_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                seen = round_.load(std::memory_order_relaxed);
                if (number <= helpers_) work = work_;
            }
            if (!work) continue;
            (*work)(number);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    const pid_t process_ = getpid();
    std::mutex busy_, state_;
    std::condition_variable wake_;
    int threads_ = 0;
    // The job of a round; state_ guards it.
    const std::function<void(int)>* work_ = nullptr;
    int helpers_ = 0;
    std::atomic<int> left_{0};
    std::atomic<uint32_t> round_{0};
};

// With fewer multiplications per thread, threads cost more time than they save.
constexpr int64_t WORTH_A_THREAD = 200'000;

// Calls part(first, last) over ranges that together are 0..size, on at most `threads` threads.
template <class Part>
void shared_out(int threads, int64_t size, int64_t multiplications, const Part& part) {
    const int64_t count = std::min<int64_t>({threads, size, multiplications / WORTH_A_THREAD});
    if (count < 2) {
        part(0, size);
        return;
    }
    Pool::here().run(static_cast<int>(count), [&](int k) { part(size * k / count, size * (k + 1) / count); });
}

}  // namespace pra
