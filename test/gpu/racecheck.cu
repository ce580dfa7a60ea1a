/* What compute-sanitizer's racecheck makes of data handed over by mbarriers that are used through PTX, as lc's Hopper kernels use them: small kernels, ordered by construction (but
 * the last), each handing 32 numbers over eight times through one place in shared memory and checking the result.
 *
 *   nvcc -std=c++17 -O3 -lineinfo -arch=sm_90a -Inative/include -o /tmp/racecheck test/gpu/racecheck.cu
 *   for k in 0 1 2 3 4 5; do compute-sanitizer --tool racecheck /tmp/racecheck $k; done
 *
 * The writer waits until the place is free, writes, arrives on `full` (release); the reader waits for it (acquire), reads, arrives on `empty`. Where one lane arrives for its warp,
 * __syncwarp before it orders the other lanes' accesses. */
#include <cstdio>
#include <cstdlib>

#include "lctx/hopper.cuh"

enum Kind { kEveryLane, kOneLane, kBulkCopy, kDescription, kStaging, kWrong };
const char* const names[] = {"every lane writes, reads and arrives",
                             "every lane writes and reads, one lane arrives for its warp",
                             "a bulk copy writes, every lane reads, one lane arrives",
                             "one thread writes an int beside a bulk copy, every lane reads it, one lane arrives",
                             "every lane writes, a bulk copy stores, one thread arrives",
                             "no order at all"};
constexpr int kRounds = 8;

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

#define OK(call)                                                       \
  do {                                                                 \
    const cudaError_t e = call;                                        \
    if (e != cudaSuccess) {                                            \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)); \
      return 1;                                                        \
    }                                                                  \
  } while (0)

int main(int argc, char** argv) {
  const int kind = argc > 1 ? std::atoi(argv[1]) : 0;
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
  std::printf("%s: %s\n", names[kind], wrong ? "wrong results" : "right results");
  return 0;
}
