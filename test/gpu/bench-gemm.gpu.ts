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

/**
 * TFLOP/s of each backend: the median of rounds of half a second or so that take turns, so that clocks and heat are the same for both. `best` is the fastest
 * round of ten products from a cool start.
 */
async function measure(m: number, n: number, k: number, backends: (1 | 2)[]): Promise<{ median: number; best: number }[]> {
  using a = random([m, k]);
  using b = random([n, k]);
  using c = empty([m, n], { dtype: 'bf16', device: 'cuda' });
  using start = new Event('cuda', { timing: true });
  using end = new Event('cuda', { timing: true });
  const stream = defaultStream('cuda');
  const flop = 2 * m * n * k;
  const round = async (backend: 1 | 2, times: number): Promise<number> => {
    start.record(stream);
    for (let i = 0; i < times; i++) gemm({ a, b, c, transB: true, backend });
    end.record(stream);
    await end.sync();
    return (flop * times) / end.elapsedSince(start) / 1e9;
  };
  const all = backends.map((): number[] => []);
  const best: number[] = [];
  for (const backend of backends) {
    await round(backend, 5);
    let most = 0;
    for (let i = 0; i < 3; i++) most = Math.max(most, await round(backend, 10));
    best.push(most);
  }
  for (let i = 0; i < 5; i++)
    for (const [at, backend] of backends.entries()) (all[at] as number[]).push(await round(backend, Math.ceil(2e14 / flop)));
  return all.map((list, at) => ({ median: list.sort((x, y) => x - y)[2] as number, best: best[at] as number }));
}

export async function benchGemm(): Promise<void> {
  console.log(`${devices().find((d) => d.device === 'cuda:0')?.name}; bf16, x W^T; cuBLASLt: ${cublasLt() ?? 'not found'}`);
  const backends: (1 | 2)[] = cublasLt() ? [1, 2] : [1];
  console.log('| m x n x k | lc TFLOP/s | cuBLASLt | ratio | best rounds: lc | cuBLASLt | ratio |\n|---|---|---|---|---|---|---|');
  for (const [m, n, k] of [
    [32768, 2880, 4096],
    [32768, 4096, 2880],
    [32768, 5760, 2880],
    [8192, 8192, 8192],
  ] as const) {
    const [ours, theirs] = await measure(m, n, k, backends);
    const cells = (['median', 'best'] as const).map((kind) => {
      const [mine, other] = [ours?.[kind] ?? Number.NaN, theirs?.[kind] ?? Number.NaN];
      return `${mine.toFixed(0)} | ${other.toFixed(0)} | ${(mine / other).toFixed(2)}`;
    });
    console.log(`| ${m} x ${n} x ${k} | ${cells.join(' | ')} |`);
  }
  for (const gib of [1, 4]) {
    const from = performance.now();
    const t = empty([gib * 2 ** 30], { dtype: 'u8', device: 'host' });
    console.log(`pinning ${gib} GiB of host memory: ${((performance.now() - from) / 1000).toFixed(2)} s`);
    t.dispose();
  }
}
