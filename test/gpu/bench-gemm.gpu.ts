/** bf16 GEMM on gpt-oss shapes: lc's own kernel beside cuBLASLt, in one run, on random data. */
import { copy, cublasLt, defaultStream, devices, Event, empty, fromTypedArray, gemm, type Tensor } from '@lc/tensor';

export function random(shape: number[]): Tensor {
  const [rows, columns] = shape as [number, number];
  using source = fromTypedArray(
    Float32Array.from({ length: 1 << 20 }, () => Math.random() - 0.5),
    [1 << 20],
  );
  const out = empty(shape, { dtype: 'bf16', device: 'cuda' });
  using low = empty([1 << 20], { dtype: 'bf16' });
  copy(low, source);
  const flat = out.view([rows * columns]);
  for (let at = 0; at < rows * columns; at += 1 << 20)
    copy(flat.rows(at, Math.min(1 << 20, rows * columns - at)), low.rows(0, Math.min(1 << 20, rows * columns - at)));
  return out;
}

async function measure(m: number, n: number, k: number, backend: 1 | 2): Promise<number> {
  using a = random([m, k]);
  using b = random([n, k]);
  using c = empty([m, n], { dtype: 'bf16', device: 'cuda' });
  using start = new Event('cuda', { timing: true });
  using end = new Event('cuda', { timing: true });
  const stream = defaultStream('cuda');
  const run = (times: number): void => {
    for (let i = 0; i < times; i++) gemm({ a, b, c, transB: true, backend });
  };
  run(5);
  let best = Number.POSITIVE_INFINITY;
  for (let round = 0; round < 5; round++) {
    start.record(stream);
    run(10);
    end.record(stream);
    await end.sync();
    best = Math.min(best, end.elapsedSince(start) / 10);
  }
  return (2 * m * n * k) / best / 1e9;
}

export async function benchGemm(): Promise<void> {
  console.log(`${devices().find((d) => d.device === 'cuda:0')?.name}; bf16, x W^T; cuBLASLt: ${cublasLt() ?? 'not found'}`);
  console.log('| m x n x k | lc TFLOP/s | cuBLASLt TFLOP/s | ratio |\n|---|---|---|---|');
  for (const [m, n, k] of [
    [32768, 2880, 4096],
    [32768, 4096, 2880],
    [32768, 5760, 2880],
    [8192, 8192, 8192],
  ] as const) {
    const ours = await measure(m, n, k, 1);
    const theirs = cublasLt() ? await measure(m, n, k, 2) : Number.NaN;
    console.log(`| ${m} x ${n} x ${k} | ${ours.toFixed(0)} | ${theirs.toFixed(0)} | ${(ours / theirs).toFixed(2)} |`);
  }
  for (const gib of [1, 4]) {
    const from = performance.now();
    const t = empty([gib * 2 ** 30], { dtype: 'u8', device: 'host' });
    console.log(`pinning ${gib} GiB of host memory: ${((performance.now() - from) / 1000).toFixed(2)} s`);
    t.dispose();
  }
}
