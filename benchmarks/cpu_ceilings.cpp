// What this machine's cores reach together: bytes read from memory, and bfloat16 multiply-adds. Called by kernel_bench.
#include <chrono>
#include <thread>
#include <vector>

#include "simd.h"
#if defined(HEADRACE_HAS_AMX)
#include "amx.h"
#endif

using namespace headrace;

namespace {

template <class Work>
double seconds(int num_threads, Work work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back([=] { work(i); });
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

extern "C" {

// Bytes per second in one reading of `num_bytes` at `data`, a share per thread.
double read_bandwidth(const uint8_t* data, int64_t num_bytes, int num_threads) {
  const int64_t share = num_bytes / num_threads / 1024 * 1024;
  return double(share * num_threads) / seconds(num_threads, [=](int i) {
           Ints sums[4] = {};
           const uint8_t* end = data + (i + 1) * share;
           for (const uint8_t* p = data + i * share; p < end; p += 4 * sizeof(Ints)) {
             prefetch(p + 1024), prefetch(p + 1024 + 2 * sizeof(Ints));
             for (int j = 0; j < 4; ++j) sums[j] += load_as<Ints>(p + j * sizeof(Ints));
           }
           volatile int32_t sink = (sums[0] + sums[1] + sums[2] + sums[3])[0];
           (void)sink;
         });
}

// Floating-point operations per second (a multiply-add is two) of bfloat16 products out of registers and level 1.
double product_rate(int64_t num_rounds, int num_threads) {
#if defined(HEADRACE_HAS_AMX)
  constexpr double operations = 2.0 * 4 * 16 * 16 * 32;
#elif defined(__AVX512F__)
  constexpr int num_rows = 12;
#else
  constexpr int num_rows = 4;
#endif
#if !defined(HEADRACE_HAS_AMX)
  constexpr double operations = 2.0 * num_rows * 2 * LANES * 2;
#endif
  return double(num_rounds) * num_threads * operations / seconds(num_threads, [=](int) {
#if defined(HEADRACE_HAS_AMX)
           alignas(64) const bf16 rows[2 * 16 * 32] = {}, columns[2 * 16 * 32] = {};
           int configured = 0;
           amx::configure<16>(&configured);
           amx::zero();
           for (int64_t round = 0; round < num_rounds; ++round)
             amx::multiply<16>(rows, true, columns, columns + 512, 32);
           amx::release();
#else
           alignas(64) int32_t pairs[num_rows] = {};
           Ints columns[2] = {splat(1), splat(2)};
           Vec acc[num_rows][2] = {};
           for (int64_t round = 0; round < num_rounds; ++round) {
             asm volatile("" : : "r"(pairs) : "memory");
#pragma GCC unroll 16
             for (int m = 0; m < num_rows; ++m) {
               const Ints x = splat(pairs[m]);
               acc[m][0] = dot_pairs(acc[m][0], x, columns[0]);
               acc[m][1] = dot_pairs(acc[m][1], x, columns[1]);
             }
           }
           Vec total{};
#pragma GCC unroll 16
           for (int m = 0; m < num_rows; ++m) total += acc[m][0] + acc[m][1];
           volatile float sink = sum(total);
           (void)sink;
#endif
         });
}
}
