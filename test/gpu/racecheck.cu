/* What compute-sanitizer's racecheck makes of data handed over by mbarriers that are used through PTX, as lc's Hopper kernels use them: small kernels, ordered by construction (but
 * the two that say so), each handing 32 numbers over eight times through one place in shared memory, or 1,024 through two places, and checking the result.
 *
 *   nvcc -std=c++17 -O3 -lineinfo -arch=sm_90a -Inative/include -o /tmp/racecheck test/gpu/racecheck.cu
 *   for k in 0 1 2 3 4 5 6 7; do compute-sanitizer --tool racecheck /tmp/racecheck $k; done
 *
 * The last two: racecheck says nothing of the right one, nor of the wrong one, whose results are wrong: it does not see what a bulk copy reads. That dQ is handed over right is shown by results.
 *
 * The writer waits until the place is free, writes, arrives on `full` (release); the reader waits for it (acquire), reads, arrives on `empty`. Where one lane arrives for its warp,
 * __syncwarp before it orders the other lanes' accesses. */
#include <cstdio>
#include <cstdlib>

#include "lctx/hopper.cuh"

enum Kind { kEveryLane, kOneLane, kBulkCopy, kDescription, kStaging, kWrong, kSums, kWrongSums };
const char* const names[] = {"every lane writes, reads and arrives",
                             "every lane writes and reads, one lane arrives for its warp",
                             "a bulk copy writes, every lane reads, one lane arrives",
                             "one thread writes an int beside a bulk copy, every lane reads it, one lane arrives",
                             "every lane writes, a bulk copy stores, one thread arrives",
                             "no order at all",
                             "eight warps write, one lane of each arrives, a thread of another warp has a bulk copy store or add it",
                             "the same, but nobody waits for the eighth warp"};
constexpr int kRounds = 8, kTile = 1024; /* floats */

template <Kind K>
__global__ void hand_over(const int* in, int* scratch, int* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace lctx::hopper;
  __shared__ alignas(128) int place[32];
  __shared__ int description;
  __shared__ alignas(8) uint64_t bars[2];
  const uint32_t full = smem(&bars[0]), empty = smem(&bars[1]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) mbarrier_init(full, K == kEveryLane ? 32 : 1), mbarrier_init(empty, K == kEveryLane ? 32 : 1), mbarrier_init_fence();
  __syncthreads();
  const auto arrive = [&](uint32_t bar) {
    if (K == kWrong) return;
    if (K == kEveryLane) return mbarrier_arrive(bar);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(bar);
  };
  const auto wait = [&](uint32_t bar, int parity) {
    if (K != kWrong) mbarrier_wait(bar, parity);
  };
  int sum = 0;
  for (int i = 0; i < kRounds; i++) {
    if (warp == 0 && (K == kBulkCopy || K == kDescription)) {
      if (lane == 0) {
        wait(empty, (i & 1) ^ 1);
        if (K == kDescription) description = i;
        mbarrier_expect(full, 128);
        bulk_load(smem(place), in + i * 32, 128, full);
      }
    } else if (warp == 0) {
      wait(empty, (i & 1) ^ 1);
      place[lane] = in[i * 32 + lane];
      if (K == kStaging) fence_async();
      arrive(full);
    } else if (K == kStaging) {
      if (lane == 0) {
        wait(full, i & 1);
        bulk_store(scratch + i * 32, smem(place), 128);
        bulk_commit();
        bulk_wait_read<0>();
        mbarrier_arrive(empty);
      }
    } else {
      wait(full, i & 1);
      sum = sum * 3 + place[31 - lane] + (K == kDescription ? description - i : 0);
      arrive(empty);
    }
  }
  if (K == kStaging) {
    bulk_wait<0>();
    __threadfence();
    __syncthreads();
    for (int i = 0; i < kRounds; i++) sum = sum * 3 + scratch[i * 32 + 31 - lane];
  }
  if (warp == 1) out[lane] = sum;
#endif
}

/* As attention's backward (hopper_backward.cuh) hands its tiles of dQ over: eight warps write a tile in pieces of 16 bytes a thread, each fences and one lane of it arrives; the thread of
 * this buffer waits for all of them, has the copy engine store the tile or add it to memory, gives the buffer back as soon as it was read, and goes on when the sum has arrived.
 * Round i goes through buffer i % 2 to sums[i % 2]; `in`: [kRounds, kTile]. */
template <bool RIGHT>
__global__ void __launch_bounds__(320) hand_over_sums(const float4* in, float* sums) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace lctx::hopper;
  __shared__ alignas(128) float4 buffers[2][kTile / 4];
  __shared__ alignas(8) uint64_t bars[4];
  const auto full = [&](int b) { return smem(&bars[b]); };
  const auto empty = [&](int b) { return smem(&bars[2 + b]); };
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    for (int b = 0; b < 2; b++) mbarrier_init(full(b), RIGHT ? 8 : 7), mbarrier_init(empty(b), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp >= 8) {
    if (lane != 0) return;
    const int b = warp - 8;
    for (int i = b, parity = 0; i < kRounds; i += 2, parity ^= 1) {
      mbarrier_wait(full(b), parity);
      if (i < 2) bulk_store(sums + b * kTile, smem(buffers[b]), kTile * 4);
      else bulk_add(sums + b * kTile, smem(buffers[b]), kTile * 4);
      bulk_commit();
      bulk_wait_read<0>();
      mbarrier_arrive(empty(b));
      bulk_wait<0>();
    }
    return;
  }
  for (int i = 0; i < kRounds; i++) {
    const int b = i % 2;
    if (RIGHT || warp < 7) mbarrier_wait(empty(b), (i / 2 & 1) ^ 1);
    else __nanosleep(500000);
    buffers[b][thread] = in[i * (kTile / 4) + thread];
    fence_async();
    __syncwarp();
    if (lane == 0 && (RIGHT || warp < 7)) mbarrier_arrive(full(b));
  }
#endif
}

#define OK(call)                                                       \
  do {                                                                 \
    const cudaError_t e = call;                                        \
    if (e != cudaSuccess) {                                            \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)); \
      return 1;                                                        \
    }                                                                  \
  } while (0)

template <bool RIGHT>
int check_sums(const char* name) {
  static float data[kRounds * kTile], got[2 * kTile];
  for (int i = 0; i < kRounds * kTile; i++) data[i] = static_cast<float>(static_cast<int>(i * 2654435761u >> 20) - 2048);  // sums are exact
  float *in, *sums;
  OK(cudaMalloc(&in, sizeof data));
  OK(cudaMalloc(&sums, sizeof got));
  OK(cudaMemcpy(in, data, sizeof data, cudaMemcpyHostToDevice));
  OK(cudaMemset(sums, 0xff, sizeof got));
  hand_over_sums<RIGHT><<<1, 320>>>(reinterpret_cast<const float4*>(in), sums);
  OK(cudaGetLastError());
  OK(cudaMemcpy(got, sums, sizeof got, cudaMemcpyDeviceToHost));
  int wrong = 0;
  for (int x = 0; x < 2 * kTile; x++) {
    float want = 0;
    for (int i = x / kTile; i < kRounds; i += 2) want += data[i * kTile + x % kTile];
    wrong += got[x] != want;
  }
  std::printf("%s: %s\n", name, wrong ? "wrong results" : "right results");
  return 0;
}

int main(int argc, char** argv) {
  const int kind = argc > 1 ? std::atoi(argv[1]) : 0;
  if (kind == kSums) return check_sums<true>(names[kSums]);
  if (kind == kWrongSums) return check_sums<false>(names[kWrongSums]);
  int data[kRounds * 32], want[32] = {}, got[32], *in, *scratch, *out;
  for (int i = 0; i < kRounds * 32; i++) data[i] = static_cast<int>(i * 2654435761u >> 20);
  for (int i = 0; i < kRounds; i++)
    for (int lane = 0; lane < 32; lane++) want[lane] = want[lane] * 3 + data[i * 32 + 31 - lane];
  OK(cudaMalloc(&in, sizeof data));
  OK(cudaMalloc(&scratch, sizeof data));
  OK(cudaMalloc(&out, sizeof got));
  OK(cudaMemcpy(in, data, sizeof data, cudaMemcpyHostToDevice));
  OK(cudaMemset(out, 0xff, sizeof got));
  switch (kind) {
    case kEveryLane: hand_over<kEveryLane><<<1, 64>>>(in, scratch, out); break;
    case kOneLane: hand_over<kOneLane><<<1, 64>>>(in, scratch, out); break;
    case kBulkCopy: hand_over<kBulkCopy><<<1, 64>>>(in, scratch, out); break;
    case kDescription: hand_over<kDescription><<<1, 64>>>(in, scratch, out); break;
    case kStaging: hand_over<kStaging><<<1, 64>>>(in, scratch, out); break;
    default: hand_over<kWrong><<<1, 64>>>(in, scratch, out);
  }
  OK(cudaGetLastError());
  OK(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
  int wrong = 0;
  for (int i = 0; i < 32; i++) wrong += got[i] != want[i];
  std::printf("%s: %s\n", names[kind < kWrong ? kind : kWrong], wrong ? "wrong results" : "right results");
  return 0;
}
